"""Methods scored by clients on their own rows: the server sends adapters, and gets losses. No torch.

In: methods, each a sum of adapters' outputs that may differ from client to client. Out: :class:`Losses`, a number for
each method and client. Clients are asked a lot at a time, and every lot is kept, so that scoring goes on where it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.errors import StoreError
from ensemblelora.federation.exchange import Exchange
from ensemblelora.federation.protocol import Reply, Request, Term, check_reply, read_number

__all__ = ["Method", "Scored", "Sum", "ask_in_lots", "score_methods", "tune_clients"]

FloatArray = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float32]
Sum = Sequence[tuple[Vector | None, float]]
"""adapters, none being theta0, and what their outputs are multiplied with"""

_LOT = 64


@dataclass(frozen=True, eq=False)
class Method:
    """One way to predict a client's rows.

    Attributes:
        name: Its name in the table.
        of: The sum of adapters for each client, by its index.
        parts: On which rows it is scored.
    """

    name: str
    of: Callable[[int], Sum]
    parts: tuple[str, ...] = ("test",)


@dataclass(frozen=True, eq=False)
class Scored:
    """Losses of clients, in nats; NaN of those that sent none.

    Attributes:
        losses: By part and method, ``(n_clients,)``; ``weighted`` is the mixture of the weighed methods.
        weights: Of the weighed methods, ``(n_clients, n)``; none if none were.
    """

    losses: Mapping[str, Mapping[str, FloatArray]]
    weights: FloatArray | None = None


def score_methods(
    exchange: Exchange,
    methods: Sequence[Method],
    *,
    size: int,
    stage: str,
    keep: Path,
    identity: str,
    meter: Meter,
    weigh: Callable[[int], Sequence[Sum]] | None = None,
) -> Scored:
    """Let every client score the methods; equal sums of a client are computed once.

    Args:
        exchange: Reaches the clients.
        methods: What to score.
        size: Numbers of an adapter, p.
        stage: Under which traffic is entered.
        keep: File that broken-off scoring goes on from.
        identity: Of everything the losses depend on.
        meter: Told what clients spent.
        weigh: Sums that a client weighs by its validation rows, its own group's first; none: nothing is weighed.
    """
    n_weighed = 0 if weigh is None else len(weigh(0))
    columns = [(part, method.name) for method in methods for part in method.parts]
    columns += [(part, "weighted") for part in ("validation", "test") if n_weighed]

    def ask(client: int) -> tuple[Request, Callable[[Reply], FloatArray]]:
        question = _Question(methods, client, [] if weigh is None else weigh(client))
        return exchange.make("score", **question.parts(size)), lambda reply: question.read(reply, columns)

    width = len(columns) + n_weighed
    values = ask_in_lots(exchange, ask, width=width, stage=stage, keep=keep, identity=identity, meter=meter)
    losses: dict[str, dict[str, FloatArray]] = {}
    for k, (part, name) in enumerate(columns):
        losses.setdefault(part, {})[name] = values[:, k]
    return Scored(losses, values[:, len(columns) :] if n_weighed else None)


def tune_clients(
    exchange: Exchange,
    start: Callable[[int], Vector],
    *,
    name: str,
    passes: int,
    keep: Path,
    identity: str,
    meter: Meter,
) -> tuple[FloatArray, int]:
    """Let every client train an adapter of its own and score it; the adapters stay with them.

    Args:
        exchange: Reaches the clients.
        start: The adapter each begins with.
        name: Of the training, and of its traffic.
        passes: Over each client's rows.
        keep: File that a broken-off stage goes on from.
        identity: Of everything the losses depend on.
        meter: Told what clients spent.

    Returns:
        Test losses ``(n_clients,)``, NaN of clients that sent none; FLOPs of training alone.
    """

    def ask(client: int) -> tuple[Request, Callable[[Reply], FloatArray]]:
        def read(reply: Reply) -> FloatArray:
            arrays = check_reply(reply, {"validation": (1,), "test": (1,)}).arrays
            return np.array([arrays["test"][0], read_number(reply, "train_flops")])

        values = {"passes": passes, "name": name}
        return exchange.make("tune", arrays={"start": start(client)}, values=values), read

    found = ask_in_lots(exchange, ask, width=2, stage=name, keep=keep, identity=identity, meter=meter)
    return found[:, 0], int(np.nansum(found[:, 1]))


def ask_in_lots(
    exchange: Exchange,
    ask: Callable[[int], tuple[Request, Callable[[Reply], FloatArray]]],
    *,
    width: int,
    stage: str,
    keep: Path,
    identity: str,
    meter: Meter,
) -> FloatArray:
    """Ask all clients for a few numbers each, lot by lot, and keep every lot.

    Args:
        exchange: Reaches the clients.
        ask: Gives a client's request, and what reads its reply.
        width: Numbers of each.
        stage: Under which traffic is entered.
        keep: File that goes on being filled, if it is of this identity.
        identity: Of everything the numbers depend on.
        meter: Told what clients spent.

    Returns:
        ``(n_clients, width)``; NaN where a client sent nothing that can be used.
    """
    n = len(exchange.clients)
    values, done = np.full((n, width), np.nan), 0
    if keep.exists():
        arrays = artifacts.load_arrays(keep)
        if str(arrays.get("identity", "")) == identity:
            values, done = arrays["values"], int(arrays["done"])
    for first in range(done, n, _LOT):
        lot = {client: ask(client) for client in range(first, min(first + _LOT, n))}
        requests = {client: request for client, (request, _) in lot.items()}
        told = f"{stage} {first // _LOT + 1}/{-(-n // _LOT)}"

        readers = {client: read for client, (_, read) in lot.items()}
        found = exchange.ask(stage, requests, partial(_read_one, readers), meter=meter, description=told)
        for client, numbers in found.items():
            values[client] = numbers
        artifacts.save_arrays(
            keep, {"values": values, "done": np.int64(first + len(lot)), "identity": np.array(identity)}
        )
    if values.shape != (n, width):
        raise StoreError(f"{keep}: numbers of {values.shape}, expected {(n, width)}; delete it and run again")
    return values


def _read_one(readers: Mapping[int, Callable[[Reply], FloatArray]], client: int, reply: Reply) -> FloatArray:
    return readers[client](reply)


class _Question:
    """What one client is to score: its members, each sent once, and its sums, each computed once."""

    def __init__(self, methods: Sequence[Method], client: int, weighed: Sequence[Sum]) -> None:
        self._members: dict[int, Vector] = {}
        self._sums: dict[tuple[Term, ...], int] = {}
        self._asked: dict[str, list[int]] = {}
        self._places = {
            (part, method.name): self._enter(part, method.of(client)) for method in methods for part in method.parts
        }
        self._weighed = [self._enter("validation", terms) for terms in weighed]
        for terms in weighed:
            self._enter("test", terms)

    def parts(self, size: int) -> dict[str, object]:
        """Arrays and values of the request."""
        members = np.stack([*self._members.values()]) if self._members else np.zeros((0, size), np.float32)
        values = {
            "methods": [[list(term) for term in terms] for terms in self._sums],
            "parts": self._asked,
            **({"weigh": self._weighed} if self._weighed else {}),
        }
        return {"arrays": {"members": members}, "values": values}

    def read(self, reply: Reply, columns: Sequence[tuple[str, str]]) -> FloatArray:
        """The losses in the order of the columns, and the weights."""
        extra = int(bool(self._weighed))
        shapes = {part: (len(own) + extra,) for part, own in self._asked.items()}
        weights = {"weights": (len(self._weighed),)} if extra else {}
        arrays = check_reply(reply, {**shapes, **weights}).arrays
        found = [
            arrays[part][-1 if name == "weighted" else self._asked[part].index(self._places[part, name])]
            for part, name in columns
        ]
        return np.array([*found, *(arrays["weights"] if extra else ())], np.float64)

    def _enter(self, part: str, terms: Sum) -> int:
        """Note a sum for a part, and return its number."""
        key = tuple((0 if vector is None else self._number(vector), float(share)) for vector, share in terms)
        number = self._sums.setdefault(key, len(self._sums))
        asked = self._asked.setdefault(part, [])
        if number not in asked:
            asked.append(number)
        return number

    def _number(self, vector: Vector) -> int:
        place = vector.ctypes.data  # of the numbers: rows of one array are new objects each time
        self._members.setdefault(place, vector)
        return list(self._members).index(place) + 1
