"""What the benchmark of scale recorded, as a section of docs/measured.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

__all__ = ["render_scale"]

Record = dict[str, Any]

_KINDS = {"samples": "rows", "tokens": "tokens of a row", "subsets": "subsets"}


def render_scale(record: Record) -> Iterator[str]:
    """How cost and memory grow, what a second worker is worth, and whether a cluster leaves the same."""
    yield from _wrap(
        "A random Llama of two layers, one thread a process. *Exponent*: slope of log time over log size; 1 is linear. "
        "Cost that is there whatever the size makes it less."
    )
    yield from ("", "| time over | from | to | exponent |", "|---|---|---|---|")
    for kind, label in _KINDS.items():
        sizes = sorted(map(int, record["seconds"][kind]))
        yield f"| {label} | {sizes[0]:,} | {sizes[-1]:,} | {record[f'exponent_{kind}']:.2f} |"
    if "bytes_per_row" in record:
        yield ""
        yield from _wrap(
            f"Memory of the gradient pass: {record['range']['rows_of_memory']:.0f} times the rows have "
            f"{record['memory_growth_samples']:.2f} times the peak ({_tell(record['bytes_per_row'])} a row more), "
            f"{record['range']['coordinates']:.0f} times the coordinates {record['memory_growth_coordinates']:.2f} "
            f"times ({_tell(record['bytes_per_coordinate'])} each)."
        )
    yield ""
    yield from _wrap(
        f"Two workers of a Ray cluster against one: features {record['speedup_features']:.2f}x, subsets "
        f"{record['speedup_oracle']:.2f}x, both {record['speedup_two_workers']:.2f}x as fast."
    )
    if "demo_is_equal" in record:
        seconds, differing = record["demo_seconds"], record["demo_differs"]
        left = f"all {record['demo_left']} results and adapters are the same, bit for bit"
        found = left if record["demo_is_equal"] else f"not the same: {', '.join(differing)}"
        yield from _wrap(
            f"The demo in two processes of a cluster took {seconds['cluster'] / 60:.1f} min, in one process "
            f"{seconds['here'] / 60:.1f}; {found}."
        )


def _tell(n_bytes: float) -> str:
    return f"{n_bytes / 1000:.1f} kB" if abs(n_bytes) >= 100 else f"{n_bytes:.0f} B"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, width=120)
