"""Requests and replies as Flower's messages, and clients reached through its grid.

In: this package's :class:`~.protocol.Request` and :class:`~.protocol.Reply`. Out: records of plain arrays, written with
``numpy.save`` without pickles, and one text of JSON. Needs the extra ``federated``.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from ensemblelora.errors import DataError
from ensemblelora.federation.protocol import Action, Refusal, Reply, Request

__all__ = ["MESSAGE_TYPES", "GridCohort", "read_reply", "read_request", "to_record"]

_logger = logging.getLogger(__name__)

MESSAGE_TYPES: Mapping[Action, str] = {
    "hello": "query.hello",
    "features": "query.features",
    "train": "train.adapter",
    "score": "evaluate.score",
    "tune": "train.tune",
}
"""what Flower calls each action"""

_ARRAYS, _TOLD = "arrays", "told"
_PAUSE_SECONDS = 0.2


def to_record(message: Request | Reply) -> RecordDict:
    """Turn a request or a reply into records."""
    arrays = ArrayRecord({name: Array(array) for name, array in message.arrays.items()})
    told: dict[str, str] = {"values": json.dumps(dict(message.values))}
    if isinstance(message, Request):
        told["order"] = message.order
    return RecordDict({_ARRAYS: arrays, _TOLD: ConfigRecord(dict(told))})


def read_request(content: RecordDict, action: Action) -> Request:
    """Read what :func:`to_record` made of a request."""
    arrays, values, told = _read(content)
    return Request(action, str(told["order"]), arrays, values)


def read_reply(message: Message) -> Reply:
    """Read a client's message; an error in its place is a reply that says so."""
    if message.has_error():
        reason = message.error.reason or f"error {message.error.code}"
        return Reply(values={"error": " ".join(str(reason).split())})
    try:
        arrays, values, _ = _read(message.content)
    except (KeyError, TypeError, ValueError) as error:
        return Reply(values={"error": f"a message that can't be read ({error!r})"})
    return Reply(arrays, values)


class GridCohort:
    """Clients behind Flower's nodes; each says its name when it is greeted.

    A node that comes back under another number is greeted again, and its client goes on.
    """

    def __init__(
        self,
        grid: Grid,
        order: str,
        *,
        n_expected: int,
        wait_seconds: float,
        reply_seconds: float,
        interrupted: threading.Event | None = None,
    ) -> None:
        """Say whom to wait for.

        Args:
            grid: Flower's.
            order: Of every request.
            n_expected: Nodes to wait for before the first greeting.
            wait_seconds: No longer than this.
            reply_seconds: Within which a greeting must be answered.
            interrupted: Ends the waiting for replies, and this thread.
        """
        self._grid, self._order = grid, order
        self._n_expected, self._wait_seconds, self._reply_seconds = n_expected, wait_seconds, reply_seconds
        self._interrupted = interrupted or threading.Event()
        self._nodes: dict[str, int] = {}

    def meet(self) -> Mapping[str, Reply]:
        """Greet all connected nodes.

        Raises:
            DataError: If fewer are connected than were expected, after the time to wait.
        """
        nodes, end = self._list_nodes(), time.monotonic() + self._wait_seconds
        while len(nodes) < self._n_expected and time.monotonic() < end:
            self._pause()
            nodes = self._list_nodes()
        if len(nodes) < self._n_expected:
            raise DataError(
                f"{len(nodes)} SuperNodes are connected, expected {self._n_expected} (engine.min_clients) within "
                f"{self._wait_seconds:g} s; start the others, or lower it"
            )
        return self._greet(nodes)

    def ask(self, requests: Mapping[str, Request], *, seconds: float) -> Iterator[tuple[str, Reply]]:
        """Send requests and yield replies as they come."""
        if any(name not in self._nodes for name in requests) or self._has_lost(requests):
            self._greet([node for node in self._list_nodes() if node not in self._nodes.values()])
        present = set(self._list_nodes())
        asked = {self._nodes[name]: name for name in requests if self._nodes.get(name) in present}
        messages = [(node, requests[name]) for node, name in asked.items()]
        for node, reply in self._send(messages, seconds):
            yield asked[node], reply

    def _has_lost(self, requests: Mapping[str, Request]) -> bool:
        present = set(self._list_nodes())
        return any(self._nodes[name] not in present for name in requests)

    def _greet(self, nodes: list[int]) -> dict[str, Reply]:
        """Ask nodes for their clients' names; of two that say the same the first is kept."""
        found: dict[str, Reply] = {}
        hello = Request("hello", self._order)
        present = set(self._list_nodes())
        for node, reply in sorted(self._send([(node, hello) for node in nodes], self._reply_seconds)):
            name = str(reply.values.get("client", ""))
            if "error" in reply.values or not name:
                _logger.warning("a node did not say which client it is: %s", reply.values.get("error", "no name"))
                found[f"node {node}"] = Reply(values={"error": reply.values.get("error", "says no name")})
            elif self._nodes.get(name, node) != node and self._nodes[name] in present:
                _logger.warning("two nodes say they are client %r; the second is not asked", name)
            else:
                self._nodes[name] = node
                found[name] = reply
        return found

    def _send(self, messages: list[tuple[int, Request]], seconds: float) -> Iterator[tuple[int, Reply]]:
        """Push messages, and yield each node's reply until all are there or time is over."""
        if not messages:
            return
        wanted = {node for node, _ in messages}
        pushes = [
            Message(to_record(request), node, MESSAGE_TYPES[request.action], ttl=seconds) for node, request in messages
        ]
        pushed = list(self._grid.push_messages(pushes))
        end = time.monotonic() + seconds
        while wanted and time.monotonic() < end:
            for message in self._grid.pull_messages(pushed):
                node = message.metadata.src_node_id
                pushed = [one for one in pushed if one != message.metadata.reply_to_message_id]
                if node in wanted:
                    wanted.remove(node)
                    yield node, read_reply(message)
            if wanted:
                self._pause()

    def _list_nodes(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def _pause(self) -> None:
        if self._interrupted.wait(_PAUSE_SECONDS):
            raise SystemExit  # leaves the server's thread without a word; the main one tells the user


def _read(content: RecordDict) -> tuple[dict[str, Any], dict[str, Any], Mapping[str, Any]]:
    arrays, told = content[_ARRAYS], content[_TOLD]
    if not isinstance(arrays, ArrayRecord) or not isinstance(told, ConfigRecord):
        raise Refusal("a message without arrays and values")
    values = json.loads(str(told["values"]))
    if not isinstance(values, dict):
        raise Refusal("values that are no object")
    return {name: array.numpy() for name, array in arrays.items()}, values, told
