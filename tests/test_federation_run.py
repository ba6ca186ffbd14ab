"""A whole federation in one process: what it leaves, how it goes on, what a change makes anew, and who is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import adapter_state, load_adapter
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import ConfigError, DataError, OutputError, TrainingError
from ensemblelora.federation.arrival import assign_client
from ensemblelora.federation.clients import read_client
from ensemblelora.federation.dealing import deal_clients
from ensemblelora.federation.engines import ProcessCohort, run_federation
from ensemblelora.federation.gradients import compute_rows
from ensemblelora.federation.judging import SERVED_FILE
from ensemblelora.federation.local import score_sums
from ensemblelora.federation.privacy import state_guarantee
from ensemblelora.federation.protocol import Reply, Request
from ensemblelora.federation.record import read_record
from ensemblelora.federation.results import Outcome, read_outcome
from ensemblelora.federation.server import TRAFFIC_FILE, federate
from ensemblelora.federation.stages import WEIGHTS_FILE
from ensemblelora.federation.worker import open_worker
from tests.federation_tiny import (
    N_CLIENTS,
    copy_finished,
    finished,
    make_config,
    make_worker,
    shared_worker,
    write_clients,
)

Spoil = Callable[[str, Request, Reply], Reply | None]


class Spoiled(ProcessCohort):
    """The plain loop, with something that goes wrong."""

    def __init__(self, spoil: Spoil, worker: Any = None) -> None:
        super().__init__(worker or shared_worker(), "")
        self._spoil = spoil

    def ask(self, requests: Mapping[str, Request], *, seconds: float) -> Iterator[tuple[str, Reply]]:
        for name, request in requests.items():
            for _, reply in super().ask({name: request}, seconds=seconds):
                spoiled = self._spoil(name, request, reply)
                if spoiled is not None:
                    yield name, spoiled


def federate_with(config: FederationConfig, spoil: Spoil = lambda name, request, reply: reply) -> Outcome:
    return federate(config, Spoiled(spoil), shared_worker().adapted)


def read_traffic(config: FederationConfig) -> dict[str, Any]:
    return dict(artifacts.read_json(Path(config.out) / TRAFFIC_FILE))


def assert_same(one: Outcome, other: Outcome) -> None:
    """Losses, weights and choices; what it cost may differ."""
    assert one.served == other.served and one.validation == other.validation
    assert {name: method.nll for name, method in one.methods.items()} == {
        name: method.nll for name, method in other.methods.items()
    }
    np.testing.assert_array_equal(one.weights, other.weights)


def test_every_method_is_judged_on_the_same_clients() -> None:
    folder, outcome = finished()
    partitions = {f"groups-{m}{more}" for m in (2, 3) for more in ("", "-boost-1")}
    assert set(outcome.methods) == {"base", "global", "random", "mtl-ft", "local", "ours", "weighted", *partitions}
    assert outcome.n_clients == outcome.n_registered == N_CLIENTS and not outcome.refused
    losses = artifacts.load_arrays(folder / "run" / "losses.npz")
    for name, one in outcome.methods.items():
        assert one.low <= one.nll <= one.high, name
        assert one.nll == pytest.approx(losses[name].mean())
        if name != "global":
            assert one.difference == pytest.approx(losses[name].mean() - losses["global"].mean())
            assert one.share_better == pytest.approx((losses[name] < losses["global"]).mean())
    assert outcome.methods["ours"] == outcome.methods[outcome.served]
    assert outcome.validation[outcome.served] == min(outcome.validation.values())
    assert sum(outcome.weights) == pytest.approx(1.0) and len(outcome.weights) == 3
    assert outcome.methods["global"].nll < outcome.methods["base"].nll, "something was learnt"


def test_what_serves_is_a_folder_of_plain_adapters_with_the_losses_that_are_told() -> None:
    folder, outcome = finished()
    run, worker = folder / "run", shared_worker()
    served = artifacts.read_json(run / SERVED_FILE)
    losses = artifacts.load_arrays(run / "losses.npz")["ours"]
    vectors: dict[str, np.ndarray] = {}
    for path in (run / "adapters").iterdir():
        load_adapter(worker.adapted, "checked", path)
        vectors[path.name] = worker.template.pack(adapter_state(worker.adapted, "checked"))
    assert set(vectors) >= {"theta0", "global", "group-0", "group-1"}
    np.testing.assert_array_equal(vectors["theta0"], worker.template.start)
    assert sorted(name for group in served["groups"] for name in group["clients"]) == list(worker.rows.names)
    for group in served["groups"]:
        members = [one["adapter"] for one in group["members"]]
        terms = [(1, 1.0)]
        for k, one in enumerate(group["members"][1:], start=2):
            terms += [(k, one["rate"]), (0, -one["rate"])]
        for name in group["clients"]:
            client = worker.rows.names.index(name)
            stack = np.stack([vectors[member] for member in members])
            found = score_sums(worker, client, "test", stack, [terms], meter=Meter("m")).losses()[0]
            assert found == pytest.approx(losses[client], abs=1e-5)
    assert any(len(group["members"]) == 2 for group in served["groups"]) == ("boost" in outcome.served)


def test_costs_and_bytes_are_those_of_the_messages() -> None:
    _, outcome = finished()
    size = shared_worker().template.start.nbytes
    stages = ("features", "global", "groups-2", "groups-3", "random", "validate", "evaluate", "mtl-ft", "local")
    counts = {stage: one["n_messages"] for stage, one in outcome.traffic.items() if "boost" not in stage}
    assert counts == dict.fromkeys(stages, N_CLIENTS)
    told = outcome.traffic["global"]
    assert 0 < told["up_bytes"] - N_CLIENTS * size < 200 * N_CLIENTS, "an adapter each, and a few numbers"
    cost = {name: method.cost for name, method in outcome.methods.items() if method.cost}
    assert cost["global"].flops == cost["random"].flops == cost["local"].flops
    assert cost["mtl-ft"].flops == 2 * cost["global"].flops
    assert cost["groups-2"].flops > cost["random"].flops, "choosing is charged"
    assert cost["groups-2-boost-1"].flops > cost["groups-2"].flops
    assert cost["global"].adapter_bytes == size and cost["groups-3"].adapter_bytes == 3 * size
    assert cost["local"].adapter_bytes == N_CLIENTS * size
    assert cost["base"].bytes_per_client == 0 < cost["global"].bytes_per_client
    assert outcome.server["peak_memory_bytes"] > 0 and outcome.server["features_bytes"] > 0


def test_the_outcome_comes_back_from_its_file() -> None:
    folder, outcome = finished()
    content = artifacts.read_json(folder / "run" / "results.json")
    assert json.loads(json.dumps(asdict(read_outcome(content)))) == content
    assert_same(read_outcome(content), outcome)


def test_done_once_is_done(tmp_path: Path) -> None:
    config = copy_finished(tmp_path)
    before = read_traffic(config)
    assert_same(run_federation(config), finished()[1])
    assert read_traffic(config) == before, "nobody was asked again"


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("at", ["features 3", "boost-2 2", "evaluate 1"])
def test_a_broken_off_federation_ends_as_one_that_was_not(tmp_path: Path, at: str) -> None:
    stage, n = at.split()
    seen: list[str] = []

    def stop(name: str, request: Request, reply: Reply) -> Reply:
        told = str(request.values.get("name", ""))
        is_there = told.startswith(stage) or (not told and request.action == {"evaluate": "score"}.get(stage, stage))
        if stage == "evaluate" and "test" not in request.values.get("parts", ()):
            is_there = False
        seen.extend([name] if is_there else [])
        if len(seen) == int(n):
            raise _Stopped
        return reply

    config = make_config(tmp_path)
    with pytest.raises(_Stopped):
        federate_with(config, stop)
    assert not (tmp_path / "run" / "results.json").exists()
    found = federate_with(config)
    assert_same(found, finished()[1])
    assert found.privacy["n_features"] == (2 if stage == "features" else 1), "sent before it was broken off, and again"


def test_a_change_makes_anew_what_depends_on_it_alone(tmp_path: Path) -> None:
    config = copy_finished(tmp_path, boosting={"n_rounds": []})
    outcome = run_federation(config)
    assert {name for name in outcome.methods if "boost" in name} == set()
    assert "boost-2" not in outcome.traffic and outcome.kept_boosters == {"2": (0, 0), "3": (0, 0)}
    known = finished()[1]
    for name in ("base", "global", "groups-2", "groups-3", "mtl-ft"):
        assert outcome.methods[name].nll == known.methods[name].nll
    for stage in ("features", "global", "groups-2", "mtl-ft"):
        assert outcome.traffic[stage] == known.traffic[stage]
    again = run_federation(make_config(tmp_path, boosting={"n_rounds": [1, 2]}))
    assert again.methods["mtl-ft"].nll == known.methods["mtl-ft"].nll
    assert again.methods["groups-2-boost-1"].nll == known.methods["groups-2-boost-1"].nll
    assert "groups-2-boost-2" in again.methods


@pytest.mark.slow
def test_a_method_that_comes_later_is_scored_alone_and_one_that_goes_is_not_forgotten(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def listen(name: str, request: Request, reply: Reply) -> Reply:
        if request.action == "score":
            asked.append((*request.values["parts"], len(request.values["methods"])))
        return reply

    def grow(*n_groups: int) -> Outcome:
        asked.clear()
        evaluation = {"baselines": ["global"], "n_candidates": 1}
        groups = {"n_groups": [*n_groups]}
        return federate_with(
            make_config(tmp_path, boosting={"n_rounds": []}, groups=groups, evaluation=evaluation), listen
        )

    few = grow(2)
    assert sorted(asked) == [("test", 2)] * N_CLIENTS + [("validation", 1)] * N_CLIENTS
    more = grow(2, 3)
    assert sorted(asked) == [("test", 1)] * N_CLIENTS + [("validation", 1)] * N_CLIENTS
    for name in ("global", "groups-2"):
        assert more.methods[name].nll == few.methods[name].nll
    assert set(grow(2).methods) == {"global", "groups-2", "ours"} and not asked
    again = grow(2, 3)
    assert not asked and again.methods == more.methods, "costs included"


def test_another_rate_trains_anew_and_takes_no_features_again(tmp_path: Path) -> None:
    config = copy_finished(tmp_path, training={"learning_rate": 0.01}, boosting={"n_rounds": []})
    known, outcome = finished()[1], run_federation(config)
    assert outcome.methods["global"].nll != known.methods["global"].nll
    assert outcome.traffic["global"]["n_messages"] == known.traffic["global"]["n_messages"], (
        "the old ones are forgotten"
    )
    assert outcome.traffic["features"] == known.traffic["features"]
    assert outcome.methods["base"].nll == known.methods["base"].nll


def test_a_late_client_waits_and_one_with_other_texts_is_asked_again(tmp_path: Path) -> None:
    config = copy_finished(tmp_path)
    write_clients(tmp_path / "texts", N_CLIENTS + 1)
    assert_same(run_federation(config), finished()[1])
    text = tmp_path / "texts" / "client0.txt"
    text.write_text(text.read_text(encoding="utf-8") + "a teacher sees the red house\n" * 5, encoding="utf-8")
    outcome = run_federation(config)
    assert outcome.n_registered == N_CLIENTS + 1
    assert outcome.methods["base"].nll != finished()[1].methods["base"].nll


def test_a_client_without_usable_features_takes_no_part(tmp_path: Path) -> None:
    config = make_config(tmp_path, boosting={"n_rounds": []}, groups={"n_groups": [2]})

    def spoil(name: str, request: Request, reply: Reply) -> Reply | None:
        if name == "client1" and request.action == "features":
            return Reply({part: array * np.nan for part, array in reply.arrays.items()}, reply.values)
        assert name != "client1"
        return reply

    outcome = federate_with(config, spoil)
    assert outcome.n_registered == outcome.n_clients == N_CLIENTS - 1
    ((stage, client, reason),) = outcome.refused
    assert (stage, client) == ("features", "client1") and "not finite" in reason
    assert "client1: train: " in (tmp_path / "run" / "report.md").read_text(encoding="utf-8").replace("\\", "")


def test_a_client_that_comes_and_goes_is_left_out_of_what_it_missed(tmp_path: Path) -> None:
    """It drops out of training and of scoring; the table counts the others, and nothing stops."""
    config = make_config(tmp_path, boosting={"n_rounds": []}, groups={"n_groups": [2]}, training={"participation": 1.0})

    def spoil(name: str, request: Request, reply: Reply) -> Reply | None:
        is_away = name == "client4" and (
            request.values.get("name") == "global 0"
            or (request.action == "score" and "test" in request.values["parts"])
        )
        return None if is_away else reply

    outcome = federate_with(config, spoil)
    assert (outcome.n_registered, outcome.n_clients) == (N_CLIENTS, N_CLIENTS - 1)
    assert outcome.traffic["global"]["n_missing"] == 1 and outcome.traffic["groups-2"]["n_missing"] == 0
    losses = artifacts.load_arrays(tmp_path / "run" / "losses.npz")
    assert np.isnan(losses["global"][4]) and np.isfinite(losses["local"]).all()
    assert outcome.methods["local"].nll == pytest.approx(np.delete(losses["local"], 4).mean())
    assert "1 client without a loss of every method is left out" in (tmp_path / "run" / "report.md").read_text("utf-8")


def test_too_few_features_and_losses_are_refused_in_one_line(tmp_path: Path) -> None:
    config = make_config(tmp_path, boosting={"n_rounds": []}, groups={"n_groups": [2]})
    error = Reply(values={"error": "no\nroom"})
    with pytest.raises(DataError, match=r"features: 0 of 6 clients sent any that can be used; client 'client0': no"):
        federate_with(config, lambda name, request, reply: error if request.action == "features" else reply)
    with pytest.raises(TrainingError, match=r"validate: no client sent its validation losses"):
        federate_with(config, lambda name, request, reply: error if request.action == "score" else reply)


def test_moments_and_noise_do_with_a_guarantee(tmp_path: Path) -> None:
    privacy = {"clip_norm": 1.0, "noise_multiplier": 2.0, "update_clip_norm": 0.1, "update_noise_multiplier": 4.0}
    config = make_config(
        tmp_path,
        features={"send": "moments", "proj_dim": 8},
        privacy=privacy,
        boosting={"n_rounds": []},
        groups={"n_groups": [2]},
        evaluation={"baselines": ["global"], "n_candidates": 1},
    )
    outcome = run_federation(config)
    assert set(outcome.methods) == {"global", "groups-2", "ours"} and outcome.weights == []
    assert outcome.privacy == asdict(state_guarantee(config.privacy, 2)), "once for all, and once in its group"
    assert 0 < outcome.privacy["features"] < outcome.privacy["together"]
    assert outcome.server["features_bytes"] == N_CLIENTS * 2 * 4 * (9 * 10 // 2)


def test_without_baselines_there_is_no_comparison_and_no_fault(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        boosting={"n_rounds": []},
        groups={"n_groups": [2, 3]},
        evaluation={"baselines": [], "n_candidates": 2},
    )
    outcome = run_federation(config)
    assert set(outcome.methods) == {"groups-2", "groups-3", "ours", "weighted"}
    assert {one.difference for one in outcome.methods.values()} == {None}
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8").startswith(f"# Ours ({outcome.served}): mean")


def test_groups_and_rounds_are_those_of_the_plan() -> None:
    """Each client's adapter was asked for as often as the deal says."""
    folder, outcome = finished()
    plan = read_record(folder / "run").plan
    trained = artifacts.load_arrays(folder / "run" / "trained" / "groups-2.npz")
    groups = plan.found[0].groups
    dealt = deal_clients(groups, participation=0.5, n_epochs=1, seed=0, name="groups-2")
    assert trained["n_rounds"].tolist() == [len(rounds) for rounds in dealt]
    assert trained["n_updates"].tolist() == [1] * N_CLIENTS
    updates = np.full(N_CLIENTS, 4)  # one for all, two partitions, random groups
    for found in plan.found:
        for path in (folder / "run" / "rounds").glob(f"boost-{found.n_groups}-*.npz"):
            updates[list(found.groups[int(artifacts.load_arrays(path)["group"])])] += 1
    assert outcome.privacy["n_updates"] == updates.max() > 4


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"clients": {"source": "nowhere"}}, DataError, r"clients\.source .*nowhere: no such folder"),
        ({"clients": {"min_lines": 99}}, DataError, "0 clients of 99 lines or more"),
        ({"groups": {"n_groups": [7]}}, ConfigError, r"groups\.n_groups 7: there are 6 clients"),
    ],
)
def test_what_can_not_work_is_said_in_one_line(tmp_path: Path, changes: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message) as told:
        run_federation(make_config(tmp_path, **changes))
    assert "\n" not in str(told.value)


def test_a_folder_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"not empty and not a run folder \(holds 'letter\.txt'\)"):
        run_federation(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["letter.txt"]


def test_a_client_that_arrives_later_is_assigned_by_its_own_features(tmp_path: Path) -> None:
    folder, _ = finished()
    newcomer = write_clients(tmp_path / "new", 9) / "client8.txt"
    found = assign_client(folder / "run", newcomer, is_measured=True)
    weights = artifacts.load_arrays(folder / "run" / WEIGHTS_FILE)
    served = artifacts.read_json(folder / "run" / SERVED_FILE)
    worker = open_worker(make_config(tmp_path / "other"), [read_client(newcomer)])
    rows = np.concatenate([compute_rows(worker, 0, part, meter=Meter("m")) for part in ("train", "validation")])
    slow = [
        np.mean([np.log1p(np.exp(-(row[0] + row[1:] @ own))) for row in rows.astype(np.float64)])
        for own in weights[f"weights {served['partition']}"]
    ]
    assert [fit.nll for fit in found.groups] == pytest.approx(slow, abs=1e-4)
    assert found.group == int(np.argmin(slow)) and found.n_rows == len(rows)
    assert set(found.measured) == {"base", "global", "group"}
    assert found.measured["group"] < found.measured["base"]
    assert all(Path(path).is_dir() for path, _ in found.adapters)
    with pytest.raises(OutputError):
        assign_client(tmp_path / "new", newcomer)


def test_the_workers_rows_do_not_depend_on_the_engine(tmp_path: Path) -> None:
    assert make_worker(tmp_path).rows.check(3) == shared_worker().rows.check(3)
