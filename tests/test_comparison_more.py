"""Methods of the comparison beside the first ones, what breaking off costs, and what a dry run foresees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from torch.utils.flop_counter import FlopCounterMode

from ensemblelora import artifacts, stages
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, activate
from ensemblelora.comparison import lookahead
from ensemblelora.comparison.adaboost import boost_by_weights, center_log_shares, take_real_step
from ensemblelora.comparison.calibrated import train_tempered
from ensemblelora.comparison.candidate import Candidate
from ensemblelora.comparison.combined import boost_members, train_ours
from ensemblelora.comparison.grouped import train_sampled, train_shared
from ensemblelora.comparison.methods import METHODS
from ensemblelora.comparison.planned import make_part_plan, make_plan
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import GradientsConfig
from ensemblelora.counting import count_gradients
from ensemblelora.data.batching import collate
from ensemblelora.forecast import make_forecaster
from ensemblelora.gradients.collect import compute_features, find_active_layers, make_projector
from ensemblelora.gradients.plan import choose_examples
from ensemblelora.prediction import member_nll
from ensemblelora.study_forecast import count_fine_tunings, forecast_study
from ensemblelora.weighting import fit_temperature
from tests.tiny import disturb, make_adapted, make_split
from tests.tiny_run import TASKS, make_inputs, read_config

CHOSEN = TASKS[1], TASKS[2], TASKS[3], TASKS[4]
WRITTEN = CHOSEN.index("written")
QUICK: dict[str, Any] = {
    "training": {"num_train_epochs": 2, "max_examples_per_batch": 4},
    "grouping": {"n_groups": 2, "n_random_partitions": 0},
    "boosting": {"boosting_rate": 1.0, "l2_penalty": 0.1},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def open_pool(recipe: Path, folder: Path, **changes: Any) -> Pool:
    tasks = [str(recipe.parent / "tasks" / f"{name}.yaml") for name in CHOSEN]
    config = read_config(recipe, out=str(folder), data={"tasks": tasks}, **QUICK | changes)
    _, rows, probe = stages.prepare(config)
    return Pool(config, folder, rows, probe, start_fingerprint=stages.identify_start(config, probe, rows))


@pytest.fixture(scope="module")
def pool(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return open_pool(recipe, tmp_path_factory.mktemp("pool"))


def losses(pool: Pool, candidate: Candidate) -> list[float]:
    return [
        float(member_nll(found, pool.split(task, "validation").labels).mean())
        for task, found in enumerate(candidate.predict("validation"))
    ]


# Features of a share of the rows


def test_a_plan_from_a_share_is_the_plan_that_the_config_would_make(pool: Pool, tmp_path: Path) -> None:
    found = make_part_plan(pool, 0.5)
    gradients = pool.config.gradients.model_copy(update={"train_fraction": 0.5})
    config = pool.config.model_copy(update={"gradients": gradients})
    alone = make_plan(Pool(config, tmp_path, pool.rows, pool.probe, start_fingerprint=pool.start_fingerprint))
    assert found.plan.groups == alone.plan.groups
    np.testing.assert_allclose(found.affinity.matrix, alone.affinity.matrix, rtol=1e-3, atol=1e-5)
    for split in pool.rows.train:
        examples = choose_examples(split, gradients, seed=pool.config.seed)
        assert found.store.read(split.task, "train").ids == tuple(split.ids[e] for e in examples)
    assert found.feature_flops == pytest.approx(alone.feature_flops, rel=1e-9), "charged as if it had been made"
    assert found.select_flops == pytest.approx(alone.select_flops, rel=1e-9)
    assert found.select_flops < make_plan(pool).select_flops
    assert make_part_plan(pool, 0.5).select_flops == found.select_flops


def test_a_share_of_a_share_is_taken_by_a_pass_of_its_own(recipe: Path, tmp_path: Path) -> None:
    pool = open_pool(recipe, tmp_path, gradients={"train_fraction": 0.75})
    found = make_part_plan(pool, 0.5)
    assert found.store.read(CHOSEN[0], "train").n_examples == 8
    assert 0 < found.feature_flops < make_plan(pool).feature_flops


def test_ours_with_fewer_features_is_ours_for_less(pool: Pool) -> None:
    whole, half, quarter = (METHODS[name].run(pool) for name in ("ours", "ours-half-features", "ours-quarter-features"))
    assert whole.costs.select_flops > half.costs.select_flops > quarter.costs.select_flops > 0
    planned = make_part_plan(pool, 0.5)
    groups = planned.plan.groups
    trained = [pool.train(group) for group in groups]
    boosted = boost_members(pool, planned, groups, trained)
    everything = boost_members(pool, make_plan(pool), groups, trained)
    assert boosted.spent and boosted.spent[0].flops < everything.spent[0].flops, "its boosters see half of the rows"
    assert {one.name for one in boosted.spent}.isdisjoint(one.name for one in everything.spent)
    assert half.notes["members"][: len(groups)] == [one.name for one in trained]


# Sampling, temperature


@pytest.mark.parametrize(("name", "sampling"), [("shared-balanced", "uniform"), ("shared-sqrt", "sqrt")])
def test_the_shared_adapter_may_see_tasks_in_other_shares(name: str, sampling: Any, pool: Pool) -> None:
    candidate = METHODS[name].run(pool)
    settings = pool.config.training.model_copy(update={"sampling": sampling})
    assert candidate.notes["members"] == [pool.train(pool.everyone, settings=settings).name]
    assert candidate.notes["members"] != train_shared(pool).notes["members"]
    assert train_sampled(pool, "proportional").notes["members"] == train_shared(pool).notes["members"]


def test_a_temperature_changes_no_answer_and_no_loss_for_the_worse(pool: Pool) -> None:
    ours, tempered = train_ours(pool), train_tempered(pool)
    pairs = zip(ours.predict("validation"), tempered.predict("validation"), strict=True)
    for task, (before, after) in enumerate(pairs):
        np.testing.assert_array_equal(before.values.argmax(axis=2), after.values.argmax(axis=2))
        assert np.array_equal(before.values, after.values) == (task == WRITTEN)
    better = np.array(losses(pool, ours)) - np.array(losses(pool, tempered))
    assert (better >= -1e-9).all() and better[WRITTEN] == 0 and better.max() > 1e-4
    assert set(tempered.notes["temperatures"]) == {*CHOSEN} - {"written"}
    assert tempered.costs == ours.costs, "its weights had the validation rows scored already"


def test_a_temperature_pays_for_the_rows_that_no_weights_were_fitted_on(pool: Pool) -> None:
    ensemble = pool.config.ensemble.model_copy(update={"weights": "own"})
    own = Pool(
        pool.config.model_copy(update={"ensemble": ensemble}),
        pool.folder,
        pool.rows,
        pool.probe,
        start_fingerprint=pool.start_fingerprint,
    )
    more = train_tempered(own).costs.train_flops - train_ours(own).costs.train_flops
    assert more >= sum(pool.count_scoring(task, "validation", 1) for task in pool.everyone)


@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_is_the_best_of_a_fine_grid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(40, 4)) * 3, rng.integers(0, 3, 40)
    labels[::2] = scores[::2, :3].argmax(axis=1)
    scores[::3, 3] = -np.inf
    rows = np.arange(40)

    def loss(temperature: float) -> float:
        return float(-log_softmax(scores / temperature, axis=1)[rows, labels].mean())

    found, grid = fit_temperature(scores, labels), np.geomspace(0.05, 20, 4001)
    assert found == pytest.approx(grid[int(np.argmin([loss(t) for t in grid]))], rel=2e-3)
    assert fit_temperature(scores + 7.0, labels) == pytest.approx(found, rel=1e-6), "scores have no zero"
    assert fit_temperature(1.5 * scores, labels) == pytest.approx(1.5 * found, rel=1e-6)


def test_temperatures_stay_within_bounds() -> None:
    scores = np.array([[1.0, 0.0], [2.0, 0.0]])
    assert fit_temperature(scores, np.array([0, 0])) == pytest.approx(1 / 20), "never wrong: as sure as is allowed"
    assert fit_temperature(scores, np.array([1, 1])) == pytest.approx(20), "never right: nearly even"
    assert fit_temperature(np.zeros((3, 2)), np.array([0, 1, 0])) == 1.0


# SAMME.R


@pytest.mark.parametrize("n_classes", [2, 4])
def test_real_boosting_is_the_papers_formula(n_classes: int) -> None:
    """Zhu and others (2009), algorithm 4, by loops: weights by y . log p, votes (K - 1)(log p - mean log p)."""
    x, y = make_classification(200, 6, n_informative=4, n_classes=n_classes, n_clusters_per_class=1, random_state=0)
    base, k = LogisticRegression(C=0.1, max_iter=5000), n_classes
    weights, slow, scores = np.ones(len(y)), np.ones(len(y)), []
    total = np.zeros((len(y), k))
    for _ in range(4):
        p = np.clip(clone(base).fit(x, y, sample_weight=weights).predict_proba(x), 1e-6, None)
        scores.append(np.log(p) + 3.0)
        log_p = np.log(p)
        for i in range(len(y)):
            coded = [1.0 if c == y[i] else -1 / (k - 1) for c in range(k)]
            slow[i] *= np.exp(-(k - 1) / k * sum(a * b for a, b in zip(coded, log_p[i], strict=True)))
            total[i] += [(k - 1) * (log_p[i, c] - log_p[i].mean()) for c in range(k)]
        step = take_real_step(scores[-1], y, weights)
        assert step.error == pytest.approx(np.average(p.argmax(1) != y, weights=weights)) and step.alpha == 1
        weights, slow = weights * step.factors, slow / slow.sum() * len(y)
        weights /= weights.mean()
        np.testing.assert_allclose(weights, slow, rtol=1e-6)
    np.testing.assert_allclose(sum(map(center_log_shares, scores)) * (k - 1), total, rtol=1e-6, atol=1e-9)


def test_shares_leave_out_absent_choices_and_are_never_too_sure() -> None:
    centered = center_log_shares(np.array([[1.0, 2.0, -np.inf], [900.0, 0.0, 0.0]]))
    assert centered[0, 2] == -np.inf and centered[0, :2].sum() == pytest.approx(0)
    assert centered[0, 1] - centered[0, 0] == pytest.approx(1)
    assert centered[1].sum() == pytest.approx(0) and centered[1, 0] == pytest.approx(-2 / 3 * np.log(1e-6))


def test_real_boosting_trains_on_what_was_unlikely(pool: Pool) -> None:
    candidate = METHODS["adaboost-real-1"].run(pool)
    names = candidate.notes["members"]
    assert names[0] == pool.train(pool.everyone).name and len(names) == 2
    alphas = np.array(candidate.notes["alphas"])
    assert alphas[[i for i in pool.everyone if i != WRITTEN]].tolist() == [[1.0, 1.0]] * 3 and not alphas[WRITTEN].any()
    found = candidate.predict("validation")
    each = [pool.score([name], 0, "validation").values[0].astype(float) for name in names]
    np.testing.assert_allclose(found[0].values[0], sum(map(center_log_shares, each)), rtol=1e-9)
    assert candidate.costs.forward_passes == (2 * 3 + 1) / 4
    assert boost_by_weights(pool, 1, level="row").notes["members"][1] != names[1]


# What breaking off costs


def test_a_training_that_was_broken_off_is_charged_with_all_of_its_attempts(
    recipe: Path, tmp_path: Path, pool: Pool
) -> None:
    whole = pool.train([0, 1])
    broken = open_pool(recipe, tmp_path)
    half = whole.n_steps // 2

    def stop(step: int, n_steps: int, read: object) -> None:
        if step == half + 1:  # the first epoch's checkpoint is written after step `half`
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.train([0, 1], watch=stop)
    (note,) = (tmp_path / "checkpoints").glob("*.begun.json")
    first = artifacts.read_json(note)["spent"]
    assert 0 < first["flops"] < whole.flops
    again = broken.train([0, 1])
    assert again.name == whole.name and again.validation_nll == pytest.approx(whole.validation_nll, rel=1e-5)
    assert whole.flops < again.flops < whole.flops + first["flops"], "one step was done twice, the others once"
    assert again.seconds > first["wall_seconds"]
    assert not note.exists()


# A's gradient after a warm-up


@pytest.mark.parametrize("kind", ["verbalizer", "options"])
@pytest.mark.parametrize("is_moved", [False, True])
def test_gradients_of_an_adapter_that_has_moved_are_counted_with_as(kind: str, is_moved: bool) -> None:
    adapted, split = make_adapted(), make_split(kind, n=6)
    if is_moved:
        disturb(adapted)
    layers = find_active_layers(adapted, [split])
    assert any("lora_A" in name for name in layers) == is_moved
    projector = make_projector(GradientsConfig(proj_dim=8), seed=0)
    batch = collate([(split, e) for e in range(6)], 0)
    counter = FlopCounterMode(display=False)
    with activate(adapted, THETA0), counter:
        found = compute_features(adapted, layers, projector, batch, "contrast")
    n_coordinates = sum(p.numel() for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None)
    meter, blind = Meter("t"), Meter("t")
    options = {
        "n_backwards": 1 if kind == "options" else 2,
        "n_outputs": found.outputs.size,
        "projection_flops": 2 * n_coordinates * 8,
    }
    count_gradients(meter, adapted.costs, batch, n_coordinates=n_coordinates, **options)
    count_gradients(blind, adapted.costs, batch, **options)
    # Of so small a model, a few per cent are the products that are left out where B is zero, and sums over choices.
    assert meter.record.flops == pytest.approx(counter.get_total_flops(), rel=0.05 if is_moved else 0.08)
    assert (meter.record.flops > blind.record.flops) == is_moved


def test_a_plan_at_a_warm_up_costs_what_is_foreseen(pool: Pool) -> None:
    candidate = METHODS["warm-plan"].run(pool)
    run = make_forecaster(pool.config, pool.probe, pool.rows)
    (costs,) = pool.folder.glob("warm-*/plan/costs.json")
    spent = {record["stage"]: record["flops"] for record in artifacts.read_json(costs)["stages"]}
    assert spent["features"] == run.features(1.0, is_moved=True).flops > run.features(1.0).flops
    assert candidate.costs.select_flops >= spent["features"]


# Dry runs


def test_what_tag_looks_at_is_foreseen(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lookahead.measure_lookahead(pool)
    training, forward = lookahead.count_looks(pool.probe, pool.rows.train, pool.config.training, seed=pool.config.seed)
    n = pool.n_tasks
    monkeypatch.setattr(lookahead.Lookahead, "look", lambda self: np.zeros((n, n)))
    plain = lookahead._train_looking(pool)
    assert plain["n_looks"] == found["n_looks"] > 1
    assert found["flops"] - plain["flops"] == training.flops + forward.flops > 0


def test_a_dry_run_counts_boosters_looks_and_shares(recipe: Path, tmp_path: Path) -> None:
    tasks = [str(recipe.parent / "tasks" / f"{name}.yaml") for name in CHOSEN]
    config = read_config(recipe, data={"tasks": tasks}, **QUICK)
    names = [
        "shared", "grouped", "ours", "ours-boost-0", "ours-boost-3", "ours-half-features", "tag", "warm-plan",
        "adaboost-row-2", "adaboost-real-2", "single-steps", "shared-longer",
    ]  # fmt: skip
    found = forecast_study(config, names, 1, [], tmp_path / "c")
    _, rows, probe = stages.prepare(config)
    run = make_forecaster(config, probe, rows)
    flops = {name: line["flops"] for name, line in found.items()}
    assert flops["ours-boost-0"] == flops["grouped"] < flops["ours"] < flops["ours-boost-3"]
    assert flops["ours"] - flops["grouped"] == run.boosting(config.boosting.n_rounds).flops > 0
    assert flops["ours"] - flops["ours-half-features"] == run.features(1.0).flops - run.features(0.5).flops > 0
    looks = sum(r.flops for r in lookahead.count_looks(probe, rows.train, config.training, seed=config.seed))
    n_whole = count_fine_tunings(METHODS["tag"].work, n_tasks=4, n_groups=2)[1]
    assert flops["tag"] == n_whole * flops["shared"] + run.features(1.0).flops + looks
    moved = run.features(1.0, is_moved=True).flops
    assert flops["warm-plan"] == flops["shared"] + moved and moved > run.features(1.0).flops, "A has a gradient there"
    assert flops["adaboost-row-2"] == flops["adaboost-real-2"] == 3 * flops["shared"]
    assert flops["single-steps"] == 4 * flops["shared"] and flops["shared-longer"] == 2 * flops["shared"]
    groups = flops["shared"]  # the plan's groups, trained once for all that use them
    boosting = run.boosting(3).flops + run.boosting(1).flops  # of the plan's groups at most three; of the half's, one
    expected = flops["shared"] + groups + boosting + run.features(1.0).flops + flops["warm-plan"]
    expected += 2 * flops["shared"] + 2 * flops["shared"] + flops["single-steps"] + flops["shared-longer"]
    without = forecast_study(config, [name for name in names if name != "tag"], 1, [], tmp_path / "c")
    assert without["total"]["flops"] == expected < flops["total"]


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (("matched groups",), (3, 3)),
        (("half", "half groups"), (4, 1.0)),
        (("one", "row learner", "row learner"), (3, 3)),
        (("matched tasks",), (10, 10)),
    ],
)
def test_work_is_counted_by_how_often_it_takes_all_rows(work: Any, expected: tuple[int, float]) -> None:
    assert count_fine_tunings(work, n_tasks=10, n_groups=3) == expected
