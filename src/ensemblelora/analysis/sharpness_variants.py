"""What is trained for the study of sharpness: adapters by rank, by number of members, by base and by width. No torch.

In: :class:`SharpnessOptions` and a config. Out: :class:`Variant`, each with the changes of the config that make it.

A rank alone is no single change: LoRA multiplies B A by ``lora_alpha / r``, and at a fixed alpha the gradient of B
falls with the rank whatever the loss looks like. So every rank is trained under three rules, which agree at the
config's own rank: ``fixed`` leaves alpha as it is, ``proportional`` the scale, ``rslora`` lets it fall with r's root.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from ensemblelora.analysis.variant import Changes
from ensemblelora.config import RunConfig
from ensemblelora.config_stage import Stage
from ensemblelora.errors import UsageError

__all__ = ["PARTS", "Part", "Scaling", "SharpnessOptions", "Variant", "list_variants", "read_targets", "scale_alpha"]

Part = Literal["rank", "ensemble", "quantization", "width"]
Scaling = Literal["fixed", "proportional", "rslora"]

PARTS: Mapping[Part, str] = {
    "rank": "rank",
    "ensemble": "number of adapters at a fixed total rank",
    "quantization": "LoRA against QLoRA",
    "width": "width of bottleneck adapters",
}
"""what each part varies (paper, figures 6a, 6b, 6c and 9)"""

_Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class SharpnessOptions(Stage):
    """What to train, and how closely to look at it."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = Field(
        ("rank", "ensemble", "quantization", "width"), description="Which of the studies; figures 6a, 6b, 6c and 9."
    )
    tasks: tuple[str, ...] = Field((), description="Whose adapters are measured, by name; none: all of the config's.")
    targets: tuple[str, ...] = Field(
        (), description="SOURCE:TARGET: adapters of one task, scored on the test rows of another that they never saw."
    )
    ranks: _Sizes = Field((4, 16, 64, 256), description="Paper: these.")
    scalings: Annotated[tuple[Scaling, ...], Field(min_length=1)] = Field(
        ("fixed", "proportional", "rslora"), description="Rules for lora_alpha as the rank changes."
    )
    ensemble_sizes: _Sizes = Field((1, 2, 4, 8), description="Paper: 2, 4, 8 beside one adapter.")
    total_rank: int = Field(256, ge=1, description="Of all members together. Paper: 256.")
    ensemble_scaling: Scaling = Field("proportional", description="Rule for the members' lora_alpha.")
    reductions: _Sizes = Field((144, 36, 9, 2), description="Of bottlenecks; the model's width over theirs.")
    width_quantization: Literal["none", "nf4"] = Field("nf4", description="Base of the bottlenecks. Paper: QAdapter.")
    checkpoint: Literal["last", "best"] = Field(
        "last", description="Of a training; best: that of least validation loss, which hides much of the gap."
    )
    n_examples: int = Field(16, ge=1, description="Training rows at which the Hessian is looked at.")
    n_probes: int = Field(50, ge=50, description="Random vectors of each trace; as many are always used.")
    n_eigenvalues: int = Field(1, ge=0, description="Rows, those of the largest traces, whose eigenvalue is found.")
    weight_coordinates: bool = Field(
        True, description="Also look along the weights' own entries, which a rank or scale does not change."
    )


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to train.

    Attributes:
        part: The study it belongs to.
        label: Unlike any other's of its part.
        size: What is varied: rank, members, 4 or 16 bits, or the model's width over the bottleneck's.
        scaling: The rule for lora_alpha; empty where there is none.
        changes: Of the config.
        n_members: Adapters whose scores are averaged, each of a seed of its own.
    """

    part: Part
    label: str
    size: float
    scaling: str
    changes: Changes
    n_members: int = 1

    @property
    def has_lora(self) -> bool:
        """Whether its adapters are LoRA, whose weights have coordinates of their own."""
        return bool(self.changes["adapter"]["method"] == "lora")


def list_variants(options: SharpnessOptions, config: RunConfig) -> tuple[Variant, ...]:
    """List what is trained; variants of several parts may be the same adapters.

    Args:
        options: Parts and sizes.
        config: Its rank and alpha are where the scaling rules agree.

    Raises:
        UsageError: If the total rank can't be divided among the members.
    """
    uneven = [k for k in options.ensemble_sizes if options.total_rank % k]
    if "ensemble" in options.parts and uneven:
        raise UsageError(f"total_rank {options.total_rank}: can't be divided among {uneven[0]} members; change one")
    makers = {"rank": _vary_rank, "ensemble": _vary_members, "quantization": _vary_base, "width": _vary_width}
    return tuple(variant for part in PARTS if part in options.parts for variant in makers[part](options, config))


def scale_alpha(config: RunConfig, r: int, scaling: Scaling) -> float:
    """Return ``lora_alpha`` of another rank, by a rule under which the config's own rank keeps its alpha.

    Example:
        >>> from ensemblelora.config import parse_config
        >>> config = parse_config({"data": {"tasks": ["a"]}, "adapter": {"r": 8, "lora_alpha": 16}})
        >>> [scale_alpha(config, 32, rule) for rule in ("fixed", "proportional", "rslora")]
        [16.0, 64.0, 32.0]
    """
    ratio = r / config.adapter.r
    return config.adapter.lora_alpha * {"fixed": 1.0, "proportional": ratio, "rslora": math.sqrt(ratio)}[scaling]


def read_targets(pairs: Sequence[str], sources: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read pairs of tasks.

    Args:
        pairs: ``SOURCE:TARGET``.
        sources: Tasks whose adapters are measured.
        names: All tasks of the config.

    Returns:
        Targets of each source that has any.

    Raises:
        UsageError: If a pair is malformed, or names a task that is not there, or not measured, or its own.

    Example:
        >>> read_targets(["rte:cb"], ["rte"], ["rte", "cb"])
        {'rte': ('cb',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        source, _, target = pair.partition(":")
        if source not in sources or target not in names or source == target:
            raise UsageError(
                f"targets: {pair!r}: expected SOURCE:TARGET, the source one of {', '.join(sources)}, the target "
                f"another of {', '.join(names)}"
            )
        found[source] = (*found.get(source, ()), target)
    return found


def _vary_rank(options: SharpnessOptions, config: RunConfig) -> Iterator[Variant]:
    for scaling in options.scalings:
        for r in options.ranks:
            yield Variant("rank", f"rank {r}, {scaling}", r, scaling, _make_lora(config, r, scaling))


def _vary_members(options: SharpnessOptions, config: RunConfig) -> Iterator[Variant]:
    for k in options.ensemble_sizes:
        scaling, r = options.ensemble_scaling, options.total_rank // k
        label = f"{k} x rank {r}"
        yield Variant("ensemble", label, k, scaling, _make_lora(config, r, scaling), n_members=k)


def _vary_base(options: SharpnessOptions, config: RunConfig) -> Iterator[Variant]:
    for label, packed, bits in (("LoRA", "none", 16), ("QLoRA", "nf4", 4)):
        lora = _make_lora(config, config.adapter.r, "fixed")
        yield Variant("quantization", label, bits, "", {**lora, "model": {"quantization": packed}})


def _vary_width(options: SharpnessOptions, config: RunConfig) -> Iterator[Variant]:
    for reduction in options.reductions:
        changes: Changes = {
            "adapter": {"method": "bottleneck", "reduction": reduction},
            "model": {"quantization": options.width_quantization},
        }
        yield Variant("width", f"1/{reduction} of the width", reduction, "", changes)


def _make_lora(config: RunConfig, r: int, scaling: Scaling) -> Changes:
    return {"adapter": {"method": "lora", "r": r, "lora_alpha": scale_alpha(config, r, scaling)}}
