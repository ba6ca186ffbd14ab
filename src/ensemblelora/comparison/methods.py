"""The methods that a comparison knows, by name; one line each.

A method is a function of one seed's :class:`~.pool.Pool`. It settles everything on training and validation rows and
returns a :class:`~.candidate.Candidate`; its test rows are scored afterwards, by the study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ensemblelora.comparison.adaboost import LEVELS, boost_by_weights, boost_shared
from ensemblelora.comparison.candidate import Candidate
from ensemblelora.comparison.combined import train_ours
from ensemblelora.comparison.controls import mix_copies, mix_groups, train_copies, train_wide
from ensemblelora.comparison.full import train_full
from ensemblelora.comparison.grouped import score_base, train_planned, train_shared, train_singles
from ensemblelora.comparison.groupers import (
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

__all__ = ["METHODS", "Method", "Work"]


Work = Literal["one", "tasks", "continued", "groups", "copies"]
"""Fine-tunings, each kind of which takes every row once an epoch: one adapter for all; one a task; one a task that goes
on from one for all; one a group. ``copies`` are as many adapters for all as there may be groups, each over all rows."""


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


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("base", "the base model as it is", score_base, is_trained=False, is_core=True, work=()),
        Method("shared", "one adapter for all tasks", train_shared, is_rival=True, is_core=True, work=("one",)),
        Method("single", "one adapter per task", train_singles, is_rival=True, is_core=True, work=("tasks",)),
        Method("grouped", "our groups, each task's own adapter", train_planned, is_planned=True),
        Method(OURS, "ours: groups, boosting, weights", train_ours, is_core=True, is_planned=True),
        *(
            Method(f"ours-boost-{b}", f"ours, up to {b} boosters", partial(train_ours, n_rounds=b), is_planned=True)
            for b in range(5)
        ),
        Method("ours-global", "ours, one set of weights", partial(train_ours, weights="global"), is_planned=True),
        Method("ours-uniform", "ours, equal weights", partial(train_ours, weights="uniform"), is_planned=True),
        Method("ours-own", "ours, each task's own group", partial(train_ours, weights="own"), is_planned=True),
        Method(
            "ours-shared",
            "ours, one adapter for all as one more member",
            partial(train_ours, with_shared=True),
            work=("one", "groups"),
            is_planned=True,
        ),
        Method("mtl-ft", "MTL-FT", train_continued, is_rival=True, is_core=True, work=("one", "continued")),
        Method(
            "mtl-ft-ensemble",
            "MTL-FT, its adapters weighted for each task",
            partial(train_continued, weights="task"),
            work=("one", "continued"),
        ),
        Method("warm", "our groups after a shared warm-up", train_warm, is_planned=True),
        Method("warm-plan", "groups planned at the warm-up, weights", train_warm_plan, is_planned=True),
        Method(
            "copies", "as many adapters for all as ours", train_copies, is_rival=True, work=("copies",), is_planned=True
        ),
        Method("wide", "one adapter of ours' rank in all", train_wide, is_rival=True, work=("one",), is_planned=True),
        Method("soup", "our groups' adapters averaged (A and B)", mix_groups, is_planned=True),
        Method(
            "soup-exact", "our groups' adapters averaged (B A)", partial(mix_groups, is_exact=True), is_planned=True
        ),
        Method("soup-copies", "copies averaged (A and B)", mix_copies, work=("copies",), is_planned=True),
        Method("full", "full fine-tuning", train_full, work=("one",), is_whole=True),
        *(
            Method(
                f"adaboost-{level}-{b}",
                f"AdaBoost by {level}s, {b} more adapters",
                partial(boost_by_weights, n_steps=b, level=level),
                work=("copies",),
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
            )
            for b in range(1, 5)
        ),
        Method("shared-longer", "one adapter for all, twice the epochs", train_shared_longer, work=("one",)),
        Method("single-steps", "one adapter per task, the shared one's steps", train_singles_longer, work=("tasks",)),
        Method("grouped-steps", "our groups, the shared one's steps each", train_planned_longer, is_planned=True),
        Method(
            "ours-steps", "ours, the shared one's steps each", partial(train_ours, matches_steps=True), is_planned=True
        ),
        Method("tag", "TAG", group_by_lookahead, is_rival=True, work=("one", "groups"), is_planned=True),
        Method("gradient-cosine", "groups by gradient cosine", group_by_gradients, is_planned=True),
        *(
            Method(f"random-{k}", f"random groups, draw {k}", partial(group_by_chance, draw=k), is_planned=True)
            for k in range(1, 4)
        ),
        Method(
            "adapter-clusters",
            "clusters of trained adapters",
            group_by_adapters,
            work=("tasks", "groups"),
            is_planned=True,
        ),
        Method("text-clusters", "clusters of text embeddings", group_by_texts, is_planned=True),
        Method("format-groups", "groups by label format", group_by_format, is_planned=True),
        Method("categories", "the paper's five categories", group_by_category),
    )
}
