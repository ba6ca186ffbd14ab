"""Rates of positive transfer and their intervals, averages of adapters, and where fine-tunings are taken from."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemblelora import artifacts
from ensemblelora.adapters import THETA0, adapter_state, set_adapter_state
from ensemblelora.analysis import losses as losses_module
from ensemblelora.analysis.bases import BASE_METHODS, choose_bases, list_base_changes, name_base_method
from ensemblelora.analysis.losses import (
    PARTS,
    average_exactly,
    average_plainly,
    find_kept,
    score_adapter,
    score_candidate,
    train_all_weights,
)
from ensemblelora.analysis.request import AnalysisRequest
from ensemblelora.analysis.transfer import TransferOptions, choose_pairs
from ensemblelora.analysis.transfer_map import Together, compare_gains, compare_with_alone
from ensemblelora.analysis.transfer_runs import Wanted, measure_memory
from ensemblelora.analysis.variant import change_config, join_changes
from ensemblelora.comparison.controls import average_factors
from ensemblelora.comparison.methods import METHODS
from ensemblelora.config import parse_config
from ensemblelora.errors import ConfigError, DataError, UsageError
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.validation.truth import measure_subsets, plan_measurements
from tests.tiny_run import make_inputs, read_config

BOOTSTRAP = {"n_bootstrap": 2000, "confidence": 0.9, "seed": 0}


def make_runs(
    rng: np.random.Generator, subsets: list[tuple[int, ...]], *, n_rows: int = 40, n_seeds: int = 3, noise: float = 0.02
) -> list[Together]:
    """Losses of subsets with effects of partners, rows of their own difficulty, and noise between seeds."""
    level = rng.normal(1.0, 0.5, (8, n_rows))
    effect = rng.normal(0.0, 0.05, (8, 8))
    found = []
    for subset in subsets:
        runs = []
        for _ in range(n_seeds):
            shifts = {i: sum(effect[i, j] for j in subset if j != i) + rng.normal(0, noise) for i in subset}
            runs.append({i: level[i] + shifts[i] + rng.normal(0, 0.02, n_rows) for i in subset})
        found.append(Together(subset, runs))
    return found


def split_alone(runs: list[Together]) -> dict[int, list[np.ndarray]]:
    return {one.subset[0]: [run[one.subset[0]] for run in one.runs] for one in runs if len(one.subset) == 1}


def pieces(n: int = 4, **options: Any) -> tuple[list[Together], dict[int, list[np.ndarray]], list[np.ndarray]]:
    runs = make_runs(np.random.default_rng(0), [*((i,) for i in range(n)), *combinations(range(n), 2)], **options)
    together = [one for one in runs if len(one.subset) > 1]
    n_rows = len(next(iter(runs[0].runs[0].values())))
    return together, split_alone(runs), [np.arange(n_rows) // 2 for _ in range(n)]


def test_the_rate_is_the_papers_formula_in_a_loop():
    together, alone, groups = pieces()
    together.append(make_runs(np.random.default_rng(1), [(0, 1, 2, 3)])[0])
    found = compare_with_alone(together, alone, groups, **BOOTSTRAP)
    mean = {(one.subset, i): np.mean([run[i] for run in one.runs]) for one in together for i in one.subset}
    own = {i: np.mean(runs) for i, runs in alone.items()}
    rate = np.mean([np.mean([mean[one.subset, i] < own[i] for i in one.subset]) for one in together])
    assert found.rate.value == pytest.approx(rate)
    assert [(cell.subset, cell.task) for cell in found.cells] == [(o.subset, i) for o in together for i in o.subset]
    for cell in found.cells:
        assert cell.difference == pytest.approx(mean[cell.subset, cell.task] - own[cell.task])
        assert cell.low < cell.difference < cell.high and cell.n_runs == 3
        side = {"positive": cell.high < 0, "negative": cell.low > 0, "undecided": cell.low <= 0 <= cell.high}
        assert side[cell.verdict]
    counts = Counter(cell.verdict for cell in found.cells)
    assert (found.rate.n_positive, found.rate.n_negative) == (counts["positive"], counts["negative"])
    assert found.rate.n_undecided == counts["undecided"] and found.rate.n_subsets == 7
    assert found.rate.decided_low <= found.rate.value <= found.rate.decided_high
    assert found.rate.low <= found.rate.high and found.has_seed_noise


def test_rates_know_neither_a_tasks_level_nor_the_order_of_subsets_and_seeds():
    together, alone, groups = pieces()
    found = compare_with_alone(together, alone, groups, **BOOTSTRAP)
    moved = [Together(o.subset, [{i: rows + 10 * i for i, rows in run.items()} for run in o.runs]) for o in together]
    shifted = compare_with_alone(
        moved, {i: [r + 10 * i for r in runs] for i, runs in alone.items()}, groups, **BOOTSTRAP
    )
    turned = [Together(o.subset, o.runs[::-1]) for o in together]
    again = compare_with_alone(turned, {i: runs[::-1] for i, runs in alone.items()}, groups, **BOOTSTRAP)
    for other in (shifted, again):
        assert [c.difference for c in other.cells] == pytest.approx([c.difference for c in found.cells], abs=1e-9)
        assert other.rate.value == found.rate.value
    backwards = compare_with_alone(together[::-1], alone, groups, **BOOTSTRAP)
    assert {(*c.subset, c.task): round(c.difference, 12) for c in backwards.cells} == {
        (*c.subset, c.task): round(c.difference, 12) for c in found.cells
    }


def test_a_tolerance_asks_for_more_and_one_seed_knows_of_rows_alone():
    together, alone, groups = pieces()
    plain, strict = (compare_with_alone(together, alone, groups, tolerance=t, **BOOTSTRAP) for t in (0.0, 0.05))
    assert strict.rate.value < plain.rate.value and strict.rate.n_undecided >= plain.rate.n_undecided
    once = [Together(one.subset, one.runs[:1]) for one in together]
    single = compare_with_alone(once, {i: runs[:1] for i, runs in alone.items()}, groups, **BOOTSTRAP)
    assert not single.has_seed_noise and single.rate.n_undecided < plain.rate.n_undecided
    lone = compare_with_alone(together, alone, [np.zeros(40, int)] * 4, **BOOTSTRAP)
    assert {cell.verdict for cell in lone.cells} == {"undecided"}, "one group of rows tells nothing"
    assert lone.rate.low is None and (lone.rate.decided_low, lone.rate.decided_high) == (0.0, 1.0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    hits, n = 0, 0
    for trial in range(40):
        rng = np.random.default_rng(100 + trial)
        subsets = [*((i,) for i in range(3)), *combinations(range(3), 2)]
        effect = np.zeros((8, 8))
        runs = []
        for subset in subsets:
            own = [{i: rng.normal(0, 0.05) + rng.normal(1.0, 0.02, 60) for i in subset} for _ in range(2)]
            runs.append(Together(subset, own))
        together = [one for one in runs if len(one.subset) == 2]
        groups = [np.arange(60)] * 3
        found = compare_with_alone(together, split_alone(runs), groups, **BOOTSTRAP | {"n_bootstrap": 400})
        hits += sum(cell.low <= effect[cell.subset] <= cell.high for cell in found.cells)
        n += len(found.cells)
    assert 0.85 <= hits / n <= 0.95, hits / n


def test_what_is_missing_is_said():
    together, alone, groups = pieces()
    with pytest.raises(DataError, match=r"tasks \[1\] were not fine-tuned alone"):
        compare_with_alone(together, {i: runs for i, runs in alone.items() if i != 1}, groups)
    with pytest.raises(DataError, match="no subset was fine-tuned"):
        compare_with_alone([], alone, groups)


def test_gains_agree_as_numpy_says():
    rng = np.random.default_rng(0)
    cells = [(i, k) for k, pair in enumerate(combinations(range(6), 2)) for i in pair]
    true = rng.normal(size=len(cells))
    predicted = true + rng.normal(size=len(cells)) + 5 * np.array([i for i, _ in cells])
    tasks, subsets = zip(*cells, strict=True)
    found = compare_gains(tasks, subsets, predicted, true, **BOOTSTRAP)
    assert found.pearson.value == pytest.approx(np.corrcoef(predicted, true)[0, 1])
    assert found.sign_share.value == pytest.approx(np.mean(np.sign(predicted) == np.sign(true)))
    by_task = np.array(tasks)
    centred = [values - np.array([values[by_task == i].mean() for i in by_task]) for values in (predicted, true)]
    assert found.within_pearson.value == pytest.approx(np.corrcoef(*centred)[0, 1])
    assert found.within_pearson.value > found.pearson.value
    assert found.within_pearson.low < found.within_pearson.value < found.within_pearson.high
    order = rng.permutation(len(cells))
    again = compare_gains(*([np.array(v)[order] for v in (tasks, subsets, predicted, true)]), **BOOTSTRAP)
    assert again.spearman.value == pytest.approx(found.spearman.value) and again.n_cells == len(cells)


def test_pairs_are_all_or_spread_over_the_tasks():
    assert choose_pairs(4, None, seed=0) == tuple(combinations(range(4), 2)) == choose_pairs(4, 99, seed=1)
    some = choose_pairs(8, 8, seed=0)
    assert len(set(some)) == 8 and some == tuple(sorted(some)) == choose_pairs(8, 8, seed=0)
    counts = Counter(task for pair in some for task in pair)
    assert set(counts) == set(range(8)) and max(counts.values()) <= 3
    assert choose_pairs(8, 8, seed=1) != some and choose_pairs(3, 0, seed=0) == ()
    assert set(some) < set(choose_pairs(8, 12, seed=0)), "fewer are some of more"


def test_the_shortest_pairs_come_first_where_asked():
    lengths = [9, 1, 5, 2]
    for n in range(7):
        chosen = choose_pairs(4, n, seed=0, lengths=lengths)
        left = set(combinations(range(4), 2)) - set(chosen)
        assert len(chosen) == n and chosen == tuple(sorted(chosen))
        sums = [[lengths[i] + lengths[j] for i, j in pairs] for pairs in (chosen, left)]
        assert max(sums[0], default=0) <= min(sums[1], default=99)


def test_later_seeds_may_be_of_single_tasks_and_all_alone():
    wanted = Wanted(((0, 1),), ("plain",), ("ours",), n_seeds=1)
    assert wanted.under(0) == wanted and wanted.under(1) == Wanted((), ("plain",), (), n_seeds=1)
    always = Wanted(((0, 1),), ("plain",), ("ours",))
    assert always.under(7) == always


# Base methods as variants of a config.


@pytest.mark.parametrize("base", BASE_METHODS[:-1])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"adapter": {"r": 4}, "model": {"quantization": "nf4"}},
        {"adapter": {"method": "bottleneck", "reduction": 8}},
    ],
)
def test_a_base_method_is_what_its_changes_make(base: str, own: dict[str, Any]):
    config = parse_config({"data": {"tasks": ["a"]}} | own)
    changes = list_base_changes(config, base, reduction=32)
    changed = change_config(config, changes)
    assert name_base_method(changed) == base
    assert (changes == {}) == (name_base_method(config) == base)
    if base.endswith("bottleneck"):
        assert changed.adapter.reduction == (8 if config.adapter.method == "bottleneck" else 32)
    assert changed.training == config.training and changed.data == config.data


def test_full_fine_tuning_needs_weights_that_are_not_packed():
    config = parse_config({"data": {"tasks": ["a"]}, "model": {"quantization": "nf4"}, "adapter": {"r": 4}})
    assert list_base_changes(config, "full", reduction=8) == {"model": {"quantization": "none"}}
    with pytest.raises(UsageError, match="base methods 'rank': expected some of lora"):
        choose_bases(["lora", "rank"])
    with pytest.raises(UsageError, match="no base method"):
        choose_bases([])


def test_a_variant_that_is_no_config_is_refused():
    config = parse_config({"data": {"tasks": ["a"]}})
    with pytest.raises(ConfigError, match="the analysis' variant"):
        change_config(config, {"adapter": {"rank": 4}})
    assert join_changes({"adapter": {"r": 2}}, {"adapter": {"r": 3}}) == {"adapter": {"r": 3}}


# Fine-tunings of a tiny model.


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def make_request(recipe: Path, home: Path, **more: Any) -> AnalysisRequest[TransferOptions]:
    names = ("family0_task0", "family1_task0", "written")
    data = {"tasks": [str(recipe.parent / "tasks" / f"{name}.yaml") for name in names], "max_train_examples": 8}
    config = read_config(recipe, out=str(home), data=data, **more.pop("config", {}))
    return AnalysisRequest("transfer", config, TransferOptions(), seeds=more.pop("seeds", (0,)), home=home, **more)


@pytest.fixture(scope="module")
def request_(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> AnalysisRequest[TransferOptions]:
    return make_request(recipe, tmp_path_factory.mktemp("home"))


def rows_of(pool, state, tasks) -> dict[str, dict[str, list[float]]]:
    """Losses with an adapter's tensors in theta0's place."""
    before = adapter_state(pool.probe, THETA0)
    set_adapter_state(pool.probe, THETA0, state)
    try:
        return {
            part: {
                (split := pool.split(task, part)).task: member_nll(
                    predict_members(pool.probe, split, [THETA0], max_tokens=512), split.labels
                )[0].tolist()
                for task in tasks
            }
            for part in PARTS
        }
    finally:
        set_adapter_state(pool.probe, THETA0, before)


def assert_same_losses(one, other, *, abs: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys()
        for task in one[part]:
            assert one[part][task] == pytest.approx(other[part][task], abs=abs)


@pytest.mark.slow
def test_another_adapter_on_the_same_model_trains_as_on_a_fresh_one(recipe: Path, tmp_path: Path, monkeypatch):
    """Rows and base are taken over from the variant before, whatever adapter was on them."""
    wide = {"adapter": {"r": 2, "lora_alpha": 4.0}}
    bottleneck = {"adapter": {"method": "bottleneck", "reduction": 8}}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, before in (("fresh", ()), ("taken over", (None, bottleneck, {"training": {"num_train_epochs": 1}}))):
        request = make_request(recipe, tmp_path / name)
        for changes in before:
            request.open_pool(1, changes)
        if before:
            monkeypatch.setattr("ensemblelora.stages.prepare", lambda *_: pytest.fail("loaded again"))
        pool = request.open_pool(1, wide)
        found[name] = adapter_state(pool.probe, THETA0)
        trained = pool.train((0,))
        pool.load([trained.name])
        found[name] |= {f"trained {key}": t for key, t in adapter_state(pool.probe, trained.name).items()}
        request.close()
    assert found["fresh"].keys() == found["taken over"].keys()
    assert all(torch.equal(tensor, found["taken over"][key]) for key, tensor in found["fresh"].items())
    assert any(not torch.equal(t, found["fresh"][k.removeprefix("trained ")]) for k, t in found["fresh"].items())


def test_losses_are_those_of_the_adapter_and_are_found_again(request_, monkeypatch):
    pool = request_.open_pool()
    trained = pool.train((0, 2))
    found = score_adapter(request_, pool, trained.name, (0, 2))
    pool.load([trained.name])
    assert_same_losses(found, rows_of(pool, adapter_state(pool.probe, trained.name), (0, 2)))
    with pytest.raises(Exception, match="test rows asked for before"):
        pool.score([trained.name], 0, "test")
    monkeypatch.setattr(losses_module, "_score", None)
    assert score_adapter(request_, pool, trained.name, (0, 2)) == found
    costs = request_.count_costs()
    assert costs["training"]["n"] == 1 and costs["training"]["flops"] == trained.flops
    assert costs["measuring"]["flops"] > 0
    assert costs["total"]["flops"] == costs["training"]["flops"] + costs["measuring"]["flops"]


def test_an_average_is_that_of_the_tensors_and_the_exact_one_that_of_the_weights(request_):
    pool = request_.open_pool()
    parts = [pool.train((0,)), pool.train((1,))]
    pool.load([one.name for one in parts])
    states = [adapter_state(pool.probe, one.name) for one in parts]
    plain = average_plainly(request_, pool, parts)
    assert_same_losses(plain, rows_of(pool, average_factors(states), (0, 1)))
    (exact,) = average_exactly(request_, pool, [parts])
    scale = pool.config.adapter.lora_alpha / pool.config.adapter.r
    weights, before = dict(pool.probe.peft.named_parameters()), {}
    with torch.no_grad():
        for key in [key for key in states[0] if key.endswith("lora_B.weight")]:
            module = key.removesuffix("lora_B.weight")
            weight = weights[f"{module}base_layer.weight"]
            before[module] = weight.clone()
            for state in states:
                weight += 0.5 * scale * state[key] @ state[f"{module}lora_A.weight"]
    try:
        dense = rows_of(pool, adapter_state(pool.probe, THETA0), (0, 1))
    finally:
        with torch.no_grad():
            for module, weight in before.items():
                weights[f"{module}base_layer.weight"].copy_(weight)
    assert_same_losses(exact, dense, abs=1e-4)
    moved = max(abs(a - b) for p in PARTS for t in exact[p] for a, b in zip(exact[p][t], plain[p][t], strict=True))
    assert moved > 1e-3, "averaging factors is not averaging what they do"
    assert "average" not in pool.probe.peft.peft_config


def test_all_weights_are_trained_scored_and_let_go(request_):
    pool = request_.open_pool()
    before = {path: p.clone() for path, p in pool.probe.peft.named_parameters()}
    found, flops = train_all_weights(request_, pool, (1, 0))
    assert flops > pool.train((0, 1)).flops
    assert all(torch.equal(p, before[path]) for path, p in pool.probe.peft.named_parameters() if path in before)
    base = score_adapter(request_, pool, THETA0, (0, 1))
    assert sum(np.mean(rows) for rows in found["validation"].values()) < sum(
        np.mean(rows) for rows in base["validation"].values()
    )
    assert not list(pool.folder.rglob("model.safetensors")) and train_all_weights(request_, pool, (0, 1)) == (
        found,
        flops,
    )


def test_a_methods_losses_are_its_candidates(request_):
    pool = request_.open_pool()
    candidate = METHODS["shared"].run(pool)
    everyone = pool.train(pool.everyone)
    assert_same_losses(score_candidate(pool, candidate), score_adapter(request_, pool, everyone.name, pool.everyone))


def test_memory_grows_by_an_adapters_weights(request_):
    one, three = measure_memory(request_, {}, (3, 1))
    assert (one["n_adapters"], three["n_adapters"]) == (1, 3)
    pool = request_.open_pool()
    tensors = adapter_state(pool.probe, THETA0).values()
    assert three["weight_bytes"] - one["weight_bytes"] == 2 * sum(t.numel() * t.element_size() for t in tensors)
    assert one["added_memory_bytes"] >= 0 and one["peak_accelerator_bytes"] is None


def test_a_validated_runs_fine_tunings_are_used(recipe: Path, tmp_path: Path):
    request = make_request(recipe, tmp_path / "home", run=tmp_path / "run")
    pool = request.open_pool()
    assert find_kept(request, pool, [(0, 1)], 2) == {}
    wanted = plan_measurements([(0, 1), (0, 2)], 1, pool.rows, pool.start_fingerprint, pool.config)
    place = tmp_path / "run" / "validation" / "truth.jsonl"
    truth = measure_subsets(place, dict(list(wanted.items())[:1]), pool.probe, pool.rows, pool.config)
    found = find_kept(request, pool, [(0, 1), (0, 2)], 2)
    assert list(found) == [((0, 1), 0)]
    (run,) = truth.values()
    assert_same_losses({"validation": found[(0, 1), 0]["validation"]}, {"validation": dict(run.nll)})
    assert set(found[(0, 1), 0]["test"]) == set(run.tasks)
    assert request.count_costs()["measuring"]["flops"] >= run.flops
    other = make_request(recipe, tmp_path / "other", run=tmp_path / "run", config={"training": {"learning_rate": 0.02}})
    assert find_kept(other, other.open_pool(), [(0, 1)], 1) == {}, "made with other settings"
    assert not list(artifacts.RunFolder(tmp_path / "run").path.rglob("kept*"))
