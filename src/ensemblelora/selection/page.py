"""A selection becomes one Markdown page. No torch.

In: :class:`~.record.SelectionRecord`. Out: ``selection.md`` in the target's folder; :func:`write_headline` says the
same in one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist

from ensemblelora.artifacts import write_text
from ensemblelora.report.build import render_markdown
from ensemblelora.report.document import Block, Bullets, Cell, Column, Document, Row, Section, Table, Text
from ensemblelora.report.wording import (
    NOTHING,
    count,
    format_flops,
    format_interval,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    format_signed,
    join_names,
)
from ensemblelora.selection.caveats import name_choice, say_better
from ensemblelora.selection.record import SAMPLES_FILE, Change, FinalTable, SelectionRecord
from ensemblelora.selection.strategies import STRATEGIES, Selection

__all__ = [
    "PAGE_FILE",
    "compose_page",
    "describe_method",
    "group_methods",
    "list_choices",
    "list_notes",
    "write_headline",
    "write_page",
]

PAGE_FILE = "selection.md"
_METHODS = dict(STRATEGIES) | {
    "base": "nothing trained",
    "none": "the target's rows alone",
    "all": "all sources",
    "gradients": "the sources most alike by gradients",
    "texts": "the sources most alike by texts",
}
_UNTRAINED = "the base model, nothing trained"
"""what taking no source means where the target's own rows are sources like any others"""
_MOST_NAMED = 6
_MOST_ROWS = 40


def write_page(record: SelectionRecord) -> None:
    """Write ``selection.md`` into the record's folder.

    Raises:
        OutputError: If it can't be written.
    """
    write_text(record.folder / PAGE_FILE, render_markdown(compose_page(record)))


def compose_page(record: SelectionRecord) -> Document:
    """Turn a selection into the page's text and tables."""
    sections = (
        _warn(record),
        _write_test(record),
        _write_choices(record),
        _write_clusters(record),
        _write_sources(record),
        _write_path(record),
        _close(record),
    )
    facts = (
        f"target {record.target}",
        _count_sources(record),
        record.model,
        f"{count(record.n_validation, 'validation row')}, {count(record.n_test, 'test row')}",
    )
    name = f"{record.target}: ensemblelora selection"
    return Document(name, facts, write_headline(record), (), [section for section in sections if section])


def write_headline(record: SelectionRecord) -> str:
    """Say what the first strategy chose, what that is predicted to give, whether another is better, how it tested."""
    first, n_sources = record.strategies[0], _count_sources(record)
    if first.sources:
        some = name_choice(first.sources, [source.name for source in record.sources])
        chosen = f"all {n_sources}" if 1 < len(first.sources) == len(record.sources) else f"{some} of {n_sources}"
        told = f"For {record.target}, {first.strategy} chooses {chosen}: predicted validation loss "
        told += f"{format_number(first.nll)} nats, {_say_gain(first)} than without any."
    else:
        told = f"For {record.target}, {first.strategy} chooses none of {n_sources}: {first.stopped}."
    if record.better is not None:
        names = [source.name for source in record.sources]
        told += f" But {say_better(record.better, names)}: to be checked, see the warning."
    if record.test is None:
        return told
    adapters = {final.method: final.adapter for final in record.finals}
    metric = "accuracy" if any(change.metric == "accuracy" for change in record.test.changes) else "nll"
    found = [
        change
        for change in record.test.changes
        if (change.a, change.metric) == (first.strategy, metric)
        and change.b in ("none", "all")
        and adapters[change.b] != adapters[first.strategy]
    ]
    against = "; ".join(f"{_say_change(change)} {describe_method(record, change.b)}" for change in found)
    return f"{told} Test {'accuracy' if metric == 'accuracy' else 'loss'}: {against}." if against else told


def _count_sources(record: SelectionRecord) -> str:
    return count(len(record.sources), "cluster" if record.n_clusters else "source")


def describe_method(record: SelectionRecord, name: str) -> str:
    """What a method takes, in a few words."""
    if name == "none" and not record.includes_target:
        return _UNTRAINED
    return _METHODS[name].replace("source", "cluster") if record.n_clusters else _METHODS[name]


def list_choices(record: SelectionRecord) -> list[tuple[str, str, Selection]]:
    """What was asked for and what was searched beside it: a name, what it is, and what was found."""
    asked = [(found.strategy, _METHODS[found.strategy], found) for found in record.strategies]
    beside = [(f"({found.strategy})", "searched to compare, not trained", found) for found in record.rivals]
    return asked + beside


def group_methods(record: SelectionRecord) -> list[tuple[str, ...]]:
    """Methods with a test score, by accuracy and then by loss; those that chose the same sources are one entry."""
    if record.test is None:
        return []
    scores, groups = record.test.scores, dict[str, list[str]]()
    for final in record.finals:
        groups.setdefault(final.adapter, []).append(final.method)
    found = [("base",), *(tuple(names) for names in groups.values())]
    return sorted(found, key=lambda names: (-_nan_to_zero(scores[names[0]].accuracy), scores[names[0]].nll))


def list_notes(record: SelectionRecord) -> Iterator[str]:
    """What choosing cost, and how to read the numbers; sentences without their stops."""
    if record.set_aside is not None:
        yield f"what was chosen here before, with other options, is kept in {record.set_aside}"
    if record.rows:
        yield (
            f"what each training row does to {record.target} is in {record.folder / SAMPLES_FILE}, a line a row: "
            "value is by how many nats its predicted loss would rise without the row (below zero: the row harms), "
            "se its standard error, id the split of the data files and the row's place there, counted from 0"
        )
    yield from _list_costs(record)
    tested = "; the test rows were read once, at the end" if record.test is not None else ""
    yield (
        "predicted gains are on the validation rows that chose the sources, so that the chosen set's own is somewhat "
        f"too good{tested}"
    )


def _list_costs(record: SelectionRecord) -> Iterator[str]:
    costs, parts = record.costs, []
    for name, flops in (("warm-up", costs.new_warmup_flops), ("features", costs.new_feature_flops)):
        parts += [f"{name} {format_flops(flops)}"] if flops else []
    parts.append(f"searches {format_flops(sum(costs.search_flops.values()))}")
    taken = [("warm-up", costs.warmup_flops - costs.new_warmup_flops)]
    taken.append(("features", costs.feature_flops - costs.new_feature_flops))
    kept = " and ".join(f"{name} ({format_flops(flops)})" for name, flops in taken if flops > 0)
    told = f"choosing took {', '.join(parts)}, {format_seconds(costs.seconds)}"
    yield told + (f"; taken over from earlier commands in this folder: {kept}" if kept else "")
    if {source.task for source in record.sources} != {record.target}:
        yield "for another target in this folder, features of its validation rows, searches and fine-tunings are new"
    if costs.speed_up is not None:
        yield (
            "truly fine-tuning every set that the search forward asked about would take "
            f"{format_flops(costs.true_forward_flops)}, {format_ratio(costs.speed_up)} times what warm-up, features "
            "and that search take"
        )


def _write_test(record: SelectionRecord) -> Section | None:
    if record.test is None:
        return None
    scores, finals = record.test.scores, {final.method: final for final in record.finals}
    rows = []
    for names in group_methods(record):
        score, final = scores[names[0]], finals.get(names[0])
        chosen = join_names(record.name_sources(final.sources), limit=_MOST_NAMED) if final else ""
        rows.append(
            Row((
                Cell(", ".join(names)),
                Cell(_percent(score.accuracy), _interval(score.accuracy_low, score.accuracy_high, 100, 1)),
                Cell(format_number(score.nll), _interval(score.nll_low, score.nll_high, 1, 3)),
                Cell(NOTHING if final is None else format_flops(final.train_flops)),
                Cell(chosen or NOTHING),
            ))
        )  # fmt: skip
    columns = (
        Column("Method", is_number=False),
        Column("Test accuracy, %"),
        Column("Test loss"),
        Column("Training cost"),
        Column("Sources beside the target's rows" if record.includes_target else "Sources", is_number=False),
    )
    baselines = "; ".join(
        f"{name}: {describe_method(record, name)}" for name in ("base", "none", "all", "gradients", "texts")
    )
    note = (
        "All are trained with the same settings: every row once an epoch, and the checkpoint with the least loss on "
        f"the target's validation rows is kept. {baselines}."
    )
    blocks: list[Block] = [Table("Test rows of the target", columns, tuple(rows), note)]
    metrics = sorted({change.metric for change in record.test.changes})
    return Section("test", "How it tested", [*blocks, *(_list_changes(record, record.test, m) for m in metrics)])


def _list_changes(record: SelectionRecord, test: FinalTable, metric: str) -> Table:
    """Every choice against every reference; nothing where both chose the same."""
    adapters = {final.method: final.adapter for final in record.finals}
    found = {(change.a, change.b): change for change in test.changes if change.metric == metric}
    references = list(dict.fromkeys(b for _, b in found))
    rows = []
    for names in group_methods(record):
        own = [name for name in names if name in STRATEGIES]
        if own:
            cells = [
                Cell("the same")
                if adapters.get(b) == adapters[own[0]]
                else Cell(_signed(found[own[0], b]), _bound(found[own[0], b]))
                for b in references
            ]
            rows.append(Row((Cell(", ".join(own)), *cells)))
    columns = (Column("Chosen by", is_number=False), *(Column(f"Against {b}") for b in references))
    what = "accuracy, points" if metric == "accuracy" else "loss"
    return Table(f"Difference in test {what}, {record.confidence:.0%} intervals", columns, tuple(rows))


def _write_choices(record: SelectionRecord) -> Section:
    rows = [
        Row((
            Cell(f"{name}: {told}"),
            Cell(join_names(record.name_sources(found.sources), limit=_MOST_NAMED) or NOTHING),
            Cell(format_number(found.nll), _plus_minus(found.nll_se)),
            Cell(format_signed(found.gain, 4), _plus_minus(found.gain_se)),
            Cell(format_signed(found.gain_over_all, 4), _plus_minus(found.gain_over_all_se)),
            Cell(f"{found.n_asked:,}"),
        ))
        for name, told, found in list_choices(record)
    ]  # fmt: skip
    columns = (
        Column("Strategy", is_number=False),
        Column("Sources", is_number=False),
        Column("Predicted loss"),
        Column("Gain over none"),
        Column("Gain over all"),
        Column("Sets predicted"),
    )
    note = (
        "Loss of the target's validation rows as it is predicted to be after training, in nats, and by how much it is "
        "lower than with no source and with all of them. In brackets one standard error, over validation rows and "
        "projections."
    )
    return Section("choices", "What each strategy chose", [Table("Predicted", columns, tuple(rows), note)])


def _write_sources(record: SelectionRecord) -> Section:
    valued = [found for found in record.strategies if found.values]
    by_row = {summary.source: summary for summary in record.rows}
    columns = [Column("Source", is_number=False), Column("Rows"), Column("Alike by gradients"), Column("By texts")]
    columns += [Column(f"Value by {found.strategy}") for found in valued]
    columns += [Column("Harmful rows")] if record.rows else []
    z = NormalDist().inv_cdf((1 + record.confidence) / 2)
    rows = []
    for j, source in enumerate(record.sources[:_MOST_ROWS]):
        cells = [Cell(source.name), Cell(f"{source.n_rows:,}")]
        cells += [Cell(format_number(source.likeness.get(kind))) for kind in ("gradients", "texts")]
        cells += [_value_cell(found, j, z) for found in valued]
        if record.rows:
            summary = by_row.get(source.name)
            cells.append(Cell(format_percent(None if summary is None else summary.share_harmful, 0)))
        rows.append(Row(tuple(cells)))
    left_out = len(record.sources) - len(rows)
    note = (
        "How alike a source is to the target, at most 1: mean cosine of rows' loss gradients, and cosine of the mean "
    )
    note += "embeddings of texts."
    if valued:
        note += (
            f" Values: by how many nats a source lowers the target's predicted loss, {record.confidence:.0%} intervals."
        )
    note += f" {left_out} more in selection.json." if left_out else ""
    return Section("sources", "The sources", [Table("One by one", tuple(columns), tuple(rows), note)])


def _write_clusters(record: SelectionRecord) -> Section | None:
    cut = [source for source in record.sources if source.examples]
    if not cut:
        return None
    chosen = set(record.name_sources(record.strategies[0].sources))
    rows = tuple(
        Row((
            Cell(source.name),
            Cell("yes" if source.name in chosen else "no"),
            Cell(f"{source.n_rows:,}"),
            Cell(" | ".join(source.examples)),
        ))
        for source in cut[:_MOST_ROWS]
    )  # fmt: skip
    columns = (
        Column("Cluster", is_number=False),
        Column(f"Chosen by {record.strategies[0].strategy}", is_number=False),
        Column("Training rows"),
        Column("Its most typical rows begin", is_number=False),
    )
    left_out = f" {len(cut) - len(rows)} more in selection.json." if len(cut) > len(rows) else ""
    note = f"A cluster is a part of a dataset's training rows whose gradients are alike; the largest is 0.{left_out}"
    return Section("clusters", "What is in each cluster", [Table("Clusters", columns, rows, note)])


def _write_path(record: SelectionRecord) -> Section | None:
    walked = [found for found in record.strategies if found.moves]
    if not walked:
        return None
    blocks: list[Block] = []
    for found in walked:
        steps = [
            f"{_say_move(record, move.added, move.dropped)}: {format_signed(move.gain, 4)} "
            f"{_plus_minus(move.gain_se)} nats, loss {format_number(move.nll)}"
            for move in found.moves
        ]
        blocks += [Text(f"{found.strategy} takes these steps and stops there: {found.stopped}."), Bullets(tuple(steps))]
    return Section("path", "Step by step", blocks)


def _warn(record: SelectionRecord) -> Section | None:
    if not record.warnings:
        return None
    return Section("warnings", "What to keep in mind", [Bullets(record.warnings, is_warning=True)])


def _close(record: SelectionRecord) -> Section:
    notes = tuple(f"{note[0].upper()}{note[1:]}." for note in list_notes(record))
    return Section("notes", "How to read this", [Bullets(notes)])


def _say_move(record: SelectionRecord, added: tuple[int, ...], dropped: tuple[int, ...]) -> str:
    parts = [f"+ {name}" for name in record.name_sources(added)]
    return ", ".join([*parts, *(f"without {name}" for name in record.name_sources(dropped))])


def _say_gain(found: Selection) -> str:
    error = "" if found.gain_se is None else f" ± {format_number(found.gain_se, 4)}"
    return f"{format_number(abs(found.gain), 4)}{error} {'lower' if found.gain >= 0 else 'higher'}"


def _say_change(change: Change) -> str:
    scale, digits = _scale(change)
    interval = format_interval(change.low, change.high, scale=scale, digits=digits)
    unit = " points" if change.metric == "accuracy" else ""
    return f"{_signed(change)}{unit}{f' ({interval})' if interval else ''} against"


def _signed(change: Change) -> str:
    scale, digits = _scale(change)
    return format_signed(scale * change.difference, digits)


def _bound(change: Change) -> str:
    return _interval(change.low, change.high, *_scale(change))


def _scale(change: Change) -> tuple[float, int]:
    return (100.0, 1) if change.metric == "accuracy" else (1.0, 3)


def _value_cell(found: Selection, j: int, z: float) -> Cell:
    value, error = found.values[j], found.value_errors[j]
    if value is None or error is None:
        return Cell(format_signed(value, 4))
    return Cell(format_signed(value, 4), format_interval(value - z * error, value + z * error, digits=4))


def _percent(value: float) -> str:
    return NOTHING if value != value else format_number(100 * value, 1)


def _interval(low: float | None, high: float | None, scale: float, digits: int) -> str:
    if low is None or high is None or low != low or high != high:
        return ""
    return format_interval(low, high, scale=scale, digits=digits)


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f"± {format_number(error, 4)}"


def _nan_to_zero(value: float) -> float:
    return 0.0 if value != value else value
