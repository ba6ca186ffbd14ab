"""How well the first-order expansion at theta0 describes the trained adapters, on held-out rows.

In: trained members and validation splits. Out: per task, the R^2 of ``u* + grad u . (X - theta0)`` over the
zero-order prediction ``u*`` for its own group's adapter. The product with the true step is exact: the gradient pass
projects onto the members' own steps instead of random directions.
Cost: one gradient pass and two forward passes over a few validation rows.
Source: paper, section 2.2 (the error term of the expansion); docs/paper.md, row "approximation error".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adaptermethods import TrainedLayer
from ensemblelora.adapters import THETA0, AdaptedModel, activate, trainable_layers
from ensemblelora.blocks import OutputMode
from ensemblelora.counting import count_forward, count_gradients
from ensemblelora.data.batching import Batch, collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.gradients.collect import compute_features, find_active_layers
from ensemblelora.gradients.output import compute_outputs
from ensemblelora.passes import score

__all__ = ["Linearity", "StepProjector", "collect_steps", "measure_linearity", "spread_batches"]


@dataclass(frozen=True)
class Linearity:
    """One task under its own group's adapter."""

    r2_over_zero_order: float | None
    """1 - sum (u_X - u_lin)^2 / sum (u_X - u*)^2; none where the adapter changes no output"""
    rms_relative_error: float | None
    """root of sum (u_X - u_lin)^2 / sum u_X^2"""
    n_rows: int


@dataclass(frozen=True)
class StepProjector:
    """Stands in for a random projector: projects gradients onto given parameter steps, one column a member."""

    steps: Mapping[str, Tensor]
    """layer part -> (rows, m)"""
    proj_dim: int
    proj_type: str = "steps"

    @property
    def flops(self) -> int:
        """Of projecting one gradient."""
        return 2 * sum(matrix.numel() for matrix in self.steps.values())

    def project(self, module: str, gradients: Tensor) -> Tensor:
        """Inner products of gradients ``(n, ...)`` with the steps, ``(n, m)``."""
        return gradients.flatten(1) @ self.steps[module].to(gradients.device)


def measure_linearity(
    adapted: AdaptedModel,
    validation: Sequence[EncodedSplit],
    member_of: Sequence[str],
    modes: Mapping[str, OutputMode],
    *,
    max_rows: int,
    max_tokens: int,
    meter: Meter,
) -> tuple[Linearity, ...]:
    """Measure every task under its own member.

    Args:
        adapted: The model with its trained members.
        validation: One held-out split per task.
        member_of: The adapter that serves each task.
        modes: The outputs of each task that were differentiated.
        max_rows: Examples per task.
        max_tokens: Padded tokens of one gradient pass.
        meter: Told how many tokens were read.
    """
    members = list(dict.fromkeys(member_of))
    with activate(adapted, THETA0):
        layers = find_active_layers(adapted, validation)
        steps = StepProjector(collect_steps(adapted, members, list(layers)), proj_dim=len(members))
        found = []
        for split, member in zip(validation, member_of, strict=True):
            batches = spread_batches(split, max_rows, max_tokens, adapted.base.pad_token_id)
            outputs = _iterate_outputs(adapted, layers, steps, batches, modes[split.task], member, meter)
            found.append(_summarise(outputs, members.index(member)))
        return tuple(found)


@dataclass(frozen=True, eq=False)
class _Outputs:
    """Outputs of a few examples: of the member, and what the expansion at theta0 says of it."""

    true: npt.NDArray[np.float64]
    """u_X, (n, c)"""
    start: npt.NDArray[np.float32]
    """u*, (n, c)"""
    changes: npt.NDArray[np.float32]
    """grad u . (X - theta0) for every member's X, (n, c, m)"""


def _iterate_outputs(
    adapted: AdaptedModel,
    layers: Mapping[str, TrainedLayer],
    steps: StepProjector,
    batches: Iterable[Batch],
    mode: OutputMode,
    member: str,
    meter: Meter,
) -> Iterator[_Outputs]:
    for batch in batches:
        base = compute_features(adapted, layers, steps, batch, mode, meter=meter)  # type: ignore[arg-type]  # projects, like one
        with activate(adapted, member), torch.inference_mode():
            z = score(adapted, batch, meter=meter).z
            labels, n_choices = (torch.from_numpy(a).to(z.device) for a in (batch.labels, batch.n_choices))
            true = compute_outputs(z, labels, n_choices, mode).double().cpu().numpy()
        yield _Outputs(true, base.outputs, base.features)
        n_outputs = base.outputs.shape[1]
        count_forward(meter, adapted.costs, batch)
        count_gradients(
            meter,
            adapted.costs,
            batch,
            n_backwards=1 if batch.kinds[0] == "options" else n_outputs,
            n_outputs=base.outputs.size,
            projection_flops=steps.flops,
        )


def spread_batches(split: EncodedSplit, max_rows: int, max_tokens: int, pad_token_id: int) -> Iterator[Batch]:
    """Rows from the first to the last, evenly spaced."""
    rows = np.linspace(0, split.n_examples - 1, min(max_rows, split.n_examples)).astype(int)
    for chosen in plan_batches(split.example_lengths[rows], split.row_counts[rows], max_tokens):
        yield collate([(split, int(rows[i])) for i in chosen], pad_token_id)


def _summarise(batches: Iterable[_Outputs], column: int) -> Linearity:
    missed = moved = size = 0.0
    n_rows = 0
    for batch in batches:
        missed += float(((batch.true - batch.start - batch.changes[:, :, column]) ** 2).sum())
        moved += float(((batch.true - batch.start) ** 2).sum())
        size += float((batch.true**2).sum())
        n_rows += len(batch.true)
    return Linearity(
        r2_over_zero_order=1.0 - missed / moved if moved else None,
        rms_relative_error=(missed / size) ** 0.5 if size else None,
        n_rows=n_rows,
    )


def collect_steps(adapted: AdaptedModel, members: Sequence[str], layers: Sequence[str]) -> dict[str, Tensor]:
    """Each member's change from theta0 in the coordinates that have a gradient there, ``(rows, m)`` per layer part."""
    start = trainable_layers(adapted, THETA0)
    ends = [trainable_layers(adapted, member) for member in members]
    steps: dict[str, Tensor] = {}
    for layer in layers:
        for part in ("weight", "bias"):
            begin = getattr(start[layer], part)
            if begin is not None:
                moved = [(getattr(end[layer], part) - begin).detach().float().flatten() for end in ends]
                steps[f"{layer}.{part}"] = torch.stack(moved, dim=1)
    return steps
