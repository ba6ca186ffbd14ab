"""One example's loss to second order in the trained numbers of several members at once, through autograd.

In: the example's combined label scores z, with their graph, and each member's tensors. Out: :class:`Expansion`, and
from it traces, quadratic forms and the Hessian's largest eigenvalue. Nothing of size coordinates x coordinates exists.

With u = U z the K - 1 contrasts of K scores, p = softmax(z), r = p - onehot(y), the Hessian of the cross-entropy is

    H = J^T D J + sum_c r_c grad^2 z_c,    J = du/dtheta,    D = U (diag p - p p^T) U^T.

J takes K - 1 backward passes, so the first term (Gauss-Newton, GGN) and its trace are exact. Where z is a weighted sum
over members, no number of one member meets one of another in the second term: it is block diagonal, and one random
vector over all members estimates every block's trace. What random vectors say of the first term need not be used: the
exact trace in its place leaves an estimate unbiased, and its variance is then that of the second term alone.
Cost: K backward passes; a product with the second term is a backward pass through the last of them, about two more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from ensemblelora.blocks import helmert
from ensemblelora.errors import DataError, SolverError
from ensemblelora.seeding import generator_for

__all__ = [
    "Expansion",
    "Quadratic",
    "compute_ggn_traces",
    "count_coordinates",
    "draw_signs",
    "evaluate_quadratic",
    "expand",
    "find_largest_eigenvalue",
    "multiply",
]

FloatArray = npt.NDArray[np.float64]

_KRYLOV = 12
_TOLERANCE = 1e-3
_MOST_RESTARTS = 50


@dataclass(frozen=True, eq=False)
class Expansion:
    """Derivatives of one example's loss with respect to some tensors.

    Attributes:
        loss: In nats.
        tensors: What is differentiated with respect to, all members' one after the other.
        member_of: Whose each tensor is.
        n_members: Number of members.
        slopes: J: gradients of the contrasts, ``(K - 1, *shape)`` for each tensor.
        curvature: D, ``(K - 1, K - 1)``.
        residual: Gradient of ``sum_c r_c z_c`` with its graph, one for each tensor.
    """

    loss: float
    tensors: tuple[Tensor, ...]
    member_of: tuple[int, ...]
    n_members: int
    slopes: tuple[Tensor, ...]
    curvature: FloatArray
    residual: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Quadratic forms of q vectors over all members' numbers.

    Attributes:
        ggn: ``v^T J^T D J v``, all members together, ``(q,)``.
        ggn_own: The same of each member's part of v alone, ``(q, m)``.
        rest: ``v^T (sum_c r_c grad^2 z_c) v`` of each member's part, ``(q, m)``; their sum is that of all together.
    """

    ggn: FloatArray
    ggn_own: FloatArray
    rest: FloatArray


def expand(scores: Tensor, label: int, tensors: Sequence[Sequence[Tensor]]) -> Expansion:
    """Differentiate one example's cross-entropy.

    Args:
        scores: z, ``(K,)``, with its graph; a sum over members, each of which depends on its own tensors alone.
        label: The right class.
        tensors: Of each member; all require gradients.

    Raises:
        DataError: If there are fewer than two classes: the loss of free text is not one of class scores.
    """
    n_classes = len(scores)
    if n_classes < 2:
        raise DataError(f"an example with {n_classes} label score: sharpness is defined for two or more classes here")
    flat = tuple(tensor for own in tensors for tensor in own)
    p = torch.softmax(scores.detach().double(), dim=0)
    residual = p.clone()
    residual[label] -= 1.0
    contrasts = torch.from_numpy(helmert(n_classes)).to(p.device)  # U (K-1, K)
    curvature = contrasts @ (torch.diag(p) - torch.outer(p, p)) @ contrasts.T
    rows = [
        torch.autograd.grad(u, flat, retain_graph=True, materialize_grads=True)
        for u in (contrasts.to(scores.dtype) @ scores).unbind()
    ]
    slopes = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    along = (residual.to(scores.dtype) * scores).sum()
    return Expansion(
        loss=float(-torch.log_softmax(scores.detach().double(), dim=0)[label]),
        tensors=flat,
        member_of=tuple(m for m, own in enumerate(tensors) for _ in own),
        n_members=len(tensors),
        slopes=slopes,
        curvature=curvature.cpu().numpy(),
        residual=torch.autograd.grad(along, flat, create_graph=True, materialize_grads=True),
    )


def count_coordinates(expansion: Expansion) -> int:
    """Numbers of all members together."""
    return sum(tensor.numel() for tensor in expansion.tensors)


def compute_ggn_traces(expansion: Expansion) -> FloatArray:
    """Each member's trace of ``J^T D J``, exact, ``(m,)``; their sum is that of all members together."""
    traces = np.zeros(expansion.n_members)
    for m, slopes in zip(expansion.member_of, expansion.slopes, strict=True):
        rows = slopes.flatten(1)
        traces[m] += float((expansion.curvature * (rows @ rows.T).double().cpu().numpy()).sum())
    return traces


def evaluate_quadratic(expansion: Expansion, vectors: Sequence[Tensor]) -> Quadratic:
    """Evaluate the Hessian's quadratic form at several vectors together.

    Args:
        expansion: Of one example.
        vectors: q of them, ``(q, *shape)`` for each tensor.
    """
    n_vectors, n_members = len(vectors[0]), expansion.n_members
    along = np.zeros((n_vectors, n_members, len(expansion.curvature)))  # J v of each member's part
    rest = np.zeros((n_vectors, n_members))
    products = _multiply_rest(expansion, vectors)
    for m, v, slopes, product in zip(expansion.member_of, vectors, expansion.slopes, products, strict=True):
        along[:, m] += (v.flatten(1) @ slopes.flatten(1).T).double().cpu().numpy()
        rest[:, m] += torch.einsum("qi,qi->q", v.flatten(1), product.flatten(1)).double().cpu().numpy()
    together = along.sum(axis=1)
    return Quadratic(
        ggn=np.einsum("qa,ab,qb->q", together, expansion.curvature, together),
        ggn_own=np.einsum("qma,ab,qmb->qm", along, expansion.curvature, along),
        rest=rest,
    )


def multiply(expansion: Expansion, vector: npt.ArrayLike) -> npt.NDArray[np.floating]:
    """Return the Hessian times a vector over all members' numbers, both ``(n,)``."""
    parts = _split(expansion, np.asarray(vector).reshape(1, -1))
    slope = sum(
        (slopes.flatten(1) @ v.flatten()).double() for slopes, v in zip(expansion.slopes, parts, strict=True)
    )  # J v (K-1,)
    pull = torch.from_numpy(expansion.curvature).to(slope) @ slope
    total = [
        (product[0] + torch.tensordot(pull.to(slopes), slopes, dims=1)).flatten()
        for product, slopes in zip(_multiply_rest(expansion, parts), expansion.slopes, strict=True)
    ]
    return np.asarray(torch.cat(total).cpu().numpy())


def find_largest_eigenvalue(expansion: Expansion, *, seed: int) -> tuple[float, int]:
    """Find the Hessian's largest eigenvalue by Lanczos iteration, to a thousandth of itself.

    Args:
        expansion: Of one example.
        seed: Root of the vector it starts with.

    Returns:
        The eigenvalue, and how many products with the Hessian it took.

    Raises:
        SolverError: If it does not converge.
    """
    n = count_coordinates(expansion)
    n_products = 0

    def product(vector: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        nonlocal n_products
        n_products += 1
        return multiply(expansion, vector)

    precision = torch.empty(0, dtype=expansion.tensors[0].dtype).numpy().dtype
    operator = LinearOperator((n, n), matvec=product, dtype=precision)
    start = generator_for(seed, "sharpness", "lanczos").standard_normal(n).astype(precision)
    try:
        values = eigsh(
            operator,
            k=1,
            which="LA",
            v0=start,
            ncv=min(n, _KRYLOV),
            maxiter=_MOST_RESTARTS,
            tol=_TOLERANCE,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence as error:
        raise SolverError(
            f"largest eigenvalue of {n} numbers: not found to {_TOLERANCE:g} in {n_products} products ({error}); "
            "measure other examples or leave it out"
        ) from None
    return float(values[0]), n_products


def draw_signs(
    like: Sequence[Tensor], n_vectors: int, at_once: int, *, seed: int, names: Sequence[str | int]
) -> Iterator[list[Tensor]]:
    """Draw vectors of random signs, a few at a time; vector i is the same whatever their number or portions.

    Args:
        like: Tensors of which every vector has the shapes, the precision and the place.
        n_vectors: In all.
        at_once: In a portion.
        seed: The root.
        names: What they are for.

    Yields:
        For each tensor ``(q, *shape)``, entries 1 and -1.
    """
    size = sum(tensor.numel() for tensor in like)
    for first in range(0, n_vectors, at_once):
        rows = np.empty((min(at_once, n_vectors - first), size), dtype=np.float32)
        for i, row in enumerate(rows, first):
            bits = generator_for(seed, "sharpness", *names, i).bytes(-(-size // 8))
            np.multiply(np.unpackbits(np.frombuffer(bits, np.uint8), count=size), 2, out=row, casting="unsafe")
            row -= 1
        yield _split_rows(like, rows)


def _multiply_rest(expansion: Expansion, vectors: Sequence[Tensor]) -> list[Tensor]:
    """Second term of the Hessian times several vectors, ``(q, *shape)`` for each tensor."""
    # What is linear in the tensors has a gradient without a graph, and no second derivative.
    curved = [i for i, gradient in enumerate(expansion.residual) if gradient.requires_grad]
    if not curved:
        return [torch.zeros_like(v) for v in vectors]
    found = torch.autograd.grad(
        [expansion.residual[i] for i in curved],
        expansion.tensors,
        grad_outputs=[vectors[i] for i in curved],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    return [torch.zeros_like(v) if product is None else product for v, product in zip(vectors, found, strict=True)]


def _split(expansion: Expansion, rows: npt.NDArray[np.floating]) -> list[Tensor]:
    return _split_rows(expansion.tensors, rows)


def _split_rows(like: Sequence[Tensor], rows: npt.NDArray[np.floating]) -> list[Tensor]:
    """Cut vectors ``(q, n)`` into tensors ``(q, *shape)``."""
    first = like[0]
    pieces = torch.from_numpy(rows).to(first).split([tensor.numel() for tensor in like], dim=1)
    return [piece.reshape(-1, *tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
