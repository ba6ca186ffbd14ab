"""Clients' features as the server holds them: asked for once, a few clients at a time, and kept. No torch.

In: registered clients. Out: :class:`ClientFeatures`, rows or moments of everyone who sent what can be used. Clients
that sent nothing usable take no part in what follows. Kept in ``features/`` of the run folder, a file for each lot of
clients, so that a collection that is broken off goes on at the next lot.

Cost: a gradient pass over each client's training and validation rows, on its own machine. Memory: 4 (d + 1) bytes a
row, or 4 (d + 1)(d + 2) / 2 a client and split, and as much again in double precision while groups are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.blocks import FeatureBlock
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import DataError, StoreError
from ensemblelora.federation.exchange import Exchange, Registered
from ensemblelora.federation.moments import Moments, count_moments, read_moments
from ensemblelora.federation.protocol import Reply, Shape, check_reply

__all__ = ["ClientFeatures", "collect_features", "find_known", "load_features", "to_block"]

Floats = npt.NDArray[np.float32]
Held = Literal["train", "validation"]
_HELD: tuple[Held, ...] = ("train", "validation")
_LOT = 64
_CLIENTS_FILE, _ASKED_FILE = "clients.json", "asked.json"


@dataclass(frozen=True, eq=False)
class ClientFeatures:
    """What clients sent.

    Attributes:
        clients: Who, in the order that indices refer to from here on.
        send: Rows or moments.
        values: By split: rows ``(n_rows, 1 + d)`` of all clients back to back, or moments, one row a client.
        n_asked: How often the client that was asked most often sent its own.
    """

    clients: tuple[Registered, ...]
    send: Literal["rows", "moments"]
    values: dict[Held, Floats]
    n_asked: int = 1

    def blocks(self, part: Held) -> tuple[FeatureBlock, ...]:
        """Rows of every client, as the subset oracle reads them."""
        ends = np.cumsum([client.n_rows[part] for client in self.clients])[:-1]
        pieces = np.split(self.values[part], ends)
        return tuple(to_block(client.name, part, rows) for client, rows in zip(self.clients, pieces, strict=True))

    def moments(self, part: Held, proj_dim: int) -> Moments:
        """Sums over every client's rows."""
        return read_moments(self.values[part], [client.n_rows[part] for client in self.clients], proj_dim)

    @property
    def n_bytes(self) -> int:
        """Memory of what clients sent."""
        return sum(values.nbytes for values in self.values.values())


def to_block(client: str, part: Held, rows: Floats) -> FeatureBlock:
    """Turn outputs and projected gradients ``(n, 1 + d)`` into a block of the subset oracle's."""
    n, gradients = len(rows), rows[:, 1:]
    return FeatureBlock(
        task=client,
        split=part,
        mode="sequence",
        outputs=np.ascontiguousarray(rows[:, :1]),
        features=np.ascontiguousarray(gradients)[:, None],
        labels=np.zeros(n, np.int64),
        n_choices=np.ones(n, np.int64),
        squared_norms=np.einsum("nd,nd->n", gradients, gradients),
        groups=np.arange(n, dtype=np.int64),
        ids=tuple(f"{client}:{k}" for k in range(n)),
    )


def collect_features(
    exchange: Exchange, config: FederationConfig, folder: Path, *, identity: str, meter: Meter
) -> None:
    """Ask every client for its features, and keep them.

    Args:
        exchange: Reaches the clients.
        config: What they are to send.
        folder: Where lots are kept; those of another identity are asked for again.
        identity: Of everything features depend on.
        meter: Told what clients spent.

    Raises:
        DataError: If fewer than ``training.min_reply_share`` of the clients sent what can be used.
    """
    lots = [range(first, min(first + _LOT, len(exchange.clients))) for first in range(0, len(exchange.clients), _LOT)]
    taking_part: list[Registered] = []
    for number, lot in enumerate(lots):
        path = folder / f"lot-{number:03d}.npz"
        names = [exchange.clients[index].name for index in lot]
        lot_identity = artifacts.fingerprint(identity, names)
        if not _is_kept(path, lot_identity, len(lot)):
            _note_asked(folder / _ASKED_FILE, identity, names)
            _ask_lot(exchange, config, lot, path, lot_identity, f"features {number + 1}/{len(lots)}", meter)
        answered = set(artifacts.load_arrays(path)["clients"].tolist())
        taking_part += [exchange.clients[index] for index in lot if exchange.clients[index].name in answered]
    if len(taking_part) < max(2, config.training.min_reply_share * len(exchange.clients)):
        refused = exchange.traffic.of("features").refused
        told = f"; client {refused[0][0]!r}: {refused[0][1]}" if refused else ""
        raise DataError(
            f"features: {len(taking_part)} of {len(exchange.clients)} clients sent any that can be used{told}"
        )
    artifacts.write_json(
        folder / _CLIENTS_FILE, {"clients": [asdict(client) for client in taking_part], "n_lots": len(lots)}
    )


def find_known(folder: Path) -> tuple[Registered, ...]:
    """The clients whose features are kept; none if they were not collected to the end."""
    path = folder / _CLIENTS_FILE
    if not path.exists():
        return ()
    try:
        return tuple(Registered(**client) for client in artifacts.read_json(path)["clients"])
    except (StoreError, KeyError, TypeError):
        return ()


def load_features(folder: Path, config: FederationConfig) -> ClientFeatures:
    """Read what :func:`collect_features` kept.

    Raises:
        StoreError: If a file is missing or damaged.
    """
    content = artifacts.read_json(folder / _CLIENTS_FILE)
    try:
        clients = tuple(Registered(**client) for client in content["clients"])
        lots = [artifacts.load_arrays(folder / f"lot-{number:03d}.npz") for number in range(content["n_lots"])]
        values: dict[Held, Floats] = {part: np.concatenate([lot[part] for lot in lots]) for part in _HELD}
        n_asked = max(artifacts.read_json(folder / _ASKED_FILE)["counts"].values())
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder}: no features of clients ({error!r}); delete it and run again") from None
    return ClientFeatures(clients, config.features.send, values, n_asked)


def _is_kept(path: Path, identity: str, n_clients: int) -> bool:
    """Whether everyone's features are there: who was missing before may have come back."""
    if not path.exists():
        return False
    try:
        arrays = artifacts.load_arrays(path)
        return str(arrays.get("identity", "")) == identity and len(arrays["clients"]) == n_clients
    except (StoreError, KeyError):
        return False


def _note_asked(path: Path, identity: str, names: Sequence[str]) -> None:
    """Count how often each client is asked, before it is: what was broken off was sent, too."""
    before = artifacts.read_json(path) if path.exists() else {}
    counts = dict(before["counts"]) if before.get("identity") == identity else {}
    counts |= {name: counts.get(name, 0) + 1 for name in names}
    artifacts.write_json(path, {"identity": identity, "counts": counts})


def _ask_lot(
    exchange: Exchange,
    config: FederationConfig,
    lot: Sequence[int],
    path: Path,
    identity: str,
    description: str,
    meter: Meter,
) -> None:
    d, is_rows = config.features.proj_dim, config.features.send == "rows"

    def read(client: int, reply: Reply) -> dict[Held, Floats]:
        counts = exchange.clients[client].n_rows
        shapes: dict[str, Shape] = {part: (counts[part], 1 + d) if is_rows else (count_moments(d),) for part in _HELD}
        arrays = check_reply(reply, shapes).arrays
        return {part: np.atleast_2d(arrays[part]).astype(np.float32) for part in _HELD}

    requests = {client: exchange.make("features") for client in lot}
    found = exchange.ask("features", requests, read, meter=meter, description=description)
    width = 1 + d if is_rows else count_moments(d)
    nothing = np.zeros((0, width), np.float32)
    stacked: dict[str, Floats] = {
        part: np.concatenate([nothing, *(own[part] for own in found.values())]) for part in _HELD
    }
    names = np.array([exchange.clients[client].name for client in found], dtype=np.str_)
    artifacts.save_arrays(path, {**stacked, "clients": names, "identity": np.array(identity)})
