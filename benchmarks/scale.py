"""How cost grows with rows, tokens and subsets, what memory does meanwhile, and what a second worker is worth.

    python benchmarks/scale.py --json            # some half an hour on two cores, nothing else running

A random Llama of two layers and made-up tasks: what is measured is the software, not the tasks; then the demo. Every
process computes with one thread. The same command goes on where it was; ``--minutes`` begins nothing new after so many.

* ``samples``, ``tokens``: the gradient pass of 256 to 4,096 rows of 64 tokens, and of 512 rows of 16 to 256 tokens.
* ``few``, ``many``, ``wide``: memory of the same pass over 256 rows at rank 4, over 4,096 rows, and at rank 64, by the
  peak of a process of its own.
* ``subsets``: the oracle, asked for 100 to 1,600 subsets of three of forty tasks.
* ``cluster-1``, ``cluster-2``: the same features and subsets as jobs of a Ray cluster with one and two processes, in
  turn; the time that processes take to start is left out.
* ``demo-here``, ``demo-cluster``: the demo, in one process and in two of a cluster, and whether they leave the same.

Exponents are slopes of log time over log size: 1 is linear.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Journal, finish_worker, keep_record, make_parser, spread

SAMPLES, TOKENS, SUBSETS = (256, 512, 1024, 2048, 4096), (16, 32, 64, 128, 256), (100, 200, 400, 800, 1600)
"""from where what every measurement costs whatever its size is little"""
TIMED_ROWS = 512
"""of the passes over rows of several lengths"""
FEW, MANY, NARROW, WIDE = 256, 4096, 4, 64
"""rows and ranks between which memory is compared"""
LENGTH, ROWS, TASKS, DIMENSION = 64, 128, 40, 400
JOBS, BLOCK = 8, 400
"""pieces of features, and as many blocks of subsets, for a cluster"""
MEMORY = ("few", "many", "wide")
KINDS = ("samples", "tokens", "subsets", *MEMORY, "cluster-1", "cluster-2")
DEMOS = ("demo-here", "demo-cluster")
OUTCOMES = ("affinity.npz", "plan.json", "oracle.json", "boosting.json", "ensemble.json", "results.json")


def main() -> None:
    """Measure every kind in turn, several times."""
    parser = make_parser(__doc__, rows=None, repeats="repeats", n_repeats=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="nothing new is begun after so many")
    arguments = parser.parse_args()
    if arguments.worker:
        finish_worker(MEASURES[arguments.worker](arguments.seed))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    stop = time.monotonic() + 60 * arguments.minutes
    journal = Journal(Path(__file__).parent / ".journal" / "scale.jsonl", fresh=arguments.fresh)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (*KINDS, *DEMOS)}
    for repeat, kind in (*itertools.product(range(arguments.repeats), KINDS), *((0, kind) for kind in DEMOS)):
        if time.monotonic() > stop:
            print(f"out of time before {kind}, repeat {repeat}: the same command goes on there", file=sys.stderr)
            return
        found[kind].append(journal.measure(__file__, [kind, "--seed", str(repeat)]))
    config = {"rows": ROWS, "length": LENGTH, "tasks": TASKS, "proj_dim": DIMENSION, "repeats": arguments.repeats}
    keep_record("scale", config, summarize(found), as_json=arguments.json)


def summarize(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Exponents of the medians over repeats, growth of memory, and the ratio of one worker's time to two workers'."""
    curves = {kind: _median_of(found[kind], "seconds") for kind in ("samples", "tokens", "subsets")}
    peaks = {kind: statistics.median(entry["peak_memory_bytes"] for entry in found[kind]) for kind in MEMORY}
    both = list(zip(found["cluster-1"], found["cluster-2"], strict=True))
    ratios = {
        part: [one[part] / two[part] for one, two in both]
        for part in ("total_seconds", "features_seconds", "oracle_seconds")
    }
    narrow, wide = (found[kind][0]["coordinates"] for kind in ("few", "wide"))
    ranges = {kind: max(map(int, curve)) / min(map(int, curve)) for kind, curve in curves.items()}
    return {
        **{f"exponent_{kind}": fit_exponent(curve) for kind, curve in curves.items()},
        "speedup_two_workers": statistics.median(ratios["total_seconds"]),
        "speedup_features": statistics.median(ratios["features_seconds"]),
        "speedup_oracle": statistics.median(ratios["oracle_seconds"]),
        "bytes_per_row": (peaks["many"] - peaks["few"]) / (MANY - FEW),
        "bytes_per_coordinate": (peaks["wide"] - peaks["few"]) / (wide - narrow),
        "memory_growth_samples": peaks["many"] / peaks["few"],
        "memory_growth_coordinates": peaks["wide"] / peaks["few"],
        **_compare_demos(found["demo-here"][0], found["demo-cluster"][0]),
        "range": ranges | {"rows_of_memory": MANY / FEW, "coordinates": wide / narrow},
        "seconds": curves,
        "peak_bytes": peaks,
        "spread": {part: spread(values) for part, values in ratios.items()},
    }


def _compare_demos(here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Whether two runs left the same, and what they did not."""
    names = sorted(here["left"].keys() | there["left"].keys())
    differing = [name for name in names if here["left"].get(name) != there["left"].get(name)]
    seconds = {"here": here["seconds"], "cluster": there["seconds"]}
    return {"demo_is_equal": not differing, "demo_differs": differing, "demo_left": len(names), "demo_seconds": seconds}


def fit_exponent(curve: dict[str, float]) -> float:
    """Slope of log time over log size, by least squares."""
    sizes, seconds = np.log([float(size) for size in curve]), np.log(list(curve.values()))
    return float(np.polyfit(sizes, seconds, 1)[0])


def _median_of(entries: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    return {size: statistics.median(entry[key][size] for entry in entries) for size in entries[0][key]}


def measure_samples(seed: int) -> dict[str, Any]:
    """The gradient pass at several numbers of rows."""
    return _measure_features({n: lambda n=n: (_make_probe(), _make_split(n, LENGTH, seed=seed)) for n in SAMPLES})


def measure_tokens(seed: int) -> dict[str, Any]:
    """The gradient pass at several lengths of a row."""
    return _measure_features({n: lambda n=n: (_make_probe(), _make_split(TIMED_ROWS, n, seed=seed)) for n in TOKENS})


def _measure_features(cases: dict[int, Callable[[], tuple[Any, Any]]]) -> dict[str, Any]:
    """Take features of every case after a few rows of it to warm up, in a new store each."""
    seconds = {}
    for size, make in cases.items():
        probe, split = make()
        with tempfile.TemporaryDirectory() as folder:
            take_piece(probe, _make_split(16, int(split.example_lengths[0]), seed=99), f"{folder}/warm")
            seconds[size] = _time(lambda probe=probe, split=split, at=folder: take_piece(probe, split, f"{at}/timed"))
    return {"seconds": seconds}


def measure_memory(n_rows: int, r: int, seed: int) -> dict[str, Any]:
    """The gradient pass alone in its process, whose peak the caller is told."""
    from ensemblelora.gradients.collect import count_coordinates, find_active_layers

    probe, split = _make_probe(r), _make_split(n_rows, LENGTH, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        take_piece(probe, split, folder)
    return {"coordinates": count_coordinates(find_active_layers(probe, [split]))}


def measure_subsets(seed: int) -> dict[str, Any]:
    """The oracle's fits at several numbers of subsets."""
    seconds = {}
    for n in SUBSETS:
        oracle = make_oracle()
        oracle.solve([(0, 1)])
        started = time.perf_counter()
        oracle.solve(_choose_subsets(n, seed))
        seconds[n] = time.perf_counter() - started
    return {"seconds": seconds}


def measure_cluster(n_workers: int, seed: int) -> dict[str, Any]:
    """Features and subsets as jobs, after every process has made what it works with."""
    from ensemblelora.estimation import Oracle
    from ensemblelora.scheduling import Equipment, Job, open_scheduler, read_cluster

    model, oracle = Equipment(None, "model", _make_probe), Equipment(None, "oracle", make_oracle)
    subsets = _choose_subsets(JOBS * BLOCK, seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_scheduler(read_cluster(f"local:{n_workers}", "cpus=1")) as cluster,
    ):
        few = _make_split(16, LENGTH, seed=99, task="few")
        for equipment, begin in ((model, (take_piece, few)), (oracle, (_solve, subsets[:1]))):
            starts = [Job(f"start {i}", (*begin, f"{folder}/start {i}")) for i in range(n_workers)]
            list(cluster.run(_linger, starts, equipment, what="start"))
        pieces = [_make_split(ROWS, LENGTH, seed=seed, task=f"task {i}") for i in range(JOBS)]
        jobs = [Job(piece.task, (piece, f"{folder}/{piece.task}")) for piece in pieces]
        taken = _time(lambda: list(cluster.run(take_piece, jobs, model, what="features")))
        blocks = [Job(f"block {i}", (subsets[i * BLOCK : (i + 1) * BLOCK],)) for i in range(JOBS)]
        solved = _time(lambda: list(cluster.run(Oracle.hand_over, blocks, oracle, what="subsets")))
    return {"features_seconds": taken, "oracle_seconds": solved, "total_seconds": taken + solved}


def carry_out_demo(cluster: str | None, changes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the demo, and give the identity of everything that it leaves and that is no measurement of time."""
    from ensemblelora import artifacts, pipeline
    from ensemblelora.recipe import override, read_demo
    from ensemblelora.scheduling import read_cluster

    with tempfile.TemporaryDirectory() as folder:
        config = read_demo((*changes, override("out", f"{folder}/run")))
        seconds = _time(lambda: pipeline.run(config, cluster=read_cluster(cluster)))
        run = Path(config.out)
        tables = {name: artifacts.read_json(run / name) for name in OUTCOMES if name.endswith(".json")}
        arrays = {name: artifacts.load_arrays(run / name) for name in OUTCOMES if name.endswith(".npz")}
        left = {name: artifacts.fingerprint(content) for name, content in (tables | arrays).items()}
        for weights in run.glob("adapters/*/adapter_model.safetensors"):
            left[str(weights.relative_to(run))] = artifacts.file_sha256(weights)
    return {"seconds": seconds, "left": left}


def take_piece(probe: Any, split: Any, folder: str) -> None:
    """One split's features into a store of its own, as a job of a run takes them."""
    from ensemblelora.config import GradientsConfig
    from ensemblelora.gradients.collect import FeaturePiece, collect_piece, find_active_layers, plan_features
    from ensemblelora.store import FeatureStore

    config = GradientsConfig(proj_dim=DIMENSION)
    plan = plan_features(find_active_layers(probe, [split]), [split], config, seed=0)
    piece = FeaturePiece(split.task, split.split, 0, split.n_examples, 0, "margin", plan)
    collect_piece(probe, [split], FeatureStore(folder), config, seed=0, piece=piece, fingerprint="rows")


def make_oracle() -> Any:
    """An oracle over made-up features of all tasks, that simulates three epochs."""
    from ensemblelora.blocks import FeatureBlock
    from ensemblelora.config import EstimationConfig
    from ensemblelora.estimation import Oracle, TaskFeatures, TrainingBudget

    def make(task: int, part: str, n: int) -> FeatureBlock:
        rng = np.random.default_rng([task, n])
        features = rng.standard_normal((n, 1, DIMENSION), np.float32)
        labels, ids = rng.integers(0, 2, n), tuple(map(str, range(n)))
        norms, groups = (features[:, 0] ** 2).sum(axis=1), np.arange(n)
        outputs = rng.standard_normal((n, 1), np.float32)
        return FeatureBlock(
            f"task {task}", part, "margin", outputs, features, labels, np.full(n, 2), norms, groups, ids
        )

    train, validation = (
        tuple(make(i, part, n) for i in range(TASKS)) for part, n in (("train", 200), ("validation", 100))
    )
    budget = TrainingBudget(5e-4, 3, 1, 0.06, "linear", 0.0, 1.0, (12.5,) * TASKS, 1e5)
    return Oracle((TaskFeatures(train, validation),), 0.0, EstimationConfig(), budget=budget)


def _choose_subsets(n: int, seed: int) -> list[tuple[int, ...]]:
    every = list(itertools.combinations(range(TASKS), 3))
    return [every[i] for i in np.random.default_rng(seed).permutation(len(every))[:n]]


def _make_probe(r: int = 8) -> Any:
    """A random Llama with its start adapter."""
    from types import SimpleNamespace

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ensemblelora.adapters import attach
    from ensemblelora.config import AdapterConfig
    from ensemblelora.models import prepare_base

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=512, attn_implementation="eager", **shape)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    base = prepare_base("random", LlamaForCausalLM(config), tokenizer)
    return attach(base, AdapterConfig(r=r, lora_alpha=2 * r), seed=0)


def _make_split(n: int, length: int, *, seed: int, task: str = "made up") -> Any:
    """Rows of random tokens with two answers."""
    from ensemblelora.data.encoding import EncodedSplit

    rng = np.random.default_rng([seed, n, length])
    return EncodedSplit(
        task=task,
        split="train",
        kind="verbalizer",
        tokens=rng.integers(1, 1024, n * length).astype(np.int32),
        row_starts=np.arange(0, n * length + 1, length),
        answer_starts=np.full(n, length, np.int32),
        example_rows=np.arange(n + 1),
        labels=rng.integers(0, 2, n),
        n_choices=np.full(n, 2, np.int16),
        label_tokens=np.array([5, 6], np.int32),
        divisors=np.ones(n, np.float32),
        groups=np.arange(n),
        ids=tuple(map(str, range(n))),
        n_truncated=0,
    )


def _linger(equipment: Any, work: Callable[..., object], given: Any, folder: str) -> None:
    """A little of what will be measured, for so long that every process has its turn."""
    work(equipment, given, folder)
    time.sleep(2.0)


def _solve(oracle: Any, subsets: Any, _: str) -> None:
    oracle.solve(subsets)


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


MEASURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "samples": measure_samples,
    "tokens": measure_tokens,
    "subsets": measure_subsets,
    "few": lambda seed: measure_memory(FEW, NARROW, seed),
    "many": lambda seed: measure_memory(MANY, NARROW, seed),
    "wide": lambda seed: measure_memory(FEW, WIDE, seed),
    "cluster-1": lambda seed: measure_cluster(1, seed),
    "cluster-2": lambda seed: measure_cluster(2, seed),
    "demo-here": lambda seed: carry_out_demo(None),
    "demo-cluster": lambda seed: carry_out_demo("local:2"),
}


if __name__ == "__main__":
    main()
