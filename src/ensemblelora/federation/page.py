"""A federation's run folder becomes one HTML page and one Markdown page. No torch.

In: a run folder (:mod:`.record`). Out: ``report.html``, one file that needs no network, and ``report.md``, the same
without figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ensemblelora import artifacts
from ensemblelora.federation.page_details import write_again, write_costs, write_plan, write_privacy, write_traffic
from ensemblelora.federation.page_pictures import write_clients, write_pareto, write_served, write_steps
from ensemblelora.federation.record import FederationRecord, read_record, title_of
from ensemblelora.federation.results import MethodOutcome, Outcome, name_partition
from ensemblelora.report.build import render_html, render_markdown
from ensemblelora.report.document import (
    Block,
    Cell,
    Column,
    Document,
    Figure,
    FigureRow,
    Row,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
)
from ensemblelora.report.plotting import LEGEND_ABOVE, N_GROUP_COLOURS, complete
from ensemblelora.report.wording import (
    count,
    format_bytes,
    format_flops,
    format_interval,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    format_signed,
)

__all__ = ["write_headline", "write_page"]


def write_page(folder: Path) -> Path:
    """Write both pages into a run folder, and return the path of the HTML."""
    record = read_record(folder)
    document = compose_page(record)
    artifacts.write_text(folder / artifacts.REPORT_MARKDOWN_FILE, render_markdown(document))
    artifacts.write_text(folder / artifacts.REPORT_HTML_FILE, render_html(document))
    return folder / artifacts.REPORT_HTML_FILE


def compose_page(record: FederationRecord) -> Document:
    """Turn what a federation left into text, tables and figures."""
    outcome, environment = record.outcome, record.environment
    facts = (
        f"federation {record.folder.name}",
        count(outcome.n_registered, "client"),
        str(environment["model"]["name"]),
        f"{record.config.adapter.method}, {count(record.config.training.num_train_epochs, 'epoch')}",
        f"ensemblelora {environment['package_version']}",
        str(environment["created"]),
    )
    sections = [
        _write_results(record),
        write_clients(record),
        write_pareto(record),
        _write_sizes(record),
        write_served(record),
        write_plan(record),
        write_costs(record),
        write_traffic(record),
        write_privacy(record),
        write_again(record),
    ]
    opening = (write_steps(record), Tiles(_write_tiles(record)))
    kept = [section for section in sections if section is not None]
    return Document(f"{record.folder.name}: ensemblelora federation", facts, write_headline(outcome), opening, kept)


def write_headline(outcome: Outcome) -> str:
    """Say in one sentence how the groups that serve stand against one adapter for all."""
    ours = outcome.methods["ours"]
    if ours.difference is None or ours.difference_low is None or ours.difference_high is None:
        return (
            f"Ours ({outcome.served}): mean test loss {format_number(ours.nll)} nats over {outcome.n_clients} clients."
        )
    is_shown = ours.difference_high < 0 or ours.difference_low > 0
    verdict = ("less" if ours.difference < 0 else "more") if is_shown else "no difference shown"
    interval = f"[{format_signed(ours.difference_low)}, {format_signed(ours.difference_high)}]"
    change = f"{format_signed(ours.difference)} nats {interval}"
    return (
        f"Ours ({outcome.served}): mean test loss {format_number(ours.nll)} nats over {outcome.n_clients} clients, "
        f"{change} against one adapter for all: {verdict}."
    )


def _write_tiles(record: FederationRecord) -> tuple[Tile, ...]:
    outcome = record.outcome
    ours, shared = outcome.methods["ours"], outcome.methods.get("global")
    tiles = [
        Tile("Clients", str(outcome.n_registered), f"{outcome.n_rows['train']:,} training rows"),
        Tile("Serves", title_of(outcome.served), "chosen by validation rows"),
    ]
    if shared and shared.cost and ours.cost and shared.cost.flops:
        ratio = f"{format_ratio(ours.cost.flops / shared.cost.flops)}\u00d7"
        tiles.append(Tile("Compute", ratio, "of one adapter for all, choosing included"))
    if ours.cost:
        tiles.append(Tile("Sent", format_bytes(ours.cost.bytes_per_client), "to and from a client, on average"))
    seconds = sum(stage["wall_seconds"] for stage in record.costs["stages"])
    tiles.append(
        Tile(
            "Measured time",
            format_seconds(seconds),
            f"server's peak {format_bytes(outcome.server['peak_memory_bytes'])}",
        )
    )
    return tuple(tiles)


def _write_results(record: FederationRecord) -> Section:
    outcome = record.outcome
    ranked = sorted(outcome.methods.items(), key=lambda item: item[1].nll)
    least = ranked[0][1].nll
    rows = tuple(_result_row(name, one, least) for name, one in ranked)
    columns = (
        Column("Method", is_number=False),
        Column("Test loss"),
        Column("Against one for all"),
        Column("Better for"),
        Column("FLOPs"),
        Column("Adapters"),
        Column("Sent a client"),
        Column("Passes"),
    )
    left_out = outcome.n_registered - outcome.n_clients
    missing = (
        f" {count(left_out, 'client')} without a loss of every method {'is' if left_out == 1 else 'are'} left out."
        if left_out
        else ""
    )
    note = (
        f"Mean over {outcome.n_clients} clients of each one's mean loss on its own test rows (nats a token), with "
        f"{outcome.confidence:.0%} intervals over clients.{missing} Better for: clients with less loss than under one "
        "adapter for all. FLOPs to make it, choosing included, as clients count them; bytes of all adapters it needs; "
        "bytes sent to and from a client to make it; forward passes of a prediction."
    )
    return Section("results", "Test loss", [Table("Every method on the same clients", columns, rows, note)])


def _result_row(name: str, one: MethodOutcome, least: float) -> Row:
    cost = one.cost
    return Row(
        (
            Cell(title_of(name), name),
            Cell(format_number(one.nll), format_interval(one.low, one.high), is_best=one.nll == least),
            Cell(format_signed(one.difference), format_interval(one.difference_low, one.difference_high)),
            Cell(format_percent(one.share_better)),
            Cell(format_flops(None if cost is None else cost.flops)),
            Cell(format_bytes(None if cost is None else cost.adapter_bytes)),
            Cell(format_bytes(None if cost is None else cost.bytes_per_client)),
            Cell(format_number(None if cost is None else cost.passes)),
        )
    )


def _write_sizes(record: FederationRecord) -> Section:
    """Loss over the number of groups, a line for each number of boosters."""
    outcome, config = record.outcome, record.config
    counts = (0, *sorted(config.boosting.n_rounds))
    sizes = [found.n_groups for found in record.plan.found]
    tables = (("test", {m: one.nll for m, one in outcome.methods.items()}), ("validation", dict(outcome.validation)))
    figures = [_draw_sizes(part, losses, sizes, counts) for part, losses in tables]
    kept = ", ".join(f"{m} groups: {pair[0]} kept of {pair[1]} tried" for m, pair in outcome.kept_boosters.items())
    caption = f"Boosters: {kept}. Where fewer were kept than asked for, lines meet." if counts[1:] else ""
    blocks: list[Block] = [FigureRow(tuple(figures), caption)]
    if outcome.weights:
        told = ", ".join(format_number(weight) for weight in outcome.weights)
        blocks.append(
            Text(
                f"Mean weights of a client's group, the global adapter and the next best groups: {told}.", is_quiet=True
            )
        )
    return Section("sizes", "Numbers of groups and boosters", blocks)


def _draw_sizes(part: str, losses: dict[str, float], sizes: Sequence[int], counts: Sequence[int]) -> Figure:
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": list(sizes),
            "y": [losses[name_partition(m, b)] for m in sizes],
            "name": count(b, "booster") if b else "no boosters",
            "line": {"color": f"var(--group-{k % N_GROUP_COLOURS})"},
        }
        for k, b in enumerate(counts)
    ]
    layout = {
        "xaxis": {"title": {"text": "groups"}, "tickvals": list(sizes), "zeroline": False},
        "yaxis": {"title": {"text": f"{part} loss"}, "tickformat": ".4~f", "zeroline": False},
        "legend": LEGEND_ABOVE,
        "showlegend": len(counts) > 1,
    }
    told = "; ".join(
        f"{name_partition(m, b)} {format_number(losses[name_partition(m, b)], 4)}" for b in counts for m in sizes
    )
    return Figure(
        f"sizes-{part}", f"Mean {part} loss", f"Mean {part} loss: {told}.", complete(traces, layout), height=320
    )
