"""The expansion's remainder against autograd and theory, the ways it is measured along, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ensemblelora import stages
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import (
    THETA0,
    adapter_state,
    add_adapter,
    attach,
    measure_distance,
    set_adapter_state,
)
from ensemblelora.analysis import paths
from ensemblelora.analysis.approximation import Point, measure_distances, measure_remainders, take_rows
from ensemblelora.analysis.paths import expand_oracle, load_steps, solve_duals, train_path
from ensemblelora.analysis.remainders import describe_law, find_break, summarise_cells, summarise_distances
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import AdapterConfig
from ensemblelora.errors import StoreError
from ensemblelora.gradients.output import choose_modes
from tests.test_linearity import CASES, outputs_of, predict_by_autograd
from tests.tiny import make_adapted, make_base, make_split
from tests.tiny_run import make_inputs, read_config

BOOTSTRAP = {"n_bootstrap": 300, "confidence": 0.9, "seed": 0}


def random_direction(adapted, *, seed: int = 0, scale: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = adapter_state(adapted, THETA0)
    return {key: scale * torch.randn(tensor.shape, generator=generator) for key, tensor in state.items()}


def measure(
    adapted, parts, directions, points, *, max_tokens: int = 4096, precision: str = "float32", mode: str = "auto"
):
    modes = choose_modes(parts, mode)
    options: dict[str, Any] = {"max_tokens": max_tokens, "precision": precision, "meter": Meter("t")}
    return measure_remainders(adapted, parts, modes, directions, points, **options)


def place(adapted, name: str, direction, scale: float) -> None:
    start = adapter_state(adapted, THETA0)
    add_adapter(adapted, name, {key: start[key] + scale * direction[key] for key in start})


@pytest.mark.parametrize(("family", "head", "kind", "n_choices"), CASES)
def test_sums_are_what_autograd_gives_one_row_and_point_at_a_time(family, head, kind, n_choices):
    adapted = make_adapted(family, head=head)
    parts = [make_split(kind, n=4, n_choices=n_choices, seed=seed, task=f"t{seed}") for seed in range(2)]
    directions = [random_direction(adapted, seed=seed, scale=0.3) for seed in range(2)]
    points = [Point(0, 0.5), Point(1, 1.0), Point(1, -0.7)]
    found = measure(adapted, parts, directions, points)
    for point, by_task in zip(points, found, strict=True):
        place(adapted, "there", directions[point.direction], point.scale)
        for part, one in zip(parts, by_task, strict=True):
            true, start = (torch.stack(outputs_of(adapted, part, name)).double().numpy() for name in ("there", THETA0))
            linear = predict_by_autograd(adapted, part, "there")
            assert one.missed == pytest.approx(((true - linear) ** 2).sum(), rel=2e-3, abs=1e-8)
            assert one.moved == pytest.approx(((true - start) ** 2).sum(), rel=1e-4)
            assert one.size == pytest.approx((true**2).sum(), rel=1e-4)
            assert one.n_outputs == true.size


@pytest.mark.parametrize("method", ["lora", "bottleneck", "ia3"])
def test_along_a_line_the_rms_remainder_over_the_squared_distance_tends_to_a_constant(method):
    config = AdapterConfig(method=method, **({"reduction": 4} if method == "bottleneck" else {}))
    adapted = attach(make_base("llama"), config, seed=0)
    part = make_split("verbalizer", n=6, n_choices=3)
    scales = [0.04, 0.02, 0.01]
    # Through a kink of ReLU no expansion holds: the bottleneck's line moves what lies above it alone.
    direction = random_direction(adapted, scale=0.5)
    direction = {k: torch.zeros_like(v) if "down" in k else v for k, v in direction.items()}
    found = measure(adapted, [part], [direction], [Point(0, scale) for scale in scales])
    constants = [math.sqrt(one.missed / one.n_outputs) / scale**2 for (one,), scale in zip(found, scales, strict=True)]
    steps = np.abs(np.diff(np.log(constants)))
    assert steps[1] < 0.25 and steps[1] < steps[0] + 0.02, constants


def test_rows_beside_a_row_and_the_order_of_points_change_nothing():
    adapted = make_adapted()
    part, direction = make_split("options", n=5, n_choices=3), random_direction(adapted)
    points = [Point(0, 0.3), Point(0, 1.0)]
    wide = measure(adapted, [part], [direction], points)
    narrow = measure(adapted, [part], [direction], points[::-1], max_tokens=1)[::-1]
    for one, other in zip(wide, narrow, strict=True):
        assert one[0].missed == pytest.approx(other[0].missed, rel=1e-3)
        assert one[0].size == pytest.approx(other[0].size, rel=1e-5)


def test_where_nothing_moves_nothing_is_missed():
    adapted = make_adapted()
    still = {key: torch.zeros_like(tensor) for key, tensor in adapter_state(adapted, THETA0).items()}
    ((one,),) = measure(adapted, [make_split("verbalizer")], [still], [Point(0, 1.0)])
    assert one.missed == pytest.approx(0.0, abs=1e-10) and one.moved == pytest.approx(0.0, abs=1e-10)
    assert measure_distances(adapted, [still])[0].absolute == 0.0


def test_the_model_is_left_as_it_was_and_float32_is_measured_without_its_rounding():
    base = make_base("llama")
    base.model.to(torch.bfloat16)
    adapted = attach(base, AdapterConfig(r=4, lora_alpha=8), seed=0)
    part, direction = make_split("verbalizer", n=6), random_direction(adapted, scale=0.2)
    names, before = set(adapted.peft.peft_config), {k: p.clone() for k, p in adapted.peft.named_parameters()}
    points = [Point(0, 0.002)]
    ((fine,),), ((coarse,),) = (
        measure(adapted, [part], [direction], points, precision=precision) for precision in ("float32", "native")
    )
    after = dict(adapted.peft.named_parameters())
    assert set(adapted.peft.peft_config) == names and after.keys() == before.keys()
    assert all(after[k].dtype == before[k].dtype and torch.equal(after[k], before[k]) for k in before)
    assert coarse.missed > 100 * fine.missed, "rounding hides the remainder of a small step"
    again = attach(make_base("llama"), AdapterConfig(r=4, lora_alpha=8), seed=0)
    set_adapter_state(again, THETA0, adapter_state(adapted, THETA0))
    with torch.no_grad():
        for (path, parameter), (other, rounded) in zip(
            again.network.named_parameters(), adapted.network.named_parameters(), strict=True
        ):
            assert path == other
            parameter.copy_(rounded.float())
    ((exact,),) = measure(again, [part], [direction], points)
    assert fine.missed == pytest.approx(exact.missed, rel=0.05)


def test_lengths_are_those_of_an_adapter_that_went_there():
    adapted = make_adapted()
    direction = random_direction(adapted)
    place(adapted, "there", direction, 1.0)
    found, expected = measure_distances(adapted, [direction])[0], measure_distance(adapted, "there")
    assert vars(found) == pytest.approx(expected)
    norm = math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in direction.values()))
    assert found.absolute == pytest.approx(norm, rel=1e-5)


def test_rows_are_taken_from_the_first_to_the_last():
    split = make_split("options", n=9)
    assert take_rows(split, 3).ids == (split.ids[0], split.ids[4], split.ids[8])
    assert take_rows(split, 99).ids == split.ids


# The ways: checkpoints of a training, and what the oracle's fits stand for.


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    recipe = make_inputs(tmp_path_factory.mktemp("inputs"))
    folder = tmp_path_factory.mktemp("pool")
    data = {
        "tasks": [
            str(recipe.parent / "tasks" / f"{n}.yaml") for n in ("family0_task0", "family1_task0", "family1_task1")
        ]
    }
    config = read_config(recipe, out=str(folder), data=data, gradients={"proj_dim": 20, "n_projections": 2})
    _, rows, probe = stages.prepare(config)
    return Pool(config, folder, rows, probe, start_fingerprint=stages.identify_start(config, probe))


def test_a_path_holds_every_power_of_two_and_training_does_not_notice(pool: Pool, tmp_path: Path):
    path = train_path(pool, (1, 0))
    assert path.trained.tasks == (0, 1)
    powers = [2**k for k in range(10) if 2**k < path.trained.n_steps]
    assert path.steps == (*powers, path.trained.n_steps) and len(path.steps) >= 3
    assert path.steps[-1] == path.trained.n_steps
    steps = load_steps(pool, path)
    lengths = [one.absolute for one in measure_distances(pool.probe, list(steps.values()))]
    assert lengths == sorted(lengths) and lengths[0] > 0
    beside = Pool(pool.config, tmp_path, pool.rows, pool.probe, start_fingerprint=pool.start_fingerprint)
    unwatched = beside.train((0, 1), copy=paths._COPY)
    assert unwatched.name == path.trained.name and unwatched.validation_nll == path.trained.validation_nll
    one, other = (
        load_file(p.folder / "adapters" / unwatched.name / "adapter_model.safetensors") for p in (pool, beside)
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_path_is_found_again_and_an_incomplete_one_refused(pool: Pool, monkeypatch: pytest.MonkeyPatch):
    path = train_path(pool, (0, 1))
    monkeypatch.setattr(Pool, "_train", None)
    assert train_path(pool, (0, 1)) == path
    file = path.folder / "step-000002.npz"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(StoreError, match=r"steps 2 are missing; delete .*adapters.*and run again"):
        train_path(pool, (0, 1))
    file.write_bytes(content)


def test_duals_are_the_shortest_that_give_the_weights(pool: Pool):
    oracle = make_plan(pool).oracle
    blocks = oracle.replicates[0].train
    rows = np.concatenate([np.asarray(b.features, np.float64).reshape(-1, b.proj_dim) for b in blocks])
    w = rows.T @ np.random.default_rng(0).normal(size=len(rows))
    alphas = solve_duals(blocks, w)
    assert [alpha.shape for alpha in alphas] == [b.features.shape[:2] for b in blocks]
    flat = np.concatenate([alpha.ravel() for alpha in alphas])
    assert rows.T @ flat == pytest.approx(w, rel=1e-3, abs=1e-3 * np.abs(w).max())
    assert flat == pytest.approx(np.linalg.pinv(rows.T) @ w, rel=1e-2, abs=1e-3 * np.abs(flat).max())


def test_the_oracles_step_moves_outputs_as_its_linear_model_says(pool: Pool):
    oracle, subset = make_plan(pool).oracle, (0, 2)
    lines = expand_oracle(pool, oracle, subset, max_tokens=512, meter=Meter("t"))
    assert set(lines) == {"dual", "projected"}
    w = oracle.weights([subset])[0][0]
    parts = [pool.split(task, "train") for task in subset]
    scale = 1e-3
    found = measure_remainders(
        pool.probe,
        parts,
        choose_modes(pool.rows.learning, "auto"),
        [lines["projected"], lines["dual"]],
        [Point(0, scale), Point(1, scale)],
        max_tokens=512,
        precision="float32",
        meter=Meter("t"),
    )
    expected = [float(((np.asarray(oracle.replicates[0].train[i].features) @ w) ** 2).sum()) for i in subset]
    # g . (P w) = (P^T g) . w is algebra; the dual step is as near to it as inner products survive the projection.
    assert [one.moved / scale**2 for one in found[0]] == pytest.approx(expected, rel=0.03)
    assert [one.moved / scale**2 for one in found[1]] == pytest.approx(expected, rel=1.0)
    lengths = measure_distances(pool.probe, [lines["projected"], lines["dual"]])
    assert lengths[0].absolute > 2 * lengths[1].absolute, "most of P w is orthogonal to every gradient"
    assert lengths[0].absolute > np.linalg.norm(w)


# What is said of many.


def make_cell(distance: float, missed: float, *, seed: int = 0, kind: str = "line", **more: Any) -> dict[str, Any]:
    tasks = {
        name: {"missed": k * missed, "moved": 4 * distance**2, "size": 9.0, "n_outputs": 3}
        for k, name in ((1, "a"), (2, "b"))
    }
    about = {"kind": kind, "base": "lora", "r": 8, "epochs": 3, "precision": "float32", "subset": ["a", "b"]}
    places = {"seed": seed, "asked": distance, "distance": distance, "distance_adapter": 50 * distance}
    return {**about, **places, "is_natural": False, "step": None, "tasks": tasks, **more}


def test_means_are_those_of_a_loop():
    cells = [make_cell(0.01, 0.1 * (seed + 1), seed=seed) for seed in range(4)]
    (row,) = summarise_cells(cells, ("kind", "asked"), **BOOTSTRAP)
    shares = [[task["missed"] / task["size"] for task in cell["tasks"].values()] for cell in cells]
    assert row["squared_relative"]["value"] == pytest.approx(np.mean([np.mean(one) for one in shares]))
    assert row["rms_relative"]["value"] == pytest.approx(np.mean([np.mean(np.sqrt(one)) for one in shares]))
    missed, moved = (sum(t[key] for c in cells for t in c["tasks"].values()) for key in ("missed", "moved"))
    assert row["r2_over_zero_order"]["value"] == pytest.approx(1 - missed / moved)
    assert row["n_adapters"] == 4 and row["distance"] == 0.01 and row["kind"] == "line"
    for key in ("squared_relative", "rms_relative", "r2_over_zero_order"):
        assert row[key]["low"] < row[key]["value"] < row[key]["high"]
    assert summarise_cells(cells[::-1], ("kind", "asked"), **BOOTSTRAP)[0]["squared_relative"][
        "value"
    ] == pytest.approx(row["squared_relative"]["value"])
    (alone,) = summarise_cells(cells[:1], ("kind",), **BOOTSTRAP)
    assert alone["squared_relative"]["low"] is None


def test_the_law_reads_off_the_order_of_the_remainder():
    distances = (0.001, 0.002, 0.008)
    cells = [make_cell(d, (7 + seed) * d**4, seed=seed) for d in distances for seed in range(3)]
    cells += [make_cell(d, 1e-6, seed=seed, precision="native") for d in distances for seed in range(3)]
    cells.append(make_cell(0.004, 1.0, kind="end"))
    rows = describe_law(cells, **BOOTSTRAP)
    fine, coarse = ([row for row in rows if row["precision"] == p] for p in ("float32", "native"))
    assert [(row["from"], row["to"]) for row in fine] == [(0.001, 0.002), (0.002, 0.008)]
    assert [row["exponent"]["value"] for row in fine] == pytest.approx([2.0, 2.0])
    assert [row["exponent"]["value"] for row in coarse] == pytest.approx([0.0, 0.0])
    assert fine[0]["constant"] == pytest.approx(math.sqrt(3 * 8 / 6)) == pytest.approx(fine[1]["constant"])


def test_a_break_lies_between_measured_distances_or_is_not_reached():
    rows = [{"distance": d, "r2_over_zero_order": {"value": r}} for d, r in ((0.1, 0.1), (0.001, 0.99), (0.01, 0.9))]
    assert 0.01 < find_break(rows, 0.5) < 0.1
    assert find_break(rows, 0.05) is None
    assert find_break(rows, 0.995) == 0.001, "the nearest that was measured is beyond it already"


def test_lengths_have_both_denominators_and_their_spread():
    cells = [make_cell(0.001 * (k + 1), 0.1, seed=k, kind="end", is_natural=True) for k in range(3)]
    (row,) = summarise_distances([*cells, make_cell(0.5, 0.1)], **BOOTSTRAP)
    assert row["distance"]["value"] == pytest.approx(0.002)
    assert row["distance_adapter"]["value"] == pytest.approx(0.1)
    assert row["sd"] == pytest.approx(0.001) and row["n_adapters"] == 3


def test_a_saved_adapter_is_a_point_of_its_own_line(pool: Pool):
    path = train_path(pool, (0, 1))
    end = load_steps(pool, path)[path.steps[-1]]
    place(pool.probe, "again", end, 1.0)
    part = pool.split(0, "validation")
    ((one,),) = measure(pool.probe, [part], [end], [Point(0, 1.0)])
    modes = choose_modes([part], "auto")
    true = torch.stack(outputs_of(pool.probe, part, "again", mode=modes[part.task])).double().numpy()
    assert one.size == pytest.approx((true**2).sum(), rel=1e-4)
