"""Boosting against explicit sums, scikit-learn's ridge, and a model that is linear in its adapter."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import Ridge
from torch.nn import functional

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    activate,
    adapter_state,
    add_adapter,
    attach,
    set_adapter_state,
)
from ensemblelora.blocks import helmert
from ensemblelora.boosting import BoostRound, BoostTask, boost, fit_residual, residual_targets, search_length
from ensemblelora.boosting.direction import find_direction
from ensemblelora.boosting.residual import guess_length
from ensemblelora.boosting.state import GroupState, Setup
from ensemblelora.config import AdapterConfig, BoostingConfig, GradientsConfig
from ensemblelora.data.batching import collate
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import SolverError, StoreError
from ensemblelora.gradients import exact
from ensemblelora.gradients.collect import collect_features, make_projector
from ensemblelora.gradients.output import compute_outputs
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.scoring import score_batch
from ensemblelora.store import FeatureStore
from tests.tiny import make_adapted, make_base, make_learnable_split

MODES = [("margin", [2, 2, 2]), ("contrast", [4, 2, 3]), ("logodds", [4, 2, 3])]
PROJECTED = GradientsConfig(proj_dim=64, max_tokens_per_batch=200)
EXACT = PROJECTED.model_copy(update={"proj_type": "none"})
MEMBER = "group-0"


def random_fit(n: int, c: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, c, d)).astype(np.float32), rng.normal(size=(n, c))


@pytest.mark.parametrize(("n", "c", "d"), [(50, 2, 7), (6, 3, 40), (10, 2, 20)])
@pytest.mark.parametrize("l2_penalty", [0.01, 1.0, 30.0])
def test_the_fit_is_scikit_learns_ridge_and_the_sum_of_its_dual(n: int, c: int, d: int, l2_penalty: float) -> None:
    features, targets = random_fit(n, c, d)
    w, alpha = fit_residual(features, targets, l2_penalty)
    rows = features.reshape(-1, d).astype(np.float64)
    # mean ||t - J w||^2 + lambda ||w||^2, lambda over the mean squared feature norm per dimension
    ridge = Ridge(alpha=l2_penalty * (rows**2).sum() / d, fit_intercept=False).fit(rows, targets.reshape(-1))
    np.testing.assert_allclose(w, ridge.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.einsum("nc,ncd->d", alpha, features.astype(np.float64)), w, rtol=1e-6, atol=1e-9)


def test_a_fit_of_nothing_is_an_error() -> None:
    features, targets = random_fit(4, 1, 3)
    for wrong in (0 * features, np.nan * features):
        with pytest.raises(SolverError, match="residual fit of 4 examples"):
            fit_residual(wrong, targets, 1.0)
    with pytest.raises(SolverError, match="not finite"):
        fit_residual(features, np.inf * targets, 1.0)


@pytest.mark.parametrize(("mode", "n_choices"), MODES)
def test_targets_are_minus_the_gradient_of_the_loss_in_the_outputs(mode: str, n_choices: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(n_choices)
    z = torch.randn(3, max(n_choices), generator=generator, dtype=torch.float64)
    z = z.masked_fill(torch.arange(max(n_choices)) >= counts[:, None], -torch.inf)
    labels = torch.tensor([1, 0, 2]).clamp(max=counts - 1)
    u = compute_outputs(z, labels, counts, mode).detach().requires_grad_(True)
    if mode == "logodds":
        loss = functional.softplus(-u).sum()
    elif mode == "margin":
        loss = functional.softplus(-(2.0 * labels[:, None] - 1.0) * u).sum()
    else:
        decoded = (u @ torch.from_numpy(helmert(4))).masked_fill(torch.isinf(z), -torch.inf)
        loss = functional.cross_entropy(decoded, labels, reduction="sum")
    loss.backward()
    np.testing.assert_allclose(residual_targets(z.numpy(), labels.numpy(), mode), -u.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("best", [0.01, 0.3, 1.0, 40.0])
@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
def test_the_length_search_comes_near_a_parabolas_lowest_point(best: float, ratio: float) -> None:
    tried = []

    def loss_at(length: float) -> float:
        tried.append(length)
        return (length - best) ** 2

    found = search_length(loss_at, best**2, guess=ratio * best)
    assert len(tried) <= 4
    assert len(set(tried)) == len(tried), "no length is paid for twice"
    assert loss_at(found) < best**2
    assert best / 2 <= found <= 1.6 * best


@pytest.mark.parametrize("wall", [0.1, 0.6])
def test_the_length_search_walks_away_from_lengths_that_break_the_model(wall: float) -> None:
    found = search_length(lambda t: math.inf if t > wall else (t - 1.0) ** 2, 1.0)
    assert wall / 4 < found <= wall


def test_the_length_search_ends_where_no_length_helps() -> None:
    tried = []
    search_length(lambda t: tried.append(t) or 1.0 + t, 1.0)
    assert len(tried) == 4


def test_the_guessed_length_is_newtons_where_the_curvature_is_a_quarter() -> None:
    """At p = 1/2 everywhere the bound on the curvature is exact, so a tiny ridge fit needs its full Newton length."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 1, 3)).astype(np.float32)
    targets = rng.choice([-0.5, 0.5], (40, 1))  # onehot - softmax(0) of two classes, as a margin's residual
    w, _ = fit_residual(features, targets, 1e-9)
    length = guess_length(features, targets, w)

    def loss(t: float) -> float:
        margin = (features[:, 0] @ w) * t * np.sign(targets[:, 0])
        return float(np.logaddexp(0.0, -margin).mean())

    assert length == pytest.approx(4.0, rel=1e-4)  # the fit's slope over its own square is 1
    assert loss(length) < loss(length / 2) < loss(0.0)


def make_model(targets: tuple[str, ...] | str = "auto") -> AdaptedModel:
    base = make_base("llama", initializer_range=0.15)
    return attach(base, AdapterConfig(r=4, lora_alpha=8, target_modules=targets), seed=0)


def make_tasks(
    adapted: AdaptedModel,
    folder: Path,
    config: GradientsConfig = PROJECTED,
    kinds: tuple[str, ...] = ("verbalizer", "options"),
) -> list[BoostTask]:
    """Learnable tasks with their features."""

    def make(split: str, n: int, seed: int) -> list[EncodedSplit]:
        return [
            make_learnable_split(
                kind, n=n, n_choices=3 + i, seed=seed + i, task=f"task-{i}", split=split, ragged=kind == "options"
            )
            for i, kind in enumerate(kinds)
        ]

    train, validation = make("train", 24, 0), make("validation", 16, 50)
    store = FeatureStore(folder)
    identities = {(split.task, split.split): "x" for split in train}
    learnt = [split for split in train if split.kind != "sequence"] or train
    collect_features(adapted, learnt, store, config, seed=0, fingerprints=identities)
    blocks = {split.task: store.read(split.task, "train") for split in learnt}
    first = next(iter(blocks.values()))
    return [BoostTask(t, v, blocks.get(t.task, first)) for t, v in zip(train, validation, strict=True)]


def run(
    adapted: AdaptedModel, tasks: list[BoostTask], features: GradientsConfig = PROJECTED, **changes
) -> tuple[BoostRound, ...]:
    if MEMBER not in adapted.peft.peft_config:
        add_adapter(adapted, MEMBER)
    config = BoostingConfig(**{"n_rounds": 2, "l2_penalty": 0.1} | changes)
    projector = make_projector(PROJECTED, seed=0)
    return boost(adapted, [MEMBER], [tasks], config, projector=projector, max_tokens=150, seed=0, meter=Meter("boost"))


def scores_of(adapted: AdaptedModel, split: EncodedSplit, name: str) -> np.ndarray:
    return predict_members(adapted, split, [name], max_tokens=150).values[0].astype(np.float64)


def boosted_nll(adapted: AdaptedModel, tasks: list[BoostTask], rounds: list[BoostRound], part: str) -> float:
    """The group's loss, from the definition: F = z_member + sum rate (z_booster - z_theta0)."""
    losses = []
    for task in tasks:
        split = task.train if part == "train" else task.validation
        total = scores_of(adapted, split, MEMBER)
        present = np.isfinite(total)
        for entry in rounds:
            change = scores_of(adapted, split, entry.name)[present] - scores_of(adapted, split, THETA0)[present]
            total[present] += entry.rate * change
        losses.append(-log_softmax(total, axis=1)[np.arange(len(total)), split.labels])
    return float(np.concatenate(losses).mean())


@pytest.mark.parametrize("direction", ["dual", "projected", "steps"])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_reported_losses_are_those_of_the_forward_difference_and_never_rise(
    direction: str, rate: float, tmp_path: Path
) -> None:
    adapted = make_model()
    tasks = make_tasks(adapted, tmp_path)
    rounds = run(adapted, tasks, direction=direction, boosting_rate=rate, learning_rate=5e-3)
    kept = [entry for entry in rounds if entry.accepted]
    assert kept or direction == "projected", "learnable tasks can be boosted"
    for i, entry in enumerate(kept):
        assert entry.train_nll_after < entry.train_nll_before
        assert entry.heldout_nll_after < entry.heldout_nll_before
        assert entry.train_nll_before == pytest.approx(boosted_nll(adapted, tasks, kept[:i], "train"), rel=1e-5)
        assert entry.train_nll_after == pytest.approx(boosted_nll(adapted, tasks, kept[: i + 1], "train"), rel=1e-5)
        heldout = boosted_nll(adapted, tasks, kept[: i + 1], "validation")
        assert entry.heldout_nll_after == pytest.approx(heldout, rel=1e-5)


def explicit_direction(adapted: AdaptedModel, tasks: list[BoostTask], l2_penalty: float) -> dict[str, torch.Tensor]:
    """sum alpha grad u, by autograd on one example and output at a time."""
    width = max(task.features.n_outputs for task in tasks)
    features, targets = [], []
    for task in tasks:
        scores = scores_of(adapted, task.train, MEMBER)
        target = residual_targets(scores, task.train.labels, task.features.mode)
        missing = width - task.features.n_outputs
        features.append(np.pad(task.features.features, ((0, 0), (0, missing), (0, 0))))
        targets.append(np.pad(target, ((0, 0), (0, missing))))
    _, alpha = fit_residual(np.concatenate(features), np.concatenate(targets), l2_penalty)
    rows = iter(alpha)
    with activate(adapted, THETA0, trainable=True):
        parameters = {name: p for name, p in adapted.peft.named_parameters() if p.requires_grad}
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for task in tasks:
            for example in range(task.train.n_examples):
                batch = collate([(task.train, example)], 0)
                z = score_batch(adapted.network, batch).z
                labels, counts = torch.from_numpy(batch.labels), torch.from_numpy(batch.n_choices)
                outputs = compute_outputs(z, labels, counts, task.features.mode)[0]
                for value, weight in zip(outputs, next(rows), strict=False):
                    grads = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
                    for name, grad in zip(parameters, grads, strict=True):
                        total[name] += float(weight) * grad
    return {name.replace(f".{THETA0}", "").replace(".modules_to_save", ""): t for name, t in total.items()}


def find(
    adapted: AdaptedModel, tasks: list[BoostTask], features: GradientsConfig, **changes
) -> dict[str, torch.Tensor]:
    add_adapter(adapted, MEMBER)
    add_adapter(adapted, "booster")
    config = BoostingConfig(**{"l2_penalty": 0.1} | changes)
    setup = Setup(adapted, config, make_projector(features, seed=0), 60, 0, Meter("boost"))
    before = adapter_state(adapted, "booster")
    step, _ = find_direction(setup, "booster", GroupState(setup, MEMBER, tasks))
    after = adapter_state(adapted, "booster")
    assert all(torch.equal(before[key], after[key]) for key in before), "the place to compute in is left as it was"
    return step


def assert_same_step(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    scale = max(float(tensor.abs().max()) for tensor in second.values())
    assert scale > 0
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-4 * scale)


def test_the_dual_direction_is_the_explicit_sum_of_weighted_gradients(tmp_path: Path) -> None:
    adapted = make_model()
    tasks = make_tasks(adapted, tmp_path)  # small batches, so that some have fewer choices than their split
    assert_same_step(find(adapted, tasks, PROJECTED), explicit_direction(adapted, tasks, 0.1))


def test_the_dual_direction_moves_a_classification_head_and_its_bias(tmp_path: Path) -> None:
    adapted = make_adapted("bert", head="sequence_classification", initializer_range=0.15)
    tasks = make_tasks(adapted, tmp_path, kinds=("classification",))
    step = find(adapted, tasks, PROJECTED)
    assert_same_step(step, explicit_direction(adapted, tasks, 0.1))
    assert float(step["base_model.model.classifier.bias"].abs().max()) > 0


@pytest.mark.parametrize("head", ["lm", "sequence_classification"])
def test_without_projection_the_papers_direction_is_the_dual_one(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "MAX_GRAM_ROWS", 0)  # so that coordinates are kept, not inner products
    adapted = make_model() if head == "lm" else make_adapted("bert", head=head, initializer_range=0.15)
    tasks = make_tasks(
        adapted, tmp_path, EXACT, kinds=("verbalizer", "options") if head == "lm" else ("classification",)
    )
    projected = find(adapted, tasks, EXACT, direction="projected")
    assert_same_step(projected, find(adapted, tasks, EXACT, direction="dual"))


def test_the_papers_direction_is_the_fit_expanded_through_the_projection(tmp_path: Path) -> None:
    adapted = make_model()
    tasks = make_tasks(adapted, tmp_path, kinds=("verbalizer",))
    step = find(adapted, tasks, PROJECTED, direction="projected")
    scores = scores_of(adapted, tasks[0].train, MEMBER)
    w, _ = fit_residual(tasks[0].features.features, residual_targets(scores, tasks[0].train.labels, "contrast"), 0.1)
    projector = make_projector(PROJECTED, seed=0)
    for key, tensor in step.items():
        part = key.removeprefix("base_model.model.")
        expected = projector.matrix(part, tensor.shape) @ w if "lora_B" in key else np.zeros(tensor.numel())
        np.testing.assert_allclose(tensor.flatten(), expected, rtol=1e-3, atol=1e-6)


def test_on_a_linear_model_the_boosters_fold_into_one_adapter(tmp_path: Path) -> None:
    # LoRA on the output layer alone: logits are linear in B at fixed A, and only B moves.
    adapted = make_model(targets=("lm_head",))
    (made,) = make_tasks(adapted, tmp_path, kinds=("verbalizer",))
    task = BoostTask(made.train, made.train, made.features)  # the algebra is in question here, not whether it helps
    add_adapter(adapted, MEMBER)
    start = adapter_state(adapted, THETA0)
    member = {key: tensor + 0.02 * ("lora_B" in key) for key, tensor in start.items()}
    set_adapter_state(adapted, MEMBER, member)
    rounds = run(adapted, [task], boosting_rate=0.5)
    assert [entry.accepted for entry in rounds] == [True, True]
    folded = dict(member)
    for entry in rounds:
        step = adapter_state(adapted, entry.name)
        folded = {key: folded[key] + entry.rate * (step[key] - start[key]) for key in folded}
    add_adapter(adapted, "folded", folded)
    unfolded = scores_of(adapted, task.train, MEMBER)
    for entry in rounds:
        unfolded += entry.rate * (scores_of(adapted, task.train, entry.name) - scores_of(adapted, task.train, THETA0))
    np.testing.assert_allclose(scores_of(adapted, task.train, "folded"), unfolded, rtol=1e-4, atol=1e-4)


def test_a_round_that_does_not_help_held_out_rows_is_rejected_and_leaves_nothing(tmp_path: Path) -> None:
    adapted = make_model()
    tasks = make_tasks(adapted, tmp_path)
    for task in tasks:
        task.validation.labels[:] = (task.validation.labels + 1) % task.validation.n_choices  # teaches the opposite
    (entry,) = run(adapted, tasks)
    assert not entry.accepted
    assert entry.reason.startswith("held-out loss does not drop")
    assert list(adapted.peft.peft_config) == [THETA0, MEMBER]


def test_a_drop_within_its_error_is_rejected_and_any_drop_will_do_where_that_is_asked_for(tmp_path: Path) -> None:
    adapted = make_model()
    tasks = make_tasks(adapted, tmp_path)
    (kept,) = run(adapted, tasks, n_rounds=1, min_errors=0.0)
    assert kept.accepted and kept.heldout_nll_after < kept.heldout_nll_before
    rows = []
    for task in tasks:  # the drop of every held-out row, from the definition
        split, labels = task.validation, task.validation.labels
        before, new, start = (scores_of(adapted, split, name) for name in (MEMBER, kept.name, THETA0))
        after, present = before.copy(), np.isfinite(before)
        after[present] += kept.rate * (new[present] - start[present])
        losses = [-log_softmax(scores, axis=1)[np.arange(len(labels)), labels] for scores in (before, after)]
        rows.append(losses[0] - losses[1])
    groups = [len(np.unique(task.validation.groups)) == len(task.validation.labels) for task in tasks]
    assert all(groups), "each row a group of its own, so that the error is the plain one"
    drops = np.concatenate(rows)
    n_errors = drops.mean() / (drops.std(ddof=1) / len(drops) ** 0.5)
    assert drops.mean() == pytest.approx(kept.heldout_nll_before - kept.heldout_nll_after, rel=1e-3)
    for factor, is_kept in ((0.99, True), (1.01, False)):
        adapted = make_model()
        (entry,) = run(adapted, make_tasks(adapted, tmp_path / str(factor)), n_rounds=1, min_errors=factor * n_errors)
        assert entry.accepted == is_kept
        assert is_kept or entry.reason.startswith("held-out loss drops by no more than chance (")


def test_a_step_that_does_not_lower_the_training_loss_is_rejected(tmp_path: Path) -> None:
    adapted = make_model()
    (entry,) = run(adapted, make_tasks(adapted, tmp_path), tolerance=0.99)
    assert not entry.accepted
    assert entry.reason.startswith("training loss does not drop")


def test_the_worst_group_comes_first_and_a_rejected_one_is_left_alone(tmp_path: Path) -> None:
    adapted = make_model()
    tasks = make_tasks(adapted, tmp_path)
    for name in ("group-0", "group-1"):
        add_adapter(adapted, name)
    losses = [
        float(member_nll(predict_members(adapted, t.train, [THETA0], max_tokens=99), t.train.labels).mean())
        for t in tasks
    ]
    worst = int(np.argmax(losses))
    tasks[worst].validation.labels[:] = (tasks[worst].validation.labels + 1) % tasks[worst].validation.n_choices
    rounds = boost(
        adapted,
        ["group-0", "group-1"],
        [[tasks[0]], [tasks[1]]],
        BoostingConfig(n_rounds=2, l2_penalty=0.1),
        projector=make_projector(PROJECTED, seed=0),
        max_tokens=150,
        seed=0,
        meter=Meter("boost"),
    )
    assert [entry.group for entry in rounds] == [worst, 1 - worst]
    assert [entry.accepted for entry in rounds] == [False, True]
    assert list(adapted.peft.peft_config) == [THETA0, "group-0", "group-1", f"group-{1 - worst}-boost-1"]


def test_no_rounds_cost_nothing(tmp_path: Path) -> None:
    adapted = make_model()
    tasks = make_tasks(adapted, tmp_path)
    add_adapter(adapted, MEMBER)
    meter = Meter("boost")
    projector = make_projector(PROJECTED, seed=0)
    config = BoostingConfig(n_rounds=0)
    assert boost(adapted, [MEMBER], [tasks], config, projector=projector, max_tokens=9, seed=0, meter=meter) == ()
    assert meter.record.n_tokens == 0


def test_free_text_tasks_are_passed_over(tmp_path: Path) -> None:
    adapted = make_model()
    mixed = make_tasks(adapted, tmp_path / "mixed", kinds=("verbalizer", "sequence"))
    rounds = run(adapted, mixed)
    assert rounds[0].train_nll_before == pytest.approx(boosted_nll(adapted, mixed[:1], [], "train"), rel=1e-6)
    text = make_tasks(make_model(), tmp_path / "text", kinds=("sequence",))
    assert run(make_model(), text) == ()


def test_tasks_of_many_classes_are_boosted_through_their_logodds(tmp_path: Path) -> None:
    adapted = make_model()
    tasks = make_tasks(adapted, tmp_path, PROJECTED.model_copy(update={"output": "logodds"}))
    assert {task.features.mode for task in tasks} == {"logodds"}
    assert_same_step(find(adapted, tasks, PROJECTED), explicit_direction(adapted, tasks, 0.1))
    assert run(adapted, tasks)[0].accepted


def test_features_in_another_order_are_refused(tmp_path: Path) -> None:
    adapted = make_model()
    (task,) = make_tasks(adapted, tmp_path, kinds=("verbalizer",))
    shuffled = BoostTask(task.train, task.validation, task.features.take(range(task.train.n_examples)[::-1]))
    with pytest.raises(StoreError, match="features of task 'task-0' are in another order"):
        run(adapted, [shuffled])


def test_boosting_is_deterministic_and_restores_what_was_active(tmp_path: Path) -> None:
    models = [make_model(), make_model()]
    results = []
    for i, adapted in enumerate(models):
        tasks = make_tasks(adapted, tmp_path / str(i))
        trainable = {name for name, p in adapted.peft.named_parameters() if p.requires_grad}
        torch.manual_seed(i)
        results.append(run(adapted, tasks, direction="steps"))
        assert adapted.peft.active_adapter == THETA0
        assert {name for name, p in adapted.peft.named_parameters() if p.requires_grad} == trainable
        assert all(p.grad is None for p in adapted.peft.parameters())
    assert results[0] == results[1]
    for name in models[0].peft.peft_config:
        first, second = (adapter_state(adapted, name) for adapted in models)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_optimiser_steps_go_round_small_tasks_as_often_as_asked(tmp_path: Path) -> None:
    adapted = make_model()
    tasks = make_tasks(adapted, tmp_path, kinds=("verbalizer",))  # 24 rows: two steps an epoch
    few, many = (find(adapted, tasks, PROJECTED, direction="steps", n_steps=n, learning_rate=1e-3) for n in (2, 20))
    norms = [sum(float(t.pow(2).sum()) for t in step.values()) ** 0.5 for step in (few, many)]
    assert norms[1] > 3 * norms[0]
