"""Sources ranked by how alike they are to the target, to compare with: gradients point the same way, texts are alike.

In: feature blocks. Out: one number a source, higher is more alike. Likeness of texts is
:func:`ensemblelora.comparison.likeness.compare_texts`'s. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation.loss import LinearRows, compute_loss_gradients
from ensemblelora.selection.prospect import Choice
from ensemblelora.store import FeatureBlock

__all__ = ["compare_gradients", "take_most_alike"]

FloatArray = npt.NDArray[np.float64]


def compare_gradients(sources: Sequence[FeatureBlock], target: FeatureBlock) -> FloatArray:
    """Mean cosine between the loss gradient of a source's row and that of a row of the target, over all pairs.

    Cosines of single rows count, so that a few rows with long gradients don't speak for a source.

    Args:
        sources: Training rows of each.
        target: Rows that say what is wanted, such as validation rows.

    Returns:
        Shape ``(n,)``.

    Reference:
        Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024: cosines of projected
        gradients; plain ones here, where it takes the optimiser's steps.
    """
    wanted = _mean_direction(target)
    return np.array([_mean_direction(source) @ wanted for source in sources])


def take_most_alike(likeness: npt.ArrayLike, number: int) -> Choice:
    """Take so many sources, the most alike first; of equals the first.

    Example:
        >>> take_most_alike([0.1, 0.5, 0.3], 2)
        (1, 2)
    """
    order = np.argsort(-np.asarray(likeness, dtype=np.float64), kind="stable")
    return tuple(sorted(int(j) for j in order[:number]))


def _mean_direction(block: FeatureBlock) -> FloatArray:
    """Mean of the rows' unit gradients, ``(d,)``; a row without a gradient counts as nothing."""
    gradients = compute_loss_gradients(LinearRows.from_block(block))
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    units = np.divide(gradients, norms, out=np.zeros_like(gradients), where=norms > 0)
    return np.asarray(units.mean(axis=0))
