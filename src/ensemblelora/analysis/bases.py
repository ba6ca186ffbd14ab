"""The paper's base methods: what is trained, on which base, under which name.

In: a name. Out: the changes of a config that make it so, and the other way round. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensemblelora.analysis.variant import Changes, change_config
from ensemblelora.config import RunConfig
from ensemblelora.errors import UsageError

__all__ = ["BASE_METHODS", "FULL", "choose_bases", "list_base_changes", "name_base_method"]

FULL = "full"
"""all of the model's weights, no adapter"""

BASE_METHODS: tuple[str, ...] = ("lora", "bottleneck", "qlora", "quantised bottleneck", FULL)
"""by the paper's words; the last needs a base that is not quantised"""


def name_base_method(config: RunConfig) -> str:
    """Name adapter and base as the paper does.

    Example:
        >>> from ensemblelora.config import parse_config
        >>> name_base_method(parse_config({"data": {"tasks": ["a"]}, "model": {"quantization": "nf4"}}))
        'qlora'
    """
    is_packed, method = config.model.quantization != "none", config.adapter.method
    if not is_packed:
        return method
    return "qlora" if method == "lora" else f"quantised {method}"


def choose_bases(names: Sequence[str], allowed: Sequence[str] = BASE_METHODS) -> tuple[str, ...]:
    """Check names of base methods.

    Raises:
        UsageError: If one is unknown, or there is none.
    """
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        told = f"base methods {', '.join(map(repr, unknown))}" if unknown else "no base method"
        raise UsageError(f"{told}: expected some of {', '.join(dict.fromkeys(allowed))}")
    return tuple(dict.fromkeys(names))


def list_base_changes(config: RunConfig, base: str, *, reduction: int) -> Changes:
    """Say what of a config makes a base method; nothing where the config is of it already.

    Args:
        config: What is changed.
        base: One of :data:`BASE_METHODS`; full fine-tuning leaves the adapter as it is, which is switched off.
        reduction: Of bottleneck adapters, where the config has none.
    """
    if base == name_base_method(config):
        return {}
    packed = "nf4" if base in ("qlora", "quantised bottleneck") else "none"
    changes: dict[str, Mapping[str, Any]] = {"model": {"quantization": packed}}
    if base != FULL:
        method = "bottleneck" if base.endswith("bottleneck") else "lora"
        own = {"reduction": reduction} if method == "bottleneck" and config.adapter.method != method else {}
        changes["adapter"] = {"method": method, **own}
    return {section: fresh for section, fresh in changes.items() if _differs(config, {section: fresh})}


def _differs(config: RunConfig, changes: Changes) -> bool:
    return change_config(config, changes) != config
