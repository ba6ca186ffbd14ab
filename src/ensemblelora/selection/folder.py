"""A target's folder: what was chosen there before with other options is kept, never overwritten.

In: the folder, and what is asked for now. Out: ``earlier/1``, ``earlier/2``, ... in it, each with the record, page,
oracle and valued rows of one selection. Adapters stay where they are: their names say what they were trained on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ensemblelora import artifacts
from ensemblelora.errors import StoreError
from ensemblelora.selection.page import PAGE_FILE
from ensemblelora.selection.question import ORACLE_FILE
from ensemblelora.selection.record import RECORD_FILE, SAMPLES_FILE
from ensemblelora.selection.request import Request

__all__ = ["describe_asked", "set_aside"]

_EARLIER_FOLDER = "earlier"
_FILES = (RECORD_FILE, PAGE_FILE, ORACLE_FILE, SAMPLES_FILE)


def describe_asked(request: Request, identity: str) -> dict[str, Any]:
    """What a selection is asked for, as plain values: equal for the same command on the same rows.

    Args:
        request: Checked.
        identity: Of everything that predictions depend on.
    """
    config = request.config.model_dump(mode="json", exclude={"out"})
    return {
        "strategies": list(request.strategies),
        "settings": asdict(request.settings),
        "includes_target": request.includes_target,
        "n_clusters": request.n_clusters,
        "samples": request.wants_samples,
        "final": request.wants_final,
        "config": artifacts.fingerprint(config, identity),
    }


def set_aside(folder: Path, asked: Mapping[str, Any]) -> Path | None:
    """Move what an earlier selection left to a folder of its own, unless the same was asked for.

    Args:
        folder: The target's.
        asked: Of :func:`describe_asked`.

    Returns:
        Where it is kept; none where there was nothing to keep.

    Raises:
        OutputError: If it can't be moved.
    """
    record = folder / RECORD_FILE
    if not record.exists():  # nothing was finished; what a broken-off selection valued is not this one's
        (folder / SAMPLES_FILE).unlink(missing_ok=True)
        return None
    if _read_asked(record) == asked:
        return None
    home = folder / _EARLIER_FOLDER
    number = 1 + max((int(one.name) for one in home.glob("*") if one.name.isdigit()), default=0)
    kept = [folder / name for name in _FILES if (folder / name).exists()]
    with artifacts.atomic_folder(home / str(number)) as scratch:
        for path in kept:
            shutil.copy2(path, scratch / path.name)
    for path in reversed(kept):  # the record goes last: a kill in between leaves the rest to be kept again
        path.unlink()
    return home / str(number)


def _read_asked(record: Path) -> object:
    """What an earlier selection was asked for; none where it doesn't say."""
    try:
        found = artifacts.read_json(record)
    except StoreError:
        return None
    return found.get("asked") if isinstance(found, dict) else None
