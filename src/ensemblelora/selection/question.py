"""From a finished feature store to the question that searches answer, written down so that it can be asked again.

In: features, sources, and what a fine-tuning would do. Out: a :class:`~.prospect.Prospect`, and in ``oracle.json`` all
that it is made of beside the features, so that :func:`read_prospect` needs no model. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora import artifacts
from ensemblelora.blocks import slice_projections
from ensemblelora.config import EstimationConfig, load_config
from ensemblelora.errors import StoreError, UsageError
from ensemblelora.estimation import (
    Oracle,
    PenaltyTrial,
    TaskFeatures,
    TrainingBudget,
    build_oracle,
)
from ensemblelora.selection.prospect import Prospect
from ensemblelora.selection.sources import Source, cut_blocks
from ensemblelora.store import FeatureStore

__all__ = ["ORACLE_FILE", "SELECTION_FOLDER", "Question", "make_prospect", "read_prospect", "write_question"]

SELECTION_FOLDER = "selection"
"""in a run folder; holds one folder a target"""
ORACLE_FILE = "oracle.json"


@dataclass(frozen=True, eq=False)
class Question:
    """Everything that is asked about.

    Attributes:
        tasks: Names of all datasets, in the order of the store.
        target: Index of the target.
        sources: What can be chosen.
        includes_target: Whether the target's training rows are in every set.
        n_projections: Side by side in the store.
        n_train: Training rows of the target and each source, where features are of a share; none: of all.
    """

    tasks: tuple[str, ...]
    target: int
    sources: tuple[Source, ...]
    includes_target: bool
    n_projections: int = 1
    n_train: tuple[int, ...] | None = None

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(source.name for source in self.sources)

    def cut(self, store: FeatureStore) -> list[TaskFeatures]:
        """Read the features of the target and the sources, in this order, under each projection.

        Sources are learnt from and never judged: of validation rows, the target's are all.
        """
        train = cut_blocks([store.read(name, "train") for name in self.tasks], self.target, self.sources)
        held = store.read(self.tasks[self.target], "validation")
        width = held.proj_dim // self.n_projections
        return [
            TaskFeatures(
                train=tuple(slice_projections(block, width, which) for block in train),
                validation=(slice_projections(held, width, which),),
                n_train=self.n_train,
            )
            for which in range(self.n_projections)
        ]


def make_prospect(
    question: Question, store: FeatureStore, config: EstimationConfig, budget: TrainingBudget | None
) -> Prospect:
    """Make the oracle of a target; a ridge is chosen by the target's loss with no source, each one, and all.

    Args:
        question: Target and sources.
        store: Their features.
        config: Settings of the fits.
        budget: What method ``steps`` simulates.
    """
    own = (0,) if question.includes_target else ()
    n = len(question.sources)
    asked = [own, *((*own, 1 + j) for j in range(n)), (*own, *range(1, n + 1))]
    features = question.cut(store)
    oracle = build_oracle(features, config, subsets=[s for s in asked if s], budget=budget, judges=(0,))
    return Prospect(oracle, question.includes_target)


def write_question(folder: Path, question: Question, oracle: Oracle) -> None:
    """Write down, in a target's folder, what :func:`read_prospect` makes the same oracle of."""
    sources = [{"name": s.name, "task": s.task, "rows": None if s.rows is None else s.rows.tolist()} for s in
               question.sources]  # fmt: skip
    content = asdict(replace(question, sources=())) | {
        "sources": sources,
        "l2_penalty": oracle.l2_penalty,
        "penalty_table": [asdict(trial) for trial in oracle.penalty_table],
        "budget": None if oracle.budget is None else asdict(oracle.budget),
    }
    artifacts.write_json(folder / ORACLE_FILE, content)


def read_prospect(run: Path | str, target: str) -> tuple[Prospect, Question]:
    """Open a finished run folder to search again; no model is loaded.

    Args:
        run: The run folder of a selection.
        target: One that was asked about there.

    Raises:
        UsageError: If there was none.
        StoreError: If its record or the features are damaged.

    Example:
        >>> from ensemblelora.selection.question import read_prospect
        >>> prospect, question = read_prospect("runs/mine-select", "rte")  # doctest: +SKIP
        >>> prospect.score([(), (0,), (0, 2)]).values  # doctest: +SKIP
        array([0.68, 0.66, 0.64])
    """
    path = artifacts.RunFolder.open(run).path
    file = path / SELECTION_FOLDER / target / ORACLE_FILE
    if not file.exists():
        raise UsageError(f"{path}: nothing was selected for {target!r} here; run: ensemblelora select {path} --target")
    record = artifacts.read_json(file)
    try:
        question, budget = _parse(record), record["budget"] and TrainingBudget(**_as_tuples(record["budget"]))
        penalty, table = float(record["l2_penalty"]), tuple(PenaltyTrial(**one) for one in record["penalty_table"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{file}: no record of a selection ({error!r}); delete it and run again") from None
    features = tuple(question.cut(FeatureStore(path / artifacts.FEATURES_FOLDER)))
    config = load_config(path / artifacts.CONFIG_FILE).estimation
    oracle = Oracle(features, penalty, config, table, budget, judges=(0,))
    return Prospect(oracle, question.includes_target), question


def _parse(record: Mapping[str, Any]) -> Question:
    sources = tuple(
        Source(one["name"], int(one["task"]), None if one["rows"] is None else np.array(one["rows"], np.int64))
        for one in record["sources"]
    )
    counts: Sequence[int] | None = record["n_train"]
    return Question(
        tasks=tuple(record["tasks"]),
        target=int(record["target"]),
        sources=sources,
        includes_target=bool(record["includes_target"]),
        n_projections=int(record["n_projections"]),
        n_train=None if counts is None else tuple(counts),
    )


def _as_tuples(budget: Mapping[str, Any]) -> dict[str, Any]:
    return {**budget, "steps_per_epoch": tuple(budget["steps_per_epoch"])}
