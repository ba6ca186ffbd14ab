"""Free-text answers of an ensemble, token by token.

Members are mixed as probabilities at every step, the same mixture whose log-likelihood is reported, and the likeliest
token is taken (greedy). Each member keeps its own attention cache; contexts are padded on the left.

Cost: members x (context + one token a step). Memory: members x one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel, activate
from ensemblelora.config import MaxTokens
from ensemblelora.counting import count_generation
from ensemblelora.data.batching import plan_batches
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.passes import choose_max_tokens
from ensemblelora.progress import track

__all__ = ["decode_answers", "generate", "generate_answers", "list_contexts", "matches_exactly"]

Tokens = npt.NDArray[np.int64]


def generate_answers(
    adapted: AdaptedModel,
    encoded: EncodedSplit,
    members: Sequence[str],
    weights: Sequence[float],
    *,
    max_tokens: MaxTokens,
    meter: Meter | None = None,
) -> list[list[int]]:
    """Generate one answer per example of a free-text split, no longer than the longest reference answer.

    Args:
        adapted: The model with its members.
        encoded: A split of kind ``sequence``.
        members: Adapter names.
        weights: Their shares of the mixture.
        max_tokens: Padded tokens in one batch, answers included.
        meter: Told what every pass costs.

    Returns:
        Token ids of each answer, without the end token.
    """
    longest = int((encoded.row_lengths - encoded.answer_starts).max())
    contexts = list_contexts(encoded)
    return generate(adapted, contexts, members, weights, max_new_tokens=longest, max_tokens=max_tokens, meter=meter)


def list_contexts(encoded: EncodedSplit) -> list[Tokens]:
    """Return what the model reads of every example of a free-text split before it answers."""
    return [
        encoded.tokens[start : start + length].astype(np.int64)
        for start, length in zip(encoded.row_starts[:-1], encoded.answer_starts, strict=True)
    ]


def generate(
    adapted: AdaptedModel,
    contexts: Sequence[Tokens],
    members: Sequence[str],
    weights: Sequence[float],
    *,
    max_new_tokens: int,
    max_tokens: MaxTokens,
    meter: Meter | None = None,
) -> list[list[int]]:
    """Generate one answer per context, greedily from the members' mixture; see :func:`generate_answers`."""
    answers: list[list[int]] = [[] for _ in contexts]
    lengths = np.array([len(context) + max_new_tokens for context in contexts])
    plan = plan_batches(lengths, np.ones(len(contexts), dtype=np.int64), choose_max_tokens(adapted, max_tokens))
    for batch in track(plan, "generate"):
        chosen = [contexts[int(e)] for e in batch]
        produced, n_steps = _generate_batch(adapted, chosen, members, weights, max_new_tokens)
        widths = [len(context) for context in chosen]
        count_generation(meter, adapted.costs, widths, n_steps=n_steps, times=len(members))
        for example, answer in zip(batch, produced, strict=True):
            answers[int(example)] = answer
    return answers


def decode_answers(adapted: AdaptedModel, answers: Sequence[Sequence[int]]) -> list[str]:
    """Turn answers into text, surrounding blanks removed."""
    tokenizer = adapted.base.tokenizer
    return [str(tokenizer.decode(list(answer), skip_special_tokens=True)).strip() for answer in answers]


def matches_exactly(
    adapted: AdaptedModel, encoded: EncodedSplit, answers: Sequence[Sequence[int]]
) -> npt.NDArray[np.bool_]:
    """Whether each answer's text is the reference answer's, bool ``(n_examples,)``."""
    ends = zip(encoded.row_starts[:-1], encoded.answer_starts, encoded.row_starts[1:], strict=True)
    references = [encoded.tokens[start + answer : stop].tolist() for start, answer, stop in ends]
    pairs = zip(decode_answers(adapted, answers), decode_answers(adapted, references), strict=True)
    return np.array([answer == reference for answer, reference in pairs])


def _generate_batch(
    adapted: AdaptedModel, contexts: Sequence[Tokens], members: Sequence[str], weights: Sequence[float], steps: int
) -> tuple[list[list[int]], int]:
    """Return the answers, and how many steps were taken before the last of them ended."""
    end = adapted.base.tokenizer.eos_token_id
    tokens, mask = (torch.from_numpy(a).to(adapted.device) for a in _pad_left(contexts, adapted.base.pad_token_id))
    next_probabilities = _start_mixture(adapted, members, weights)
    answers: list[list[int]] = [[] for _ in contexts]
    is_running = np.ones(len(contexts), dtype=bool)
    for step in range(steps):
        chosen = next_probabilities(tokens, mask).argmax(-1)  # (n,)
        for example, token in enumerate(chosen.tolist()):
            is_running[example] &= token != end
            if is_running[example]:
                answers[example].append(token)
        if not is_running.any():
            return answers, step + 1
        tokens = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers, steps


def _start_mixture(
    adapted: AdaptedModel, members: Sequence[str], weights: Sequence[float]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what gives the mixture's probabilities of the next token, ``(n, V)``, from new tokens and the mask."""
    caches: list[Any] = [None] * len(members)

    @torch.inference_mode()
    def next_probabilities(tokens: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        mixture = torch.zeros((), device=tokens.device)
        for m, (member, weight) in enumerate(zip(members, weights, strict=True)):
            with activate(adapted, member):
                output = adapted.network(**inputs, past_key_values=caches[m], use_cache=True, logits_to_keep=1)
            caches[m] = output.past_key_values
            mixture = mixture + weight * torch.softmax(output.logits[:, -1].float(), dim=-1)
        return mixture

    return next_probabilities


def _pad_left(contexts: Sequence[Tokens], pad: int) -> tuple[Tokens, Tokens]:
    width = max(len(context) for context in contexts)
    tokens = np.full((len(contexts), width), pad, dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, context in enumerate(contexts):
        tokens[row, width - len(context) :] = context
        mask[row, width - len(context) :] = 1
    return tokens, mask
