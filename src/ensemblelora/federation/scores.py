"""Methods scored by clients on their own rows: the server sends adapters, and gets losses. No torch.

In: methods, each a sum of adapters' outputs that may differ from client to client. Out: :class:`Scored`, a number for
each method and client. Clients are asked a lot at a time, and every loss is kept with what it is of, so that scoring
goes on where it was, and a method that comes later costs its own sums alone.
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
_WEIGHED_PARTS = ("validation", "test")


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
    """Let every client score the methods; equal sums of a client are computed once, whenever they were asked for.

    A client that did not answer is not asked for the same sums again.

    Args:
        exchange: Reaches the clients.
        methods: What to score.
        size: Numbers of an adapter, p.
        stage: Under which traffic is entered.
        keep: File of the losses that are known; broken-off scoring goes on from it.
        identity: Of everything the losses depend on beside the adapters.
        meter: Told what clients spent.
        weigh: Sums that a client weighs by its validation rows, its own group's first; none: nothing is weighed.
    """
    known, digests = _Known.open(keep, identity), _Digests()
    questions = [
        _Question(methods, client, [] if weigh is None else weigh(client), known.numbers, digests)
        for client in range(len(exchange.clients))
    ]
    waiting = [client for client, question in enumerate(questions) if question.is_open]
    for first in range(0, len(waiting), _LOT):
        lot = waiting[first : first + _LOT]
        requests = {client: exchange.make("score", **questions[client].parts(size)) for client in lot}
        told = f"{stage} {first // _LOT + 1}/{-(-len(waiting) // _LOT)}"
        found = exchange.ask(stage, requests, lambda c, reply: questions[c].read(reply), meter=meter, description=told)
        for client in lot:
            known.numbers |= found[client] if client in found else questions[client].give_up()
        known.save()
    losses: dict[str, dict[str, FloatArray]] = {}
    for part, name in questions[0].columns:
        values = [known.numbers[question.columns[part, name]] for question in questions]
        losses.setdefault(part, {})[name] = np.array(values)
    weights = [[known.numbers[key] for key in question.weights] for question in questions]
    return Scored(losses, None if weigh is None else np.array(weights))


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


@dataclass(eq=False)
class _Known:
    """Numbers that clients sent, by what they are of: client, rows, and sum of adapters; NaN where none came."""

    path: Path
    identity: str
    numbers: dict[str, float]

    @classmethod
    def open(cls, path: Path, identity: str) -> _Known:
        """Read a file; nothing is known where there is none, or one of another identity."""
        arrays = artifacts.load_arrays(path) if path.exists() else {}
        if str(arrays.get("identity", "")) != identity or not {"keys", "numbers"} <= set(arrays):
            return cls(path, identity, {})
        return cls(path, identity, dict(zip(arrays["keys"].tolist(), arrays["numbers"].tolist(), strict=True)))

    def save(self) -> None:
        """Write the file."""
        keys, numbers = np.array([*self.numbers], dtype=np.str_), np.array([*self.numbers.values()], np.float64)
        artifacts.save_arrays(self.path, {"keys": keys, "numbers": numbers, "identity": np.array(self.identity)})


class _Digests:
    """Short names of adapters' content; rows of one array are new objects each time, but lie in one place."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def of(self, terms: Sum) -> str:
        """Name a sum."""
        return artifacts.fingerprint([(self._of_vector(vector), float(share)) for vector, share in terms])[:16]

    def _of_vector(self, vector: Vector | None) -> str:
        if vector is None:
            return ""
        place = vector.ctypes.data
        if place not in self._known:
            self._known[place] = artifacts.fingerprint(vector)
        return self._known[place]


class _Question:
    """What one client is to score: its members, each sent once, and its sums, those that are not known, each once.

    Attributes:
        columns: Under which key the loss of each part and method is known, ``weighted`` among them.
        weights: The same of the weights.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        client: int,
        weighed: Sequence[Sum],
        known: Mapping[str, float],
        digests: _Digests,
    ) -> None:
        self._members: dict[int, Vector] = {}
        self._sums: dict[tuple[Term, ...], int] = {}
        self._asked: dict[str, list[int]] = {}
        self._wanted: dict[str, tuple[str, int]] = {}  # by key: part, and place in the reply
        self._weighed: list[int] = []
        self.columns: dict[tuple[str, str], str] = {}
        for method in methods:
            terms = method.of(client)
            for part in method.parts:
                self.columns[part, method.name] = key = f"{client} {part} {digests.of(terms)}"
                if key not in known:
                    self._wanted[key] = (part, self._enter(part, terms))
        name = " ".join(digests.of(terms) for terms in weighed)
        self.weights = [f"{client} weight {k} {name}" for k in range(len(weighed))]
        for part in _WEIGHED_PARTS if weighed else ():
            self.columns[part, "weighted"] = f"{client} {part} weighted {name}"
        if any(key not in known for key in self.weights):
            self._weighed = [self._enter_twice(terms) for terms in weighed]

    @property
    def is_open(self) -> bool:
        """Whether there is anything to ask."""
        return bool(self._asked)

    def parts(self, size: int) -> dict[str, object]:
        """Arrays and values of the request."""
        members = np.stack([*self._members.values()]) if self._members else np.zeros((0, size), np.float32)
        values = {
            "methods": [[list(term) for term in terms] for terms in self._sums],
            "parts": self._asked,
            **({"weigh": self._weighed} if self._weighed else {}),
        }
        return {"arrays": {"members": members}, "values": values}

    def read(self, reply: Reply) -> dict[str, float]:
        """Take the numbers, by their keys, out of a reply."""
        extra = int(bool(self._weighed))
        shapes = {part: (len(own) + extra,) for part, own in self._asked.items()}
        weights = {"weights": (len(self._weighed),)} if extra else {}
        arrays = check_reply(reply, {**shapes, **weights}).arrays
        found = {key: float(arrays[part][self._asked[part].index(k)]) for key, (part, k) in self._wanted.items()}
        if extra:
            found |= {self.columns[part, "weighted"]: float(arrays[part][-1]) for part in _WEIGHED_PARTS}
            found |= dict(zip(self.weights, arrays["weights"].tolist(), strict=True))
        return found

    def give_up(self) -> dict[str, float]:
        """What is known of a client that did not answer."""
        weighed = [*self.weights, *(self.columns[part, "weighted"] for part in _WEIGHED_PARTS)] if self._weighed else []
        return dict.fromkeys([*self._wanted, *weighed], float("nan"))

    def _enter(self, part: str, terms: Sum) -> int:
        """Note a sum for a part, and return its number."""
        key = tuple((0 if vector is None else self._number(vector), float(share)) for vector, share in terms)
        number = self._sums.setdefault(key, len(self._sums))
        asked = self._asked.setdefault(part, [])
        if number not in asked:
            asked.append(number)
        return number

    def _enter_twice(self, terms: Sum) -> int:
        """Note a sum for all parts that weighing takes."""
        return min(self._enter(part, terms) for part in _WEIGHED_PARTS)  # the same number

    def _number(self, vector: Vector) -> int:
        place = vector.ctypes.data  # of the numbers: rows of one array are new objects each time
        self._members.setdefault(place, vector)
        return list(self._members).index(place) + 1
