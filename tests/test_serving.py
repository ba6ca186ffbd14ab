"""A run behind HTTP: the queue, the routes, what is refused and how, and the process itself."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.openapi.models import OpenAPI
from prometheus_client.parser import text_string_to_metric_families

from ensemblelora.answers import Prediction, Question
from ensemblelora.api import load_run
from ensemblelora.cli import main
from ensemblelora.errors import DataError, MissingExtraError, StoreError, UsageError
from ensemblelora.serving import server
from ensemblelora.serving.app import answer_each, make_app
from ensemblelora.serving.batching import Batcher
from ensemblelora.serving.limits import Limits, Refusal, check_installed
from measured_serving import render_serving
from tests.tiny_run import TASKS, finished_run
from tests.toys import make_card

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its own use of a name that anyio has moved
    from fastapi.testclient import TestClient

ROOT = Path(__file__).parents[1]
LOOPBACK = "http://127.0.0.1"
NOTHING = ("expected JSON", "application/json")


def answer(row: Any, task: str | None) -> Prediction:
    routing = {"toy": 0.75, "other": 0.25} if task is None else None
    return Prediction(f"{row}!", {"no": 0.25, "yes": 0.75}, {"group-0": 1.0}, {"group-0": 1.0}, task or "toy", routing)


class FakeRun:
    """Answers each row with itself; some rows have faults, and while it is held it has none of them answered."""

    path = Path("runs/toy")
    cards = {"toy": make_card(), "other": make_card(task="other", doc_to_text="{{a}}{{b}}", doc_to_choice="{{c}}")}  # noqa: RUF012
    kinds = {"toy": "verbalizer", "other": "options"}  # noqa: RUF012

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.goes_on = threading.Event()
        self.goes_on.set()

    def predict_all(self, questions: Sequence[Question]) -> list[list[Prediction]]:
        self.batches.append([len(question.rows) for question in questions])
        assert self.goes_on.wait(20)
        faults = {"bad": DataError("row 1: bad\nrow"), "broken": StoreError("file x: damaged"), "bug": KeyError("x")}
        for row in (row for question in questions for row in question.rows if isinstance(row, str)):
            if row in faults:
                raise faults[row]
        return [[answer(row, question.task) for row in question.rows] for question in questions]


def ask(*rows: Any, task: str | None = "toy") -> Question:
    return Question(task, rows)


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


def use_batcher(run: FakeRun, use: Any, **limits: Any) -> Any:
    """Run ``use(batcher)`` in an event loop of its own."""

    async def whole() -> Any:
        batcher = Batcher(partial(answer_each, run), Limits(**limits), observe=lambda rows, seconds: None)
        async with batcher.running():
            return await use(batcher)

    return asyncio.run(whole())


def test_what_comes_while_the_model_is_busy_is_answered_together_and_each_gets_its_own():
    run = FakeRun()

    async def use(batcher: Batcher) -> list[list[Prediction]]:
        run.goes_on.clear()
        first = asyncio.create_task(batcher.submit(ask("a")))
        await until(lambda: run.batches)
        others = [asyncio.create_task(batcher.submit(ask(*rows))) for rows in ("bc", "d", "efg", "h")]
        await until(lambda: batcher.n_waiting_rows == 7)
        run.goes_on.set()
        return await asyncio.gather(first, *others)

    found = use_batcher(run, use, max_batch_rows=4, batch_wait_ms=0)
    assert [[one.label for one in some] for some in found] == [["a!"], ["b!", "c!"], ["d!"], ["e!", "f!", "g!"], ["h!"]]
    assert run.batches == [[1], [2, 1], [3, 1]], "in order, and never more rows than a batch may have"


def test_a_batch_waits_a_moment_for_more():
    run = FakeRun()

    async def use(batcher: Batcher) -> None:
        await asyncio.gather(*(batcher.submit(ask(row)) for row in "abc"))

    use_batcher(run, use, batch_wait_ms=50)
    assert run.batches == [[1, 1, 1]]


def test_a_full_batch_and_a_server_that_stops_wait_for_no_more():
    run = FakeRun()

    async def use(batcher: Batcher) -> None:
        await asyncio.gather(*(batcher.submit(ask(row)) for row in "abc"))
        last = asyncio.create_task(batcher.submit(ask("d")))
        await until(lambda: batcher.n_waiting_rows == 1)
        batcher.hurry()
        await last
        await batcher.submit(ask("e"))

    started = time.monotonic()
    use_batcher(run, use, batch_wait_ms=20_000, max_batch_rows=3)
    assert run.batches == [[1, 1, 1], [1], [1]] and time.monotonic() - started < 15


def test_one_request_larger_than_a_batch_is_answered_whole():
    run = FakeRun()
    found = use_batcher(run, lambda batcher: batcher.submit(ask(*"abcdef")), max_batch_rows=2)
    assert len(found) == 6 and run.batches == [[6]]


def test_what_there_is_no_room_for_is_refused_at_once_and_the_rest_is_answered():
    run = FakeRun()

    async def use(batcher: Batcher) -> list[Any]:
        run.goes_on.clear()
        busy = asyncio.create_task(batcher.submit(ask("a")))
        await until(lambda: run.batches)
        waiting = asyncio.create_task(batcher.submit(ask("b", "c")))
        await until(lambda: batcher.n_waiting_rows == 2)
        with pytest.raises(Refusal, match="overloaded: 2 rows are waiting and at most 3 may; try again later") as error:
            await batcher.submit(ask("d", "e"))
        assert (error.value.status, error.value.reason) == (503, "overload")
        fits = asyncio.create_task(batcher.submit(ask("f")))
        await until(lambda: batcher.n_waiting_rows == 3)
        run.goes_on.set()
        return await asyncio.gather(busy, waiting, fits)

    assert [len(some) for some in use_batcher(run, use, max_waiting_rows=3, max_rows=3)] == [1, 2, 1]


def test_what_is_not_answered_in_time_is_given_up_and_leaves_the_queue():
    run = FakeRun()

    async def use(batcher: Batcher) -> None:
        run.goes_on.clear()
        late = [asyncio.create_task(batcher.submit(ask(row))) for row in ("a", "b")]
        for task in late:
            with pytest.raises(Refusal, match=r"not answered within 0\.2 s") as error:
                await task
            assert error.value.status == 504
        assert batcher.n_waiting_rows == 0
        run.goes_on.set()
        assert (await batcher.submit(ask("c")))[0].label == "c!"

    use_batcher(run, use, timeout_seconds=0.2, max_batch_rows=1, batch_wait_ms=0)
    assert run.batches == [[1], [1]], "what was given up while it waited is never run"


def test_whoever_goes_away_leaves_the_queue():
    run = FakeRun()

    async def use(batcher: Batcher) -> None:
        run.goes_on.clear()
        busy = asyncio.create_task(batcher.submit(ask("a")))
        await until(lambda: run.batches)
        gone = asyncio.create_task(batcher.submit(ask("b")))
        await until(lambda: batcher.n_waiting_rows == 1)
        gone.cancel()
        await asyncio.wait([gone])
        assert batcher.n_waiting_rows == 0
        run.goes_on.set()
        await busy

    use_batcher(run, use)


def test_stopping_answers_what_was_accepted_and_nothing_new():
    run = FakeRun()

    async def whole() -> list[Any]:
        batcher = Batcher(partial(answer_each, run), Limits(max_batch_rows=1), observe=lambda rows, seconds: None)
        run.goes_on.clear()
        async with batcher.running():
            accepted = [asyncio.create_task(batcher.submit(ask(row))) for row in "abc"]
            await until(lambda: batcher.n_waiting_rows == 2)
            threading.Timer(0.05, run.goes_on.set).start()
        done, _ = await asyncio.wait(accepted, timeout=5)
        assert len(done) == 3
        with pytest.raises(Refusal, match="stopping") as error:
            await batcher.submit(ask("d"))
        assert error.value.status == 503
        return [task.result()[0].label for task in accepted]

    assert asyncio.run(whole()) == ["a!", "b!", "c!"]


def test_a_question_at_fault_is_refused_alone():
    run = FakeRun()
    found = answer_each(run, [ask("a"), ask("bad", "b"), ask("c", task=None), ask("bug")])  # type: ignore[arg-type]
    assert [one.label for one in (*found[0], *found[2])] == ["a!", "c!"]
    assert isinstance(found[1], DataError) and isinstance(found[3], KeyError)
    assert run.batches == [[1, 2, 1, 1], [1], [2], [1], [1]]


@contextmanager
def client_of(run: Any, *, is_routing: bool = True, **limits: Any) -> Iterator[TestClient]:
    app = make_app(run, Limits(**limits), is_routing=is_routing, hosts=("127.0.0.1", "localhost", "[::1]"))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client:
        yield client


def test_rows_are_answered_in_order_with_everything_that_is_known():
    with client_of(FakeRun()) as client:
        found = client.post("/predict", json={"task": "toy", "rows": ["a", {"text": "b"}]})
        routed = client.post("/predict", json={"rows": ["a"]}).json()["predictions"][0]
    assert found.status_code == 200
    first, second = found.json()["predictions"]
    assert first == {
        "label": "a!",
        "probabilities": {"no": 0.25, "yes": 0.75},
        "groups": {"group-0": 1.0},
        "members": {"group-0": 1.0},
        "task": "toy",
        "routing": None,
        "probability": None,
        "task_probability": None,
        "doubt": None,
    }
    assert second["label"] == "{'text': 'b'}!"
    assert routed["routing"] == {"toy": 0.75, "other": 0.25}


@pytest.mark.parametrize(
    ("request_", "status", "told"),
    [
        ({"json": {"task": "toy", "rows": ["bad"]}}, 422, ("row 1: bad row",)),
        ({"json": {"task": "toy", "rows": []}}, 422, ("rows: ", *NOTHING)),
        ({"json": {"task": "toy", "rows": "a"}}, 422, ("rows: ", *NOTHING)),
        ({"json": {"task": 3, "rows": ["a"]}}, 422, ("task: ", *NOTHING)),
        ({"json": {"task": "toy", "rows": [1]}}, 422, ("row 1: Input should be a valid string", *NOTHING)),
        ({"json": {"task": "toy", "rows": ["a"], "rowz": 1}}, 422, ("unknown key 'rowz'; ", *NOTHING)),
        ({"json": {"tsk": "toy", "row": ["a"]}}, 422, ("unknown keys 'tsk', 'row'; ", *NOTHING)),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 422, ("the body is no JSON (", *NOTHING)),
        ({"content": b'{"rows": "\xff"}', "headers": {"content-type": "application/json"}}, 400, ("body",)),
        ({"content": b'{"rows": ["a"]}'}, 415, ("does not say what it is", "send Content-Type: application/json")),
        ({"data": {"rows": "a"}}, 415, ("came as application/x-www-form-urlencoded", "Content-Type: application/json")),
        ({"content": b'{"rows": ["\\ud800"]}', "headers": {"content-type": "application/json"}}, 422, ("surrogate",)),
        ({"json": {"task": "toy", "rows": ["a"] * 5}}, 413, ("5 rows in one request, at most 4 may be",)),
        ({"json": {"task": "toy", "rows": ["a" * 3000]}}, 413, ("more than 2000 bytes",)),
        ({"json": {"task": "toy", "rows": ["broken"]}}, 500, ("file x: damaged",)),
        ({"json": {"task": "toy", "rows": ["bug"]}}, 500, ("unexpected KeyError",)),
    ],
)
def test_what_is_refused_is_refused_in_one_line(request_, status, told):
    with client_of(FakeRun(), max_rows=4, max_body_bytes=2000) as client:
        found = client.post("/predict", **request_)
        assert client.post("/predict", json={"task": "toy", "rows": ["a"]}).status_code == 200, "and the server goes on"
    assert found.status_code == status
    assert list(found.json()) == ["error"] and "\n" not in found.json()["error"]
    assert all(part in found.json()["error"] for part in told), found.json()


def test_routes_that_are_none_and_names_that_are_not_this_machines_are_refused():
    with client_of(FakeRun()) as client:
        assert client.get("/nothing").json() == {"error": "Not Found"}
        assert client.get("/predict").status_code == 405
        assert client.get("/docs").status_code == 404, "it would load scripts from elsewhere"
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            found = client.get("/health", headers={"host": host})
            assert found.status_code == 403 and "names of this machine only" in found.json()["error"]
        assert 'ensemblelora_refusals_total{reason="host"} 4.0' in client.get("/metrics").text.splitlines()
        for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
            assert client.get("/health", headers={"host": host}).status_code == 200


def test_a_server_without_a_router_asks_for_a_name():
    with client_of(FakeRun(), is_routing=False) as client:
        found = client.post("/predict", json={"rows": ["a"]})
        assert client.get("/health").json()["is_routing"] is False
    assert found.status_code == 422 and "no rows without a task's name" in found.json()["error"]


def test_overload_over_http_says_when_to_come_again():
    run = FakeRun()
    run.goes_on.clear()
    with client_of(run, max_waiting_rows=2, max_rows=2, batch_wait_ms=0) as client, ThreadPoolExecutor() as pool:
        post = partial(client.post, "/predict", json={"task": "toy", "rows": ["a", "b"]})
        busy = pool.submit(post)
        while not run.batches:
            time.sleep(0.005)
        waiting = pool.submit(post)
        while client.get("/health").json()["waiting_rows"] < 2:
            time.sleep(0.005)
        refused = post()
        assert "ensemblelora_waiting_rows 2.0" in client.get("/metrics").text
        run.goes_on.set()
        assert [done.result().status_code for done in (busy, waiting)] == [200, 200]
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"].startswith("overloaded: 2 rows are waiting")


def test_a_request_that_takes_too_long_to_arrive_is_refused():
    async def whole() -> list[dict[str, Any]]:
        app, sent = make_app(FakeRun(), Limits(timeout_seconds=0.1)), []  # type: ignore[arg-type]
        came = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive() -> Any:
            if (message := next(came, None)) is not None:
                return message
            await asyncio.sleep(30)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "server": ("127.0.0.1", 80), "client": None,
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")], "state": {},
        }  # fmt: skip
        await app(scope, receive, send)
        return sent

    start, body = asyncio.run(whole())
    assert start["status"] == 408 and b"not whole within 0.1 s" in body["body"]


def test_health_tasks_metrics_and_description():
    with client_of(FakeRun()) as client:
        assert client.get("/health").json() | {"version": ""} == {
            "status": "ok", "version": "", "run": "toy", "n_tasks": 2, "is_routing": True, "waiting_rows": 0,
        }  # fmt: skip
        assert client.get("/tasks").json() == [
            {"task": "toy", "kind": "verbalizer", "columns": ["text"], "choices": ["no", "yes"]},
            {"task": "other", "kind": "options", "columns": ["a", "b", "c"], "choices": None},
        ]
        client.post("/predict", json={"task": "toy", "rows": ["a", "b"]})
        client.post("/predict", json={"rows": ["c"]})
        client.post("/predict", json={"task": "toy", "rows": ["bad"]})
        counted = client.get("/metrics").text
        described = client.get("/openapi.json").json()
    for line in (
        'ensemblelora_requests_total{route="/predict",status="200"} 2.0',
        'ensemblelora_requests_total{route="/predict",status="422"} 1.0',
        'ensemblelora_answers_total{routed="false",task="toy"} 2.0',
        'ensemblelora_answers_total{routed="true",task="toy"} 1.0',
        'ensemblelora_refusals_total{reason="invalid"} 1.0',
        "ensemblelora_batch_rows_count 3.0",
        "ensemblelora_batch_rows_sum 4.0",
        "ensemblelora_waiting_rows 0.0",
    ):
        assert line in counted.splitlines(), counted
    OpenAPI.model_validate(described)
    assert {family.type for family in text_string_to_metric_families(counted)} == {"counter", "gauge", "histogram"}
    assert set(described["paths"]) == {"/predict", "/tasks", "/health", "/metrics"}
    faults = described["paths"]["/predict"]["post"]["responses"]
    assert {"200", "400", "403", "408", "413", "415", "422", "500", "503", "504"} == set(faults)
    assert faults["503"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Fault"}
    assert {"label", "probabilities", "members", "routing"} <= set(
        described["components"]["schemas"]["Prediction"]["properties"]
    )


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"max_rows": 0}, "max_rows 0: expected a number above 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds 0.0: expected a number above 0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds nan: expected a number above 0"),
        ({"batch_wait_ms": -1.0}, "batch_wait_ms -1.0: expected 0 or more"),
        ({"batch_wait_ms": 2000.0, "timeout_seconds": 1.0}, "less than the time limit"),
        ({"max_rows": 300}, r"max_rows 300 \(--rows\) is more than max_waiting_rows 256 \(--queue\)"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, told):
    with pytest.raises(UsageError, match=told):
        Limits(**limits)


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch, capsys):
    check_installed()
    from ensemblelora.serving import limits

    monkeypatch.setattr(limits.importlib.util, "find_spec", lambda name: None if name == "prometheus_client" else 1)
    with pytest.raises(MissingExtraError):
        check_installed()
    assert main(["serve", "r"]) == 2
    told = "serve: package prometheus-client is not installed; run: pip install 'ensemblelora[serve]'"
    assert capsys.readouterr().err == f"error: {told}\n"


def test_the_command_says_in_one_line_where_it_listens(monkeypatch, capsys):
    given: list[Any] = []

    def serve_run(folder: Path, *, announce: Any, **options: Any) -> None:
        given.append((folder, options))
        announce(server.Started("http://127.0.0.1:8123", 7, str(folder), ("a", "b"), False))

    monkeypatch.setattr(server, "serve_run", serve_run)
    assert main(["serve", "r", "--port", "8123", "--queue", "64", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "http://127.0.0.1:8123/predict answers 2 tasks of r, each by name; Ctrl-C stops\n"
    limits = Limits(max_waiting_rows=64, max_rows=64)
    assert given == [(Path("r"), {"host": "127.0.0.1", "port": 8123, "limits": limits, "device": "cpu"})]
    assert main(["serve", "r", "--json"]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and json.loads(line)["tasks"] == ["a", "b"]
    assert main(["serve", "r", "--rows", "500"]) == 2
    assert "max_rows 500 (--rows) is more than max_waiting_rows 256 (--queue)" in capsys.readouterr().err


def start_in_process(monkeypatch, host: str, port: int, load: Any = lambda with_router=False: None) -> None:
    run = SimpleNamespace(cards=FakeRun.cards, load=load, path=FakeRun.path)
    monkeypatch.setattr(server, "load_run", lambda folder: run)
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(server.signal, "signal", lambda number, handler: None)
    options = {"limits": Limits(), "device": None, "announce": lambda started: None}
    server.serve_run(Path("r"), host=host, port=port, **options)


def test_an_address_that_cannot_be_had_is_said_before_the_model_is_loaded(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UsageError, match=r"127\.0\.0\.1 port \d+: can't be had \(address already in use\)"):
            start_in_process(monkeypatch, "127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError, match=r"--host no\.such\.host\.invalid: no address of this machine"):
        start_in_process(monkeypatch, "no.such.host.invalid", 0)


@pytest.mark.parametrize(("host", "is_warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_a_server_that_others_can_reach_says_that_it_knows_no_passwords(monkeypatch, caplog, host, is_warned):
    with caplog.at_level(logging.WARNING, "ensemblelora"):
        start_in_process(monkeypatch, host, 0)
    assert ("it knows no passwords" in caplog.text) == is_warned


def test_a_server_whose_rows_are_gone_says_so_and_answers_by_name(monkeypatch, caplog):
    made: list[bool] = []

    def load(with_router: bool = False) -> None:
        if with_router:
            raise DataError("data file x: not found")

    make = server.make_app
    monkeypatch.setattr(server, "make_app", lambda *a, **k: made.append(k["is_routing"]) or make(*a, **k))
    with caplog.at_level(logging.WARNING, "ensemblelora"):
        start_in_process(monkeypatch, "127.0.0.1", 0)
        start_in_process(monkeypatch, "127.0.0.1", 0, load)
    assert made == [True, False]
    assert "rows without a task's name are refused" in caplog.text and "data file x: not found" in caplog.text


def read_texts(task: str, n: int) -> list[str]:
    lines = (finished_run() / "tasks" / f"{task}.test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:n]]


def test_http_gives_what_predict_gives():
    run, texts = load_run(finished_run() / "run"), read_texts(TASKS[0], 4)
    with client_of(run) as client:
        named = client.post("/predict", json={"task": TASKS[0], "rows": texts}).json()["predictions"]
        routed = client.post("/predict", json={"rows": texts}).json()["predictions"]
        unknown = client.post("/predict", json={"task": "nothing", "rows": texts})
        column = client.post("/predict", json={"task": TASKS[0], "rows": [{"words": "fire"}]})
    for task, found in ((TASKS[0], named), (None, routed)):
        for one, expected in zip(found, run.predict(task, texts), strict=True):
            assert (one["label"], one["task"]) == (expected.label, expected.task)
            assert one["probabilities"] == pytest.approx(expected.probabilities, rel=1e-5)
            assert one["members"] == pytest.approx(expected.members)
            assert one["routing"] == (None if task else pytest.approx(expected.routing))
    assert unknown.status_code == column.status_code == 422
    assert "not in this run; its tasks are family0_task0" in unknown.json()["error"]
    assert "unknown column 'text'" in column.json()["error"]


@contextmanager
def serving(*options: str, run: Path | None = None) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    """A server in a process of its own, and what it said when it was ready."""
    command = [
        sys.executable,
        "-m",
        "ensemblelora",
        "serve",
        str(run or finished_run() / "run"),
        "--port",
        "0",
        "--json",
        "--quiet",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *options], text=True, env=environment, cwd=run and Path.cwd(), **pipes) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield json.loads(line), process
        finally:
            process.kill()


@pytest.mark.slow
def test_a_real_server_answers_refuses_what_is_too_much_and_ends_well_with_requests_in_flight():
    # A batch of 48 rows waits for a 49th, however slowly they come, until the server is told to stop.
    limits = ("--batch", "49", "--queue", "48", "--rows", "8", "--wait", "200000", "--timeout", "250")
    with serving(*limits) as (started, process), httpx.Client(base_url=started["url"], timeout=120) as client:
        assert started["tasks"] == list(TASKS) and started["is_routing"] and started["pid"] == process.pid
        assert client.get("/health").json()["status"] == "ok"
        texts = read_texts("written", 8)
        expected = load_run(finished_run() / "run").predict("written", texts)
        with ThreadPoolExecutor(max_workers=8) as pool:
            post = partial(httpx.post, started["url"] + "/predict", timeout=250)
            accepted = [pool.submit(post, json={"task": "written", "rows": texts}) for _ in range(6)]
            while client.get("/health").json()["waiting_rows"] < 48:
                time.sleep(0.02)
            refused = client.post("/predict", json={"task": "written", "rows": texts[:1]})
            assert refused.status_code == 503 and "overloaded: 48 rows are waiting" in refused.json()["error"]
            process.send_signal(signal.SIGTERM)
            answers = [done.result() for done in accepted]
        assert [found.status_code for found in answers] == [200] * 6
        for found in answers:
            assert [one["label"] for one in found.json()["predictions"]] == [one.label for one in expected]
        assert process.wait(60) == 0 and process.stderr.read() == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(started["url"] + "/health")


@pytest.mark.slow
def test_ctrl_c_ends_a_server_that_answers_names_and_routes_and_batches():
    # Two rows are a batch; one row alone waits for another, however slowly it comes.
    limits = ("--batch", "2", "--wait", "100000", "--timeout", "120")
    with serving(*limits) as (started, process), httpx.Client(base_url=started["url"], timeout=120) as client:
        for task in (*TASKS, None):
            rows = read_texts(task or TASKS[0], 2)
            found = client.post("/predict", json={"task": task, "rows": rows})
            assert found.status_code == 200, found.text
            assert all((one["routing"] is None) == (task is not None) for one in found.json()["predictions"])
        before = count_batches(client)
        post = partial(httpx.post, started["url"] + "/predict", timeout=120)
        with ThreadPoolExecutor(max_workers=2) as pool:
            texts = read_texts(TASKS[0], 2)
            asked = [pool.submit(post, json={"task": TASKS[0], "rows": [text]}) for text in texts]
            alone = [done.result().json()["predictions"][0]["label"] for done in asked]
        together = client.post("/predict", json={"task": TASKS[0], "rows": texts}).json()["predictions"]
        assert alone == [one["label"] for one in together], "each has its own answer"
        batches, n_rows = (after - old for after, old in zip(count_batches(client), before, strict=True))
        assert (batches, n_rows) == (2, 4), "two requests were one batch"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and process.stderr.read() == ""


def count_batches(client: httpx.Client) -> tuple[float, float]:
    """Batches so far and rows in them, as Prometheus' own parser reads them."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    values = {sample.name: sample.value for family in families for sample in family.samples}
    return values["ensemblelora_batch_rows_count"], values["ensemblelora_batch_rows_sum"]


def make_record() -> dict[str, Any]:
    waits = {"p50": 0.21, "p95": 0.4, "p99": 1.0}
    rate = {"n_requests": 30, "statuses": {"200": 28, "503": 2}, "answered_per_second": 0.93, "rows_a_batch": 1.5}
    task = {"n_rows": 40, "n_candidates": 2.0, "task_found": 0.9, "accuracy_named": 0.75, "accuracy_routed": 0.7}
    return {
        "config": {"run": "toy", "seconds": 30.0, "queue": 128, "batch": 32},
        "startup_seconds": 12.3,
        "rates": {"1": rate | {"answered_seconds": waits}, "64": rate | {"statuses": {"503": 30}}},
        "burst": {"n_requests": 256, "statuses": {"503": 128, "200": 128}, "refused_seconds": waits},
        "routing": {
            "mean": {"task_found": 0.9, "accuracy_named": 0.75, "accuracy_routed": 0.7},
            "routed_less_named": {"difference": -0.05, "low": -0.1, "high": 0.01},
            "tasks": {"toy": task},
        },
    }


def test_a_record_is_shown_with_what_was_refused():
    lines = list(render_serving(make_record()))
    assert "| 1 | 0.93 | 0.21 s | 0.40 s | 1.00 s | 1.5 | 2 of 30 |" in lines
    assert "| 64 | 0.93 | - | - | - | 1.5 | 30 of 30 |" in lines
    assert "| toy | 40 | 2 | 90% | 0.750 | 0.700 |" in lines
    text = " ".join(" ".join(lines).split())
    assert "256 requests at once were answered: 128 with 200, 128 with 503. Refusals took 0.21 s in the median" in text
    assert "accuracy 0.700 in place of 0.750 (-0.050 [-0.100, +0.010])" in text
    calm = make_record()
    calm["burst"] = {"n_requests": 2, "statuses": {"200": 2}}
    assert "None was refused." in " ".join(render_serving(calm)) and "hey" not in " ".join(render_serving(calm))
    calm["hey"] = {"8": calm["rates"]["1"]}
    assert "| 8 | 0.93 | 0.21 s | 0.40 s | 1.00 s | 2 of 30 |" in list(render_serving(calm))


# The load tool's options and what it prints, for three requests.
FAKE_HEY = """#!{python}
import argparse, time, urllib.error, urllib.request
parser = argparse.ArgumentParser()
for name in "-z", "-c", "-m", "-T", "-D", "-t", "-o":
    parser.add_argument(name, required=True)
parser.add_argument("url")
asked = parser.parse_args()
assert (asked.m, asked.o, asked.t) == ("POST", "csv", "0") and asked.z.endswith("s")
print("response-time,DNS+dialup,DNS,Request-write,Response-delay,Response-read,status-code,offset")
begun = time.monotonic()
for _ in range(3):
    started = time.monotonic()
    request = urllib.request.Request(asked.url, open(asked.D, "rb").read(), {{"Content-Type": asked.T}})
    status = urllib.request.urlopen(request).status
    print(f"{{time.monotonic() - started:.4f}},0.0,0.0,0.0,0.0,0.0,{{status}},{{started - begun:.4f}}")
"""


def test_what_the_load_tool_prints_is_read(monkeypatch, capsys):
    with the_benchmark(monkeypatch) as benchmark:
        head = "response-time,DNS+dialup,DNS,Request-write,Response-delay,Response-read,status-code,offset\n"
        lines = ("0.2000,0,0,0,0,0,200,0.0000", "0.4000,0,0,0,0,0,200,0.6000", "0.0010,0,0,0,0,0,503,0.1000")
        found = benchmark.read_hey(head + "\n".join(lines) + "\n")
        assert found["statuses"] == {"200": 2, "503": 1} and found["answered_per_second"] == pytest.approx(2.0)
        assert found["answered_seconds"]["p50"] == pytest.approx(0.3) and found["refused_seconds"]["p99"] == 0.001
        monkeypatch.setenv("PATH", "")
        assert benchmark.ask_with_hey("http://127.0.0.1:1", None, None) == {}
    assert "hey is not installed" in capsys.readouterr().err


@contextmanager
def the_benchmark(monkeypatch) -> Iterator[Any]:
    """The script, which finds its neighbours as it does when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("serving")
    finally:
        for name in ("serving", "common"):
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_benchmark_measures_a_real_server_and_breaks_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "hey").write_text(FAKE_HEY.format(python=sys.executable), encoding="utf-8")
    (tmp_path / "hey").chmod(0o755)
    with the_benchmark(monkeypatch) as benchmark:
        options = "--rates 10 --seconds 2 --rows 3 --queue 8 --batch 4 --open 1,2 --json --leave-record"
        monkeypatch.setattr(sys, "argv", ["serving.py", str(finished_run() / "run"), *options.split()])
        benchmark.main()
    record = json.loads(capsys.readouterr().out)
    rate, burst = record["rates"]["10"], record["burst"]
    assert set(rate["statuses"]) <= {"200", "503"} and rate["n_requests"] == sum(rate["statuses"].values()) > 5
    assert 0 < rate["answered_seconds"]["p50"] <= rate["answered_seconds"]["p95"] <= rate["answered_seconds"]["p99"]
    assert [found["statuses"] for found in record["hey"].values()] == [{"200": 3}] * 2
    assert set(burst["statuses"]) <= {"200", "503"} and burst["n_requests"] == 16
    assert all(line.startswith("overloaded: rows are waiting") for line in burst["refusals"])
    assert record["health_afterwards"]["status"] == "ok" and record["startup_seconds"] > 0
    assert set(record["routing"]["tasks"]) == set(TASKS)
    run = load_run(finished_run() / "run")
    for name, found in record["routing"]["tasks"].items():
        rows = benchmark.read_rows(run, run.cards[name], 3)
        labels = [one.label for one in run.predict(name, [row.values for row in rows])]
        assert found["accuracy_named"] == pytest.approx(
            np.mean([a == row.answer for a, row in zip(labels, rows, strict=True)])
        )
        assert found["n_rows"] == 3 and 0 <= found["task_found"] <= 1 and found["n_candidates"] == len(TASKS)
    low, high = (record["routing"]["routed_less_named"][end] for end in ("low", "high"))
    assert low <= record["routing"]["routed_less_named"]["difference"] <= high
