"""What change is asked for, checked as far as that goes without data and model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ensemblelora import artifacts
from ensemblelora.additions.carry import Training
from ensemblelora.additions.options import ALONE
from ensemblelora.additions.source import Source
from ensemblelora.errors import OutputError, UsageError
from ensemblelora.report.wording import group_letter
from ensemblelora.workspace import check_place

__all__ = ["REPLAY", "Action", "Request", "ask", "identify"]

Action = Literal["add", "drop", "update"]
REPLAY = 0.5
"""rows of a group's other tasks that an adapter is trained onward on, over those of the task that came"""

_SUFFIX = {"add": "with", "drop": "without", "update": "updated"}
_WAYS: Mapping[str, tuple[Training, ...]] = {
    "add": ("onward", "whole"),
    "update": ("whole", "onward"),
    "drop": ("whole", "keep"),
}
"""how a group may be trained; the usual way first"""


@dataclass(frozen=True)
class Request:
    """A change that is asked for."""

    action: Action
    task: str
    out: Path
    training: Training
    replay: float
    place: str | None
    is_dry: bool


def ask(
    action: Action,
    source: Source,
    task: str,
    out: Path | str | None,
    training: Training | None,
    replay: float,
    place: str | None,
    *,
    is_dry: bool,
) -> Request:
    """Check what is asked for, as far as that goes without data and model."""
    way = _WAYS[action][0] if training is None else training
    if way not in _WAYS[action]:
        raise UsageError(f"{action}: training {way!r}: expected one of {', '.join(_WAYS[action])}")
    if not replay >= 0:
        raise UsageError(f"replay {replay}: expected a share of rows, 0 or more")
    wanted = None if place is None else _settle_place(place, len(source.named_groups))
    home = source.path.resolve()
    folder = home.with_name(f"{home.name}-{_SUFFIX[action]}-{task}") if out is None else Path(out)
    if folder.resolve() == home:
        raise OutputError(f"{folder}: is the run itself, which stays as it is; choose another folder")
    check_place(folder)
    request = Request(action, task, folder, way, replay, wanted, is_dry)
    _check_record(request, source)
    return request


def identify(request: Request, source: Source) -> dict[str, Any]:
    """What tells a change from another, as its run folder records it."""
    asked = {"action": request.action, "task": request.task, "source": str(source.path.resolve())}
    return asked | {"training": request.training, "replay": request.replay}


def _settle_place(wanted: str, n_groups: int) -> str:
    """The place that is meant, by its name or by the letter that reports show for a group."""
    letters = {group_letter(g): f"group-{g}" for g in range(n_groups)}
    place = letters.get(wanted.upper(), wanted)
    if place not in (*letters.values(), ALONE):
        known = ", ".join(f"{name} ({letter})" for letter, name in letters.items())
        raise UsageError(f"place {wanted!r} (--to): expected one of {known}, or {ALONE}")
    return place


def _check_record(request: Request, source: Source) -> None:
    """Refuse a folder that holds another change, or this one made in another way."""
    path = request.out / artifacts.CHANGE_FILE
    if not path.exists():
        return
    known, asked = artifacts.read_json(path), identify(request, source)
    if request.is_dry and not known.get("is_forecast", True):
        raise OutputError(f"{request.out}: made already, see its {path.name}; choose another folder with --out")
    if request.place not in (None, known.get("place", request.place)) and not known["is_forecast"]:
        raise OutputError(
            f"{request.out}: holds {request.task} in {known['place']}, not in {request.place}; choose another folder "
            "with --out"
        )
    free = {"training", "replay"} if known.get("is_forecast", True) else set()
    other = [key for key, value in asked.items() if key not in free and known.get(key) != value]
    if other:
        told = ", ".join(f"{key} {known.get(key)}" for key in other)
        raise OutputError(f"{request.out}: holds another change ({told}); choose another folder with --out")
