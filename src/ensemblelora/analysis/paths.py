"""Ways through weight space: a fine-tuning's checkpoints, and the steps that the oracle's fits stand for.

In: a pool, subsets of tasks. Out: differences from theta0. A training's tensors are kept after 1, 2, 4, 8, ... steps
and after the last one, in ``paths/`` of the pool's folder. That is where it ended; the checkpoint of least validation
loss, which the pool keeps, may be theta0 itself. Where the end alone is wanted, it is an adapter in ``ends/``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, adapter_state, add_adapter, remove_adapter, save_adapter
from ensemblelora.analysis.approximation import State
from ensemblelora.boosting.direction import expand_weights, sum_gradients
from ensemblelora.comparison.pool import Pool, Trained
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.subset import take_examples
from ensemblelora.errors import StoreError
from ensemblelora.estimation import Oracle
from ensemblelora.gradients.collect import make_projector
from ensemblelora.store import FeatureBlock

__all__ = ["TrainedPath", "expand_oracle", "load_steps", "solve_duals", "train_path", "train_to_end"]

_COPY = 900
"""of trainings that are watched: another order of rows than that of any adapter trained for its own sake"""
_COPY_TO_END = 901
_RIDGE = 1e-6
"""of the dual variables, over the features' mean square: keeps directions that no row has out of them"""


@dataclass(frozen=True)
class TrainedPath:
    """A fine-tuning and where its tensors of some steps lie.

    Attributes:
        trained: Its record; the pool has its best checkpoint.
        steps: Optimiser steps, rising; the last one is the training's.
        folder: Holds a file a step.
    """

    trained: Trained
    steps: tuple[int, ...]
    folder: Path


def train_path(pool: Pool, tasks: Sequence[int]) -> TrainedPath:
    """Fine-tune an adapter on some tasks and keep what it was on the way, or find both.

    Args:
        pool: The seed's.
        tasks: Indices.

    Raises:
        StoreError: If the adapter is there and steps of it are not.
    """
    chosen = tuple(sorted(tasks))
    folder = pool.folder / "paths" / _identify(pool, chosen)

    def watch(step: int, n_steps: int, read: Callable[[], dict[str, Tensor]]) -> None:
        if step in _list_steps(n_steps):
            artifacts.save_arrays(_place(folder, step), {key: t.numpy() for key, t in read().items()})

    trained = pool.train(chosen, copy=_COPY, watch=watch)
    steps = _list_steps(trained.n_steps)
    missing = [step for step in steps if not _place(folder, step).exists()]
    if missing:
        adapter = pool.folder / "adapters" / trained.name
        raise StoreError(f"{folder}: steps {', '.join(map(str, missing))} are missing; delete {adapter} and run again")
    return TrainedPath(trained, steps, folder)


def train_to_end(pool: Pool, tasks: Sequence[int]) -> tuple[str, Path]:
    """Fine-tune an adapter on some tasks and keep what it was after its last step, or find it.

    Args:
        pool: The seed's.
        tasks: Indices.

    Returns:
        A name unlike any of the pool's adapters, and the folder in which the adapter lies.

    Raises:
        StoreError: If the training is there and its end is not.
    """
    chosen = tuple(sorted(tasks))
    name = f"end-{_identify(pool, chosen)}"
    folder = pool.folder / "ends" / name
    tensors = folder.with_suffix(".npz")

    def watch(step: int, n_steps: int, read: Callable[[], dict[str, Tensor]]) -> None:
        if step == n_steps:
            artifacts.save_arrays(tensors, {key: t.numpy() for key, t in read().items()})

    trained = pool.train(chosen, copy=_COPY_TO_END, watch=watch)
    fault = artifacts.find_seal_fault(folder)
    if fault and not tensors.exists():
        adapter = pool.folder / "adapters" / trained.name
        raise StoreError(f"{folder}: where the training ended is lost ({fault}); delete {adapter} and run again")
    if fault:
        state = {key: torch.from_numpy(array) for key, array in artifacts.load_arrays(tensors).items()}
        _write_adapter(pool, name, state, folder)
        tensors.unlink()
    return name, folder


def load_steps(pool: Pool, path: TrainedPath) -> dict[int, State]:
    """Read a path's differences from theta0, by step."""
    start = adapter_state(pool.probe, THETA0)
    found: dict[int, State] = {}
    for step in path.steps:
        arrays = artifacts.load_arrays(_place(path.folder, step))
        if arrays.keys() != start.keys():
            raise StoreError(f"{_place(path.folder, step)}: of another adapter; delete {path.folder} and run again")
        found[step] = {key: torch.from_numpy(arrays[key]) - start[key] for key in start}
    return found


def expand_oracle(
    pool: Pool, oracle: Oracle, subset: Sequence[int], *, max_tokens: int, meter: Meter
) -> dict[str, State]:
    """Turn the oracle's fit of a subset into steps from theta0.

    ``projected`` is the paper's ``P w``, which is longer than ``w`` by about the root of parameters over projected
    numbers, all of that orthogonal to every gradient. ``dual`` is the shortest sum of the training rows' own gradients
    whose projection is ``w``.

    Args:
        pool: Whose theta0 the oracle's features were taken at.
        oracle: Of its first projection.
        subset: Tasks.
        max_tokens: Padded tokens of a gradient pass.
        meter: Told what the pass over the subset's rows costs.

    Returns:
        By name; without ``projected`` where the projection can't be expanded.

    Raises:
        StoreError: If the features are of other rows.
    """
    w = oracle.weights([tuple(subset)])[0][0]
    blocks = [oracle.replicates[0].train[task] for task in subset]
    splits = [_find_rows(pool.split(task, "train"), block) for task, block in zip(subset, blocks, strict=True)]
    weighted = [
        (split, block.mode, alpha) for split, block, alpha in zip(splits, blocks, solve_duals(blocks, w), strict=True)
    ]
    found: dict[str, State] = {"dual": sum_gradients(pool.probe, THETA0, weighted, max_tokens=max_tokens, meter=meter)}
    settings = pool.config.gradients
    if settings.proj_type != "none":
        wide = np.zeros(settings.n_projections * settings.proj_dim)
        wide[: len(w)] = w * settings.n_projections**0.5  # one of several lies in its own columns, by this factor
        projector: Any = make_projector(settings, seed=pool.config.seed)
        found["projected"] = expand_weights(pool.probe, THETA0, projector, splits, wide)
    return found


def solve_duals(blocks: Sequence[FeatureBlock], w: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """Find the least-norm alpha with ``sum_s alpha_s g_s = w`` over some tasks' projected gradients.

    Args:
        blocks: Features ``(n, c, d)`` of each task.
        w: ``(d,)``.

    Returns:
        ``(n, c)`` of each task.
    """
    shapes = [block.features.shape[:2] for block in blocks]
    features = np.concatenate([np.asarray(b.features, np.float64).reshape(-1, len(w)) for b in blocks])  # (N, d)
    gram = features.T @ features
    ridge = _RIDGE * np.trace(gram) / len(w)
    alpha = features @ np.linalg.solve(gram + ridge * np.eye(len(w)), w)
    ends = np.cumsum([n * c for n, c in shapes])
    return [piece.reshape(shape) for piece, shape in zip(np.split(alpha, ends[:-1]), shapes, strict=True)]


def _find_rows(split: EncodedSplit, block: FeatureBlock) -> EncodedSplit:
    """The rows that features were taken of, in their order."""
    if block.ids == split.ids:
        return split
    places = {name: e for e, name in enumerate(split.ids)}
    if not places.keys() >= set(block.ids):
        raise StoreError(f"features of task {split.task!r} are of rows that it does not have; take the features again")
    return take_examples(split, [places[name] for name in block.ids])


def _identify(pool: Pool, tasks: Sequence[int]) -> str:
    """What a training depends on, shortened."""
    rows = pool.rows.learning_fingerprint(tasks)
    return artifacts.fingerprint(pool.start_fingerprint, tasks, rows, pool.config.training, pool.config.seed)[:16]


def _write_adapter(pool: Pool, name: str, state: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter of some tensors; the model is left as it was."""
    try:
        add_adapter(pool.probe, name, state)
        with artifacts.atomic_folder(folder) as scratch:
            save_adapter(pool.probe, name, scratch)
            artifacts.seal_folder(scratch)
    finally:
        remove_adapter(pool.probe, name)


def _list_steps(n_steps: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*(2**k for k in range(n_steps.bit_length())), n_steps)))


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.npz"
