"""Draw a run's affinity matrix before and after grouping, as the README shows it.

python scripts/draw_affinity.py runs/demo docs/affinity.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts
from ensemblelora.files import load_arrays
from ensemblelora.report.heatmaps import remove_levels

_CELL, _LEFT, _TOP, _GAP = 26, 150, 54, 190
_WORSE, _NEUTRAL, _BETTER = (np.array(rgb) for rgb in ((178, 24, 43), (247, 247, 247), (33, 102, 172)))


def main() -> None:
    """Read a run folder, write one SVG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    plan = artifacts.read_json(arguments.run / artifacts.PLAN_FILE)
    affinity = load_arrays(arguments.run / artifacts.AFFINITY_FILE)["matrix"]
    matrix = np.nan_to_num(remove_levels(affinity))  # the diagonal says nothing about pairs
    arguments.out.write_text("\n".join(draw(matrix, plan["task_names"], plan["groups"])) + "\n", encoding="utf-8")


def draw(matrix: npt.NDArray[np.float64], names: Sequence[str], groups: Sequence[Sequence[int]]) -> Iterator[str]:
    """Yield the lines of an SVG: tasks in their own order, then by group with the groups framed.

    Args:
        matrix: Affinities without each task's own level, ``(n, n)``.
        names: Task names.
        groups: Task indices of every group.
    """
    n, reach = len(names), float(np.abs(matrix).max()) or 1.0
    width, height = 2 * (_LEFT + n * _CELL) + _GAP - _LEFT + 20, _TOP + n * _CELL + 40
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#444">'
    )
    yield f'<rect width="{width}" height="{height}" fill="#fff"/>'
    ordered = [task for group in groups for task in group]
    for left, order, title in (
        (_LEFT, list(range(n)), "as given"),
        (_LEFT + n * _CELL + _GAP, ordered, f"in {len(groups)} groups"),
    ):
        yield f'<text x="{left}" y="28" font-size="15" font-weight="600" fill="#222">{title}</text>'
        yield from _draw_cells(matrix[np.ix_(order, order)], left, reach)
        for row, task in enumerate(order):
            y = _TOP + (row + 0.7) * _CELL
            yield f'<text x="{left - 8}" y="{y:.0f}" text-anchor="end">{escape(names[task])}</text>'
        if order is ordered:
            yield from _draw_frames([len(group) for group in groups], left)
    yield (
        f'<text x="{_LEFT}" y="{height - 12}">blue: predicted to help each other; red: to harm; '
        f"darkest {reach:.4f} nats from a task's own level</text>"
    )
    yield "</svg>"


def _draw_cells(matrix: npt.NDArray[np.float64], left: int, reach: float) -> Iterator[str]:
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            share, end = abs(value) / reach, _BETTER if value > 0 else _WORSE
            red, green, blue = (_NEUTRAL + share * (end - _NEUTRAL)).round().astype(int)
            x, y = left + column * _CELL, _TOP + row * _CELL
            colour = f"#{red:02x}{green:02x}{blue:02x}"
            yield f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" fill="{colour}"/>'


def _draw_frames(sizes: Sequence[int], left: int) -> Iterator[str]:
    start = 0
    for size in sizes:
        x, y, side = left + start * _CELL - 1, _TOP + start * _CELL - 1, size * _CELL + 1
        frame = 'fill="none" stroke="#222" stroke-width="2"'
        yield f'<rect x="{x}" y="{y}" width="{side}" height="{side}" {frame}/>'
        start += size


if __name__ == "__main__":
    main()
