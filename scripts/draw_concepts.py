"""Draw the pictures of docs/concepts.md, from a toy of six tasks that is computed here; `make docs` writes them.

The toy: each task is a linear regression. The first three follow one rule, the others nearly its opposite, and each has
a part of its own. A subset of tasks is fitted by ridge to all of its rows; affinity and groups are the package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora.affinity import affinity_from_scores, sample_subsets
from ensemblelora.config import AffinityConfig
from ensemblelora.grouping import Partition, cluster
from ensemblelora.report.heatmaps import remove_levels
from ensemblelora.seeding import generator_for

__all__ = ["render_pictures"]

FloatArray = npt.NDArray[np.float64]

_FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
_NAMES = ("films", "letters", "books", "shops", "hotels", "cafes")
_ORDER = (0, 3, 1, 4, 2, 5)  # the two families mixed, as a folder of files would have them
_CELL = 34
# Readable on either ground: each picture brings its own, and follows the reader's system from light to dark.
_STYLE = """<style>
.card { fill: #ffffff; stroke: #d0d7de; } text { fill: #24292f; } .soft { fill: #57606a; }
.line { stroke: #24292f; fill: none; } .axis { stroke: #8c959f; fill: none; }
.good { fill: #2166ac; } .bad { fill: #b2182b; } .goodline { stroke: #2166ac; fill: none; }
.badline { stroke: #b2182b; fill: none; } .box { fill: #f6f8fa; stroke: #8c959f; }
@media (prefers-color-scheme: dark) {
.card { fill: #161b22; stroke: #30363d; } text { fill: #e6edf3; } .soft { fill: #9da7b3; }
.line { stroke: #e6edf3; } .good { fill: #58a6ff; } .bad { fill: #ff7b72; }
.goodline { stroke: #58a6ff; } .badline { stroke: #ff7b72; } .box { fill: #21262d; }
}
</style>"""


@dataclass(frozen=True)
class _Toy:
    """What the toy gives: names in a mixed order, affinities without each task's level, groups, and a curve."""

    names: tuple[str, ...]
    matrix: FloatArray
    """``(tasks, tasks)``"""
    groups: Partition
    curve: tuple[tuple[float, float], ...]
    """mean loss with 1, 2, ... groups, and the standard error of its difference to the smallest"""


def render_pictures() -> dict[Path, str]:
    """Return the text of every picture, by path."""
    toy = _compute_toy()
    drawn = {
        "method.svg": _frame(760, 250, "The method, from tasks to an ensemble", _draw_method()),
        "expansion.svg": _frame(560, 300, "A loss along a step, and what the gradient predicts", _draw_expansion()),
        "affinity.svg": _frame(760, 330, "An affinity matrix as given, and in its groups", _draw_affinity(toy)),
        "groups.svg": _frame(560, 300, "Predicted loss by number of groups", _draw_curve(toy.curve)),
    }
    return {_FOLDER / name: text for name, text in drawn.items()}


def _compute_toy() -> _Toy:
    rng = generator_for(0, "pictures")
    n, d = len(_NAMES), 12
    rule, own = rng.normal(size=d), rng.normal(size=(n, d))
    signs = np.array([1, 1, 1, -1, -1, -1])
    truth = (0.5 * signs[:, None] * rule + 0.25 * own)[list(_ORDER)]  # (tasks, d)
    inputs = rng.normal(size=(n, 24, d))
    targets = np.einsum("ird,id->ir", inputs, truth) + rng.normal(size=(n, 24))
    held, answers = inputs[:, 14:], targets[:, 14:]

    def fit(tasks: Iterable[int]) -> FloatArray:
        """Squared errors of every task's held-out rows, ``(tasks, rows)``, after a fit to these tasks' other rows."""
        chosen = list(tasks)
        x, y = inputs[chosen, :14].reshape(-1, d), targets[chosen, :14].reshape(-1)
        weights = np.linalg.solve(x.T @ x + np.eye(d), x.T @ y)
        return np.asarray((held @ weights - answers) ** 2)

    design = sample_subsets(n, AffinityConfig(), seed=0)
    scores = np.array([-fit(subset).mean(axis=1) for subset in design.subsets])
    matrix = affinity_from_scores(design, scores).matrix
    partitions = [cluster(matrix, m).groups for m in range(1, n + 1)]
    losses = [_judge(fit, groups) for groups in partitions]  # each (tasks, rows)
    best = min(losses, key=lambda loss: float(loss.mean()))
    curve = tuple((float(loss.mean()), _pair_error(loss - best)) for loss in losses)
    return _Toy(tuple(_NAMES[i] for i in _ORDER), np.nan_to_num(remove_levels(matrix)), partitions[1], curve)


def _judge(fit: Callable[[Iterable[int]], FloatArray], groups: Partition) -> FloatArray:
    """Each task's losses after the fit of its own group, ``(tasks, rows)``."""
    losses = [fit(group)[task] for group in groups for task in group]
    return np.array(losses)[np.argsort([task for group in groups for task in group])]


def _pair_error(differences: FloatArray) -> float:
    return float(differences.std(ddof=1) / np.sqrt(differences.size))


def _frame(width: int, height: int, title: str, lines: Iterable[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="14">'
    )
    card = f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    return "\n".join([head, f"<title>{title}</title>", _STYLE, card, *lines, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "", size: int = 14) -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="{size}"{style}>{words}</text>'


def _draw_method() -> Iterator[str]:
    """Boxes from left to right; what is trained stands in the last three."""
    steps = (
        ("tasks", ("your files", "one each")),
        ("gradients", ("one pass over", "the rows")),
        ("oracle", ("predicted loss", "of any subset")),
        ("groups", ("who trains with", "whom, or all")),
        ("adapters", ("one a group,", "and boosters")),
        ("ensemble", ("weights for", "every task")),
    )
    for number, (name, told) in enumerate(steps):
        x = 20 + number * 122
        yield f'<rect class="box" x="{x}" y="60" width="106" height="96" rx="6"/>'
        yield _text(x + 53, 90, name, anchor="middle", size=16)
        yield from (
            _text(x + 53, 116 + 20 * i, words, anchor="middle", kind="soft", size=13) for i, words in enumerate(told)
        )
        if number:
            yield f'<path class="line" d="M{x - 14} 108 h10 m-5 -5 l5 5 l-5 5"/>'
    yield '<path class="goodline" stroke-width="2" d="M142 180 h350"/>'
    yield _text(317, 204, "nothing is trained", anchor="middle", kind="good")
    yield '<path class="badline" stroke-width="2" d="M508 180 h228"/>'
    yield _text(622, 204, "fine-tuning", anchor="middle", kind="bad")
    yield _text(380, 234, "plan ends after the groups, run does all of it", anchor="middle", kind="soft", size=13)


def _draw_expansion() -> Iterator[str]:
    """A row's loss where its score has a slope and a bend, and the loss that the slope alone gives."""
    steps = np.linspace(0.0, 1.0, 41)
    line = -0.4 + 2.6 * steps
    bent = line - 1.5 * steps**2
    true, linear = np.logaddexp(0.0, -bent), np.logaddexp(0.0, -line)
    left, top, width, height = 70, 40, 440, 190

    def place(losses: FloatArray) -> str:
        return " ".join(
            f"{left + width * t:.1f},{top + height * (1 - loss):.1f}" for t, loss in zip(steps, losses, strict=True)
        )

    near = f'x="{left}" y="{top}" width="{0.35 * width:.0f}" height="{height}"'
    yield f'<rect class="box" {near} stroke-dasharray="3 4"/>'
    yield _text(left + 8, top + 18, "where adapters end", kind="soft", size=13)
    yield f'<path class="axis" d="M{left} {top} v{height} h{width}"/>'
    yield f'<polyline class="line" stroke-width="2.5" points="{place(true)}"/>'
    yield f'<polyline class="goodline" stroke-width="2.5" stroke-dasharray="7 5" points="{place(linear)}"/>'
    yield _text(left + width - 4, top + height * (1 - true[-1]) - 10, "the true loss", anchor="end")
    yield _text(left + 0.6 * width, top + height * (1 - linear[24]) + 26, "by the gradient", anchor="end", kind="good")
    yield _text(left - 10, top + 12, "loss", anchor="end", kind="soft")
    yield _text(left, top + height + 24, "base model", kind="soft")
    yield _text(left + width, top + height + 24, "distance of the weights from it", anchor="end", kind="soft")


def _draw_affinity(toy: _Toy) -> Iterator[str]:
    reach, n = float(np.abs(toy.matrix).max()), len(toy.names)
    ordered = [task for group in toy.groups for task in group]
    for left, order, title in ((90, list(range(n)), "as given"), (460, ordered, "in groups")):
        yield _text(left, 36, title, size=16)
        for row, task in enumerate(order):
            y = 52 + row * _CELL
            yield _text(left - 8, y + 0.65 * _CELL, toy.names[task], anchor="end", size=13)
            for column, other in enumerate(order):
                value = toy.matrix[task, other]
                kind = "good" if value > 0 else "bad"
                yield (
                    f'<rect class="{kind}" fill-opacity="{abs(value) / reach:.2f}" x="{left + column * _CELL}" y="{y}" '
                    f'width="{_CELL - 2}" height="{_CELL - 2}"/>'
                )
    yield from _draw_frames([len(group) for group in toy.groups], 460)
    yield _text(90, 296, "blue: better together than this task is with others on average", kind="good", size=13)
    yield _text(90, 316, "red: worse", kind="bad", size=13)


def _draw_frames(sizes: Sequence[int], left: int) -> Iterator[str]:
    start = 0
    for size in sizes:
        x, y, side = left + start * _CELL - 2, 50 + start * _CELL, size * _CELL + 2
        yield f'<rect class="line" stroke-width="2" x="{x}" y="{y}" width="{side}" height="{side}"/>'
        start += size


def _draw_curve(curve: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Points with bars, and the smallest number whose loss lies within one standard error of the best."""
    left, top, width, height = 70, 40, 440, 190
    highest = max(loss + error for loss, error in curve) * 1.03

    def locate(m: int, loss: float) -> tuple[float, float]:
        return left + width * (m + 0.5) / len(curve), top + height * (1 - loss / highest)

    yield f'<path class="axis" d="M{left} {top} v{height} h{width}"/>'
    least = min(loss for loss, _ in curve)
    chosen = next(m for m, (loss, error) in enumerate(curve) if loss - error <= least)
    for m, (loss, error) in enumerate(curve):
        (x, y), (_, low), (_, high) = locate(m, loss), locate(m, loss - error), locate(m, loss + error)
        if error:
            yield f'<path class="axis" stroke-width="2" d="M{x:.1f} {high:.1f} V{low:.1f}"/>'
        yield f'<circle class="{"good" if m == chosen else "soft"}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
        yield _text(x, top + height + 22, str(m + 1), anchor="middle")
    x, y = locate(chosen, curve[chosen][0])
    yield _text(x, y - 22, "chosen", anchor="middle", kind="good")
    yield _text(left - 10, top + 12, "loss", anchor="end", kind="soft")
    yield _text(
        left + width, top + height + 46, "number of groups; 1 is one adapter for all", anchor="end", kind="soft"
    )
