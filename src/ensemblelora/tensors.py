"""Named tensors on disk: safetensors files, whole or refused.

In: tensors by name. Out: the same. Nothing that is read here can run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ensemblelora.errors import OutputError, StoreError, first_line

__all__ = ["load_tensors", "save_tensors"]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a file of a folder that nobody reads yet (it is not written atomically).

    Raises:
        OutputError: If the place can't be written, such as on a full disk.
    """
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{path}: can't be written ({first_line(error)}); free the place and run again: what was finished is kept"
        ) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors, on the CPU.

    Raises:
        StoreError: If the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(f"{path}: can't be read ({first_line(error)}); delete its folder and run again") from error
