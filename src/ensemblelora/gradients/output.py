"""Which numbers of an example are differentiated, so that a linear model of them predicts its loss.

==========  ====================================  =============================================
mode        outputs u of label scores z           loss as a function of u
==========  ====================================  =============================================
margin      z_1 - z_0                             log(1 + exp(-y u)), y = +1 or -1
contrast    U z, U the K - 1 Helmert contrasts    cross-entropy of softmax(U^T u)
logodds     z_y - logsumexp of the other z        log(1 + exp(-u)) = -log p_y
sequence    -log(exp(nll) - 1)                    log(1 + exp(-u)) = nll
==========  ====================================  =============================================

``margin`` and ``contrast`` predict every class, so accuracy needs no forward pass; ``logodds`` and ``sequence``
know only the right answer's probability.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ensemblelora.blocks import OutputMode, helmert
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.task import Kind
from ensemblelora.errors import ConfigError

__all__ = ["choose_mode", "choose_modes", "compute_outputs", "label_of_mode"]

_MOST_CONTRASTS = 8
_SMALLEST_NLL = 1e-4  # keeps -log(expm1(nll)) and its slope finite where the answer is certain


def choose_mode(kind: Kind, max_choices: int, requested: str, *, task: str = "") -> OutputMode:
    """Choose the outputs of a task: two classes margin, up to eight contrast, more logodds, free text sequence.

    Raises:
        ConfigError: If the requested outputs don't fit the task.
    """
    fits: dict[str, bool] = {
        "margin": kind != "sequence" and max_choices == 2,
        "contrast": kind != "sequence" and max_choices >= 2,
        "logodds": kind != "sequence" and max_choices >= 2,
        "sequence": kind == "sequence",
    }
    if requested == "auto":
        few = "contrast" if max_choices <= _MOST_CONTRASTS else "logodds"
        requested = "sequence" if kind == "sequence" else "margin" if max_choices == 2 else few
    if not fits[requested]:
        raise ConfigError(
            f"gradients.output {requested!r} does not fit task {task!r} ({kind}, {max_choices} choices); use auto"
        )
    return requested  # type: ignore[return-value]


def choose_modes(splits: Iterable[EncodedSplit], requested: str) -> dict[str, OutputMode]:
    """Choose every task's outputs once for all of its splits, by the largest number of choices in any of them.

    Where examples differ in their number of choices, splits differ in their largest; a linear model fitted on one
    kind of output says nothing about another.

    Raises:
        ConfigError: If the requested outputs don't fit a task.
    """
    most: dict[str, tuple[Kind, int]] = {}
    for split in splits:
        _, before = most.get(split.task, (split.kind, 0))
        most[split.task] = (split.kind, max(before, int(split.n_choices.max())))
    return {task: choose_mode(kind, choices, requested, task=task) for task, (kind, choices) in most.items()}


def compute_outputs(z: Tensor, labels: Tensor, n_choices: Tensor, mode: OutputMode) -> Tensor:
    """Turn label scores into the outputs to differentiate.

    Args:
        z: ``(n, K_max)`` float32 scores, -inf past each example's choices; for ``sequence`` minus the mean NLL.
        labels: ``(n,)`` right choices.
        n_choices: ``(n,)`` choices each example has.
        mode: See the module's table.

    Returns:
        u, ``(n, c)`` float32: c = 1, or ``K_max - 1`` for ``contrast`` (zeros past an example's own contrasts).
    """
    if mode == "margin":
        return z[:, 1:2] - z[:, 0:1]
    if mode == "contrast":
        contrasts = torch.from_numpy(helmert(z.shape[1])).to(z)  # (K-1, K)
        u = z.masked_fill(torch.isinf(z), 0.0) @ contrasts.T
        # The first k-1 contrasts of K classes are the contrasts of k classes; later ones mean nothing for fewer.
        meaningful = torch.arange(1, z.shape[1], device=z.device) < n_choices[:, None]
        return torch.where(meaningful, u, torch.zeros_like(u))
    if mode == "logodds":
        is_answer = torch.nn.functional.one_hot(labels, z.shape[1]).bool()
        others = torch.logsumexp(z.masked_fill(is_answer, -torch.inf), dim=1)
        return (z.gather(1, labels[:, None])[:, 0] - others)[:, None]
    nll = (-z[:, :1]).clamp(min=_SMALLEST_NLL)
    return -(nll + torch.log(-torch.expm1(-nll)))  # = -log(exp(nll) - 1), and finite for any nll


def label_of_mode(labels: np.ndarray, mode: OutputMode) -> np.ndarray:
    """Labels as the oracle reads them: class indices, or 0 where the output already is the right answer's."""
    return labels if mode in ("margin", "contrast") else np.zeros_like(labels)
