"""Sections of a federation's page that show: who is in which group, who gained, and what it cost. No torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ensemblelora import artifacts
from ensemblelora.federation.record import FederationRecord, title_of
from ensemblelora.federation.results import LOSSES_FILE, MethodCost, name_partition
from ensemblelora.report.differences import TaskDifference, draw_differences
from ensemblelora.report.document import FigureRow, GroupCard, Groups, Section, Step, Steps, Text
from ensemblelora.report.pareto import BYTES, FLOPS, CostAxis, Point, draw_front
from ensemblelora.report.plotting import N_GROUP_COLOURS
from ensemblelora.report.wording import (
    count,
    format_bytes,
    format_interval,
    format_number,
    format_percent,
    format_signed,
    group_letter,
)

__all__ = ["write_clients", "write_pareto", "write_served", "write_steps"]

_SENT = CostAxis("sent", "bytes sent to and from a client", format_bytes)
_AXES: tuple[tuple[CostAxis, Callable[[MethodCost], float]], ...] = (
    (FLOPS, lambda cost: cost.flops),
    (_SENT, lambda cost: cost.bytes_per_client),
    (BYTES, lambda cost: cost.adapter_bytes),
)


def write_steps(record: FederationRecord) -> Steps:
    """Tell a federation in three sentences."""
    outcome, config = record.outcome, record.config
    asked = ", ".join(str(m) for m in config.groups.n_groups)
    served, ours = _find_served(record), outcome.methods["ours"]
    predicted = "Nothing of the groups that serve."
    if served is not None:
        loss = format_number(record.plan.found[served].predicted_nll)
        predicted = f"Mean validation loss {loss} in the groups that serve."
    came = f"Mean test loss {format_number(ours.nll)} nats by {title_of(outcome.served)}"
    if ours.difference is not None:
        came += f", {format_signed(ours.difference)} against one adapter for all"
        if interval := format_interval(ours.difference_low, ours.difference_high):
            came += f" ({outcome.confidence:.0%} interval {interval})"
    return Steps(
        (
            Step("Asked", f"{count(outcome.n_registered, 'client')} in {asked} groups, {config.adapter.method}."),
            Step("Predicted before training", predicted),
            Step("Came out", f"{came}."),
        )
    )


def write_served(record: FederationRecord) -> Section | None:
    """Show the groups that serve, each with its clients."""
    served = _find_served(record)
    if served is None:
        return None
    names, groups = record.plan.names, record.plan.found[served].groups
    cards = tuple(
        GroupCard(
            group_letter(g),
            g % N_GROUP_COLOURS,
            tuple(names[client] for client in clients),
            count(len(clients), "client"),
        )
        for g, clients in enumerate(groups)
    )
    text = f"{title_of(record.outcome.served)}: chosen by the validation rows of all clients, the largest group first."
    return Section("groups", "The groups that serve", [Text(text), Groups(cards)])


def write_clients(record: FederationRecord) -> Section | None:
    """Show what each client gained against one adapter for all; none where its losses were not kept."""
    path = record.folder / LOSSES_FILE
    if not path.exists():
        return None
    losses = artifacts.load_arrays(path)
    if not {"ours", "global"} <= set(losses):
        return None
    names, served = record.plan.names, _find_served(record)
    groups = record.plan.found[served].groups if served is not None else (tuple(range(len(names))),)
    group_of = {client: g for g, clients in enumerate(groups) for client in clients}
    changes = losses["ours"] - losses["global"]
    rows = [
        TaskDifference(name, group_of.get(i, 0), float(changes[i]), None, None)
        for i, name in enumerate(names)
        if i < len(changes) and np.isfinite(changes[i])
    ]
    if not rows:
        return None
    share = float(np.mean([row.value < 0 for row in rows]))
    told = f"{format_percent(share, 0)} of {count(len(rows), 'client')}"
    text = f"{told} have less loss in their group than under one adapter for all."
    figure = draw_differences("clients", rows, "Difference in loss, nats", digits=3)
    caption = "A client's test loss in its group less that under one adapter for all; below 0 it gains. No intervals."
    return Section("clients", "Who gains", [Text(text), FigureRow((figure,), caption)])


def write_pareto(record: FederationRecord) -> Section | None:
    """Loss against each kind of cost."""
    figures = []
    for axis, read in _AXES:
        points = [
            Point.of_score(
                name, title_of(name), read(one.cost), (one.low, one.nll, one.high), "loss", is_ours=name == "ours"
            )
            for name, one in record.outcome.methods.items()
            if name != record.outcome.served and one.cost is not None and read(one.cost) > 0
        ]
        if len(points) > 1:
            figures.append(draw_front(axis, points, "loss"))
    if not figures:
        return None
    caption = (
        "Lower and further left is better. Dotted: what no other way beats in both. Bars: intervals over clients. What "
        "costs nothing of a kind is left out of that picture."
    )
    return Section("pareto", "Loss against cost", [FigureRow(tuple(figures), caption)])


def _find_served(record: FederationRecord) -> int | None:
    """Place of the partition that serves among those that were found; boosters are added to one of them."""
    for place, one in enumerate(record.plan.found):
        name = name_partition(one.n_groups)
        if record.outcome.served == name or record.outcome.served.startswith(f"{name}-boost-"):
            return place
    return None
