"""The server's side of the talk: whom it knows, what it asks, which replies it accepts, and what was sent. No torch.

In: a :class:`Cohort`, which reaches clients by name, however that is done. Out: accepted replies by the clients' index,
always in the order of indices, whoever answered first. A client that does not answer, answers too late, or sends what
can't be used, is left out and named; nothing it does stops the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ensemblelora.accounting.meter import Meter
from ensemblelora.artifacts import read_json, write_json
from ensemblelora.errors import DataError, StoreError
from ensemblelora.federation.protocol import (
    PARTS,
    Part,
    Refusal,
    Reply,
    Request,
    count_bytes,
    read_count,
    read_number,
    shorten,
)
from ensemblelora.progress import track

__all__ = ["Cohort", "Exchange", "Registered", "StageTraffic", "Traffic", "register"]

Found = TypeVar("Found")
_logger = logging.getLogger(__name__)

_MOST_TOKENS = 2**31
_MOST_SPENT = 2**62


class Cohort(Protocol):
    """Clients that can be reached."""

    def meet(self) -> Mapping[str, Reply]:
        """Greet whoever is connected: each one's answer to ``hello``, by the name it gives."""

    def ask(self, requests: Mapping[str, Request], *, seconds: float) -> Iterator[tuple[str, Reply]]:
        """Send requests by name and yield replies as they come, no later than after so many seconds.

        Args:
            requests: By client.
            seconds: From now on; who has not replied by then is not yielded.
        """


@dataclass(frozen=True)
class Registered:
    """A client as it introduced itself; later claims are held against this.

    Attributes:
        name: Its own.
        n_rows: Rows of each part.
        n_tokens: Predicted tokens of each part.
        check: 16 bits that tell whether its rows are still the same, and hardly anything else.
    """

    name: str
    n_rows: Mapping[Part, int]
    n_tokens: Mapping[Part, int]
    check: int


@dataclass
class StageTraffic:
    """What one stage sent.

    Attributes:
        n_messages: Requests.
        n_missing: Requests without a reply.
        down: Bytes from the server to each client.
        up: Bytes from each client.
        refused: Client and reason of each reply that could not be used.
        identity: Of everything the stage depends on.
    """

    n_messages: int = 0
    n_missing: int = 0
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    identity: str = ""


@dataclass
class Traffic:
    """What was sent so far, by stage; JSON keeps it.

    Attributes:
        stages: By name.
        path: Where it is kept; none: nowhere.
    """

    stages: dict[str, StageTraffic] = field(default_factory=dict)
    path: Path | None = None

    def of(self, stage: str) -> StageTraffic:
        """A stage's record."""
        return self.stages.setdefault(stage, StageTraffic())

    def begin(self, stage: str, identity: str) -> None:
        """Forget what was sent for a stage of another identity."""
        if self.of(stage).identity != identity:
            self.stages[stage] = StageTraffic(identity=identity)

    def save(self) -> None:
        """Write the record."""
        if self.path is not None:
            write_json(self.path, {name: asdict(stage) for name, stage in self.stages.items()})

    @classmethod
    def load(cls, path: Path) -> Traffic:
        """Read it back; an empty one where there is none.

        Raises:
            StoreError: If the file is damaged.
        """
        if not path.exists():
            return cls(path=path)
        try:
            stages = {
                name: StageTraffic(**{**values, "refused": [tuple(pair) for pair in values["refused"]]})
                for name, values in read_json(path).items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: no record of what was sent ({error!r}); delete it and run again") from None
        return cls(stages, path)


@dataclass(eq=False)
class Exchange:
    """Asks registered clients, and keeps count.

    Attributes:
        cohort: Reaches them.
        clients: In their order, which indices refer to.
        order: The config that goes with every request.
        seconds: Within which a reply must come.
        traffic: What was sent.
    """

    cohort: Cohort
    clients: tuple[Registered, ...]
    order: str
    seconds: float
    traffic: Traffic = field(default_factory=Traffic)

    def ask(
        self,
        stage: str,
        requests: Mapping[int, Request],
        read: Callable[[int, Reply], Found],
        *,
        meter: Meter,
        description: str = "",
    ) -> dict[int, Found]:
        """Ask some clients, and return what is read from the replies that can be used, by ascending index.

        Args:
            stage: Under which traffic is entered.
            requests: By index.
            read: Takes a reply apart, or raises :class:`~.protocol.Refusal`.
            meter: Told the FLOPs and tokens that clients say they spent.
            description: Of the bar.
        """
        names = {self.clients[index].name: index for index in requests}
        record, found = self.traffic.of(stage), {}
        record.n_messages += len(requests)
        for index, request in requests.items():
            _add(record.down, self.clients[index].name, count_bytes(request))
        missing = set(names)
        by_name = {self.clients[index].name: request for index, request in requests.items()}
        replies = self.cohort.ask(by_name, seconds=self.seconds)
        for name, reply in track(replies, description or stage, total=len(requests)):
            if name not in missing:  # unknown, or a second reply
                continue
            missing.remove(name)
            _add(record.up, name, count_bytes(reply))
            _charge(meter, reply)
            try:
                found[names[name]] = read(names[name], reply)
            except Refusal as refusal:
                record.refused.append((name, str(refusal)))
                _logger.warning("%s: the reply of client %r is not used: %s", stage, name, refusal)
        record.n_missing += len(missing)
        if missing:
            _logger.warning("%s: %d of %d clients did not reply", stage, len(missing), len(requests))
        self.traffic.save()
        return dict(sorted(found.items()))

    def make(self, action: Any, **parts: Any) -> Request:
        """A request with the federation's config."""
        return Request(action, self.order, **parts)


def register(cohort: Cohort, *, start: str, version: str) -> tuple[Registered, ...]:
    """Greet all clients; those with another start point or version are named and left out.

    Args:
        cohort: Reaches them.
        start: Identity of theta0, which every client makes by itself.
        version: Of this package.

    Returns:
        In the order of their names.

    Raises:
        DataError: If fewer than two can take part; tells what the first of the others said.
    """
    found, faults = [], []
    for name, reply in sorted(cohort.meet().items()):
        try:
            found.append(_read_hello(name, reply, start=start, version=version))
        except Refusal as refusal:
            faults.append(f"client {name!r}: {refusal}")
            _logger.warning("client %r can't take part: %s", name, refusal)
    if len(found) < 2:
        told = f" ({faults[0]})" if faults else ""
        raise DataError(f"{len(found)} clients can take part, expected at least 2{told}")
    return tuple(found)


def _read_hello(name: str, reply: Reply, *, start: str, version: str) -> Registered:
    if "error" in reply.values:
        raise Refusal(shorten(reply.values["error"]))
    for key, own, told in (("version", version, "version of ensemblelora"), ("start", start, "start adapter")):
        if reply.values.get(key) != own:
            raise Refusal(
                f"has another {told} ({shorten(reply.values.get(key))[:40]} instead of {own[:40]}); give it the same "
                "model, model.dtype, adapter and version"
            )
    rows: dict[Part, int] = {part: read_count(reply, f"n_{part}", _MOST_TOKENS) for part in PARTS}
    tokens: dict[Part, int] = {part: read_count(reply, f"n_{part}_tokens", _MOST_TOKENS) for part in PARTS}
    return Registered(name, rows, tokens, int(read_number(reply, "check")))


def _add(totals: dict[str, int], name: str, n_bytes: int) -> None:
    totals[name] = totals.get(name, 0) + n_bytes


def _charge(meter: Meter, reply: Reply) -> None:
    """Enter what a client says it spent; what is no such number counts nothing."""
    spent = [reply.values.get(key) for key in ("flops", "n_tokens", "n_padded_tokens")]
    flops, real, padded = (value if isinstance(value, int) and 0 < value < _MOST_SPENT else 0 for value in spent)
    meter.add_flops(flops)
    meter.add_tokens(real, padded)
