"""The relaxation of clustering: time, status and certified gap of our solver against cvxpy's, by size.

    python benchmarks/sdp.py --json

Affinities of planted groups with noise, ``clear`` (a partition is proven best, or nearly) and ``hard`` (noise drowns
the groups). Every solver's dual values give a bound on all partitions by the same function, in float64, whatever the
solver says of itself; its matrix is rounded by the same function. ``gap`` is bound less rounded objective, relative to
the bound of the affinity without row means. ``bound_excess`` is how far a bound is above the lowest of all solvers'.

* ``splitting``: ours, at its default tolerance.
* ``equal``: ours, at the loosest tolerance whose bound is as low as every other solver's, within 1e-7; what speed-ups
  are of.
* ``scs``, ``clarabel``: cvxpy's first-order and interior-point solvers at their default tolerances; Clarabel up to 100
  tasks, where it takes half a minute. Building the problem counts, importing cvxpy does not.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import cvxpy
import numpy as np
from common import finish_worker, keep_record, make_parser, run_worker, spread
from threadpoolctl import threadpool_limits

from ensemblelora.grouping import compute_objective, round_to_groups, solve_relaxation
from ensemblelora.grouping.bound import bound_objective
from ensemblelora.grouping.partition import centre_affinity
from ensemblelora.seeding import generator_for

SIZES = {10: 3, 100: 5, 500: 8}
"""tasks and groups"""
NOISES = {"clear": 0.5, "hard": 2.0}
OTHERS = {"scs": 500, "clarabel": 100}
"""the most tasks that each is asked for"""
TOLERANCES = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7)
EQUAL = 1e-7
SLOW_SECONDS = 20.0

Array = np.ndarray[Any, Any]
Answer = tuple[Array, float, float, str]
Solver = Callable[[Array, int], Answer]


def main() -> None:
    """Measure every solver on every affinity, each in a process of its own."""
    parser = make_parser(__doc__, rows=None, repeats="repeats", n_repeats=3)
    parser.add_argument("--threads", type=int, default=1, help="of BLAS, for every solver")
    parser.add_argument("--largest", type=int, default=max(SIZES), help="most tasks")
    parser.add_argument("--trial", action="store_true", help="print, and leave the record as it is")
    arguments = parser.parse_args()
    if arguments.worker:
        solver, size, noise, tolerance = arguments.worker.split(":")
        solve = partial(solve_by_ours, tolerance=float(tolerance) if tolerance else None)
        with threadpool_limits(arguments.threads):
            chosen = partial(solve_by_cvxpy, solver=solver) if solver in OTHERS else solve
            finish_worker(measure(chosen, int(size), noise, arguments.repeats))
        return
    settings = ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
    problems = {}
    for size in (n for n in SIZES if n <= arguments.largest):
        for noise in NOISES:
            ask = partial(_ask, size, noise, settings)
            others = {solver: ask(solver) for solver, most in OTHERS.items() if size <= most}
            lowest = min(entry["bound"] for entry in others.values())
            found = {"splitting": ask("splitting"), "equal": _match(ask, lowest), **others}
            problems[f"{size} {noise}"] = compare(found)
    sizes = sorted({int(name.split()[0]) for name in problems})
    result: dict[str, Any] = {}
    for size in sizes:
        both = [problems[f"{size} {noise}"] for noise in NOISES]
        result[f"seconds_{size}"] = max(problem["splitting"]["seconds"]["mean"] for problem in both)
        result[f"speedup_{size}"] = min(problem["speedup"] for problem in both)
    result["max_bound_excess"] = max(problem["splitting"]["bound_excess"] for problem in problems.values())
    result["problems"] = problems
    config = {"sizes": SIZES, "noises": NOISES, "threads": arguments.threads, "repeats": arguments.repeats}
    config |= {"cvxpy": cvxpy.__version__}
    keep_record("sdp", config, result, as_json=arguments.json, is_kept=not arguments.trial)


def _ask(size: int, noise: str, settings: list[str], solver: str, tolerance: float | None = None) -> dict[str, Any]:
    return run_worker(__file__, [f"{solver}:{size}:{noise}:{tolerance or ''}", *settings])


def _match(ask: Callable[..., dict[str, Any]], bound: float) -> dict[str, Any]:
    """Ours at the loosest tolerance that bounds as well."""
    for tolerance in TOLERANCES:
        found = ask("splitting", tolerance)
        if found["bound"] <= bound + EQUAL * abs(bound):
            return found | {"tolerance": tolerance}
    raise SystemExit(f"no tolerance down to {TOLERANCES[-1]:g} gives a bound of {bound:g}")


def compare(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put solvers of one affinity beside each other; the speed-up is over the faster of the others."""
    lowest = min(entry["bound"] for entry in found.values())
    for entry in found.values():
        entry["bound_excess"] = (entry["bound"] - lowest) / abs(lowest)
    others = [entry["seconds"]["mean"] for solver, entry in found.items() if solver in OTHERS]
    return found | {"speedup": min(others) / found["equal"]["seconds"]["mean"]}


def draw_affinity(n: int, n_groups: int, noise: float) -> Array:
    """Tasks of one group score 1 together and 0 with others, with noise; row means taken out."""
    generator = generator_for(0, "benchmark", "sdp", n, n_groups)
    group = generator.permutation(np.arange(n) % n_groups)
    affinity = (group[:, None] == group) + noise * generator.normal(size=(n, n))
    return centre_affinity((affinity + affinity.T) / 2)


def measure(solve: Solver, size: int, noise: str, repeats: int) -> dict[str, Any]:
    """Time the relaxation, bound it by its dual values, and round it."""
    affinity, n_groups = draw_affinity(size, SIZES[size], NOISES[noise]), SIZES[size]
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) < SLOW_SECONDS * repeats):
        started = time.perf_counter()
        matrix, objective, bound, status = solve(affinity, n_groups)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    groups = round_to_groups(matrix, affinity, n_groups)
    rounding_seconds = time.perf_counter() - started
    rounded = compute_objective(affinity, groups)
    return {
        "seconds": spread(seconds),
        "status": status,
        "bound": bound,
        "objective": objective,
        "smallest_entry": float(matrix.min()),
        "smallest_eigenvalue": float(np.linalg.eigvalsh(matrix)[0]),
        "worst_row_sum": float(np.abs(matrix.sum(axis=1) - 1.0).max()),
        "rounding_seconds": rounding_seconds,
        "rounded_objective": rounded,
        "gap": (bound - rounded) / abs(bound),
    }


def solve_by_ours(affinity: Array, n_groups: int, *, tolerance: float | None) -> Answer:
    """Return the matrix, its objective, the certified bound, and the status."""
    found = solve_relaxation(affinity, n_groups, tolerance=tolerance)
    return found.matrix, found.objective, found.bound, found.status


def solve_by_cvxpy(affinity: Array, n_groups: int, *, solver: str) -> Answer:
    """The same by a general solver, on the affinity in units of its largest entry."""
    n, scale = len(affinity), float(np.abs(affinity).max())
    solution = cvxpy.Variable((n, n), symmetric=True)
    rows, entries = cvxpy.sum(solution, axis=1) == 1, solution >= 0
    constraints = [solution >> 0, rows, entries, cvxpy.trace(solution) == n_groups]
    problem = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(cvxpy.multiply(affinity / scale, solution))), constraints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an inaccurate solution; the status says it
        problem.solve(solver=solver.upper())
    duals = np.asarray(rows.dual_value), np.asarray(entries.dual_value)
    bound = bound_objective(affinity / scale, n_groups, 0.0, *duals) * scale
    return np.asarray(solution.value), float(problem.value) * scale, bound, str(problem.status)


if __name__ == "__main__":
    main()
