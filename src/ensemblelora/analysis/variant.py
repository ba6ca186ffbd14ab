"""Variants of a config: other values in some of its sections. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ensemblelora.config import RunConfig, parse_config
from ensemblelora.config_adapter import keep_own_keys

__all__ = ["Changes", "change_config", "join_changes"]

Changes = Mapping[str, Mapping[str, Any]]
"""other values of a config, by section and key: ``{"adapter": {"r": 4}}``"""


def change_config(config: RunConfig, changes: Changes) -> RunConfig:
    """Return a config with other values; of another adapter method, keys of the former one are left out.

    Raises:
        ConfigError: If a key or value is wrong.
    """
    values = config.model_dump(mode="json")
    for section, fresh in changes.items():
        before = values.get(section, {})
        if section == "adapter" and fresh.get("method", before.get("method")) != before.get("method"):
            before = keep_own_keys(before, fresh["method"])
        values[section] = {**before, **fresh}
    return parse_config(values, source="the analysis' variant")


def join_changes(*several: Changes) -> Changes:
    """Put changes together; of a key that several name, the last one counts.

    Example:
        >>> join_changes({"adapter": {"r": 4}}, {"adapter": {"lora_alpha": 8.0}, "model": {"dtype": "float32"}})
        {'adapter': {'r': 4, 'lora_alpha': 8.0}, 'model': {'dtype': 'float32'}}
    """
    joined: dict[str, dict[str, Any]] = {}
    for changes in several:
        for section, fresh in changes.items():
            joined[section] = {**joined.get(section, {}), **fresh}
    return joined
