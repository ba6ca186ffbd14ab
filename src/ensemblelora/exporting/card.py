"""Model cards of an export: what adapters were trained on, in which groups, with what scores, under what licence.

The header of a card is the YAML that model hubs read. What nobody said is not made up: without a licence given by the
user there is none in the header, and the text says what to settle before publishing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ensemblelora import artifacts
from ensemblelora.data.reading import BUILDERS
from ensemblelora.ensemble import Ensemble
from ensemblelora.evaluation.rows import BOOSTED_GROUP, OWN_GROUP, name_methods
from ensemblelora.exporting.notes import BaseNote
from ensemblelora.gguf import EMBEDDED_MODEL, EMBEDDED_ORIGIN

__all__ = ["Origin", "describe_member", "read_origin", "write_header", "write_origin"]

_UNSAID = "not stated"
_WHOSE = {
    "ensemble": "its ensemble",
    OWN_GROUP: "this group's adapter alone",
    BOOSTED_GROUP: "this group's adapter with its boosters",
}


@dataclass(frozen=True)
class Origin:
    """Where an ensemble comes from.

    Attributes:
        entries: Of ``tasks.json``: every task's card and its numbers of rows, in the ensemble's order.
        ensemble: Members and weights.
        scores: Of ``results.json``: by method and task; empty where the run was not evaluated.
        method: The kind of adapter.
        license: What the adapters are published under; none: not settled.
    """

    entries: tuple[Mapping[str, Any], ...]
    ensemble: Ensemble
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]
    method: str
    license: str | None


def read_origin(run: Path, ensemble: Ensemble, method: str, license: str | None) -> Origin:
    """Read what a run folder says of its tasks and of its test scores."""
    entries = artifacts.read_json(run / artifacts.TASKS_FILE)["tasks"]
    results = run / artifacts.RESULTS_FILE
    methods = artifacts.read_json(results)["methods"] if results.exists() else {}
    names = name_methods(methods, has_boosters=ensemble.is_boosted)
    scores = {names[name]: table["per_task"] for name, table in methods.items()}
    return Origin(tuple(entries), ensemble, scores, method, license)


def write_header(base: BaseNote, origin: Origin, *, is_merged: bool = False) -> str:
    """Write the YAML that hubs read: base model, library, tasks' datasets, licence where one was given."""
    name = EMBEDDED_ORIGIN if base.name == EMBEDDED_MODEL else base.name
    values: dict[str, Any] = {} if _is_local(name) else {"base_model": name}
    if values:
        values["base_model_relation"] = "finetune" if is_merged else "adapter"
    values["library_name"] = "transformers" if is_merged else "peft"
    values["pipeline_tag"] = "text-generation" if base.head == "lm" else "text-classification"
    values["tags"] = ["ensemblelora", *([] if is_merged else [origin.method])]
    hubs = [path for entry in origin.entries if (path := _find_hub_name(entry["card"])) is not None]
    if hubs:
        values["datasets"] = list(dict.fromkeys(hubs))
    if origin.license is not None:
        values["license"] = origin.license
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n\n"


def write_origin(base: BaseNote, origin: Origin, tasks: Sequence[int], *, method: str = "ensemble") -> str:
    """Say what was trained on, what that scored on test rows, and what is known of licences.

    Args:
        base: The base model.
        origin: Of the ensemble.
        tasks: Those it is about.
        method: Whose test scores stand in the table.
    """
    scores, ensemble = origin.scores.get(method, {}), origin.ensemble
    lines = ["", "## Trained on", "", "| task | group | data | training rows | licence of the data | test accuracy |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for task in tasks:
        card, counts = origin.entries[task]["card"], origin.entries[task]["n_examples"]
        found = scores.get(card["task"], {}).get("accuracy")
        cells = [
            card["task"],
            f"group-{ensemble.group_of[task]}",
            _name_data(card),
            str(counts["train"]),
            str(card["metadata"].get("license", _UNSAID)),
            "" if found is None else f"{found:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if scores:
        n_rows = sum(origin.entries[task]["n_examples"]["test"] for task in tasks)
        lines += ["", f"Accuracies are the run's, of {_WHOSE.get(method, method)} on "
                  f"{n_rows} test rows in all; a fold's or merge's own change is stated above."]  # fmt: skip
    lines += ["", "## Licence", ""]
    lines.append(
        f"These adapters: {origin.license}."
        if origin.license is not None
        else "None was named for these adapters. What they may be used for depends on the base model's licence and on "
        "those of the data above: settle that before you publish them."
    )
    name = EMBEDDED_ORIGIN if base.name == EMBEDDED_MODEL else base.name
    lines.append("Base model: that of its files." if _is_local(name) else f"Base model: see `{name}`.")
    return "\n".join(lines) + "\n"


def describe_member(base: BaseNote, origin: Origin, name: str) -> str:
    """Write the card of one member's folder."""
    member = next(one for one in origin.ensemble.members if one.name == name)
    tasks = origin.ensemble.groups[member.group]
    kind = "the adapter of one group" if member.kind == "group" else "a booster: its change is added to its group's"
    lines = [f"# {name}", "", f"Of an ensemble, {kind}. Base model: `{base.name}`, {base.dtype}."]
    if member.kind == "booster":
        lines += ["", f"Its change from the start is multiplied with {member.rate:g}; alone it answers nothing."]
    method = OWN_GROUP if member.kind == "group" else BOOSTED_GROUP
    text = "\n".join(lines) + "\n" + write_origin(base, origin, tasks, method=method)
    return write_header(base, origin) + text


def _find_hub_name(card: Mapping[str, Any]) -> str | None:
    """The dataset's name on a hub; none for files."""
    path = str(card["dataset_path"])
    is_file = path in BUILDERS or path.startswith(("package:", "/", ".", "~", "$")) or "\\" in path
    return None if is_file else path


def _name_data(card: Mapping[str, Any]) -> str:
    """Where rows come from, without a folder of this machine."""
    hub = _find_hub_name(card)
    if hub is not None:
        return " ".join(part for part in (hub, card.get("dataset_name")) if part)
    path = str(card["dataset_path"])
    return path if path.startswith("package:") else "files of the user's"


def _is_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.endswith(".gguf") or Path(name).exists()
