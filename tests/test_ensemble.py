"""The composed model: boosters add to their group, groups combine by weight, and what has no weight is not run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from ensemblelora import ensemble as module
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, add_adapter
from ensemblelora.ensemble import (
    Ensemble,
    Member,
    combined_scores,
    group_scores,
    load_ensemble,
    needed_adapters,
    predict_ensemble,
    predict_weighted,
    save_ensemble,
)
from ensemblelora.errors import StoreError
from ensemblelora.prediction import predict_members
from tests.tiny import disturb, make_adapted, make_split

MEMBERS = (
    Member("one", 0, "group", 1.0),
    Member("two", 1, "group", 1.0),
    Member("one-boost-1", 0, "booster", 0.5),
    Member("one-boost-2", 0, "booster", 0.25),
)
KINDS = ["verbalizer", "options", "sequence"]
TOKENS = 64


@pytest.fixture(scope="module")
def adapted():
    adapted = make_adapted("llama")
    for seed, member in enumerate(MEMBERS, start=1):
        add_adapter(adapted, member.name)
        disturb(adapted, member.name, seed=seed, scale=3.0)
    return adapted


def make_ensemble(weights, combine="logits", members=MEMBERS) -> Ensemble:
    return Ensemble(("t",), ((0,), ()), members, (tuple(weights),), (False,), combine)


def alone(adapted, split, name: str) -> np.ndarray:
    return predict_members(adapted, split, [name], max_tokens=TOKENS).values[0].astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_all_weight_on_one_group_is_that_group_alone(adapted, kind, combine):
    split = make_split(kind, ragged=kind == "options")
    both = predict_ensemble(adapted, make_ensemble([0.0, 1.0], combine), 0, split, max_tokens=TOKENS)
    expected = alone(adapted, split, "two")
    if combine == "probabilities" and kind != "sequence":
        expected = log_softmax(expected, axis=1)
    np.testing.assert_allclose(both, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["verbalizer", "options"])
@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_rows_under_weights_of_their_own_score_as_if_all_had_them(adapted, kind, combine):
    split = make_split(kind, n=5, ragged=kind == "options")
    weights = np.array([[1.0, 0.0], [0.25, 0.75], [1.0, 0.0], [0.0, 1.0], [0.25, 0.75]])
    found = predict_weighted(adapted, make_ensemble([0.5, 0.5], combine), split, weights, max_tokens=TOKENS)
    for row, shares in enumerate(weights):
        expected = predict_ensemble(adapted, make_ensemble(shares, combine), 0, split, max_tokens=TOKENS)[row]
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["verbalizer", "options"])
def test_boosters_add_their_change_from_the_start_times_their_rate(adapted, kind):
    split = make_split(kind, ragged=kind == "options")
    found = group_scores(adapted, split, MEMBERS, [1, 0], max_tokens=TOKENS).values
    z = {name: alone(adapted, split, name) for name in ("one", "two", "one-boost-1", "one-boost-2", THETA0)}
    present = np.isfinite(z["one"])
    with np.errstate(invalid="ignore"):
        expected = z["one"] + 0.5 * (z["one-boost-1"] - z[THETA0]) + 0.25 * (z["one-boost-2"] - z[THETA0])
    np.testing.assert_allclose(found[1][present], expected[present], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[0], z["two"], rtol=1e-5, atol=1e-6)  # others in its pass change the rounding
    assert np.isneginf(found[1][~present]).all()
    assert np.abs(found[1][present] - z["one"][present]).max() > 1e-3, "the boosters do nothing: the test is empty"


def test_free_text_leaves_boosters_out(adapted):
    split = make_split("sequence")
    found = group_scores(adapted, split, MEMBERS, [0], max_tokens=TOKENS)
    np.testing.assert_allclose(found.values[0], alone(adapted, split, "one"), rtol=1e-5, atol=1e-6)
    assert needed_adapters(MEMBERS, [0], "sequence") == ("one",)


def test_logits_are_averaged_before_and_probabilities_after_the_softmax(adapted):
    split, weights = make_split("verbalizer"), [0.3, 0.7]
    plain = tuple(member for member in MEMBERS if member.kind == "group")
    z = np.stack([alone(adapted, split, name) for name in ("one", "two")])
    logits = predict_ensemble(adapted, make_ensemble(weights, "logits", plain), 0, split, max_tokens=TOKENS)
    np.testing.assert_allclose(logits, 0.3 * z[0] + 0.7 * z[1], rtol=1e-5, atol=1e-6)
    mixed = predict_ensemble(adapted, make_ensemble(weights, "probabilities", plain), 0, split, max_tokens=TOKENS)
    shares = np.exp(z) / np.exp(z).sum(2, keepdims=True)
    np.testing.assert_allclose(np.exp(mixed), 0.3 * shares[0] + 0.7 * shares[1], rtol=1e-5, atol=1e-6)


def test_free_text_tokens_are_mixed_as_probabilities_whatever_the_config_says(adapted):
    split = make_split("sequence")
    scores = group_scores(adapted, split, MEMBERS, [0, 1], max_tokens=TOKENS)
    expected = logsumexp(scores.values.astype(np.float64), axis=0, b=np.array([0.2, 0.8])[:, None, None])
    for how in ("logits", "probabilities"):
        np.testing.assert_allclose(combined_scores(scores, [0.2, 0.8], how), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("weights", "run"),
    [([0.0, 1.0], ("two",)), ([1.0, 0.0], ("one", "one-boost-1", "one-boost-2", THETA0)), ([0.5, 0.5], None)],
)
def test_groups_without_weight_are_not_run(adapted, monkeypatch, weights, run):
    asked: list[tuple[str, ...]] = []

    def spy(adapted, encoded, members, **options):
        asked.append(tuple(members))
        return predict_members(adapted, encoded, members, **options)

    monkeypatch.setattr(module, "predict_members", spy)
    meter, split = Meter("predict"), make_split("verbalizer")
    predict_ensemble(adapted, make_ensemble(weights), 0, split, max_tokens=TOKENS, meter=meter)
    assert asked == [run or ("one", "two", "one-boost-1", "one-boost-2", THETA0)]
    assert meter.record.n_tokens == len(asked[0]) * split.row_lengths.sum()


def test_an_ensemble_is_read_back_as_it_was_saved(tmp_path):
    ensemble = make_ensemble([0.25, 0.75])
    save_ensemble(ensemble, tmp_path / "ensemble.json", note="for people")
    assert load_ensemble(tmp_path / "ensemble.json") == ensemble
    assert json.loads((tmp_path / "ensemble.json").read_text(encoding="utf-8"))["note"] == "for people"


def test_groups_and_members_name_each_other():
    ensemble = Ensemble(("a", "b", "c"), ((2, 0), (1,)), MEMBERS, ((1.0, 0.0),) * 3, (True,) * 3, "logits")
    assert ensemble.group_of == (0, 1, 0)
    assert [member.name for member in ensemble.members_of(0)] == ["one", "one-boost-1", "one-boost-2"]


@pytest.mark.parametrize("content", ['{"task_names": ["a"]}', '{"members": 3}', "[]", "nonsense"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "ensemble.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StoreError, match=r"ensemble\.json"):
        load_ensemble(path)
