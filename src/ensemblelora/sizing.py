"""What a run would cost on another machine: from a model's config, sizes of the data and a machine's. No torch.

In: the config of a run, the ``config.json`` of a model that need not be there, a :class:`DataSize`, a :class:`Machine`.
Out: a :class:`StageSize` a stage. FLOPs are those of :mod:`~ensemblelora.accounting.formulas` for rows of one length;
seconds are FLOPs over what so many devices do, at rates that a run measured or at the stated utilisation. Blocks below
the lowest adapted one count once a row that fits ``model.prefix_cache_gb``, and with every pass of one that does not.
Activations are estimated at 34 h bytes a token and layer in 16 bits (Korthikanti et al. 2022, without attention's
square), an upper bound for a frozen base. What depends on the outcome is counted at its most, as
:mod:`~ensemblelora.forecast` counts it; the epochs of a warm-up are counted with those of the groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ensemblelora.accounting.adapter_shapes import AdapterShape, bottleneck_shape, lora_shape
from ensemblelora.accounting.formulas import (
    Workload,
    count_forward_flops,
    count_gradient_pass_flops,
    count_oracle_flops,
    count_training_step_flops,
    feature_bytes,
)
from ensemblelora.accounting.shapes import ModelShape, model_shape
from ensemblelora.config import AdapterConfig, RunConfig
from ensemblelora.counting import PassCosts
from ensemblelora.errors import ConfigError, ModelError, first_line
from ensemblelora.machines import Machine

__all__ = ["DataSize", "StageSize", "read_model_shape", "size_run"]

_ATTENTION = ("query", "key", "value", "fused", "attention_out")
_BOOST_PASSES = 4 + 3  # forward passes over the training rows in one round, at most
_STEP_FLOPS = 6  # of a simulated step, for each number of a row's gradient
_FIT_FLOPS = 4 * 30  # of a ridge fit of some thirty evaluations
_PIECE = 4096  # rows of a job
_PROCESS_BYTES, _ORACLE_BYTES = 7 * 10**8, 5 * 10**8  # Python and torch; what the oracle holds beside the features
_ROW_BYTES = 220  # of a row however long, at the most while it is read; token ids lie in mapped files


@dataclass(frozen=True)
class DataSize:
    """All tasks' rows together, each of ``n_tokens`` and with ``n_classes`` answers that are words."""

    n_tasks: int
    n_train: int
    n_validation: int
    n_test: int
    n_tokens: int
    n_classes: int = 2

    def work(self, n_rows: int) -> Workload:
        """What passes through the model with some rows."""
        n_logits = n_rows * self.n_classes
        return Workload(n_rows, n_rows * self.n_tokens, n_rows * self.n_tokens**2, n_logits)


@dataclass(frozen=True)
class StageSize:
    """One stage's expected cost."""

    seconds: float
    flops: int
    disk_bytes: int
    memory_bytes: int
    """of one device"""
    n_devices: int
    """that work at once"""
    fits: bool
    """whether a device has the memory"""
    per_job: int = 1
    """devices that one job holds: more where the model is laid out over several"""
    host_bytes: int = 0
    """of the process that was started, beside weights on their way to a device; of the oracle, of each job"""


@dataclass(frozen=True)
class _Layout:
    """How a model lies on devices.

    Attributes:
        n_held: Devices of a job.
        share: Of the blocks' weights, on one of them.
        activations: Share of a training step's, on one of them.
        shares_steps: Whether they work at once in training, each at its share of a step.
    """

    n_held: int = 1
    share: float = 1.0
    activations: float = 1.0
    shares_steps: bool = False

    def find_speed(self, stage: str, n_devices: int, n_jobs: int) -> tuple[int, float]:
        """How many devices work at once in a stage of so many jobs, and what one of them holds of the activations."""
        if self.shares_steps:
            return (self.n_held, self.activations) if stage in ("train", "baselines") else (1, 1.0)
        return min(n_devices // self.n_held, n_jobs), self.activations


@dataclass(frozen=True)
class _Plan:
    """What is run."""

    config: RunConfig
    costs: PassCosts
    data: DataSize
    n_members: int
    unkept: tuple[float, float]
    """shares of the training and validation rows whose lower blocks are run with every pass"""

    def forward(self, n_rows: int) -> int:
        """FLOPs of the adapted blocks and the output layer."""
        return count_forward_flops(self.costs.upper.shape, self.data.work(n_rows), self.costs.upper.adapter)

    def below(self, n_rows: float) -> int:
        """FLOPs of the blocks below, which no adapter changes."""
        return count_forward_flops(self.costs.lower, replace(self.data.work(round(n_rows)), n_logits=0))


def read_model_shape(name: str) -> ModelShape:
    """Read a model's sizes off its ``config.json``; the weights need not be there.

    Args:
        name: The file, or the folder it lies in.

    Raises:
        ModelError: If there is none, or of a family without a formula.
    """
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r}: its config.json can't be read ({first_line(error)}); name it or its folder with --model"
        ) from None
    return model_shape(content)


def size_run(config: RunConfig, shape: ModelShape, data: DataSize, machine: Machine) -> dict[str, StageSize]:
    """Predict the cost of every stage on a machine, and their total.

    Args:
        config: Adapter, features, oracle, training, boosting.
        shape: The model.
        data: Rows.
        machine: Where.

    Raises:
        ConfigError: If the config asks for a kind of adapter or projection without a closed form here.
    """
    adapter = _find_adapter(config.adapter, shape)
    n_groups = config.grouping.n_groups_asked or config.grouping.list_numbers(data.n_tasks)[-1]
    n_members, one = n_groups + config.boosting.n_rounds, adapter.n_bytes()
    costs = PassCosts(shape, adapter, n_lower=next(i for i, sites in enumerate(adapter.layers) if sites))
    held = _hold(config, costs, one)
    layout = _choose_layout(config, shape, machine, n_members * one + max(held.values()))
    is_spread = machine.n_devices >= 2 * layout.n_held  # jobs run side by side
    kept = _keep(config, costs, data, is_spread=is_spread or layout.shares_steps)
    unkept = (1 - kept[0] / data.n_train, 1 - kept[1] / data.n_validation if data.n_validation else 0.0)
    plan = _Plan(config, costs, data, n_members, unkept)
    flops, disk = _count_passes(plan), _fill_disk(config, data, n_groups, one)
    flops["features"] += plan.below(sum(kept))
    disk["features"] += sum(kept) * data.n_tokens * _width(config, shape)
    n_beside = machine.n_devices // layout.n_held - ("shared" in config.evaluation.baselines)  # its job runs meanwhile
    at_once = {"features": -(-_size_features(config, data)[0] // _PIECE), "train": min(n_groups, max(1, n_beside))}
    weights = _weigh(config, shape, layout.share) + n_members * one
    host = _PROCESS_BYTES + (data.n_train + data.n_validation + data.n_test) * _ROW_BYTES
    stages = {"affinity": _size_oracle(config, data, machine, layout)}
    for name, work in flops.items():
        n_devices, share = layout.find_speed(name, machine.n_devices, at_once.get(name, 1))
        memory = weights + round(share * held.get(name, 0))
        seconds, fits = work / (n_devices * machine.rate_of(name)), memory <= machine.memory_gb * 1e9
        stages[name] = StageSize(seconds, work, disk.get(name, 0), memory, n_devices, fits, layout.n_held, host)
    if "shared" not in config.evaluation.baselines:
        del stages["baselines"]
    order = ("features", "affinity", "train", "boost", "combine", "baselines", "evaluate")
    found = {name: stages[name] for name in order if name in stages}
    return found | {"total": _add_up(found, is_spread=is_spread)}


def _size_oracle(config: RunConfig, data: DataSize, machine: Machine, layout: _Layout) -> StageSize:
    """The stage that asks the oracle, on processors alone."""
    n_jobs, flops = 1 if layout.shares_steps else machine.n_devices, _count_oracle(config, data)
    host = _PROCESS_BYTES + _ORACLE_BYTES + feature_bytes(*_size_features(config, data))
    return StageSize(flops / (n_jobs * machine.host_flops), flops, 0, 0, n_jobs, True, 0, host)


def _hold(config: RunConfig, costs: PassCosts, one: int) -> dict[str, int]:
    """Bytes of activations in every stage that takes gradients, and of a training's state."""
    batches = (config.gradients.max_tokens_per_batch, config.training.max_tokens_per_batch)
    gradients, training = (_activations(config, costs, n_tokens) for n_tokens in batches)
    return {"features": gradients, "boost": gradients, "train": training + 3 * one, "baselines": training + 3 * one}


def _choose_layout(config: RunConfig, shape: ModelShape, machine: Machine, others: int) -> _Layout:
    """How the config lays the model out; over as few devices of a job as hold it beside ``others``."""
    if config.model.device_map == "fsdp" and machine.n_devices > 1:
        part = 1 / machine.n_devices
        return _Layout(machine.n_devices, min(1.0, part + 1 / shape.n_layers), part, shares_steps=True)
    if config.model.device_map == "one":
        return _Layout()
    n, layout = 0, _Layout()
    for n in range(1, machine.n_devices + 1):
        share = -(-shape.n_layers // n) / shape.n_layers
        layout = _Layout(n, share, share)
        if _weigh(config, shape, share) + others <= machine.memory_gb * 1e9:
            break
    return layout


def _keep(config: RunConfig, costs: PassCosts, data: DataSize, *, is_spread: bool) -> tuple[int, int]:
    """Training and validation rows whose activations below the adapted blocks are kept: whole splits, in order."""
    if not costs.n_lower or (config.model.device_map == "fsdp" and is_spread):
        return 0, 0
    room, kept = config.model.prefix_cache_gb * 1e9, []
    for n_rows in (data.n_train, data.n_validation):
        each = max(1, n_rows // data.n_tasks)
        size = each * data.n_tokens * _width(config, costs.shape)
        n_splits = 0 if is_spread and each > _PIECE else min(data.n_tasks, int(room // size))
        room -= n_splits * size
        kept.append(n_rows if n_splits == data.n_tasks else n_splits * each)
    return kept[0], kept[1]


def _width(config: RunConfig, shape: ModelShape) -> int:
    """Bytes of a token's activations between two blocks."""
    return shape.hidden_size * (4 if config.model.dtype == "float32" else 2)


def _fill_disk(config: RunConfig, data: DataSize, n_groups: int, one: int) -> dict[str, int]:
    """Bytes that every stage leaves."""
    boosters = config.boosting.n_rounds * one
    features = feature_bytes(*_size_features(config, data))
    return {"features": features, "train": n_groups * one, "baselines": one, "boost": boosters}


def _size_features(config: RunConfig, data: DataSize) -> tuple[int, int]:
    """Gradients that are kept, and numbers of each."""
    settings = config.gradients
    n_rows = round(data.n_train * settings.train_fraction) + round(data.n_validation * settings.validation_fraction)
    return n_rows * max(1, data.n_classes - 1), settings.n_projections * settings.proj_dim


def _count_passes(plan: _Plan) -> dict[str, int]:
    """FLOPs of every stage that runs the model; lower blocks of kept rows are not among them."""
    config, data, n_rounds, upper = plan.config, plan.data, plan.config.boosting.n_rounds, plan.costs.upper
    gradients, training = config.gradients, config.training
    if gradients.proj_type not in ("rademacher", "gaussian"):
        raise ConfigError(f"gradients.proj_type {gradients.proj_type}: sized are rademacher and gaussian")
    n_train = round(data.n_train * gradients.train_fraction)
    n_validation = round(data.n_validation * gradients.validation_fraction)
    n_each = max(1, data.n_classes - 1)
    is_moved = gradients.linearize_at == "warmup"
    n_coordinates = upper.adapter.n_parameters if is_moved else upper.adapter.n_output_parameters
    features = count_gradient_pass_flops(
        upper.shape,
        data.work(n_train + n_validation),
        upper.adapter,
        n_backwards=n_each,
        n_outputs=(n_train + n_validation) * n_each,
        projection_flops=2 * n_coordinates * gradients.n_projections * gradients.proj_dim,
        reaches_down=is_moved,
    )
    below_train, below_validation = (
        plan.below(share * n) for share, n in zip(plan.unkept, (data.n_train, data.n_validation), strict=True)
    )
    one_epoch = count_training_step_flops(upper.shape, data.work(data.n_train), upper.adapter) + below_train
    n_checks = 1 + training.num_train_epochs * training.evaluations_per_epoch  # the first before any step
    checks = n_checks * (plan.forward(data.n_validation) + below_validation)
    trained = training.num_train_epochs * one_epoch + checks
    direction = count_training_step_flops(upper.shape, data.work(n_train), upper.adapter)
    n_below = plan.unkept[0] * n_train
    n_asked = config.ensemble.count_candidates(plan.n_members - n_rounds) + n_rounds
    boost = _BOOST_PASSES * plan.forward(n_train) + direction + (_BOOST_PASSES + 1) * plan.below(n_below)
    return {
        "features": features + plan.below(n_below + plan.unkept[1] * n_validation),
        "train": trained,
        "boost": n_rounds * (boost + plan.forward(data.n_validation) + below_validation),
        "combine": n_asked * plan.forward(data.n_validation) + below_validation,
        "baselines": trained,
        "evaluate": (n_asked + len(config.evaluation.baselines)) * plan.forward(data.n_test) + plan.below(data.n_test),
    }


def _count_oracle(config: RunConfig, data: DataSize) -> int:
    """FLOPs of fitting the subsets, and of asking each about all validation rows."""
    affinity, gradients = config.affinity, config.gradients
    width, n_each = gradients.proj_dim, max(1, data.n_classes - 1)
    rows = affinity.n_subsets * min(affinity.subset_size, data.n_tasks) * data.n_train // data.n_tasks * n_each
    a_row = _FIT_FLOPS if config.estimation.method == "ridge" else _STEP_FLOPS * config.training.num_train_epochs
    asked = count_oracle_flops(affinity.n_subsets, data.n_validation * n_each, width)
    return gradients.n_projections * (rows * a_row * width + asked)


def _find_adapter(config: AdapterConfig, shape: ModelShape) -> AdapterShape:
    """Where the adapter sits, as it would be attached."""
    n, layers = shape.n_layers, config.layers_to_transform
    parts = {"top_half": range(n - -(-n // 2), n), "top_third": range(n - -(-n // 3), n)}
    chosen = parts[layers] if isinstance(layers, str) else layers
    roles = {"lora": _ATTENTION, "bottleneck": ("attention_out", "mlp_out")}.get(config.method)
    if roles is None:
        raise ConfigError(f"adapter.method {config.method}: sized are lora and bottleneck")
    given = config.target_modules
    targets = [m.path for m in shape.matrices if m.role in roles] if given == "auto" else list(given)
    if config.method == "lora":
        return lora_shape(shape, config.r, targets, layers=chosen, trains_a=config.train_A)
    return bottleneck_shape(shape, config.reduction, targets, layers=chosen)


def _weigh(config: RunConfig, shape: ModelShape, share: float) -> int:
    """Bytes of the base model on a device; embeddings and the output layer, which may be their own, are not packed."""
    per_number = 4 if config.model.dtype == "float32" else 2
    outside = 2 * shape.vocab_size * shape.hidden_size * per_number
    per_block = 9 / 16 if config.model.quantization != "none" else per_number
    return outside + round(share * per_block * shape.block_parameters)


def _activations(config: RunConfig, costs: PassCosts, n_tokens: int) -> int:
    """Bytes that a batch keeps for its backward pass, which ends at the lowest adapted block."""
    n_layers = costs.upper.shape.n_layers
    is_checkpointed = config.training.gradient_checkpointing
    per_token = 17 * (1 if is_checkpointed else n_layers) + (n_layers if is_checkpointed else 0)
    return n_tokens * per_token * _width(config, costs.shape)


def _add_up(found: Mapping[str, StageSize], *, is_spread: bool) -> StageSize:
    """All stages; where jobs run side by side, the baseline does beside the groups and what follows from them."""
    stages = list(found.values())
    most = max(stages, key=lambda stage: stage.memory_bytes)
    meanwhile = sum(found[name].seconds for name in ("train", "boost", "combine"))
    saved = min(found["baselines"].seconds, meanwhile) if is_spread and "baselines" in found else 0.0
    return replace(
        most,
        seconds=sum(stage.seconds for stage in stages) - saved,
        flops=sum(stage.flops for stage in stages),
        disk_bytes=sum(stage.disk_bytes for stage in stages),
        n_devices=max(stage.n_devices for stage in stages),
        fits=all(stage.fits for stage in stages),
        host_bytes=max(stage.host_bytes for stage in stages),
    )
