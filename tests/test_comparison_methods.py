"""Methods of the comparison that train or combine otherwise: what they train, what they start from, what they cost."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.ensemble import AdaBoostClassifier
from sklearn.linear_model import LogisticRegression

from ensemblelora import artifacts, stages
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, adapter_state, add_adapter, draw_start, remove_adapter
from ensemblelora.comparison import combined, controls
from ensemblelora.comparison import pool as pools
from ensemblelora.comparison.adaboost import boost_by_weights, boost_shared, cast_votes, take_samme_step
from ensemblelora.comparison.candidate import Candidate, Costs
from ensemblelora.comparison.combined import boost_members, train_ours
from ensemblelora.comparison.controls import average_factors, mix_copies, mix_groups, train_copies, train_wide
from ensemblelora.comparison.full import RATE_SHARE, train_full
from ensemblelora.comparison.grouped import train_groups, train_number, train_planned, train_shared
from ensemblelora.comparison.matched import match_steps, train_shared_longer, train_singles_longer
from ensemblelora.comparison.methods import METHODS
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Pool, Trained
from ensemblelora.comparison.sequential import train_continued, train_warm, train_warm_plan
from ensemblelora.config import TrainingConfig
from ensemblelora.ensemble import Member, group_scores, needed_adapters
from ensemblelora.errors import ConfigError, TrainingError, UsageError
from ensemblelora.folding import stack_adapters
from ensemblelora.grouping import to_labels
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.seeding import seed_for
from ensemblelora.startpoint import halve_epochs
from tests.tiny_run import make_mixed_inputs, read_config

TASKS = ("family0", "family1", "spelled", "written")
WRITTEN = TASKS.index("written")
OPEN = {"boosting": {"n_rounds": 2, "boosting_rate": 1.0, "l2_penalty": 0.1}, "ensemble": {"min_weight": 0.0}}


@pytest.fixture(scope="module", autouse=True)
def _light() -> Iterator[None]:
    """Spare what takes longer than to train a tiny model: searches for garbage in all modules, walks over adapters."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "_MOST_LOADED", 1)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of opposed families, one of them again with longer answers, and one of free text."""
    return make_mixed_inputs(tmp_path_factory.mktemp("inputs"), TASKS, n_test=8)


def open_pool(recipe: Path, folder: Path, **changes: Any) -> Pool:
    config = read_config(recipe, out=str(folder), **OPEN | changes)
    _, rows, probe = stages.prepare(config)
    return Pool(config, folder, rows, probe, start_fingerprint=stages.identify_start(config, probe))


@pytest.fixture(scope="module")
def pool(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Two groups are asked for; what one test trains, the others find."""
    return open_pool(inputs, tmp_path_factory.mktemp("pool"))


def beside(pool: Pool, folder: Path, **changes: Any) -> Pool:
    """Another pool on the same model, with other sections of the config; it finds no adapters but those put into it."""
    config = pool.config.model_copy(update=changes)
    return Pool(config, folder, pool.rows, pool.probe, start_fingerprint=pool.start_fingerprint)


def validation_nll(pool: Pool, candidate: Candidate) -> list[float]:
    return [
        float(member_nll(found, pool.split(task, "validation").labels).mean())
        for task, found in enumerate(candidate.predict("validation"))
    ]


def same_scores(one: Candidate, other: Candidate) -> bool:
    pairs = zip(one.predict("validation"), other.predict("validation"), strict=True)
    return all(np.array_equal(a.values, b.values) for a, b in pairs)


def state_of(pool: Pool, name: str) -> dict[str, torch.Tensor]:
    pool.load([name])
    return adapter_state(pool.probe, name)


# Ours


def test_ours_is_what_the_stages_make_of_the_same_adapters(pool: Pool) -> None:
    candidate, groups = train_ours(pool), make_plan(pool).plan.groups
    assert len(groups) == 2
    trained = [pool.train(group) for group in groups]
    boosted = boost_members(pool, make_plan(pool), groups, trained)
    assert boosted.members, "a booster is kept, or this test says little"
    members = (*(Member(one.name, g, "group", 1.0) for g, one in enumerate(trained)), *boosted.members)
    pool.load([member.name for member in members])
    scores = [group_scores(pool.probe, s, members, range(2), max_tokens=999) for s in pool.rows.validation]
    own = [next(g for g, group in enumerate(groups) if task in group) for task in pool.everyone]
    every = [range(2)] * len(own)
    weights, _ = stages.settle_weights(
        scores, pool.rows.validation, own, every, pool.config.ensemble, n_groups=2, seed=0
    )
    np.testing.assert_allclose(candidate.notes["weights"], weights, atol=1e-4)
    for found, theirs, row in zip(candidate.predict("validation"), scores, weights, strict=True):
        if found.kind != "sequence":
            np.testing.assert_allclose(found.values[0], np.tensordot(row, theirs.values, 1), rtol=1e-3, atol=1e-3)


def test_a_group_that_stayed_where_it_began_is_not_boosted(pool: Pool) -> None:
    found = make_plan(pool)
    groups = found.plan.groups
    names = [pool.train(group).name for group in groups]
    pool.load(names)
    add_adapter(pool.probe, "unmoved")
    try:
        tasks = stages.list_boost_tasks(groups, [names[0], "unmoved"], pool.rows, found.store, pool.probe)
        assert [task.train.task for task in tasks[0]] == [pool.rows.names[i] for i in groups[0]] and tasks[1] == []
    finally:
        remove_adapter(pool.probe, "unmoved")


def test_ours_is_charged_for_plan_groups_rounds_and_weights(pool: Pool) -> None:
    candidate, found = train_ours(pool), make_plan(pool)
    groups = found.plan.groups
    trained = [pool.train(group) for group in groups]
    boosted = boost_members(pool, found, groups, trained)
    members = (*(Member(one.name, g, "group", 1.0) for g, one in enumerate(trained)), *boosted.members)
    weighing = Meter("weigh")
    for split in pool.rows.validation:
        names = [one.name for one in trained]
        if split.kind != "sequence":
            names += [*(one.name for one in boosted.members), THETA0]
        pool.load(names)
        predict_members(
            pool.probe, split, names, max_tokens=pools.choose_max_tokens(pool.probe, "auto"), meter=weighing
        )
    spent = sum(one.flops for one in (*trained, *boosted.spent))
    assert candidate.costs.train_flops == spent + weighing.record.flops
    assert candidate.costs.select_flops == found.select_flops > found.feature_flops > 0
    assert candidate.costs.n_bytes == (len(trained) + len(boosted.members)) * trained[0].n_bytes
    assert all(one.flops > 0 and one.seconds > 0 for one in boosted.spent)
    scoring = sum(
        pool.time_scoring(needed_adapters(members, range(len(groups)), split.kind), task, "validation")
        for task, split in enumerate(pool.rows.validation)
    )
    seconds = sum(one.seconds for one in (*trained, *boosted.spent))
    assert scoring > 0 and candidate.costs.seconds == pytest.approx(seconds + found.seconds + scoring)
    peaks = [one.peak_memory_bytes for one in (*trained, *boosted.spent)]
    assert candidate.costs.peak_memory_bytes == max(*peaks, found.peak_memory_bytes) and found.peak_memory_bytes > 0


def test_parts_of_ours_can_be_left_out(pool: Pool) -> None:
    plain = train_ours(pool, n_rounds=0, weights="own")
    assert same_scores(plain, train_planned(pool))
    assert plain.costs == train_planned(pool).costs
    uniform = train_ours(pool, n_rounds=0, weights="uniform")
    trained = [pool.train(group) for group in make_plan(pool).plan.groups]
    for task, found in enumerate(uniform.predict("validation")):
        each = pool.score([one.name for one in trained], task, "validation").values.astype(float)
        mean = each.mean(axis=0) if task != WRITTEN else np.log(np.exp(each).mean(axis=0))
        np.testing.assert_allclose(found.values[0], mean, rtol=1e-6, atol=1e-6)
    assert uniform.costs.train_flops == plain.costs.train_flops
    common = train_ours(pool, n_rounds=0, weights="global").notes["weights"]
    assert len(set(common)) == 1


def test_the_shared_adapter_may_be_a_member_and_is_then_paid_for(pool: Pool) -> None:
    shared, without = pool.train(pool.everyone), train_ours(pool, n_rounds=0)
    candidate = train_ours(pool, n_rounds=0, with_shared=True)
    assert candidate.notes["members"] == [*without.notes["members"], shared.name]
    scoring = sum(pool.count_scoring(task, "validation", 1) for task in pool.everyone)
    assert candidate.costs.train_flops == without.costs.train_flops + shared.flops + scoring
    np.testing.assert_allclose(np.sum(candidate.notes["weights"], axis=1), 1)


def test_a_plan_of_one_group_has_no_second_shared_adapter(pool: Pool, tmp_path: Path) -> None:
    single = beside(pool, pool.folder, grouping=pool.config.grouping.model_copy(update={"n_groups": 1}))
    single.plan_folder = tmp_path / "plan"
    candidate = train_ours(single, n_rounds=0, with_shared=True)
    assert len(candidate.notes["members"]) == 1
    assert candidate.costs.train_flops == single.train(single.everyone).flops


def test_boosting_goes_on_where_it_was(pool: Pool, tmp_path: Path) -> None:
    """In steps or at once: the same rounds, the same adapters, the same price."""
    at_once, in_steps = beside(pool, tmp_path / "once"), beside(pool, tmp_path / "steps")
    for which in (at_once, in_steps):
        which.plan_folder = pool.plan_folder
        for group in make_plan(pool).plan.groups:
            name = pool.train(group).name
            shutil.copytree(pool.folder / "adapters" / name, which.folder / "adapters" / name)
    found = {}
    for which, asked in ((at_once, [3]), (in_steps, [1, 2, 3])):
        groups = make_plan(which).plan.groups
        trained = [which.train(group) for group in groups]
        for n_rounds in asked:
            found[which] = boost_members(which, make_plan(which), groups, trained, n_rounds)
            assert len(found[which].members) <= n_rounds
    assert found[at_once].rounds == found[in_steps].rounds
    assert len(found[at_once].rounds) > 1
    assert [one.flops for one in found[at_once].spent] == [one.flops for one in found[in_steps].spent]
    for member in found[at_once].members:
        a, b = (load_file(which.folder / "adapters" / member.name / "adapter_model.safetensors") for which in found)
        assert all(torch.equal(a[key], b[key]) for key in a)
    first = boost_members(in_steps, make_plan(in_steps), groups, trained, 1)
    assert found[in_steps].rounds[: len(first.rounds)] == first.rounds
    assert len(first.members) == 1


# Controls


def test_copies_have_each_its_own_start_and_order_of_rows_and_are_averaged(pool: Pool, recorder: Recorder) -> None:
    candidate = train_copies(pool)
    names = candidate.notes["members"]
    n_ours = len(train_ours(pool).notes["members"])
    assert len(names) == len(set(names)) == n_ours >= 2
    assert names[0] == pool.train(pool.everyone).name
    starts = [job.start for job, _ in recorder.jobs if job.name in names[1:]]
    theta0 = adapter_state(pool.probe, THETA0)
    for start in starts:
        assert start.keys() == theta0.keys()
        for key in theta0:
            is_drawn = ".lora_A." in key
            assert torch.equal(start[key], theta0[key]) != is_drawn, "B begins at zero, A is drawn anew"
            assert not is_drawn or float(start[key].std()) == pytest.approx(float(theta0[key].std()), rel=0.3)
    key = next(key for key in theta0 if ".lora_A." in key)
    firsts = [theta0[key], *(start[key] for start in starts)]
    assert len({tuple(a.flatten().tolist()) for a in firsts}) == len(firsts) == n_ours
    each = pool.score(names, 0, "validation").values.astype(float)
    np.testing.assert_allclose(candidate.predict("validation")[0].values[0], each.mean(axis=0), atol=1e-6)
    assert candidate.costs.forward_passes == len(names)
    assert candidate.costs.train_flops == pytest.approx(len(names) * pool.train(pool.everyone).flops, rel=0.1)


def test_a_start_is_drawn_as_theta0_was_and_leaves_the_model_as_it_is(pool: Pool) -> None:
    before, names = adapter_state(pool.probe, THETA0), set(pool.probe.peft.peft_config)
    noise = torch.get_rng_state()
    again = draw_start(pool.probe, seed=seed_for(pool.config.seed, "adapter", THETA0))
    assert all(torch.equal(again[key], before[key]) for key in before), "the same seed, the same start"
    assert set(pool.probe.peft.peft_config) == names and torch.equal(torch.get_rng_state(), noise)
    other = draw_start(pool.probe, seed=1)
    key = next(key for key in before if ".lora_A." in key)
    assert not torch.equal(other[key], before[key])


def test_one_adapter_of_all_ranks_has_the_same_scale_and_leaves_no_second_model(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []

    def load(*args: Any, **options: Any) -> Any:
        base = LOAD(*args, **options)
        models.append(weakref.ref(base.model))
        return base

    LOAD = controls.load_base
    monkeypatch.setattr(controls, "load_base", load)
    candidate = train_wide(pool)
    candidate.predict("validation")
    gc.collect()
    assert len(models) == 2 and all(model() is None for model in models)
    adapter, n_members = pool.config.adapter, candidate.notes["n_members"]
    assert n_members == len(train_ours(pool).notes["members"])
    assert candidate.notes["adapter"]["r"] == n_members * adapter.r
    assert candidate.notes["adapter"]["lora_alpha"] / candidate.notes["adapter"]["r"] == adapter.lora_alpha / adapter.r
    (folder,) = pool.folder.glob("wide-*/adapters/pool-*")
    assert artifacts.read_json(folder / "adapter_config.json")["r"] == n_members * adapter.r
    assert candidate.costs.n_bytes == n_members * pool.train(pool.everyone).n_bytes
    train_wide(pool).predict("validation")
    assert len(models) == 2, "what was trained and scored is found, without a model"
    with pytest.raises(TrainingError, match="test rows asked for"):
        candidate.predict("test")
    with pool.open_tests():
        assert np.isfinite(candidate.predict("test")[0].values).all()


def test_a_soup_is_the_mean_of_factors_or_of_what_they_do(pool: Pool) -> None:
    names = [pool.train(group).name for group in make_plan(pool).plan.groups]
    states = [state_of(pool, name) for name in names]
    plain, exact = mix_groups(pool), mix_groups(pool, is_exact=True)
    (soup,) = plain.notes["members"]
    mixed = state_of(pool, soup)
    for key in mixed:
        torch.testing.assert_close(mixed[key], (states[0][key] + states[1][key]) / 2)
    settings = pool.config.adapter
    (folder,) = pool.folder.glob("soup-*/adapters/pool-stack-*")
    stacked = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in stacked if key.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        means = sum(state[other] @ state[key] for state in states) * settings.lora_alpha / settings.r / 2
        torch.testing.assert_close(stacked[other] @ stacked[key], means, rtol=1e-4, atol=1e-6)
    assert exact.notes["r"] == 2 * settings.r
    trained = sum(pool.train(group).flops for group in make_plan(pool).plan.groups)
    assert plain.costs.train_flops == exact.costs.train_flops == trained
    assert plain.costs.n_bytes == pool.train(pool.everyone).n_bytes
    assert not same_scores(plain, exact)


def test_with_a_common_a_both_soups_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a, *bs = (torch.randn(shape, generator=generator) for shape in ((4, 6), (5, 4), (5, 4), (5, 4)))
    states = [{"layer.lora_A.weight": a, "layer.lora_B.weight": b} for b in bs]
    plain, exact = average_factors(states), stack_adapters(states, [1 / 3] * 3, 1.0)
    assert exact["layer.lora_A.weight"].shape == a.shape
    products = [state["layer.lora_B.weight"] @ state["layer.lora_A.weight"] for state in (plain, exact)]
    torch.testing.assert_close(*products)


def test_a_soup_of_copies_costs_what_the_copies_cost(pool: Pool) -> None:
    soup, copies = mix_copies(pool), train_copies(pool)
    assert soup.costs.train_flops == pytest.approx(copies.costs.train_flops, rel=0.1)
    assert len(soup.notes["parts"]) == len(copies.notes["members"])
    assert soup.notes["parts"][0] == copies.notes["members"][0], "the shared adapter"
    assert set(soup.notes["parts"][1:]).isdisjoint(copies.notes["members"]), "those of a soup have one start"
    assert (soup.costs.forward_passes, soup.costs.select_flops) == (1.0, 0)


# One after the other


class Recorder:
    """Notes the jobs of every training, and carries it out."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self._original = pools.training.fine_tune_together

    def __call__(self, adapted: Any, jobs: Any, settings: TrainingConfig, **options: Any) -> Any:
        self.jobs += [(job, settings) for job in jobs]
        return self._original(adapted, jobs, settings, **options)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    found = Recorder()
    monkeypatch.setattr(pools.training, "fine_tune_together", found)
    yield found


def test_each_continuation_starts_at_the_shared_adapter(pool: Pool, recorder: Recorder) -> None:
    shared = pool.train(pool.everyone)
    recorder.jobs.clear()
    candidate = train_continued(pool)
    assert [[split.task for split in job.train] for job, _ in recorder.jobs] == [[name] for name in pool.rows.names]
    expected = state_of(pool, shared.name)
    for job, settings in recorder.jobs:
        assert settings == pool.config.training
        assert all(torch.equal(job.start[key], expected[key]) for key in expected)
    trained = [pool.train([task], start=shared) for task in pool.everyone]
    assert candidate.costs.train_flops == shared.flops + sum(one.flops for one in trained)
    assert candidate.costs.n_bytes == pool.n_tasks * shared.n_bytes
    assert candidate.costs.forward_passes == 1
    assert {one.name for one in trained}.isdisjoint(pool.train([task]).name for task in pool.everyone)


def test_the_ensemble_of_continuations_is_never_worse_where_it_was_freely_fitted(pool: Pool) -> None:
    free = pool.config.ensemble.model_copy(update={"kl_penalty": 0.0})
    freed = beside(pool, pool.folder, ensemble=free)
    own, ensemble = train_continued(freed), train_continued(freed, weights="task")
    assert np.all(np.array(validation_nll(freed, ensemble)) <= np.array(validation_nll(freed, own)) + 1e-6)
    scoring = sum(pool.count_scoring(task, "validation", pool.n_tasks) for task in pool.everyone)
    assert ensemble.costs.train_flops == own.costs.train_flops + scoring


def test_a_warm_up_and_its_groups_take_the_epochs_of_one_training(pool: Pool, recorder: Recorder) -> None:
    candidate = train_warm(pool)
    first, second = halve_epochs(pool.config.training)
    assert first.num_train_epochs + second.num_train_epochs == pool.config.training.num_train_epochs
    (warm_job, warm_settings), *others = recorder.jobs
    assert (warm_job.start, warm_settings) == (None, first)
    warm = state_of(pool, warm_job.name)
    for job, settings in others:
        assert settings == second and all(torch.equal(job.start[key], warm[key]) for key in warm)
    assert len(others) == len(candidate.groups) == 2
    assert candidate.costs.train_flops == pytest.approx(pool.train(pool.everyone).flops, rel=0.1)


def test_a_warm_plan_looks_at_the_warm_adapter_and_leaves_theta0_as_it_was(pool: Pool) -> None:
    before = adapter_state(pool.probe, THETA0)
    candidate = train_warm_plan(pool)
    after = adapter_state(pool.probe, THETA0)
    assert all(torch.equal(before[key], after[key]) for key in before)
    (health,) = pool.folder.glob("warm-*/plan/feature_health.json")
    cold = artifacts.read_json(pool.plan_folder / "feature_health.json")
    assert artifacts.read_json(health)["n_coordinates"] > cold["n_coordinates"], "A has a gradient there, too"
    assert candidate.costs.select_flops > 0


def test_one_epoch_has_no_half(pool: Pool) -> None:
    with pytest.raises(ConfigError, match="num_train_epochs 1"):
        halve_epochs(pool.config.training.model_copy(update={"num_train_epochs": 1}))


# Boosting


@pytest.mark.parametrize("n_classes", [2, 3])
def test_samme_is_scikit_learns(n_classes: int) -> None:
    x, y = make_classification(
        300, 6, n_informative=4, n_classes=n_classes, n_clusters_per_class=2, flip_y=0.2, random_state=0
    )
    base = LogisticRegression(C=0.1, tol=1e-10, max_iter=5000)
    theirs = AdaBoostClassifier(base, n_estimators=6, random_state=0).fit(x, y)
    weights, alphas, errors, scores = np.ones(len(y)), [], [], []
    for _ in range(len(theirs.estimators_)):
        learner = clone(base).fit(x, y, sample_weight=weights / weights.sum())
        scores.append(learner.predict_proba(x))
        step = take_samme_step(learner.predict(x) != y, weights, n_classes)
        weights = weights * step.factors
        weights /= weights.mean()
        alphas.append(step.alpha)
        errors.append(step.error)
    assert len(alphas) == 6
    np.testing.assert_allclose(errors, theirs.estimator_errors_, rtol=1e-6)
    np.testing.assert_allclose(alphas, theirs.estimator_weights_, rtol=1e-6)
    votes = cast_votes(scores, alphas)
    np.testing.assert_array_equal(votes.argmax(axis=1), theirs.predict(x))
    # Their probabilities are of votes on another scale; the log-odds of any two classes are proportional.
    logs = log_softmax(votes, axis=1)
    decision = theirs.decision_function(x)
    if n_classes > 2:
        np.testing.assert_allclose(
            (decision[:, 0] - decision[:, 1]) * np.sum(alphas) * (n_classes - 1) / n_classes,
            logs[:, 0] - logs[:, 1],
            atol=1e-8,
        )


def test_a_learner_no_better_than_chance_has_no_vote_and_changes_nothing() -> None:
    step = take_samme_step(np.array([True, True, False, False]), np.ones(4), 2)
    assert (step.error, step.alpha) == (0.5, 0.0)
    assert (step.factors == 1).all()
    perfect = take_samme_step(np.zeros(4, dtype=bool), np.ones(4), 2)
    assert 10 < perfect.alpha < 20 and (perfect.factors == 1).all()


def test_tasks_are_weighted_by_their_own_error() -> None:
    is_wrong = np.array([True, False, False, False])
    step = take_samme_step(is_wrong, np.ones(4), 3, level="task")
    assert step.alpha == pytest.approx(np.log(3) + np.log(2))
    np.testing.assert_allclose(step.factors, np.exp(step.alpha * 0.25))


def test_votes_leave_out_absent_choices() -> None:
    scores = [np.array([[1.0, 2.0, -np.inf], [0.0, 1.0, 5.0]]), np.array([[3.0, 2.0, -np.inf], [0.0, 6.0, 5.0]])]
    np.testing.assert_array_equal(cast_votes(scores, [2.0, 0.5]), [[0.5, 2.0, -np.inf], [0.0, 0.5, 2.0]])


@pytest.mark.parametrize("level", ["row", "task"])
def test_adaboost_weights_what_the_last_learner_got_wrong(level: Any, pool: Pool, recorder: Recorder) -> None:
    candidate = boost_by_weights(pool, 2, level=level)
    names, alphas = candidate.notes["members"], np.array(candidate.notes["alphas"])
    assert names[0] == pool.train(pool.everyone).name and len(names) == 3
    assert (alphas[:, 0] > 0).any() and not alphas[WRITTEN].any()
    job = next(job for job, _ in recorder.jobs if job.name == names[1])
    for task, weights in enumerate(job.weights):
        split = pool.split(task, "train")
        if alphas[task, 0] == 0:
            assert len(set(weights)) == 1
            continue
        is_wrong = pool.score(names[:1], task, "train").values[0].argmax(1) != split.labels
        if level == "row":
            assert weights.mean() == pytest.approx(1)
            factor = weights[is_wrong].mean() / weights[~is_wrong].mean() if is_wrong.any() else None
            assert factor is None or factor == pytest.approx(np.exp(alphas[task, 0]))
        else:
            assert len(set(weights)) == 1
    assert np.concatenate(job.weights).mean() == pytest.approx(1)
    found = candidate.predict("validation")
    first = pool.score(names[:1], WRITTEN, "validation")
    assert np.array_equal(found[WRITTEN].values, first.values), "free text keeps the first adapter"
    each = [pool.score([name], 0, "validation").values[0] for name in names]
    np.testing.assert_allclose(found[0].values[0], cast_votes(each, alphas[0]))


def test_adaboost_is_charged_for_its_learners_and_for_judging_them(pool: Pool) -> None:
    candidate = boost_by_weights(pool, 1)
    trained = [artifacts.read_json(pool.folder / "adapters" / n / "trained.json") for n in candidate.notes["members"]]
    judged = [pool.rows.names.index(name) for errors in candidate.notes["errors"] for name in errors]
    scoring = sum(pool.count_scoring(task, "train", 1) for task in judged)
    assert WRITTEN not in judged and len(judged) > pool.n_tasks - 1
    assert candidate.costs.train_flops == sum(one["flops"] for one in trained) + scoring
    pairs = zip(candidate.notes["members"], candidate.notes["errors"], strict=True)
    index = pool.rows.names.index
    judging = [pool.time_scoring([name], index(task), "train") for name, tasks in pairs for task in tasks]
    assert candidate.costs.seconds == pytest.approx(sum(one["seconds"] for one in trained) + sum(judging))
    assert min(judging) > 0


def test_without_steps_boosting_is_the_shared_adapter(pool: Pool) -> None:
    shared = train_shared(pool)
    for candidate in (boost_by_weights(pool, 0), boost_shared(pool, 0)):
        assert same_scores(candidate, shared) and candidate.costs == shared.costs
    with pytest.raises(UsageError, match="-1 steps"):
        boost_by_weights(pool, -1)


def test_boosting_the_shared_adapter_lowers_its_training_loss(pool: Pool) -> None:
    shared, candidate = train_shared(pool), boost_shared(pool, 2)
    kept = [entry for entry in candidate.notes["boosting"] if entry["accepted"]]
    assert kept and all(entry["train_nll_after"] < entry["train_nll_before"] for entry in kept)
    assert candidate.notes["boosting"][0]["train_nll_before"] == pytest.approx(
        np.mean(
            [
                member_nll(shared.predict("train")[task], pool.split(task, "train").labels).mean()
                for task in pool.everyone
                if task != WRITTEN
            ]
        ),
        rel=1e-4,
    )
    features = make_plan(pool).feature_flops
    rounds = boost_members(pool, make_plan(pool), (pool.everyone,), [pool.train(pool.everyone)], 2).spent
    of_rows = candidate.costs.train_flops - shared.costs.train_flops - sum(one.flops for one in rounds)
    assert 0.5 < of_rows / features < 0.8, "of 16 training rows of 24: validation rows' features are not needed"
    assert candidate.costs.select_flops == 0


# Full fine-tuning and steps


def test_full_fine_tuning_learns_at_its_own_rate_and_is_found_again(pool: Pool, monkeypatch: Any) -> None:
    before = {path: p.detach().clone() for path, p in pool.probe.peft.named_parameters()}
    candidate = train_full(pool)
    assert candidate.notes["learning_rate"] == RATE_SHARE * pool.config.training.learning_rate
    losses = validation_nll(pool, candidate)
    base = [
        float(member_nll(pool.score([THETA0], task, "validation"), pool.split(task, "validation").labels).mean())
        for task in pool.everyone
    ]
    assert np.mean(losses) < np.mean(base)
    assert all(torch.equal(before[path], p) for path, p in pool.probe.peft.named_parameters() if path in before)
    n_weights = sum(p.numel() for path, p in before.items() if "theta0" not in path and "pool-" not in path)
    assert candidate.costs.n_bytes == 4 * n_weights
    monkeypatch.setattr("ensemblelora.comparison.full.fine_tune_full", None)
    monkeypatch.setattr("ensemblelora.comparison.full.replaced_weights", None)
    assert validation_nll(pool, train_full(pool)) == losses


def test_steps_are_matched_in_whole_epochs(pool: Pool) -> None:
    wanted = pool.train(pool.everyone).n_steps
    for task in pool.everyone:
        settings = match_steps(pool, [task])
        n_steps = pool.train([task], settings=settings).n_steps
        assert abs(n_steps - wanted) <= n_steps / settings.num_train_epochs / 2 + 1
    assert match_steps(pool, pool.everyone) == pool.config.training
    candidate = train_singles_longer(pool)
    assert len(candidate.notes["n_steps"]) == pool.n_tasks
    assert candidate.costs.train_flops > 3 * train_groups(pool, tuple((i,) for i in pool.everyone)).costs.train_flops
    longer = train_shared_longer(pool)
    assert longer.costs.train_flops == pytest.approx(2 * pool.train(pool.everyone).flops, rel=0.1)


# One part at a time


def test_a_number_of_groups_is_tried_by_itself_and_says_what_was_expected(pool: Pool) -> None:
    planned = make_plan(pool)
    for point in planned.plan.curve:
        candidate = train_number(pool, point.n_groups)
        assert candidate.groups == point.groups and len(point.groups) == point.n_groups
        told = candidate.notes["planned"]
        assert (told["predicted_nll"], told["density"]) == (point.predicted_nll, point.density)
        assert told["is_chosen"] == (point.groups == planned.plan.groups)
        assert candidate.costs.select_flops == planned.select_flops
        own = [np.flatnonzero(row).tolist() for row in candidate.notes["weights"]]
        assert own == [[g] for g in to_labels(point.groups)], "each task's own group, without weights or boosters"
    assert same_scores(train_number(pool, 1), train_shared(pool))
    assert same_scores(train_number(pool, len(planned.plan.groups)), train_planned(pool))
    with pytest.raises(ConfigError, match=r"6 groups: the plan looked at 1, 2, 3; raise grouping\.max_groups"):
        train_number(pool, 6)


def test_random_groups_can_have_ours_boosters_and_weights(pool: Pool) -> None:
    candidate, plain = METHODS["random-ours-1"].run(pool), METHODS["random-1"].run(pool)
    assert candidate.groups == plain.groups, "the same draw"
    assert candidate.notes["members"][: len(plain.groups)] == plain.notes["members"], "trained once for both"
    assert candidate.notes["boosting"] and len(candidate.notes["weights"][0]) == len(plain.groups)
    features = make_plan(pool).feature_flops
    assert 0.5 < candidate.costs.select_flops / features < 0.8, "boosters need the training rows' features, no plan"
    unboosted = train_ours(pool, n_rounds=0, weights="own", regroup=lambda _: plain.groups)
    assert unboosted.costs == plain.costs and same_scores(unboosted, plain)


@pytest.mark.parametrize("name", ["mtl-ft-steps", "random-steps"])
def test_steps_can_be_matched_after_a_shared_training_and_in_any_groups(
    name: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the pool, which trains nothing here."""
    asked: list[tuple[tuple[int, ...], Any, TrainingConfig]] = []

    def train(self: Pool, tasks: Any, start: Any = None, settings: Any = None, **options: Any) -> Trained:
        asked.append((tuple(tasks), start, settings or self.config.training))
        return Trained(f"pool-{len(asked)}", tuple(tasks), 1, 0.1, 1, 1, 0.5, 1)

    groups = METHODS["random-1"].run(pool).groups
    monkeypatch.setattr(Pool, "train", train)
    candidate = METHODS[name].run(pool)
    first = asked.pop(0) if name == "mtl-ft-steps" else None
    assert first is None or (first[0], first[2]) == (pool.everyone, pool.config.training)
    expected = [(task,) for task in pool.everyone] if first else list(groups or ())
    assert [tasks for tasks, _, _ in asked] == expected
    for tasks, start, settings in asked:
        assert (start is not None) == (first is not None)
        assert settings == match_steps(pool, tasks) != pool.config.training
    assert candidate.costs.train_flops == len(expected) + (first is not None)


# Time, memory and failure


def test_scoring_is_timed_once_and_charged_whenever_it_is_needed(pool: Pool, tmp_path: Path) -> None:
    fresh, name = beside(pool, tmp_path), pool.train(pool.everyone).name
    shutil.copytree(pool.folder / "adapters" / name, tmp_path / "adapters" / name)
    fresh.score([name, THETA0], 0, "validation")
    each = [fresh.time_scoring([one], 0, "validation") for one in (name, THETA0)]
    assert each[0] == each[1] > 0, "scored together, so half each"
    fresh.score([name, THETA0], 0, "validation")
    assert fresh.time_scoring([name, THETA0], 0, "validation") == sum(each)
    costs = Costs.of_scoring(fresh, {0: [name, THETA0]}, "validation")
    assert (costs.seconds, costs.train_flops) == (sum(each), fresh.count_scoring(0, "validation", 2))


def test_costs_add_up() -> None:
    one = Costs(5, 1, 2.0, peak_memory_bytes=9, added_memory_bytes=1, n_bytes=3, forward_passes=2.0)
    two = Costs(7, seconds=0.5, peak_memory_bytes=4, added_memory_bytes=3, n_bytes=100)
    both = Costs(12, 1, 2.5, peak_memory_bytes=9, added_memory_bytes=3, n_bytes=3, forward_passes=2.0)
    assert one.plus(two) == both and one.plus() == one
    assert (two.as_choosing().select_flops, two.as_choosing().train_flops, one.flops) == (7, 0, 6)


def test_a_training_that_diverged_is_not_carried_out_again(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, calls = beside(pool, tmp_path), []

    def diverge(adapted: Any, jobs: Any, *args: Any, **options: Any) -> Any:
        calls.append(jobs[0].name)
        add_adapter(adapted, jobs[0].name)
        raise TrainingError("adapter 'pool-x': the loss is not finite; lower training.learning_rate")

    monkeypatch.setattr(pools.training, "fine_tune_together", diverge)
    for _ in range(3):
        with pytest.raises(TrainingError, match="the loss is not finite; lower"):
            fresh.train([0, 1])
    assert len(calls) == 1 and calls[0] not in fresh.probe.peft.peft_config
    with pytest.raises(TrainingError, match="so it was before"):
        beside(pool, tmp_path).train([1, 0])
    with pytest.raises(TrainingError, match="the loss"):
        fresh.train([0])
    assert len(calls) == 2, "another training is another matter"


# All of them


MINE = (
    "ours", "ours-boost-0", "ours-boost-2", "ours-global", "ours-uniform", "ours-own", "ours-shared", "mtl-ft",
    "mtl-ft-ensemble", "warm", "warm-plan", "copies", "wide", "soup", "soup-exact", "soup-copies", "full",
    "adaboost-row-2", "adaboost-task-2", "boosted-2", "shared-longer", "single-steps", "grouped-steps", "ours-steps",
    "shared-balanced", "shared-sqrt", "ours-temperature", "ours-half-features", "ours-quarter-features",
    "adaboost-real-2", "ours-m1", "ours-m3", "random-ours-1",
)  # fmt: skip


def test_every_method_scores_every_row_and_is_found_when_it_is_asked_again(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {name: METHODS[name].run(pool) for name in MINE}
    for candidate in first.values():
        candidate.predict("validation")

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(pools.training, "fine_tune_together", refuse)
    monkeypatch.setattr(pools, "predict_members", refuse)
    monkeypatch.setattr(combined, "start_boosting", refuse)
    monkeypatch.setattr(controls, "load_base", refuse)
    for name, candidate in first.items():
        again = METHODS[name].run(pool)
        assert again.costs == candidate.costs, name
        assert same_scores(again, candidate), name
        assert candidate.costs.train_flops > 0 and candidate.costs.forward_passes >= 1
        for task, found in enumerate(candidate.predict("validation")):
            split = pool.split(task, "validation")
            assert found.values.shape[0] == 1 and np.isfinite(member_nll(found, split.labels)).all(), name
        artifacts.fingerprint(candidate.notes)  # plain values
