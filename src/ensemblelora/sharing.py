"""Whether a model family lets the choices of a question share their context in one row.

That takes an attention mask of our own and positions that begin again for every choice, which most decoders accept.
Whether one does is tried, not looked up: a question with two choices is run both ways.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ensemblelora.data.batching import Batch, collate
from ensemblelora.data.encoding import EncodedSplit, Layout
from ensemblelora.scoring import model_inputs

__all__ = ["can_share_context", "make_probe"]

_CONTEXT, _ANSWERS = 12, (3, 5)
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_LOW_PRECISION_TOLERANCE = 0.05
_OWN_MASK = ("eager", "sdpa")
"""attention implementations that take a mask of any shape"""


def can_share_context(model: PreTrainedModel) -> bool:
    """Try both layouts on a few tokens and compare the last hidden states at every scored position.

    Args:
        model: A model with a language-modelling head, in evaluation mode.
    """
    config = model.config
    if config._attn_implementation not in _OWN_MASK or getattr(config, "sliding_window", None):
        return False
    try:
        apart, together = (_find_hidden(model, layout) for layout in ("rows", "shared"))
    except (RuntimeError, ValueError, TypeError, IndexError):  # a family that takes no such mask or positions
        return False
    error = float((apart - together).abs().max() / apart.abs().max().clamp(min=1e-6))
    return error <= _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE)


def make_probe(vocab_size: int, layout: Layout = "rows") -> Batch:
    """One question with two answers of different length, its tokens spread over the vocabulary."""
    return collate([(_make_split(vocab_size), 0)], pad_token_id=0, layout=layout)


def _find_hidden(model: PreTrainedModel, layout: Layout) -> torch.Tensor:
    batch = make_probe(int(model.config.vocab_size), layout)
    body: nn.Module = model.base_model
    with torch.inference_mode():
        hidden: torch.Tensor = body(**model_inputs(model, batch), use_cache=False).last_hidden_state
    rows, columns = torch.from_numpy(batch.positions).to(hidden.device).unbind(1)
    return hidden[rows, columns].float()


def _make_split(vocab_size: int) -> EncodedSplit:
    sizes = [_CONTEXT + answer for answer in _ANSWERS]
    spread = (np.arange(1, sum(sizes) + 1) * 7919) % vocab_size
    context = spread[:_CONTEXT]
    rows = [np.concatenate([context, spread[-answer:]]) for answer in _ANSWERS]
    return EncodedSplit(
        task="probe",
        split="probe",
        kind="options",
        tokens=np.concatenate(rows).astype(np.int32),
        row_starts=np.cumsum([0, *sizes], dtype=np.int64),
        answer_starts=np.full(len(sizes), _CONTEXT, np.int32),
        example_rows=np.array([0, len(sizes)], np.int64),
        labels=np.zeros(1, np.int64),
        n_choices=np.array([len(sizes)], np.int16),
        label_tokens=np.zeros(0, np.int32),
        divisors=np.ones(len(sizes), np.float32),
        groups=np.zeros(1, np.int64),
        ids=("probe",),
        n_truncated=0,
    )
