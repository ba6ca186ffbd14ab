"""What a training needs besides its tensors to go on: the optimiser, the schedule and the random generators.

In: a checkpoint's folder. Out: files of tensors and JSON. transformers would write them as pickles, which can run code
when they are read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemblelora.artifacts import read_json, write_text
from ensemblelora.errors import StoreError, first_line
from ensemblelora.tensors import load_tensors, save_tensors

__all__ = ["load_optimizer", "load_random", "save_optimizer", "save_random"]

_TENSORS, _VALUES = "optimizer.safetensors", "optimizer.json"
_RANDOM_TENSORS, _RANDOM_VALUES = "random.safetensors", "random.json"


def save_optimizer(folder: Path, optimizer: Any, schedule: Any) -> None:
    """Write the state of an optimiser and of its learning rates.

    Raises:
        OutputError: If the folder can't be written.
        TypeError: If a state holds what is neither tensor nor plain value.
    """
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, state in content["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value.detach().contiguous()
            else:
                values.setdefault(str(index), {})[name] = value
    save_tensors(folder / _TENSORS, tensors)
    plain = {"values": values, "param_groups": content["param_groups"], "schedule": schedule.state_dict()}
    write_text(folder / _VALUES, json.dumps(plain))


def load_optimizer(folder: Path, optimizer: Any, schedule: Any) -> None:
    """Set an optimiser and its learning rates to what :func:`save_optimizer` wrote.

    Raises:
        StoreError: If a file is missing, damaged, or of another optimiser.
    """
    with _as_store_error(folder):
        plain = read_json(folder / _VALUES)
        state: dict[int, dict[str, Any]] = {int(index): dict(own) for index, own in plain["values"].items()}
        for key, tensor in load_tensors(folder / _TENSORS).items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
        schedule.load_state_dict(plain["schedule"])


def save_random(folder: Path) -> None:
    """Write the states of the global random generators: Python's, numpy's and torch's.

    Raises:
        OutputError: If the folder can't be written.
    """
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, numbers, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # kept as it is, and drawn from by nobody here
    save_tensors(folder / _RANDOM_TENSORS, tensors)
    numpy_state = [name, np.asarray(numbers).tolist(), *rest]
    write_text(folder / _RANDOM_VALUES, json.dumps({"python": random.getstate(), "numpy": numpy_state}))


def load_random(folder: Path) -> None:
    """Set the global random generators to what :func:`save_random` wrote.

    Raises:
        StoreError: If a file is missing or damaged.
    """
    with _as_store_error(folder):
        plain, tensors = read_json(folder / _RANDOM_VALUES), load_tensors(folder / _RANDOM_TENSORS)
        version, numbers, following = plain["python"]
        random.setstate((version, tuple(numbers), following))
        name, words, *rest = plain["numpy"]
        np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])


@contextmanager
def _as_store_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StoreError(f"{folder}: not the state of this training ({first_line(error)}); delete it") from error
