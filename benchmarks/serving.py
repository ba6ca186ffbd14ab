"""A run behind HTTP, measured: waiting times at several rates, what overload is answered with, and routed rows.

    python benchmarks/serving.py runs/superglue-cpu --json      # about ten minutes on two cores

``ensemblelora serve`` runs in a process of its own; this one asks it over HTTP.

* ``rates``: one-row requests of all tasks in turn arrive at random times, so many a second on average, whether or not
  earlier ones were answered. Times count from when a request was due, so that a server that falls behind is charged for
  it. Load tools that wait for an answer before they ask again would slow down with the server and hide that; hence a
  client of our own, which is forty lines with httpx.
* ``hey``: the standard tool of that name beside it, where it is installed (Debian: ``apt-get install hey``). It keeps
  so many requests open, each with one row of the first task, and asks again when it is answered, also by a refusal.
* ``burst``: twice the queue's rows at once. What there is no room for must be refused at once, and the rest answered.
* ``routing``: test rows, by task name and without; the same rows, so that differences are paired.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import keep_record

from ensemblelora.api import Run, load_run
from ensemblelora.data.loading import load_task
from ensemblelora.data.reading import read_split
from ensemblelora.data.rendering import explode_row, find_input_columns
from ensemblelora.data.task import TaskCard
from ensemblelora.evaluation.metrics import compare_paired_tasks
from ensemblelora.routing import ROUTING_FILE
from ensemblelora.seeding import generator_for

SEED = 0


@dataclass(frozen=True)
class Row:
    """A test row as a user would send it, its answer, and its place in what intervals count as one."""

    task: str
    values: dict[str, Any]
    answer: str
    group: str


def main() -> None:
    """Start the server, ask it, stop it, and keep the record."""
    arguments = read_arguments()
    run = load_run(arguments.run)
    rows = {name: read_rows(run, card, arguments.rows) for name, card in run.cards.items()}
    options = ["--queue", str(arguments.queue), "--batch", str(arguments.batch), "--timeout", str(arguments.timeout)]
    with serving(arguments.run, options) as (url, seconds):
        result = asyncio.run(measure(url, rows, run, arguments))
        result["hey"] = ask_with_hey(url, next(iter(rows.values()))[0], arguments)
    names = ("rates", "open", "seconds", "rows", "queue", "batch", "timeout")
    config = {"run": arguments.run.name, **{name: getattr(arguments, name) for name in names}}
    result = {"startup_seconds": seconds, **result, "router": json.loads((run.path / ROUTING_FILE).read_text())}
    keep_record("serving", config, result, as_json=arguments.json, is_kept=not arguments.leave_record)


def read_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What to ask, and how often."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a finished run, whose data can be read")
    parser.add_argument("--rates", default="1,2,4,8,16", help="requests a second")
    parser.add_argument("--open", default="1,8,64,192", help="requests that hey keeps open")
    parser.add_argument("--seconds", type=float, default=30.0, help="at each of both")
    parser.add_argument("--rows", type=int, default=40, help="test rows of each task, for accuracy")
    parser.add_argument("--queue", type=int, default=128, help="the server's --queue")
    parser.add_argument("--batch", type=int, default=32, help="the server's --batch")
    parser.add_argument("--timeout", type=float, default=30.0, help="the server's --timeout")
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--leave-record", action="store_true", help="write none")
    return parser.parse_args(given)


def read_rows(run: Run, card: TaskCard, n: int) -> list[Row]:
    """Some test rows of a task, with no columns but those its card reads."""
    seed = run.config.seed if run.config.data.seed is None else run.config.data.seed
    examples = load_task(card, run.config.data, seed=seed).splits["test"]
    tables: dict[str, Any] = {}
    rows = []
    for e in generator_for(SEED, "serving", card.task).permutation(len(examples))[:n]:
        example = examples[int(e)]
        source, _, place = example.id.rpartition(":")
        number, _, k = place.partition(".")
        if source not in tables:
            tables[source] = read_split(card, source)
        inner = list(explode_row(tables[source][int(number)], card.explode))[int(k or 0)]
        values = {column: inner[column] for column in find_input_columns(card)}
        rows.append(Row(card.task, values, example.choices[example.label].strip(), example.group))
    return rows


@contextmanager
def serving(run: Path, options: Sequence[str]) -> Iterator[tuple[str, float]]:
    """A server in a process of its own: where it listens, and how many seconds it took to start."""
    command = [sys.executable, "-m", "ensemblelora", "serve", str(run), "--port", "0", "--json", *options]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start; its own message is above")
            yield json.loads(line)["url"], time.perf_counter() - started
        finally:
            process.terminate()


async def measure(url: str, rows: dict[str, list[Row]], run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask for everything, the gentle things first."""
    timeout = httpx.Timeout(2 * arguments.timeout + 10)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as client:
        every = [
            row for some in zip(*(cycle(rows[name], arguments.rows) for name in rows), strict=True) for row in some
        ]
        await asyncio.gather(*(ask(client, every[i]) for i in range(len(rows))))  # what is compiled or read once
        routing = await compare_routing(client, rows, run)
        rates = {}
        for rate in map(float, arguments.rates.split(",")):
            rates[f"{rate:g}"] = await drive(client, every, rate, arguments.seconds)
        burst = await overload(client, every, 2 * arguments.queue)
        health = (await client.get("/health")).json()
    return {"routing": routing, "rates": rates, "burst": burst, "health_afterwards": health}


def ask_with_hey(url: str, row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the load tool hey measures with so many requests open at a time; nothing where it is not installed."""
    if (tool := shutil.which("hey")) is None:
        print("hey is not installed, and its part is left out", file=sys.stderr)
        return {}
    found = {}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as body:
        json.dump({"task": row.task, "rows": [row.values]}, body)
        body.flush()
        options = ["-m", "POST", "-T", "application/json", "-D", body.name, "-t", "0", "-o", "csv"]
        for n_open in arguments.open.split(","):
            command = [tool, "-z", f"{arguments.seconds:g}s", "-c", n_open, *options, f"{url}/predict"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[n_open] = read_hey(done.stdout)
    return found


def read_hey(text: str) -> dict[str, Any]:
    """Counts and waiting times of what hey prints: a line of CSV for each request that had an answer."""
    lines = list(csv.DictReader(text.splitlines()))
    answers = [
        {"status": int(line["status-code"]), "seconds": float(line["response-time"]), "error": ""} for line in lines
    ]
    took = max((float(line["offset"]) + float(line["response-time"]) for line in lines), default=math.inf)
    n_answered = sum(answer["status"] == 200 for answer in answers)
    return {**summarize(answers), "answered_per_second": n_answered / took}


def cycle(rows: Sequence[Row], n: int) -> list[Row]:
    """As many rows as of every other task."""
    return [rows[i % len(rows)] for i in range(n)]


async def ask(client: httpx.AsyncClient, row: Row, *, due: float | None = None) -> dict[str, Any]:
    """Send one row; status, seconds since it was due, and what a refusal says."""
    started = time.perf_counter() if due is None else due
    try:
        found = await client.post("/predict", json={"task": row.task, "rows": [row.values]})
    except httpx.HTTPError as error:
        return {"status": type(error).__name__, "seconds": time.perf_counter() - started, "error": ""}
    error = "" if found.status_code == 200 else found.json()["error"]
    return {"status": found.status_code, "seconds": time.perf_counter() - started, "error": error}


async def drive(client: httpx.AsyncClient, rows: Sequence[Row], rate: float, seconds: float) -> dict[str, Any]:
    """Send requests at random times for a while, and wait for all answers."""
    generator = generator_for(SEED, "arrivals", str(rate))
    due = np.cumsum(generator.exponential(1 / rate, int(2 * rate * seconds) + 10))
    due = due[due < seconds]
    before, started = await read_batches(client), time.perf_counter()
    waiting = []
    for i, moment in enumerate(due):
        await asyncio.sleep(max(started + moment - time.perf_counter(), 0.0))
        waiting.append(asyncio.create_task(ask(client, rows[i % len(rows)], due=started + moment)))
    answers = await asyncio.gather(*waiting)
    took, after = time.perf_counter() - started, await read_batches(client)
    n_batches, n_rows = (after[key] - before[key] for key in ("count", "sum"))
    n_answered = sum(answer["status"] == 200 for answer in answers)
    return {
        **summarize(answers),
        "answered_per_second": n_answered / took,
        "rows_a_batch": n_rows / max(n_batches, 1),
    }


async def overload(client: httpx.AsyncClient, rows: Sequence[Row], n: int) -> dict[str, Any]:
    """Send so many requests at once."""
    return summarize(await asyncio.gather(*(ask(client, rows[i % len(rows)]) for i in range(n))))


def summarize(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts by status, waiting times of answers and of refusals, and the different lines that refusals say."""
    taken = {
        kind: [a["seconds"] for a in answers if (a["status"] == 200) == (kind == "answered")]
        for kind in ("answered", "refused")
    }
    told = {" ".join(word for word in a["error"].split() if not word.isdigit()) for a in answers if a["error"]}
    return {
        "n_requests": len(answers),
        "statuses": {str(status): n for status, n in Counter(a["status"] for a in answers).items()},
        "refusals": sorted(told),
        **{
            f"{kind}_seconds": {f"p{q}": float(np.percentile(found, q)) for q in (50, 95, 99)}
            for kind, found in taken.items()
            if found
        },
    }


async def read_batches(client: httpx.AsyncClient) -> dict[str, float]:
    """How many batches there were, and rows in them."""
    lines = (await client.get("/metrics")).text.splitlines()
    names = {key: f"ensemblelora_batch_rows_{key} " for key in ("count", "sum")}
    return {key: float(next(line for line in lines if line.startswith(n)).split()[1]) for key, n in names.items()}


async def compare_routing(client: httpx.AsyncClient, rows: dict[str, list[Row]], run: Run) -> dict[str, Any]:
    """Ask the same rows by name and without, and say what not knowing the name costs."""
    tasks: dict[str, dict[str, float]] = {}
    right: dict[str, list[list[bool]]] = {"named": [], "routed": []}
    for name, some in rows.items():
        named, routed = [await predict(client, task, some) for task in (name, None)]
        found = {
            "named": [one["label"] == row.answer for one, row in zip(named, some, strict=True)],
            "routed": [one["label"] == row.answer for one, row in zip(routed, some, strict=True)],
        }
        likeliest = [next(iter(one["routing"])) for one in routed]
        tasks[name] = {
            "n_rows": len(some),
            "accuracy_named": float(np.mean(found["named"])),
            "accuracy_routed": float(np.mean(found["routed"])),
            "task_found": float(np.mean([one == name for one in likeliest])),
            "n_candidates": float(np.mean([len(one["routing"]) for one in routed])),
            "mean_probability": float(np.mean([one["routing"].get(name, 0.0) for one in routed])),
        }
        for kind in right:
            right[kind].append(found[kind])
    codes = [np.unique([row.group for row in some], return_inverse=True)[1] for some in rows.values()]
    settings = run.config.evaluation
    gain = compare_paired_tasks(
        right["routed"],
        right["named"],
        codes,
        n_bootstrap=settings.n_bootstrap,
        confidence=settings.confidence,
        seed=SEED,
    )
    names = ("accuracy_named", "accuracy_routed", "task_found")
    return {
        "mean": {name: float(np.mean([task[name] for task in tasks.values()])) for name in names},
        "routed_less_named": {"difference": gain.difference, "low": gain.low, "high": gain.high},
        "tasks": tasks,
    }


async def predict(client: httpx.AsyncClient, task: str | None, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Answers to rows, eight in a request, one request after the other."""
    found: list[dict[str, Any]] = []
    for start in range(0, len(rows), 8):
        body = {"task": task, "rows": [row.values for row in rows[start : start + 8]]}
        answer = await client.post("/predict", json=body)
        answer.raise_for_status()
        found += answer.json()["predictions"]
    return found


if __name__ == "__main__":
    main()
