"""What the server makes of replies: whom it believes, whom it leaves out, and what it counts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblelora.accounting.meter import Meter
from ensemblelora.errors import DataError, StoreError
from ensemblelora.federation.exchange import Exchange, Registered, Traffic, register
from ensemblelora.federation.protocol import (
    PARTS,
    Refusal,
    Reply,
    Request,
    check_reply,
    count_bytes,
    read_count,
    read_number,
)
from tests.federation_tiny import ToyCohort

NAMES = ("ann", "bob", "cem")


def hello(name: str, **changes: Any) -> Reply:
    counts = {f"n_{part}{kind}": 4 for part in PARTS for kind in ("", "_tokens")}
    return Reply(values={"client": name, "version": "1", "start": "s", "check": 7, **counts, **changes})


def answer(name: str, request: Request) -> Reply:
    if request.action == "hello":
        return hello(name)
    return Reply({"x": np.full(2, ord(name[0]), np.float32)}, {"flops": 10, "n_tokens": 3, "n_padded_tokens": 4})


def make_exchange(**options: Any) -> tuple[Exchange, ToyCohort]:
    cohort = ToyCohort(answer, NAMES, **options)
    clients = register(cohort, start="s", version="1")
    return Exchange(cohort, clients, "{}", 1.0), cohort


def read(client: int, reply: Reply) -> float:
    return float(check_reply(reply, {"x": (2,)}).arrays["x"][0])


def ask(exchange: Exchange, meter: Meter | None = None, stage: str = "stage") -> dict[int, float]:
    requests = {client: exchange.make("features") for client in range(len(exchange.clients))}
    return exchange.ask(stage, requests, read, meter=meter or Meter("m"))


def test_replies_are_in_the_order_of_clients_whoever_answered_first() -> None:
    for backwards in (False, True):
        exchange, cohort = make_exchange(backwards=backwards)
        found = ask(exchange)
        assert list(found.items()) == [(0, 97.0), (1, 98.0), (2, 99.0)]
        assert [name for name, _ in cohort.asked] == list(NAMES)[:: -1 if backwards else 1]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply({"x": np.array([1.0, np.nan], np.float32)}), "x: 1 of 2 numbers are not finite"),
        (Reply({"x": np.array([np.inf, -np.inf], np.float32)}), "x: 2 of 2 numbers are not finite"),
        (Reply({"x": np.ones(3, np.float32)}), r"x of shape \(3,\) and float32, expected \(2\) of float32"),
        (Reply({"x": np.ones((2, 1), np.float32)}), r"x of shape \(2, 1\)"),
        (Reply({"x": np.ones(2, np.int64)}), "and int64, expected"),
        (Reply({}), "sent no arrays, expected x"),
        (Reply({"x": np.ones(2, np.float32), "y": np.ones(2, np.float32)}), "sent x, y, expected x"),
        (Reply(values={"error": "no room left"}), "no room left"),
    ],
)
def test_what_does_not_fit_is_refused_and_named_and_the_others_go_on(
    reply: Reply, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    exchange, _ = make_exchange(spoil=lambda name, request, own: reply if name == "bob" else own)
    with caplog.at_level(logging.WARNING):
        assert list(ask(exchange)) == [0, 2]
    ((client, told),) = exchange.traffic.of("stage").refused
    assert client == "bob"
    with pytest.raises(Refusal, match=reason):
        raise Refusal(told)
    assert "the reply of client 'bob' is not used" in caplog.text


def test_one_that_is_gone_is_counted_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    is_gone = [True]
    exchange, _ = make_exchange(spoil=lambda name, request, own: None if name == "cem" and is_gone[0] else own)
    with caplog.at_level(logging.WARNING):
        assert list(ask(exchange)) == [0, 1]
    assert "stage: 1 of 3 clients did not reply" in caplog.text
    is_gone[0] = False
    assert list(ask(exchange)) == [0, 1, 2]
    record = exchange.traffic.of("stage")
    assert (record.n_messages, record.n_missing, record.refused) == (6, 1, [])


class Chatter:
    """Answers twice, for others, and for nobody."""

    def meet(self) -> dict[str, Reply]:
        return {name: hello(name) for name in NAMES}

    def ask(self, requests: Any, *, seconds: float) -> Any:
        for name in (*requests, *requests, "eve"):
            yield name, Reply({"x": np.full(2, 1.0 if name in requests else 9.0, np.float32)})


def test_a_second_reply_and_one_from_a_stranger_count_nothing() -> None:
    cohort = Chatter()
    exchange = Exchange(cohort, register(cohort, start="s", version="1"), "", 1.0)
    assert ask(exchange) == {0: 1.0, 1: 1.0, 2: 1.0}
    assert set(exchange.traffic.of("stage").up) == set(NAMES)


def test_what_was_sent_and_spent_is_counted_once() -> None:
    exchange, _ = make_exchange()
    meter = Meter("m")
    ask(exchange, meter)
    assert (meter.record.flops, meter.record.n_tokens, meter.record.n_padded_tokens) == (30, 9, 12)
    record, reply = exchange.traffic.of("stage"), answer("ann", Request("features", ""))
    assert record.up == dict.fromkeys(NAMES, count_bytes(reply))
    assert record.down == dict.fromkeys(NAMES, len("{}") + len("{}")), "order and values"
    assert count_bytes(reply) == 8 + len('{"flops": 10, "n_tokens": 3, "n_padded_tokens": 4}')


@pytest.mark.parametrize("spent", [-5, "many", None, 1.5, 2**70, float("nan")])
def test_a_client_can_not_spoil_the_bill(spent: Any) -> None:
    exchange, _ = make_exchange(
        spoil=lambda name, request, own: (
            Reply(own.arrays, {"flops": spent, "n_tokens": spent}) if name == "ann" else own
        )
    )
    meter = Meter("m")
    assert len(ask(exchange, meter)) == 3
    assert meter.record.flops == 20 and meter.record.n_tokens == 6


def test_traffic_comes_back_from_its_file_and_begins_anew_for_another_identity(tmp_path: Path) -> None:
    exchange, _ = make_exchange()
    exchange.traffic = Traffic(path=tmp_path / "traffic.json")
    exchange.traffic.begin("stage", "one")
    ask(exchange)
    again = Traffic.load(tmp_path / "traffic.json")
    assert again.stages == exchange.traffic.stages
    again.begin("stage", "one")
    assert again.of("stage").n_messages == 3
    again.begin("stage", "other")
    assert again.of("stage").n_messages == 0
    (tmp_path / "traffic.json").write_text('{"stage": {"n": 1}}', encoding="utf-8")
    with pytest.raises(StoreError, match="no record of what was sent"):
        Traffic.load(tmp_path / "traffic.json")


@given(st.integers(1, 10**12), st.integers(1, 10**6))
def test_a_claimed_count_is_never_more_than_what_is_known(claimed: int, known: int) -> None:
    assert read_count(Reply(values={"n": claimed}), "n", known) == min(claimed, known)


@pytest.mark.parametrize("value", [0, -3, 1.5, None, "7", True, float("inf"), float("nan"), 10**400, [1]])
def test_what_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(Refusal, match="expected a"):
        read_count(Reply(values={"n": value}), "n", 9)


def test_a_long_answer_is_cut_before_it_is_told() -> None:
    with pytest.raises(Refusal) as told:
        read_number(Reply(values={"loss": "x" * 10_000}), "loss")
    assert len(str(told.value)) < 300
    with pytest.raises(Refusal) as told:
        check_reply(Reply(values={"error": "y" * 10_000}), {})
    assert len(str(told.value)) < 300


def test_clients_are_registered_by_name_and_others_are_named(caplog: pytest.LogCaptureFixture) -> None:
    replies = {
        "cem": hello("cem"),
        "ann": hello("ann", n_train=9),
        "old": hello("old", version="0"),
        "odd": hello("odd", start="t"),
        "sly": hello("sly", n_test=-1),
        "ill": Reply(values={"error": "no model"}),
    }
    cohort = ToyCohort(lambda name, request: replies[name], tuple(replies))
    with caplog.at_level(logging.WARNING):
        found = register(cohort, start="s", version="1")
    rows = {"train": 4, "validation": 4, "test": 4}
    assert found == (Registered("ann", {**rows, "train": 9}, rows, 7), Registered("cem", rows, rows, 7))
    for told in (
        "'old' can't take part: has another version of ensemblelora (0 instead of 1)",
        "'odd' can't take part: has another start adapter (t instead of s); give it the same model",
        "'sly' can't take part: n_test -1, expected a whole number",
        "'ill' can't take part: no model",
    ):
        assert told in caplog.text


def test_too_few_clients_are_refused_with_what_the_first_said() -> None:
    cohort = ToyCohort(lambda name, request: Reply(values={"error": "no model"}), NAMES)
    with pytest.raises(DataError, match=r"0 clients can take part, expected at least 2 \(client 'ann': no model\)"):
        register(cohort, start="s", version="1")
