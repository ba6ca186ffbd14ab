"""The server's process: a run is loaded, a socket bound, requests answered until a signal comes.

On SIGTERM or SIGINT no connection is accepted any more, what was accepted is answered, and the process ends well; a
second SIGINT does not wait.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn

from ensemblelora.api import Run, load_run
from ensemblelora.errors import DataError, UsageError
from ensemblelora.routing import ROUTING_FILE
from ensemblelora.serving.app import make_app
from ensemblelora.serving.limits import Limits

__all__ = ["Started", "serve_run"]

logger = logging.getLogger(__name__)

_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
_MORE_SECONDS = 5  # for what is in the middle of an answer when its time is up


@dataclass(frozen=True)
class Started:
    """A server that is ready."""

    url: str
    pid: int
    run: str
    tasks: tuple[str, ...]
    is_routing: bool


def serve_run(
    folder: Path,
    *,
    host: str,
    port: int,
    limits: Limits,
    device: str | None,
    announce: Callable[[Started], None],
) -> None:
    """Answer requests until the process is told to stop.

    Args:
        folder: Of the run.
        host: Name or address of the network interface.
        port: 0 takes a free one.
        limits: What is accepted.
        device: Where the model runs; none: what the run's config says.
        announce: Told when requests are accepted.

    Raises:
        UsageError: If the address can't be had, or the run has no ensemble yet.
        StoreError: If a file of the run is damaged.
    """
    run = _open(folder, device)
    with _bind(host, port) as bound:
        address = ipaddress.ip_address(bound.getsockname()[0])
        if not address.is_loopback:
            logger.warning("anyone who reaches %s can ask this server: it knows no passwords and no encryption", host)
        run.load()
        is_routing = _prepare_routing(run)
        hosts = _LOOPBACK_NAMES if address.is_loopback else None
        app = make_app(run, limits, is_routing=is_routing, hosts=hosts)
        url = f"http://{f'[{address}]' if address.version == 6 else address}:{bound.getsockname()[1]}"
        started = Started(url, os.getpid(), str(folder), tuple(run.cards), is_routing)
        config = uvicorn.Config(
            app,
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(limits.timeout_seconds) + _MORE_SECONDS,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _let_be)
        _Server(config, lambda: announce(started), app.state.hurry).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Says when it is ready, and when it begins to stop."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None], hurry: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce, self._hurry = announce, hurry

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept requests, and say so."""
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, and wait for what is being answered."""
        self._hurry()
        await super().shutdown(sockets)


def _let_be(*_: object) -> None:
    """Uvicorn raises the signal that stopped it once more when all is done; that is no failure."""


def _open(folder: Path, device: str | None) -> Run:
    run = load_run(folder)
    if device is None:
        return run
    model = run.config.model.model_copy(update={"device": device})
    return replace(run, config=run.config.model_copy(update={"model": model}))


def _bind(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded: that it is in use is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: no address of this machine ({error}); name another") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"{host} port {port}: can't be had ({reason}); name another --port, or 0 for any") from None
    return bound


def _prepare_routing(run: Run) -> bool:
    """Have the router ready, or say why rows need a task's name."""
    try:
        run.load(with_router=True)
    except DataError as error:
        logger.warning("rows without a task's name are refused: no %s yet, and %s", ROUTING_FILE, error)
        return False
    return True
