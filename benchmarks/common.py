"""What the benchmarks share: the ten datasets, workers in processes of their own, and the record of a result."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ensemblelora import __version__
from ensemblelora.config import DataConfig, ModelConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.loading import load_tasks
from ensemblelora.models import BaseModel, load_base
from ensemblelora.stages import Rows, encode_tasks

RESULTS = Path(__file__).parent / "results"
TASKS = ("boolq", "cb", "copa", "hellaswag", "multirc", "rte", "story_cloze", "wic", "winogrande", "wsc")
GROUPS = ((0, 4, 5), (1, 8, 9), (2, 3, 6), (7,))
"""reading, pronouns and entailment, completion, word senses; any four groups cost the same"""


def load_rows(base: BaseModel, *, n_train: int, n_validation: int, n_test: int, max_length: int, seed: int) -> Rows:
    """Encode so many rows of each of the ten datasets; ENSEMBLELORA_DATA says where they lie."""
    config = DataConfig(
        tasks=TASKS,
        max_train_examples=n_train,
        max_validation_examples=n_validation,
        max_test_examples=n_test,
        max_length=max_length,
    )
    return encode_tasks(load_tasks(config, seed=seed), base, max_length=max_length)


def load_model(max_length: int, **settings: Any) -> BaseModel:
    """The embedded model, as a run would load it."""
    return load_base(ModelConfig(**settings), max_length=max_length)


def take_examples(split: EncodedSplit, n: int, *, first: int = 0) -> EncodedSplit:
    """A split of some examples that follow each other."""
    rows = slice(int(split.example_rows[first]), int(split.example_rows[first + n]))
    begin, end = int(split.row_starts[rows.start]), int(split.row_starts[rows.stop])
    some = slice(first, first + n)
    return replace(
        split,
        tokens=split.tokens[begin:end],
        row_starts=split.row_starts[rows.start : rows.stop + 1] - begin,
        answer_starts=split.answer_starts[rows],
        example_rows=split.example_rows[first : first + n + 1] - rows.start,
        labels=split.labels[some],
        n_choices=split.n_choices[some],
        divisors=split.divisors[rows],
        groups=split.groups[some],
        ids=split.ids[some],
    )


def run_worker(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run one measurement in a process of its own, so that its peak memory is its own too."""
    done = subprocess.run(
        [sys.executable, script, "--worker", *arguments], stdout=subprocess.PIPE, check=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def finish_worker(result: dict[str, Any]) -> None:
    """Hand a measurement to the process that asked for it."""
    print(json.dumps(result | {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def make_parser(about: str | None, *, rows: int | None, repeats: str, n_repeats: int) -> argparse.ArgumentParser:
    """Arguments that every comparison takes.

    Args:
        about: The script's docstring.
        rows: Training rows of each dataset, unless others are asked for; none where there are no datasets.
        repeats: What is repeated: ``seeds`` or ``repeats``.
        n_repeats: How many times, unless otherwise is asked for.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    if rows is not None:
        parser.add_argument("--rows", type=int, default=rows, help="training rows of each dataset")
    parser.add_argument(f"--{repeats}", type=int, default=n_repeats, help="of each measurement")
    parser.add_argument("--worker", metavar="SYSTEM", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser


class Journal:
    """Measurements as they come, so that a benchmark that is broken off goes on where it was."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path = path
        if fresh:
            path.unlink(missing_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._done: dict[str, dict[str, Any]] = {entry["key"]: entry["result"] for entry in map(json.loads, lines)}

    def measure(self, script: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Run a worker, or read what it gave before."""
        key = shlex.join(arguments)
        if key not in self._done:
            print(f"measuring {key}", file=sys.stderr, flush=True)
            self._done[key] = run_worker(script, arguments)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key, "result": self._done[key]}) + "\n")
        return self._done[key]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest, and standard deviation where there are several."""
    found = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
    return found | ({"sd": statistics.stdev(values)} if len(values) > 1 else {})


def keep_record(
    name: str, config: dict[str, Any], result: dict[str, Any], *, as_json: bool, is_kept: bool = True
) -> None:
    """Write ``results/<name>.json``, with command, commit and machine; print it, or its ratios."""
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"n_processors": os.cpu_count(), "processor": _processor(), "system": platform.system()},
        "versions": {n: metadata.version(n) for n in ("torch", "transformers", "peft")} | {"ensemblelora": __version__},
        "config": config,
        **result,
    }
    if is_kept:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        for key, value in result.items():
            if isinstance(value, int | float):
                print(f"{key:<24} {value:.3g}")


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    dirty = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short", "HEAD") + dirty


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
