"""Source selection for one target, from a config to tested adapters: read :func:`select_sources` first.

In: a config that names the target and the sources as tasks. Out: :class:`~.record.SelectionRecord`, and in the run
folder the warm-up and features as any run has them, and for each target ``selection/TARGET/``: ``selection.json``,
``selection.md``, ``oracle.json`` (to search again without a model), ``samples.jsonl`` where rows were valued, and the
adapters. Features and warm-up don't depend on the target, so that another target in the same folder costs only
searches and final fine-tunings. Stopped at any moment, the same call goes on where it was.

Cost: a warm-up (some epochs on all tasks), a gradient pass over all rows, searches (seconds), and a fine-tuning for
each distinct set that was chosen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts, progress, stages
from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.adapters import AdaptedModel
from ensemblelora.comparison.crew import hire
from ensemblelora.comparison.likeness import compare_texts
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import RunConfig
from ensemblelora.data.subset import list_rows
from ensemblelora.scheduling import Cluster, open_scheduler
from ensemblelora.selection.caveats import RIVALS, find_better, list_caveats
from ensemblelora.selection.clusters import cluster_rows
from ensemblelora.selection.costs import count_new, count_search, count_true_search
from ensemblelora.selection.final import score_finals, train_finals
from ensemblelora.selection.folder import describe_asked, set_aside
from ensemblelora.selection.influence import measure_influence
from ensemblelora.selection.page import write_page
from ensemblelora.selection.prospect import Choice, Prospect, unless_nan
from ensemblelora.selection.question import SELECTION_FOLDER, Question, make_prospect, write_question
from ensemblelora.selection.quotes import quote_typical
from ensemblelora.selection.record import (
    RECORD_FILE,
    SAMPLES_FILE,
    Costs,
    Final,
    FinalTable,
    RowSummary,
    SelectionRecord,
    SourceRecord,
)
from ensemblelora.selection.request import Request, check_request, check_tasks, settle_target, without_groups
from ensemblelora.selection.search import SearchSettings
from ensemblelora.selection.similarity import compare_gradients, take_most_alike
from ensemblelora.selection.sources import Source, cut_splits, find_target, list_sources
from ensemblelora.selection.strategies import DEFAULT_STRATEGY, Selection, select
from ensemblelora.stages import Rows
from ensemblelora.startpoint import is_warm, settle_training, started_at
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import Workspace, check_place, open_workspace

__all__ = ["Bench", "lay_out", "open_bench", "select_sources", "warmed_up"]

_TEXTS = 64  # rows of a source whose texts are compared; their mean moves little with more
_REFERENCES = ("none", "all", "gradients", "texts", "base")


@dataclass(frozen=True, eq=False)
class Bench:
    """One target's question, ready to be searched.

    Attributes:
        question: Target and sources.
        prospect: Predicts any set of sources.
        pool: Trains and scores; task 0 is the target, task 1 + j source j; theta0 is the base model.
        identity: Of everything that predictions depend on.
        work: The open run folder.
        store: The features of all datasets.
        earlier: What the run folder's stages had cost before this command, by name.
    """

    question: Question
    prospect: Prospect
    pool: Pool
    identity: str
    work: Workspace
    store: FeatureStore
    earlier: Mapping[str, StageRecord] = field(default_factory=dict)


def select_sources(
    config: RunConfig,
    target: str,
    strategies: Sequence[str] = (DEFAULT_STRATEGY,),
    *,
    settings: SearchSettings | None = None,
    includes_target: bool | None = None,
    n_clusters: int | None = None,
    wants_samples: bool = False,
    wants_final: bool = True,
    cluster: Cluster | None = None,
) -> SelectionRecord:
    """Choose the sources that help a target, fine-tune on them, and test that against taking all, none, the most alike.

    Args:
        config: Tasks, model, adapter, training; ``out`` is the run folder. ``gradients.linearize_at: auto`` stands for
            a warm-up.
        target: The name of the task that counts; the others are sources.
        strategies: Names of :data:`~.strategies.STRATEGIES`, or ``all``.
        settings: Of the searches; none: sizes and number of random sets as the config's affinity has them.
        includes_target: Whether the target's training rows are in every set, instead of being a source like any other;
            none: unless clusters of them are the only sources.
        n_clusters: Cut every source's rows into so many clusters, each a source; none: whole datasets.
        wants_samples: Also value every training row.
        wants_final: False leaves out the fine-tunings at the end.
        cluster: Where features are taken and these fine-tunings run side by side; none: in this process.

    Raises:
        UsageError: If a name or number is wrong, there is nothing to choose from, or config, data or model are wrong.
        OutputError: If the run folder can't be written, is something else, or is in use.
        EnsembleLoraError: If a stage fails; what was finished is kept.

    Reference:
        Li et al., "Scalable Fine-tuning from Multiple Data Sources: A First-Order Approximation Approach", EMNLP
        Findings 2024 (GradEx).
    """
    request = check_request(
        *(config, target, strategies, settings),
        includes_target=includes_target,
        n_clusters=n_clusters,
        wants_samples=wants_samples,
        wants_final=wants_final,
    )
    with open_bench(request, cluster) as bench:
        asked = describe_asked(request, bench.identity)
        kept = set_aside(bench.pool.folder, asked)
        write_question(bench.pool.folder, bench.question, bench.prospect.oracle)
        found = _search(bench, request, request.strategies)
        rivals = _search(bench, request, [name for name in RIVALS if name not in request.strategies])
        with progress.stage("likeness to the target"):
            likeness = _measure_likeness(bench)
        taken = _take_baselines(bench, found, likeness)
        record = replace(_describe(bench, request, found, rivals, taken, likeness), asked=asked, set_aside=kept)
        if request.wants_samples:
            with progress.stage("rows one by one"):
                record = replace(record, rows=_value_rows(bench, record.folder))
        if request.wants_final:
            with progress.stage("fine-tuning on what was chosen"):
                finals, table = _finish(bench, found, taken)
            record = replace(record, finals=finals, test=table)
        artifacts.write_json(record.folder / RECORD_FILE, record.to_dict())
        write_page(record)
    return record


@contextmanager
def open_bench(request: Request, cluster: Cluster | None = None) -> Iterator[Bench]:
    """Open the run folder, take warm-up and features or read them back, and lay out the question.

    Raises:
        UsageError: If config, data or model are wrong.
        OutputError: If the run folder can't be written, is something else, or is in use.
    """
    config = request.config
    check_place(Path(config.out))
    tasks, rows, probe = stages.prepare(without_groups(config), check=partial(check_tasks, request))
    start = stages.identify_start(config, probe, rows)
    with (
        open_scheduler(cluster) as scheduler,
        open_workspace(config, until="", start_fingerprint=start, scheduler=scheduler) as work,
    ):
        earlier = {record.stage: record for record in work.ledger.stages}
        (work.path / SELECTION_FOLDER).mkdir(exist_ok=True)
        stages.describe_run(work, tasks, rows, probe)
        probe = stages.keep_lower_layers(config, work.path, probe, rows)
        with warmed_up(work, probe, rows):
            store = stages.take_features(work, probe, rows, judges=(request.target,))
        yield replace(lay_out(request, work, probe, rows, store), earlier=earlier)
        stages.drop_lower_layers(work.path)


@contextmanager
def warmed_up(work: Workspace, probe: AdaptedModel, rows: Rows) -> Iterator[None]:
    """Let theta0 be where features are taken; afterwards it is the base model again."""
    if not is_warm(work.config):
        yield
        return
    with started_at(probe, stages.train_warmup(work, probe, rows)):
        yield


def lay_out(
    request: Request,
    work: Workspace,
    probe: AdaptedModel,
    rows: Rows,
    store: FeatureStore,
    clusters: Mapping[int, npt.NDArray[np.int64]] | None = None,
) -> Bench:
    """Cut the sources, build the oracle, and open the pool of the target.

    Args:
        request: Checked.
        work: The open run folder.
        probe: The model, theta0 the base model.
        rows: Of all datasets.
        store: Their features.
        clusters: The cluster of every training row of some datasets, instead of those found on the features.
    """
    config, names = request.config, rows.names
    target, includes_target = find_target(names, request.target), settle_target(request, len(names))
    if clusters is None and request.n_clusters is not None:
        cut = [task for task in range(len(names)) if task != target or not includes_target]
        blocks = {task: store.read(names[task], "train") for task in cut}
        clusters = {t: cluster_rows(block, request.n_clusters, seed=config.seed) for t, block in blocks.items()}
    sources = list_sources(names, target, includes_target=includes_target, clusters=clusters)
    own = Rows(*(cut_splits(part, target, sources) for part in (rows.train, rows.validation, rows.test)))
    _find_lower_layers(probe, rows, own, sources)
    n_train = tuple(split.n_examples for split in own.train) if config.gradients.train_fraction < 1 else None
    question = Question(names, target, sources, includes_target, config.gradients.n_projections, n_train)
    budget = None
    if config.estimation.method == "steps":
        health = artifacts.read_json(work.path / artifacts.FEATURE_HEALTH_FILE)
        budget = stages.plan_budget(config, own, probe, n_coordinates=int(health["n_coordinates"]))
        budget = replace(budget, keeps_start=False)
    prospect = make_prospect(question, store, config.estimation, budget)
    folder = work.path / SELECTION_FOLDER / request.target
    start = stages.identify_start(config, probe)
    crew = hire(work.scheduler, config, work.path, own, probe, start)
    pool = Pool(config, folder, own, probe, start_fingerprint=start, crew=crew)
    features = stages.identify_features(work, probe, rows)
    chosen = [(source.name, source.rows) for source in sources]
    simulated = None if budget is None else asdict(budget)
    identity = artifacts.fingerprint(
        sorted(features.values()), chosen, target, includes_target, config.estimation, simulated
    )
    return Bench(question, prospect, pool, artifacts.fingerprint(identity, settle_training(config)), work, store)


def _find_lower_layers(probe: AdaptedModel, whole: Rows, own: Rows, sources: Sequence[Source]) -> None:
    """Let what is kept of a dataset's lower blocks be found for its clusters, too."""
    cache = probe.prefix.cache if probe.prefix is not None else None
    for source, part in zip(sources, own.train[1:], strict=True):
        if cache is not None and source.rows is not None:
            split = whole.train[source.task]
            cache.enlist_part(part, split, list_rows(split, source.rows))


def _search(bench: Bench, request: Request, names: Sequence[str]) -> tuple[Selection, ...]:
    """Carry out some strategies, or read back what they found."""
    found = []
    for name in names:
        with progress.stage(f"search {name}"):
            inputs = (bench.identity, request.settings)
            values = bench.pool.recall(f"select-{name}", inputs, partial(_search_one, bench, name, request.settings))
            found.append(Selection.from_dict(values))
    return tuple(found)


def _search_one(bench: Bench, name: str, settings: SearchSettings) -> dict[str, object]:
    return asdict(select(bench.prospect, name, settings))


def _measure_likeness(bench: Bench) -> dict[str, list[float]]:
    """How alike each source is to the target: by gradients at the features, by texts as the base reads them."""
    features = bench.prospect.oracle.replicates[0]
    pool = bench.pool

    def measure() -> list[float]:
        options = {"n_rows": _TEXTS, "max_tokens": pool.config.training.max_tokens_per_batch, "seed": pool.config.seed}
        cosines = compare_texts(pool.probe, pool.rows.train, **options, meter=Meter("texts"))
        return [float(cosine) for cosine in cosines[0, 1:]]

    inputs = (pool.rows.learning_fingerprint(), pool.probe.base.fingerprint, _TEXTS, pool.config.seed)
    gradients = compare_gradients(features.train[1:], features.validation[0])
    return {"gradients": gradients.tolist(), "texts": list(pool.recall("texts", inputs, measure))}


def _take_baselines(
    bench: Bench, found: Sequence[Selection], likeness: Mapping[str, Sequence[float]]
) -> dict[str, Choice]:
    """No source, all, and the most alike: as many as the first strategy took, and at least one."""
    number = max(1, len(found[0].sources))
    alike = {kind: take_most_alike(values, number) for kind, values in likeness.items()}
    return {"none": (), "all": bench.prospect.everything} | alike


def _finish(
    bench: Bench, found: Sequence[Selection], taken: Mapping[str, Choice]
) -> tuple[tuple[Final, ...], FinalTable]:
    chosen = {**taken, **{one.strategy: one.sources for one in found}}
    finals = train_finals(bench.pool, bench.prospect, chosen)
    pairs = [(one.strategy, reference) for one in found for reference in _REFERENCES]
    return finals, score_finals(bench.pool, finals, pairs)


def _value_rows(bench: Bench, folder: Path) -> tuple[RowSummary, ...]:
    """Write every row's value, a line each, and sum them up by source."""
    lines, found = [], measure_influence(bench.prospect)
    for one in found:
        for row, value, error in zip(one.ids, one.values, one.errors, strict=True):
            entry = {"source": one.source, "id": row, "value": float(value), "se": unless_nan(error)}
            lines.append(json.dumps(entry, allow_nan=False))
    artifacts.write_text(folder / SAMPLES_FILE, "".join(f"{line}\n" for line in lines))
    return tuple(RowSummary(o.source, len(o.ids), float(o.values.mean()), o.share_harmful) for o in found)


def _describe(
    bench: Bench,
    request: Request,
    found: tuple[Selection, ...],
    rivals: tuple[Selection, ...],
    taken: Mapping[str, Choice],
    likeness: Mapping[str, Sequence[float]],
) -> SelectionRecord:
    """Everything but what was trained and valued."""
    config, pool, work = request.config, bench.pool, bench.work
    blocks, tokenizer = bench.prospect.oracle.replicates[0].train, pool.probe.base.tokenizer
    sources = tuple(
        SourceRecord(
            name=source.name,
            task=bench.question.tasks[source.task],
            n_rows=pool.split(1 + j, "train").n_examples,
            likeness={kind: float(values[j]) for kind, values in likeness.items()},
            examples=() if source.rows is None else quote_typical(pool.split(1 + j, "train"), blocks[1 + j], tokenizer),
        )
        for j, source in enumerate(bench.question.sources)
    )
    better = find_better(bench.prospect, found[0], [*found[1:], *rivals])
    names = bench.question.source_names
    return SelectionRecord(
        folder=pool.folder,
        target=request.target,
        includes_target=bench.question.includes_target,
        n_clusters=request.n_clusters,
        linearize_at="warmup" if is_warm(config) else "base",
        estimation=config.estimation.method,
        confidence=config.evaluation.confidence,
        n_validation=len(bench.prospect.validation_groups),
        n_test=pool.split(0, "test").n_examples,
        model=pool.probe.base.name,
        sources=sources,
        strategies=found,
        baselines=taken,
        costs=_count(bench, request, [*found, *rivals], work),
        rivals=rivals,
        better=better,
        warnings=tuple(list_caveats(bench.prospect, request.target, names, found[0], better)),
    )


def _count(bench: Bench, request: Request, found: Sequence[Selection], work: Workspace) -> Costs:
    forward = next((one for one in found if one.strategy == "forward"), None)
    true_flops = None
    if forward is not None:
        settings, limit = request.config.training, request.settings.max_sources
        true_flops = count_true_search(bench.pool, bench.prospect, forward, settings, max_sources=limit) or None
    now = {record.stage: record for record in work.ledger.stages}
    new = {name: count_new(bench.earlier.get(name), now.get(name)) for name in ("warmup", "features")}
    searching = float(np.sum([one.seconds for one in found]))
    return Costs(
        warmup_flops=work.flops_of("warmup"),
        feature_flops=work.flops_of("features"),
        search_flops={one.strategy: count_search(bench.prospect, one) for one in found},
        seconds=sum(seconds for _, seconds in new.values()) + searching,
        true_forward_flops=true_flops,
        new_warmup_flops=new["warmup"][0],
        new_feature_flops=new["features"][0],
    )
