"""Label scores of any members on any rows, in one call.

In: the adapted model, an encoded split, adapter names. Out: :class:`MemberScores`, numpy float32.
Rows of the scores are examples, or, for free-text answers, the answers' tokens: there a member is judged by the
log-probability it gives each right token, and members are mixed token by token.

Cost: lower blocks once, upper blocks once a member, label positions only in the output layer. Members share a pass
where their rows fit the token budget together, so memory is one batch's, however many members there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel
from ensemblelora.config import MaxTokens
from ensemblelora.counting import count_forward
from ensemblelora.data.batching import Batch, collate, plan_batches, repeat_batch
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.passes import MemberRunner, choose_max_tokens, members_in_turn, run_lower
from ensemblelora.progress import track

__all__ = ["MemberScores", "arrange_scores", "member_nll", "predict_members"]


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
    adapted: AdaptedModel,
    encoded: EncodedSplit,
    members: Sequence[str],
    *,
    max_tokens: MaxTokens,
    meter: Meter | None = None,
) -> MemberScores:
    """Score one split with each member.

    Args:
        adapted: The model; every member must be one of its adapters.
        encoded: The split.
        members: Adapter names, in the order of the result.
        max_tokens: Padded tokens in one forward pass; halved as often as an accelerator's memory demands.
        meter: Told what every pass costs.

    Returns:
        Scores in the split's own order of examples.
    """
    budget = choose_max_tokens(adapted, max_tokens)
    values = None
    while values is None:
        try:
            values = _score_split(budget, adapted, encoded, members, meter)
        except torch.OutOfMemoryError:
            if adapted.base.is_sharded or budget < int(encoded.measure(adapted.layout)[0].max()):
                raise
            budget //= 2
            torch.cuda.empty_cache()
    return arrange_scores(encoded, values)


def arrange_scores(encoded: EncodedSplit, values: np.ndarray) -> MemberScores:
    """Say which example each row of scores ``(m, n_rows, K)`` belongs to."""
    lengths = np.diff(_row_starts(encoded))
    return MemberScores(
        task=encoded.task,
        kind=encoded.kind,
        values=values,
        row_example=np.repeat(np.arange(encoded.n_examples), lengths),
        row_weights=np.repeat(1.0 / lengths, lengths).astype(np.float32),
    )


def _score_split(
    max_tokens: int, adapted: AdaptedModel, encoded: EncodedSplit, members: Sequence[str], meter: Meter | None
) -> np.ndarray:
    """Every member's scores of every row, ``(members, n_rows, K)``."""
    shape = (len(members), _n_rows(encoded), max(int(encoded.n_choices.max(initial=1)), 1))
    values = np.full(shape, -np.inf, dtype=np.float32)
    starts = _row_starts(encoded)
    plan = plan_batches(*encoded.measure(adapted.layout), max_tokens)
    with members_in_turn(adapted, members) as runner:
        for indices in track(plan, f"predict {encoded.task} ({encoded.split})"):
            batch = collate([(encoded, int(e)) for e in indices], adapted.base.pad_token_id, layout=adapted.layout)
            for m, scores in enumerate(_score_members(adapted, runner, batch, members, max_tokens, meter)):
                if encoded.kind == "sequence":
                    where = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in batch.examples])
                    values[m, where, 0] = scores
                else:
                    values[m, batch.examples, : scores.shape[1]] = scores
    return values


def _score_members(
    adapted: AdaptedModel,
    runner: MemberRunner,
    batch: Batch,
    members: Sequence[str],
    max_tokens: int,
    meter: Meter | None,
) -> Iterator[np.ndarray]:
    """Yield each member's scores of a batch, ``(n, K)`` or ``(n_scored,)``; several in one pass while they fit it."""
    hidden = run_lower(adapted, batch, meter=meter)
    n_together = max(1, max_tokens // batch.n_padded_tokens) if runner.can_mix else 1
    for start in range(0, len(members), n_together):
        some = members[start : start + n_together]
        states = None if hidden is None else hidden.repeat(len(some), 1, 1)
        scores = runner.score(repeat_batch(batch, len(some)), some, states)
        found = scores.token_logprobs if batch.kinds[0] == "sequence" else scores.z
        yield from np.split(found.float().cpu().numpy(), len(some))
    n_passes = -(-len(members) // n_together)
    count_forward(meter, adapted.costs, batch, times=len(members), n_passes=n_passes)


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
    with np.errstate(invalid="ignore"):  # whoever asks says what a score that is not a number means
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
