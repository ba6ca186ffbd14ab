"""Tiny models of every family and random encoded splits, for tests that need real forward and backward passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ensemblelora.adapters import THETA0, AdaptedModel, adapter_state, attach, set_adapter_state
from ensemblelora.config import AdapterConfig
from ensemblelora.data.batching import collate
from ensemblelora.data.encoding import EncodedSplit, Layout
from ensemblelora.models import BaseModel, prepare_base

VOCABULARY = 96
DECODERS = ("llama", "qwen2", "gpt2", "gptj")
CLASSIFIERS = ("bert", "llama")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GPT_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}


class PadOnly:
    """Stands in for a tokenizer where only the padding token matters."""

    pad_token_id = 0
    eos_token_id = 0


def make_network(family: str, *, head: str = "lm", n_labels: int = 3, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """Build a random model, float32, eager attention."""
    torch.manual_seed(seed)
    options = {"attn_implementation": "eager", "pad_token_id": 0}
    if family == "bert":
        return BertForSequenceClassification(BertConfig(**_SIZES | sizes, num_labels=n_labels, **options))
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**_GPT_SIZES | sizes, **options))
    if family == "gptj":
        return GPTJForCausalLM(GPTJConfig(**_GPT_SIZES | sizes, rotary_dim=4, **options))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**_SIZES | {"num_key_value_heads": 2} | sizes, **options))
    config = LlamaConfig(**_SIZES | {"num_key_value_heads": 2} | sizes, **options, num_labels=n_labels)
    return LlamaForCausalLM(config) if head == "lm" else LlamaForSequenceClassification(config)


def make_base(family: str = "llama", *, head: str = "lm", **options: Any) -> BaseModel:
    """A tiny frozen base model."""
    network = make_network(family, head=head, **options)
    return prepare_base(f"tiny-{family}", network, PadOnly(), head=head)  # type: ignore[arg-type]


def make_adapted(family: str = "llama", *, head: str = "lm", seed: int = 0, r: int = 4, **options: Any) -> AdaptedModel:
    """A tiny base model with its start adapter."""
    return attach(make_base(family, head=head, **options), AdapterConfig(r=r, lora_alpha=2 * r), seed=seed)


def disturb(adapted: AdaptedModel, name: str = THETA0, *, scale: float = 0.3, seed: int = 1) -> None:
    """Move every tensor of an adapter by random noise, so that it computes something of its own."""
    generator = torch.Generator().manual_seed(seed)
    state = adapter_state(adapted, name)
    moved = {k: t + scale * torch.randn(t.shape, generator=generator) * 0.1 for k, t in state.items()}
    set_adapter_state(adapted, name, moved)


def make_split(
    kind: str,
    *,
    n: int = 6,
    n_choices: int = 3,
    seed: int = 0,
    task: str = "t",
    split: str = "train",
    ragged: bool = False,
) -> EncodedSplit:
    """Random rows of one kind. ``ragged`` gives examples different numbers of choices (options only)."""
    rng = np.random.default_rng(seed)
    choices = rng.integers(2, n_choices + 1, n) if ragged else np.full(n, n_choices)
    if ragged:
        choices[0] = n_choices
    rows, starts, counts, divisors = [], [], [], []
    for example in range(n):
        context = rng.integers(1, VOCABULARY, rng.integers(3, 12))
        n_rows = int(choices[example]) if kind == "options" else 1
        for _ in range(n_rows):
            answer = rng.integers(1, VOCABULARY, rng.integers(1, 4)) if kind in ("options", "sequence") else []
            rows.append(np.concatenate([context, answer]).astype(np.int32))
            starts.append(len(context))
            divisors.append(len(answer) if kind == "sequence" else 1.0)
        counts.append(n_rows)
    if kind == "sequence":
        choices = np.ones(n, dtype=int)
    return EncodedSplit(
        task=task,
        split=split,
        kind=kind,  # type: ignore[arg-type]
        tokens=np.concatenate(rows),
        row_starts=np.cumsum([0, *(len(r) for r in rows)]).astype(np.int64),
        answer_starts=np.array(starts, dtype=np.int32),
        example_rows=np.cumsum([0, *counts]).astype(np.int64),
        labels=(rng.integers(0, choices) if kind != "sequence" else np.zeros(n)).astype(np.int64),
        n_choices=choices.astype(np.int16),
        label_tokens=np.arange(5, 5 + n_choices, dtype=np.int32) if kind == "verbalizer" else np.empty(0, np.int32),
        divisors=np.array(divisors, dtype=np.float32),
        groups=np.arange(n, dtype=np.int64),
        ids=tuple(f"train:{i}" for i in range(n)),
        n_truncated=0,
    )


def make_learnable_split(kind: str, **options: Any) -> EncodedSplit:
    """Rows whose answer a model can learn: the context's first token, or the right choice's own, gives it away."""
    split = make_split(kind, **options)
    for example, label in enumerate(split.labels):
        rows = range(split.example_rows[example], split.example_rows[example + 1])
        for choice, row in enumerate(rows):
            start, answer = split.row_starts[row], split.row_starts[row] + split.answer_starts[row]
            split.tokens[start] = 80 + label
            if kind == "options":
                split.tokens[answer] = 90 if choice == label else 91
            if kind == "sequence":
                split.tokens[start] = 80 + example % 3
                split.tokens[answer : split.row_starts[row + 1]] = 60 + example % 3
    return split


def count_tokens(split: EncodedSplit, layout: Layout) -> int:
    """Tokens a model reads of a split, padding apart."""
    return sum(collate([(split, e)], 0, layout=layout).n_real_tokens for e in range(split.n_examples))
