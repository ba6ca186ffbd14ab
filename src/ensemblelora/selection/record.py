"""What a selection found, in one record: ``selection.json``. No torch.

In: the parts, as they come. Out: :class:`SelectionRecord`, and its plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ensemblelora.evaluation.metrics import TaskScores
from ensemblelora.selection.caveats import Better
from ensemblelora.selection.prospect import Choice
from ensemblelora.selection.strategies import Selection

__all__ = [
    "RECORD_FILE",
    "SAMPLES_FILE",
    "Change",
    "Costs",
    "Final",
    "FinalTable",
    "RowSummary",
    "SelectionRecord",
    "SourceRecord",
]

RECORD_FILE = "selection.json"
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class SourceRecord:
    """One source.

    Attributes:
        name: The dataset's, or its cluster's.
        task: The dataset's.
        n_rows: Training rows.
        likeness: How alike it is to the target, by kind: ``gradients``, ``texts``.
        examples: Of a cluster, how the texts of its most typical rows begin.
    """

    name: str
    task: str
    n_rows: int
    likeness: Mapping[str, float]
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowSummary:
    """Rows of one source, valued one by one.

    Attributes:
        source: Its name.
        n_rows: Valued.
        mean: Mean rise of the target's predicted loss without a row, nats.
        share_harmful: Share of rows without which the loss would fall.
    """

    source: str
    n_rows: int
    mean: float
    share_harmful: float


@dataclass(frozen=True)
class Costs:
    """FLOPs of choosing, and seconds as measured.

    Attributes:
        warmup_flops: The training to where features are taken, whenever it was made.
        feature_flops: The gradient pass, all of its parts, whenever they were made.
        search_flops: Of each strategy.
        seconds: What this command took of it.
        new_warmup_flops: What this command spent on the warm-up.
        new_feature_flops: What it spent on the gradient pass.
        true_forward_flops: If every set that the search forward asks about were fine-tuned; none where it was not
            carried out, or the model has no formula.
    """

    warmup_flops: int
    feature_flops: int
    search_flops: Mapping[str, int]
    seconds: float
    true_forward_flops: int | None
    new_warmup_flops: int
    new_feature_flops: int

    @property
    def speed_up(self) -> float | None:
        """Truly fine-tuning every set that the search forward asks about, over predicting it."""
        if self.true_forward_flops is None:
            return None
        spent = self.warmup_flops + self.feature_flops + self.search_flops["forward"]
        return self.true_forward_flops / spent if spent else None


@dataclass(frozen=True)
class Final:
    """One method's fine-tuning.

    Attributes:
        method: A strategy's name, or a baseline's.
        sources: What it trained on beside the target's rows, where these are in every set.
        adapter: Folder name of its adapter; theta0 for none at all.
        train_flops: Of the fine-tuning.
        train_seconds: Measured.
        n_steps: Optimiser steps.
        validation_nll: The target's, of the checkpoint kept; none where nothing was trained.
    """

    method: str
    sources: Choice
    adapter: str
    train_flops: int = 0
    train_seconds: float = 0.0
    n_steps: int = 0
    validation_nll: float | None = None


@dataclass(frozen=True)
class Change:
    """One method's test rows against another's: mean of a - b, and its interval."""

    a: str
    b: str
    metric: str
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class FinalTable:
    """Test scores of every method on the target's rows, and differences between methods."""

    scores: Mapping[str, TaskScores]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class SelectionRecord:
    """Everything a selection found.

    Attributes:
        folder: Where it lies.
        target: The task that counts.
        includes_target: Whether its training rows are in every set.
        n_clusters: Parts that each source was cut into; none: whole datasets.
        linearize_at: Where features were taken.
        estimation: The oracle's method.
        confidence: Of the intervals.
        n_validation: Of the target's rows, those predictions are made on.
        n_test: Of the target's rows, those that were scored at the end.
        model: Name of the base model.
        sources: What could be chosen.
        strategies: What each chose.
        baselines: What other ways took: ``none``, ``all``, and the most alike by ``gradients`` and ``texts``.
        finals: Fine-tunings on what was chosen; empty where only the search was asked for.
        test: Their test scores; none where there are none.
        costs: What it took.
        rivals: What searches that nobody asked for would have chosen; they are never trained.
        better: The choice of another strategy that is predicted to be better than the first one's, if one is.
        warnings: What to keep in mind about the first strategy's choice.
        rows: Rows of each source, where they were valued.
        asked: What was asked for, as the next selection in this folder compares it.
        set_aside: Where an earlier selection with other options is kept; none: there was none.
    """

    folder: Path
    target: str
    includes_target: bool
    n_clusters: int | None
    linearize_at: str
    estimation: str
    confidence: float
    n_validation: int
    n_test: int
    model: str
    sources: tuple[SourceRecord, ...]
    strategies: tuple[Selection, ...]
    baselines: Mapping[str, Choice]
    costs: Costs
    rivals: tuple[Selection, ...] = ()
    better: Better | None = None
    warnings: tuple[str, ...] = ()
    finals: tuple[Final, ...] = ()
    test: FinalTable | None = None
    rows: tuple[RowSummary, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)
    set_aside: Path | None = None

    def name_sources(self, choice: Choice) -> list[str]:
        """Names of chosen sources."""
        return [self.sources[j].name for j in choice]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; sources by name."""
        plain = asdict(self)
        better = [] if plain["better"] is None else [plain["better"]]
        for found in (*plain["strategies"], *plain["rivals"], *plain["finals"], *better):
            found["sources"] = self.name_sources(found["sources"])
            for move in found.get("moves", ()):
                move |= {key: self.name_sources(move[key]) for key in ("added", "dropped")}
        plain["baselines"] = {name: self.name_sources(choice) for name, choice in self.baselines.items()}
        plain["costs"]["speed_up"] = self.costs.speed_up
        return plain
