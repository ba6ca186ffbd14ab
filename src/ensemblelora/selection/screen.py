"""The screen of a selection: methods by test score, or what each strategy chose, and what choosing cost."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ensemblelora.report.wording import (
    NOTHING,
    format_flops,
    format_interval,
    format_number,
    format_signed,
)
from ensemblelora.selection.caveats import name_choice
from ensemblelora.selection.page import (
    PAGE_FILE,
    describe_method,
    group_methods,
    list_choices,
    list_notes,
    write_headline,
)
from ensemblelora.selection.record import FinalTable, SelectionRecord
from ensemblelora.selection.strategies import STRATEGIES

__all__ = ["render_selection"]

_MOST_CLUSTERS = 16
_ROOM = 78
"""characters of a narrow screen that a cluster's name and text share"""
_LEAST_SHOWN = 24


def render_selection(record: SelectionRecord) -> list[Text | Table]:
    """Say on one screen what was chosen and what it gave.

    Args:
        record: What :func:`ensemblelora.selection.select.select_sources` found.

    Returns:
        Lines and tables for :func:`ensemblelora.console.show_table`.
    """
    parts: list[Text | Table] = [Text(write_headline(record), style="bold"), Text(), _tabulate_choices(record), Text()]
    if any(source.examples for source in record.sources):
        parts += [*_tabulate_clusters(record), Text()]
    if record.test is not None:
        parts += [_tabulate_test(record, record.test), Text()]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in record.warnings]
    if record.rivals:
        parts.append(Text("(in brackets: searched to compare, not trained)", style="dim"))
    parts += [Text(note) for note in list_notes(record)]
    return [*parts, Text(f"report: {record.folder / PAGE_FILE}", no_wrap=True)]


def _tabulate_choices(record: SelectionRecord) -> Table:
    table = _make_table("strategy", "sources", "predicted loss", "gain over none", "gain over all")
    for name, _, found in list_choices(record):
        table.add_row(
            name,
            name_choice(found.sources, [source.name for source in record.sources]) or NOTHING,
            _write(format_number(found.nll), found.nll_se),
            _write(format_signed(found.gain, 4), found.gain_se),
            _write(format_signed(found.gain_over_all, 4), found.gain_over_all_se),
        )
    return table


def _tabulate_clusters(record: SelectionRecord) -> list[Text | Table]:
    """Rows of each cluster, and how a typical one begins."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    cut = [(j, source) for j, source in enumerate(record.sources) if source.examples]
    table.add_column("cluster")
    table.add_column("rows", justify="right")
    table.add_column("chosen")
    table.add_column("a typical row begins")
    width = max(_LEAST_SHOWN, _ROOM - max(len(source.name) for _, source in cut))
    chosen = set(record.strategies[0].sources)
    for j, source in cut[:_MOST_CLUSTERS]:
        table.add_row(
            source.name, f"{source.n_rows:,}", "yes" if j in chosen else "no", _cut(source.examples[0], width)
        )
    left_out = len(cut) - _MOST_CLUSTERS
    return [table, *([Text(f"and {left_out} more: see the report", style="dim")] if left_out > 0 else [])]


def _cut(text: str, width: int) -> Text:
    """The beginning of a text: a column that is wider than the screen would take the place of the others."""
    return Text(text if len(text) <= width else f"{text[: width - 1]}\u2026")


def _tabulate_test(record: SelectionRecord, test: FinalTable) -> Table:
    table = _make_table("method", "accuracy", f"{record.confidence:.0%} interval", "loss", "training cost")
    finals = {final.method: final for final in record.finals}
    for names in group_methods(record):
        score, final = test.scores[names[0]], finals.get(names[0])
        has_accuracy = score.accuracy == score.accuracy
        interval = format_interval(score.accuracy_low, score.accuracy_high, scale=100, digits=1) if has_accuracy else ""
        table.add_row(
            ", ".join(
                f"{name} ({describe_method(record, name)})" if name not in STRATEGIES else name for name in names
            ),
            format_number(100 * score.accuracy, 1) if has_accuracy else NOTHING,
            interval or NOTHING,
            format_number(score.nll),
            NOTHING if final is None else format_flops(final.train_flops),
        )
    return table


def _make_table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        table.add_column(name, justify="left" if name in ("strategy", "sources", "method") else "right")
    return table


def _write(value: str, error: float | None) -> str:
    return value if error is None else f"{value} ± {format_number(error, 4)}"
