"""Ways to turn gradients into a prediction of fine-tuning, all held against the same true fine-tunings.

    ensemblelora validate RUN --subsets 50 --seeds 2   # hours; what is measured is kept
    python benchmarks/calibration.py RUN --json

A fully converged fit is not what a few epochs of AdamW give. Compared are, at d = 400 where nothing else is said
(``exact``: no projection),

* ``ridge``: converged (the smallest penalty), chosen by predicted validation loss, and by a pilot: the penalty at which
  the fit of all tasks is as long as the true fine-tuning of all tasks went.
* ``fixed norm``: GradEx's, every fit scaled to one length, the pilot's.
* ``steps``: the linear model trained with the trainer's own steps, rate and schedule, as far as all trained numbers
  move together; as far as those with a gradient move alone; and with the rate multiplied so that the pilot's distance,
  or its losses, come out.
* features: ``plain``; ``logodds``, gold-token log-odds among the labels instead of class contrasts; ``adam``, every
  coordinate divided by the fourth root of its second moment in 24 batches, AdamW's own geometry; ``warmup``, taken
  after one epoch on all tasks together, where A has a gradient too.
* ``forward``: the ridge's step restored by its dual variables, and the model really run there.

The pilot is one true fine-tuning, of all tasks, first seed; its FLOPs are stated. Features and second moments of the
variants are kept in ``RUN/validation/variants``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import keep_record, make_parser
from scipy.optimize import brentq
from variants_of_features import FEATURES, SAME_COORDINATES, make_variant

from ensemblelora import artifacts, stages
from ensemblelora.adapters import THETA0, AdaptedModel, adapter_state, add_adapter, remove_adapter
from ensemblelora.blocks import FeatureBlock, slice_projections
from ensemblelora.boosting.direction import sum_gradients
from ensemblelora.config import EstimationConfig, RunConfig, load_config
from ensemblelora.estimation import (
    Oracle,
    SubsetScores,
    TaskFeatures,
    TrainingBudget,
    build_oracle,
    fit_subsets,
    predict_outcomes,
)
from ensemblelora.estimation.loss import LinearRows, compute_logits, compute_probabilities
from ensemblelora.prediction import member_nll, predict_members
from ensemblelora.progress import track
from ensemblelora.validation.agreement import compare_predictions
from ensemblelora.validation.dimensions import collect_wider
from ensemblelora.validation.records import TrueRun, read_all_runs
from ensemblelora.validation.table import Truth, mean_over_seeds, tabulate
from ensemblelora.validation.truth import measure_base
from ensemblelora.validation.validate import TRUTH_FILE, VALIDATION_FOLDER, count_costs

FloatArray = npt.NDArray[np.float64]
DIM = 400
CONVERGED = 1e-3
"""the penalty of a fit that nothing holds back, in curvature units"""
RESTORED = "restored"
FIGURES = (
    "relative_error",
    "rmse",
    "pearson",
    "spearman",
    "within_pearson",
    "corrected_within_pearson",
    "reliability",
    "ceiling_within_pearson",
    "r2_over_base",
    "r2_over_task_mean",
    "r2_over_other_mean",
    "r2_of_differences",
    "slope",
)
COLUMNS = {
    "relative error": ("all sizes", "relative_error"),
    "R2 over base": ("all sizes", "r2_over_base"),
    "R2 over task mean": ("all sizes", "r2_over_task_mean"),
    "within tasks": ("all sizes", "within_pearson"),
    "corrected": ("all sizes", "corrected_within_pearson"),
    "within, subsets of 3": ("3", "within_pearson"),
    "slope": ("all sizes", "slope"),
}
"""of the printed table"""


@dataclass(frozen=True)
class Measured:
    """A validated run and everything measured on it."""

    config: RunConfig
    rows: stages.Rows
    probe: AdaptedModel
    truth: Truth
    distances: FloatArray
    """of the first seed's trained weights from theta0, ``(k,)``"""
    runs: tuple[TrueRun, ...]
    pilot: TrueRun


def main() -> None:
    """Predict the measured subsets in every way, and print one table."""
    parser = make_parser(__doc__, rows=None, repeats="forward", n_repeats=20)
    parser.add_argument("run", type=Path, help="a run folder that `ensemblelora validate` has measured")
    parser.add_argument("--features", default=",".join(FEATURES), help="which kinds of features")
    arguments = parser.parse_args()
    measured = read_measured(arguments.run)
    found: list[dict[str, Any]] = []
    print(
        "| predictor |",
        " | ".join([*COLUMNS, "the same, above chance", "all - alone", "distance ratio"]),
        "|",
        file=sys.stderr,
    )
    print("|---" * (len(COLUMNS) + 4) + "|", file=sys.stderr)
    chosen = [name for name in FEATURES if name in arguments.features.split(",")]
    for name, predicted, distances, multiplier in predict(arguments.run, measured, chosen, arguments.forward):
        found.append({"predictor": name, "rate": multiplier} | describe(measured, predicted, distances))
        print(format_row(found[-1]), file=sys.stderr, flush=True)
    n_seeds = np.isfinite(measured.truth.nll).any(axis=2).sum(axis=0)
    config = {
        "proj_dim": DIM,
        "n_subsets": len(measured.truth.subsets),
        "subsets_by_number_of_seeds": {str(n): int((n_seeds == n).sum()) for n in np.unique(n_seeds)},
        "at_chance": [measured.truth.tasks[i] for i in measured.truth.marked],
        "pilot_flops": measured.pilot.flops,
        "run": measured.config.model_dump(mode="json", exclude={"out"}),
    }
    costs = asdict(count_costs(arguments.run, measured.config, measured.runs, measured.truth.tasks))
    keep_record("calibration", config, {"predictors": found, "costs": costs}, as_json=arguments.json)


def read_measured(path: Path) -> Measured:
    """Load the run and its true fine-tunings; nothing is trained."""
    config = load_config(path / artifacts.CONFIG_FILE)
    _, rows, probe = stages.prepare(config)
    place = path / VALIDATION_FOLDER / TRUTH_FILE
    runs = read_all_runs(place)
    if not runs:
        raise SystemExit(f"{place}: no fine-tunings of this run; first: ensemblelora validate {path}")
    probe = stages.keep_lower_layers(config, path, probe, rows)
    base = measure_base(place, stages.identify_start(config, probe), probe, rows, config)
    truth = tabulate(runs, base, tuple(base.nll), confidence=config.evaluation.confidence)
    first = {run.tasks: run for run in runs if run.seed == 0}
    names = [tuple(truth.tasks[i] for i in subset) for subset in truth.subsets]
    distances = np.array([first[name].distance if name in first else np.nan for name in names])
    return Measured(config, rows, probe, truth, distances, runs, first[truth.tasks])


Prediction = tuple[str, FloatArray, FloatArray | None, float | None]
"""name, losses ``(k, n)``, distances ``(k,)``, multiplier of the rate"""


def predict(path: Path, measured: Measured, chosen: Sequence[str], n_forward: int) -> Iterator[Prediction]:
    """Yield every way's predictions of all measured subsets; NaN where one was not tried."""
    truth = measured.truth
    shape = (len(truth.subsets), 1)
    yield "base model", np.tile(truth.base_nll, shape), None, None
    yield "mean over all true fine-tunings", np.tile(np.nanmean(mean_over_seeds(truth.nll), axis=0), shape), None, None
    folders = {"plain": path / artifacts.FEATURES_FOLDER}
    for name in chosen:
        folder = folders.get(name, path / VALIDATION_FOLDER / "variants" / name)
        variant = make_variant(name, folder, measured.config, measured.rows, measured.probe)
        features, budget = cut(variant.features, DIM), variant.budget
        yield from predict_ridge(name, features, measured)
        yield from predict_steps(name, features, budget, measured)
        if name == "plain":
            for dim in (100, 200, 800):
                yield from predict_steps(f"{name}, d = {dim}", cut(variant.features, dim), budget, measured)
            oracle = stages.read_oracle(path, measured.truth.tasks, measured.config.estimation)
            wider = collect_wider(path, path / VALIDATION_FOLDER, oracle, measured.config)
            if "exact" in wider:
                yield from predict_steps(f"{name}, exact", wider["exact"], budget, measured)
            yield restore(features, measured, n_subsets=n_forward)


def cut(features: TaskFeatures, dim: int) -> TaskFeatures:
    """The same gradients projected to fewer numbers."""
    train, validation = (
        tuple(slice_projections(block, min(dim, block.proj_dim), 0) for block in blocks)
        for blocks in (features.train, features.validation)
    )
    return TaskFeatures(train, validation)


def predict_ridge(name: str, features: TaskFeatures, measured: Measured) -> Iterator[Prediction]:
    """Yield the convex fits: converged, chosen by validation, and chosen or scaled by the pilot."""
    subsets = measured.truth.subsets

    def fit(penalty: float) -> SubsetScores:
        return Oracle((features,), penalty, EstimationConfig(method="ridge")).score(subsets)

    scores = fit(CONVERGED)
    yield f"{name}: ridge, converged", scores.nll, scores.distances, None
    chosen = build_oracle([features], EstimationConfig(method="ridge"), subsets=subsets).l2_penalty
    scores = fit(chosen)
    yield f"{name}: ridge, by validation ({chosen:g})", scores.nll, scores.distances, None
    scores = pick(measured, (fit(penalty) for penalty in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)))
    yield f"{name}: ridge, by the pilot's losses ({scores.l2_penalty:g})", scores.nll, scores.distances, None
    if name in SAME_COORDINATES:
        target = measured.pilot.distance
        penalty = find_zero(lambda value: np.log(length_of_all(features, value) / target), 1e-3, 1e5)
        scores = fit(penalty)
        yield f"{name}: ridge, by the pilot's distance ({penalty:.2g})", scores.nll, scores.distances, None
        weights = fit_subsets(features.train, subsets, l2_penalty=chosen).weights
        weights *= (target / np.linalg.norm(weights, axis=1))[:, None]
        yield f"{name}: fixed norm, the pilot's", ask(features, weights), np.linalg.norm(weights, axis=1), None


def predict_steps(
    name: str, features: TaskFeatures, budget: TrainingBudget, measured: Measured
) -> Iterator[Prediction]:
    """Yield the simulated training as it is, and at rates that the pilot tells."""
    subsets = measured.truth.subsets

    def simulate(rate: float, asked: Sequence[tuple[int, ...]]) -> SubsetScores:
        changed = replace(budget, learning_rate=rate * budget.learning_rate)
        return Oracle((features,), 0.0, EstimationConfig(method="steps"), budget=changed).score(asked)

    scores = simulate(1.0, subsets)
    yield f"{name}: steps", scores.nll, scores.distances, 1.0
    scores = simulate(1 / budget.reach, subsets)
    yield f"{name}: steps, numbers with a gradient alone", scores.nll, scores.distances, 1 / budget.reach
    everything = [tuple(range(len(measured.truth.tasks)))]
    rates = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    errors = [pilot_error(measured, simulate(rate, everything).nll[0]) for rate in rates]
    rate = rates[int(np.argmin(errors))]
    scores = simulate(rate, subsets)
    yield f"{name}: steps, rate by the pilot's losses", scores.nll, scores.distances, rate
    if name in SAME_COORDINATES:
        target = measured.pilot.distance
        rate = find_zero(lambda value: np.log(simulate(value, everything).distances[0] / target), 0.1, 10.0)
        scores = simulate(rate, subsets)
        yield f"{name}: steps, rate by the pilot's distance", scores.nll, scores.distances, rate


def find_zero(function: Callable[[float], float], low: float, high: float) -> float:
    """A zero of a function of a positive number, to two per cent."""
    return float(np.exp(brentq(lambda log: function(float(np.exp(log))), np.log(low), np.log(high), xtol=0.02)))


def length_of_all(features: TaskFeatures, penalty: float) -> float:
    """How far the fit of all tasks goes."""
    everything = [tuple(range(len(features.train)))]
    return float(np.linalg.norm(fit_subsets(features.train, everything, l2_penalty=penalty).weights))


def pick(measured: Measured, candidates: Iterable[SubsetScores]) -> SubsetScores:
    """The candidate that is nearest to the pilot."""
    place = measured.truth.subsets.index(tuple(range(len(measured.truth.tasks))))
    return min(candidates, key=lambda scores: pilot_error(measured, scores.nll[place]))


def pilot_error(measured: Measured, predicted: FloatArray) -> float:
    """Mean squared error of predicted losses ``(n,)`` of the tasks, all trained together."""
    true = np.array([np.mean(measured.pilot.nll[name]) for name in measured.truth.tasks])
    return float(np.mean((predicted - true) ** 2))


def ask(features: TaskFeatures, weights: FloatArray) -> FloatArray:
    """Mean validation loss of every task at given weights, ``(k, n)``."""
    return np.stack([predict_outcomes(block, weights).nll.mean(axis=1) for block in features.validation], axis=1)


def restore(features: TaskFeatures, measured: Measured, *, n_subsets: int) -> Prediction:
    """Run the model at theta0 plus the ridge's step, expanded by its dual variables, for some of the subsets."""
    truth, config = measured.truth, measured.config
    penalty = build_oracle([features], EstimationConfig(method="ridge"), subsets=truth.subsets).l2_penalty
    fit = fit_subsets(features.train, truth.subsets, l2_penalty=penalty)
    losses, distances = np.full((len(truth.subsets), len(truth.tasks)), np.nan), np.full(len(truth.subsets), np.nan)
    chosen = np.unique(np.linspace(0, len(truth.subsets) - 1, n_subsets).round().astype(int))
    for s in track(list(chosen), "restored weights"):
        subset, n_rows = truth.subsets[s], sum(features.train[i].n_examples for i in truth.subsets[s])
        duals = [find_duals(features.train[i], fit.weights[s], fit.penalties[s] * n_rows) for i in subset]
        weighted = [
            (measured.rows.train[i], features.train[i].mode, alpha) for i, alpha in zip(subset, duals, strict=True)
        ]
        step = sum_gradients(measured.probe, THETA0, weighted, max_tokens=config.gradients.max_tokens_per_batch)
        start = adapter_state(measured.probe, THETA0)
        add_adapter(measured.probe, RESTORED, {key: start[key] + step[key] for key in start})
        distances[s] = sum(float(tensor.double().pow(2).sum()) for tensor in step.values()) ** 0.5
        for i in subset:
            split = measured.rows.validation[i]
            scores = predict_members(
                measured.probe, split, [RESTORED], max_tokens=config.evaluation.max_tokens_per_batch
            )
            losses[s, i] = member_nll(scores, split.labels)[0].mean()
        remove_adapter(measured.probe, RESTORED)
    return f"plain: ridge, by validation ({penalty:g}), forward pass", losses, distances, None


def find_duals(block: FeatureBlock, weights: FloatArray, scale: float) -> FloatArray:
    """Alpha ``(n, c)`` of one task's rows; at the optimum ``w = sum_s alpha_s J_s`` over all rows of the subset."""
    rows = LinearRows.from_block(block)
    residual = compute_probabilities(compute_logits(rows, weights[None]))[0][:, :, 0]
    residual[np.arange(len(rows.labels)), rows.labels] -= 1.0
    return -(residual @ rows.decoder) / scale


def describe(measured: Measured, predicted: FloatArray, distances: FloatArray | None) -> dict[str, Any]:
    """How predicted losses agree with the measured ones: of all tasks, and of those above chance."""
    found: dict[str, Any] = {"n_subsets": int(np.isfinite(predicted).any(axis=1).sum())}
    for name, marked in (("all tasks", ()), ("above chance", measured.truth.marked)):
        found[name] = compare(measured, predicted, marked)
    if distances is not None:
        moved = measured.distances > 0  # a training that only did harm has kept its start
        found["distance_ratio"] = float(np.nanmean(distances[moved] / measured.distances[moved]))
    return found


def compare(measured: Measured, predicted: FloatArray, marked: Sequence[int]) -> dict[str, Any]:
    """Figures by size of subset, without the marked tasks."""
    truth = measured.truth
    asked = np.isfinite(predicted).any(axis=1)
    subsets = [subset for subset, is_asked in zip(truth.subsets, asked, strict=True) if is_asked]
    agreement = compare_predictions(
        truth.nll[:, asked],
        np.where(np.isfinite(predicted[asked]), predicted[asked], 0.0),
        subsets,
        truth.base_nll,
        marked=marked,
        confidence=measured.config.evaluation.confidence,
        seed=measured.config.seed,
    )
    found: dict[str, Any] = {}
    for place, figures in (("all sizes", agreement.overall), *agreement.by_size.items()):
        found[str(place)] = {name: asdict(getattr(figures, name)) for name in FIGURES}
    if agreement.one_or_all is not None:
        both = {"predicted": agreement.one_or_all.predicted_mean, "true": agreement.one_or_all.true_mean}
        found["all_together_minus_alone"] = {name: asdict(estimate) for name, estimate in both.items()}
    return found


def format_row(entry: dict[str, Any]) -> str:
    """One line of a Markdown table."""

    def show(value: float | None, form: str = ".3f") -> str:
        return "" if value is None else format(value, form)

    every, some = entry["all tasks"], entry["above chance"]
    cells = [every.get(place, {}).get(name, {}).get("value") for place, name in COLUMNS.values()]
    cells.append(some.get("3", {}).get("within_pearson", {}).get("value"))
    signs = every.get("all_together_minus_alone")
    told = f"{signs['predicted']['value']:+.3f} (true {signs['true']['value']:+.3f})" if signs else ""
    return (
        f"| {entry['predictor']} | " + " | ".join([*map(show, cells), told, show(entry.get("distance_ratio"))]) + " |"
    )


if __name__ == "__main__":
    main()
