"""A block of features: what the feature store holds of one task's split, and how outputs become class logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ensemblelora.errors import StoreError

__all__ = ["DTYPES", "FeatureBlock", "OutputMode", "find_fault", "helmert", "slice_projections"]

OutputMode = Literal["margin", "contrast", "logodds", "sequence"]

DTYPES: Mapping[str, npt.DTypeLike] = {
    "outputs": np.float32,
    "features": np.float32,
    "labels": np.int64,
    "n_choices": np.int64,
    "squared_norms": np.float32,
    "groups": np.int64,
}


def helmert(n_classes: int) -> npt.NDArray[np.float64]:
    """Return the Helmert contrasts U of K classes: orthonormal rows that sum to zero.

    With ``u = U z`` the logits are ``z = U^T u`` up to a constant, so a softmax over K classes is a function of
    K - 1 numbers.

    Args:
        n_classes: K, at least 2.

    Returns:
        U, shape ``(K - 1, K)``; ``U U^T`` is the identity and ``U 1 = 0``.

    Raises:
        StoreError: If there are fewer than two classes.

    Example:
        >>> helmert(2).round(4).tolist()
        [[-0.7071, 0.7071]]
    """
    if n_classes < 2:
        raise StoreError(f"contrasts of {n_classes} class(es): expected 2 or more; check the task's labels")
    rows = np.zeros((n_classes - 1, n_classes))
    for k in range(1, n_classes):
        rows[k - 1, :k] = -1.0
        rows[k - 1, k] = k
        rows[k - 1] /= np.sqrt(k * (k + 1))
    return rows


@dataclass(frozen=True, eq=False)
class FeatureBlock:
    """Outputs and projected gradients of one task's split at the expansion point.

    Class logits are ``decoder @ u`` for every example's ``u = outputs + features @ w``; see :attr:`decoder`.

    Attributes:
        task: The task's name.
        split: ``train``, ``validation`` or ``test``.
        mode: Which outputs were differentiated.
        outputs: u at the expansion point, float32 ``(n, c)``; c is 1, or K_max - 1 for ``contrast``.
        features: Projected gradients of the outputs, float32 ``(n, c, proj_dim)``.
        labels: Class indices, int64 ``(n,)``; all 0 for ``logodds`` and ``sequence``.
        n_choices: Classes each example has, int64 ``(n,)``.
        squared_norms: Squared norm of each example's unprojected gradients, summed over outputs, float32 ``(n,)``.
        groups: Codes of rows that belong together, int64 ``(n,)``.
        ids: Where each example comes from.
    """

    task: str
    split: str
    mode: OutputMode
    outputs: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    n_choices: npt.NDArray[np.int64]
    squared_norms: npt.NDArray[np.float32]
    groups: npt.NDArray[np.int64]
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse arrays that can't belong together."""
        fault = find_fault(self.mode, {name: getattr(self, name) for name in DTYPES}, self.ids)
        if fault:
            raise StoreError(f"features of task {self.task!r}, {self.split}: {fault}")

    @property
    def n_examples(self) -> int:
        """Number of examples, n."""
        return len(self.ids)

    @property
    def n_outputs(self) -> int:
        """Differentiated numbers per example, c."""
        return int(self.outputs.shape[1])

    @property
    def proj_dim(self) -> int:
        """Length of a projected gradient, d."""
        return int(self.features.shape[2])

    @property
    def decoder(self) -> npt.NDArray[np.float64]:
        """Map from outputs to class logits, float64 ``(K, c)``.

        ``margin``: h = z_1 - z_0, split evenly. ``contrast``: the transposed :func:`helmert` matrix. ``logodds`` and
        ``sequence``: two classes, right and wrong, with label 0, so that cross-entropy is softplus(-h).
        """
        if self.mode == "margin":
            return np.array([[-0.5], [0.5]])
        if self.mode == "contrast":
            return helmert(self.n_outputs + 1).T
        return np.array([[0.5], [-0.5]])

    @property
    def class_mask(self) -> npt.NDArray[np.bool_]:
        """Which classes each example has, bool ``(n, K)``; only ``contrast`` blocks can lack some."""
        n_classes = self.decoder.shape[0]
        if self.mode != "contrast":
            return np.ones((self.n_examples, n_classes), dtype=bool)
        return np.arange(n_classes) < self.n_choices[:, None]

    def take(self, rows: Sequence[int] | npt.NDArray[np.intp]) -> FeatureBlock:
        """Return the block of the given rows, in that order."""
        index = np.asarray(rows, dtype=np.intp)
        arrays = {name: getattr(self, name)[index] for name in DTYPES}
        return FeatureBlock(self.task, self.split, self.mode, **arrays, ids=tuple(self.ids[i] for i in index))


def slice_projections(block: FeatureBlock, proj_dim: int, which: int = 0) -> FeatureBlock:
    """Return the block under one of the narrower projections that lie side by side in a wide one.

    Columns of a ``rademacher`` or ``gaussian`` matrix, whose entries are independent and of variance 1/D, make a
    projection to d of their own once they are multiplied by ``sqrt(D / d)``. So a store of width R d holds R
    projections of the same gradients, and one of width D every smaller dimension. Other kinds' columns are dependent.

    Args:
        block: Features of width D.
        proj_dim: d, at most D.
        which: Columns ``which d`` to ``(which + 1) d`` are taken.

    Raises:
        StoreError: If the block is too narrow.

    Example:
        >>> wide = FeatureBlock("t", "train", "margin", np.ones((1, 1), np.float32), np.ones((1, 1, 8), np.float32),
        ...     np.zeros(1, np.int64), np.full(1, 2), np.ones(1, np.float32), np.zeros(1, np.int64), ("a",))
        >>> slice_projections(wide, 2, which=3).features.tolist()
        [[[2.0, 2.0]]]
    """
    width = block.proj_dim
    if not 0 <= which * proj_dim < (which + 1) * proj_dim <= width:
        raise StoreError(
            f"features of task {block.task!r}, {block.split}: {width} columns hold no projection {which} to "
            f"{proj_dim}; run the features stage again"
        )
    if proj_dim == width:
        return block
    columns = block.features[:, :, which * proj_dim : (which + 1) * proj_dim]
    return replace(block, features=columns * np.float32((width / proj_dim) ** 0.5))


def find_fault(mode: OutputMode, arrays: Mapping[str, Any], ids: Sequence[str]) -> str | None:
    """Return what is wrong with a block's arrays, or nothing."""
    for name, dtype in DTYPES.items():
        if arrays[name].dtype != dtype:
            return f"{name} has dtype {arrays[name].dtype}, expected {np.dtype(dtype)}"
    n, outputs, features = len(ids), arrays["outputs"], arrays["features"]
    if outputs.ndim != 2 or features.ndim != 3 or features.shape[:2] != outputs.shape:
        return f"outputs {outputs.shape} and features {features.shape}, expected (n, c) and (n, c, proj_dim)"
    for name in DTYPES:
        if arrays[name].shape[0] != n or (name not in ("outputs", "features") and arrays[name].ndim != 1):
            return f"{name} has shape {arrays[name].shape}, expected {n} rows, one per id"
    if mode != "contrast" and outputs.shape[1] != 1:
        return f"mode {mode} has one output per example, got {outputs.shape[1]}"
    n_classes = outputs.shape[1] + 1
    if mode == "contrast" and n and not 1 <= arrays["n_choices"].min() <= arrays["n_choices"].max() <= n_classes:
        return f"n_choices outside 1..{n_classes}, the classes that {outputs.shape[1]} contrasts describe"
    return _find_label_fault(mode, arrays["labels"], arrays["n_choices"])


def _find_label_fault(mode: OutputMode, labels: npt.NDArray[np.int64], n_choices: npt.NDArray[np.int64]) -> str | None:
    if mode in ("logodds", "sequence"):
        return "labels must all be 0 in this mode (class 0 is the right answer)" if labels.any() else None
    allowed = n_choices if mode == "contrast" else 2
    if ((labels < 0) | (labels >= allowed)).any():
        return "a label is not below its example's number of classes"
    return None
