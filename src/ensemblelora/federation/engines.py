"""Where server and clients run: this process alone, Flower's simulation, or SuperNodes at a SuperLink.

In: a config. Out: :class:`~.results.Outcome`. The three differ in who carries the messages, and in nothing else: a
round gives the same adapter wherever it is run, up to the rounding of different machines. ``process`` needs no extra;
Flower needs Python 3.11 or newer.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ensemblelora import artifacts
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import EnsembleLoraError, MissingExtraError, OutputError, UsageError
from ensemblelora.federation.adapters import open_model
from ensemblelora.federation.answers import answer
from ensemblelora.federation.clients import load_clients
from ensemblelora.federation.keeping import raise_fault
from ensemblelora.federation.protocol import Reply, Request
from ensemblelora.federation.results import Outcome, read_outcome
from ensemblelora.federation.server import federate
from ensemblelora.federation.worker import Worker, open_worker
from ensemblelora.workspace import check_place

__all__ = ["ProcessCohort", "check_engine", "run_federation", "settle_paths"]

_CACHE_FOLDER = "cache"
_INSTALL = "install it with: pip install 'ensemblelora[federated]' (Python 3.11 or newer)"
_CONNECTION = "ensemblelora"
# Before Flower or Ray are imported; a user who sets one of these keeps it.
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run_federation(config: FederationConfig, *, keeps_cache: bool = False) -> Outcome:
    """Carry out a federation on its engine, or go on where it was broken off.

    Args:
        config: Everything about it.
        keeps_cache: Whether what was computed below the adapted blocks stays, for a larger federation in this folder.

    Raises:
        UsageError: If config, data, model, place or engine are wrong.
        EnsembleLoraError: If a stage fails; what was finished is kept.
    """
    config = settle_paths(config)
    check_engine(config)
    check_place(Path(config.out))
    engines = {"process": _run_here, "simulation": _simulate, "deployment": _deploy}
    outcome = engines[config.engine.kind](config)
    if not keeps_cache:
        shutil.rmtree(Path(config.out) / _CACHE_FOLDER, ignore_errors=True)
    return outcome


def settle_paths(config: FederationConfig) -> FederationConfig:
    """Make paths absolute: other processes need not run in this one's folder."""
    source, name = config.clients.source, config.model.name
    clients = {"source": source if source.startswith("${") else str(Path(source).expanduser().absolute())}
    model = {"name": str(Path(name).expanduser().absolute()) if Path(name).expanduser().exists() else name}
    return config.model_copy(
        update={
            "out": str(Path(config.out).absolute()),
            "clients": config.clients.model_copy(update=clients),
            "model": config.model.model_copy(update=model),
        }
    )


def check_engine(config: FederationConfig) -> None:
    """Refuse an engine whose packages are missing.

    Raises:
        MissingExtraError: Names the package and how to install it.
    """
    needed = {"process": (), "simulation": ("flwr", "ray"), "deployment": ("flwr",)}[config.engine.kind]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"engine.kind {config.engine.kind}: package {package} is not installed; {_INSTALL}, or set "
                "engine.kind: process"
            )


class ProcessCohort:
    """All clients in this process, one after the other: the plain loop that the others are held against."""

    def __init__(self, worker: Worker, order: str) -> None:
        """Take the worker that answers for them."""
        self._worker, self._order = worker, order
        self._indices = {name: index for index, name in enumerate(worker.rows.names)}

    def meet(self) -> Mapping[str, Reply]:
        """Greet everyone."""
        return {name: self._answer(name, Request("hello", self._order)) for name in self._indices}

    def ask(self, requests: Mapping[str, Request], *, seconds: float) -> Iterator[tuple[str, Reply]]:
        """Answer one request after the other; no client is ever late."""
        for name, request in requests.items():
            if name in self._indices:
                yield name, self._answer(name, request)

    def _answer(self, name: str, request: Request) -> Reply:
        return answer(self._worker, self._indices[name], request)


def _run_here(config: FederationConfig) -> Outcome:
    adapted = open_model(config)
    clients = load_clients(config.clients, seed=config.seed)
    # The cache lies in the run folder, which must be one before anything else is put into it.
    folder = artifacts.RunFolder.create(Path(config.out)).path
    worker = open_worker(config, clients, adapted=adapted, cache=folder / _CACHE_FOLDER)
    return federate(config, ProcessCohort(worker, ""), adapted)


def _simulate(config: FederationConfig) -> Outcome:
    """Run server and clients on Flower's simulation engine: a thread, and actors of Ray's."""
    _set_environment()
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from ensemblelora.federation.apps import client_app
    from ensemblelora.federation.server import make_order
    from ensemblelora.federation.transport import GridCohort

    n_clients = len(load_clients(config.clients, seed=config.seed))
    artifacts.RunFolder.create(Path(config.out))  # before a client's process puts its cache there
    outcomes: list[Outcome] = []
    faults: list[Exception] = []
    server_app = ServerApp()
    with _interruptible() as interrupted:

        def serve(grid: Any, context: Any) -> None:
            cohort = GridCohort(
                grid,
                make_order(config),
                n_expected=n_clients,
                wait_seconds=config.engine.wait_seconds,
                reply_seconds=config.training.reply_seconds,
                interrupted=interrupted,
            )
            try:
                outcomes.append(federate(config, cohort, open_model(config)))
            except Exception as error:  # told from the main thread, as what it is
                faults.append(error)

        server_app.main()(serve)
        with _quiet():
            run_simulation(server_app, client_app, n_clients, backend_config=_describe_backend(config))
        if interrupted.is_set():
            raise KeyboardInterrupt
    if faults:
        raise faults[0]
    if not outcomes:
        raise EnsembleLoraError("the simulation ended before the federation did; see the lines above")
    return outcomes[0]


def _describe_backend(config: FederationConfig) -> dict[str, Any]:
    n_cpus = os.cpu_count() or 1
    each = min(config.engine.num_cpus or n_cpus, n_cpus)
    return {
        "init_args": {"num_cpus": n_cpus, "include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False},
        "client_resources": {"num_cpus": each, "num_gpus": config.engine.num_gpus},
    }


def _deploy(config: FederationConfig) -> Outcome:
    """Hand the server's part to a SuperLink, and wait for it to end; the SuperNodes run the clients' part."""
    _set_environment()
    folder = artifacts.RunFolder.create(Path(config.out)).path
    results = folder / artifacts.RESULTS_FILE
    before = results.stat().st_mtime_ns if results.exists() else None
    with suppress(EnsembleLoraError):
        raise_fault(folder)  # of another time
    with tempfile.TemporaryDirectory(prefix="ensemblelora-flower-") as scratch:
        app, home = Path(scratch) / "app", Path(scratch) / "home"
        _write_app(app, config)
        _write_connection(home, config)
        command = [_find_program("flwr"), "run", str(app), _CONNECTION, "--stream"]
        done = subprocess.run(command, env={**os.environ, "FLWR_HOME": str(home)}, stdout=sys.stderr, check=False)
    raise_fault(folder)
    if done.returncode:
        raise UsageError(f"SuperLink {config.engine.superlink}: the run could not be started; see the lines above")
    if not results.exists() or results.stat().st_mtime_ns == before:
        raise OutputError(
            f"{config.out}: the run ended without results here; see the lines above, or the same folder on the "
            "SuperLink's machine"
        )
    return read_outcome(artifacts.read_json(results))


def _write_app(folder: Path, config: FederationConfig) -> None:
    """A Flower app that names this package's two, with the config as JSON in it."""
    text = json.dumps(config.model_dump_json())  # a JSON string is a TOML string
    artifacts.write_text(
        folder / "pyproject.toml",
        f"""[project]
name = "ensemblelora-federation"
version = "1.0.0"
description = "One adapter for each group of clients"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "ensemblelora"

[tool.flwr.app.components]
serverapp = "ensemblelora.federation.apps:server_app"
clientapp = "ensemblelora.federation.apps:client_app"

[tool.flwr.app.config]
federation = {text}
""",
    )
    artifacts.write_text(folder / "README.md", "Server and clients are in the package ensemblelora.\n")


def _write_connection(home: Path, config: FederationConfig) -> None:
    certificates = config.engine.root_certificates
    proof = (
        "insecure = true"
        if certificates is None
        else f"root-certificates = {json.dumps(str(Path(certificates).absolute()))}"
    )
    artifacts.write_text(
        home / "config.toml",
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        f"address = {json.dumps(config.engine.superlink)}\n{proof}\n",
    )


def _find_program(name: str) -> str:
    """Flower's commands lie beside this Python, which need not be first in the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise MissingExtraError(f"engine.kind deployment: command {name} is not found; {_INSTALL}")
    return found


def _set_environment() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Flower and Ray tell developers of them from the user; errors pass."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Tip: In future versions of Ray", category=FutureWarning)
        try:
            yield
        finally:
            logger.setLevel(before)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Let Ctrl-C ask the server's thread to stop, which ends the simulation; a second one ends the process."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
