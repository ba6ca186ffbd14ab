"""Free-text answers of an ensemble, token by token.

Members are mixed as probabilities at every step, the same mixture whose log-likelihood is reported, and the likeliest
token is taken (greedy). Each member keeps its own attention cache; contexts are padded on the left.

Cost: members x (context + one token a step). Memory: members x one cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ensemblelora.adapters import AdaptedModel, activate
from ensemblelora.data.batching import plan_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.progress import track

__all__ = ["decode_answers", "generate", "generate_answers", "matches_exactly"]


def generate_answers(
    adapted: AdaptedModel, encoded: EncodedSplit, members: Sequence[str], weights: Sequence[float], *, max_tokens: int
) -> list[list[int]]:
    """Generate one answer per example of a free-text split, no longer than the longest reference answer.

    Args:
        adapted: The model with its members.
        encoded: A split of kind ``sequence``.
        members: Adapter names.
        weights: Their shares of the mixture.
        max_tokens: Padded tokens in one batch, answers included.

    Returns:
        Token ids of each answer, without the end token.
    """
    contexts = [
        encoded.tokens[start : start + length].astype(np.int64)
        for start, length in zip(encoded.row_starts[:-1], encoded.answer_starts, strict=True)
    ]
    longest = int((encoded.row_lengths - encoded.answer_starts).max())
    return generate(adapted, contexts, members, weights, max_new_tokens=longest, max_tokens=max_tokens)


def generate(
    adapted: AdaptedModel,
    contexts: Sequence[np.ndarray],
    members: Sequence[str],
    weights: Sequence[float],
    *,
    max_new_tokens: int,
    max_tokens: int,
) -> list[list[int]]:
    """Generate one answer per context, greedily from the members' mixture; see :func:`generate_answers`."""
    answers: list[list[int]] = [[] for _ in contexts]
    lengths = np.array([len(context) + max_new_tokens for context in contexts])
    plan = plan_batches(lengths, np.ones(len(contexts), dtype=np.int64), max_tokens)
    for batch in track(plan, "generate"):
        produced = _generate_batch(adapted, [contexts[int(e)] for e in batch], members, weights, max_new_tokens)
        for example, answer in zip(batch, produced, strict=True):
            answers[int(example)] = answer
    return answers


def decode_answers(adapted: AdaptedModel, answers: Sequence[Sequence[int]]) -> list[str]:
    """Turn answers into text, surrounding blanks removed."""
    tokenizer = adapted.base.tokenizer
    return [str(tokenizer.decode(list(answer), skip_special_tokens=True)).strip() for answer in answers]


def matches_exactly(adapted: AdaptedModel, encoded: EncodedSplit, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Whether each answer's text is the reference answer's, ``(n_examples,)`` bool."""
    references = [
        encoded.tokens[start + answer : stop].tolist()
        for start, answer, stop in zip(encoded.row_starts[:-1], encoded.answer_starts, encoded.row_starts[1:], strict=True)
    ]
    pairs = zip(decode_answers(adapted, answers), decode_answers(adapted, references), strict=True)
    return np.array([answer == reference for answer, reference in pairs])


@torch.inference_mode()
def _generate_batch(
    adapted: AdaptedModel, contexts: Sequence[np.ndarray], members: Sequence[str], weights: Sequence[float], steps: int
) -> list[list[int]]:
    device, end = adapted.device, adapted.base.tokenizer.eos_token_id
    tokens, mask = (torch.from_numpy(a).to(device) for a in _pad_left(contexts, adapted.base.pad_token_id))
    caches: list[object] = [None] * len(members)
    answers: list[list[int]] = [[] for _ in contexts]
    running = np.ones(len(contexts), dtype=bool)
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        mixture: Tensor | None = None
        for m, (member, weight) in enumerate(zip(members, weights, strict=True)):
            with activate(adapted, member):
                output = adapted.network(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=caches[m], use_cache=True, logits_to_keep=1
                )
            caches[m] = output.past_key_values
            share = weight * torch.softmax(output.logits[:, -1].float(), dim=-1)
            mixture = share if mixture is None else mixture + share
        assert mixture is not None
        chosen = mixture.argmax(-1)
        for example, token in enumerate(chosen.tolist()):
            running[example] &= token != end
            if running[example]:
                answers[example].append(token)
        if not running.any():
            break
        tokens = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def _pad_left(contexts: Sequence[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    width = max(len(context) for context in contexts)
    tokens = np.full((len(contexts), width), pad, dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, context in enumerate(contexts):
        tokens[row, width - len(context) :] = context
        mask[row, width - len(context) :] = 1
    return tokens, mask
