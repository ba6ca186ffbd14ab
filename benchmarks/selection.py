"""Source selection, measured: what was chosen against all, none and the most alike, and how far predictions are right.

    python benchmarks/selection.py speed                            # a search forward over 100 sources, no model
    python benchmarks/selection.py costs --seeds 1                  # FLOPs against a search that fine-tunes every set
    python benchmarks/selection.py noise --seeds 3 --minutes 10     # labels of half of one dataset's clusters turned
    python benchmarks/selection.py targets --seeds 2 --minutes 25   # every strategy for each target
    python benchmarks/selection.py truth --targets copa_cut --sets 8 --minutes 8   # predicted against true fine-tunings

Minutes of one core. Everything that was trained is kept under ``--out``: the same command goes on where it was. After
each target, set or seed a record is written of what is there, ``results/selection-PART.json``, which says whether it is
whole.

* ``targets``: test accuracy and loss of the adapter trained on the target and what each strategy chose, and the
  difference to taking all sources, none, and the most alike; the same rows, settings and epochs for all.
* ``truth``: sets of sources, the ones that were chosen among them, fine-tuned from the warm-up, which is what is
  predicted, and from the base model, which is what the final fine-tuning does. Validation rows of the target.
* ``noise``: which clusters were turned is told from what they are worth (area under the curve), from rows one by one,
  and by whether a search takes them.
* ``speed``: planted features, d = 400; seconds of the search alone.
* ``costs``: FLOPs of truly fine-tuning every set that the search forward asks about, over those of all that choosing
  took, with whole datasets as sources and with clusters of them; the true search by the ledger's formulas, not run.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import keep_record, spread
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score

from ensemblelora import stages
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import EstimationConfig, RunConfig, load_config
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.estimation import Oracle, TaskFeatures, TrainingBudget
from ensemblelora.prediction import member_nll
from ensemblelora.seeding import generator_for
from ensemblelora.selection.clusters import cluster_rows
from ensemblelora.selection.costs import list_asked
from ensemblelora.selection.influence import measure_influence
from ensemblelora.selection.prospect import Choice, Prospect
from ensemblelora.selection.request import Request, check_request, without_groups
from ensemblelora.selection.search import Found, SearchSettings, search_forward
from ensemblelora.selection.select import Bench, lay_out, open_bench, select_sources
from ensemblelora.selection.strategies import STRATEGIES, select
from ensemblelora.selection.values import VALUATIONS
from ensemblelora.startpoint import is_warm, settle_training, started_at
from ensemblelora.store import FeatureBlock
from ensemblelora.workspace import open_workspace

RECIPES = Path(__file__).parents[1] / "recipes"
TARGETS = ("copa_cut", "cb_cut", "rte_cut")
"""of the ten, short ones of three kinds; their test rows are cut from the training rows, of which there are more"""
REFERENCES = ("none", "all", "gradients", "texts")
N_SOURCES, N_ROWS, WIDTH = 100, 100, 400
"""of the search that is timed"""


Measured = tuple[dict[str, Any], dict[str, Any]]
"""settings and result of a part, so far"""


def main() -> None:
    """Measure one part, and write its record after each piece."""
    arguments = read_arguments()
    clock = Clock(arguments.minutes)
    measure = {"targets": measure_targets, "truth": measure_truth, "noise": measure_noise, "speed": measure_speed}
    measure["costs"] = measure_costs
    shown = ""
    for config, result in measure[arguments.part](arguments, clock):
        with redirect_stdout(io.StringIO()) as told:
            keep_record(
                f"selection-{arguments.part}",
                config,
                result,
                as_json=arguments.json,
                is_kept=not arguments.leave_record,
            )
        shown = told.getvalue()
    if not shown:
        raise SystemExit("nothing was finished in time; the same command goes on")
    print(shown, end="")


def read_arguments() -> argparse.Namespace:
    """What to measure, and for how long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=("targets", "truth", "noise", "speed", "costs"))
    parser.add_argument("--recipe", type=Path, help="instead of recipes/selection-cpu.yaml, or selection-noisy.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/selection-benchmark"), help="where trainings are kept")
    parser.add_argument("--targets", default=",".join(TARGETS), help="names, or all")
    parser.add_argument("--seeds", type=int, default=3, help="of everything but the choice of rows")
    parser.add_argument("--sets", type=int, default=16, help="of truth: sets of sources, beside those that were chosen")
    parser.add_argument("--clusters", type=int, default=8, help="of noise, or a source's of costs")
    parser.add_argument("--minutes", type=float, default=120.0, help="begin nothing new after so many")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--leave-record", action="store_true", help="write no record under results/")
    return parser.parse_args()


class Clock:
    """Says when to begin nothing new."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self.is_over = False

    def allows(self, what: str) -> bool:
        """Whether there is time for one more thing."""
        if time.monotonic() < self._end:
            print(what, file=sys.stderr, flush=True)
            return True
        self.is_over = True
        print(f"no time left for: {what}", file=sys.stderr, flush=True)
        return False


def read_recipe(arguments: argparse.Namespace, name: str) -> RunConfig:
    """The recipe, with the rows of its own seed whatever the seed of a run is."""
    config = load_config(arguments.recipe or RECIPES / name, tuple(arguments.set))
    data = config.data.model_copy(update={"seed": config.seed if config.data.seed is None else config.data.seed})
    return config.model_copy(update={"data": data})


def at_seed(config: RunConfig, seed: int, out: Path) -> RunConfig:
    """One seed's run folder."""
    return config.model_copy(update={"seed": seed, "out": str(out / f"seed-{seed}")})


def list_targets(arguments: argparse.Namespace, config: RunConfig) -> tuple[str, ...]:
    """Names that were asked for."""
    return tuple(config.data.tasks) if arguments.targets == "all" else tuple(arguments.targets.split(","))


# Every strategy against all, none, the most alike


def measure_targets(arguments: argparse.Namespace, clock: Clock) -> Iterator[Measured]:
    """Select for every target and seed, and average what was tested."""
    config = read_recipe(arguments, "selection-cpu.yaml")
    pieces = [(target, seed) for seed in range(arguments.seeds) for target in list_targets(arguments, config)]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for target, seed in pieces:
        run = at_seed(config, seed, arguments.out)
        place = Path(run.out) / "selection" / target / "selection.json"
        if place.exists() or clock.allows(f"seed {seed}, {target}"):
            # What is there is read back by the call itself, if it is of the same settings.
            found[target, seed] = select_sources(run, target, ["all"]).to_dict()
            kept = {f"{name}, seed {number}": keep_short(one) for (name, number), one in found.items()}
            counts = {"n_targets": len({name for name, _ in found}), "n_found": len(found), "n_asked": len(pieces)}
            whole = len(found) == len(pieces)
            yield describe(config, arguments) | counts, summarize_targets(found) | {"is_whole": whole, "runs": kept}


def summarize_targets(found: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Means over targets and seeds of accuracy, loss, and differences to each reference; and what choosing took."""
    scores = [{name: value for name, value in one["test"]["scores"].items()} for one in found.values()]
    methods = {
        name: {
            "accuracy": mean_of([one[name]["accuracy"] for one in scores]),
            "nll": mean_of([one[name]["nll"] for one in scores]),
        }
        for name in scores[0]
    }
    differences = {
        f"{strategy} - {reference}": average_changes(found, strategy, reference)
        for strategy in STRATEGIES
        for reference in REFERENCES
    }
    speed_ups = [one["costs"]["speed_up"] for one in found.values() if one["costs"]["speed_up"]]
    return {
        "methods": methods,
        "differences": differences,
        "speed_up": spread(speed_ups) if speed_ups else None,
        "n_chosen": {s: mean_of([len(pick(one, s)["sources"]) for one in found.values()]) for s in STRATEGIES},
    }


def average_changes(
    found: Mapping[tuple[str, int], Mapping[str, Any]], strategy: str, reference: str
) -> dict[str, Any]:
    """Mean over targets of each target's mean over seeds; spread over targets, and how many are better."""
    summary: dict[str, Any] = {}
    for metric, sign in (("accuracy", 1.0), ("nll", -1.0)):
        by_target: dict[str, list[float]] = {}
        for (target, _), one in found.items():
            for change in one["test"]["changes"]:
                if (change["a"], change["b"], change["metric"]) == (strategy, reference, metric):
                    by_target.setdefault(target, []).append(change["difference"])
        means = [statistics.fmean(values) for values in by_target.values()]
        if means:
            summary[metric] = spread(means) | {"n_better": sum(sign * mean > 0 for mean in means), "n": len(means)}
    return summary


def keep_short(one: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of one target and seed."""
    chosen = {s["strategy"]: {k: s[k] for k in ("sources", "nll", "gain", "gain_se")} for s in one["strategies"]}
    metrics = ("accuracy", "accuracy_low", "accuracy_high", "nll", "n_examples")
    scores = {name: {k: score[k] for k in metrics} for name, score in one["test"]["scores"].items()}
    return {"chosen": chosen, "baselines": one["baselines"], "scores": scores, "costs": one["costs"]}


def pick(one: Mapping[str, Any], strategy: str) -> Mapping[str, Any]:
    """What one strategy found."""
    return next(found for found in one["strategies"] if found["strategy"] == strategy)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of what is a number."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return statistics.fmean(known) if known else None


def describe(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a record says of its settings."""
    return {"recipe": config.model_dump(mode="json", exclude={"out"}), "seeds": arguments.seeds}


# Predicted against true


_FEWEST_SETS = 3
"""of a target: fewer have no correlation"""


@dataclass(frozen=True)
class TrueSet:
    """One set of sources, predicted and truly fine-tuned; losses of the target's validation rows."""

    sources: tuple[str, ...]
    predicted: float
    from_warmup: float
    from_base: float
    flops: int


def measure_truth(arguments: argparse.Namespace, clock: Clock) -> Iterator[Measured]:
    """Fine-tune sets of sources for every target, and hold the predictions against them."""
    config = read_recipe(arguments, "selection-cpu.yaml")
    targets = list_targets(arguments, config)
    found: dict[str, list[TrueSet]] = {}
    for target in targets:
        request = check_request(at_seed(config, 0, arguments.out), target, ["forward", "backward"])
        if clock.allows(f"truth of {target}"):
            with open_bench(request) as bench:
                for one in fine_tune_sets(bench, request, arguments.sets, clock):
                    found.setdefault(target, []).append(one)
                    if len(found[target]) >= _FEWEST_SETS:
                        yield summarize_truth(found, describe(config, arguments), is_whole=False)
    if any(len(sets) >= _FEWEST_SETS for sets in found.values()):
        whole = not clock.is_over and len(found) == len(targets)
        yield summarize_truth(found, describe(config, arguments), is_whole=whole)


def summarize_truth(found: Mapping[str, list[TrueSet]], about: dict[str, Any], *, is_whole: bool) -> Measured:
    """Agreement by target, and its mean."""
    known = {target: sets for target, sets in found.items() if len(sets) >= _FEWEST_SETS}
    targets = {target: agree(sets) | {"sets": [asdict(one) for one in sets]} for target, sets in known.items()}
    names = [name for name in next(iter(targets.values())) if name != "sets"]
    means = {name: mean_of([one[name] for one in targets.values()]) for name in names}
    counts = {"n_sets": {target: len(sets) for target, sets in known.items()}}
    return about | counts, means | {"is_whole": is_whole, "targets": targets}


def fine_tune_sets(bench: Bench, request: Request, n_sets: int, clock: Clock) -> Iterator[TrueSet]:
    """Fine-tune sets of sources from where they are predicted from, and from the base model."""
    pool, prospect, config = bench.pool, bench.prospect, request.config
    chosen = [select(prospect, name, request.settings).sources for name in request.strategies]
    sets = list_sets(prospect, chosen, n_sets, seed=config.seed)
    predicted = prospect.score(sets).values
    warm = Pool(config, pool.folder / "truth", pool.rows, pool.probe, start_fingerprint=bench.work.start_fingerprint)
    state = stages.train_warmup(bench.work, pool.probe, pool.rows) if is_warm(config) else None
    for choice, value in zip(sets, predicted, strict=True):
        tasks, names = prospect.subset_of(choice), [bench.question.source_names[j] for j in choice]
        if not tasks or not clock.allows(f"  {' + '.join(names) or 'none'}"):
            continue
        cold = pool.train(tasks, judges=(0,))
        truth, flops = cold.validation_nll, cold.flops
        if state is not None:
            with started_at(pool.probe, state):
                trained = warm.train(tasks, settings=settle_training(config), judges=(0,))
                truth, flops = trained.validation_nll, trained.flops
        yield TrueSet(tuple(names), float(value), truth, cold.validation_nll, flops)


def list_sets(prospect: Prospect, chosen: Sequence[Choice], n_sets: int, *, seed: int) -> list[Choice]:
    """None, all, those that were chosen, single sources, and random sets of every size, distinct."""
    n, generator = prospect.n_sources, generator_for(seed, "selection benchmark", "sets")
    wanted: dict[Choice, None] = dict.fromkeys([(), prospect.everything, *chosen])
    n_wanted = min(len(wanted) + n_sets, 2**n)
    for j in generator.permutation(n).tolist()[: n_sets // 2]:
        wanted.setdefault((j,))
    while len(wanted) < n_wanted:
        size = int(generator.integers(1, n + 1))
        wanted.setdefault(tuple(sorted(generator.choice(n, size, replace=False).tolist())))
    return list(wanted)


def agree(sets: Sequence[TrueSet]) -> dict[str, Any]:
    """How predicted losses agree with true ones, over sets of one target's sources."""
    predicted, true = np.array([one.predicted for one in sets]), np.array([one.from_warmup for one in sets])
    base = np.array([one.from_base for one in sets])
    return {
        "relative_error": float(np.mean(np.abs(predicted - true) / true)),
        "relative_error_of_mean": float(np.mean(np.abs(true.mean() - true) / true)),
        "pearson": correlate(pearsonr, predicted, true),
        "spearman": correlate(spearmanr, predicted, true),
        "spearman_base": correlate(spearmanr, predicted, base),
        "regret": float(true[predicted.argmin()] - true.min()),
        "regret_of_all": float(true[max(range(len(sets)), key=lambda s: len(sets[s].sources))] - true.min()),
        "spread": float(true.std(ddof=1)),
    }


def correlate(kind: Callable[..., Any], a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    """A correlation; none where one of the two does not vary."""
    return float(kind(a, b).statistic) if np.ptp(a) > 0 < np.ptp(b) else None


# Noisy parts of one dataset


def measure_noise(arguments: argparse.Namespace, clock: Clock) -> Iterator[Measured]:
    """Turn the labels of half of a dataset's clusters, and see whether they are found."""
    config = read_recipe(arguments, "selection-noisy.yaml")
    found: dict[str, dict[str, Any]] = {}
    for seed in range(arguments.seeds):
        if clock.allows(f"noise, seed {seed}"):
            found[f"seed {seed}"] = find_noise(config, seed, arguments)
            names = dict.fromkeys(name for one in found.values() for name in one if name != "chosen")
            numbers = {name: spread([one[name] for one in found.values() if name in one]) for name in names}
            about = describe(config, arguments) | {"n_clusters": arguments.clusters, "n_found": len(found)}
            yield about, numbers | {"is_whole": len(found) == arguments.seeds, "runs": dict(found)}


def find_noise(config: RunConfig, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One seed: clusters on the clean features, half of them turned, values and choices with the wrong labels."""
    run = at_seed(config, seed, arguments.out / "noise")
    labels = cluster_clean(run, arguments.clusters)
    turned = generator_for(seed, "selection benchmark", "noise").permutation(labels.max() + 1)[
        : (labels.max() + 1) // 2
    ]
    is_wrong = np.isin(labels, turned)
    with open_turned(run, labels, is_wrong, arguments.clusters) as (bench, request):
        return judge_noise(bench, request, is_wrong, set(turned.tolist()))


def cluster_clean(config: RunConfig, n_clusters: int) -> npt.NDArray[np.int64]:
    """Clusters of the one dataset's training rows, on features of the rows as they are."""
    clean = config.model_copy(update={"out": f"{config.out}-clean"})
    _, rows, probe = stages.prepare(without_groups(clean))
    start = stages.identify_start(clean, probe, rows)
    with open_workspace(clean, until="", start_fingerprint=start) as work:
        store = stages.take_features(work, probe, rows)
        return cluster_rows(store.read(rows.names[0], "train"), n_clusters, seed=config.seed)
    raise AssertionError("a workspace without a last stage is left at its end")


@contextmanager
def open_turned(
    config: RunConfig, labels: npt.NDArray[np.int64], is_wrong: npt.NDArray[np.bool_], n_clusters: int
) -> Iterator[tuple[Bench, Request]]:
    """The same dataset with wrong labels where it says so; validation and test rows stay right."""
    _, rows, probe = stages.prepare(without_groups(config))
    target = rows.names[0]
    rows = replace(rows, train=(turn_labels(rows.train[0], is_wrong, seed=config.seed),))
    request = check_request(config, target, ["all"], n_clusters=n_clusters, includes_target=False)
    start = stages.identify_start(config, probe, rows)
    with open_workspace(request.config, until="", start_fingerprint=start) as work:
        probe = stages.keep_lower_layers(config, work.path, probe, rows)
        store = stages.take_features(work, probe, rows)
        yield lay_out(request, work, probe, rows, store, {0: labels}), request
        stages.drop_lower_layers(work.path)


def turn_labels(split: EncodedSplit, is_wrong: npt.NDArray[np.bool_], *, seed: int) -> EncodedSplit:
    """Give some rows another choice's label, any of the wrong ones."""
    steps = generator_for(seed, "selection benchmark", "labels").integers(1, split.n_choices)
    labels = np.where(is_wrong, (split.labels + steps) % split.n_choices, split.labels)
    return replace(split, labels=labels.astype(np.int64))


def judge_noise(bench: Bench, request: Request, is_wrong: npt.NDArray[np.bool_], turned: set[int]) -> dict[str, Any]:
    """Areas under the curve, what was chosen, and the test accuracy that this gives."""
    is_clean = [j not in turned for j in range(len(bench.question.sources))]
    result: dict[str, Any] = {"chosen": {}}
    for name in STRATEGIES:
        found = select(bench.prospect, name, request.settings)
        result["chosen"][name] = list(found.sources)
        result[f"share_noisy_{name}"] = sum(j in turned for j in found.sources) / max(1, len(found.sources))
        if name in VALUATIONS:
            values = [-np.inf if value is None else value for value in found.values]
            result[f"auc_{name}"] = float(roc_auc_score(is_clean, np.nan_to_num(values, neginf=-1e9)))
    influence = measure_influence(bench.prospect)
    places = np.concatenate([source.rows for source in bench.question.sources if source.rows is not None])
    rows = np.concatenate([one.values for one in influence])
    result["auc_rows"] = float(roc_auc_score(~is_wrong[places], rows))
    searched = {name: tuple(result["chosen"][name]) for name in ("forward", "backward")}
    clean = tuple(j for j, right in enumerate(is_clean) if right)
    sets = {**searched, "all": bench.prospect.everything, "clean": clean}
    for name, choice in sets.items():
        if choice:
            trained = bench.pool.train(bench.prospect.subset_of(choice), judges=(0,))
            with bench.pool.open_tests():
                scores, split = bench.pool.score([trained.name], 0, "test"), bench.pool.split(0, "test")
            result[f"accuracy_{name}"] = float((scores.values[0].argmax(axis=1) == split.labels).mean())
            result[f"nll_{name}"] = float(member_nll(scores, split.labels).mean())
    return result


# FLOPs of a search


def measure_costs(arguments: argparse.Namespace, clock: Clock) -> Iterator[Measured]:
    """Count what choosing takes against a search that fine-tunes, with few sources and with many."""
    config = read_recipe(arguments, "selection-cpu.yaml")
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"whole": {}, "clusters": {}}
    pieces = [(seed, target) for seed in range(arguments.seeds) for target in list_targets(arguments, config)]
    for number, (seed, target) in enumerate(pieces, start=1):
        for kind, n_clusters in (("whole", None), ("clusters", arguments.clusters)):
            if not clock.allows(f"seed {seed}, {target}, {kind}"):
                return
            run = at_seed(config, seed, arguments.out / f"costs-{kind}")
            one = select_sources(run, target, ["forward"], n_clusters=n_clusters, wants_final=False).to_dict()
            counts = {"n_sources": len(one["sources"]), "n_chosen": len(pick(one, "forward")["sources"])}
            found[kind].setdefault(target, []).append(counts | one["costs"])
        summary = {kind: summarize_costs(by_target) for kind, by_target in found.items()}
        yield (
            describe(config, arguments) | {"n_clusters": arguments.clusters},
            {
                "speed_up": summary["clusters"]["speed_up"],
                "is_whole": number == len(pieces),
                **summary,
            },
        )


def summarize_costs(by_target: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Spread over targets and seeds, and the numbers of each."""
    every = [one for found in by_target.values() for one in found]
    return {
        "speed_up": spread([one["speed_up"] for one in every]),
        "n_sources": mean_of([one["n_sources"] for one in every]),
        "n_chosen": mean_of([one["n_chosen"] for one in every]),
        "runs": dict(by_target),
    }


# Time of a search


def measure_speed(arguments: argparse.Namespace, clock: Clock) -> Iterator[Measured]:
    """Time a search forward from a finished store, by either kind of fit."""
    n_epochs = 3
    config = {"n_sources": N_SOURCES, "rows_a_source": N_ROWS, "proj_dim": WIDTH, "n_validation": 200,
              "epochs": n_epochs}  # fmt: skip
    result: dict[str, Any] = {}
    features = plant_sources()
    for name in ("ridge", "steps"):
        if clock.allows(name):
            seconds, searches, counts = [], [], []
            for seed in range(arguments.seeds):
                prospect = make_planted(features, name, seed)
                started = time.perf_counter()
                searches.append(search_forward(prospect, SearchSettings(seed=seed)))
                seconds.append(time.perf_counter() - started)
                counts.append(count_rows(prospect, searches[-1], n_epochs))
            result[f"forward_{name}_seconds"] = statistics.fmean(seconds)
            result[f"forward_{name}_rows_saved"] = statistics.fmean(counts)
            result[name] = {"seconds": spread(seconds), "n_chosen": [len(one.choice) for one in searches]}
            yield config, {**result, "is_whole": name == "steps"}


def count_rows(prospect: Prospect, found: Found, n_epochs: int) -> float:
    """Rows that truly fine-tuning every set asked about would pass, over those of a warm-up and a gradient pass.

    A warm-up of half the epochs on all sources; gradients of every training and validation row once; every pass counts
    as much as one of training. The fits are left out: no row passes the model.
    """
    first = prospect.oracle.replicates[0]
    rows = [block.n_examples for block in first.train]
    asked = list_asked(prospect, found, None)
    true = n_epochs * sum(rows[task] for chosen in asked for task in prospect.subset_of(chosen))
    return true / (sum(rows) * (n_epochs / 2 + 1) + first.validation[0].n_examples)


def plant_sources(n_sources: int = N_SOURCES, n_rows: int = N_ROWS, width: int = WIDTH) -> TaskFeatures:
    """A target and sources of one linear rule, some with a quarter of their labels wrong, some with half."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=width) / width**0.5

    def plant(name: str, split: str, n: int, noise: float) -> FeatureBlock:
        rows = rng.normal(size=(n, 1, width)).astype(np.float32)
        labels = (rows[:, 0] @ truth + 0.3 * rng.logistic(size=n) > 0).astype(np.int64)
        labels = np.where(rng.random(n) < noise, 1 - labels, labels)
        norms = (rows**2).sum(axis=(1, 2))
        ids = tuple(f"{split}:{e}" for e in range(n))
        return FeatureBlock(name, split, "margin", np.zeros((n, 1), np.float32), rows, labels, np.full(n, 2),
                            norms, np.arange(n), ids)  # fmt: skip

    names = ["target", *(f"source{j}" for j in range(n_sources))]
    noises = [0.0, *((0.0, 0.25, 0.5, 0.5)[j % 4] for j in range(n_sources))]
    held = plant("target", "validation", 200, 0.0)
    train = tuple(plant(name, "train", n_rows, noise) for name, noise in zip(names, noises, strict=True))
    return TaskFeatures(train, tuple(replace(held, task=name) for name in names))


def make_planted(features: TaskFeatures, method: str, seed: int) -> Prospect:
    """An oracle of planted features, trained as a small model would be."""
    n_tasks = len(features.train)
    budget = TrainingBudget(
        learning_rate=0.002,
        num_train_epochs=3,
        evaluations_per_epoch=1,
        warmup_ratio=0.06,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1e9,
        steps_per_epoch=(N_ROWS / 16,) * n_tasks,
        n_coordinates=float(WIDTH),
        seed=seed,
    )
    config = EstimationConfig(
        method="steps" if method == "steps" else "ridge", l2_penalty="auto" if method == "steps" else 1.0
    )
    return Prospect(Oracle((features,), 1.0, config, (), budget, (0,)))


if __name__ == "__main__":
    main()
