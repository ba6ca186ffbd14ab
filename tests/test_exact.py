"""Exact inner products against their slow twins: numpy on whole gradients, and fits on explicit coordinates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ensemblelora import pipeline
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, attach
from ensemblelora.config import AdapterConfig, BoostingConfig, EstimationConfig, GradientsConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import ConfigError, OutputError, StoreError
from ensemblelora.estimation import Oracle, TaskFeatures, TrainingBudget, build_oracle
from ensemblelora.gradients import collect, exact
from ensemblelora.gradients.collect import FeatureHealth, collect_features, find_active_layers, plan_features
from ensemblelora.gradients.exact import (
    choose_form,
    compute_gram,
    factor_gram,
    join_fingerprints,
    measure_error,
    open_scratch,
)
from ensemblelora.gradients.output import choose_modes
from ensemblelora.passes import with_cache
from ensemblelora.prefix import HiddenCache
from ensemblelora.store import FeatureBlock, FeatureStore
from tests.test_boosting import assert_same_step, find, make_model, make_tasks
from tests.test_collect import autograd_features
from tests.tiny import make_adapted, make_base, make_split
from tests.tiny_run import TASKS, edit_rows, flip, make_inputs, read_config, read_json

EXACT = GradientsConfig(proj_type="none", max_tokens_per_batch=60)
SUBSETS = [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)]


def make_splits() -> list[EncodedSplit]:
    """Three tasks of different kinds, train and validation; the ragged one has batches with few contrasts."""
    kinds = (("verbalizer", 2, False), ("options", 5, True), ("sequence", 1, False))
    return [
        make_split(kind, n=n, n_choices=k, seed=10 * i + n, task=f"t{i}", split=split, ragged=ragged)
        for split, n in (("train", 14), ("validation", 9))
        for i, (kind, k, ragged) in enumerate(kinds)
    ]


def take(
    adapted: AdaptedModel, splits: Sequence[EncodedSplit], folder: Path, config: GradientsConfig = EXACT, **options
) -> tuple[dict[tuple[str, str], FeatureBlock], FeatureHealth]:
    store, prints = FeatureStore(folder), {(s.task, s.split): "x" for s in splits}
    health = collect_features(adapted, splits, store, config, seed=0, fingerprints=prints, **options)
    return {key: store.read(*key) for key in prints}, health


def stack(blocks: dict[tuple[str, str], FeatureBlock], splits: Sequence[EncodedSplit]) -> np.ndarray:
    """Features of every row and output of all splits, one after the other, ``(N, d)``."""
    found = [blocks[s.task, s.split].features for s in splits]
    return np.concatenate([f.reshape(-1, f.shape[2]) for f in found]).astype(np.float64)


def keep_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MAX_GRAM_ROWS", 0)


def write_rows(folder: Path, rows: np.ndarray) -> np.ndarray:
    """Features of given gradients, by way of the file."""
    with open_scratch(folder, n_rows=len(rows), n_coordinates=rows.shape[1]) as scratch:
        half = len(rows) // 2
        scratch.map_rows(half, len(rows))[:] = rows[half:]
        scratch.map_rows(0, half)[:] = rows[:half]
        features = factor_gram(compute_gram(scratch))
        error = measure_error(scratch, features)
    assert error is None or error < 1e-6
    assert not list(folder.iterdir()), "nothing of the gradients is left"
    return features


def make_rows(n: int = 40, p: int = 90, *, rank: int | None = None, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, p)) if rank is None else rng.normal(size=(n, rank)) @ rng.normal(size=(rank, p))
    return (rows * 10.0 ** rng.uniform(-4, 3, (n, 1))).astype(np.float32)


def assert_same_products(features: np.ndarray, rows: np.ndarray, tolerance: float = 1e-6) -> None:
    expected = rows.astype(np.float64) @ rows.astype(np.float64).T
    scale = np.linalg.norm(rows.astype(np.float64), axis=1)
    error = np.abs(features.astype(np.float64) @ features.astype(np.float64).T - expected)
    assert (error <= tolerance * np.outer(scale, scale)).all()


@pytest.mark.parametrize(("block_bytes", "factor_rows"), [(2**28, 512), (8 * 40 * 7, 3), (1, 1)])
def test_products_of_features_are_those_of_the_rows_however_they_are_cut(
    block_bytes: int, factor_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(exact, "_FACTOR_ROWS", factor_rows)
    rows = make_rows()
    features = write_rows(tmp_path, rows)
    assert features.shape == (40, 40) and features.dtype == np.float32
    assert_same_products(features, rows)


def test_rows_of_all_sizes_that_depend_on_each_other_take_as_many_columns_as_their_rank(tmp_path: Path) -> None:
    rows = make_rows(rank=6)
    rows = np.concatenate([rows, np.zeros((3, 90), np.float32), rows[:5]])
    features = write_rows(tmp_path, rows)
    # Rounded to float32, rows of rank six are a little off it; what is off stays below a millionth of a row.
    assert 6 <= features.shape[1] <= 20
    assert_same_products(features, rows)
    assert not features[40:43].any()
    whole = np.round(make_rows(rank=6, seed=1) / np.abs(make_rows(rank=6, seed=1)).max(1, keepdims=True) * 4)
    base = whole[:4].astype(np.float32)
    assert write_rows(tmp_path, np.concatenate([base, 2 * base, -base])).shape[1] == np.linalg.matrix_rank(base)


def test_no_gradient_at_all_is_one_column_of_zeros(tmp_path: Path) -> None:
    assert write_rows(tmp_path, np.zeros((4, 9), np.float32)).tolist() == [[0.0]] * 4


def test_a_wrong_order_of_rows_shows_in_the_measured_error(tmp_path: Path) -> None:
    rows = make_rows()
    with open_scratch(tmp_path, n_rows=40, n_coordinates=90) as scratch:
        scratch.map_rows(0, 40)[:] = rows
        features = factor_gram(compute_gram(scratch))
        assert measure_error(scratch, features) < 1e-7
        assert measure_error(scratch, np.roll(features, 1, axis=0)) > 0.05
        assert measure_error(scratch, features * np.eye(40, dtype=np.float32)[:, :1]) is None, "one row makes no pair"


def test_features_have_autograds_inner_products_and_health_says_so(tmp_path: Path) -> None:
    adapted, splits = make_adapted(), make_splits()
    blocks, health = take(adapted, splits, tmp_path)
    modes = choose_modes(splits, "auto")
    gradients = [autograd_features(adapted, split, modes[split.task])[1] for split in splits]
    rows = np.concatenate([g.reshape(-1, g.shape[2]) for g in gradients])
    found = stack(blocks, splits)
    assert found.shape[0] == len(rows) == 23 * (1 + 4 + 1)
    assert_same_products(found, rows, 1e-4)
    assert (health.form, health.proj_dim, health.n_coordinates) == ("gram", found.shape[1], rows.shape[1])
    assert health.projection_error < 1e-6 and health.batch_error < 1e-5
    assert found.shape[1] <= int((rows != 0).any(axis=1).sum()) < rows.shape[1]


def test_everything_but_the_features_is_what_coordinates_come_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, splits = make_adapted(), make_splits()
    kept, _ = take(adapted, splits, tmp_path / "a")
    keep_coordinates(monkeypatch)
    explicit, health = take(adapted, splits, tmp_path / "b")
    assert health.form == "coordinates"
    for key, block in kept.items():
        for name in ("outputs", "labels", "n_choices", "squared_norms", "groups"):
            np.testing.assert_array_equal(getattr(block, name), getattr(explicit[key], name))
        assert (block.ids, block.mode) == (explicit[key].ids, explicit[key].mode)
        np.testing.assert_allclose(
            (block.features.astype(np.float64) ** 2).sum((1, 2)), block.squared_norms, rtol=1e-5, atol=1e-12
        )


def test_the_order_of_splits_and_the_batches_do_not_matter(tmp_path: Path) -> None:
    adapted, splits = make_adapted(), make_splits()
    blocks, _ = take(adapted, splits, tmp_path / "a")
    first = stack(blocks, splits)
    for i, config in enumerate((EXACT, EXACT.model_copy(update={"max_tokens_per_batch": 2048}))):
        others, _ = take(adapted, [*splits[3:], *splits[:3]][::-1], tmp_path / f"b{i}", config)
        assert_same_products(stack(others, splits), first, 1e-5)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskFeatures, TaskFeatures]:
    """The same rows by their inner products, and by their coordinates."""
    adapted, splits, found = make_adapted(), make_splits(), []
    for limit in (exact.MAX_GRAM_ROWS, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exact, "MAX_GRAM_ROWS", limit)
            blocks, _ = take(adapted, splits, tmp_path_factory.mktemp(f"limit-{limit}"))
        train, validation = (
            tuple(blocks[s.task, s.split] for s in splits if s.split == name) for name in ("train", "validation")
        )
        found.append(TaskFeatures(train, validation))
    assert found[0].train[0].proj_dim < 140 < found[1].train[0].proj_dim
    return found[0], found[1]


def assert_same_scores(first: Oracle, second: Oracle, rtol: float) -> None:
    a, b = first.score(SUBSETS), second.score(SUBSETS)
    base = first.score([()]).nll
    assert np.abs(a.nll - base).max() > 0.05, "the fits move"
    np.testing.assert_allclose(a.nll, b.nll, rtol=rtol)
    np.testing.assert_allclose(a.distances, b.distances, rtol=max(rtol, 1e-5))
    np.testing.assert_array_equal(a.accuracy, b.accuracy)


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_ridge_fits_predict_what_coordinates_predict(penalty: float, both) -> None:
    # The unit of a penalty is the mean curvature of a dimension: the same ridge is another number in fewer of them.
    kept, explicit = both
    ratio = kept.train[0].proj_dim / explicit.train[0].proj_dim
    settings = EstimationConfig(method="ridge", l2_penalty=penalty, tolerance=1e-8)
    relative = settings.model_copy(update={"l2_penalty": penalty * ratio})
    assert_same_scores(build_oracle([kept], relative), build_oracle([explicit], settings), 1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_simulated_steps_predict_what_coordinates_predict(weight_decay: float, both) -> None:
    budget = TrainingBudget(
        learning_rate=0.01, num_train_epochs=4, evaluations_per_epoch=1, warmup_ratio=0.1, lr_scheduler_type="linear",
        weight_decay=weight_decay, max_grad_norm=0.5, steps_per_epoch=(2.0, 3.0, 2.0),
        n_coordinates=both[1].train[0].proj_dim,
    )  # fmt: skip
    kept, explicit = (build_oracle([f], EstimationConfig(method="steps"), budget=budget) for f in both)
    assert_same_scores(kept, explicit, 1e-4)


def test_a_boosters_dual_direction_is_that_of_coordinates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_model()
    kept = make_tasks(adapted, tmp_path / "a", EXACT)
    keep_coordinates(monkeypatch)
    explicit = make_tasks(adapted, tmp_path / "b", EXACT)
    ratio = kept[0].features.proj_dim / explicit[0].features.proj_dim
    assert ratio < 1
    assert_same_step(find(adapted, kept, EXACT, l2_penalty=0.1 * ratio), find(adapted, explicit, EXACT, l2_penalty=0.1))


def test_complete_stores_are_kept_and_one_missing_split_means_all(tmp_path: Path) -> None:
    adapted, splits = make_adapted(), make_splits()
    with Meter("first") as first:
        take(adapted, splits, tmp_path, meter=first)
    with Meter("again") as again:
        blocks, health = take(adapted, splits, tmp_path, meter=again)
    assert again.record.n_tokens == 0
    assert (health.form, health.proj_dim) == ("gram", blocks["t0", "train"].proj_dim)
    assert health.projection_error is None, "not measured where nothing is computed"
    shutil.rmtree(next(path for path in tmp_path.iterdir() if path.name.startswith("t1_train")))
    with Meter("all") as everything:
        take(adapted, splits, tmp_path, meter=everything)
    assert everything.record.n_tokens == first.record.n_tokens


@pytest.mark.parametrize("config", [EXACT, GradientsConfig(proj_dim=8)])
def test_what_a_killed_process_left_is_removed(config: GradientsConfig, tmp_path: Path) -> None:
    (tmp_path / exact._FOLDER).mkdir()
    (tmp_path / exact._FOLDER / exact._FILE).write_bytes(bytes(100))
    take(make_adapted(), make_splits(), tmp_path, config)
    assert not (tmp_path / exact._FOLDER).exists()


class _Broken(Exception):
    pass


def break_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, n_calls: int) -> None:
    """Let a function fail on its n-th call."""
    calls, real = [], getattr(owner, name)

    def call(*args, **options):
        calls.append(name)
        if len(calls) == n_calls:
            raise _Broken
        return real(*args, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(("name", "n_calls"), [("compute_features", 3), ("compute_gram", 1), ("factor_gram", 1)])
def test_an_interruption_leaves_no_gradients_and_no_block(
    name: str, n_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, collect, name, n_calls)
    with pytest.raises(_Broken):
        take(make_adapted(), make_splits(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_blocks_of_two_computations_never_pass_for_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, splits = make_adapted(), make_splits()
    take(adapted, splits, tmp_path)
    shutil.rmtree(next(path for path in tmp_path.iterdir() if path.name.startswith("t0_train")))
    for n_commits in range(1, len(splits) + 1):
        with monkeypatch.context() as patch:
            break_at(patch, FeatureStore, "_commit", n_commits)
            with pytest.raises(_Broken):
                take(adapted, splits, tmp_path)
        store = FeatureStore(tmp_path)
        assert not all(store.has(s.task, s.split, "x") for s in splits), "the next attempt would keep a mixture"
    blocks, _ = take(adapted, splits, tmp_path)
    fresh, _ = take(adapted, splits, tmp_path / "fresh")
    assert_same_products(stack(blocks, splits), stack(fresh, splits), 1e-5)


def test_a_full_disk_is_refused_before_anything_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, splits = make_adapted(), make_splits()
    plan = plan_features(find_active_layers(adapted, splits), splits, EXACT, seed=0)
    needed = 4 * plan.n_rows * plan.n_coordinates
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exact.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with Meter("t") as meter, pytest.raises(OutputError, match=r"needs 0\.0 GB here for 138 gradients of 768 numbers"):
        take(adapted, splits, tmp_path, meter=meter)
    assert meter.record.n_tokens == 0 and not list(tmp_path.iterdir())
    monkeypatch.setattr(exact.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    sizes = {"n_rows": plan.n_rows, "n_coordinates": plan.n_coordinates}
    with pytest.raises(OutputError, match="free some"), open_scratch(tmp_path, **sizes, reserved_bytes=1):
        pass
    take(adapted, splits, tmp_path)


def test_disk_promised_to_the_cache_of_lower_layers_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(num_hidden_layers=4)
    plain, splits = attach(base, AdapterConfig(r=4, layers_to_transform="top_half"), seed=0), make_splits()
    adapted = with_cache(plain, tmp_path / "cache", splits, max_bytes=10**9)
    cache = adapted.prefix.cache
    assert isinstance(cache, HiddenCache)
    promised = cache.bytes_to_come
    assert promised == sum(place.n_slots for place in cache._places.values()) * 32 * 4 > 0
    asked: list[int] = []
    real = collect.open_scratch
    monkeypatch.setattr(collect, "open_scratch", lambda *a, **k: asked.append(k["reserved_bytes"]) or real(*a, **k))
    take(adapted, splits, tmp_path / "store")
    assert asked == [promised]
    assert cache.bytes_to_come == 0, "the pass filled it"


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = collect.compute_features

    def spoil(adapted, linears, projector, batch, mode, **options):
        found = real(adapted, linears, projector, batch, mode, **options)
        norms = np.where(batch.examples == 4, np.nan, found.squared_norms)
        return replace(found, squared_norms=norms)

    monkeypatch.setattr(collect, "compute_features", spoil)
    with pytest.raises(StoreError, match=r"task 't0', train: the gradient of example 'train:4' is not finite"):
        take(make_adapted(), make_splits(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("n_rows", "n_coordinates", "form"),
    [
        (5, 6, "gram"),
        (6, 6, "coordinates"),
        (10_000, 40_000_000, "gram"),
        (10_001, 20_000, "coordinates"),
        (3, 20_000, "gram"),
        (50_000, 20_000, "coordinates"),
    ],
)
def test_the_fewer_of_rows_and_coordinates_are_kept(n_rows: int, n_coordinates: int, form: str) -> None:
    assert choose_form("none", n_rows=n_rows, n_coordinates=n_coordinates) == form
    assert choose_form("sjlt", n_rows=n_rows, n_coordinates=n_coordinates) == "projected"


def test_too_many_of_both_are_refused_with_both_limits() -> None:
    line = (
        r"12,000 rows .* of 30,000 coordinates; at most 10,000 rows or 20,000 coordinates .* use rademacher, or lower"
    )
    with pytest.raises(ConfigError, match=line):
        choose_form("none", n_rows=12_000, n_coordinates=30_000)


def test_every_joined_fingerprint_depends_on_all() -> None:
    plain = {("a", "train"): "1", ("b", "train"): "2"}
    joined, other = join_fingerprints(plain), join_fingerprints(plain | {("b", "train"): "3"})
    assert joined == join_fingerprints(dict(reversed(plain.items())))
    assert len({*joined.values(), *other.values()}) == 4
    assert joined.keys() == plain.keys()


@pytest.fixture(scope="module")
def exact_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run without a projection."""
    folder = tmp_path_factory.mktemp("exact")
    changes = {"gradients": {"proj_type": "none"}, "training": {"num_train_epochs": 1}}
    pipeline.run(read_config(make_inputs(folder), **changes))
    return folder


def test_a_whole_run_on_exact_inner_products(exact_run: Path) -> None:
    health, plan = read_json(exact_run, "feature_health.json"), read_json(exact_run, "plan.json")
    assert health["form"] == "gram" and health["proj_dim"] <= 140 < health["n_coordinates"]
    assert health["projection_error"] < 1e-6
    assert not any("Inner products" in warning for warning in plan["warnings"])
    store = FeatureStore(exact_run / "run" / "features")
    assert {store.read(task, "train").proj_dim for task in TASKS} == {health["proj_dim"]}
    assert read_json(exact_run, "boosting.json") is not None
    text = (exact_run / "run" / "report.md").read_text(encoding="utf-8")
    assert f"all inner products were kept, in {health['proj_dim']} numbers each" in text
    assert not (exact_run / "run" / "features" / exact._FOLDER).exists()


def test_the_forecast_of_a_run_on_exact_inner_products_is_its_ledger(exact_run: Path) -> None:
    estimate = pipeline.estimate(read_config(exact_run / "recipe.yaml", gradients={"proj_type": "none"}))
    spent = {record["stage"]: record for record in read_json(exact_run, "costs.json")["stages"]}
    assert estimate["features"]["flops"] == spent["features"]["flops"]
    assert estimate["features"]["n_tokens"] == spent["features"]["n_tokens"]


def test_another_row_in_one_task_is_another_store(exact_run: Path, tmp_path: Path) -> None:
    shutil.copytree(exact_run, tmp_path, dirs_exist_ok=True)
    config = read_config(
        tmp_path / "recipe.yaml", gradients={"proj_type": "none"}, data={"tasks": [str(tmp_path / "tasks")]}
    ).model_copy(update={"out": str(tmp_path / "run")})
    before = json.loads((tmp_path / "run" / "features" / "manifest.json").read_text(encoding="utf-8"))
    train = tmp_path / "tasks" / f"{TASKS[0]}.train.jsonl"
    edit_rows(train, lambda number, row: row | ({"label": flip(row["label"])} if number == 0 else {}))
    pipeline.run(config, until="features")
    after = json.loads((tmp_path / "run" / "features" / "manifest.json").read_text(encoding="utf-8"))
    prints = [{(b["task"], b["split"]): b["fingerprint"] for b in found["blocks"]} for found in (before, after)]
    assert prints[0].keys() == prints[1].keys()
    assert all(prints[0][key] != prints[1][key] for key in prints[0])


@pytest.mark.parametrize(("n_rounds", "is_refused"), [(1, True), (0, False)])
def test_a_direction_that_needs_coordinates_is_refused_before_anything_runs(
    n_rounds: int, is_refused: bool, exact_run: Path
) -> None:
    boosting = BoostingConfig(direction="projected", n_rounds=n_rounds).model_dump()
    config = read_config(exact_run / "recipe.yaml", gradients={"proj_type": "none"}, boosting=boosting)
    if is_refused:
        with pytest.raises(
            ConfigError, match=r"boosting\.direction projected: .* can't be expanded to a step; use dual"
        ):
            pipeline.estimate(config)
    else:
        pipeline.estimate(config)


def test_too_many_rows_are_refused_before_anything_runs(exact_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MAX_GRAM_ROWS", 100)
    monkeypatch.setattr(exact, "MAX_PROJ_DIM", 500)
    config = read_config(exact_run / "recipe.yaml", gradients={"proj_type": "none"})
    with pytest.raises(ConfigError, match=r"140 rows .* of 768 coordinates; at most 100 rows or 500 coordinates"):
        pipeline.estimate(config)
