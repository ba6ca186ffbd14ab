"""What the first-order expansion at theta0 leaves out, at any points of weight space.

In: the adapted model, rows, directions in the space of an adapter's tensors, points along them. Out: for each point and
task the sums that every relative error is made of. ``grad u . (X - theta0)`` is exact: one gradient pass forms each
row's own gradient, layer by layer, and takes its inner product with all directions at once; nothing is projected and
no gradient is kept. Along a direction the linear part grows with the distance, so that more points cost forward passes
alone.

Cost: one gradient pass and, for each point, one forward pass over the rows. Slow twin: autograd in float64, one row and
one point at a time, in tests/test_approximation.py.
Source: paper, section 2.2 (the error term) and appendix B.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    activate,
    adapter_state,
    add_adapter,
    measure_distance,
    remove_adapter,
    set_adapter_state,
)
from ensemblelora.blocks import OutputMode
from ensemblelora.counting import count_forward, count_gradients
from ensemblelora.data.batching import Batch
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.subset import take_examples
from ensemblelora.evaluation.linearity import StepProjector, collect_steps, spread_batches
from ensemblelora.gradients.collect import compute_features, find_active_layers
from ensemblelora.gradients.output import compute_outputs
from ensemblelora.models import in_float32
from ensemblelora.passes import score, with_cache, without_cache

__all__ = [
    "Distances",
    "Point",
    "Precision",
    "Remainder",
    "State",
    "measure_distances",
    "measure_remainders",
    "take_rows",
]

State = Mapping[str, Tensor]
"""an adapter's tensors, or a difference of two such, keyed as they are saved"""

Precision = Literal["float32", "native"]
"""native: the model's own, in which small changes drown in rounding"""

_MOST_CACHED = 2**32
"""bytes; a few rows take megabytes"""
_POINT, _DIRECTION = "point", "direction"


@dataclass(frozen=True)
class Point:
    """``theta0 + scale x direction``."""

    direction: int
    scale: float


@dataclass(frozen=True)
class Remainder:
    """One task at one point, summed over rows and outputs."""

    missed: float
    """sum (u_X - u* - grad u . (X - theta0))^2"""
    moved: float
    """sum (u_X - u*)^2"""
    size: float
    """sum u_X^2"""
    n_outputs: int
    """numbers that were summed"""


@dataclass(frozen=True)
class Distances:
    """How long a step from theta0 is, in Frobenius norms."""

    absolute: float
    relative_to_model: float
    relative_to_adapter_init: float


@dataclass(frozen=True, eq=False)
class _Rows:
    """A batch at theta0."""

    batch: Batch
    mode: OutputMode
    start: npt.NDArray[np.float64]
    """u*, (n, c)"""
    slopes: npt.NDArray[np.float64]
    """grad u . direction, (n, c, m)"""


def take_rows(split: EncodedSplit, max_rows: int) -> EncodedSplit:
    """Return examples from the first to the last, evenly spaced, as a split of their own."""
    places = np.linspace(0, split.n_examples - 1, min(max_rows, split.n_examples)).astype(int)
    return take_examples(split, places)


def measure_distances(adapted: AdaptedModel, directions: Sequence[State]) -> tuple[Distances, ...]:
    """Measure how long directions are, on both denominators of the paper's table 2.

    Args:
        adapted: The model; it is left as it was.
        directions: Differences from theta0.
    """
    norms = [sum(float(part.double().pow(2).sum()) for part in one.values()) ** 0.5 for one in directions]
    longest = int(np.argmax(norms)) if norms else 0
    if not norms or not norms[longest]:
        return tuple(Distances(0.0, 0.0, 0.0) for _ in norms)
    with _added(adapted, _POINT):
        _place(adapted, adapter_state(adapted, THETA0), directions[longest], 1.0)
        shares = {name: value / norms[longest] for name, value in measure_distance(adapted, _POINT).items()}
    return tuple(Distances(**{name: share * norm for name, share in shares.items()}) for norm in norms)


def measure_remainders(
    adapted: AdaptedModel,
    parts: Sequence[EncodedSplit],
    modes: Mapping[str, OutputMode],
    directions: Sequence[State],
    points: Sequence[Point],
    *,
    max_tokens: int,
    precision: Precision,
    meter: Meter,
) -> tuple[tuple[Remainder, ...], ...]:
    """Measure the expansion's error at points along some directions.

    Args:
        adapted: The model; it is left as it was.
        parts: Rows to measure on, a task each.
        modes: The outputs of each task.
        directions: Differences from theta0.
        points: Where to measure.
        max_tokens: Padded tokens of one gradient pass.
        precision: What the model computes in meanwhile.
        meter: Told what every pass costs.

    Returns:
        One entry a point, in it one a task.
    """
    names = [f"{_DIRECTION}-{j}" for j in range(len(directions))]
    with _added(adapted, _POINT, *names):
        start = adapter_state(adapted, THETA0)
        for name, direction in zip(names, directions, strict=True):
            set_adapter_state(adapted, name, {key: start[key] + direction[key] for key in start})
        with _computing_in(adapted, precision, parts) as probe:
            rows = [list(_expand(probe, part, modes[part.task], names, max_tokens, meter)) for part in parts]
            return tuple(_measure_point(probe, rows, start, directions, point, meter) for point in points)


@contextmanager
def _added(adapted: AdaptedModel, *names: str) -> Iterator[None]:
    """Let the model have adapters at theta0 meanwhile."""
    try:
        for name in names:
            add_adapter(adapted, name)
        yield
    finally:
        for name in names:
            remove_adapter(adapted, name)


@contextmanager
def _computing_in(adapted: AdaptedModel, precision: Precision, parts: Sequence[EncodedSplit]) -> Iterator[AdaptedModel]:
    """Compute in a precision, and keep what enters the lowest adapted block in it: it is asked for at every point."""
    with ExitStack() as stack:
        if precision == "float32":
            stack.enter_context(in_float32(adapted.peft))
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ensemblelora-")))
        yield with_cache(without_cache(adapted), folder, parts, max_bytes=_MOST_CACHED)


def _measure_point(
    adapted: AdaptedModel,
    rows: Sequence[Sequence[_Rows]],
    start: State,
    directions: Sequence[State],
    point: Point,
    meter: Meter,
) -> tuple[Remainder, ...]:
    """Every task's sums at one point."""
    _place(adapted, start, directions[point.direction], point.scale)
    found = []
    with activate(adapted, _POINT), torch.inference_mode():
        for own in rows:
            pieces = [_compare(_run(adapted, one, meter), one, point) for one in own]
            missed, moved, size, count = (sum(values) for values in zip(*pieces, strict=True))
            found.append(Remainder(missed, moved, size, int(count)))
    return tuple(found)


def _expand(
    adapted: AdaptedModel, part: EncodedSplit, mode: OutputMode, names: Sequence[str], max_tokens: int, meter: Meter
) -> Iterator[_Rows]:
    """Outputs at theta0, and how fast they change along every direction."""
    with activate(adapted, THETA0):
        layers = find_active_layers(adapted, [part])
        steps = StepProjector(collect_steps(adapted, names, list(layers)), proj_dim=len(names))
        for batch in spread_batches(part, part.n_examples, max_tokens, adapted.base.pad_token_id):
            found = compute_features(adapted, layers, steps, batch, mode, meter=meter)  # type: ignore[arg-type]  # projects, like one
            count_gradients(
                meter,
                adapted.costs,
                batch,
                n_backwards=1 if batch.kinds[0] == "options" else found.outputs.shape[1],
                n_outputs=found.outputs.size,
                projection_flops=steps.flops,
            )
            yield _Rows(batch, mode, found.outputs.astype(np.float64), found.features.astype(np.float64))


def _run(adapted: AdaptedModel, rows: _Rows, meter: Meter) -> npt.NDArray[np.float64]:
    """Outputs of a batch under the active adapter, ``(n, c)``."""
    batch = rows.batch
    z = score(adapted, batch, meter=meter).z
    labels, n_choices = (torch.from_numpy(a).to(z.device) for a in (batch.labels, batch.n_choices))
    outputs = compute_outputs(z, labels, n_choices, rows.mode)
    count_forward(meter, adapted.costs, batch)
    return np.asarray(outputs.double().cpu().numpy())


def _compare(true: npt.NDArray[np.float64], at: _Rows, point: Point) -> tuple[float, float, float, float]:
    linear = point.scale * at.slopes[:, :, point.direction]
    moved = true - at.start
    return (
        float(((moved - linear) ** 2).sum()),
        float((moved**2).sum()),
        float((true**2).sum()),
        float(true.size),
    )


def _place(adapted: AdaptedModel, start: State, direction: State, scale: float) -> None:
    set_adapter_state(adapted, _POINT, {key: start[key] + scale * direction[key] for key in start})
