"""Other ways to group, on tiny models: what each measures, against a slow twin, and what each is charged."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemblelora import artifacts, stages, training
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, adapter_state, add_adapter, attach, set_adapter_state
from ensemblelora.comparison import groupers, likeness, lookahead
from ensemblelora.comparison.candidate import Candidate, Costs
from ensemblelora.comparison.chosen import Option, train_best
from ensemblelora.comparison.groupers import (
    choose_number,
    group_by_adapters,
    group_by_category,
    group_by_chance,
    group_by_format,
    group_by_gradients,
    group_by_lookahead,
    group_by_texts,
)
from ensemblelora.comparison.likeness import (
    CATEGORIES,
    compare_adapters,
    compare_formats,
    compare_texts,
    find_categories,
)
from ensemblelora.comparison.lookahead import STEPS_BETWEEN, Lookahead, level_gains, match_rate
from ensemblelora.comparison.methods import METHODS
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Pool, Trained
from ensemblelora.config import AdapterConfig, TrainingConfig
from ensemblelora.counting import count_forward, count_lower, count_training
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import ConfigError, DataError, TrainingError
from ensemblelora.fusion import can_fuse
from ensemblelora.gradients.plan import count_pass
from ensemblelora.grouping import cluster
from ensemblelora.scoring import cross_entropy, score_batch
from ensemblelora.seeding import generator_for
from tests.tiny import disturb, make_adapted, make_base, make_learnable_split, make_split
from tests.tiny_run import make_inputs, read_config

CONFIG = TrainingConfig(learning_rate=1e-2, num_train_epochs=2, max_examples_per_batch=4)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("groupers")
    config = read_config(make_inputs(folder), training={"num_train_epochs": 1})
    _, rows, probe = stages.prepare(config)
    return Pool(config, folder / "pool", rows, probe, start_fingerprint=stages.identify_start(config, probe))


def check_trained(pool: Pool, candidate: Candidate, select_flops: int) -> None:
    """One adapter a group, trained for the group alone, and the search charged beside."""
    assert candidate.groups is not None
    trained = [pool.train(group) for group in candidate.groups]
    assert candidate.costs.train_flops == sum(one.flops for one in trained)
    assert candidate.costs.select_flops == select_flops
    assert candidate.notes["members"] == [one.name for one in trained]
    scores = candidate.predict("validation")
    home = {task: one.name for one in trained for task in one.tasks}
    for task in pool.everyone:
        own = pool.score([home[task]], task, "validation").values
        np.testing.assert_array_equal(scores[task].values, own, err_msg=f"task {task} is answered by its own group")


def test_random_groups_have_the_plans_sizes_and_differ_by_draw(pool: Pool) -> None:
    candidate = group_by_chance(pool, 1)
    assert candidate.groups is not None and candidate.notes["n_groups_from"] == "the plan"
    assert sorted(map(len, candidate.groups)) == sorted(len(group) for group in make_plan(pool).plan.groups)
    check_trained(pool, candidate, 0)
    drawn = [draw_groups(pool, draw) for draw in range(1, 9)]
    assert drawn[0] == draw_groups(pool, 1) and len(set(drawn)) > 4
    assert all(sorted(itertools.chain(*groups)) == list(pool.everyone) for groups in drawn)
    other_seed = Pool(
        pool.config.model_copy(update={"seed": 7}), pool.folder, pool.rows, pool.probe, start_fingerprint=""
    )
    assert [draw_groups(other_seed, draw) for draw in range(1, 9)] != drawn


def test_random_groups_meet_the_constraints_or_are_refused(pool: Pool) -> None:
    names = pool.rows.names
    bound = reseat(pool, grouping={"must_link": ((names[0], names[3]),), "cannot_link": ((names[1], names[2]),)})
    for draw in range(8):
        groups = [set(group) for group in draw_groups(bound, draw)]
        assert any({0, 3} <= group for group in groups) and not any({1, 2} <= group for group in groups)
    impossible = reseat(pool, grouping={"min_group_size": 3})
    with pytest.raises(ConfigError, match="none of 1000 draws meets the constraints"):
        draw_groups(impossible, 1)


def reseat(pool: Pool, **sections: dict[str, object]) -> Pool:
    """The same pool under another config, which has the first one's plan."""
    changes = {key: getattr(pool.config, key).model_copy(update=values) for key, values in sections.items()}
    return Pool(
        pool.config.model_copy(update=changes),
        pool.folder,
        pool.rows,
        pool.probe,
        start_fingerprint=pool.start_fingerprint,
    )


def draw_groups(pool: Pool, draw: int) -> tuple[tuple[int, ...], ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groupers, "choose_number", lambda _: groupers.Wanted((3, 2), "the test"))
        return groupers.draw_groups(pool, draw)


def flops_of(pool: Pool, groups: Iterable[Sequence[int]]) -> int:
    return sum(pool.train(group).flops for group in groups)


def losses_of(pool: Pool, groups: Iterable[Sequence[int]]) -> float:
    """Mean over tasks of the validation loss that each group's checkpoint was chosen by."""
    return sum(len(group) * pool.train(group).validation_nll for group in groups) / pool.n_tasks


def train_alike(pool: Pool, groups: Iterable[Sequence[int]], nll: dict[tuple[int, ...], float]) -> None:
    """Train adapters, and write other validation losses into their records."""
    for group in groups:
        folder = pool.folder / "adapters" / pool.train(group).name
        record = artifacts.read_json(folder / "trained.json") | {"validation_nll": nll[tuple(group)]}
        artifacts.write_json(folder / "trained.json", record)
        (folder / "seal.json").unlink()
        artifacts.seal_folder(folder)


def test_gradient_cosine_groups_are_charged_the_training_rows_features_and_the_adapter_not_kept(pool: Pool) -> None:
    planned, candidate = make_plan(pool), group_by_gradients(pool)
    groups = {way.name: way for way in planned.plan.comparisons}["gradient cosine"].groups
    options = [groups, (pool.everyone,)]
    best = min(options, key=lambda option: losses_of(pool, option))
    assert candidate.groups == best, "the plan judges the very same groups; or none, if all together learn better"
    train, learning = Meter("train"), Meter("all")
    for meter, splits in ((train, pool.rows.train), (learning, pool.rows.learning)):
        count_pass(pool.probe, splits, pool.config.gradients, seed=pool.config.seed, meter=meter)
    assert learning.record.flops == planned.feature_flops
    share = train.record.flops / learning.record.flops
    assert 0.4 < share < 0.7, "16 of 28 rows"
    (other,) = (option for option in options if option != best)
    check_trained(pool, candidate, round(share * planned.feature_flops) + flops_of(pool, other))
    assert candidate.costs.peak_memory_bytes >= planned.peak_memory_bytes > planned.added_memory_bytes >= 0


OPPOSED = ((2, 3, 4), (0, 1))


@pytest.mark.parametrize("wins", ["groups", "one"])
@pytest.mark.parametrize("is_paid", [False, True])
def test_the_least_validation_loss_is_kept_and_what_was_tried_is_charged(
    pool: Pool, tmp_path: Path, wins: str, is_paid: bool
) -> None:
    """``is_paid``: one adapter for all was trained to find the groups, and is in the price of finding them."""
    fresh = Pool(pool.config, tmp_path, pool.rows, pool.probe, start_fingerprint=pool.start_fingerprint)
    one = (pool.everyone,)
    for name in [pool.train(group).name for group in (*OPPOSED, *one)]:
        shutil.copytree(pool.folder / "adapters" / name, tmp_path / "adapters" / name)
    better, worse = (0.5, 0.6) if wins == "groups" else (0.6, 0.5)
    train_alike(fresh, (*OPPOSED, *one), {(0, 1): better + 0.3, (2, 3, 4): better - 0.2, one[0]: worse})
    select = Costs(0, select_flops=10**9 + is_paid * flops_of(fresh, one), seconds=100.0)
    candidate = train_best(fresh, [Option(OPPOSED), Option(one, is_paid)], select=select)
    kept, other = (OPPOSED, one) if wins == "groups" else (one, OPPOSED)
    assert candidate.groups == kept
    trained = flops_of(fresh, other) if not is_paid or wins == "one" else flops_of(fresh, one)
    assert candidate.costs.select_flops == 10**9 + trained
    assert candidate.costs.train_flops == flops_of(fresh, kept)
    assert candidate.costs.flops == 10**9 + flops_of(fresh, OPPOSED) + flops_of(fresh, one), "each training once"
    assert [entry["validation_nll"] for entry in candidate.notes["tried"]] == pytest.approx([better, worse])
    assert candidate.costs.n_bytes == len(kept) * pool.train(pool.everyone).n_bytes


@pytest.mark.parametrize("group", [group_by_gradients, group_by_texts, group_by_lookahead, group_by_adapters])
def test_rivals_that_learn_from_the_data_may_leave_the_tasks_together(
    pool: Pool, group: Callable[[Pool], Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our plan is two groups; one adapter for all is made the best by far."""
    assert len(make_plan(pool).plan.groups) == 2
    let_all_together_win(monkeypatch)
    assert group(pool).groups == (pool.everyone,)


def test_tasks_that_are_not_to_be_linked_are_never_left_together(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    let_all_together_win(monkeypatch)
    apart = reseat(pool, grouping={"cannot_link": ((pool.rows.names[0], pool.rows.names[2]),)})
    assert len(group_by_texts(apart).groups or ()) > 1


def let_all_together_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train single tasks only; of groups say that they were trained, with a loss."""
    original = Pool.train

    def train(self: Pool, tasks: Sequence[int], **options: object) -> Trained:
        if len(tasks) == 1:
            return replace(original(self, tasks, **options), validation_nll=9.0)
        nll = 0.01 if len(tasks) == self.n_tasks else 9.0
        return Trained(f"pool-{len(tasks)}", tuple(sorted(tasks)), 1, 0.1, 1, 1, nll, 1)

    monkeypatch.setattr(Pool, "train", train)


def test_adapter_clusters_are_charged_every_tasks_own_training(pool: Pool) -> None:
    candidate = group_by_adapters(pool)
    singles = [pool.train((task,)) for task in pool.everyone]
    states = []
    for single in singles:
        pool.load([single.name])
        states.append(adapter_state(pool.probe, single.name))
    dense = np.stack([flatten_change(state, adapter_state(pool.probe, THETA0)) for state in states])
    clusters = cluster(cosines_of(dense), 2, is_bound_needed=False).groups
    alone = tuple((task,) for task in pool.everyone)
    options = [clusters, (pool.everyone,), alone]
    assert candidate.groups == min(options, key=lambda option: losses_of(pool, option))
    assert candidate.costs.flops == sum(flops_of(pool, option) for option in options), "each training once"
    check_trained(pool, candidate, candidate.costs.flops - flops_of(pool, candidate.groups))
    np.testing.assert_allclose(candidate.notes["likeness"], cosines_of(dense), atol=1e-9)


def flatten_change(state: dict[str, torch.Tensor], start: dict[str, torch.Tensor], scale: float = 2.0) -> np.ndarray:
    """The slow twin: every weight's change as it is, ``scale (B A - B0 A0)``, and the other tensors' differences."""
    parts = []
    for key in start:
        if key.endswith(".lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            products = [(s[other].double() @ s[key].double()) for s in (state, start)]
            parts.append(scale * (products[0] - products[1]).flatten())
        elif "lora_" not in key:
            parts.append((state[key].double() - start[key].double()).flatten())
    return torch.cat(parts).numpy()


def cosines_of(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1)
    return rows @ rows.T / np.outer(norms, norms)


@pytest.mark.parametrize("is_warm", [False, True], ids=["from zero", "from a trained adapter"])
@pytest.mark.parametrize("head", ["lm", "sequence_classification"])
def test_adapters_are_compared_without_a_dense_matrix(is_warm: bool, head: str) -> None:
    adapted = make_adapted("llama", head=head)
    if is_warm:
        disturb(adapted, THETA0, seed=9)
    start, states = adapter_state(adapted, THETA0), []
    for seed in range(4):
        add_adapter(adapted, "one")
        disturb(adapted, "one", seed=seed, scale=1.0)
        states.append(adapter_state(adapted, "one"))
    found = compare_adapters(states, start, scale=2.0)
    np.testing.assert_allclose(found, cosines_of(np.stack([flatten_change(s, start) for s in states])), atol=1e-6)
    turned = [{k: 2 * start[k] - t if ".lora_A." not in k else t for k, t in s.items()} for s in states]
    if not is_warm:
        np.testing.assert_allclose(compare_adapters(turned, start, scale=2.0), found, atol=1e-6)
        opposite = compare_adapters([states[0], turned[0]], start, scale=2.0)
        assert head != "lm" or opposite[0, 1] == pytest.approx(-1)
    assert compare_adapters([start, states[0]], start)[0].tolist() == [0.0, 0.0], "no change is like nothing"


def test_texts_are_compared_by_the_base_models_mean_states(pool: Pool) -> None:
    splits, meter = pool.rows.train, Meter("texts")
    found = compare_texts(pool.probe, splits, n_rows=5, max_tokens=64, seed=3, meter=meter)
    means = []
    for split in splits:
        chosen = generator_for(3, "texts", split.task).permutation(split.n_examples)[:5]
        means.append(np.mean([embed_slowly(pool, split, int(e)) for e in chosen], axis=0))
    np.testing.assert_allclose(found, cosines_of(np.stack(means)), atol=1e-5)
    assert meter.record.flops > 0
    again = compare_texts(pool.probe, splits, n_rows=5, max_tokens=10_000, seed=3)
    np.testing.assert_allclose(again, found, atol=1e-5, err_msg="batches change nothing")


def embed_slowly(pool: Pool, split: EncodedSplit, e: int) -> np.ndarray:
    """One context alone, without padding, through the base model below the adapters."""
    row = int(split.example_rows[e])
    start = split.row_starts[row]
    tokens = split.tokens[start : start + split.answer_starts[row]].astype(np.int64)
    with pool.probe.peft.disable_adapter(), torch.inference_mode():
        hidden = pool.probe.network.base_model(input_ids=torch.from_numpy(tokens)[None]).last_hidden_state
    return hidden[0].float().mean(dim=0).numpy()


def test_a_classifiers_texts_are_compared_too() -> None:
    adapted = make_adapted("bert", head="sequence_classification")
    splits = [make_split("classification", task=name, seed=seed) for seed, name in enumerate("ab")]
    cosines = compare_texts(adapted, splits, n_rows=4, max_tokens=64, seed=0)
    assert cosines.shape == (2, 2) and cosines[0, 0] == pytest.approx(1) and abs(cosines[0, 1]) <= 1


def test_text_clusters_are_measured_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = group_by_texts(pool)
    monkeypatch.setattr(groupers, "compare_texts", lambda *_, **__: pytest.fail("it was measured before"))
    again = group_by_texts(pool)
    assert again.groups == first.groups and again.costs == first.costs
    clusters = cluster(np.array(first.notes["likeness"]), 2, is_bound_needed=False).groups
    reading = first.costs.flops - flops_of(pool, clusters) - flops_of(pool, [pool.everyone])
    assert 0 < reading < flops_of(pool, [pool.everyone])
    check_trained(pool, first, first.costs.select_flops)


def test_formats_are_compared_by_kind_number_of_choices_and_labels() -> None:
    three = make_split("verbalizer", n_choices=3)
    same_words = make_split("verbalizer", n_choices=3, seed=5)
    other_words = replace(three, label_tokens=three.label_tokens + 20)
    two, ragged = make_split("verbalizer", n_choices=2), make_split("options", n_choices=3, ragged=True)
    free, options = make_split("sequence"), make_split("options", n_choices=3)
    found = compare_formats([three, same_words, other_words, two, ragged, free, options])
    assert found[0].tolist() == [3, 3, 2, 1, 0, 0, 1]
    assert found[4].tolist() == [0, 0, 0, 0, 3, 0, 1], "a number of choices that varies is like no other"
    np.testing.assert_array_equal(found, found.T)
    fixed = fix_answers(options)
    assert compare_formats([fixed, fix_answers(make_split("options", n_choices=3, seed=8)), options])[0].tolist() == [
        3,
        3,
        2,
    ]


def fix_answers(split: EncodedSplit) -> EncodedSplit:
    """The same choices in every example: one token each, 60, 61, 62."""
    starts = np.append(split.row_starts[:-1], split.row_starts[-1])
    kept = [split.tokens[s : s + a] for s, a in zip(starts, split.answer_starts, strict=False)]
    rows = [np.append(context, 60 + r % 3).astype(np.int32) for r, context in enumerate(kept)]
    return replace(split, tokens=np.concatenate(rows), row_starts=np.cumsum([0, *map(len, rows)]))


def test_format_groups_part_kinds_and_cost_nothing(pool: Pool) -> None:
    candidate = group_by_format(pool)
    assert candidate.groups == ((0, 1, 2, 3), (4,)) or candidate.groups == ((0, 1, 2), (3, 4))
    likeness_found = np.array(candidate.notes["likeness"])
    assert likeness_found[0, 1] == likeness_found[0, 2] == 3 and likeness_found[0, 3] < 3 and likeness_found[0, 4] == 0
    check_trained(pool, candidate, 0)


def test_the_papers_categories_hold_its_ten_datasets() -> None:
    names = [name for known in CATEGORIES.values() for name in known]
    assert len(names) == 10 and len(CATEGORIES) == 5
    assert sorted(map(len, find_categories(names))) == [1, 2, 2, 2, 3]
    groups = find_categories(["demo_boolq", "wic", "multirc", "demo_copa", "story_cloze"])
    assert groups == ((0, 2), (3, 4), (1,))


def test_tasks_outside_the_papers_categories_are_refused_by_name(pool: Pool) -> None:
    with pytest.raises(DataError, match=r"tasks demo_sciq, demo_mrpc are in none of the paper's five categories"):
        find_categories(["boolq", "demo_sciq", "demo_mrpc"])
    with pytest.raises(DataError, match="tasks family0_task0, family0_task1, family1_task0"):
        group_by_category(pool)


def test_categories_are_trained_as_they_are(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = group_by_format(pool).groups or ()
    known = {str(g): tuple(pool.rows.names[task] for task in group) for g, group in enumerate(groups)}
    monkeypatch.setattr(likeness, "CATEGORIES", known)
    candidate = group_by_category(pool)
    assert candidate.groups == groups and candidate.notes["n_groups_from"] == "the categories"
    check_trained(pool, candidate, 0)


def test_a_plan_that_is_no_grouping_leaves_the_best_one_of_its_curve(pool: Pool, monkeypatch) -> None:
    planned = make_plan(pool)
    curve = planned.plan.curve
    best = max((point for point in curve if 1 < point.n_groups < 5), key=lambda point: point.gain)

    def number_of(plan: object) -> groupers.Wanted:
        monkeypatch.setattr(groupers, "make_plan", lambda _: replace(planned, plan=plan))
        return choose_number(pool)

    for groups, name in (
        (curve[0].groups, "one adapter for all"),
        (tuple((i,) for i in range(5)), "one adapter per task"),
    ):
        wanted = number_of(replace(planned.plan, groups=groups))
        assert wanted.sizes == tuple(len(group) for group in best.groups)
        assert wanted.source == f"the best grouping on the plan's curve, as the plan is {name}"
    barred = tuple(replace(point, allowed=point is not best) for point in curve)
    assert number_of(replace(planned.plan, groups=curve[0].groups, curve=barred)).n_groups != best.n_groups
    assert number_of(replace(planned.plan, groups=curve[0].groups, curve=curve[:1])).sizes == (3, 2)


KINDS = {
    "llama": ("verbalizer", "options", "sequence"),
    "top half": ("options", "verbalizer"),
    "bert": ("classification",) * 2,
}


def make_looking(model: str = "llama", **changes: object) -> tuple[Lookahead, Meter]:
    """A disturbed adapter that is being trained, and what looks ahead from it."""
    head = "sequence_classification" if model == "bert" else "lm"
    adapted = make_adapted(model, head=head) if model != "top half" else attach_to_top_half()
    add_adapter(adapted, "shared")
    disturb(adapted, "shared")
    kinds = enumerate(KINDS[model])
    splits = [make_learnable_split(kind, n=8, seed=seed, task=f"t{seed}") for seed, kind in kinds]
    meter = Meter("look")
    return Lookahead(adapted, "shared", splits, CONFIG.model_copy(update=changes), seed=0, meter=meter), meter


def attach_to_top_half() -> AdaptedModel:
    return attach(make_base(), AdapterConfig(r=4, lora_alpha=8, layers_to_transform="top_half"), seed=0)


@pytest.mark.parametrize(
    ("model", "loss"),
    [("llama", "label_softmax"), ("llama", "vocab_softmax"), ("top half", "label_softmax"), ("bert", "label_softmax")],
)
def test_lookahead_sees_what_a_step_on_one_task_does_to_the_others(model: str, loss: str) -> None:
    looking, meter = make_looking(model, loss=loss)
    adapted, n = looking._adapted, len(KINDS[model])
    assert (adapted.prefix is not None) == (model == "top half") and can_fuse(adapted) == (model != "bert")
    batches = looking._batches.take(0)
    with activate(adapted, "shared", trainable=True):
        before = adapter_state(adapted, "shared")
        found = looking.look()
        assert all(torch.equal(t, before[k]) for k, t in adapter_state(adapted, "shared").items()), "to the bit"
        assert all(p.grad is None for p in adapted.peft.parameters())
        np.testing.assert_allclose(found, look_slowly(looking, batches, loss), rtol=2e-3, atol=2e-5)
    assert (np.diag(found) > 0).all(), "a short step on a task's batch lowers that batch's loss"
    counted, normalize = Meter("count"), loss == "vocab_softmax"
    for batch in batches:
        count_training(counted, adapted.costs, batch, normalize=normalize)
        count_forward(counted, adapted.costs, batch, times=n, normalize=normalize)
        for _ in range(n + 1 if model == "top half" else 0):
            count_lower(counted, adapted.costs, batch)
    assert meter.record.flops == counted.record.flops, "n gradients and n^2 forward passes"


def look_slowly(looking: Lookahead, batches: list, loss: str) -> np.ndarray:
    """PEFT's own layers, gradients by backward, and the step written into the adapter."""
    adapted = looking._adapted

    def measure(batch) -> torch.Tensor:
        z = score_batch(adapted.network, batch, normalize=loss == "vocab_softmax").z
        return cross_entropy(z, batch, loss=loss).mean()

    parameters = [p for p in adapted.peft.parameters() if p.requires_grad]
    losses, gradients = [], []
    for batch in batches:
        adapted.peft.zero_grad(set_to_none=True)
        value = measure(batch)
        value.backward()
        losses.append(value.item())
        gradients.append([p.grad.clone() for p in parameters])
    adapted.peft.zero_grad(set_to_none=True)
    absolute = sum(g.abs().sum().item() for own in gradients for g in own)
    squared = sum(g.square().sum().item() for own in gradients for g in own)
    rate = CONFIG.learning_rate * absolute / squared
    start, gains = adapter_state(adapted, "shared"), np.zeros((len(batches),) * 2)
    for i, own in enumerate(gradients):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, own, strict=True):
                parameter.sub_(rate * gradient)
            for j, batch in enumerate(batches):
                gains[i, j] = 1 - measure(batch).item() / losses[j]
        set_adapter_state(adapted, "shared", start)
    return gains


def test_the_lookaheads_rate_promises_what_a_step_along_the_signs_does() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)] for _ in range(3)]
    rate = match_rate(gradients, 0.01)
    flat = [torch.cat([part.flatten() for part in own]) for own in gradients]
    by_descent = sum(float(g @ (rate * g)) for g in flat)
    by_signs = sum(float(g @ (0.01 * g.sign())) for g in flat)
    assert by_descent == pytest.approx(by_signs, rel=1e-5)
    assert match_rate([[torch.zeros(3)]], 0.01) == 0.01


def test_a_loss_that_is_no_number_ends_the_lookahead() -> None:
    looking, _ = make_looking()
    with activate(looking._adapted, "shared", trainable=True), torch.no_grad():
        next(p for p in looking._adapted.peft.parameters() if p.requires_grad).fill_(math.nan)
        with pytest.raises(TrainingError, match=r"lower training\.learning_rate"):
            looking.look()


def test_looking_ahead_changes_nothing_about_the_training(tmp_path: Path) -> None:
    splits = [make_learnable_split("verbalizer", n=24, seed=seed, task=f"t{seed}") for seed in range(2)]
    job = training.TrainingJob("shared", splits, splits)
    ended, seen = [], []
    for is_watched in (False, True):
        adapted, meter = make_adapted("llama"), Meter("train")
        looking = Lookahead(adapted, "shared", splits, CONFIG, seed=0, meter=meter)
        (trained,) = training.fine_tune_together(
            adapted, [job], CONFIG, seed=0, checkpoints=tmp_path, meter=meter, callbacks=[looking] * is_watched
        )
        ended.append(adapter_state(adapted, "shared"))
        seen.append((trained.history, meter.record.flops, looking.n_looks, trained.n_steps))
    assert all(torch.equal(ended[0][key], ended[1][key]) for key in ended[0])
    assert seen[0][0] == seen[1][0] and seen[0][1] < seen[1][1]
    assert [n for _, _, n, _ in seen] == [0, math.ceil(seen[1][3] / STEPS_BETWEEN)] and seen[1][2] > 1


def test_tag_groups_by_lookahead_and_is_charged_the_whole_training(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = group_by_lookahead(pool)
    found, shared = lookahead.measure_lookahead(pool), pool.train(pool.everyone)
    assert found["flops"] > shared.flops, "the shared training, and what was looked at"
    assert "lookahead" not in pool.probe.peft.peft_config
    gains = np.array(found["gains"])
    groups = cluster(level_gains(gains), 2, n_restarts=20, is_bound_needed=False).groups
    best = min([groups, (pool.everyone,)], key=lambda option: losses_of(pool, option))
    assert candidate.groups == best and candidate.notes["n_looks"] >= 1
    assert candidate.costs.flops == found["flops"] + flops_of(pool, groups), "one adapter for all came with the looking"
    check_trained(pool, candidate, candidate.costs.flops - flops_of(pool, best))
    assert candidate.notes["gains"] == found["gains"] and candidate.notes["likeness"] == level_gains(gains).tolist()
    monkeypatch.setattr(lookahead, "_train_looking", lambda _: pytest.fail("it was trained before"))
    assert group_by_lookahead(pool).costs == candidate.costs


@given(st.integers(0, 10_000), st.integers(3, 7))
def test_what_a_step_does_to_its_own_batch_changes_no_group(seed: int, n_tasks: int) -> None:
    rng = np.random.default_rng(seed)
    gains = rng.normal(size=(n_tasks, n_tasks))
    turned = gains + np.diag(rng.exponential(100.0, n_tasks))  # as a fast learner's is
    np.testing.assert_array_equal(level_gains(turned), level_gains(gains))
    order = rng.permutation(n_tasks)
    np.testing.assert_allclose(level_gains(gains[np.ix_(order, order)]), level_gains(gains)[np.ix_(order, order)])
    np.testing.assert_allclose(level_gains(gains.T), level_gains(gains))


def test_fast_learners_do_not_become_groups_of_their_own() -> None:
    """Two families; one task of each gains ten times as much on its own batch as anyone on another's."""
    gains = np.kron(np.eye(2), np.full((3, 3), 1.0)) - np.kron(1 - np.eye(2), np.full((3, 3), 0.5))
    np.fill_diagonal(gains, [10.0, 1.0, 1.0, 10.0, 1.0, 1.0])
    assert cluster((gains + gains.T) / 2, 2).groups != ((0, 1, 2), (3, 4, 5)), "as it would be with the diagonal"
    assert cluster(level_gains(gains), 2).groups == ((0, 1, 2), (3, 4, 5))


def test_tag_parts_opposed_tasks(tmp_path: Path) -> None:
    """Two conventions for the same questions: what lowers one's loss raises the other's."""
    one = make_learnable_split("verbalizer", n=32, n_choices=2, task="one")
    turned = replace(one, task="two", labels=1 - one.labels)
    again = replace(one, task="three")
    splits, adapted, meter = [one, turned, again], make_adapted("llama"), Meter("train")
    looking = Lookahead(adapted, "shared", splits, CONFIG, seed=0, meter=meter)
    job = training.TrainingJob("shared", splits, splits)
    training.fine_tune_together(adapted, [job], CONFIG, seed=0, checkpoints=tmp_path, meter=meter, callbacks=[looking])
    gains = level_gains(looking.gains)
    assert gains[0, 2] > 0 > gains[0, 1] and gains[1, 2] < 0
    assert cluster(gains, 2).groups == ((0, 2), (1,))


def test_every_grouper_is_a_method() -> None:
    names = {"random-1", "random-2", "random-3", "gradient-cosine", "tag", "adapter-clusters", "text-clusters"}
    names |= {"random-ours-1", "random-ours-2", "random-ours-3", "tag-steps", "random-steps"}
    assert names | {"format-groups", "categories"} <= set(METHODS)
    assert all(METHODS[name].is_planned for name in names)
