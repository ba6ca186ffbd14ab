"""The final table against numbers worked out by hand, row by row."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax

from ensemblelora.config import EvaluationConfig
from ensemblelora.evaluation.evaluate import compare_methods, score_method
from ensemblelora.prediction import MemberScores
from tests.tiny import make_split

CONFIG = EvaluationConfig(n_bootstrap=200)


def make_scores(split, seed: int) -> np.ndarray:
    """Random class scores, or log-probabilities of the right tokens."""
    rng = np.random.default_rng(seed)
    if split.kind == "sequence":
        return -rng.exponential(size=(int((split.row_lengths - split.answer_starts).sum()), 1))
    scores = rng.normal(size=(split.n_examples, int(split.n_choices.max())))
    return np.where(np.arange(scores.shape[1]) < split.n_choices[:, None], scores, -np.inf)


def make_layout(split) -> MemberScores:
    lengths = split.row_lengths - split.answer_starts if split.kind == "sequence" else np.ones(split.n_examples, int)
    row_example = np.repeat(np.arange(split.n_examples), lengths)
    weights = np.repeat(1.0 / lengths, lengths).astype(np.float32)
    return MemberScores(split.task, split.kind, np.zeros((0, len(row_example), 1)), row_example, weights)


SPLITS = (
    make_split("verbalizer", n=8, seed=1, task="first", split="test"),
    make_split("options", n=7, seed=2, task="second", split="test", ragged=True),
    make_split("sequence", n=6, seed=3, task="written", split="test"),
)
SCORES = {name: [make_scores(split, 10 * m + i) for i, split in enumerate(SPLITS)] for m, name in enumerate("abc")}
EXACT = {name: {2: np.random.default_rng(m).random(6) < 0.5} for m, name in enumerate("abc")}


def nll_of(task: int, scores: np.ndarray) -> np.ndarray:
    split = SPLITS[task]
    if split.kind == "sequence":
        lengths = split.row_lengths - split.answer_starts
        return np.array([-piece.mean() for piece in np.split(scores[:, 0], np.cumsum(lengths)[:-1])])
    return -log_softmax(scores, axis=1)[np.arange(split.n_examples), split.labels]


def correct_of(task: int, method: str) -> np.ndarray:
    split = SPLITS[task]
    return EXACT[method][2] if split.kind == "sequence" else SCORES[method][task].argmax(1) == split.labels


@pytest.fixture(scope="module")
def table():
    return compare_methods(SCORES, [make_layout(s) for s in SPLITS], SPLITS, CONFIG, seed=0, exact=EXACT)


def test_every_method_is_scored_on_every_task(table):
    assert list(table["methods"]) == ["a", "b", "c"]
    for name, method in table["methods"].items():
        for task, split in enumerate(SPLITS):
            found = method["per_task"][split.task]
            assert found["kind"] == split.kind and found["n_examples"] == split.n_examples
            assert found["nll"] == pytest.approx(nll_of(task, SCORES[name][task]).mean(), rel=1e-6)
            assert found["accuracy"] == pytest.approx(correct_of(task, name).mean())
            assert found["nll_low"] <= found["nll"] <= found["nll_high"]
        for metric in ("nll", "accuracy"):
            per_task = [entry[metric] for entry in method["per_task"].values()]
            assert method["mean"][metric] == pytest.approx(np.mean(per_task))


def test_differences_are_paired_and_agree_with_the_table(table):
    pairs = {(entry["a"], entry["b"]) for entry in table["differences"]}
    assert pairs == {("c", "b"), ("c", "a"), ("b", "a")}, "later methods are compared with earlier ones"
    for entry in table["differences"]:
        first, second = (table["methods"][entry[side]] for side in ("a", "b"))
        values = [m["per_task"][entry["task"]] if entry["task"] else m["mean"] for m in (first, second)]
        assert entry["difference"] == pytest.approx(values[0][entry["metric"]] - values[1][entry["metric"]])
        assert entry["low"] <= entry["difference"] <= entry["high"]
    per_pair = len(table["differences"]) / len(pairs)
    assert per_pair == 2 * (len(SPLITS) + 1), "two metrics, each task and the mean"


def test_what_does_not_exist_is_null_and_not_a_number_that_json_lacks(table):
    written = table["methods"]["a"]["per_task"]["written"]
    assert written["macro_f1"] is written["majority"] is written["is_above_chance"] is None
    json.loads(json.dumps(table, allow_nan=False))


def test_without_generated_answers_free_text_has_no_accuracy():
    layouts = [make_layout(s) for s in SPLITS]
    table = compare_methods(SCORES, layouts, SPLITS, CONFIG, seed=0, exact={})
    assert table["methods"]["a"]["per_task"]["written"]["accuracy"] is None
    tasks = {entry["task"] for entry in table["differences"] if entry["metric"] == "accuracy"}
    assert tasks == {"first", "second", None}


def test_intervals_draw_groups_and_not_rows():
    split = SPLITS[0]
    scores, layout = make_scores(split, 5), make_layout(split)
    single = score_method(scores, layout, split, CONFIG, seed=0)
    together = score_method(scores, layout, replace(split, groups=np.zeros(8, dtype=np.int64)), CONFIG, seed=0)
    assert single.n_groups == 8 and together.n_groups == 1
    assert np.isfinite(single.nll_low) and np.isnan(together.nll_low), "one group says nothing of the spread"


def test_the_same_seed_gives_the_same_intervals(table):
    again = compare_methods(SCORES, [make_layout(s) for s in SPLITS], SPLITS, CONFIG, seed=0, exact=EXACT)
    other = compare_methods(SCORES, [make_layout(s) for s in SPLITS], SPLITS, CONFIG, seed=1, exact=EXACT)
    assert again == table != other
