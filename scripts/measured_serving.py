"""What the benchmark of the server recorded, as a section of docs/measured.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

__all__ = ["render_serving"]

Record = dict[str, Any]


def render_serving(record: Record) -> Iterator[str]:
    """Waiting times by rate, what hey found where it was installed, a burst, and rows that name no task."""
    config, burst, tasks = record["config"], record["burst"], record["routing"]["tasks"]
    yield from _wrap(
        f"`ensemblelora serve` with the run `{config['run']}`, {len(tasks)} tasks. One-row requests "
        f"of all tasks arrive at random times for {config['seconds']:g} s; waiting counts from when a request was due. "
        f"At most {config['queue']} rows wait, {config['batch']} are answered together. The server was ready after "
        f"{record['startup_seconds']:.0f} s."
    )
    yield ""
    yield "| requests a second | answered a second | median | 95 % | 99 % | rows a batch | refused |"
    yield "|---|---|---|---|---|---|---|"
    for rate, found in record["rates"].items():
        told = f"{_format_waits(found)} | {found['rows_a_batch']:.1f} | {_count_refused(found)}"
        yield f"| {rate} | {told} |"
    yield ""
    if record.get("hey"):
        yield from _describe_hey(record["hey"], config["seconds"])
    statuses = ", ".join(f"{n} with {status}" for status, n in sorted(burst["statuses"].items()))
    yield from _wrap(f"{burst['n_requests']} requests at once were answered: {statuses}. {_describe_refusals(burst)}")
    yield ""
    yield from _describe_routing(record["routing"])


def _describe_hey(found: Record, seconds: float) -> Iterator[str]:
    yield from _wrap(
        f"The load tool hey, which keeps so many one-row requests of one task open for {seconds:g} s and asks again "
        "when one is answered, also by a refusal:"
    )
    yield from ("", "| requests open | answered a second | median | 95 % | 99 % | refused |")
    yield "|---|---|---|---|---|---|"
    for n_open, one in found.items():
        yield f"| {n_open} | {_format_waits(one)} | {_count_refused(one)} |"
    yield ""


def _describe_refusals(burst: Record) -> str:
    if "refused_seconds" not in burst:
        return "None was refused."
    took = burst["refused_seconds"]
    return f"Refusals took {took['p50']:.2f} s in the median, {took['p99']:.2f} s at 99 %."


def _describe_routing(routing: Record) -> Iterator[str]:
    mean, change = routing["mean"], routing["routed_less_named"]
    yield from _wrap(
        "The same test rows by their task's name and without it: the likeliest task is the row's own for "
        f"{mean['task_found']:.0%}; accuracy {mean['accuracy_routed']:.3f} in place of {mean['accuracy_named']:.3f} "
        f"({change['difference']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]), mean over tasks."
    )
    yield from (
        "",
        "| task | rows | candidates | task found | accuracy, named | accuracy, routed |",
        "|---|---|---|---|---|---|",
    )
    for name, task in routing["tasks"].items():
        share, pair = f"{task['task_found']:.0%}", f"{task['accuracy_named']:.3f} | {task['accuracy_routed']:.3f}"
        yield f"| {name} | {task['n_rows']} | {task['n_candidates']:.0f} | {share} | {pair} |"


def _count_refused(found: Record) -> str:
    refused = found["n_requests"] - found["statuses"].get("200", 0)
    return f"{refused} of {found['n_requests']}"


def _format_waits(found: Record) -> str:
    """Answers a second, and how long they took."""
    waits = " | ".join(_format_seconds(found, q) for q in ("p50", "p95", "p99"))
    return f"{found['answered_per_second']:.2f} | {waits}"


def _format_seconds(found: Record, quantile: str) -> str:
    return f"{found['answered_seconds'][quantile]:.2f} s" if "answered_seconds" in found else "-"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_on_hyphens=False, break_long_words=False)
