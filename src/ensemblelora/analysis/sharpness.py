"""How sharp the loss is around trained adapters: traces of its Hessian, example by example, over all members jointly.

In: the adapted model with its members, their weights, some rows. Out: :class:`Sharpness`, plain numbers.
The loss is that of the combined scores, its coordinates are :mod:`.jointloss`'s.

The trace is that of the GGN part, exact, plus an estimate of the rest by random signs (see :mod:`.hessian`). All
examples meet the same random vectors, so the standard error of a mean is that of the vectors' means. The greatest trace
of several estimates is too great, so it is estimated again, by other vectors, at the example where it was found.

Cost: for each example and member a forward pass, K backward passes, and about two more for each random vector.
Slow twin: all second derivatives, one by one, in tests/test_sharpness.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel
from ensemblelora.analysis.hessian import (
    compute_ggn_traces,
    count_coordinates,
    draw_signs,
    evaluate_quadratic,
    find_largest_eigenvalue,
)
from ensemblelora.analysis.jointloss import Coordinates, expanded, twice_differentiable
from ensemblelora.counting import count_gradients
from ensemblelora.data.batching import Batch, collate
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import DataError
from ensemblelora.progress import track

__all__ = ["Sharpness", "measure_sharpness"]

FloatArray = npt.NDArray[np.float64]

_MOST_NUMBERS = 2**25
"""numbers of the random vectors that are worked on together"""
_MOST_TOKENS = 4096
"""positions of the passes that are made together, one for each random vector"""
_BACKWARDS_PER_PRODUCT = 2


@dataclass(frozen=True)
class Sharpness:
    """Traces of the loss's Hessian over some examples; standard errors are those of the random vectors.

    Attributes:
        coordinates: See :data:`~.jointloss.Coordinates`.
        n_coordinates: Of all members together.
        n_members: Members, k.
        n_examples: Examples looked at.
        n_probes: Random vectors, Q.
        mean_loss: Of the examples.
        mean: Mean trace.
        mean_se: Its standard error.
        examples_sd: Standard deviation of the trace over examples.
        greatest: Largest trace, estimated anew.
        greatest_se: Its standard error.
        greatest_before: The same as first estimated; biased upward.
        greatest_example: Where, an index in the split.
        mean_ggn: Exact mean trace of the GGN part.
        greatest_ggn: Its largest.
        mean_plain: Mean trace by random vectors alone.
        mean_plain_se: Its standard error.
        rescale: ``1 / sum_k w_k^2``, k for equal weights: what averaging equal members takes off the GGN part.
        mean_rescaled: Mean trace times it.
        greatest_rescaled: Largest trace times it.
        first_mean: Mean trace over the first member's numbers alone, the loss being the ensemble's.
        first_mean_se: Its standard error.
        first_greatest: The same at the example of the largest trace.
        largest_eigenvalue: Over the examples of the largest traces; none where it was not asked for.
        traces: Of each example.
    """

    coordinates: str
    n_coordinates: int
    n_members: int
    n_examples: int
    n_probes: int
    mean_loss: float
    mean: float
    mean_se: float
    examples_sd: float | None
    greatest: float
    greatest_se: float
    greatest_before: float
    greatest_example: int
    mean_ggn: float
    greatest_ggn: float
    mean_plain: float
    mean_plain_se: float
    rescale: float
    mean_rescaled: float
    greatest_rescaled: float
    first_mean: float
    first_mean_se: float
    first_greatest: float
    largest_eigenvalue: float | None
    traces: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class _Traces:
    """One example's."""

    loss: float
    n_coordinates: int
    ggn: FloatArray
    """(m,)"""
    rest: FloatArray
    """(Q, m)"""
    plain: FloatArray
    """(Q,)"""

    @property
    def total(self) -> float:
        return float(self.ggn.sum() + self.rest.sum(axis=1).mean())


@dataclass(frozen=True, eq=False)
class _Bench:
    """Whose loss, where, and how it is looked at."""

    adapted: AdaptedModel
    split: EncodedSplit
    members: tuple[str, ...]
    weights: tuple[float, ...]
    coordinates: Coordinates
    n_probes: int
    seed: int
    meter: Meter | None


def measure_sharpness(
    adapted: AdaptedModel,
    split: EncodedSplit,
    examples: Sequence[int],
    members: Sequence[str],
    weights: Sequence[float],
    *,
    coordinates: Coordinates = "adapter",
    n_probes: int,
    n_eigenvalues: int = 0,
    seed: int,
    meter: Meter | None = None,
) -> Sharpness:
    """Measure the trace of the loss's Hessian at some examples.

    Args:
        adapted: The model with its members.
        split: Rows; a task with classes or options.
        examples: Which of them, at least one.
        members: Adapters whose scores are combined.
        weights: What each member's scores are multiplied with.
        coordinates: ``weights`` for plain LoRA alone.
        n_probes: Random vectors, two or more; as many are always used.
        n_eigenvalues: At how many examples, those of the largest traces, the largest eigenvalue is looked for.
        seed: Root of the random vectors.
        meter: Told what the passes cost.

    Raises:
        DataError: If the task's answers are free text, or there is no example.
        ModelError: If the attention can't be differentiated twice, or the adapter has no such coordinates.
        SolverError: If an eigenvalue is not found.

    Reference:
        Paper, section 4 (largest trace over training examples); docs/paper.md, row "sharpness".
    """
    if split.kind == "sequence":
        raise DataError(f"task {split.task!r}: its answers are free text; sharpness needs classes or options")
    if not len(examples):
        raise DataError(f"task {split.task!r}: no example to measure sharpness at; expected one or more")
    bench = _Bench(adapted, split, tuple(members), tuple(weights), coordinates, n_probes, seed, meter)
    with twice_differentiable(adapted):
        found = [_trace(bench, int(e), "first") for e in track(list(examples), f"sharpness {split.task}")]
        order = np.argsort([-one.total for one in found], kind="stable")
        fresh = _trace(bench, int(examples[order[0]]), "fresh")
        eigenvalues = [_find_eigenvalue(bench, int(examples[i])) for i in order[:n_eigenvalues]]
    return _summarise(bench, examples, found, int(order[0]), fresh, eigenvalues)


def _trace(bench: _Bench, example: int, purpose: str) -> _Traces:
    """Estimate one example's trace with the random vectors of a purpose."""
    batch = _collate(bench, example)
    with expanded(
        bench.adapted, batch, bench.members, bench.weights, coordinates=bench.coordinates, meter=bench.meter
    ) as expansion:
        n = count_coordinates(expansion)
        at_once = max(1, min(_MOST_NUMBERS // n, _MOST_TOKENS // batch.n_padded_tokens))
        signs = draw_signs(expansion.tensors, bench.n_probes, at_once, seed=bench.seed, names=(purpose,))
        forms = [evaluate_quadratic(expansion, vectors) for vectors in signs]
        rest = np.concatenate([form.rest for form in forms])
        _count(bench, batch, n, bench.n_probes)
        return _Traces(
            loss=expansion.loss,
            n_coordinates=n,
            ggn=compute_ggn_traces(expansion),
            rest=rest,
            plain=np.concatenate([form.ggn for form in forms]) + rest.sum(axis=1),
        )


def _find_eigenvalue(bench: _Bench, example: int) -> float:
    batch = _collate(bench, example)
    with expanded(
        bench.adapted, batch, bench.members, bench.weights, coordinates=bench.coordinates, meter=bench.meter
    ) as expansion:
        value, n_products = find_largest_eigenvalue(expansion, seed=bench.seed)
        _count(bench, batch, count_coordinates(expansion), n_products)
    return value


def _collate(bench: _Bench, example: int) -> Batch:
    return collate([(bench.split, example)], bench.adapted.base.pad_token_id, layout=bench.adapted.layout)


def _count(bench: _Bench, batch: Batch, n_coordinates: int, n_products: int) -> None:
    """Enter every member's pass, the K backward passes of its expansion, and the products with the Hessian.

    A product takes two more backward passes, and four small products with every number it is taken over, of which those
    of the backward passes' formula are two, for an adapter's own numbers, and none for other coordinates.
    """
    n_classes, costs = int(batch.n_choices[0]), bench.adapted.costs
    for _ in bench.members:
        count_gradients(
            bench.meter,
            costs,
            batch,
            n_backwards=n_classes + _BACKWARDS_PER_PRODUCT * n_products,
            n_outputs=0,
            projection_flops=0,
            n_coordinates=n_coordinates,
        )
    if bench.meter is not None and costs is not None:
        n_more = 2 * n_products if bench.coordinates == "adapter" else n_classes + 4 * n_products
        bench.meter.add_flops(2 * batch.n_padded_tokens * n_coordinates * n_more)


def _summarise(
    bench: _Bench,
    examples: Sequence[int],
    found: Sequence[_Traces],
    greatest: int,
    fresh: _Traces,
    eigenvalues: Sequence[float],
) -> Sharpness:
    """Turn examples' traces into means, their errors, and the largest."""
    totals = np.array([one.total for one in found])
    ggn = np.stack([one.ggn for one in found])  # (n, m)
    rest = np.stack([one.rest for one in found])  # (n, Q, m)
    plain = np.mean([one.plain for one in found], axis=0)
    rescale = 1 / float(np.square(bench.weights).sum())
    return Sharpness(
        coordinates=bench.coordinates,
        n_coordinates=fresh.n_coordinates,
        n_members=len(bench.members),
        n_examples=len(found),
        n_probes=bench.n_probes,
        mean_loss=float(np.mean([one.loss for one in found])),
        mean=float(totals.mean()),
        mean_se=_standard_error(rest.sum(axis=2).mean(axis=0)),
        examples_sd=float(totals.std(ddof=1)) if len(totals) > 1 else None,
        greatest=fresh.total,
        greatest_se=_standard_error(fresh.rest.sum(axis=1)),
        greatest_before=float(totals[greatest]),
        greatest_example=int(examples[greatest]),
        mean_ggn=float(ggn.sum(axis=1).mean()),
        greatest_ggn=float(ggn.sum(axis=1).max()),
        mean_plain=float(plain.mean()),
        mean_plain_se=_standard_error(plain),
        rescale=rescale,
        mean_rescaled=float(totals.mean()) * rescale,
        greatest_rescaled=fresh.total * rescale,
        first_mean=float(ggn[:, 0].mean() + rest[:, :, 0].mean()),
        first_mean_se=_standard_error(rest[:, :, 0].mean(axis=0)),
        first_greatest=float(fresh.ggn[0] + fresh.rest[:, 0].mean()),
        largest_eigenvalue=max(eigenvalues) if eigenvalues else None,
        traces=tuple(float(total) for total in totals),
    )


def _standard_error(values: FloatArray) -> float:
    """Of the mean of independent values."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))
