"""One forward pass of the adapted model: lower blocks from the cache where there is one, then label scores.

In: the adapted model and a batch. Out: :class:`~ensemblelora.scoring.Scores`. The meter is told what the lower blocks
cost when they had to run; the pass through the upper ones is the caller's to count, since it knows about gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]  # ships no types
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ensemblelora import __version__
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, activate
from ensemblelora.config import MaxTokens
from ensemblelora.counting import count_lower
from ensemblelora.data.batching import Batch
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.forwards import replaced_forwards
from ensemblelora.fusion import can_fuse, can_mix, fused
from ensemblelora.models import find_blocks
from ensemblelora.prefix import HiddenCache
from ensemblelora.scoring import Scores, score_batch, scored_hidden
from ensemblelora.sharding import agree_on_least
from ensemblelora.switch import MemberSwitch

__all__ = [
    "FILL_TOKENS",
    "MemberRunner",
    "blocks_run_again",
    "choose_max_tokens",
    "compute_hidden",
    "members_in_turn",
    "run_lower",
    "score",
    "with_cache",
    "without_cache",
]

_FEWEST_TOKENS, _TYPICAL_WIDTH = 512, 512
_MOST_TOKENS = 8192
_MOST_TOKENS_ON_PROCESSOR = 4096  # what its allocator keeps of larger passes adds up, pass by pass
FILL_TOKENS = 4096
"""padded tokens of a pass that fills the cache; it keeps no activations"""


def with_cache(
    adapted: AdaptedModel, folder: Path, splits: Sequence[EncodedSplit], *, max_bytes: int, cleans: bool = True
) -> AdaptedModel:
    """Keep what enters the lowest adapted block for rows that will come again; nothing to keep if that is the first.

    Args:
        adapted: The model; it is not changed.
        folder: Where the files go.
        splits: Whose rows, the most wanted first; those that don't fit are run each time.
        max_bytes: All files together; 0 keeps nothing.
        cleans: Whether what lies there of other models or rows goes.
    """
    prefix = adapted.prefix
    if prefix is None or max_bytes == 0:
        return adapted
    model = adapted.base.model
    identity = f"{__version__} {adapted.base.fingerprint} {prefix.depth} {model.dtype}"
    width = int(model.config.hidden_size)
    cache = HiddenCache(folder, identity, max_bytes, width, model.dtype)
    cache.enlist(splits, cleans=cleans)
    return replace(adapted, prefix=replace(prefix, cache=cache))


def score(adapted: AdaptedModel, batch: Batch, *, meter: Meter | None = None, normalize: bool = False) -> Scores:
    """Score a batch with whatever adapter is active.

    Args:
        adapted: The model.
        batch: What to score.
        meter: Told what the lower blocks cost, if they ran for this batch or to fill the cache.
        normalize: See :func:`~ensemblelora.scoring.score_batch`.
    """
    with _from(adapted, run_lower(adapted, batch, meter=meter)):
        return score_batch(adapted.network, batch, normalize=normalize)


def compute_hidden(adapted: AdaptedModel, batch: Batch, *, lower: Tensor | None = None) -> Tensor:
    """Last hidden states at the scored positions with whatever adapter is active, ``(n_scored, hidden)``.

    Args:
        adapted: The model.
        batch: What to run.
        lower: What :func:`run_lower` gave for the batch, so that several adapters can share it.
    """
    with _from(adapted, lower):
        return scored_hidden(adapted.network, batch)


def run_lower(adapted: AdaptedModel, batch: Batch, *, meter: Meter | None = None) -> Tensor | None:
    """What enters the lowest adapted block, ``(rows, width, h)``; none where that is the model's first."""
    prefix = adapted.prefix
    if prefix is None:
        return None
    cache = prefix.cache
    # A model that is being compared in another precision reads nothing that was kept in its own.
    if cache is not None and cache.dtype == adapted.base.model.dtype:
        for split in cache.missing(batch):

            def run(rows: Batch) -> Tensor:
                count_lower(meter, adapted.costs, rows)
                return prefix.run(rows)

            pad = adapted.base.pad_token_id
            cache.fill(split, run, layout=adapted.layout, max_tokens=FILL_TOKENS, pad_token_id=pad)
        hidden, is_kept = cache.read(batch, adapted.device)
        if not is_kept.all():
            others = _take_rows(batch, ~is_kept)
            count_lower(meter, adapted.costs, others)
            hidden[torch.from_numpy(~is_kept).to(hidden.device)] = prefix.run(others).to(hidden.device)
        return hidden
    count_lower(meter, adapted.costs, batch)
    return prefix.run(batch)


def choose_max_tokens(adapted: AdaptedModel, asked: MaxTokens) -> int:
    """Padded tokens of a pass that keeps no activations: what a quarter of the free memory holds.

    At most 4,096 on a processor and 8,192 on an accelerator. Free memory is looked at once a process, so that all
    passes of a run are alike and its record can name their size.
    """
    if asked != "auto":
        return asked
    config = adapted.base.model.config
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    # A block's widest moment: the residual, a few of its size, the MLP's two inner values, a row of attention scores.
    numbers = 8 * hidden + 3 * inner + 2 * int(config.num_attention_heads) * _TYPICAL_WIDTH
    bytes_per_token = numbers * max(adapted.base.model.dtype.itemsize, 2) * 2
    return _find_fitting(bytes_per_token, adapted.device)


@cache
def _find_fitting(bytes_per_token: int, device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    most = _MOST_TOKENS_ON_PROCESSOR if device.type == "cpu" else _MOST_TOKENS
    return agree_on_least(int(min(max(free // 4 // bytes_per_token, _FEWEST_TOKENS), most)))


def without_cache(adapted: AdaptedModel) -> AdaptedModel:
    """The same model with its lower blocks run each time, for a few rows that are to be looked at."""
    return adapted if adapted.prefix is None else replace(adapted, prefix=replace(adapted.prefix, cache=None))


@contextmanager
def blocks_run_again(adapted: AdaptedModel) -> Iterator[None]:
    """Inside, a backward pass runs each block anew whose weights wait elsewhere, so that they go again after each.

    The graph of a forward pass would keep all of them. What is active inside must still be when the pass goes back.
    """
    if not adapted.base.is_waiting:
        yield
        return
    _, blocks = find_blocks(adapted.network)
    # Stopped early, as by default, a layer would be left before its weights are let go.
    with (
        set_checkpoint_early_stop(False),
        replaced_forwards(list(blocks), lambda block: partial(checkpoint, block.forward, use_reentrant=False)),
    ):
        yield


@contextmanager
def members_in_turn(adapted: AdaptedModel, members: Sequence[str]) -> Iterator[MemberRunner]:
    """Score batches with several members; inside, weights must not change."""
    if can_fuse(adapted):
        with fused(adapted, members) as switch:
            yield MemberRunner(adapted, switch)
    else:
        yield MemberRunner(adapted, None)


class MemberRunner:
    """Scores a batch whose rows belong to some members in turn, all at once where the layers allow it."""

    def __init__(self, adapted: AdaptedModel, switch: MemberSwitch | None) -> None:
        self._adapted, self._switch = adapted, switch
        self.can_mix = switch is not None and can_mix(adapted)
        """whether one pass can serve several members"""

    def score(self, batch: Batch, members: Sequence[str], hidden: Tensor | None) -> Scores:
        """Score a batch that holds the rows of each member in equal parts; ``hidden`` likewise, if given."""
        if self._switch is not None:
            self._switch.use(members)
        one_by_one = nullcontext() if self._switch is not None else activate(self._adapted, members[0])
        with one_by_one, torch.inference_mode(), _from(self._adapted, hidden):
            return score_batch(self._adapted.network, batch)


def _take_rows(batch: Batch, rows: NDArray[np.bool_]) -> Batch:
    """Some rows of a batch, as far as the lower blocks look at them."""
    segments, positions = (None if a is None else a[rows] for a in (batch.segments, batch.position_ids))
    ids, mask = batch.input_ids[rows], batch.attention_mask[rows]
    return replace(batch, input_ids=ids, attention_mask=mask, segments=segments, position_ids=positions)


@contextmanager
def _from(adapted: AdaptedModel, hidden: Tensor | None) -> Iterator[None]:
    if hidden is None or adapted.prefix is None:
        yield
        return
    with adapted.prefix.resumed(hidden):
        yield
