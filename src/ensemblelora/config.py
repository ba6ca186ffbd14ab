"""One frozen record per stage; the only place where a default lives.

A recipe is YAML with these keys. Unknown keys are refused, and every fault in a file is reported at once.
Values follow the method's decisions (docs/paper.md); field comments say where a number comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, NonNegativeFloat, ValidationError, model_validator

from ensemblelora.config_adapter import AdapterConfig, keep_own_keys
from ensemblelora.config_errors import list_faults
from ensemblelora.config_model import ModelConfig
from ensemblelora.config_stage import Stage
from ensemblelora.errors import ConfigError, join_faults, quote
from ensemblelora.yamltext import YamlError, parse_yaml

__all__ = [
    "MAX_PROJ_DIM",
    "AdapterConfig",
    "AffinityConfig",
    "BoostingConfig",
    "DataConfig",
    "EnsembleConfig",
    "EstimationConfig",
    "EvaluationConfig",
    "GradientsConfig",
    "GroupingConfig",
    "MaxTokens",
    "ModelConfig",
    "RunConfig",
    "TrainingConfig",
    "dump_config",
    "load_as",
    "load_config",
    "parse_config",
]

MAX_PROJ_DIM = 20_000
"""Numbers of a projected gradient: one Hessian of the subset oracle takes 8 bytes times its square, 3.2 GB."""

MaxTokens = Literal["auto"] | Annotated[int, Field(ge=1)]
"""padded tokens of a pass that keeps no activations; auto: by the memory that is free"""

_Config = TypeVar("_Config", bound=BaseModel)
_Names = Annotated[tuple[str, ...], Field(min_length=1)]
_Pair = Annotated[tuple[str, ...], Field(min_length=2)]


class DataConfig(Stage):
    """Which tasks, and how many rows of each."""

    tasks: tuple[str, ...] = Field(min_length=1, description="Names of shipped cards, card files, or folders.")
    max_train_examples: int | None = Field(None, ge=1, description="Rows kept per task, chosen by seed; none: all.")
    max_validation_examples: int | None = Field(
        None, ge=1, description="Rows kept for choosing: ridge, groups, checkpoint, weights."
    )
    max_test_examples: int | None = Field(None, ge=1, description="Rows kept for the final table.")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="Cut from train where a card names no split.")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="Cut from train where a card names no test split.")
    max_length: int = Field(
        512, ge=8, description="Tokens per row; the context is cut from the left, never the answer."
    )
    overlap: Literal["refuse", "report"] = Field(
        "report", description="What to do with rows shared by splits or tasks."
    )
    seed: int | None = Field(None, ge=0, description="Of the choice and split of rows; none: the run's seed.")


class GradientsConfig(Stage):
    """Projected gradients at the base model, or at a warm-up."""

    linearize_at: Literal["auto", "base", "warmup"] = Field(
        "auto",
        description="warmup: where a short training on all tasks ends, which groups go on from; auto: base, and warmup "
        "for `select`.",
    )
    warmup_epochs: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Of the epochs, those of the warm-up, which groups then don't train; auto: half."
    )
    output: Literal["auto", "margin", "contrast", "logodds", "sequence"] = Field(
        "auto", description="auto: margin for 2 classes, contrast to 8, logodds above, sequence for free text."
    )
    proj_type: Literal["rademacher", "gaussian", "sjlt", "kronecker", "none"] = Field(
        "rademacher", description="sjlt: sparse; kronecker: by factors; none: exact inner products, up to 10,000 rows."
    )
    proj_dim: int = Field(400, ge=1, le=MAX_PROJ_DIM, description="Paper, Table 3: error is flat from 400 on.")
    n_projections: int = Field(
        1, ge=1, le=16, description="Independent ones; predictions are averaged, and their spread enters each interval."
    )
    train_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of each task's training rows whose gradients are taken, drawn by seed: whole groups, labels "
        "in proportion. They stand for all rows, in boosting too. The pass gets cheaper by as much; what predictions "
        "lose is to be measured, with `compare --methods ours,ours-half-features`.",
    )
    validation_fraction: float = Field(
        1.0, gt=0, le=1, description="The same of the validation rows that predictions are made on; intervals widen."
    )
    max_tokens_per_batch: int = Field(2048, ge=1, description="Padded tokens of one gradient pass; bounds its memory.")


class EstimationConfig(Stage):
    """The subset oracle's fit of the linear model."""

    method: Literal["steps", "ridge"] = Field(
        "steps", description="steps: as many optimiser steps as the training would take; ridge: the convex fit, paper."
    )
    l2_penalty: Literal["auto"] | NonNegativeFloat = Field(
        "auto", description="In curvature units, scaled with 1/N_S; auto: by validation."
    )
    l2_grid: tuple[float, ...] = Field((1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2), description="What auto tries.")
    balance: Literal["example", "task"] = Field("example", description="Whether each example or each task counts once.")
    max_iter: int = Field(100, ge=1, description="Evaluations of one fit.")
    tolerance: float = Field(1e-6, gt=0, description="Largest gradient norm of a finished fit.")


class AffinityConfig(Stage):
    """Which subsets are asked about, and what of the answers enters the matrix."""

    subset_size: int = Field(3, ge=1, description="Paper: 3; at most one less than the tasks.")
    n_subsets: int = Field(200, ge=1, description="Paper: 200; every subset when there are fewer.")
    min_pair_count: int = Field(3, ge=0, description="Every pair of tasks meets at least so often.")
    score: Literal["nll", "accuracy"] = Field("nll", description="nll enters with its sign turned: higher is better.")
    row_scale: Literal["none", "sd"] = Field("none", description="sd: divide each task's row by its spread.")
    surrogate: Literal["linear", "kernel"] = Field(
        "linear", description="What fills pairs that no subset holds, and smooths the matrix of more than 40 tasks."
    )


_MOST_GROUPS = 6
"""As many as the paper looks at."""

_MOST_ALONE = 20
"""Tasks that may each get an adapter unasked."""


class GroupingConfig(Stage):
    """How many groups, which, and when not to group at all."""

    n_groups: Literal["auto"] | int = Field("auto", description="auto: by predicted performance; may be 1.")
    max_groups: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="auto: 6, and one a task where there are at most 20 of them. Paper varies 2 to 6."
    )
    rounding: Literal["best", "threshold"] = Field("best", description="threshold: the paper's, with components.")
    threshold: float = Field(1.0, ge=1.0, description="c in the paper's c/n threshold.")
    n_restarts: int = Field(20, ge=1, description="Starts of k-means and random starts.")
    n_random_partitions: int = Field(20, ge=0, description="Random groups of the same sizes, to compare with.")
    refine: bool = Field(True, description="Let a local search on predicted performance improve the rounded groups.")
    max_memory_bytes: int | None = Field(None, ge=1, description="Refuse group counts whose adapters need more.")
    max_latency_ratio: float | None = Field(None, ge=1, description="Inference forward passes against one adapter.")
    min_group_size: int = Field(1, ge=1, description="Tasks of a group, at least.")
    max_group_size: int | None = Field(None, ge=1, description="Tasks of a group, at most; none: no limit.")
    must_link: tuple[_Pair, ...] = Field((), description="Lists of tasks, by name, that share a group.")
    cannot_link: tuple[_Pair, ...] = Field((), description="Lists of tasks no two of which share a group.")
    groups: tuple[_Names, ...] | None = Field(
        None, description="Groups given by hand, as lists of tasks, every task once; they are judged as any others."
    )

    @property
    def n_groups_asked(self) -> int | None:
        """The number of groups that was set, by itself or with the groups; none where it is to be chosen."""
        if self.groups is not None:
            return len(self.groups)
        return None if self.n_groups == "auto" else self.n_groups

    def list_numbers(self, n_tasks: int) -> list[int]:
        """Return the numbers of groups, in rising order, among which the plan chooses where none is set.

        One a task is a number like any other, but for the paper's own way to round, and where there are so many tasks
        that fitting weights, every adapter on every task's validation rows, would cost more than the training.
        """
        if self.max_groups != "auto":
            return list(range(1, min(self.max_groups, n_tasks) + 1))
        numbers = list(range(1, min(_MOST_GROUPS, n_tasks) + 1))
        with_alone = _MOST_GROUPS < n_tasks <= _MOST_ALONE and self.rounding == "best"
        return [*numbers, n_tasks] if with_alone else numbers


class TrainingConfig(Stage):
    """Fine-tuning one adapter, in transformers' own words."""

    learning_rate: float = Field(5e-4, gt=0, description="Paper: 2e-5 at 8B; this suits 135M.")
    num_train_epochs: int = Field(3, ge=1, description="Paper: 10.")
    max_tokens_per_batch: int = Field(2048, ge=1, description="Padded tokens in one optimiser step.")
    max_examples_per_batch: int = Field(16, ge=1, description="Examples in one optimiser step.")
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this norm.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field("linear", description="After the warm-up.")
    loss: Literal["label_softmax", "vocab_softmax"] = Field(
        "label_softmax", description="Cross-entropy over a task's labels, or the paper's over the vocabulary."
    )
    sampling: Literal["proportional", "sqrt", "uniform"] = Field(
        "proportional", description="Share of each task in an epoch, by its rows. Paper: proportional."
    )
    evaluations_per_epoch: int = Field(1, ge=1, description="Each may become the checkpoint that is kept.")
    gradient_checkpointing: bool = Field(False, description="Less memory, a third more time.")
    compile: bool = Field(
        False, description="torch.compile the model; pays in long runs on a GPU, takes minutes first on a processor."
    )
    together: bool = Field(
        False, description="Train all groups' adapters in one pass over the base; pays where one group leaves it idle."
    )
    report_to: tuple[str, ...] = Field((), description="Experiment trackers, as transformers names them.")


class BoostingConfig(Stage):
    """Adapters added where a group still errs."""

    n_rounds: int = Field(
        1, ge=0, description="Each of the group with the largest training loss, kept or not. Paper: 1."
    )
    boosting_rate: float = Field(
        0.3, gt=0, le=1, description="Share of the searched step that is added; the paper uses 0.1 without a search."
    )
    direction: Literal["dual", "projected", "steps"] = Field(
        "dual", description="dual: weighted gradient; projected: the paper's P w; steps: optimiser steps."
    )
    l2_penalty: float = Field(1.0, gt=0, description="Ridge of the residual fit, in curvature units.")
    line_search: bool = Field(True, description="Find the step's length by true forward passes.")
    n_steps: int = Field(32, ge=1, description="Optimiser steps of direction: steps.")
    learning_rate: float = Field(5e-4, gt=0, description="Of direction: steps.")
    tolerance: float = Field(1e-4, ge=0, description="Smallest relative drop of training loss that counts.")
    min_errors: float = Field(1.0, ge=0, description="Standard errors by which held-out loss has to drop.")


class EnsembleConfig(Stage):
    """How members are combined."""

    weights: Literal["task", "global", "uniform", "own"] = Field(
        "task", description="Fitted per task or for all; equal; or each task's own group alone."
    )
    combine: Literal["logits", "probabilities"] = Field("logits", description="What is averaged. Paper: outputs.")
    route: bool = Field(
        False, description="Run one group alone for tasks whose weights gain no more than a standard error over it."
    )
    max_candidates: int | None = Field(
        4, ge=1, description="Groups that compete for a task: its own and those predicted best for it; none: all."
    )
    min_weight: float = Field(
        0.02, ge=0, lt=0.5, description="Least weight of a group that is run; of weights per task also twice its prior."
    )
    own_group_prior: float = Field(0.9, gt=0, le=1, description="Prior weight of a task's own group.")
    kl_penalty: Literal["auto"] | NonNegativeFloat = Field(
        "auto", description="Pull to the prior; auto: by 5-fold validation."
    )

    def count_candidates(self, n_groups: int) -> int:
        """Return how many of m groups compete for each task."""
        if self.weights == "own":
            return 1
        return min(n_groups, self.max_candidates or n_groups) if self.weights == "task" else n_groups


class EvaluationConfig(Stage):
    """The final table."""

    baselines: tuple[Literal["base", "shared"], ...] = Field(
        ("base", "shared"), description="base: the model as it is; shared: one adapter for all tasks."
    )
    n_bootstrap: int = Field(2000, ge=100, description="Draws of groups of rows for each interval.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Of the intervals.")
    max_tokens_per_batch: MaxTokens = Field(
        "auto",
        description="Padded tokens of one forward pass; auto: by the free memory, up to 4,096 (processor) or 8,192.",
    )


_PAPER: Mapping[str, Mapping[str, Any]] = {
    "data": {"validation_fraction": 0.1},
    "adapter": {"r": 4, "reduction": 256},
    "gradients": {"output": "logodds", "proj_type": "gaussian", "proj_dim": 400},
    "estimation": {"method": "ridge", "balance": "example"},
    "affinity": {"subset_size": 3, "n_subsets": 200, "min_pair_count": 0, "score": "nll", "row_scale": "none"},
    "grouping": {"max_groups": 6, "rounding": "threshold", "threshold": 1.0, "refine": False},
    "training": {"learning_rate": 2e-5, "num_train_epochs": 10, "loss": "vocab_softmax", "sampling": "proportional"},
    "boosting": {"boosting_rate": 0.1, "direction": "projected", "line_search": False, "min_errors": 0.0},
    "ensemble": {
        "weights": "global",
        "combine": "logits",
        "kl_penalty": 0.0,
        "min_weight": 0.0,
        "max_candidates": None,
    },
}
"""The paper's values and readings, also where our defaults are the same; their sources are in docs/decisions."""


class RunConfig(Stage):
    """Everything one run needs."""

    out: str = Field("runs/latest", description="The run folder.")
    seed: int = Field(0, ge=0, description="Root of all randomness.")
    compat: Literal["none", "paper"] = Field(
        "none", description="paper: where a key is left out, the paper's value or reading instead of ours."
    )
    data: DataConfig
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    gradients: GradientsConfig = GradientsConfig()
    estimation: EstimationConfig = EstimationConfig()
    affinity: AffinityConfig = AffinityConfig()
    grouping: GroupingConfig = GroupingConfig()
    training: TrainingConfig = TrainingConfig()
    boosting: BoostingConfig = BoostingConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        """Write a preset's values where the keys are missing, so that a config that states every key stays as it is."""
        if not isinstance(values, dict) or values.get("compat") != "paper":
            return values
        filled = dict(values)
        for stage, preset in _PAPER.items():
            given = values.get(stage, {})
            keys = given.model_dump(exclude_unset=True) if isinstance(given, BaseModel) else given
            if isinstance(keys, dict):  # anything else is refused as it arrived
                own = keep_own_keys(preset, keys.get("method", "lora")) if stage == "adapter" else preset
                filled[stage] = {**own, **keys}
        return filled


def parse_config(values: dict[str, Any], *, source: str = "config") -> RunConfig:
    """Check a nested dict and return the frozen config.

    Raises:
        ConfigError: Names every fault at once: key, what arrived, what was expected.
    """
    return _parse(RunConfig, values, source, ())


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML recipe and apply ``a.b=c`` overrides.

    Raises:
        ConfigError: If the file is missing, is not YAML, or holds any wrong key or value.
    """
    return load_as(RunConfig, path, overrides)


def load_as(kind: type[_Config], path: Path, overrides: tuple[str, ...] = ()) -> _Config:
    """Read a YAML recipe of another kind than a run's; as :func:`load_config`."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except YamlError as error:
        raise ConfigError(f"config {path}: not valid YAML: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config {path}: cannot be read ({error}); give a YAML recipe") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected a mapping of stages, got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return _parse(kind, values, str(path), [override.partition("=")[0] for override in overrides])


def dump_config(config: BaseModel) -> str:
    """Return the fully resolved config as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse(kind: type[_Config], values: dict[str, Any], source: str, changed: Sequence[str]) -> _Config:
    """Check values, and blame a wrong one on ``--set`` where its key is one of ``changed``, else on the source."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = list_faults(error, kind)
    by_set = [f"--set {told}" for where, told in faults if _is_among(where, changed)]
    others = [told for where, told in faults if not _is_among(where, changed)]
    raise ConfigError("; ".join([*([f"{source}: {join_faults(others)}"] if others else []), *by_set]))


def _is_among(where: str, keys: Sequence[str]) -> bool:
    """Whether a place in the config is one of some keys, in one, or a section that one of them opened."""
    return any(f"{where}.".startswith(f"{key}.") or key.startswith(f"{where}.") for key in keys)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {quote(override)}: expected KEY=VALUE, such as training.num_train_epochs=1")
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {quote(override)}: {parent!r} holds a value, not a section")
    try:
        node[last] = parse_yaml(text)
    except YamlError:
        raise ConfigError(f"--set {quote(override)}: the value is not valid YAML") from None
