"""A federation small enough for tests: clients of two dialects in text files, a tiny random Llama, one process.

The finished one is made once per process and copied.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora.config_federation import FederationConfig
from ensemblelora.federation.adapters import Template
from ensemblelora.federation.clients import load_clients
from ensemblelora.federation.engines import run_federation
from ensemblelora.federation.protocol import Reply, Request
from ensemblelora.federation.results import Outcome
from ensemblelora.federation.worker import Worker, open_worker
from tests.tiny_run import save_model

N_CLIENTS = 6
N_LINES = 10
DIALECTS = (
    ("the cat", "a child", "my friend", "the teacher", "likes", "sees", "wants", "the red house", "some water"),
    (
        "an old king",
        "one man",
        "a woman",
        "the small bird",
        "knows",
        "gives",
        "asks about",
        "the long road",
        "an answer",
    ),
)

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "model": {"dtype": "float32", "device": "cpu"},
    "adapter": {"r": 2, "lora_alpha": 4, "layers_to_transform": [1]},
    "clients": {"min_lines": 3, "max_length": 12},
    "features": {"proj_dim": 16},
    "groups": {"n_groups": [2, 3], "subset_size": 3, "n_subsets": 12, "n_restarts": 2},
    "training": {"learning_rate": 0.02, "num_train_epochs": 1, "participation": 0.5, "max_examples_per_batch": 4},
    "boosting": {"n_rounds": [1]},
    "evaluation": {"n_bootstrap": 100},
    "engine": {"kind": "process"},
}


def write_clients(folder: Path, n: int = N_CLIENTS, *, n_lines: int = N_LINES) -> Path:
    """Write one text file a client; every second one speaks the other dialect."""
    folder.mkdir(parents=True, exist_ok=True)
    for client in range(n):
        rng, words = np.random.default_rng(client), DIALECTS[client % 2]
        lines = [" ".join(rng.choice(words, 3)) for _ in range(n_lines)]
        (folder / f"client{client}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def make_config(folder: Path, **changes: Any) -> FederationConfig:
    """A federation under ``folder``, its inputs written if need be, with some sections changed."""
    if not (folder / "model").exists():
        save_model(folder / "model")
        write_clients(folder / "texts")
    values: dict[str, Any] = {key: dict(part) if isinstance(part, dict) else part for key, part in SETTINGS.items()}
    values["out"] = str(folder / "run")
    values["model"]["name"] = str(folder / "model")
    values["clients"]["source"] = str(folder / "texts")
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return FederationConfig.model_validate(values)


def make_worker(folder: Path, *, cache: Path | None = None, **changes: Any) -> Worker:
    """A worker for all clients."""
    config = make_config(folder, **changes)
    return open_worker(config, load_clients(config.clients, seed=config.seed), cache=cache)


@cache
def shared_worker() -> Worker:
    """One worker for tests that change nothing but its adapter."""
    folder = Path(tempfile.mkdtemp(prefix="ensemblelora-federation-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_worker(folder, cache=folder / "cache")  # as in a run, to the last bit


@cache
def finished() -> tuple[Path, Outcome]:
    """The folder of a finished federation's inputs and run; not to be changed."""
    folder = Path(tempfile.mkdtemp(prefix="ensemblelora-federation-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, run_federation(make_config(folder))


def copy_finished(folder: Path, **changes: Any) -> FederationConfig:
    """Copy the finished federation, and return its config with some sections changed."""
    shutil.copytree(finished()[0], folder, dirs_exist_ok=True)
    return make_config(folder, **changes)


def make_template(size: int = 6) -> Template:
    """Adapters of one module, rank 1: ``A (1, 3)`` of ones and ``B (3, 1)`` of zeros."""
    shapes = {"m.lora_A.weight": (1, size // 2), "m.lora_B.weight": (size // 2, 1)}
    return Template(np.array([1.0] * (size // 2) + [0.0] * (size // 2), np.float32), shapes, "start", size // 2)


class ToyCohort:
    """Clients that are functions of a request; what a test wants to go wrong goes wrong in ``spoil``."""

    def __init__(
        self,
        answer: Callable[[str, Request], Reply],
        names: tuple[str, ...],
        *,
        spoil: Callable[[str, Request, Reply], Reply | None] = lambda name, request, reply: reply,
        backwards: bool = False,
    ) -> None:
        self._answer, self._names, self._spoil, self._backwards = answer, names, spoil, backwards
        self.asked: list[tuple[str, str]] = []

    def meet(self) -> Mapping[str, Reply]:
        return {name: self._answer(name, Request("hello", "")) for name in self._names}

    def ask(self, requests: Mapping[str, Request], *, seconds: float) -> Iterator[tuple[str, Reply]]:
        order = list(requests)[::-1] if self._backwards else list(requests)
        for name in order:
            self.asked.append((name, str(requests[name].values.get("name", requests[name].action))))
            reply = self._spoil(name, requests[name], self._answer(name, requests[name]))
            if reply is not None:  # none: the client has gone
                yield name, reply
