"""Features of a share of the rows: which rows these are, how they stand for the others, and what is saved."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemblelora import artifacts, pipeline, stages
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import attach
from ensemblelora.config import AdapterConfig, EstimationConfig, GradientsConfig
from ensemblelora.data.batching import collate
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.splitting import sample_by_group
from ensemblelora.data.subset import take_examples
from ensemblelora.errors import DataError, StoreError
from ensemblelora.estimation import TaskFeatures, build_oracle, simulate_training
from ensemblelora.estimation.solver import prepare_problem, solve_subsets
from ensemblelora.estimation.steps import TrainingRows
from ensemblelora.gradients.collect import collect_features, find_active_layers, plan_features
from ensemblelora.gradients.plan import choose_examples, count_pass
from ensemblelora.passes import choose_max_tokens, run_lower, with_cache
from ensemblelora.seeding import generator_for
from ensemblelora.store import FeatureBlock, FeatureStore
from tests.test_estimation import make_block, make_features
from tests.test_steps import make_budget
from tests.tiny import make_adapted, make_base, make_split
from tests.tiny_run import TASKS, copy_run, read_config, read_json

HALF = GradientsConfig(proj_dim=16, max_tokens_per_batch=60, train_fraction=0.5)


# Which rows


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=30), fraction=st.floats(0.01, 1.0), seed=st.integers(0, 9)
)
def test_whole_groups_are_kept_as_many_rows_as_asked_for(sizes: list[int], fraction: float, seed: int) -> None:
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    labels = [g % 2 for g in groups]
    kept = sample_by_group(labels, groups, fraction, seed=seed)
    assert kept == sorted(set(kept)) and kept
    members = Counter(groups)
    assert all(n == members[g] for g, n in Counter(groups[i] for i in kept).items()), "a group is cut"
    assert kept == sample_by_group(labels, groups, fraction, seed=seed)
    assert abs(len(kept) - fraction * len(groups)) <= max(sizes)
    if fraction == 1:
        assert kept == list(range(len(groups)))


def test_every_label_keeps_its_share_and_seeds_draw_others() -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 10
    found = [sample_by_group(labels, range(100), 0.5, seed=seed) for seed in range(3)]
    assert [Counter(labels[i] for i in kept) for kept in found] == [{0: 30, 1: 15, 2: 5}] * 3
    assert len({tuple(kept) for kept in found}) == 3


def test_splits_have_shares_of_their_own() -> None:
    train, held, test = (make_split("verbalizer", n=20, split=split) for split in ("train", "validation", "test"))
    config = GradientsConfig(train_fraction=0.5, validation_fraction=0.25)
    assert [len(choose_examples(split, config, seed=0)) for split in (train, held, test)] == [10, 5, 20]
    other = replace(train, task="other")
    drawn = [choose_examples(*given, seed=seed).tolist() for *given, seed in ((train, config, 0), (other, config, 0))]
    assert drawn[0] != drawn[1], "each task draws for itself"


@pytest.mark.parametrize("kind", ["verbalizer", "options", "sequence"])
@pytest.mark.parametrize("layout", ["rows", "shared", "answer"])
def test_taken_examples_are_read_as_they_were_among_all(kind: str, layout: Any) -> None:
    whole = make_split(kind, n=9, n_choices=4, ragged=kind == "options")
    chosen = [7, 0, 3]
    part = take_examples(whole, chosen)
    assert part.ids == tuple(whole.ids[e] for e in chosen) and part.n_examples == 3
    one, other = (
        collate([(split, e) for e in examples], 0, layout=layout)
        for split, examples in ((whole, chosen), (part, range(3)))
    )
    for name, value in asdict(replace(one, spans=())).items():
        if name not in ("examples", "spans"):
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)
    assert take_examples(whole, []).n_examples == 0


# The gradient pass


def take(splits: list[EncodedSplit], folder: Path, config: GradientsConfig) -> tuple[dict[str, FeatureBlock], Meter]:
    store, prints = FeatureStore(folder), {(s.task, s.split): "x" for s in splits}
    with Meter("features") as meter:
        collect_features(make_adapted(), splits, store, config, seed=3, fingerprints=prints, meter=meter)
    return {f"{s.task} {s.split}": store.read(s.task, s.split) for s in splits}, meter


def make_splits() -> list[EncodedSplit]:
    kinds = ("verbalizer", "options", "sequence")
    tasks = [make_split(kind, n=12, n_choices=4, task=kind, ragged=kind == "options", seed=1) for kind in kinds]
    return [*tasks, *(make_split(kind, n=6, n_choices=4, task=kind, split="validation", seed=2) for kind in kinds)]


@pytest.mark.parametrize("form", ["rademacher", "none"])
def test_a_shares_features_are_those_of_the_same_rows_among_all(form: str, tmp_path: Path) -> None:
    splits, config = make_splits(), HALF.model_copy(update={"proj_type": form})
    whole, all_rows = take(splits, tmp_path / "whole", config.model_copy(update={"train_fraction": 1.0}))
    part, some = take(splits, tmp_path / "part", config)
    for split in splits:
        examples = choose_examples(split, config, seed=3)
        assert len(examples) == (6 if split.split == "train" else split.n_examples)
        found, expected = part[f"{split.task} {split.split}"], whole[f"{split.task} {split.split}"].take(examples)
        assert found.ids == expected.ids
        for name in ("labels", "n_choices", "groups"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_allclose(found.outputs, expected.outputs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.squared_norms, expected.squared_norms, rtol=1e-3)
        if form == "rademacher":
            np.testing.assert_allclose(found.features, expected.features, rtol=1e-3, atol=1e-4)
    if form == "none":  # columns mean something only among rows taken together: their inner products are the same
        grams = []
        for blocks in (
            part,
            {k: b.take(choose_examples(s, config, seed=3)) for s, (k, b) in zip(splits, whole.items(), strict=True)},
        ):
            rows = np.concatenate([b.features.reshape(-1, b.proj_dim) for b in blocks.values() if b.n_outputs == 1])
            grams.append(rows @ rows.T)
        np.testing.assert_allclose(*grams, rtol=1e-3, atol=1e-4 * np.abs(grams[0]).max())
    assert some.record.flops < all_rows.record.flops and some.record.n_tokens < all_rows.record.n_tokens


@pytest.mark.parametrize("form", ["rademacher", "none"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_pass_costs_what_is_counted_beforehand(form: str, fraction: float, tmp_path: Path) -> None:
    splits = make_splits()
    config = HALF.model_copy(update={"train_fraction": fraction, "proj_type": form})
    _, meter = take(splits, tmp_path, config)
    adapted, counted = make_adapted(), Meter("count")
    plan = count_pass(adapted, splits, config, seed=3, meter=counted)
    assert plan == plan_features(find_active_layers(adapted, splits), splits, config, seed=3)
    for name in ("flops", "n_tokens", "n_padded_tokens"):
        assert getattr(counted.record, name) == getattr(meter.record, name) > 0, name


def test_a_part_of_a_split_finds_what_was_kept_below(tmp_path: Path) -> None:
    adapted = attach(make_base(num_hidden_layers=4), AdapterConfig(r=4, layers_to_transform="top_half"), seed=0)
    split = make_split("options", n=9, n_choices=4, ragged=True)
    kept = with_cache(adapted, tmp_path, [split], max_bytes=10**8)
    assert kept.prefix is not None and kept.prefix.cache is not None
    ids = [split.ids[e] for e in (2, 5, 8)]
    part = stages.learning._find_rows(split, ids, kept)
    assert part.ids == tuple(ids)
    before = kept.prefix.cache.bytes_to_come
    assert before > 0, "nothing is filled yet, and the part counts for nothing of its own"
    batch = collate([(part, e) for e in range(3)], 0, layout="shared")
    with Meter("lower") as meter:
        found = run_lower(kept, batch, meter=meter)
    assert kept.prefix.cache.bytes_to_come == 0 and meter.record.flops > 0, "the whole split was run, once"
    torch.testing.assert_close(
        found * torch.from_numpy(batch.attention_mask)[..., None],
        run_lower(adapted, batch) * torch.from_numpy(batch.attention_mask)[..., None],
    )
    with Meter("again") as again:
        run_lower(kept, batch, meter=again)
    assert again.record.flops == 0
    assert stages.learning._find_rows(split, list(split.ids), kept) is split
    with pytest.raises(StoreError, match="rows that it does not have; take the features again"):
        stages.learning._find_rows(split, ["nowhere:1"], kept)


# The oracle


def repeat(block: FeatureBlock, times: int) -> FeatureBlock:
    """Every row several times, under names of their own."""
    rows = np.tile(np.arange(block.n_examples), times)
    return replace(block.take(rows), ids=tuple(f"{k}:{name}" for k, name in enumerate(block.take(rows).ids)))


SUBSETS = [(0,), (1,), (0, 1), (0, 1, 2)]


@pytest.mark.parametrize("balance", ["example", "task"])
def test_a_fit_to_a_share_is_the_fit_to_rows_that_all_occur_as_often(balance: Any) -> None:
    features = make_features("margin", "contrast", "logodds")
    times = (2, 1, 3)
    whole = [repeat(block, k) for block, k in zip(features.train, times, strict=True)]
    counts = [block.n_examples for block in whole]
    options = {"l2_penalty": 0.3, "balance": balance, "tolerance": 1e-10}
    # The unit of curvature is a mean over the rows that are there; equal here, so that ridges can be compared.
    part, full = prepare_problem(features.train, n_train=counts, **options), prepare_problem(whole, **options)
    full = replace(full, l2_penalty=0.3 * (part.unit / full.unit) ** 2)
    found, expected = solve_subsets(part, SUBSETS), solve_subsets(full, SUBSETS)
    np.testing.assert_allclose(found.penalties, expected.penalties, rtol=1e-6)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-4, atol=1e-6)


def test_with_all_rows_nothing_is_different() -> None:
    features = make_features("margin", "contrast", "logodds")
    counts, budget = tuple(block.n_examples for block in features.train), make_budget(3, steps_per_epoch=(4.0,) * 3)
    one = simulate_training(features.train, features.validation, SUBSETS, budget)
    np.testing.assert_array_equal(
        one, simulate_training(features.train, features.validation, SUBSETS, budget, n_train=counts)
    )
    config = EstimationConfig(method="ridge", l2_penalty=0.3)
    plain, told = (build_oracle([f], config).score(SUBSETS) for f in (features, replace(features, n_train=counts)))
    np.testing.assert_array_equal(plain.nll, told.nll)


def test_an_epoch_deals_all_rows_each_of_those_there_as_often_as_any() -> None:
    blocks = [make_block("a", n=7), make_block("b", n=5)]
    rows = TrainingRows(blocks, [17, 5])
    seen = set()
    for epoch in range(40):
        dealt = Counter(rows.deal(0, generator_for(epoch, "x")).tolist())
        assert sum(dealt.values()) == 17 and set(dealt) == set(range(7)) and set(dealt.values()) == {2, 3}
        seen |= {row for row, n in dealt.items() if n == 3}
        assert rows.deal(1, generator_for(epoch, "x")).tolist() == list(range(7, 12))
    assert seen == set(range(7)), "the rows that stand in for one more are drawn anew"


def test_a_share_of_equal_rows_is_trained_as_all_of_them() -> None:
    features = make_features("margin", "contrast")
    alike = [block.take([0] * 12) for block in features.train]
    alike = [replace(block, ids=tuple(map(str, range(12)))) for block in alike]
    share = [block.take(range(5)) for block in alike]
    budget = make_budget(2, steps_per_epoch=(4.0, 3.0), n_coordinates=7.0)
    subsets = [(0,), (1,)]
    whole = simulate_training(alike, features.validation, subsets, budget)
    found = simulate_training(share, features.validation, subsets, budget, n_train=(12, 12))
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)


def test_simulated_steps_are_charged_for_all_rows_and_fits_for_those_there() -> None:
    features = make_features("margin", "contrast", n=30)
    halves = tuple(block.take(range(block.n_examples // 2)) for block in features.train)
    counts = tuple(block.n_examples for block in features.train)
    part = TaskFeatures(halves, features.validation, counts)
    budget = make_budget(2)
    for config, rows in (
        (EstimationConfig(method="steps"), counts[0]),
        (EstimationConfig(method="ridge", l2_penalty=0.3), counts[0] // 2),
    ):
        oracle = build_oracle([part], config, budget=budget)
        oracle.solve([(0,)])
        iterations = oracle._memories[0].fits[0,].iterations
        started = oracle._memories[0].problem
        before = 0 if started is None else started.start_iterations * sum(b.outputs.size for b in halves)
        assert oracle.row_iterations == iterations * rows + before


def test_counts_that_cannot_be_are_refused() -> None:
    features = make_features("margin", "contrast")
    for counts in ((30,), (29, 33)):
        with pytest.raises(DataError, match="expected a share of each task"):
            replace(features, n_train=counts)


def test_a_share_of_more_and_more_rows_tends_to_the_prediction_of_all() -> None:
    features = make_features("margin", "contrast", "logodds", n=400)
    counts = tuple(block.n_examples for block in features.train)
    budget = make_budget(3, steps_per_epoch=(40.0,) * 3, n_coordinates=7.0, learning_rate=0.005)
    for config in (EstimationConfig(method="steps"), EstimationConfig(method="ridge", l2_penalty=0.3)):
        exact = build_oracle([features], config, budget=budget).score(SUBSETS).nll
        errors = []
        for share in (0.1, 0.3, 0.9):
            blocks = tuple(
                b.take(sample_by_group(b.labels.tolist(), b.groups.tolist(), share, seed=0)) for b in features.train
            )
            oracle = build_oracle([TaskFeatures(blocks, features.validation, counts)], config, budget=budget)
            errors.append(np.abs(oracle.score(SUBSETS).nll - exact).mean())
        assert errors[0] > errors[2] and errors[2] < 0.02, errors


# A run


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on half of the training and validation rows' features, up to its boosters."""
    folder = tmp_path_factory.mktemp("half")
    changes = {"gradients": {"train_fraction": 0.5, "validation_fraction": 0.5}}
    pipeline.run(read_config(copy_run(folder), **changes), until="boost")
    return folder


def test_a_run_takes_features_of_the_share_and_trains_on_all_rows(half_run: Path) -> None:
    store = FeatureStore(half_run / "run" / "features")
    assert all(store.read(task, "train").n_examples == 8 for task in TASKS)
    assert all(store.read(task, "validation").n_examples == 6 for task in TASKS)
    assert read_json(half_run, "oracle.json")["n_train"] == [16] * len(TASKS)
    assert sum(read_json(half_run, "oracle.json")["budget"]["steps_per_epoch"]) >= 2 * len(TASKS)
    health = read_json(half_run, "feature_health.json")
    assert (health["n_rows"], health["n_rows_taken"]) == (28 * len(TASKS), 14 * len(TASKS))
    rounds = read_json(half_run, "boosting.json")
    assert rounds and all(np.isfinite(entry["train_nll_before"]) for entry in rounds)


def test_a_run_names_the_size_that_its_forward_passes_had(half_run: Path) -> None:
    _, _, probe = stages.prepare(read_config(half_run / "recipe.yaml"))
    assert read_json(half_run, "environment.json")["max_tokens_per_batch"] == choose_max_tokens(probe, "auto")


def test_the_forecast_of_a_share_is_its_ledger(half_run: Path) -> None:
    config = read_config(half_run / "recipe.yaml", gradients={"train_fraction": 0.5, "validation_fraction": 0.5})
    found = pipeline.estimate(config)["features"]
    spent = next(e for e in read_json(half_run, "costs.json")["stages"] if e["stage"] == "features")
    assert (found["flops"], found["n_tokens"]) == (spent["flops"], spent["n_tokens"])
    whole = pipeline.estimate(read_config(half_run / "recipe.yaml"))
    assert 0.4 < found["flops"] / whole["features"]["flops"] < 0.6
    assert pipeline.estimate(config)["boost"]["flops"] < whole["boost"]["flops"]


def test_the_oracle_of_a_share_is_read_back_as_it_was(half_run: Path) -> None:
    config = read_config(half_run / "recipe.yaml", gradients={"train_fraction": 0.5, "validation_fraction": 0.5})
    oracle = stages.read_oracle(half_run / "run", TASKS, config.estimation)
    assert oracle.replicates[0].counts == (16,) * len(TASKS)
    arrays = artifacts.load_arrays(half_run / "run" / "affinity.npz")
    assert np.isfinite(arrays["matrix"]).all()
    plan = read_json(half_run, "plan.json")
    groups = [tuple(group) for group in plan["groups"]]
    assert np.isfinite(oracle.score(groups).nll).all()


def test_other_shares_are_other_features_and_the_same_share_is_found(
    half_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(shutil.copytree(half_run / "run", tmp_path / "run"))

    def ask(share: float) -> None:
        gradients = {"train_fraction": share, "validation_fraction": 0.5}
        pipeline.run(read_config(half_run / "recipe.yaml", out=out, gradients=gradients), until="features")

    monkeypatch.setattr(stages.choosing, "collect_features", lambda *a, **k: pytest.fail("taken again"))
    ask(0.5)
    with pytest.raises(pytest.fail.Exception, match="taken again"):
        ask(0.25)
