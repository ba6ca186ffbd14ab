"""Clients' texts and their rows: who is a client, what is learnt from and what tested on, and how texts become rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblelora.config_federation import ClientsConfig
from ensemblelora.errors import DataError
from ensemblelora.federation.clients import ClientText, load_clients, read_client
from ensemblelora.federation.protocol import PARTS
from ensemblelora.federation.rows import encode_clients
from tests.federation_tiny import write_clients
from tests.toys import load_tokenizer

PLAY = """
\tHAMLET


\tDRAMATIS PERSONAE

HAMLET\tson to the late king.


ACT I


SCENE I\tElsinore. A platform.


\t[Enter HAMLET and a GHOST]

HAMLET\t[Aside]  Who's there?
\tNay, answer me.

GHOST\tI am thy father.

\t[Exit]

HAMLET\tMy father?

SCENE II\tThe same.

First Player\tWhat speech, my lord?
"""


def make_clients(n_lines: int = 12) -> list[ClientText]:
    return [ClientText(name, tuple(f"{name} says line {i}" for i in range(n_lines))) for name in ("ann", "bob")]


def settings(**changes: object) -> ClientsConfig:
    return ClientsConfig.model_validate({"source": "texts", "min_lines": 1, "max_length": 8} | changes)


def test_roles_are_speakers_after_the_first_act(tmp_path: Path) -> None:
    (tmp_path / "hamlet.txt").write_text(PLAY, encoding="utf-8")
    (tmp_path / "notes.md").write_text("no play", encoding="utf-8")
    config = settings(source=str(tmp_path), kind="roles")
    with pytest.raises(DataError, match=r"1 clients of 3 lines or more, expected at least 2"):
        load_clients(config, seed=0)
    (tmp_path / "other.txt").write_text(PLAY.replace("HAMLET", "Hamlet"), encoding="utf-8")
    found = load_clients(config, seed=0)
    assert [client.name for client in found] == ["hamlet.HAMLET", "other.Hamlet"]
    assert found[0].lines == ("Who's there?", "Nay, answer me.", "My father?")


def test_each_file_is_a_client_whatever_its_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \nthree\n", encoding="utf-8")
    rows = [{"text": "one\ntwo"}, {"text": "three"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "c.csv").write_text('id,text\n1,one\n2,"two\nthree"\n', encoding="utf-8")
    (tmp_path / "short.txt").write_text("one\n", encoding="utf-8")
    found = load_clients(settings(source=str(tmp_path)), seed=0)
    assert {client.name: client.lines for client in found} == dict.fromkeys("abc", ("one", "two", "three"))


def test_so_many_are_drawn_by_seed_and_stay_in_the_order_of_names(tmp_path: Path) -> None:
    write_clients(tmp_path, 12)
    drawn = [load_clients(settings(source=str(tmp_path), max_clients=5), seed=seed) for seed in (0, 0, 1)]
    names = [[client.name for client in clients] for clients in drawn]
    assert names[0] == names[1] == sorted(names[0]) and names[0] != names[2] and len(names[0]) == 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "one\ntwo\n", r"a\.txt: 2 lines, expected 3 or more"),
        ("a.jsonl", '{"text": "one"}\n{"text"\n', r"a\.jsonl, line 2: not valid JSON"),
        (
            "a.jsonl",
            '{"line": "one"}\n',
            r"a\.jsonl, line 1: no text in column 'text' \(found: line\); set clients.text_",
        ),
        ("a.csv", "line\none\n", r"a\.csv, row 2: no text in column 'text' \(found: line\)"),
        ("a.doc", "one\n", r"a\.doc: expected a file ending in \.txt, \.jsonl, \.csv"),
    ],
)
def test_a_file_that_is_no_client_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_client(tmp_path / name)


def test_a_missing_folder_and_names_that_meet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"clients\.source nowhere: no such folder"):
        load_clients(settings(source="nowhere"), seed=0)
    for ending in ("txt", "csv"):
        (tmp_path / f"a.{ending}").write_text("text\none\ntwo\nthree\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"clients a\.csv and a\.txt have the same name"):
        load_clients(settings(source=str(tmp_path)), seed=0)


@given(st.integers(3, 200), st.floats(0.05, 0.9), st.floats(0.05, 0.9))
def test_the_split_is_in_time_and_leaves_no_part_empty(n: int, test: float, validation: float) -> None:
    client = ClientText("a", tuple(map(str, range(n))))
    parts = client.split(settings(test_fraction=test, validation_fraction=validation))
    assert (*parts["train"], *parts["validation"], *parts["test"]) == client.lines
    assert all(parts.values())
    if n >= 20:
        assert abs(len(parts["test"]) - n * test) <= 1


def test_rows_are_a_clients_own_tokens_in_their_order() -> None:
    clients, tokenizer, config = make_clients(), load_tokenizer(), settings()
    rows = encode_clients(clients, tokenizer, config, seed=0)
    for c, client in enumerate(clients):
        for part, lines in client.split(config).items():
            split, own = rows.splits[part], rows.find(c, part)
            pieces = [split.tokens[split.row_starts[r] : split.row_starts[r + 1]] for r in own]
            start = split.answer_starts[own[0]]
            whole = tokenizer(["\n".join(lines)], add_special_tokens=False)["input_ids"][0]
            assert np.concatenate([piece[start:] for piece in pieces]).tolist() == whole
            assert {tuple(piece[:start]) for piece in pieces} == {(tokenizer.eos_token_id,)}
            assert max(split.input_lengths[own]) <= config.max_length
            assert np.ptp(rows.list_answers(c, part)) <= 1, "rows of nearly equal length"
    assert rows.names == ("ann", "bob") and rows.count(0) == {part: len(rows.find(0, part)) for part in PARTS}


def test_rows_kept_depend_on_the_client_alone() -> None:
    clients, tokenizer = make_clients(40), load_tokenizer()
    config = settings(max_train_rows=4, max_validation_rows=2, max_test_rows=3)
    both, one = (encode_clients(some, tokenizer, config, seed=3) for some in (clients, clients[1:]))
    assert both.count(1) == one.count(0) == {"train": 4, "validation": 2, "test": 3}
    for part in PARTS:
        whole, alone = both.splits[part], one.splits[part]
        assert whole.tokens[whole.row_starts[both.starts[part][1]] :].tolist() == alone.tokens.tolist()
    assert both.check(1) == one.check(0)


def test_the_check_tells_a_changed_line() -> None:
    clients = make_clients()
    changed = [clients[0], ClientText("bob", (*clients[1].lines[:-1], "something else"))]
    before, after = (encode_clients(some, load_tokenizer(), settings(), seed=0) for some in (clients, changed))
    assert before.check(0) == after.check(0) and before.check(1) != after.check(1)
    assert 0 <= before.check(0) < 2**16
