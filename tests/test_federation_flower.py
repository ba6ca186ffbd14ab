"""Flower carries the messages and changes nothing: records, nodes that go and come back, simulation, deployment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from ensemblelora import __version__, artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.config import dump_config
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import ConfigError, DataError, ModelError, OutputError, UsageError
from ensemblelora.federation import apps, engines
from ensemblelora.federation.answers import answer
from ensemblelora.federation.apps import client_app
from ensemblelora.federation.engines import ProcessCohort, run_federation
from ensemblelora.federation.exchange import Exchange, register
from ensemblelora.federation.protocol import Reply, Request, check_reply
from ensemblelora.federation.server import federate, make_order
from ensemblelora.federation.transport import MESSAGE_TYPES, GridCohort, read_reply, read_request, to_record
from tests.federation_tiny import make_config, shared_worker, write_clients
from tests.tiny_run import save_model

ROOT = Path(__file__).resolve().parent.parent
FLAT = {"boosting": {"n_rounds": []}, "groups": {"n_groups": [2]}}
NAMES = ("client0", "client1", "client2")


@pytest.fixture(autouse=True)
def _in_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages only in a process that it started; this one says it is."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def make_message(record: RecordDict, action: str = "hello", node: int = 1) -> Message:
    return Message(record, node, MESSAGE_TYPES[action])  # type: ignore[index]


def test_a_request_and_a_reply_come_through_as_they_were() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "members": rng.normal(size=(2, 3)).astype(np.float32),
        "none": np.zeros((0, 3), np.float32),
        "losses": rng.normal(size=4),
    }
    values = {"terms": [[1, 1.0], [0, -0.5]], "name": "groups-2 0", "weigh": [], "rate": 1e-3, "odd": "\u00e9\n"}
    request = read_request(to_record(Request("train", '{"seed": 0}', arrays, values)), "train")
    reply = read_reply(make_message(to_record(Reply(arrays, values))))
    for message in (request, reply):
        assert message.values == values
        for name, array in arrays.items():
            np.testing.assert_array_equal(message.arrays[name], array)
            assert message.arrays[name].dtype == array.dtype
    assert (request.action, request.order) == ("train", '{"seed": 0}')


def test_nothing_is_pickled() -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        to_record(Reply({"x": np.array([object()], dtype=object)}))
    text = (ROOT / "src" / "ensemblelora" / "federation" / "transport.py").read_text(encoding="utf-8")
    assert "import pickle" not in text and "loads(str(" in text


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"arrays": ConfigRecord({}), "told": ConfigRecord({})}),
        RecordDict({"arrays": ArrayRecord({}), "told": ConfigRecord({"values": "{"})}),
        RecordDict({"arrays": ArrayRecord({}), "told": ConfigRecord({"values": "[1]"})}),
        RecordDict({"arrays": ArrayRecord({}), "told": ConfigRecord({"values": f'{{"n": 1{"0" * 5000}}}'})}),
        RecordDict(
            {
                "arrays": ArrayRecord({"x": Array("float32", (1,), "numpy.ndarray", b"not an array")}),
                "told": ConfigRecord({"values": "{}"}),
            }
        ),
    ],
)
def test_a_message_that_can_not_be_read_is_a_reply_that_says_so(content: RecordDict) -> None:
    assert "a message that can't be read" in read_reply(make_message(content)).values["error"]


def test_a_clients_crash_is_a_reply_that_says_so() -> None:
    asked = make_message(to_record(Request("hello", "")))
    reply = read_reply(Message(Error(code=2, reason="boom\nat line 3"), reply_to=asked))
    assert reply.values == {"error": "boom at line 3"}


class FakeGrid:
    """Nodes that answer through Flower's own messages; each names a client of a worker."""

    def __init__(self, nodes: Mapping[int, str], *, silent: Sequence[int] = ()) -> None:
        self.nodes, self.silent = dict(nodes), set(silent)
        self.worker = shared_worker()
        self._waiting: dict[str, Message] = {}
        self.pushed: list[int] = []

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        assert isinstance(messages, list) and messages, "Flower's own looks at them twice, and wants some"
        numbers = []
        for message in messages:
            number = f"message {len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = number
            node = message.metadata.dst_node_id
            self.pushed.append(node)
            numbers.append(number)
            if node not in self.silent:
                self._waiting[number] = self._answer(message, node)
        return numbers

    def pull_messages(self, numbers: Sequence[str]) -> list[Message]:
        return [self._waiting.pop(number) for number in list(numbers) if number in self._waiting][::-1]

    def _answer(self, message: Message, node: int) -> Message:
        action = next(action for action, kind in MESSAGE_TYPES.items() if kind == message.metadata.message_type)
        client = self.worker.rows.names.index(self.nodes[node])
        own = answer(self.worker, client, read_request(message.content, action))
        return Message(to_record(own), reply_to=message)


def make_cohort(grid: FakeGrid, *, n_expected: int = 2, **options: Any) -> GridCohort:
    settings = {"wait_seconds": 0.0, "reply_seconds": 2.0, **options}
    return GridCohort(grid, "{}", n_expected=n_expected, **settings)  # type: ignore[arg-type]


def ask_all(cohort: GridCohort, names: Sequence[str], seconds: float = 2.0) -> dict[str, Reply]:
    return dict(cohort.ask({name: Request("hello", "{}") for name in names}, seconds=seconds))


def test_nodes_are_known_by_the_clients_they_name() -> None:
    grid = FakeGrid({11: "client0", 12: "client1", 13: "client2"})
    cohort = make_cohort(grid)
    met = cohort.meet()
    assert {name: reply.values["client"] for name, reply in met.items()} == {name: name for name in NAMES}
    clients = register(cohort, start=shared_worker().template.identity, version=__version__)
    exchange = Exchange(cohort, clients, "{}", 2.0)
    requests = {client: exchange.make("hello") for client in (2, 0)}
    found = exchange.ask("s", requests, lambda client, reply: reply.values["client"], meter=Meter("m"))
    assert list(found.items()) == [(0, "client0"), (2, "client2")]


def test_a_node_that_is_gone_or_silent_holds_nobody_up_and_one_that_comes_back_is_known() -> None:
    grid = FakeGrid({11: "client0", 12: "client1", 13: "client2"})
    cohort = make_cohort(grid)
    cohort.meet()
    grid.silent = {12}
    began = time.monotonic()
    assert set(ask_all(cohort, NAMES, seconds=0.5)) == {"client0", "client2"}
    assert time.monotonic() - began < 5
    grid.silent = set()
    del grid.nodes[13]
    assert set(ask_all(cohort, NAMES)) == {"client0", "client1"}
    grid.nodes[29] = "client2"  # as another node
    assert set(ask_all(cohort, NAMES)) == set(NAMES)
    assert grid.pushed[-1] == 29


def test_a_second_node_can_not_take_a_clients_place(caplog: pytest.LogCaptureFixture) -> None:
    grid = FakeGrid({11: "client0", 12: "client1"})
    cohort = make_cohort(grid)
    cohort.meet()
    grid.nodes[13] = "client0"
    grid.nodes[14] = "client3"
    assert set(ask_all(cohort, ["client0", "client1", "client3"])) == {"client0", "client1", "client3"}
    assert "two nodes say they are client 'client0'; the second is not asked" in caplog.text
    grid.pushed.clear()
    ask_all(cohort, ["client0"])
    assert grid.pushed == [11]


def test_a_node_that_fails_to_greet_is_named_and_the_others_go_on() -> None:
    class Failing(FakeGrid):
        def _answer(self, message: Message, node: int) -> Message:
            if node == 12:
                return Message(Error(code=2, reason="no such file"), reply_to=message)
            return super()._answer(message, node)

    met = make_cohort(Failing({11: "client0", 12: "client1", 13: "client2"})).meet()
    assert met["node 12"].values == {"error": "no such file"} and set(met) == {"client0", "client2", "node 12"}


def test_too_few_nodes_are_refused_after_the_time_to_wait() -> None:
    with pytest.raises(DataError, match=r"1 SuperNodes are connected, expected 3 \(engine.min_clients\) within 0 s"):
        make_cohort(FakeGrid({11: "client0"}), n_expected=3).meet()


def test_waiting_ends_where_the_user_stops_it() -> None:
    stop = threading.Event()
    stop.set()
    cohort = make_cohort(FakeGrid({11: "client0", 12: "client1"}, silent=[12]), interrupted=stop)
    with pytest.raises(SystemExit):
        cohort.meet()


def test_a_federation_through_messages_is_the_plain_loops(tmp_path: Path) -> None:
    grid = FakeGrid({100 - c: f"client{c}" for c in range(6)})
    through = make_config(tmp_path / "a", **FLAT)
    plain = make_config(tmp_path / "b", **FLAT)
    worker = shared_worker()
    found = federate(through, make_cohort(grid), worker.adapted)
    slow = federate(plain, ProcessCohort(worker, ""), worker.adapted)
    for name, losses in artifacts.load_arrays(tmp_path / "b" / "run" / "losses.npz").items():
        np.testing.assert_array_equal(artifacts.load_arrays(tmp_path / "a" / "run" / "losses.npz")[name], losses)
    assert found.methods["ours"].nll == slow.methods["ours"].nll


def call_client_app(config: FederationConfig, node_config: dict[str, Any], request: Request) -> Reply:
    context = Context(1, 1, node_config, RecordDict(), {})
    message = make_message(to_record(request), request.action)
    message.metadata.__dict__["_message_id"] = "1"
    return read_reply(client_app(message, context))


def test_the_client_app_answers_for_the_file_its_node_names(tmp_path: Path) -> None:
    config = make_config(tmp_path, engine={"kind": "deployment"})
    order = make_order(config)
    own = {"client-file": str(tmp_path / "texts" / "client3.txt"), "cache": str(tmp_path / "cache")}
    hello = call_client_app(config, own, Request("hello", order))
    assert hello.values["client"] == "client3"
    assert hello.values["check"] == shared_worker().rows.check(3)
    assert hello.values["start"] == shared_worker().template.identity
    reply = call_client_app(config, own, Request("features", order))
    plain = answer(shared_worker(), 3, Request("features", ""))
    for part in ("train", "validation"):
        np.testing.assert_allclose(reply.arrays[part], plain.arrays[part], atol=1e-5)
    check_reply(reply, {part: plain.arrays[part].shape for part in ("train", "validation")})
    fourth = call_client_app(config, {"partition-id": 3}, Request("hello", order))
    assert fourth.values["client"] == "client3"
    assert any((tmp_path / "cache").iterdir())


def test_a_node_may_have_its_model_elsewhere_and_must_name_a_client(tmp_path: Path) -> None:
    config = make_config(tmp_path, engine={"kind": "deployment"})
    order = make_order(config.model_copy(update={"model": config.model.model_copy(update={"name": "elsewhere"})}))
    file = str(tmp_path / "texts" / "client1.txt")
    with pytest.raises(ModelError):
        call_client_app(config, {"client-file": file}, Request("hello", order))
    own = {"client-file": file, "model": str(tmp_path / "model"), "device": "cpu"}
    assert call_client_app(config, own, Request("hello", order)).values["client"] == "client1"
    with pytest.raises(ConfigError, match="the SuperNode names no client; start it with --node-config"):
        call_client_app(config, {}, Request("hello", make_order(config)))


def test_the_order_holds_what_clients_need_and_not_where_the_server_writes(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert str(tmp_path / "run") not in make_order(config.model_copy(update={"out": str(tmp_path / "run")}))
    simulated = make_config(tmp_path, engine={"kind": "simulation"})
    assert str(tmp_path / "run") in make_order(simulated), "the place of the cache"


def test_what_ends_the_server_elsewhere_is_told_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``flwr run`` stands in for a SuperLink: it runs the server app on two nodes too few."""
    config = make_config(tmp_path, engine={"kind": "deployment", "min_clients": 5, "wait_seconds": 0.1})

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        text = (Path(command[2]) / "pyproject.toml").read_text(encoding="utf-8")
        assert "ensemblelora.federation.apps:server_app" in text
        assert "127.0.0.1:8000" in (Path(options["env"]["FLWR_HOME"]) / "config.toml").read_text(encoding="utf-8")
        context = Context(1, 1, {}, RecordDict(), {"federation": config.model_dump_json()})
        with pytest.raises(DataError):
            apps.serve(FakeGrid({1: "client0", 2: "client1"}), context)  # type: ignore[arg-type]
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(engines.subprocess, "run", run)
    with pytest.raises(DataError, match="2 SuperNodes are connected, expected 5"):
        run_federation(config)
    monkeypatch.setattr(engines.subprocess, "run", lambda command, **more: subprocess.CompletedProcess(command, 1))
    with pytest.raises(UsageError, match=r"SuperLink 127\.0\.0\.1:8000: the run could not be started"):
        run_federation(config)
    monkeypatch.setattr(engines.subprocess, "run", lambda command, **more: subprocess.CompletedProcess(command, 0))
    with pytest.raises(OutputError, match="the run ended without results here"):
        run_federation(config)
    with pytest.raises(ConfigError, match="the run has no key `federation`"):
        apps.serve(FakeGrid({}), Context(1, 1, {}, RecordDict(), {}))  # type: ignore[arg-type]


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def federate_by_command(config: FederationConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    recipe = folder / f"{config.engine.kind}.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "ensemblelora", "federate", str(recipe), "--json"]
    return subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False, timeout=1500)


def assert_alike(folder: Path, one: str, other: str) -> None:
    found, slow = (artifacts.load_arrays(folder / name / "losses.npz") for name in (one, other))
    assert set(found) == set(slow)
    for name, losses in slow.items():
        np.testing.assert_allclose(found[name], losses, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_simulation_is_the_plain_loop(tmp_path: Path) -> None:
    done = federate_by_command(
        make_config(tmp_path, out=str(tmp_path / "simulated"), engine={"kind": "simulation"}), tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "DEPRECATED" not in done.stderr and "Traceback" not in done.stderr
    run_federation(make_config(tmp_path, out=str(tmp_path / "plain")))
    assert_alike(tmp_path, "simulated", "plain")
    assert not (tmp_path / "simulated" / "cache").exists()


@pytest.mark.slow
def test_a_fault_of_the_simulation_is_one_line(tmp_path: Path) -> None:
    config = make_config(tmp_path, engine={"kind": "simulation"}, groups={"n_groups": [7]})
    done = federate_by_command(config, tmp_path)
    assert done.returncode == 2 and "groups.n_groups 7: there are 6 clients" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_interrupted_simulation_says_how_to_go_on_and_another_engine_takes_it_up(tmp_path: Path) -> None:
    write_clients(tmp_path / "texts", 30)
    settings: dict[str, Any] = {
        **FLAT,
        "groups": {"n_groups": [2], "n_subsets": 200},
        "training": {"participation": 0.1},
        "evaluation": {"baselines": ["global"], "n_candidates": 1},
    }
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model")
    config = make_config(tmp_path, engine={"kind": "simulation"}, **settings)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "ensemblelora", "federate", str(recipe)],
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a terminal would, the signal goes to all processes of the group
    ) as process:
        end = time.monotonic() + 300
        while not (tmp_path / "run" / "plan.json").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert f"continue with: ensemblelora federate {tmp_path}/run\n" in told and "Traceback" not in told
    n_sent = artifacts.read_json(tmp_path / "run" / "traffic.json")["features"]["n_messages"]
    outcome = run_federation(config.model_copy(update={"engine": make_config(tmp_path).engine}))
    assert outcome.traffic["features"]["n_messages"] == n_sent == 30, "features are not asked for again"


@contextmanager
def started(program: str, folder: Path, log: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of Flower's, ended with all that it started."""
    command = [str(Path(sys.executable).parent / program), "--insecure", *arguments]
    with (folder / log).open("wb") as stream:
        process = subprocess.Popen(
            command, env=environment(folder), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def find_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(port: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the SuperLink did not start")


@pytest.mark.slow
def test_a_superlink_and_its_supernodes_are_the_plain_loop(tmp_path: Path) -> None:
    """Five processes on this machine's loopback; each client's text is known to its own SuperNode alone."""
    texts, n = write_clients(tmp_path / "texts", 3), 3
    port, *own_ports = find_ports(1 + n)
    settings: dict[str, Any] = {
        **FLAT,
        "groups": {"n_groups": [2], "subset_size": 2, "n_subsets": 3},
        "evaluation": {"baselines": ["global"], "n_candidates": 1},
        "training": {"participation": 1.0},
    }
    make_config(tmp_path)  # writes the model, and texts for other clients
    for path in (tmp_path / "texts").glob("client[3-9].txt"):
        path.unlink()
    deployed = make_config(
        tmp_path,
        out=str(tmp_path / "deployed"),
        engine={"kind": "deployment", "superlink": f"127.0.0.1:{port}", "min_clients": n},
        **settings,
    )
    with ExitStack() as stack:
        where = ("--host", "127.0.0.1", "--port", str(port))
        link = stack.enter_context(started("flower-superlink", tmp_path, "link.log", *where))
        wait_for(port, link)
        for c, own in enumerate(own_ports):
            told = f'client-file="{texts / f"client{c}.txt"}" cache="{tmp_path / f"cache{c}"}"'
            options = ("--superlink", f"127.0.0.1:{port}", "--port", str(own), "--node-config", told)
            stack.enter_context(started("flower-supernode", tmp_path, f"node{c}.log", *options))
        elsewhere = deployed.model_copy(
            update={"clients": deployed.clients.model_copy(update={"source": str(tmp_path / "nowhere")})}
        )
        done = federate_by_command(elsewhere, tmp_path)
    logs = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    run_federation(make_config(tmp_path, out=str(tmp_path / "plain"), **settings))
    assert_alike(tmp_path, "deployed", "plain")
    assert artifacts.read_json(tmp_path / "deployed" / "results.json")["n_registered"] == n
