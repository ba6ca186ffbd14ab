"""What a changed run takes over from the earlier one, and what it trains instead.

A group is the same where it has the same tasks and none of them changed; its adapter and boosters are copied. A group
that a task joined, left, or changed in is trained: ``onward`` from its old adapter on the task's rows and a share of
the others', or ``whole``, as a run would; ``keep`` leaves the adapter of a group that lost a task as it is. A task that
is alone is trained for as many steps as the other groups, on the average: its own rows make but a few. Boosters
were fitted to the old adapter: beside one that was trained onward they stay if they still lower the loss of validation
rows, and beside one that was trained whole they are fitted anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ensemblelora import artifacts, training
from ensemblelora.adapters import THETA0, AdaptedModel, adapter_state, load_adapter
from ensemblelora.additions.source import Source
from ensemblelora.boosting import BoostRound
from ensemblelora.config import TrainingConfig
from ensemblelora.data.batching import schedule_training
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.subset import list_rows, take_examples
from ensemblelora.ensemble import Member, needed_adapters, sum_groups
from ensemblelora.grouping import Partition
from ensemblelora.planning import Plan
from ensemblelora.prediction import member_nll
from ensemblelora.seeding import generator_for
from ensemblelora.stages import BOOSTING_FILE, Rows, find_boosters, keep_adapter, score_members
from ensemblelora.stages.bench import Bench
from ensemblelora.stages.fine_tuning import train_one
from ensemblelora.startpoint import settle_training
from ensemblelora.store import FeatureStore
from ensemblelora.training import choose_layout
from ensemblelora.workspace import StageRun, Workspace

__all__ = ["Carrier", "Training", "carry_features", "draw_replay", "lengthen_training"]

Training = Literal["onward", "whole", "keep"]
_CHECKPOINTS = "checkpoints"
_MOST_LENGTHENED = 4.0
"""times a run's epochs that a task alone is trained, at most"""


def carry_features(source: Source, store: FeatureStore, wanted: Mapping[tuple[str, str], str]) -> set[tuple[str, str]]:
    """Copy the blocks of features that the earlier run has; returns the tasks and splits that it has not."""
    old = FeatureStore(source.path / artifacts.FEATURES_FOLDER)
    missing = set()
    for (task, split), identity in wanted.items():
        if store.has(task, split, identity):
            continue
        if not old.has(task, split, identity):
            missing.add((task, split))
            continue
        store.write(old.read(task, split), identity)
    return missing


def draw_replay(splits: Sequence[EncodedSplit], n_wanted: int, *, seed: int) -> list[np.ndarray]:
    """Draw examples of several splits, in proportion to their sizes: ascending indices, at least one of each.

    Args:
        splits: What is drawn from.
        n_wanted: Examples in all, about.
        seed: The run's root seed; each split's own is derived from it and the task's name.
    """
    total, drawn = sum(split.n_examples for split in splits), []
    for split in splits:
        n = min(split.n_examples, max(1, round(n_wanted * split.n_examples / total)))
        generator = generator_for(seed, "replay", split.task)
        drawn.append(np.sort(generator.choice(split.n_examples, size=n, replace=False)))
    return drawn


def lengthen_training(
    settings: TrainingConfig,
    probe: AdaptedModel,
    rows: Rows,
    group: Sequence[int],
    others: Sequence[Sequence[int]],
) -> TrainingConfig:
    """Give a group as many optimiser steps as other groups have on the average, by more epochs; fewer it never gets.

    A task that is alone on few rows has few steps, from which it learns little. The best checkpoint is kept, as ever,
    so that epochs beyond what the rows give cost time and no accuracy; there are at most four times the run's.

    Args:
        settings: Of the run.
        probe: The model, for how rows are laid out in it.
        rows: Of all tasks.
        group: The tasks that are trained.
        others: The other groups.
    """
    epoch, layout = settings.model_copy(update={"num_train_epochs": 1}), choose_layout(probe, settings)

    def count_steps(tasks: Sequence[int]) -> int:
        return len(schedule_training([rows.train[task] for task in tasks], epoch, seed=0, layout=layout))

    wanted = float(np.mean([count_steps(tasks) for tasks in others])) if others else 0.0
    more = min(max(wanted / count_steps(group), 1.0), _MOST_LENGTHENED)
    return settings.model_copy(update={"num_train_epochs": round(settings.num_train_epochs * more)})


@dataclass(frozen=True, eq=False)
class Carrier:
    """Puts adapters into a changed run.

    Attributes:
        source: The earlier run.
        work: The changed one.
        probe: The model.
        groups: The changed run's.
        rows: Of all tasks now.
        store: Their features.
        task: The one that changed.
        training: How a group it changes is trained.
        replay: Of ``onward``: rows of the group's other tasks, over the task's own.
    """

    source: Source
    work: Workspace
    probe: AdaptedModel
    groups: Partition
    rows: Rows
    store: FeatureStore
    task: str
    training: Training
    replay: float

    def names_of(self, group: int) -> frozenset[str]:
        """The tasks of a group, by name."""
        return frozenset(self.rows.names[i] for i in self.groups[group])

    def parent_of(self, group: int) -> int | None:
        """The earlier run's group that a group was, before the task came, went or changed; none for a new one."""
        names = self.names_of(group)
        olds = enumerate(self.source.named_groups)
        return next((g for g, old in olds if old - {self.task} == names - {self.task}), None)

    def is_same(self, group: int) -> bool:
        """Whether nothing changed in a group."""
        parent = self.parent_of(group)
        names = self.names_of(group)
        return parent is not None and self.source.named_groups[parent] == names and self.task not in names

    def is_kept(self, group: int) -> bool:
        """Whether its adapter stays as it is."""
        parent = self.parent_of(group)
        return self.is_same(group) or (self.training == "keep" and parent is not None)

    def is_onward(self, group: int) -> bool:
        """Whether its training goes on from its old adapter."""
        parent = self.parent_of(group)
        return self.training == "onward" and parent is not None and not self.is_same(group)

    def list_trained(self) -> list[int]:
        """The groups that are trained."""
        return [g for g in range(len(self.groups)) if not self.is_kept(g)]

    def pick_rows(self, group: int) -> list[EncodedSplit]:
        """The training rows of a group that is trained, in its order: all, or of ``onward`` the drawn ones."""
        members = self.groups[group]
        every = [self.rows.train[i] for i in members]
        return self._draw(every, self.replay) if self.is_onward(group) else every

    def pick_judges(self, group: int) -> list[EncodedSplit]:
        """The validation rows that judge a group trained onward: the task's own, and about as many of the others'."""
        return self._draw([self.rows.validation[i] for i in self.groups[group]], 1.0)

    def settle_training(self, group: int) -> TrainingConfig:
        """How a group is trained: as in a run, but for the task that changed longer where it is alone."""
        settings = settle_training(self.work.config)
        if self.names_of(group) != {self.task} or self.is_onward(group):
            return settings
        others = [tasks for g, tasks in enumerate(self.groups) if g != group]
        return lengthen_training(settings, self.probe, self.rows, self.groups[group], others)

    def bring(self, stage: StageRun, identities: Mapping[str, str]) -> None:
        """Put adapters in place that are copied or trained onward; the rest is left to the stage."""
        for g, (name, identity) in enumerate(identities.items()):
            if self.work.folder.is_done(name, identity):
                continue
            if self.is_kept(g):
                self._copy(g, name, identity)
            elif self.is_onward(g):
                self._train_onward(g, name, identity, stage)
            elif (settings := self.settle_training(g)) != settle_training(self.work.config):
                bench = Bench(self.work.config, self.work.folder, self.rows, self.probe)
                train_one(bench, name, self.groups[g], settings, identity, stage.meter)

    def list_boosters(self, group: int) -> list[BoostRound]:
        """The boosters that a group had in the earlier run; a new one has none, and none are fitted for it."""
        known = [BoostRound(**entry) for entry in artifacts.read_json(self.source.path / BOOSTING_FILE)]
        parent = self.parent_of(group)
        return [entry for entry in known if entry.accepted and entry.group == parent]

    def find_rounds(self, plan: Plan, members: Sequence[str], stage: StageRun) -> tuple[BoostRound, ...]:
        """Boosters of all groups: copied where they still fit, and fitted anew where they don't."""
        found: list[BoostRound] = []
        for g, member in enumerate(members):
            if not (earlier := self.list_boosters(g)):
                continue
            if self.is_kept(g) or self.is_onward(g):
                copied = self._load_boosters(g, member, earlier)
                found += copied if self.is_kept(g) or self._still_helps(g, member, earlier, copied, stage) else []
            else:
                found += find_boosters(self.work, self.probe, plan, members, self.store, self.rows, stage, only=[g])
        return tuple(found)

    def _parent_adapter(self, group: int) -> str:
        parent = self.parent_of(group)
        assert parent is not None
        return self.source.ensemble.members_of(parent)[0].name

    def _copy(self, group: int, name: str, identity: str) -> None:
        folder, old = self.work.folder.adapter(name), self.source.folder.adapter(self._parent_adapter(group))
        with artifacts.atomic_folder(folder) as scratch:
            shutil.copytree(old, scratch, dirs_exist_ok=True)
        self.work.folder.mark_done(name, identity, files=[folder])

    def _train_onward(self, group: int, name: str, identity: str, stage: StageRun) -> None:
        load_adapter(self.probe, name, self.source.folder.adapter(self._parent_adapter(group)))
        start = adapter_state(self.probe, name)
        self.work.folder.forget(name)
        with stage.meter.part({identity: 1}):
            (trained,) = training.fine_tune_together(
                self.probe,
                [training.TrainingJob(name, self.pick_rows(group), self.pick_judges(group), start=start)],
                self.work.config.training,
                seed=self.work.config.seed,
                checkpoints=self.work.path / _CHECKPOINTS / f"{name}-{identity[:12]}-onward",
                meter=stage.meter,
                keeps_last=True,
            )
        keep_adapter(self.work, self.probe, trained, identity)

    def _draw(self, every: Sequence[EncodedSplit], share: float) -> list[EncodedSplit]:
        """The rows of the task that changed, and so many of the others', over its own."""
        n_own = sum(split.n_examples for split in every if split.task == self.task)
        others = [split for split in every if split.task != self.task]
        drawn = draw_replay(others, round(share * n_own), seed=self.work.config.seed) if others else []
        parts = {split.task: self._take(split, e) for split, e in zip(others, drawn, strict=True)}
        return [parts.get(split.task, split) for split in every]

    def _take(self, split: EncodedSplit, examples: np.ndarray) -> EncodedSplit:
        part = take_examples(split, examples)
        cache = self.probe.prefix.cache if self.probe.prefix is not None else None
        if cache is not None and cache.holds(split):
            cache.enlist_part(part, split, list_rows(split, examples))
        elif cache is not None:  # as a part of the whole it would have all of its rows run
            cache.enlist([part], cleans=False)
        return part

    def _load_boosters(self, group: int, member: str, earlier: Sequence[BoostRound]) -> list[BoostRound]:
        copied = []
        for number, entry in enumerate(earlier, start=1):
            name = f"{member}-boost-{number}"
            load_adapter(self.probe, name, self.source.folder.adapter(entry.name))
            copied.append(replace(entry, name=name, group=group))
        return copied

    def _still_helps(
        self, group: int, member: str, earlier: Sequence[BoostRound], copied: Sequence[BoostRound], stage: StageRun
    ) -> bool:
        """Whether boosters of the old adapter lower the new one's loss, on validation rows of the group's tasks."""
        own = Member(member, 0, "group", 1.0)
        boosted = (own, *(Member(entry.name, 0, "booster", entry.rate) for entry in copied))
        digests = {new.name: self.source.digests[old.name] for new, old in zip(copied, earlier, strict=True)}
        digests |= {member: self.work.adapter_digest(member), THETA0: self.work.start_fingerprint}
        tokens, losses = self.work.config.evaluation.max_tokens_per_batch, []
        for task in self.groups[group]:
            split = self.rows.validation[task]
            names = needed_adapters(boosted, [0], split.kind)
            found = score_members(
                self.work.path,
                self.probe,
                split,
                names,
                digests,
                earlier=(self.source.path,),
                max_tokens=tokens,
                meter=stage.meter,
            )
            both = [sum_groups(found, names, members, [0]) for members in ((own,), boosted)]
            losses.append([float(member_nll(scores, split.labels).mean()) for scores in both])
        plain, with_boosters = np.mean(losses, axis=0)
        return bool(with_boosters < plain)
