"""The README of an export: how to load it, what it is made of, and what it was measured to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemblelora.adapters import THETA0
from ensemblelora.ensemble import Ensemble
from ensemblelora.gguf import EMBEDDED_MODEL, EMBEDDED_ORIGIN
from ensemblelora.models import Head

__all__ = ["ROUNDING", "BaseNote", "describe_fold", "describe_members", "describe_merged"]

ROUNDING = 0.01
"""nats by which a mean loss over few rows may move with the batches they are scored in, in 16 bits"""
_IMPORTS = {"bottleneck": ("import ensemblelora.bottleneck  # tells PEFT of these adapters",)}


@dataclass(frozen=True)
class BaseNote:
    """What a reader needs to know of the base model."""

    name: str
    """as the run's config has it"""
    location: str
    """what transformers loads it from, or a .gguf file"""
    dtype: str
    head: Head
    n_labels: int
    quantization: Mapping[str, Any] | None = None
    """what a ``BitsAndBytesConfig`` takes to load the run's weights; none for a base that is not in 4 bits"""
    is_packed_on_loading: bool = False
    """whether the base's files are in full precision nevertheless"""


def describe_members(base: BaseNote, ensemble: Ensemble, start: str | None, *, method: str = "lora") -> str:
    """Say how to load every member, and how their scores are combined.

    Args:
        base: The base model.
        ensemble: Members and weights.
        start: Name of the exported start adapter that boosters are measured from; none where it is the base itself.
        method: The kind of adapter; PEFT has to be told of those that it does not bring.
    """
    names = [ensemble.members_of(g)[0].name for g in range(len(ensemble.groups))]
    boosters = [member for member in ensemble.members if member.kind == "booster"]
    first, *more = (member.name for member in ensemble.members)
    lines = ["# Adapters of an ensemble", "", _say_base(base), "Every folder here is a plain PEFT adapter:", ""]
    load = [f'model = PeftModel.from_pretrained(base, "{first}", adapter_name="{first}")']
    load += [f'model.load_adapter("{name}", adapter_name="{name}")' for name in more]
    lines += _load_code(base, [*load, f'model.set_adapter("{first}")'], _IMPORTS.get(method, ()))
    mean = "mean of the groups' scores" if ensemble.combine == "logits" else "mean of the groups' softmax probabilities"
    lines += ["", f"A task's answer is the weighted {mean} (free text: of their token probabilities):", ""]
    lines += _table(
        ["task", *names],
        ([task, *map(_write, row)] for task, row in zip(ensemble.task_names, ensemble.weights, strict=True)),
    )
    if boosters:
        origin = f"`{start}`" if start else "the base model without an adapter"
        lines += ["", f"A group's scores are its adapter's plus `rate x (booster - start)`; start is {origin}."]
        lines += ["Free-text tasks leave boosters out.", ""]
        lines += _table(["booster", "group", "rate"], ([b.name, names[b.group], _write(b.rate)] for b in boosters))
    return "\n".join(lines) + "\n"


def describe_fold(base: BaseNote, weights: Mapping[str, float], rows: Sequence[Sequence[str]], averaged: int) -> str:
    """Say how to load one adapter, and what it is made of.

    Args:
        base: The base model.
        weights: What each member's change was multiplied with.
        rows: The measured table, its header first.
        averaged: How many tensors (of a classifier head) are weighted means of the members'.
    """
    load = ['model = PeftModel.from_pretrained(base, ".")  # this folder']
    lines = ["# An ensemble folded into one LoRA adapter", "", _say_base(base), "", *_load_code(base, load)]
    return "\n".join([*lines, "", *_say_origin(base, weights, rows, averaged)]) + "\n"


def describe_merged(base: BaseNote, weights: Mapping[str, float], rows: Sequence[Sequence[str]], averaged: int) -> str:
    """Say how to load a merged model, and what it is made of; arguments as for :func:`describe_fold`."""
    loader = _name_loader(base)
    said = _say_base(base)
    if base.quantization is not None:
        said += (
            f" The adapter is merged into the dequantised weights: what lies here is in {base.dtype}, as large as the "
            "base was before it was packed, and would compute something else if it were packed again."
        )
    lines = ["# An ensemble merged into its base model", "", said, "", "```python"]
    lines += [f"from transformers import AutoTokenizer, {loader}", ""]
    lines += [f'model = {loader}.from_pretrained(".", dtype="{base.dtype}")  # this folder']
    lines += ['tokenizer = AutoTokenizer.from_pretrained(".")', "```"]
    return "\n".join([*lines, "", *_say_origin(base, weights, rows, averaged)]) + "\n"


def _say_base(base: BaseNote) -> str:
    said = f"Base model: `{base.name}`, {base.dtype}."
    if base.name == EMBEDDED_MODEL:
        said += f" Its weights are those of `{EMBEDDED_ORIGIN}` in 4 bits, dequantised."
    if base.quantization is not None:
        said += f" The run had its blocks in 4 bits ({base.quantization['bnb_4bit_quant_type']}, bitsandbytes)."
    return said


def _say_difference(base: BaseNote) -> list[str]:
    """What a reader gets who loads the embedded model from where it comes from."""
    if base.name != EMBEDDED_MODEL:
        return []
    packed = "" if base.quantization is None else " before it is packed"
    return [
        "",
        f"This loads the original, not rounded to 4 bits{packed}: its scores differ a little from those of the run. "
        f"The very weights are `{_say_load_base(base)}`, from `ensemblelora.models` and `ensemblelora.config`.",
    ]


def _name_loader(base: BaseNote) -> str:
    return "AutoModelForCausalLM" if base.head == "lm" else "AutoModelForSequenceClassification"


def _load_code(base: BaseNote, load: Sequence[str], imports: Sequence[str] = ()) -> list[str]:
    first = [*imports, "from peft import PeftModel"]
    lines = ["```python", *first, *_load_base(base), *load, "```", *_say_difference(base)]
    if base.quantization is not None:
        lines += [
            "",
            "On a processor with AVX-512 BF16, bitsandbytes rounds further in passes without gradients; "
            "`settle_layers(base)`, from `ensemblelora.quantization`, called first, gives the scores of the run.",
        ]
    return lines


def _load_base(base: BaseNote) -> list[str]:
    """Lines that load the base as the run had it."""
    loader, sizes = _name_loader(base), "" if base.head == "lm" else f", num_labels={base.n_labels}"
    settings = base.quantization if base.is_packed_on_loading else None
    if settings is not None and Path(base.location).suffix == ".gguf":  # transformers packs nothing it reads from one
        return [
            "from ensemblelora.config import ModelConfig",
            "from ensemblelora.models import load_base",
            "",
            f"base = {_say_load_base(base)}",
        ]
    names, packing, lines = [loader], "", []
    if settings is not None:
        names, packing = [loader, "BitsAndBytesConfig"], ", quantization_config=packing"
        lines = [f"packing = BitsAndBytesConfig({_write_arguments(settings)})"]
    source = f'{_name_source(base)}, dtype="{base.dtype}"{sizes}{packing}'
    return [f"from transformers import {', '.join(names)}", "", *lines, f"base = {loader}.from_pretrained({source})"]


def _say_load_base(base: BaseNote) -> str:
    """A call of this package that gives the very weights of the run."""
    chosen: dict[str, Any] = {"name": base.name}
    if base.quantization is not None:
        double = bool(base.quantization.get("bnb_4bit_use_double_quant"))
        chosen |= {"dtype": base.dtype, "quantization": "nf4", "bnb_4bit_use_double_quant": double}
    head = "" if base.head == "lm" else f", {_write_arguments({'head': base.head, 'n_labels': base.n_labels})}"
    return f"load_base(ModelConfig({_write_arguments(chosen)}){head}).model"


def _write_arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items()).replace("'", '"')


def _name_source(base: BaseNote) -> str:
    path = Path(base.location)
    if path.suffix != ".gguf":
        return json.dumps(base.location)
    return f"{json.dumps(str(path.parent))}, gguf_file={json.dumps(path.name)}"


def _say_origin(
    base: BaseNote, weights: Mapping[str, float], rows: Sequence[Sequence[str]], averaged: int
) -> list[str]:
    lines = ["Its change of the base is the sum of these adapters' changes, each times its weight:", ""]
    lines += _table(["adapter", "weight"], ([name, _write(weight)] for name, weight in weights.items()))
    if THETA0 in weights:
        lines += ["", f"`{THETA0}` is the start that the boosters' changes are measured from."]
    if averaged:
        lines += ["", f"The classifier head ({averaged} tensors) is the mean of theirs with the same weights."]
    header, *body = rows
    return [*lines, "", "Measured on validation rows, losses in nats:", "", *_table(header, body), *_say_rounding(base)]


def _say_rounding(base: BaseNote) -> list[str]:
    """How near one gets to the measured losses with other batches."""
    if base.dtype == "float32":
        return []
    return [
        "",
        f"In {base.dtype} a row alone and the same row in a batch differ by rounding, so a loss over few rows comes "
        f"out again to about {ROUNDING:g} nats.",
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    marks = ["---"] * len(header)
    return [f"| {' | '.join(row)} |" for row in (header, marks, *rows)]


def _write(value: float) -> str:
    return f"{value:.4g}"
