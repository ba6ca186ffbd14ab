"""What a plan says of other ways to train agrees with what it decided, and its advice helps."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from ensemblelora.config import GroupingConfig
from ensemblelora.estimation import Oracle
from ensemblelora.grouping import cluster
from ensemblelora.planning import Comparison, Plan
from ensemblelora.planning.budget import Budget
from ensemblelora.planning.describe import _OTHER_WAYS, is_above_error, list_plan_warnings
from ensemblelora.planning.judge import make_judge
from ensemblelora.planning.search import measure_gradient_cosines
from tests.test_planning import OPPOSED, make_features, make_oracle, plan_for, slow_row_losses

# Few validation rows, on which searches by halves of them go astray: the groups by gradient cosine are better than one
# adapter, which no others are; better than the groups found; neither; and one adapter a task is better than all.
INSTEAD_OF_ONE = (OPPOSED, 6, 6)
INSTEAD_OF_FOUND = (OPPOSED, 5, 2)
CLEAR = (OPPOSED, 20, 0)
ALONE = ((0, 2, 1, 3), 2, 5)
CASES = [INSTEAD_OF_ONE, INSTEAD_OF_FOUND, CLEAR, ALONE]
Case = tuple[tuple[int, ...], int, int]


@cache
def oracle_of(case: Case) -> Oracle:
    families, n_validation, seed = case
    return make_oracle(make_features(families, n_validation=n_validation, rows_per_group=1, seed=seed))


@cache
def plan_of(case: Case, **settings: object) -> Plan:
    return plan_for(oracle_of(case), **{"max_groups": 3, "n_random_partitions": 3, **settings})


def rival_of(plan: Plan, name: str = "gradient cosine") -> Comparison:
    return next(way for way in plan.comparisons if way.name == name)


def ask_errors(plan: Plan) -> float:
    """Standard errors by which groups have to beat one adapter, two with fewer than ten rows a task."""
    return 2.0 if np.mean(plan.n_validation) < 10 else 1.0


def is_better(plan: Plan, way: Comparison) -> bool:
    """Whether a way to train is predicted to be better than the plan by what the choice itself asks for."""
    n_errors = ask_errors(plan) if len(plan.groups) == 1 else 1.0
    return is_above_error(way.gain_over_plan or 0.0, way.gain_over_plan_se, n_errors=n_errors)


def told_of(plan: Plan) -> dict[str, str]:
    """What a plan says of ways to train that are better, by their names."""
    names = {title: name for name, title in _OTHER_WAYS.items()}
    better = [warning for warning in plan.warnings if "is predicted to do better than the plan" in warning]
    return {names[warning.partition(" (")[0]]: warning for warning in better}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "settings", [{}, {"n_groups": 2}, {"n_groups": 1}, {"refine": False}, {"max_groups": 2}], ids=str
)
def test_no_groups_that_could_have_been_taken_beat_the_plan(case: Case, settings: dict[str, object]) -> None:
    plan = plan_of(case, **settings)
    cosine = rival_of(plan)
    if "n_groups" not in settings or cosine.n_groups == settings["n_groups"]:
        assert not is_better(plan, cosine), plan.reason
    if plan.reason.startswith("No grouping"):
        assert not is_above_error(cosine.gain, cosine.gain_se, n_errors=ask_errors(plan))
    assert plan.n_groups_auto == len(plan_of(case, **{**settings, "n_groups": "auto"}).groups)
    better = {way.name for way in plan.comparisons if is_better(plan, way)}
    assert set(told_of(plan)) == better - {"one adapter"}


@pytest.mark.parametrize("case", [INSTEAD_OF_ONE, INSTEAD_OF_FOUND])
def test_clusters_by_gradient_cosine_are_taken_where_they_are_better(case: Case) -> None:
    plan, oracle = plan_of(case), oracle_of(case)
    n_groups = len(plan.groups)
    found = cluster(measure_gradient_cosines(make_judge(oracle, seed=0)), n_groups, seed=0)
    assert plan.groups == found.groups and plan.decision == "group"
    assert plan.reason.startswith(f"{n_groups} groups by gradient cosine: predicted mean validation loss")
    instead = (
        "no grouping found by affinity is" if case == INSTEAD_OF_ONE else f"better than the {n_groups} groups found"
    )
    assert instead in plan.reason
    for task in range(6):  # no validation row chose them, so that every row judges them
        assert plan.predicted.plan.nll[task] == pytest.approx(slow_row_losses(oracle, plan.groups, task).mean())
    (point,) = (candidate for candidate in plan.curve if candidate.n_groups == n_groups)
    assert point.groups == plan.groups and is_above_error(point.gain, point.gain_se, n_errors=2.0)
    assert point.allowed
    assert [candidate.n_groups for candidate in plan.curve] == [1, 2, 3]
    cosine = rival_of(plan)
    assert (cosine.groups, cosine.gain_over_plan, cosine.gain_over_plan_se) == (plan.groups, 0.0, 0.0)
    assert not told_of(plan)


def test_what_was_asked_for_stays_what_was_asked_for() -> None:
    names = [f"task-{i}" for i in range(6)]
    by_hand = plan_of(INSTEAD_OF_FOUND, groups=(tuple(names[:3]), tuple(names[3:])))
    assert by_hand.groups == ((0, 1, 2), (3, 4, 5)) and by_hand.n_groups_auto == 2
    assert told_of(by_hand)["gradient cosine"].endswith(" nats."), "it was open to auto, which has been told of"
    number = plan_of(INSTEAD_OF_FOUND, n_groups=2)
    assert number.groups == plan_of(INSTEAD_OF_FOUND).groups
    assert "auto would choose the same. Here, by gradient cosine: predicted" in number.reason
    one = plan_of(INSTEAD_OF_FOUND, n_groups=1)
    assert one.decision == "one adapter" and "auto would choose 2. Here: " in one.reason
    assert re.match(r"Grouping by gradient cosine \([23] adapters\) is predicted", told_of(one)["gradient cosine"])
    assert told_of(one)["gradient cosine"].endswith(" nats."), "no larger number would help"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", [{}, {"max_groups": 2}, {"max_groups": 2, "rounding": "threshold"}], ids=str)
def test_following_the_advice_helps(case: Case, settings: dict[str, object]) -> None:
    plan = plan_of(case, **settings)
    for name, told in told_of(plan).items():
        advised = dict(re.findall(r"grouping\.(\w+) to (\w+)", told))
        if not advised:
            continue
        after = plan_of(case, **{**settings, **{k: int(v) if v.isdigit() else v for k, v in advised.items()}})
        assert name not in told_of(after) and after.predicted.plan.mean_nll < plan.predicted.plan.mean_nll
    if case == ALONE and not settings:
        assert told_of(plan)["one per task"].endswith("; set grouping.max_groups to 4 or more to allow it.")


def test_the_papers_rounding_keeps_its_groups_and_says_what_would_allow_others() -> None:
    plan = plan_of((OPPOSED, 5, 16), max_groups=2, rounding="threshold")
    assert plan.reason.startswith("No grouping by threshold is predicted to beat one adapter for all")
    assert told_of(plan)["gradient cosine"].endswith("; set grouping.rounding to best to allow it.")


def test_groups_over_budget_are_named_with_what_keeps_them_out() -> None:
    plan = plan_of(INSTEAD_OF_FOUND, bytes_per_adapter=100, max_memory_bytes=150)
    assert plan.decision == "one adapter" and plan.reason.startswith("Only one adapter is within budget")
    told = told_of(plan)
    assert told["gradient cosine"].endswith(" nats; raise the budget to allow it.")
    assert told["one per task"].endswith("; set grouping.max_groups to 6 or more and raise the budget to allow it.")


def test_a_mean_over_draws_is_nothing_to_be_advised() -> None:
    plan = plan_of(INSTEAD_OF_ONE, n_groups=1)
    other = Comparison("random groups", 5, None, 0.3, 0.1, 0.2, 0.09, 0.1, 0.2, 0.09)
    predicted, groups = plan.predicted, plan.groups
    warnings = list_plan_warnings(
        plan.curve[0],
        predicted.plan,
        predicted.base,
        [other],
        (groups, groups),
        Budget(100, 0, 150),
        GroupingConfig(max_groups=2),
        lambda _: False,
        2.0,
    )
    assert next(told for told in warnings if told.startswith("Random")) == (
        "Random grouping (5 adapters, in the mean over draws) is predicted to do better than the plan "
        "by 0.2000 ± 0.0900 nats."
    )


def test_one_a_task_competes_unasked_unless_a_limit_keeps_it_out() -> None:
    oracle = make_oracle(make_features(tuple(range(4)) * 2, n_train=120), penalty=0.01)
    plan = plan_for(oracle, n_random_partitions=2)
    assert [candidate.n_groups for candidate in plan.curve] == [1, 2, 3, 4, 5, 6, 8]
    (alone,) = (way for way in plan.comparisons if way.name == "one per task")
    assert plan.curve[-1].gain == pytest.approx(alone.gain) and plan.curve[-1].gain_se == pytest.approx(alone.gain_se)
    assert [c.n_groups for c in plan_for(oracle, max_groups=6, n_random_partitions=2).curve] == [1, 2, 3, 4, 5, 6]


def test_one_a_task_is_taken_where_it_is_predicted_best() -> None:
    oracle = make_oracle(make_features(tuple(range(8)), n_train=120), penalty=0.01)
    plan = plan_for(oracle, n_random_partitions=2)
    assert plan.decision == "one per task" and plan.reason.startswith("8 groups: ")
    limited = plan_for(oracle, max_groups=6, n_random_partitions=2)
    assert told_of(limited)["one per task"].endswith("; set grouping.max_groups to 8 or more to allow it.")
    assert "one per task" not in told_of(plan)


@pytest.mark.parametrize(
    ("settings", "n_tasks", "numbers"),
    [
        ({}, 4, [1, 2, 3, 4]),
        ({}, 20, [1, 2, 3, 4, 5, 6, 20]),
        ({}, 21, [1, 2, 3, 4, 5, 6]),
        ({"rounding": "threshold"}, 10, [1, 2, 3, 4, 5, 6]),
        ({"max_groups": 8}, 10, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
    ids=str,
)
def test_numbers_of_groups_that_compete(settings: dict[str, object], n_tasks: int, numbers: list[int]) -> None:
    assert GroupingConfig.model_validate(settings).list_numbers(n_tasks) == numbers
