"""All subset fits together, against scikit-learn and scipy one by one, to the same optimum.

    python benchmarks/oracle.py --json

Twenty two-class tasks of 250 training and 50 validation rows, d = 400; 200 distinct subsets of three. The features are
drawn, with what was seen in features of real tasks on SmolLM2: eigenvalues that fall like 1 / rank^1.2, half of the
tasks with half of their gradient in one common direction (label tokens), scales that differ from task to task, outputs
away from zero at the base model. All systems fit every subset and say every task's loss and accuracy on its validation
rows under it; ours says standard errors and F1 besides.

* ``sklearn``: its fastest solver, on the same problem with zero offsets, the only one that it can express.
* ``scipy``: its fastest solver, on the same problem with fixed offsets.

Both get each task's rows in float64 beforehand. Each system runs at the loosest of its tolerances that brings every
subset's objective within 1e-6 (relative) of the optimum, which is ours in float64 at a gradient norm of 1e-8,
certified by strong convexity. Systems alternate in one process with the same number of BLAS threads. ``--repeats``
measurements at each ridge; headline ratios are of the ridge that validation chooses, others stand beside them.

``large``: 500 tasks of 20 + 5 rows, 2,000 subsets of ten, in a process of its own.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from common import finish_worker, keep_record, make_parser, run_worker, spread
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from ensemblelora.config import AffinityConfig, EstimationConfig
from ensemblelora.estimation import Fit, Oracle, TaskFeatures, choose_l2_penalty, fit_subsets
from ensemblelora.seeding import generator_for
from ensemblelora.store import FeatureBlock

DIMENSION = 400
PENALTIES = (10.0, 1.0, 0.1)
ACCURACY = 1e-6
LADDER = tuple(float(f"{digit}e-{power}") for power in range(1, 9) for digit in (5, 2, 1))
"""tolerances to try, loosest first"""
SKLEARN = ("lbfgs", "newton-cholesky", "newton-cg", "liblinear", "liblinear dual")
SCIPY = ("L-BFGS-B", "Newton-CG", "trust-ncg", "trust-krylov", "trust-exact")

Array = np.ndarray[Any, Any]
Rows = tuple[Array, Array, Array]
"""features (n, d), offsets (n,), signs of the labels (n,)"""
Solver = Callable[[Rows, float], Array]


def main() -> None:
    """Measure every ridge, then the large problem, and keep the record."""
    parser = make_parser(__doc__, rows=250, repeats="repeats", n_repeats=5)
    parser.add_argument("--threads", type=int, default=1, help="of BLAS, for every system")
    parser.add_argument("--trial", action="store_true", help="print, and leave the record as it is")
    arguments = parser.parse_args()
    if arguments.worker:
        with threadpool_limits(arguments.threads):
            finish_worker(fit_large() if arguments.worker == "large" else fit_small(arguments))
        return
    settings = ["--rows", str(arguments.rows), "--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
    small = run_worker(__file__, ["small", *settings])
    large = run_worker(__file__, ["large", *settings])
    chosen = small["ridges"][small["chosen_l2_penalty"]]
    result = {
        "speedup_vs_sklearn": chosen["speedup_vs_sklearn"]["mean"],
        "speedup_vs_scipy": chosen["speedup_vs_scipy"]["mean"],
        "max_objective_gap": max(ridge["max_objective_gap"] for ridge in small["ridges"].values()),
        "large_seconds": large["seconds"],
        "large_peak_memory_bytes": large["peak_memory_bytes"],
        **small,
        "large": large,
    }
    config = {"n_tasks": 20, "rows": arguments.rows, "validation_rows": 50, "proj_dim": DIMENSION, "n_subsets": 200}
    config |= {"accuracy": ACCURACY, "threads": arguments.threads, "repeats": arguments.repeats}
    keep_record("oracle", config, result, as_json=arguments.json, is_kept=not arguments.trial)


def draw_features(
    n_tasks: int, n_train: int, n_validation: int, *, seed: int, has_offsets: bool = True
) -> TaskFeatures:
    """Draw tasks that share a spectrum and part of their answer; the same rows with offsets and without."""
    generator = generator_for(seed, "benchmark", "oracle")
    rotation = np.linalg.qr(generator.normal(size=(DIMENSION, DIMENSION)))[0]
    spectrum = np.arange(1, DIMENSION + 1) ** -0.6
    shared_answer, shared_mean = generator.normal(size=(2, DIMENSION))
    splits: dict[str, list[FeatureBlock]] = {"train": [], "validation": []}
    for i in range(n_tasks):
        scales = spectrum * np.exp(0.5 * generator.normal(size=DIMENSION))
        scales *= np.sqrt(10 * np.exp(generator.normal())) / np.linalg.norm(scales)
        mean = (shared_mean + 0.5 * generator.normal(size=DIMENSION)) * scales
        mean *= np.linalg.norm(scales) * (1.0 if i % 2 else 0.15) / np.linalg.norm(mean)
        answer = shared_answer + 0.7 * generator.normal(size=DIMENSION)
        level = 0.5 * generator.normal()
        for split, n in (("train", n_train), ("validation", n_validation)):
            inner = generator.normal(size=(n, DIMENSION)) * scales
            offsets = (level + 0.7 * generator.normal(size=n)) * has_offsets
            margin = offsets + 1.5 * inner @ answer / np.linalg.norm(answer * scales)
            labels = margin + generator.logistic(size=n) > 0
            features = ((inner + mean) @ rotation).astype(np.float32)
            splits[split].append(_make_block(f"task-{i:03d}", split, offsets, features, labels))
    return TaskFeatures(tuple(splits["train"]), tuple(splits["validation"]))


def _make_block(task: str, split: str, offsets: Array, features: Array, labels: Array) -> FeatureBlock:
    n = len(labels)
    return FeatureBlock(
        task=task,
        split=split,
        mode="margin",
        outputs=offsets[:, None].astype(np.float32),
        features=features[:, None],
        labels=labels.astype(np.int64),
        n_choices=np.full(n, 2),
        squared_norms=np.einsum("nd,nd->n", features, features),
        groups=np.arange(n),
        ids=tuple(f"{split}:{e}" for e in range(n)),
    )


def draw_subsets(n_tasks: int, size: int, n_subsets: int) -> list[tuple[int, ...]]:
    """Draw distinct subsets."""
    from ensemblelora.affinity import sample_subsets

    design = sample_subsets(n_tasks, AffinityConfig(subset_size=size, n_subsets=n_subsets, min_pair_count=0), seed=0)
    return list(design.subsets)


@dataclass(frozen=True)
class OneByOne:
    """What scikit-learn and scipy are given, and what they answer."""

    features: TaskFeatures
    subsets: list[tuple[int, ...]]
    optimum: Fit
    train: list[Rows]
    validation: Rows
    starts: Array

    @classmethod
    def prepare(cls, features: TaskFeatures, subsets: list[tuple[int, ...]], l2_penalty: float) -> OneByOne:
        """Widen every task's rows once, and find the optimum."""
        optimum = fit_subsets(features.train, subsets, l2_penalty=l2_penalty, tolerance=1e-8)
        assert optimum.converged.all()
        train, validation = ([_widen(block) for block in blocks] for blocks in (features.train, features.validation))
        starts = np.cumsum([0, *(len(signs) for _, _, signs in validation[:-1])])
        joined = tuple(np.concatenate(parts) for parts in zip(*validation, strict=True))
        return cls(features, subsets, optimum, train, joined, starts)

    def solve(self, solver: Solver, which: Sequence[int]) -> tuple[float, float]:
        """Fit subsets and predict every task under each; return seconds, and the largest relative gap."""
        weights = []
        started = time.perf_counter()
        for s in which:
            rows = tuple(np.concatenate(parts) for parts in zip(*(self.train[i] for i in self.subsets[s]), strict=True))
            weights.append(solver(rows, float(self.optimum.penalties[s])))
            self._predict(weights[-1])
        seconds = time.perf_counter() - started
        return seconds, max(self.gap(s, w) for s, w in zip(which, weights, strict=True))

    def gap(self, s: int, weights: Array) -> float:
        """Return the objective's relative distance from the optimum; below 0 only by rounding."""
        rows = tuple(np.concatenate(parts) for parts in zip(*(self.train[i] for i in self.subsets[s]), strict=True))
        found, _ = objective(weights, rows, float(self.optimum.penalties[s]))
        return float(found / self.optimum.objectives[s] - 1.0)

    def _predict(self, weights: Array) -> tuple[Array, Array]:
        """Mean loss and accuracy of every task on its validation rows."""
        features, offsets, signs = self.validation
        margins = signs * (features @ weights + offsets)
        counts = np.diff([*self.starts, len(signs)])
        losses = np.add.reduceat(np.logaddexp(0.0, -margins), self.starts) / counts
        return losses, np.add.reduceat(margins > 0, self.starts) / counts


def _widen(block: FeatureBlock) -> Rows:
    features = block.features[:, 0].astype(np.float64)
    return features, block.outputs[:, 0].astype(np.float64), 2.0 * block.labels - 1.0


def objective(weights: Array, rows: Rows, penalty: float) -> tuple[float, Array]:
    """Return the objective and its gradient, with one exponential a row."""
    features, offsets, signs = rows
    margins = signs * (features @ weights + offsets)
    tails = np.exp(-np.abs(margins))
    loss = np.mean(np.log1p(tails) + np.maximum(-margins, 0.0))
    slopes = np.where(margins > 0, tails, 1.0) / (1.0 + tails) * signs / -len(signs)
    return float(loss + 0.5 * penalty * weights @ weights), slopes @ features + penalty * weights


def hessian_product(weights: Array, vector: Array, rows: Rows, penalty: float) -> Array:
    """Return the Hessian times a vector."""
    features, offsets, _ = rows
    shares = 0.5 + 0.5 * np.tanh(0.5 * (features @ weights + offsets))
    return (shares * (1 - shares) / len(offsets) * (features @ vector)) @ features + penalty * vector


def hessian(weights: Array, rows: Rows, penalty: float) -> Array:
    """Return the Hessian."""
    features, offsets, _ = rows
    shares = 0.5 + 0.5 * np.tanh(0.5 * (features @ weights + offsets))
    scaled = features * np.sqrt(shares * (1 - shares) / len(offsets))[:, None]
    return scaled.T @ scaled + penalty * np.eye(len(weights))


def call_sklearn(rows: Rows, penalty: float, *, name: str, tolerance: float) -> Array:
    """Fit with scikit-learn, whose C is on the sum of the losses."""
    from sklearn.linear_model import LogisticRegression

    features, _, signs = rows
    solver, _, is_dual = name.partition(" ")
    model = LogisticRegression(
        C=1 / (penalty * len(signs)),
        fit_intercept=False,
        solver=solver,
        dual=bool(is_dual),
        tol=tolerance,
        max_iter=10_000,
    )
    return np.asarray(model.fit(features, signs).coef_[0])


def call_scipy(rows: Rows, penalty: float, *, name: str, tolerance: float) -> Array:
    """Fit with scipy, from zero."""
    options: dict[str, Any] = {"maxiter": 10_000}
    second: dict[str, Any] = {}
    if name == "L-BFGS-B":
        options |= {"gtol": tolerance, "ftol": 0.0, "maxfun": 10_000}
    else:
        options |= {"xtol" if name == "Newton-CG" else "gtol": tolerance}
        second = {"hess": hessian} if name == "trust-exact" else {"hessp": hessian_product}
    start = np.zeros(rows[0].shape[1])
    found = minimize(objective, start, (rows, penalty), method=name, jac=True, options=options, **second)
    return np.asarray(found.x)


def fit_small(arguments: Any) -> dict[str, Any]:
    """Compare at every ridge; note which one validation would choose."""
    warnings.simplefilter("ignore")  # probed solvers may stop short of an optimum that they are then refused for
    subsets = draw_subsets(20, 3, 200)
    fixed = draw_features(20, arguments.rows, 50, seed=arguments.seed)
    zero = draw_features(20, arguments.rows, 50, seed=arguments.seed, has_offsets=False)
    grid = EstimationConfig(method="ridge", l2_grid=PENALTIES, tolerance=1e-4)
    chosen, _ = choose_l2_penalty(fixed.train, fixed.validation, subsets, grid)
    ridges = {}
    for penalty in PENALTIES:
        against = {
            "sklearn": compare(zero, subsets, penalty, call_sklearn, SKLEARN, arguments.repeats),
            "scipy": compare(fixed, subsets, penalty, call_scipy, SCIPY, arguments.repeats),
        }
        ridges[f"{penalty:g}"] = {
            "speedup_vs_sklearn": against["sklearn"]["speedup"],
            "speedup_vs_scipy": against["scipy"]["speedup"],
            "max_objective_gap": max(found["max_objective_gap"] for found in against.values()),
            "against": against,
        }
    return {"chosen_l2_penalty": f"{chosen:g}", "ridges": ridges}


def compare(
    features: TaskFeatures,
    subsets: list[tuple[int, ...]],
    penalty: float,
    call: Callable[..., Array],
    names: Sequence[str],
    repeats: int,
) -> dict[str, Any]:
    """Alternate ours and the best of the others, each at its loosest tolerance that reaches the optimum."""
    problem = OneByOne.prepare(features, subsets, penalty)
    name, tolerance = choose_solver(problem, call, names)
    ours = next(t for t in LADDER if fit_together(problem, penalty, t)[1] <= ACCURACY)
    everything = range(len(subsets))
    seconds: dict[str, list[float]] = {"ours": [], "ours_at_default_tolerance": [], "theirs": []}
    gaps: dict[str, list[float]] = {key: [] for key in seconds}
    for _ in range(repeats):
        for key, measure in (
            ("ours", partial(fit_together, problem, penalty, ours)),
            ("ours_at_default_tolerance", partial(fit_together, problem, penalty, 1e-6)),
            ("theirs", partial(problem.solve, partial(call, name=name, tolerance=tolerance), everything)),
        ):
            took, gap = measure()
            seconds[key].append(took)
            gaps[key].append(gap)
    fit = fit_subsets(features.train, subsets, l2_penalty=penalty, tolerance=ours)
    return {
        "speedup": spread([theirs / mine for mine, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]),
        "solver": name,
        "tolerances": {"ours": ours, "theirs": tolerance},
        "seconds": {key: spread(values) for key, values in seconds.items()},
        "max_objective_gap": max(gaps["ours"]),
        "max_objective_gaps": {key: max(values) for key, values in gaps.items()},
        "certified_gap": float((fit.objective_gaps / fit.objectives).max()),
        "certified_gap_of_optimum": float((problem.optimum.objective_gaps / problem.optimum.objectives).max()),
        "gradient_norm": float(fit.gradient_norms.max()),
        "mean_iterations": float(fit.iterations.mean()),
    }


def choose_solver(problem: OneByOne, call: Callable[..., Array], names: Sequence[str]) -> tuple[str, float]:
    """Return the solver and tolerance that reach the optimum soonest, timed on a few subsets."""
    probes = range(0, len(problem.subsets), max(1, len(problem.subsets) // 8))
    timed = []
    for name in names:
        tolerance = _loosen(problem, call, name, LADDER, probes)
        solver = partial(call, name=name, tolerance=tolerance)
        timed.append((statistics.median(problem.solve(solver, probes)[0] for _ in range(3)), name, tolerance))
    _, name, start = min(timed)
    tighter = [tolerance for tolerance in LADDER if tolerance <= start]
    return name, _loosen(problem, call, name, tighter, range(len(problem.subsets)))


def _loosen(
    problem: OneByOne, call: Callable[..., Array], name: str, ladder: Sequence[float], which: Sequence[int]
) -> float:
    """Return the loosest tolerance that brings every one of the subsets to the optimum."""
    for tolerance in ladder:
        if problem.solve(partial(call, name=name, tolerance=tolerance), which)[1] <= ACCURACY:
            return tolerance
    raise SystemExit(f"{name} does not come within {ACCURACY:g} of the optimum on every subset")


def fit_together(problem: OneByOne, penalty: float, tolerance: float) -> tuple[float, float]:
    """Ours, from blocks of features to predictions; the gap is measured afterwards, by their objective."""
    started = time.perf_counter()
    oracle = Oracle(
        (problem.features,), penalty, EstimationConfig(method="ridge", l2_penalty=penalty, tolerance=tolerance)
    )
    oracle.score(problem.subsets)
    seconds = time.perf_counter() - started
    fit = fit_subsets(problem.features.train, problem.subsets, l2_penalty=penalty, tolerance=tolerance)
    return seconds, max(problem.gap(s, w) for s, w in enumerate(fit.weights))


def fit_large() -> dict[str, Any]:
    """Solve and predict 2,000 subsets of ten among 500 tasks."""
    features = draw_features(500, 20, 5, seed=0)
    subsets = draw_subsets(500, 10, 2000)
    started = time.perf_counter()
    oracle = Oracle((features,), 10.0, EstimationConfig(method="ridge", l2_penalty=10.0))
    oracle.solve(subsets)
    solved = time.perf_counter() - started
    scores = oracle.score(subsets)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "solve_seconds": solved, "converged": float(scores.converged.mean())}


if __name__ == "__main__":
    main()
