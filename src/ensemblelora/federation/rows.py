"""All clients' rows of tokens in three flat splits, however many clients there are.

In: clients' lines and a tokenizer. Out: :class:`ClientRows`. A client's text is encoded as a whole, one card in memory
for all, and cut into rows of nearly equal length, each of which begins as a text does; every token behind that is
predicted. So a row's loss is the mean loss of its next tokens, in nats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemblelora.config_federation import ClientsConfig
from ensemblelora.data.encoding import EncodedSplit, Tokenizer, encode_split
from ensemblelora.data.task import Example, Task, TaskCard
from ensemblelora.errors import DataError
from ensemblelora.federation.clients import ClientText
from ensemblelora.federation.protocol import PARTS, Part
from ensemblelora.seeding import generator_for

__all__ = ["ClientRows", "encode_clients"]

_CARD = TaskCard(
    task="clients",
    dataset_path="text",
    training_split="train",
    doc_to_text="",
    doc_to_target="text",
    target_delimiter="",
    output_type="loglikelihood",
)
_NO_LIMIT = 2**62  # a whole text is encoded at once, and cut into rows afterwards


@dataclass(frozen=True, eq=False)
class ClientRows:
    """Every client's rows, back to back.

    Attributes:
        names: The clients', in their order.
        splits: Rows of all clients, by part.
        starts: int64 ``(n_clients + 1,)``. Client ``c`` has the rows ``starts[part][c]:starts[part][c + 1]``.
    """

    names: tuple[str, ...]
    splits: Mapping[Part, EncodedSplit]
    starts: Mapping[Part, NDArray[np.int64]]

    def find(self, client: int, part: Part) -> NDArray[np.int64]:
        """Indices of a client's rows in a part's split."""
        return np.arange(self.starts[part][client], self.starts[part][client + 1])

    def count(self, client: int) -> dict[Part, int]:
        """How many rows a client has, by part."""
        return {part: len(self.find(client, part)) for part in PARTS}

    def check(self, client: int) -> int:
        """A number from 0 to 65,535 that changes with a client's rows, nearly always."""
        digest = hashlib.sha256()
        for part in PARTS:
            rows, split = self.find(client, part), self.splits[part]
            digest.update(split.tokens[split.row_starts[rows[0]] : split.row_starts[rows[-1] + 1]].tobytes())
            digest.update(split.row_lengths[rows].tobytes())
        return int.from_bytes(digest.digest()[:2], "little")

    def list_answers(self, client: int, part: Part) -> NDArray[np.int64]:
        """How many tokens of each of a client's rows are predicted, ``(n_rows,)``."""
        split, rows = self.splits[part], self.find(client, part)
        return np.asarray(split.row_lengths[rows] - split.answer_starts[rows])


def encode_clients(
    clients: Sequence[ClientText], tokenizer: Tokenizer, config: ClientsConfig, *, seed: int
) -> ClientRows:
    """Encode clients' lines, and keep as many rows of each part as the config says, drawn by seed and name.

    Raises:
        DataError: If a part of a client's text has no token.
    """
    cut = [client.split(config) for client in clients]
    limits = {
        "train": config.max_train_rows,
        "validation": config.max_validation_rows,
        "test": config.max_test_rows,
    }
    splits: dict[Part, EncodedSplit] = {}
    starts: dict[Part, NDArray[np.int64]] = {}
    for part in PARTS:
        whole = _encode_texts([(c.name, "\n".join(own[part])) for c, own in zip(clients, cut, strict=True)], tokenizer)
        pieces = [
            _keep(_cut_row(whole, i, config.max_length), limits[part], seed, client.name, part)
            for i, client in enumerate(clients)
        ]
        starts[part] = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        splits[part] = _join(whole, part, pieces, [client.name for client in clients])
    return ClientRows(tuple(client.name for client in clients), splits, starts)


def _encode_texts(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> EncodedSplit:
    """One row a client, of any length."""
    examples = [Example(name, "", (text,), 0, name) for name, text in texts]
    empty = [name for name, text in texts if not text]
    if empty:
        raise DataError(f"client {empty[0]!r}: no text in one of its parts; give it more lines")
    return encode_split(Task(_CARD, {"train": examples}), "train", tokenizer, max_length=_NO_LIMIT)


def _cut_row(whole: EncodedSplit, row: int, max_length: int) -> list[NDArray[np.int32]]:
    """Cut a row's answer into answers of nearly equal length; with what stands before them, ``max_length`` are read."""
    first, start = int(whole.row_starts[row]), int(whole.answer_starts[row])
    answer = whole.tokens[first + start : whole.row_starts[row + 1]]
    room = max_length + 1 - start  # an answer's last token is only predicted
    return np.array_split(answer, -(-len(answer) // room))


def _keep(
    pieces: list[NDArray[np.int32]], limit: int | None, seed: int, client: str, part: Part
) -> list[NDArray[np.int32]]:
    if limit is None or len(pieces) <= limit:
        return pieces
    drawn = generator_for(seed, "client rows", client, part).choice(len(pieces), limit, replace=False)
    return [pieces[i] for i in sorted(drawn.tolist())]


def _join(
    whole: EncodedSplit, part: Part, pieces: Sequence[Sequence[NDArray[np.int32]]], names: Sequence[str]
) -> EncodedSplit:
    """Put all clients' rows behind each other; every row begins as the whole text did."""
    start = int(whole.answer_starts[0])
    begin = whole.tokens[:start]
    rows = [np.concatenate([begin, piece]) for own in pieces for piece in own]
    n = len(rows)
    return EncodedSplit(
        task=whole.task,
        split=part,
        kind="sequence",
        tokens=np.concatenate(rows),
        row_starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        answer_starts=np.full(n, start, np.int32),
        example_rows=np.arange(n + 1, dtype=np.int64),
        labels=np.zeros(n, np.int64),
        n_choices=np.ones(n, np.int16),
        label_tokens=np.zeros(0, np.int32),
        divisors=np.array([len(row) - start for row in rows], np.float32),
        groups=np.repeat(np.arange(len(pieces)), [len(own) for own in pieces]).astype(np.int64),
        ids=tuple(f"{name}:{k}" for name, own in zip(names, pieces, strict=True) for k in range(len(own))),
        n_truncated=0,
    )
