"""The methods that a comparison knows, by name; one line each.

A method is a function of one seed's :class:`~.pool.Pool`. It settles everything on training and validation rows and
returns a :class:`~.candidate.Candidate`; its test rows are scored afterwards, by the study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ensemblelora.comparison.adaboost import LEVELS, Level, boost_by_weights, boost_shared
from ensemblelora.comparison.calibrated import train_tempered
from ensemblelora.comparison.candidate import Candidate
from ensemblelora.comparison.combined import train_ours
from ensemblelora.comparison.controls import mix_copies, mix_groups, train_copies, train_wide
from ensemblelora.comparison.full import train_full
from ensemblelora.comparison.grouped import (
    score_base,
    train_number,
    train_planned,
    train_sampled,
    train_shared,
    train_singles,
)
from ensemblelora.comparison.groupers import (
    draw_groups,
    group_by_adapters,
    group_by_category,
    group_by_chance,
    group_by_format,
    group_by_gradients,
    group_by_lookahead,
    group_by_texts,
)
from ensemblelora.comparison.matched import train_planned_longer, train_shared_longer, train_singles_longer
from ensemblelora.comparison.pool import Pool
from ensemblelora.comparison.record import OURS
from ensemblelora.comparison.sequential import train_continued, train_warm, train_warm_plan

__all__ = ["METHODS", "Boosted", "Method", "Work"]


Work = Literal[
    "one",
    "other one",
    "tasks",
    "matched tasks",
    "continued",
    "matched continued",
    "half",
    "groups",
    "matched groups",
    "other groups",
    "other matched groups",
    "draw 1",
    "draw 2",
    "draw 3",
    "half groups",
    "copies",
    "soup",
    "row learner",
    "task learner",
    "real learner",
]
"""Fine-tunings. Each takes its rows once an epoch: one adapter for all; one a task; one a task that goes on from the
one for all; one a group of the plan. ``other`` ones and ``half groups`` are a method's own; all else of equal name is
trained once for all methods. ``half`` ones take half of the epochs, ``matched`` ones as many steps each as one adapter
for all, and ``copies``, as many as the plan may have groups, those of a ``soup``, and ``learners`` see all rows each.
The groups of a ``draw`` are random."""
Boosted = Literal["groups", "one", "own"]
"""which adapters are boosted: the plan's groups', for all methods alike; the one for all tasks; a method's own"""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune on many datasets."""

    name: str
    title: str
    """for tables"""
    run: Callable[[Pool], Candidate]
    is_trained: bool = True
    """whether a learning rate matters"""
    is_rival: bool = False
    """whether ours is compared with it in the primary comparisons, where none are named"""
    is_core: bool = False
    """whether it is one of ``--methods core``"""
    work: tuple[Work, ...] = ("groups",)
    """what it fine-tunes, for the forecast; what several methods share is computed once"""
    is_whole: bool = False
    """whether it trains below the adapted layers too, so that nothing there is computed once for all"""
    is_planned: bool = False
    """whether it needs features and a plan"""
    plans_anew: bool = False
    """whether it takes features a second time, at each learning rate"""
    train_fraction: float | None = None
    """share of the training rows whose features it is charged for; none: the config's"""
    n_boosters: int | None = 0
    """boosters at most; none: the config's"""
    boosted: Boosted = "groups"
    looks_ahead: bool = False
    """whether it looks ahead while it trains, as TAG does"""


def _ours(
    name: str,
    title: str,
    *,
    run: Callable[..., Candidate] = train_ours,
    work: tuple[Work, ...] = ("groups",),
    n_boosters: int | None = None,
    boosted: Boosted = "groups",
    charged: float | None = None,
    is_core: bool = False,
    **options: Any,
) -> Method:
    """Ours, or ours with something left out or put another way, which ``options`` tell ``run``."""
    return Method(
        name,
        title,
        partial(run, **options),
        is_core=is_core,
        work=work,
        is_planned=True,
        train_fraction=charged,
        n_boosters=n_boosters,
        boosted=boosted,
    )


_LEVEL_NAMES: dict[Level, str] = {"row": "rows", "task": "tasks", "real": "rows and probabilities"}
_LEARNERS: dict[Level, Work] = {"row": "row learner", "task": "task learner", "real": "real learner"}
_SAMPLED: tuple[tuple[str, str, Literal["uniform", "sqrt"]], ...] = (
    ("shared-balanced", "tasks sampled alike", "uniform"),
    ("shared-sqrt", "tasks sampled by the root of their size", "sqrt"),
)
_DRAWS: dict[int, Work] = {1: "draw 1", 2: "draw 2", 3: "draw 3"}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("base", "the base model as it is", score_base, is_trained=False, is_core=True, work=()),
        Method("shared", "one adapter for all tasks", train_shared, is_rival=True, is_core=True, work=("one",)),
        *(
            Method(name, f"one adapter for all, {told}", partial(train_sampled, sampling=sampling), work=("other one",))
            for name, told, sampling in _SAMPLED
        ),
        Method("single", "one adapter per task", train_singles, is_rival=True, is_core=True, work=("tasks",)),
        Method("grouped", "our groups, each task's own adapter", train_planned, is_planned=True),
        *(
            Method(
                f"ours-m{m}",
                f"our best {m} groups, each task's own adapter" if m > 1 else "our one group of all tasks",
                partial(train_number, n_groups=m),
                work=("other groups",) if m > 1 else ("one",),
                is_planned=True,
            )
            for m in range(1, 7)
        ),
        _ours(OURS, "ours: groups, boosting, weights", is_core=True),
        *(_ours(f"ours-boost-{b}", f"ours, up to {b} boosters", n_boosters=b, n_rounds=b) for b in range(5)),
        _ours("ours-global", "ours, one set of weights", weights="global"),
        _ours("ours-uniform", "ours, equal weights", weights="uniform"),
        _ours("ours-own", "ours, each task's own group", weights="own"),
        _ours(
            "ours-shared",
            "ours, one adapter for all as one more member",
            work=("one", "groups"),
            with_shared=True,
        ),
        *(
            _ours(
                f"random-ours-{k}",
                f"random groups with boosting and weights, draw {k}",
                work=(draw,),
                boosted="own",
                regroup=partial(draw_groups, draw=k),
            )
            for k, draw in _DRAWS.items()
        ),
        _ours("ours-temperature", "ours, a temperature for each task", run=train_tempered),
        *(
            _ours(
                f"ours-{name}-features",
                f"ours, features of a {name} of the training rows",
                boosted="own",
                charged=share,
                train_fraction=share,
            )
            for name, share in (("half", 0.5), ("quarter", 0.25))
        ),
        Method("mtl-ft", "MTL-FT", train_continued, is_rival=True, is_core=True, work=("one", "continued")),
        Method(
            "mtl-ft-ensemble",
            "MTL-FT, its adapters weighted for each task",
            partial(train_continued, weights="task"),
            work=("one", "continued"),
        ),
        Method(
            "mtl-ft-steps",
            "MTL-FT, the shared one's steps for each task",
            partial(train_continued, matches_steps=True),
            work=("one", "matched continued"),
        ),
        Method("warm", "our groups after a shared warm-up", train_warm, is_planned=True, work=("half", "half groups")),
        Method(
            "warm-plan",
            "groups planned at the warm-up, weights",
            train_warm_plan,
            is_planned=True,
            plans_anew=True,
            work=("half", "half groups"),
        ),
        Method(
            "copies",
            "as many adapters for all as ours",
            train_copies,
            is_rival=True,
            work=("copies",),
            is_planned=True,
        ),
        Method(
            "wide", "one adapter of ours' rank in all", train_wide, is_rival=True, work=("other one",), is_planned=True
        ),
        Method("soup", "our groups' adapters averaged (A and B)", mix_groups, is_planned=True),
        Method(
            "soup-exact", "our groups' adapters averaged (B A)", partial(mix_groups, is_exact=True), is_planned=True
        ),
        Method("soup-copies", "copies of one start averaged (A and B)", mix_copies, work=("soup",), is_planned=True),
        Method("full", "full fine-tuning", train_full, work=("other one",), is_whole=True),
        *(
            Method(
                f"adaboost-{level}-{b}",
                f"AdaBoost by {_LEVEL_NAMES[level]}, {b} more adapters",
                partial(boost_by_weights, n_steps=b, level=level),
                work=("one", *([_LEARNERS[level]] * b)),
            )
            for level in LEVELS
            for b in range(1, 5)
        ),
        *(
            Method(
                f"boosted-{b}",
                f"one adapter for all, up to {b} boosters",
                partial(boost_shared, n_steps=b),
                work=("one",),
                is_planned=True,
                n_boosters=b,
                boosted="one",
            )
            for b in range(1, 5)
        ),
        Method("shared-longer", "one adapter for all, twice the epochs", train_shared_longer, work=("other one",) * 2),
        Method(
            "single-steps",
            "one adapter per task, the shared one's steps",
            train_singles_longer,
            work=("matched tasks",),
        ),
        Method(
            "grouped-steps",
            "our groups, the shared one's steps each",
            train_planned_longer,
            is_planned=True,
            work=("matched groups",),
        ),
        _ours(
            "ours-steps",
            "ours, the shared one's steps each",
            work=("matched groups",),
            boosted="own",
            matches_steps=True,
        ),
        Method(
            "tag",
            "TAG",
            group_by_lookahead,
            is_rival=True,
            work=("other one", "one", "other groups"),
            is_planned=True,
            looks_ahead=True,
        ),
        Method(
            "tag-steps",
            "TAG, the shared one's steps for each group",
            partial(group_by_lookahead, matches_steps=True),
            work=("other one", "one", "other matched groups"),
            is_planned=True,
            looks_ahead=True,
        ),
        Method(
            "gradient-cosine",
            "groups by gradient cosine",
            group_by_gradients,
            is_planned=True,
            work=("one", "other groups"),
        ),
        *(
            Method(
                f"random-{k}",
                f"random groups, draw {k}",
                partial(group_by_chance, draw=k),
                is_planned=True,
                work=(draw,),
            )
            for k, draw in _DRAWS.items()
        ),
        Method(
            "random-steps",
            "random groups, the shared one's steps for each",
            partial(group_by_chance, draw=1, matches_steps=True),
            is_planned=True,
            work=("other matched groups",),
        ),
        Method(
            "adapter-clusters",
            "clusters of trained adapters",
            group_by_adapters,
            work=("one", "tasks", "other groups"),
            is_planned=True,
        ),
        Method(
            "text-clusters",
            "clusters of text embeddings",
            group_by_texts,
            is_planned=True,
            work=("one", "other groups"),
        ),
        Method("format-groups", "groups by label format", group_by_format, is_planned=True, work=("other groups",)),
        Method("categories", "the paper's five categories", group_by_category, work=("other groups",)),
    )
}
