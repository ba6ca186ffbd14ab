"""Label scores of any members on any rows, in one call.

In: the adapted model, an encoded split, adapter names. Out: :class:`MemberScores`, numpy float32.
Rows of the scores are examples, or, for free-text answers, the answers' tokens: there a member is judged by the
log-probability it gives each right token, and members are mixed token by token.

Cost: members x forward, label positions only in the output layer. Memory: one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, activate
from ensemblelora.counting import count_forward
from ensemblelora.data.batching import collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.progress import track
from ensemblelora.scoring import score_batch

__all__ = ["MemberScores", "member_nll", "predict_members"]


@dataclass(frozen=True, eq=False)
class MemberScores:
    """Scores of m members on one split."""

    task: str
    kind: str
    values: np.ndarray
    """(m, n_rows, K) float32: class scores with -inf past an example's choices; for sequences K = 1, the
    log-probability of the right token"""
    row_example: np.ndarray
    """(n_rows,) int64: the example each row belongs to"""
    row_weights: np.ndarray
    """(n_rows,) float32: sums to one within an example (1 / number of answer tokens for sequences)"""


def predict_members(
    adapted: AdaptedModel, encoded: EncodedSplit, members: Sequence[str], *, max_tokens: int, meter: Meter | None = None
) -> MemberScores:
    """Score one split with each member.

    Args:
        adapted: The model; every member must be one of its adapters.
        encoded: The split.
        members: Adapter names, in the order of the result.
        max_tokens: Padded tokens in one forward pass.
        meter: Told what every pass costs.

    Returns:
        Scores in the split's own order of examples.
    """
    shape = (len(members), _n_rows(encoded), max(int(encoded.n_choices.max()), 1))
    values = np.full(shape, -np.inf, dtype=np.float32)
    starts = _row_starts(encoded)
    plan = plan_batches(encoded.example_lengths, encoded.row_counts, max_tokens)
    for indices in track(plan, f"predict {encoded.task} ({encoded.split})"):
        batch = collate([(encoded, int(e)) for e in indices], adapted.base.pad_token_id)
        for m, member in enumerate(members):
            with activate(adapted, member), torch.inference_mode():
                scores = score_batch(adapted.network, batch)
            if encoded.kind == "sequence":
                where = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in batch.examples])
                values[m, where, 0] = scores.token_logprobs.float().cpu().numpy()
            else:
                z = scores.z.float().cpu().numpy()
                values[m, batch.examples, : z.shape[1]] = z
        count_forward(meter, adapted.costs, batch, times=len(members))
    lengths = np.diff(starts)
    return MemberScores(
        task=encoded.task,
        kind=encoded.kind,
        values=values,
        row_example=np.repeat(np.arange(encoded.n_examples), lengths),
        row_weights=np.repeat(1.0 / lengths, lengths).astype(np.float32),
    )


def member_nll(scores: MemberScores, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each example under each member, ``(m, n_examples)`` float64 (nats).

    Class scores go through a softmax over the example's own choices; a sequence gives its mean token NLL.
    """
    values = scores.values.astype(np.float64)
    if scores.kind == "sequence":
        rows = -values[:, :, 0] * scores.row_weights
        starts = np.flatnonzero(np.diff(scores.row_example, prepend=-1))
        summed: np.ndarray = np.add.reduceat(rows, starts, axis=1)
        return summed
    picked = values[:, np.arange(len(labels)), labels]
    nll: np.ndarray = np.logaddexp.reduce(values, axis=2) - picked
    return nll


def _row_starts(encoded: EncodedSplit) -> np.ndarray:
    """Where each example's rows of scores begin, ``(n_examples + 1,)``."""
    if encoded.kind != "sequence":
        return np.arange(encoded.n_examples + 1)
    lengths = encoded.row_lengths - encoded.answer_starts  # a sequence has one row an example
    return np.concatenate([[0], np.cumsum(lengths)])


def _n_rows(encoded: EncodedSplit) -> int:
    return int(_row_starts(encoded)[-1])
