"""A dataset that arrives later: where it goes, what is kept, what is trained, and what that costs."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from ensemblelora import additions, artifacts, training
from ensemblelora.additions import Change, Option, Outcome, add_task, drop_task, update_task
from ensemblelora.additions.carry import Carrier, draw_replay, lengthen_training
from ensemblelora.additions.costs import compare_costs, scale_rerun
from ensemblelora.additions.options import choose_option, find_option, list_options, place_task
from ensemblelora.additions.outcome import advise, recall_change
from ensemblelora.additions.request import ask
from ensemblelora.additions.source import change_cards, read_source, settle_config, write_cards
from ensemblelora.api import load_run
from ensemblelora.cli import main
from ensemblelora.config import EstimationConfig, TrainingConfig
from ensemblelora.data.batching import collate
from ensemblelora.data.catalog import load_card
from ensemblelora.data.synthetic import make_planted_tasks
from ensemblelora.errors import DataError, OutputError, UsageError
from ensemblelora.estimation import Oracle, TrainingBudget, compute_clustered_se
from ensemblelora.evaluation.rows import TaskRows
from ensemblelora.passes import run_lower, with_cache
from ensemblelora.planning import Candidate
from ensemblelora.stages import kept
from measured import render_measured
from tests.report_runs import make_plan
from tests.test_planning import make_features
from tests.test_prefix import make_top
from tests.tiny import make_adapted, make_split
from tests.tiny_run import SIZES, TASKS, copy_run, edit_rows, finished_run, flip, make_inputs, write_task

LATE = "late"
GROUPS = ((0, 1), (2, 3))


def write_late(folder: Path, name: str = LATE, *, family: int = 0) -> Path:
    """A card of one more task that follows one of the run's two rules."""
    folder.mkdir(exist_ok=True)
    write_task(folder, name, make_planted_tasks(2, 3, **SIZES).tasks[3 * family + 2])
    return folder / f"{name}.yaml"


def make_oracle(*families: int, n_projections: int = 1) -> Oracle:
    replicates = tuple(make_features(families, projection=p) for p in range(n_projections))
    return Oracle(replicates, 0.1, EstimationConfig(method="ridge"))


@pytest.mark.parametrize("n_projections", [1, 2])
def test_gains_are_those_of_rows_taken_one_by_one(n_projections: int) -> None:
    oracle = make_oracle(0, 0, 1, 1, 0, n_projections=n_projections)
    options, _ = list_options(oracle, GROUPS, 4, confidence=0.95)
    assert [option.place for option in options] == ["group-0", "group-1", "alone", "nowhere"]
    for option, group in zip(options, (*GROUPS, ()), strict=False):
        joined = tuple(sorted((*group, 4)))
        changes = {4: ((), joined), **{i: (group, joined) for i in group}}
        gain, variance = 0.0, 0.0
        for task, (before, after) in changes.items():
            rows = np.stack([o.nll[0] - o.nll[1] for o in oracle.row_outcomes([before, after], task)])
            gain += rows.mean()
            variance += float(compute_clustered_se(rows.mean(axis=0), oracle.validation_groups(task))) ** 2
            variance += rows.mean(axis=1).var(ddof=1) / n_projections if n_projections > 1 else 0.0
        assert option.gain == pytest.approx(gain)
        assert option.gain_se == pytest.approx(np.sqrt(variance))
        assert option.nll == pytest.approx(oracle.score([joined]).nll[0, 4])
        assert option.nll_low < option.nll < option.nll_high
        own = gain - np.mean([o.nll[0] - o.nll[1] for o in oracle.row_outcomes([(), joined], 4)])
        assert option.others == pytest.approx(own)


def test_a_task_joins_those_that_follow_its_rule_and_the_order_of_groups_does_not_matter() -> None:
    oracle = make_oracle(0, 0, 1, 1, 0)
    chosen, reason = list_options(oracle, GROUPS, 4, confidence=0.95)
    assert [option.is_chosen for option in chosen] == [True, False, False, False], reason
    turned, _ = list_options(oracle, GROUPS[::-1], 4, confidence=0.95)
    assert turned[1].is_chosen and turned[1].gain == pytest.approx(chosen[0].gain)
    assert chosen[0].tasks == ("task-0", "task-1") and chosen[1].others < 0 < chosen[0].others
    assert [option.behind for option in chosen] == pytest.approx([chosen[0].gain - option.gain for option in chosen])
    assert chosen[0].behind == chosen[0].behind_se == 0 and chosen[3].behind_se == pytest.approx(chosen[0].gain_se)
    assert 0 < chosen[2].behind_se < np.hypot(chosen[0].gain_se, chosen[2].gain_se), "of the same rows"


def test_a_task_of_a_rule_of_its_own_goes_alone_and_budgets_can_forbid_that() -> None:
    oracle = make_oracle(0, 0, 1, 1, 2)
    options, reason = list_options(oracle, GROUPS, 4, confidence=0.95)
    assert next(o.place for o in options if o.is_chosen) == "alone", reason
    bound, _ = list_options(oracle, GROUPS, 4, confidence=0.95, allows=lambda groups: len(groups) < 3)
    assert not bound[2].is_allowed and not bound[2].is_chosen
    none, reason = list_options(oracle, GROUPS, 4, confidence=0.95, allows=lambda groups: False)
    assert none[3].is_chosen and "no place" in reason
    own, reason = list_options(oracle, GROUPS, 4, confidence=0.95, allows=lambda groups: len(groups) == 3)
    assert own[2].is_chosen and reason.endswith("no group is allowed.")
    asked, reason = list_options(oracle, GROUPS, 4, confidence=0.95, wanted="group-1")
    assert asked[1].is_chosen and reason == "This place was asked for."
    with pytest.raises(UsageError, match="expected one of group-0, group-1, alone"):
        find_option(options, "nowhere")
    with pytest.raises(UsageError, match="rule it out"):
        find_option(bound, "alone")


def test_the_rule_prefers_a_group_to_an_adapter_of_its_own_within_an_error() -> None:
    some = Option("group-0", (), 1, None, None, None, None, None, None, gain=1.0, gain_se=0.2, others=0.0)
    alone, nowhere = replace(some, place="alone", gain=1.1), replace(some, place="nowhere", gain=0.0, gain_se=0.0)
    assert choose_option([some, alone, nowhere], lambda a, b: (0.1, 0.3))[0] == 0
    assert choose_option([some, alone, nowhere], lambda a, b: (0.1, 0.05))[0] == 1
    weak = [replace(one, gain_se=2.0) for one in (some, alone)]
    assert choose_option([*weak, nowhere], lambda a, b: (0.1, 0.3))[0] == 2
    assert choose_option([some, alone, nowhere], lambda a, b: (0.1, 0.3))[1] == (
        "An adapter of its own is predicted to save more than group-0 by 0.1000 ± 0.3000 nats, which is no more than "
        "a standard error: it joins that group."
    )
    assert choose_option([some, alone, nowhere], lambda a, b: (0.1, 0.05))[1] == (
        "An adapter of its own is predicted to save more than group-0 by 0.1000 ± 0.0500 nats."
    )
    unknown = [replace(one, gain_se=None) for one in (some, alone)]
    assert choose_option([*unknown, nowhere], lambda a, b: (0.1, None))[0] == 2, "without errors nothing is gained"
    assert place_task(GROUPS, 4, "group-1") == ((0, 1), (2, 3, 4)) and place_task(GROUPS, 4, "alone")[-1] == (4,)


def test_the_reason_is_true_of_the_place_that_is_chosen() -> None:
    shaky = Option("group-0", (), 1, None, None, None, None, None, None, gain=1.0, gain_se=2.0, others=0.0)
    clear = replace(shaky, place="group-1", gain=0.5, gain_se=0.1)
    alone, nowhere = replace(clear, place="alone", gain=1.1), replace(shaky, place="nowhere", gain=0.0, gain_se=0.0)

    def choose(*options: Option) -> tuple[str, str]:
        chosen, reason = choose_option([*options, nowhere], lambda a, b: (0.1, 0.3))
        return [*options, nowhere][chosen].place, reason

    place, reason = choose(shaky, alone)
    assert place == "alone" and reason.endswith("most: no group saves more than a standard error over leaving it out.")
    place, reason = choose(shaky, clear)
    assert place == "group-1" and reason.endswith("save most of those that save more than a standard error.")
    place, reason = choose(replace(shaky, is_allowed=False), clear)
    assert place == "group-1" and reason.endswith("of the places that the run's budgets and constraints allow.")
    place, reason = choose(shaky, replace(clear, gain=0.1, gain_se=0.2))
    assert place == "nowhere" and reason.startswith("No place is predicted to save more")


def test_a_new_run_is_advised_where_other_groups_are_clearly_better() -> None:
    own = make_candidate(((0, 1, 2), (3,)), gain=0.10, gain_se=0.02)
    plan = make_plan(("a", "b", "c", "d"))
    plan = replace(plan, groups=own.groups, n_groups_auto=3)

    def told(**better: Any) -> str:
        rival = make_candidate(((0,), (1, 2), (3,)), **{"gain": 0.25, "gain_se": 0.05, **better})
        return advise(replace(plan, curve=(own, rival)))

    assert told() == (
        "3 groups chosen anew of all tasks are predicted to be better than these by 0.1500 ± 0.0700 nats: it is time "
        "for a new run, from the beginning"
    )
    assert told(gain=0.23) == told(gain_se=None) == told(allowed=False) == ""
    assert advise(replace(plan, curve=(own,))) == advise(replace(plan, curve=())) == ""


def make_candidate(groups: Any, **values: Any) -> Candidate:
    return replace(Candidate(len(groups), groups, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 1.0, True), **values)


def test_a_rerun_grows_with_its_tokens_and_shares_are_of_what_learns() -> None:
    splits = [make_split("verbalizer", n=n, task=task) for task, n in (("a", 6), ("b", 3), ("new", 5))]
    tokens = [int(split.input_lengths.sum()) for split in splits]
    rerun = {"features": 100, "train": 1000, "evaluate": 500, "report": 7}
    grown = scale_rerun(rerun, {"a": 6, "b": 3}, splits, "new")
    assert grown["train"] == round(1000 * sum(tokens) / sum(tokens[:2]))
    assert scale_rerun(rerun, {"a": 6, "b": 3, "new": 5}, splits, "new") == rerun, "the same rows cost the same"
    shrunk = scale_rerun(rerun, {"a": 6, "b": 3, "gone": 100}, splits[:2], "gone")
    assert shrunk["train"] == round(1000 * 9 / 109)
    costs = compare_costs({"features": 10, "train": 100, "evaluate": 250}, rerun)
    assert costs.learning_share == pytest.approx(110 / 1100) and costs.total_share == pytest.approx(360 / 1600)
    assert compare_costs(rerun, rerun).learning_share == compare_costs(rerun, rerun).total_share == 1


def test_a_task_alone_has_as_many_steps_as_the_other_groups_and_never_fewer() -> None:
    sizes = {"small": 8, "one": 24, "two": 8, "large": 99, "tiny": 1}
    train = tuple(make_split("verbalizer", n=n, task=task) for task, n in sizes.items())
    rows, probe = SimpleNamespace(train=train), SimpleNamespace(layout="rows")
    settings = TrainingConfig(num_train_epochs=2, max_examples_per_batch=8)

    def lengthen(group: int, *others: tuple[int, ...]) -> int:
        return lengthen_training(settings, probe, rows, (group,), others).num_train_epochs  # type: ignore[arg-type]

    assert lengthen(0, (1,)) == 2 * 3 and lengthen(0, (1,), (2,)) == 2 * 2, "1 step an epoch, and 3 and 1 of theirs"
    assert lengthen(0, (1, 2)) == 2 * 4 and lengthen(3, (1,)) == 2 and lengthen(0) == 2
    assert lengthen(4, (1, 2, 3)) == 8, "at most four times"


def test_what_a_longer_training_alone_gives_is_predicted_of_that_training() -> None:
    budget = TrainingBudget(0.01, 1, 1, 0.0, "constant", 0.0, 1.0, (2.0,) * 5, n_coordinates=50)
    oracle = replace(make_oracle(0, 0, 1, 1, 2), config=EstimationConfig(method="steps"), budget=budget, _memories=())
    short, _ = list_options(oracle, GROUPS, 4, confidence=0.95, n_epochs=1)
    long, _ = list_options(oracle, GROUPS, 4, confidence=0.95, n_epochs=8)
    assert long[2].place == "alone" and long[2].gain > short[2].gain and long[2].nll < short[2].nll
    assert [long[g].gain for g in (0, 1)] == [short[g].gain for g in (0, 1)]


def test_replayed_rows_are_drawn_in_proportion_and_by_seed() -> None:
    splits = [make_split("verbalizer", n=n, task=task) for task, n in (("a", 30), ("b", 10), ("c", 2))]
    drawn = draw_replay(splits, 21, seed=3)
    assert [len(some) for some in drawn] == [15, 5, 1]
    assert all((np.diff(some) > 0).all() for some in drawn)
    again = draw_replay(splits[::-1], 21, seed=3)[::-1]
    assert all(np.array_equal(one, other) for one, other in zip(drawn, again, strict=True))
    assert [len(some) for some in draw_replay(splits, 10_000, seed=3)] == [30, 10, 2]
    assert [len(some) for some in draw_replay(splits, 0, seed=3)] == [1, 1, 1]


def make_carrier(groups: Any, names: tuple[str, ...], task: str, way: str, old: Any) -> Carrier:
    source = SimpleNamespace(named_groups=tuple(map(frozenset, old)))
    return Carrier(source, None, None, groups, SimpleNamespace(names=names), None, task, way, 0.5)  # type: ignore[arg-type]


def test_a_group_trained_onward_is_judged_by_as_many_rows_of_the_others_as_of_the_new_task() -> None:
    names, sizes = ("a", "b", "c", "new"), {"a": 30, "b": 10, "c": 7, "new": 12}
    carrier = make_carrier(((0, 1, 3), (2,)), names, "new", "onward", (("a", "b"), ("c",)))
    splits = tuple(make_split("verbalizer", n=n, task=name, split="validation") for name, n in sizes.items())
    rows = SimpleNamespace(names=names, train=splits, validation=splits)
    carrier = replace(
        carrier, rows=rows, probe=SimpleNamespace(prefix=None), work=SimpleNamespace(config=SimpleNamespace(seed=3))
    )
    assert [(one.task, one.n_examples) for one in carrier.pick_judges(0)] == [("a", 9), ("b", 3), ("new", 12)]
    assert [(one.task, one.n_examples) for one in carrier.pick_rows(0)] == [("a", 4), ("b", 2), ("new", 12)], "half"


def test_of_rows_that_are_replayed_no_others_are_run(tmp_path: Path) -> None:
    splits = tuple(make_split("verbalizer", n=n, task=name) for name, n in (("a", 30), ("new", 12)))
    adapted = with_cache(make_top(), tmp_path, splits, max_bytes=10**8)
    assert adapted.prefix is not None and adapted.prefix.cache is not None
    carrier = make_carrier(((0, 1),), ("a", "new"), "new", "onward", (("a",),))
    rows = SimpleNamespace(names=carrier.rows.names, train=splits, validation=splits)
    work = SimpleNamespace(config=SimpleNamespace(seed=3))
    carrier = replace(carrier, rows=rows, probe=adapted, work=work)
    (part, own), cache = carrier.pick_rows(0), adapted.prefix.cache
    assert own is splits[1] and part.n_examples == 6
    run_lower(adapted, collate([(part, 0)], 0))
    assert cache.holds(part) and not cache.holds(splits[0])
    run_lower(adapted, collate([(splits[0], 0)], 0))
    again, n_files = carrier.pick_rows(0)[0], len(list(tmp_path.rglob("hidden.npy")))
    run_lower(adapted, collate([(again, 0)], 0))
    assert cache.holds(again) and len(list(tmp_path.rglob("hidden.npy"))) == n_files, "from the whole, once it is there"


def test_only_the_group_that_changed_is_trained() -> None:
    old = (("a", "b"), ("c",))
    joined = make_carrier(((0, 1, 3), (2,)), ("a", "b", "c", "new"), "new", "onward", old)
    assert joined.list_trained() == [0] and joined.is_onward(0) and joined.parent_of(0) == 0
    alone = make_carrier(((0, 1), (2,), (3,)), ("a", "b", "c", "new"), "new", "onward", old)
    assert alone.list_trained() == [2] and not alone.is_onward(2), "there is nothing to go on from"
    dropped = make_carrier(((0,), (1,)), ("a", "c"), "b", "whole", old)
    assert dropped.list_trained() == [0] and not dropped.is_onward(0)
    assert make_carrier(((0,), (1,)), ("a", "c"), "b", "keep", old).list_trained() == []
    gone = make_carrier(((0, 1),), ("a", "b"), "c", "whole", old)
    assert gone.list_trained() == [], "its group went with it"
    updated = make_carrier(((0, 1), (2,)), ("a", "b", "c"), "c", "whole", old)
    assert updated.list_trained() == [1] and updated.parent_of(1) == 1 and updated.parent_of(0) == 0


def test_scores_are_kept_by_adapter_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, split = make_adapted(), make_split("verbalizer", split="validation")
    asked: list[list[str]] = []

    def predict(adapted: Any, split: Any, names: Any, **options: Any) -> Any:
        asked.append(list(names))
        values = np.stack([np.full((split.n_examples, 3), float(len(name)), np.float32) for name in names])
        return kept.arrange_scores(split, values)

    monkeypatch.setattr(kept, "predict_members", predict)

    def score(run: str, names: list[str], digests: dict[str, str], earlier: str | None = None, of: Any = split) -> Any:
        before = () if earlier is None else (tmp_path / earlier, tmp_path / "nowhere")
        found = kept.score_members(tmp_path / run, adapted, of, names, digests, earlier=before, max_tokens=99)
        return found.values[:, 0, 0].tolist()

    known = {"a": "1", "bb": "2", "ccc": "3"}
    assert score("one", ["a", "bb"], known) == [1, 2]
    assert score("two", ["bb", "ccc", "a"], known, "one") == [2, 3, 1]
    assert score("three", ["ccc", "a"], known, "two") == [3, 1]
    assert asked == [["a", "bb"], ["ccc"]], "what an earlier run found is taken over, run after run"
    assert score("three", ["a"], {"a": "other"}, "two") == [1] and asked[-1] == ["a"], "another adapter of that name"
    score("four", ["a"], known, "one", make_split("verbalizer", split="validation", seed=5))
    assert len(asked) == 4, "other rows"
    assert score("one", ["a", "bb"], known) == [1, 2] and asked[-1] == ["a", "bb"], "its own are never read"
    assert kept.score_members(
        tmp_path / "six",
        adapted,
        split,
        ["a", "ccc"],
        known,
        earlier=(tmp_path / "one", tmp_path / "two"),
        max_tokens=99,
    ).values[:, 0, 0].tolist() == [1, 3]
    assert len(asked) == 5, "each run has one of them"
    next((tmp_path / "one" / "scores").iterdir()).write_bytes(b"damaged")
    assert score("five", ["bb"], known, "one") == [2] and asked[-1] == ["bb"]


def test_cards_of_a_changed_run(tmp_path: Path) -> None:
    source = read_source(finished_run() / "run")
    cards, name = change_cards(source, "add", entry=str(write_late(tmp_path / "more")))
    assert name == LATE and [card.task for card in cards] == [*TASKS, LATE]
    written = [load_card(Path(path)) for path in write_cards(cards, tmp_path / "out")]
    assert written == list(cards), "a run's cards stand for themselves"
    rows = shutil.copy(finished_run() / "tasks" / f"{TASKS[1]}.train.jsonl", tmp_path / "rows.jsonl")
    updated, _ = change_cards(source, "update", task=TASKS[1], entry=str(rows))
    files = updated[1].dataset_kwargs["data_files"]
    assert (
        Path(files["train"]) == Path(rows).resolve() and files["test"] == cards[1].dataset_kwargs["data_files"]["test"]
    )
    assert [card.task for card in change_cards(source, "drop", task=TASKS[0])[0]] == list(TASKS[1:])
    config = settle_config(source, tmp_path, ["x"], TASKS[1:], [TASKS[1:]])
    assert config.evaluation.baselines == ("base", "shared") and config.grouping.groups == (TASKS[1:],)
    many = settle_config(source, tmp_path, ["x"], TASKS[1:], [TASKS[1:3], TASKS[3:]])
    assert many.evaluation.baselines == ("base",), "one adapter for all would be trained on all rows again"


def test_wrong_requests_are_refused_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run() / "run"
    card = finished_run() / "tasks" / f"{TASKS[0]}.yaml"
    with pytest.raises(UsageError, match="the run has one of that name"):
        add_task(run, str(card))
    with pytest.raises(UsageError, match="not in"):
        drop_task(run, "nobody")
    with pytest.raises(UsageError, match="expected one of whole, keep"):
        drop_task(run, TASKS[0], training="onward")
    with pytest.raises(OutputError, match="is the run itself"):
        drop_task(run, TASKS[0], run)
    late = str(write_late(tmp_path / "more"))
    for wrong in ("group-7", "C", "nowhere"):
        with pytest.raises(UsageError, match=r"\(--to\): expected one of group-0 \(A\), group-1 \(B\), or alone"):
            add_task(run, late, place=wrong)
    with pytest.raises(DataError, match="neither a shipped card"):
        add_task(run, "nothing")
    with pytest.raises(DataError, match="not found"):
        update_task(run, TASKS[0], str(tmp_path / "none.jsonl"))
    assert main(["drop", str(run), "nobody"]) == 2 and "its tasks are" in capsys.readouterr().err
    assert not list(run.parent.glob("run-*"))


def test_help_says_what_a_dropped_task_leaves_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drop", "--help"]) == 0
    shown = " ".join(re.sub(r"[^\w,.:;]+", " ", capsys.readouterr().out).split())
    assert "the tasks it was grouped with are trained again without it, others stay." in shown
    assert "Say what would be trained" in shown and "no adapter is trained" in shown


@cache
def _added(folder: Path) -> tuple[Path, Change]:
    recipe = copy_run(folder / "a")
    return recipe.parent / "run", add_task(recipe.parent / "run", str(write_late(folder / "more")), place="group-0")


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Change]:
    """A run, and what became of it when a task joined its first group."""
    return _added(tmp_path_factory.mktemp("added"))


@pytest.mark.slow
def test_a_task_joins_a_group_and_the_rest_is_taken_over(added: tuple[Path, Change]) -> None:
    run, change = added
    assert change.folder == run.parent / "run-with-late" and not change.is_forecast
    assert change.place == "group-0" and len(change.options) == 4 and len(change.trained) == 1
    before, after = (json.loads((folder / "ensemble.json").read_text()) for folder in (run, change.folder))
    untouched = after["groups"].index([after["task_names"].index(name) for name in change.options[1].tasks])
    old = next(g for g, group in enumerate(before["groups"]) if TASKS[group[0]] == change.options[1].tasks[0])
    weights = "adapter_model.safetensors"
    copied = [folder / "adapters" / f"group-{g}" / weights for folder, g in ((run, old), (change.folder, untouched))]
    assert copied[0].read_bytes() == copied[1].read_bytes()
    assert f"group-{untouched}" not in change.trained
    features = json.loads((change.folder / "costs.json").read_text())["stages"][0]
    assert features["stage"] == "features"
    alone = json.loads((run / "costs.json").read_text())["stages"][0]["flops"]
    assert 0 < features["flops"] < alone / 2, "of one task in six"
    for block in (run / "features").glob("*/*.npy"):
        taken = next(change.folder.glob(f"features/{block.parent.name.rpartition('-')[0]}-*")) / block.name
        assert taken.read_bytes() == block.read_bytes(), "the others' are taken over"
    assert change.costs.learning_share < 1 and set(change.accuracy) == {*TASKS, LATE}
    assert all(0 <= share <= 1 for share in change.accuracy.values())
    assert {name: one.accuracy for name, one in change.tests.items()} == change.accuracy
    known = json.loads((run / "results.json").read_text())["methods"]["ensemble"]["per_task"]
    assert change.tests[LATE].accuracy_before is change.tests[LATE].nll_before is None and change.tests[LATE].nll > 0
    for name in TASKS:
        assert change.tests[name].accuracy_before == known[name]["accuracy"]
        assert change.tests[name].nll_before == known[name]["nll"]
    assert change.n_changes == 1 and read_source(run).n_changes == 0 and read_source(change.folder).n_changes == 1
    record = json.loads((change.folder / "change.json").read_text())
    assert record["task"] == LATE and record["rerun_flops"] == change.costs.rerun_flops
    training_record = json.loads((change.folder / "adapters" / change.trained[0] / "training.json").read_text())
    whole = json.loads((run / "adapters" / f"group-{1 - old}" / "training.json").read_text())
    assert training_record["n_steps"] < whole["n_steps"], "half as many rows of the others as of its own"
    assert set(training_record["tasks"]) == {*change.groups[int(change.trained[0].removeprefix("group-"))]}


@pytest.mark.slow
def test_a_changed_run_is_a_run_like_any_other(added: tuple[Path, Change], capsys: pytest.CaptureFixture[str]) -> None:
    _, change = added
    run = load_run(change.folder)
    assert run.predict(LATE, ["one two"])[0].label in ("no", "yes")
    assert run.ask([LATE, TASKS[0]])[LATE]["is_in_subset"]
    assert (change.folder / "report.html").exists() and LATE in run.results["methods"]["ensemble"]["per_task"]
    before = {path: path.stat().st_mtime_ns for path in change.folder.rglob("*.safetensors")}
    assert main(["evaluate", str(change.folder)]) == 0, "nothing is trained again"
    assert {path: path.stat().st_mtime_ns for path in change.folder.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_the_same_change_again_is_said_to_be_there_and_another_one_is_not(
    added: tuple[Path, Change], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, change = added
    card = str(run.parents[1] / "more" / f"{LATE}.yaml")
    before = {path: path.stat().st_mtime_ns for path in change.folder.rglob("*")}
    again = add_task(run, card, place="A")
    assert again == replace(change, is_known=True) and change.place == "group-0"
    assert main(["add", str(run), card]) == 0
    told = capsys.readouterr()
    assert told.out == f"{LATE} is already in the run at {change.folder}: nothing to do\n" and not told.err
    assert {path: path.stat().st_mtime_ns for path in change.folder.rglob("*")} == before
    with pytest.raises(OutputError, match="holds late in group-0, not in group-1; choose another folder"):
        add_task(run, card, place="B")
    source = read_source(run)
    cards, _ = change_cards(source, "add", entry=card)
    asked = ask("add", source, LATE, None, None, 0.5, None, is_dry=False)
    assert recall_change(asked, source, cards[-1]) == again
    other = cards[-1].model_copy(update={"doc_to_text": "{{text}}"})
    assert recall_change(asked, source, other) is None, "rows that are read otherwise"
    moved = Path(shutil.copytree(change.folder, tmp_path / "moved"))
    entries = artifacts.read_json(moved / "tasks.json")
    entries["tasks"][-1]["files"] = dict.fromkeys(entries["tasks"][-1]["files"], "0")
    artifacts.write_json(moved / "tasks.json", entries)
    assert recall_change(replace(asked, out=moved), source, cards[-1]) is None, "files that were edited since"


@pytest.mark.slow
def test_a_change_that_was_broken_off_goes_on(
    added: tuple[Path, Change], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, change = added
    card = write_late(tmp_path / "more")
    told = add_task(run, str(card), tmp_path / "out", place="group-0", dry_run=True)
    assert told.is_forecast and told.trained == change.trained and not list((tmp_path / "out").glob("adapters/*"))
    assert told.options == change.options
    # The training kept its start, whose scores are known: that is not foreseen.
    assert change.costs.learning_share < told.costs.learning_share < 1.5 * change.costs.learning_share
    tune, calls = training.fine_tune_together, []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fine_tune_together", stop)
    with pytest.raises(KeyboardInterrupt):
        add_task(run, str(card), tmp_path / "out", place="group-0")
    monkeypatch.setattr(training, "fine_tune_together", tune)
    again = add_task(run, str(card), tmp_path / "out", place="group-0")
    assert calls and again.groups == change.groups and again.accuracy == change.accuracy
    weights = Path("adapters") / change.trained[0] / "adapter_model.safetensors"
    one, other = again.folder / weights, change.folder / weights
    assert one.read_bytes() == other.read_bytes(), "as without a break"
    costs = [json.loads((folder / "costs.json").read_text())["stages"][0] for folder in (again.folder, change.folder)]
    assert costs[0]["flops"] == costs[1]["flops"], "features were taken once"
    with pytest.raises(OutputError, match="holds another change"):
        add_task(run, str(card), tmp_path / "out", place="group-0", training="whole")
    with pytest.raises(OutputError, match="holds another change"):
        drop_task(run, TASKS[0], tmp_path / "out")
    with pytest.raises(OutputError, match="made already"):
        add_task(run, str(card), tmp_path / "out", place="group-0", dry_run=True)


@pytest.mark.slow
def test_a_task_that_goes_nowhere_leaves_nothing(
    added: tuple[Path, Change], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, change = added
    monkeypatch.setattr(additions.change, "list_options", lambda *_, **__: list_nowhere(change.options))
    card = write_late(tmp_path / "more")
    made = add_task(run, str(card), tmp_path / "out")
    assert made.place == "nowhere" and made.folder == run and not (tmp_path / "out").exists()
    told = add_task(run, str(card), tmp_path / "out", dry_run=True)
    assert told.folder == tmp_path / "out" and (told.folder / "features").exists(), "for later"
    assert told.costs.flops.keys() == made.costs.flops.keys() <= {"features", "affinity"}, "nothing else is done"
    changed = Path(shutil.copytree(change.folder, tmp_path / "changed"))
    (changed / "change.json").unlink()  # as where a break came before the record
    assert add_task(run, str(card), changed).place == "nowhere" and (changed / "ensemble.json").exists()


def list_nowhere(options: tuple[Option, ...]) -> tuple[tuple[Option, ...], str]:
    """The same options, with the last one chosen."""
    chosen = [replace(option, is_chosen=option.place == "nowhere") for option in options]
    return tuple(chosen), "No place is good enough."


@pytest.mark.slow
def test_a_task_is_dropped_and_another_gets_other_rows(added: tuple[Path, Change], tmp_path: Path) -> None:
    _, change = added
    dropped = drop_task(change.folder, TASKS[1], tmp_path / "dropped")
    assert TASKS[1] not in {name for group in dropped.groups for name in group} and len(dropped.trained) == 1
    assert not list((tmp_path / "dropped" / "features").glob(f"{TASKS[1]}*")), "nothing of its rows is left"
    assert dropped.costs.flops["features"] == 0 and 0 < dropped.costs.learning_share < 1
    kept = drop_task(change.folder, TASKS[1], tmp_path / "kept", training="keep")
    assert kept.trained == () and kept.groups == dropped.groups
    assert kept.costs.learning_share < dropped.costs.learning_share
    home = next(g for g, group in enumerate(change.groups) if TASKS[1] in group)
    old = change.folder / "adapters" / f"group-{home}" / "adapter_model.safetensors"
    assert old.read_bytes() in [file.read_bytes() for file in kept.folder.glob("adapters/*/adapter_model.safetensors")]
    rows = tmp_path / "rows.jsonl"
    shutil.copy(read_card(change.folder, LATE)["dataset_kwargs"]["data_files"]["train"], rows)
    edit_rows(rows, lambda n, row: row | {"label": flip(row["label"])})
    updated = update_task(dropped.folder, LATE, str(rows), tmp_path / "updated")
    assert updated.place is not None and updated.groups == dropped.groups and len(updated.trained) == 1
    assert 0 < updated.costs.flops["features"] < change.costs.rerun_flops["features"] / 2
    assert 0 < updated.costs.learning_share < 1
    home = next(group for group in updated.groups if LATE in group)
    assert updated.trained == (f"group-{updated.groups.index(home)}",)


@pytest.mark.slow
def test_what_a_change_would_cost_is_about_what_it_costs(added: tuple[Path, Change], tmp_path: Path) -> None:
    run, change = added
    late = str(write_late(tmp_path / "more", "later"))
    asked: dict[str, Callable[..., Change]] = {
        "onward": lambda out, **is_dry: add_task(run, late, out, place="B", **is_dry),
        "whole": lambda out, **is_dry: add_task(run, late, out, place="B", training="whole", **is_dry),
        "alone": lambda out, **is_dry: add_task(run, late, out, place="alone", **is_dry),
        "dropped": lambda out, **is_dry: drop_task(run, TASKS[4], out, **is_dry),
        "kept": lambda out, **is_dry: drop_task(run, TASKS[0], out, training="keep", **is_dry),
        "again": lambda out, **is_dry: drop_task(change.folder, TASKS[1], out, **is_dry),
    }
    for name, carry_out in asked.items():
        told, made = (carry_out(tmp_path / name, dry_run=is_dry) for is_dry in (True, False))
        assert told.trained == made.trained, name
        shown = {stage: (told.costs.flops.get(stage), flops) for stage, flops in made.costs.flops.items()}
        assert told.costs.learning_share == pytest.approx(made.costs.learning_share, rel=0.25), (name, shown)
        assert told.costs.total_share == pytest.approx(made.costs.total_share, rel=0.25), (name, shown)
        assert told.costs.flops["evaluate"] == pytest.approx(made.costs.flops["evaluate"], rel=0.25), (name, shown)
        if name == "alone":
            (group,) = made.trained
            steps = [json.loads(path.read_text())["n_steps"] for path in run.glob("adapters/group-?/training.json")]
            record = json.loads((made.folder / "adapters" / group / "training.json").read_text())
            assert record["tasks"] == ["later"] and record["n_steps"] == np.mean(steps)


def boosters_of(folder: Path) -> dict[int, list[bytes]]:
    """The weights of every group's boosters."""
    found: dict[int, list[bytes]] = {}
    for entry in artifacts.read_json(folder / "boosting.json"):
        if entry["accepted"]:
            weights = folder / "adapters" / entry["name"] / "adapter_model.safetensors"
            found.setdefault(entry["group"], []).append(weights.read_bytes())
    return found


@pytest.mark.slow
def test_boosters_stay_where_they_help_and_are_fitted_anew_beside_an_adapter_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, card = copy_run(tmp_path / "a").parent / "run", str(write_late(tmp_path / "more", family=1))
    ((home, old),) = boosters_of(run).items()
    judged: list[bool] = []
    helps = Carrier._still_helps
    monkeypatch.setattr(Carrier, "_still_helps", lambda *given: judged.append(helps(*given)) or judged[-1])
    joined = add_task(run, card, tmp_path / "joined", place=f"group-{home}")
    place = next(g for g, group in enumerate(joined.groups) if LATE in group)
    assert judged == [place in boosters_of(joined.folder)]
    assert boosters_of(joined.folder).get(place, old) == old, "the same one, or none"
    alone = add_task(run, card, tmp_path / "alone", place="alone")
    assert alone.groups[int(alone.trained[0].removeprefix("group-"))] == (LATE,) and len(alone.trained) == 1
    assert [*boosters_of(alone.folder).values()] == [old] and len(judged) == 1, "beside it nothing changed"
    assert artifacts.read_json(run / "ensemble.json")["groups"][home] == [3, 4], "the last of free text, never boosted"
    dropped = drop_task(run, TASKS[4], tmp_path / "dropped")
    rounds = artifacts.read_json(dropped.folder / "boosting.json")
    assert [f"group-{entry['group']}" for entry in rounds] == list(dropped.trained), "tried again"
    assert old not in boosters_of(dropped.folder).values() and dropped.costs.flops["boost"] > 0


@pytest.mark.slow
def test_a_run_whose_rows_changed_is_not_gone_on_from(tmp_path: Path) -> None:
    recipe = copy_run(tmp_path / "a")
    card = write_late(tmp_path / "more")
    tasks = artifacts.read_json(recipe.parent / "run" / "tasks.json")
    for entry in tasks["tasks"]:
        files = entry["card"]["dataset_kwargs"]["data_files"]
        entry["card"]["dataset_kwargs"]["data_files"] = {
            split: str(tmp_path / "a" / "tasks" / Path(path).name) for split, path in files.items()
        }
    artifacts.write_json(recipe.parent / "run" / "tasks.json", tasks)
    edit_rows(tmp_path / "a" / "tasks" / f"{TASKS[0]}.train.jsonl", lambda n, row: row | {"label": flip(row["label"])})
    with pytest.raises(DataError, match=f"has no features of {TASKS[0]} as they are now"):
        add_task(recipe.parent / "run", str(card))


def read_card(folder: Path, task: str) -> dict[str, Any]:
    """A task's card, as its run keeps it."""
    entries = artifacts.read_json(folder / "tasks.json")["tasks"]
    return next(dict(entry["card"]) for entry in entries if entry["card"]["task"] == task)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which finds its neighbours as it does when it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    found = importlib.import_module("additions")
    yield found
    for name in ("additions", "common"):
        sys.modules.pop(name, None)


def test_the_benchmark_compares_runs_row_by_row(script: Any) -> None:
    def rows(*right: float) -> TaskRows:
        ids, groups = tuple(map(str, range(len(right)))), np.arange(len(right)) // 2
        return TaskRows(ids, np.zeros(len(right), int), groups, {"ensemble": {"accuracy": np.array(right)}})

    one, other = {"a": rows(1, 1, 0, 0), "new": rows(1, 1)}, {"a": rows(1, 0, 0, 1), "new": rows(0, 1)}
    found = script.compare_runs(one, other, "new")["accuracy"]
    assert found["arrival"]["difference"] == 0.5 and found["others"]["difference"] == 0
    assert found["all"]["difference"] == 0.25 and found["all"]["accuracy"] == 0.75
    se = compute_clustered_se(np.array([0, 1.0, 0, -1]), np.array([0, 0, 1, 1]))
    assert found["others"]["se"] == pytest.approx(float(se))


@pytest.mark.slow
def test_the_benchmark_measures_and_keeps(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_inputs(tmp_path)
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values["data"]["tasks"] = [str(tmp_path / "tasks" / f"{task}.yaml") for task in TASKS[:3]]
    values["boosting"] = {"n_rounds": 0}
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    asked = Namespace(
        recipe=recipe, arrivals=str(tmp_path / "tasks" / f"{TASKS[3]}.yaml"), out=tmp_path / "kept", training="onward",
        seeds=1, minutes=10.0, set=[], json=False, leave_record=True,
    )  # fmt: skip
    found = script.measure(asked)
    (entry,) = found["arrivals"].values()
    assert 0 < entry["learning_share"] < 1 and entry["task"] == TASKS[3] and entry["accuracy"]["all"]["se"] >= 0
    asked.minutes = 0.0
    assert script.measure(asked) == found, "what is known is not measured again"
    asked.seeds = 2
    script.measure(asked)
    assert "left for another time: seed 1" in capsys.readouterr().err
    asked.seeds, asked.set = 1, ["training.num_train_epochs=1"]
    assert script.measure(asked)["arrivals"] == {}, "what other settings gave is not taken for theirs"
    assert {name for group in entry["groups"] for name in group} == set(TASKS[:4])
    assert sorted(name for group in entry["rerun_groups"] for name in group) == sorted(TASKS[:4])


def test_a_record_is_shown_with_costs_and_intervals() -> None:
    part = {"accuracy": 0.612, "rerun_accuracy": 0.62, "difference": -0.008, "se": 0.01}
    entry = {
        "task": "new", "place": "group-0", "is_forced": False, "learning_share": 0.123, "total_share": 0.4,
        "accuracy": {"all": part, "arrival": part, "others": part | {"se": 0.0}},
    }  # fmt: skip
    record = {
        "command": "python x", "commit": "abc", "n_processors": 2,
        "config": {"recipe": "r.yaml", "set": ["seed=1"], "training": "onward", "seeds": 1},
        "arrivals": {"seed 0, new, onward": entry, "seed 0, odd, onward": entry | {"is_forced": True}},
    }  # fmt: skip
    page = "\n".join(render_measured({"additions": record}))
    change = "-0.8 [-2.8, +1.2] | -0.8 [-2.8, +1.2] | -0.8 [-0.8, -0.8]"
    assert f"| seed 0, new, onward | group-0 | 12.3% (40.0%) | 61.2 and 62.0 | {change} |" in page
    assert "| group-0, though nowhere was predicted |" in page and "changed by `seed=1`" in page


@pytest.mark.parametrize(
    ("place", "told"), [("group-0", "trained: group-0 (onward)"), ("nowhere", "nothing was trained")]
)
def test_the_command_says_where_why_and_what_it_cost(
    place: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    options, reason = list_options(make_oracle(0, 0, 1, 1, 0), GROUPS, 4, confidence=0.95)
    trained = ("group-0",) if place == "group-0" else ()
    costs = compare_costs({"features": 10, "train": 100}, {"features": 100, "train": 900})
    folder = tmp_path if place == "nowhere" else tmp_path / "there"
    change = Change(
        "add", "new", folder, tmp_path, options, place, reason, (("a", "new"), ("b", "c")), trained, "onward", costs,
        False, {}, {"new": Outcome(0.75, 0.5), "a": Outcome(0.5, 0.875, 0.25, 1.0), "b": Outcome(None, 2.0, None, 1.0)},
        3, "time for a new run",
    )  # fmt: skip

    def add(run: Path, entry: str, **given: Any) -> Change:
        asked.update(given, run=run, entry=entry)
        return change

    monkeypatch.setattr(additions, "add_task", add)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["add", "runs/mine", "new.yaml", "--to", "alone", "--replay", "2", "--out", "there"]) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "\u2026" not in shown, "no word is cut"
    assert {"accuracy", "between", "before", "training", "saved", "standard", "error", "outcome"} <= set(shown.split())
    took = "11.0% of what a run" if place == "nowhere" else "11% of a run"
    assert f"{took} from the beginning" in shown and told in shown
    assert reason in " ".join(shown.split()) and ("cost" in shown) == (place != "nowhere")
    if place != "nowhere":
        assert "mean of the other 2 tasks 0.250 0.500 1.000 1.438" in " ".join(shown.split())
        assert "new \u2013 0.750 \u2013 0.500" in " ".join(shown.split())
        assert "groups now A (group-0) a, new B (group-1) b, c" in " ".join(shown.split())
        assert f"time for a new run (3 changes since the last one; all cards are in {folder}" in shown
    last = "nothing was trained" if place == "nowhere" else str(folder)
    assert all(option.place in shown for option in options) and shown.splitlines()[-1].startswith(last)
    assert asked["place"] == "alone" and asked["replay"] == 2 and asked["out"] == Path("there")
    assert not asked["dry_run"] and asked["training"] is None
    assert main(["add", "runs/mine", "new.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["costs"]["learning_share"] == pytest.approx(0.11) and len(found["options"]) == 4
