"""The sizes of models that decide what they cost, read from a model's config. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ensemblelora.errors import ModelError

__all__ = ["Matrix", "ModelShape", "Role", "model_shape"]

Role = Literal["query", "key", "value", "fused", "attention_out", "mlp_in", "mlp_out"]


@dataclass(frozen=True)
class Matrix:
    """One linear layer of a block.

    Attributes:
        path: Its module name inside the block.
        n_in: Width of its input.
        n_out: Width of its output.
        role: What it does; ``fused`` makes query, key and value at once.
    """

    path: str
    n_in: int
    n_out: int
    role: Role

    @property
    def n_parameters(self) -> int:
        """Entries of the weight, without bias."""
        return self.n_in * self.n_out


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide a transformer's cost; made by :func:`model_shape`.

    Attributes:
        family: The config's ``model_type``.
        hidden_size: Width of the residual stream, h.
        n_layers: Blocks, L.
        n_heads: Attention heads.
        n_kv_heads: Heads of keys and values.
        head_dim: Width of one head.
        intermediate_size: Width inside the MLP.
        vocab_size: Tokens.
        is_gated: Whether the MLP multiplies two input matrices.
        is_parallel: Whether attention and MLP read the same input (GPT-J).
        has_pooler: Whether one position a row passes an ``h x h`` layer before the classifier (BERT).
        matrices: The linear layers of one block.
    """

    family: str
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    is_gated: bool
    is_parallel: bool
    has_pooler: bool
    matrices: tuple[Matrix, ...]

    @property
    def block_parameters(self) -> int:
        """Entries of all blocks' weight matrices: the P_m of 2 P_m FLOPs per token."""
        return self.n_layers * sum(matrix.n_parameters for matrix in self.matrices)

    @property
    def n_parameters(self) -> int:
        """Block matrices and token embedding: the model's size up to norms, biases and positions."""
        return self.block_parameters + self.vocab_size * self.hidden_size


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Read a model's sizes from its config.

    Args:
        config: ``config.json`` as a mapping: families bert, gpt2, gptj, llama, mistral, qwen2 and qwen3.

    Raises:
        ModelError: If the family is another one, or a size is missing.
    """
    family = config.get("model_type")
    readers = {
        "bert": _read_bert,
        "gpt2": _read_gpt2,
        "gptj": _read_gptj,
        "llama": _read_llama,
        "mistral": _read_llama,
        "qwen2": _read_llama,
        "qwen3": _read_llama,
    }
    if family not in readers:
        raise ModelError(f"model family {family!r}: no cost formula; known are {', '.join(readers)}")
    try:
        return readers[family](config)
    except KeyError as error:
        raise ModelError(f"model family {family!r}: its config has no {error}, which the cost formula needs") from None


def _read_llama(config: Mapping[str, Any]) -> ModelShape:
    h, n_heads, inner = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    head_dim = config.get("head_dim") or h // n_heads
    return ModelShape(
        family=config["model_type"],
        hidden_size=h,
        n_layers=config["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=config["vocab_size"],
        is_gated=True,
        is_parallel=False,
        has_pooler=False,
        matrices=(
            Matrix("self_attn.q_proj", h, n_heads * head_dim, "query"),
            Matrix("self_attn.k_proj", h, n_kv_heads * head_dim, "key"),
            Matrix("self_attn.v_proj", h, n_kv_heads * head_dim, "value"),
            Matrix("self_attn.o_proj", n_heads * head_dim, h, "attention_out"),
            Matrix("mlp.gate_proj", h, inner, "mlp_in"),
            Matrix("mlp.up_proj", h, inner, "mlp_in"),
            Matrix("mlp.down_proj", inner, h, "mlp_out"),
        ),
    )


def _plain_shape(
    config: Mapping[str, Any], h: int, n_layers: int, n_heads: int, inner: int, matrices: tuple[Matrix, ...]
) -> ModelShape:
    """A block with as many key heads as query heads and an MLP without gate."""
    return ModelShape(
        family=config["model_type"],
        hidden_size=h,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=h // n_heads,
        intermediate_size=inner,
        vocab_size=config["vocab_size"],
        is_gated=False,
        is_parallel=config["model_type"] == "gptj",
        has_pooler=config["model_type"] == "bert",
        matrices=matrices,
    )


def _read_gpt2(config: Mapping[str, Any]) -> ModelShape:
    h = config["n_embd"]
    inner = config.get("n_inner") or 4 * h
    matrices = (
        Matrix("attn.c_attn", h, 3 * h, "fused"),
        Matrix("attn.c_proj", h, h, "attention_out"),
        Matrix("mlp.c_fc", h, inner, "mlp_in"),
        Matrix("mlp.c_proj", inner, h, "mlp_out"),
    )
    return _plain_shape(config, h, config["n_layer"], config["n_head"], inner, matrices)


def _read_gptj(config: Mapping[str, Any]) -> ModelShape:
    h = config["n_embd"]
    inner = config.get("n_inner") or 4 * h
    matrices = (
        Matrix("attn.q_proj", h, h, "query"),
        Matrix("attn.k_proj", h, h, "key"),
        Matrix("attn.v_proj", h, h, "value"),
        Matrix("attn.out_proj", h, h, "attention_out"),
        Matrix("mlp.fc_in", h, inner, "mlp_in"),
        Matrix("mlp.fc_out", inner, h, "mlp_out"),
    )
    return _plain_shape(config, h, config["n_layer"], config["n_head"], inner, matrices)


def _read_bert(config: Mapping[str, Any]) -> ModelShape:
    h, inner = config["hidden_size"], config["intermediate_size"]
    matrices = (
        Matrix("attention.self.query", h, h, "query"),
        Matrix("attention.self.key", h, h, "key"),
        Matrix("attention.self.value", h, h, "value"),
        Matrix("attention.output.dense", h, h, "attention_out"),
        Matrix("intermediate.dense", h, inner, "mlp_in"),
        Matrix("output.dense", inner, h, "mlp_out"),
    )
    return _plain_shape(config, h, config["num_hidden_layers"], config["num_attention_heads"], inner, matrices)
