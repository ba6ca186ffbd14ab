"""Independent jobs: here, in other processes, on a real Ray cluster; a run gives the same wherever they run."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import pickle
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from ensemblelora import __version__, pipeline, progress, scheduling
from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.artifacts import RunFolder, load_arrays
from ensemblelora.cli import main
from ensemblelora.config import EstimationConfig, GradientsConfig
from ensemblelora.errors import ClusterError, DataError, MissingExtraError, StoreError, UsageError
from ensemblelora.estimation import Oracle, TaskFeatures, TrainingBudget
from ensemblelora.gradients import collect, plan
from ensemblelora.progress import announcing
from ensemblelora.relay import relayed, say
from ensemblelora.scheduling import HERE, Cluster, Equipment, Job, Needs, open_scheduler, read_cluster
from ensemblelora.stages import bench
from ensemblelora.store import FeatureStore
from ensemblelora.validation import validate
from tests.tiny import make_adapted, make_split
from tests.tiny_run import copy_run, finished_run, make_inputs, read_config, read_json, tensors_of

OUTCOMES = ("plan.json", "oracle.json", "boosting.json", "ensemble.json", "results.json")


class Elsewhere:
    """Stands in for a cluster: what goes to a job and comes back is pickled, and jobs end in reversed order."""

    n_workers = 2

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.done: list[str] = []

    def run(self, function, jobs, equipment, *, what, on_gpu=True):
        for job in reversed(jobs):
            sent = pickle.loads(pickle.dumps((function, equipment.make, equipment.given, job.arguments)))
            if equipment.identity not in self.made:
                self.made[equipment.identity] = sent[1](*sent[2])
            result = sent[0](self.made[equipment.identity], *sent[3])
            self.done.append(job.name)
            yield job, pickle.loads(pickle.dumps(result))


def run_elsewhere(recipe: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Elsewhere:
    elsewhere = Elsewhere()

    @contextmanager
    def opened(cluster: Cluster | None) -> Iterator[Elsewhere]:
        yield elsewhere

    monkeypatch.setattr(pipeline, "open_scheduler", opened)
    pipeline.run(read_config(recipe, **changes))
    return elsewhere


def assert_same_run(folder: Path, other: Path) -> None:
    for name in OUTCOMES:
        assert read_json(folder, name) == read_json(other, name), name
    for name, values in load_arrays(folder / "run" / "affinity.npz").items():
        np.testing.assert_array_equal(values, load_arrays(other / "run" / "affinity.npz")[name], err_msg=name)
    assert tensors_of(folder) == tensors_of(other)
    flops = [
        {stage["stage"]: stage["flops"] for stage in read_json(at, "costs.json")["stages"]} for at in (folder, other)
    ]
    assert flops[0] == flops[1]


# --- naming a cluster ---


@pytest.mark.parametrize(
    ("text", "per_job", "expected"),
    [
        (None, None, None),
        ("auto", None, Cluster("auto")),
        ("10.0.0.1:6379", None, Cluster("10.0.0.1:6379")),
        ("local:8", None, Cluster(None, 8)),
        ("local:2", "cpus=4, gpus=0.5,memory_gb=16", Cluster(None, 2, Needs(4, 0.5, 16))),
    ],
)
def test_a_cluster_is_named_in_one_word(text, per_job, expected):
    assert read_cluster(text, per_job) == expected


@pytest.mark.parametrize(
    ("text", "per_job", "told"),
    [
        ("local:", None, "--cluster local:: expected local:N"),
        ("local:0", None, "such as local:2"),
        ("auto", "gpus=x", "--per-job gpus=x: expected some of cpus=NUMBER, gpus=NUMBER, memory_gb=NUMBER"),
        ("auto", "cores=2", "--per-job cores=2"),
        ("auto", "gpus=-1", "--per-job gpus=-1"),
        (None, "gpus=1", "name one with --cluster"),
    ],
)
def test_a_name_that_means_nothing_is_refused(text, per_job, told):
    with pytest.raises(UsageError, match=told):
        read_cluster(text, per_job)


def test_without_ray_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(scheduling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"ray is not installed; run: pip install 'ensemblelora\[cluster\]'"):
        read_cluster("local:2")
    assert read_cluster(None) is None


@pytest.mark.parametrize(
    ("needs", "expected"),
    [(Needs(4), 2), (Needs(1, 0.5), 4), (Needs(1, 1, 6), 1), (Needs(1, 4), 0), (Needs(0.1), 80), (Needs(0), 1)],
)
def test_a_machine_takes_as_many_jobs_as_all_it_has_allows(needs, expected):
    assert scheduling._count_fitting({"CPU": 8, "GPU": 2, "memory": 1e10}, needs) == expected


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        (Cluster(None, 2), r"--cluster local:2: Ray can't be started or reached \(busy\); try again"),
        (Cluster("10.0.0.1:6379"), r"--cluster 10.0.0.1:6379: .* start it with `ray start --head`"),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_line(cluster, told, monkeypatch):
    class Ray:
        is_down = False

        def is_initialized(self):
            return False

        def init(self, **options):
            raise Exception("busy\nlong story")  # as Ray does

        def shutdown(self):
            self.is_down = True

    ray = Ray()
    monkeypatch.setattr(scheduling.importlib, "import_module", lambda name: ray)
    with pytest.raises(UsageError, match=told), open_scheduler(cluster):
        pass
    assert ray.is_down


@pytest.mark.parametrize(
    ("nodes", "n_local", "expected"),
    [
        ([{"CPU": 64}, {"CPU": 8, "GPU": 2}, {"CPU": 6, "GPU": 1}], 0, Needs(4, 1)),  # cores beside no accelerator
        ([{"CPU": 1, "GPU": 8}], 0, Needs(1, 1)),
        ([{"CPU": 64}], 0, Needs(1, 0)),
        ([{"CPU": 8, "GPU": 1}], 2, Needs(scheduling._share_cores(Cluster(None, 2)).cpus, 0.5)),
        ([{"CPU": 8, "GPU": 5}], 2, Needs(scheduling._share_cores(Cluster(None, 2)).cpus, 2)),
    ],
)
def test_a_job_holds_its_share_of_the_machine_it_is_on(nodes, n_local, expected):
    class Ray:
        def nodes(self):
            return [{"Alive": True, "Resources": node} for node in nodes]

    assert scheduling._settle_needs(Ray(), Cluster(None if n_local else "auto", n_local)) == expected


# --- what jobs say ---


def test_what_a_job_says_elsewhere_is_said_here_under_its_name(caplog, monkeypatch):
    sent: list[Any] = []
    with relayed("adapter group-0", sent.append):
        logging.getLogger("ensemblelora.training").warning("rate %g is high", 0.5)
        logging.getLogger("ensemblelora.training").info("not worth a line")
        progress.note("training: 3/9")
    assert not logging.getLogger("ensemblelora").handlers
    told, listener = io.StringIO(), Console(file=io.StringIO(), width=200)
    listener.file = told
    monkeypatch.setattr(progress, "_SILENT_SECONDS", 0.0)
    with announcing(listener):
        say(pickle.loads(pickle.dumps(sent)))
        monkeypatch.setattr(progress, "_SILENT_SECONDS", 99.0)
        say(sent[1:])  # another one right behind it
    assert caplog.record_tuples[-1] == ("ensemblelora.training", logging.WARNING, "adapter group-0: rate 0.5 is high")
    assert told.getvalue() == "adapter group-0: training: 3/9\n"


# --- the same in this process and in another ---


def test_jobs_run_here_in_their_order_without_making_anything():
    jobs = [Job(str(i), (i,)) for i in (3, 1, 2)]
    equipment = Equipment(10, "ten", lambda: pytest.fail("it is there already"))
    found = list(HERE.run(lambda ten, i: ten * i, jobs, equipment, what="numbers"))
    assert found == [(job, 10 * job.arguments[0]) for job in jobs] and HERE.n_workers == 0


def test_a_run_in_other_processes_gives_the_same_bits(tmp_path, monkeypatch):
    twin = finished_run()  # before anything runs elsewhere
    elsewhere = run_elsewhere(make_inputs(tmp_path), monkeypatch)
    assert_same_run(tmp_path, twin)
    n_tasks, n_groups = 5, len(read_json(tmp_path, "plan.json")["groups"])
    kinds = [name.split()[0] for name in elsewhere.done]
    assert (kinds.count("features"), kinds.count("adapter"), kinds.count("subsets")) == (2 * n_tasks, n_groups + 1, 1)
    assert elsewhere.done[-1] == "adapter shared", "the baseline too"
    for record in read_json(tmp_path, "costs.json")["stages"]:
        if record["stage"] in ("features", "train"):
            parts = record["parts"].values()
            assert len(parts) == {"features": 2 * n_tasks, "train": n_groups}[record["stage"]]
            assert sum(part["flops"] for part in parts) == record["flops"] > 0, "each is noted, wherever it was made"
    features = FeatureStore(tmp_path / "run" / "features")
    assert not (features.folder / "pieces").exists() and not (tmp_path / "run" / "checkpoints").exists()
    for task in read_json(tmp_path, "plan.json")["task_names"]:
        for split in ("train", "validation"):
            a, b = features.read(task, split), FeatureStore(twin / "run" / "features").read(task, split)
            np.testing.assert_array_equal(a.features, b.features)
            assert a.ids == b.ids and isinstance(a.features, np.memmap)


@pytest.mark.slow
def test_layers_below_the_adapted_ones_run_once_a_row_elsewhere_too(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    changes = {"adapter": {"layers_to_transform": [1]}}
    recipes = [make_inputs(tmp_path / name) for name in "ab"]
    pipeline.run(read_config(recipes[0], **changes))
    run_elsewhere(recipes[1], monkeypatch, **changes)
    assert_same_run(tmp_path / "b", tmp_path / "a")
    assert not (tmp_path / "b" / "run" / "cache").exists()


@pytest.mark.slow
def test_a_warm_ridge_run_in_other_processes_plans_the_same(tmp_path, monkeypatch):
    changes = {"estimation": {"method": "ridge"}, "gradients": {"linearize_at": "warmup", "n_projections": 2}}
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    recipes = [make_inputs(tmp_path / name) for name in "ab"]
    pipeline.run(read_config(recipes[0], **changes))
    monkeypatch.setattr("ensemblelora.stages.choosing._BLOCK", 3)
    elsewhere = run_elsewhere(recipes[1], monkeypatch, **changes)
    assert sum(name.startswith("subsets") for name in elsewhere.done) == 4  # ten subsets of three of five tasks
    found = [load_arrays(tmp_path / name / "run" / "affinity.npz")["matrix"] for name in "ab"]
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert read_json(tmp_path / "a", "plan.json")["groups"] == read_json(tmp_path / "b", "plan.json")["groups"]
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")


def test_a_piece_is_the_same_rows_of_the_whole_pass_and_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 4), monkeypatch.setattr(collect, "CHUNK", 4)
    adapted, config = make_adapted(), GradientsConfig(proj_dim=16, max_tokens_per_batch=40)
    splits = [make_split("verbalizer", n=11, task="a"), make_split("options", n=5, task="b", ragged=True)]
    prints = {("a", "train"): "rows of a", ("b", "train"): "rows of b"}
    whole, joined = FeatureStore(tmp_path / "whole"), FeatureStore(tmp_path / "joined")
    metered, elsewhere = Meter("here"), Meter("elsewhere")
    collect.collect_features(adapted, splits, whole, config, seed=0, fingerprints=prints, meter=metered)

    def hand_out(pieces: Any) -> None:
        assert [(piece.task, piece.first, piece.stop) for piece in pieces] == [
            ("a", 0, 4), ("a", 4, 8), ("a", 8, 11), ("b", 0, 4), ("b", 4, 5),
        ]  # fmt: skip
        for piece in (*reversed(pieces), pieces[0]):
            given = {"piece": piece, "fingerprint": prints[piece.task, piece.split], "meter": elsewhere}
            collect.collect_piece(adapted, splits, joined, config, seed=0, **given)

    collect.collect_features(adapted, splits, joined, config, seed=0, fingerprints=prints, hand_out=hand_out)
    for task in "ab":
        a, b = whole.read(task, "train"), joined.read(task, "train")
        assert a.ids == b.ids and a.mode == b.mode
        for name in ("outputs", "features", "labels", "n_choices", "squared_norms", "groups"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert elsewhere.record.flops == metered.record.flops > 0


def test_pieces_of_different_kinds_are_not_joined(tmp_path):
    adapted, stores = make_adapted(), []
    for n_choices in (2, 3):
        split, store = make_split("verbalizer", n_choices=n_choices, n=4), FeatureStore(tmp_path / str(n_choices))
        config = GradientsConfig(proj_dim=8)
        collect.collect_features(adapted, [split], store, config, seed=0, fingerprints={("t", "train"): "x"})
        stores.append(store)
    with pytest.raises(StoreError, match="pieces of different kinds"):
        FeatureStore(tmp_path / "joined").join("t", "train", "x", stores)


@pytest.mark.parametrize("method", ["steps", "ridge"])
def test_fits_that_were_handed_over_answer_as_if_made_here(method):
    replicate = read_replicate()
    budget = TrainingBudget(0.01, 2, 1, 0.0, "linear", 0.0, 1.0, (2.0,) * 5, 50.0) if method == "steps" else None
    subsets = [(0, 1), (2,), (3, 4), (1, 4)]
    here, there, both = (Oracle((replicate,), 1.0, EstimationConfig(method=method), (), budget) for _ in range(3))
    assert both.list_unsolved([*subsets, (1, 0), ()]) == subsets
    both.take_over(pickle.loads(pickle.dumps(there.hand_over(subsets[:2]))))
    assert both.list_unsolved(subsets) == subsets[2:]
    here.solve(subsets)
    for name in ("nll", "accuracy", "distances"):
        found, expected = getattr(both.score(subsets), name), getattr(here.score(subsets), name)
        np.testing.assert_allclose(found, expected, rtol=0 if method == "steps" else 1e-5, err_msg=name)
    if method == "steps":
        assert both.row_iterations == here.row_iterations and both.n_fits == len(subsets)


def read_replicate() -> TaskFeatures:
    store = FeatureStore(finished_run() / "run" / "features")
    names = read_json(finished_run(), "plan.json")["task_names"]
    return TaskFeatures(*(tuple(store.read(name, split) for name in names) for split in ("train", "validation")))


def test_a_worker_of_another_version_place_or_model_is_refused(tmp_path):
    config, place = read_config(finished_run() / "recipe.yaml"), finished_run() / "run"
    for version, folder, told in (
        ("0.0", place, f"a worker of the cluster has ensemblelora {__version__}, this command is 0.0"),
        (__version__, tmp_path, "does not see this run folder; put it on a file system that all machines share"),
        (__version__, place, "other weights or another precision than this process"),
    ):
        with pytest.raises(ClusterError, match=re.escape(told)):
            bench._set_up(version, None, config, RunFolder(folder), "lm", 2, "another model")


def test_work_done_elsewhere_counts_and_its_time_does_not():
    with Meter("stage") as meter:
        meter.add_flops(1)
        meter.add_record(StageRecord("job", 100.0, 5, 7, 8, 2**50, None, 3, 2**49))
        meter.add_seconds(7.0)  # of what was done before the stage began
    record = meter.record
    assert (record.stage, record.flops, record.n_tokens, record.n_padded_tokens) == ("stage", 6, 7, 8)
    assert 7 <= record.wall_seconds < 50 and (record.peak_memory_bytes, record.added_memory_bytes) == (2**50, 2**49)


# --- a real cluster of two processes ---


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    opened = open_scheduler(read_cluster("local:2", "cpus=1"))
    yield opened.__enter__()
    with warnings.catch_warnings():  # Ray lets go of its servers while they are still ending
        warnings.simplefilter("ignore", ResourceWarning)
        opened.__exit__(None, None, None)
        gc.collect()


def make_list(*given: Any) -> list[Any]:
    return [os.getpid(), *given]


def describe(made: list[Any], number: int) -> tuple[int, int, Any, str]:
    time.sleep(0.3)
    return made[0], os.getpid(), made[1].sum() + number, os.environ["OMP_NUM_THREADS"]


def warn(made: list[Any], number: int) -> int:
    logging.getLogger("ensemblelora.trial").warning("%d is odd", number)
    return number


def fail(made: list[Any], kind: str) -> None:
    logging.getLogger("ensemblelora.trial").warning("this will not do")
    raise DataError("row 3 is wrong") if kind == "ours" else ZeroDivisionError("by nothing")


def die(made: list[Any], folder: str, number: int, n_deaths: int) -> int:
    begun = Path(folder) / f"{number}-{len(list(Path(folder).glob(f'{number}-*')))}"
    begun.touch()
    if int(begun.name.partition("-")[2]) < n_deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def equip(identity: str = "list") -> Equipment:
    return Equipment(None, identity, make_list, (np.arange(1000),))


@pytest.mark.slow
def test_two_processes_share_the_jobs_and_make_their_equipment_once(cluster):
    assert cluster.n_workers == 2
    jobs = [Job(f"number {i}", (i,)) for i in range(6)]
    found = {job.name: result for job, result in cluster.run(describe, jobs, equip(), what="numbers")}
    assert {name: result[2] for name, result in found.items()} == {job.name: 499500 + i for i, job in enumerate(jobs)}
    processes = {result[1] for result in found.values()}
    assert len(processes) == 2 and os.getpid() not in processes
    assert all(maker == process for maker, process, *_ in found.values())
    assert {result[3] for result in found.values()} == {"1"}


@pytest.mark.slow
def test_errors_come_back_as_they_were_and_warnings_under_the_jobs_name(cluster, caplog):
    list(cluster.run(warn, [Job("fifth", (5,))], equip(), what="warnings"))
    assert ("ensemblelora.trial", logging.WARNING, "fifth: 5 is odd") in caplog.record_tuples
    with pytest.raises(DataError, match=r"^row 3 is wrong$"):
        list(cluster.run(fail, [Job("first", ("ours",))], equip(), what="failures"))
    assert caplog.record_tuples[-1][2] == "first: this will not do"
    with pytest.raises(ZeroDivisionError, match="by nothing"):
        list(cluster.run(fail, [Job("second", ("other",))], equip(), what="failures"))


@pytest.mark.slow
def test_a_lost_worker_costs_its_own_job_alone_and_one_lost_always_is_an_error(cluster, tmp_path):
    jobs = [Job(f"job {i}", (str(tmp_path), i, int(i == 2))) for i in range(5)]
    found = [result for _, result in cluster.run(die, jobs, equip(), what="jobs")]
    assert sorted(found) == list(range(5))
    assert {i: len(list(tmp_path.glob(f"{i}-*"))) for i in range(5)} == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1}
    with pytest.raises(
        ClusterError, match=r"job 'doomed': lost with its worker 4 times .* give the same command again"
    ):
        list(cluster.run(die, [Job("doomed", (str(tmp_path), 9, 99))], equip(), what="jobs"))


@pytest.mark.slow
def test_a_run_on_two_processes_one_of_them_killed_is_the_local_run(tmp_path, capsys, cluster):
    recipe, killed = make_inputs(tmp_path), threading.Thread(target=kill_one, args=("ray::adapter", found := []))
    killed.start()
    assert main(["run", str(recipe), "--cluster", "local:2", "--json"]) == 0
    killed.join()
    assert len(found) == 1, "a worker was killed while it trained"
    said = capsys.readouterr().out
    # This module's Ray outlives the command, and may speak of the lost worker after it.
    assert json.loads(said[said.index("{") :])["folder"]
    assert_same_run(tmp_path, finished_run())


def kill_one(title: str, found: list[int]) -> None:
    """Kill the first process whose title begins so, within some minutes."""
    deadline = time.monotonic() + 240
    while not found and time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and process.info["cmdline"][0].startswith(title):
                process.kill()
                found.append(process.pid)
                break
        time.sleep(0.02)


@pytest.mark.slow
def test_true_fine_tunings_on_a_cluster_are_those_made_here(tmp_path, cluster):
    runs = []
    for name, where in (("a", None), ("b", read_cluster("local:2"))):
        (tmp_path / name).mkdir()
        recipe = copy_run(tmp_path / name)
        config = read_config(recipe)
        found, base = validate.collect_truth(recipe.parent / "run", config, n_subsets=1, n_seeds=1, cluster=where)
        runs.append({run.tasks: (run.nll, run.correct, run.flops) for run in (*found, base)})
    assert runs[0] == runs[1] and len(runs[0]) == 7
