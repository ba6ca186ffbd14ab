"""Sections of a federation's page that say how: who trains together, what it cost, what was sent. No torch."""

from __future__ import annotations

from ensemblelora import artifacts
from ensemblelora.config import dump_config
from ensemblelora.federation.record import FederationRecord, title_of
from ensemblelora.federation.results import name_partition
from ensemblelora.report.document import Block, Bullets, Cell, Column, Fold, Row, Section, Table, Text
from ensemblelora.report.wording import (
    format_bytes,
    format_flops,
    format_number,
    format_percent,
    format_seconds,
    join_names,
)

__all__ = ["write_again", "write_costs", "write_plan", "write_privacy", "write_traffic"]

_MOST_REFUSED = 12


def write_plan(record: FederationRecord) -> Section:
    """Say who trains together, as predicted and as measured."""
    plan, outcome = record.plan, record.outcome
    errors = plan.surrogate_errors
    told = ", ".join(f"{name} {format_number(value)}" for name, value in errors.items())
    text = (
        f"{plan.n_subsets:,} subsets of {record.config.groups.subset_size} clients; "
        f"{format_percent(plan.share_uncovered)} of all pairs are in none of them. Root mean square error of "
        f"predicting a subset's score from the others: {told}."
    )
    predicted = {**plan.predicted, **{name_partition(one.n_groups): one.predicted_nll for one in plan.found}}
    rows = tuple(
        Row(
            (
                Cell(title_of(name), name),
                Cell(format_number(value, 4)),
                Cell(format_number(outcome.validation.get(name), 4)),
                Cell(format_percent(outcome.residuals.get(name))),
            )
        )
        for name, value in predicted.items()
    )
    columns = (
        Column("Trained together", is_number=False),
        Column("Predicted loss"),
        Column("Measured"),
        Column("Cut off"),
    )
    note = (
        "Validation loss, predicted from features before training, and as clients measured it (partitions alone). Cut "
        "off: what the adapter's rank could not hold of a round's mean change, in norm."
    )
    sizes = tuple(
        Row(
            (
                Cell(str(one.n_groups)),
                Cell(", ".join(str(len(group)) for group in one.groups)),
                Cell(_gap(one.objective, one.bound)),
            )
        )
        for one in plan.found
    )
    groups = Table(
        "Sizes of groups",
        (Column("Groups", is_number=False), Column("Clients of each", is_number=False), Column("Gap to the bound")),
        sizes,
        summary="Sizes, and how far from the relaxation's bound",
    )
    return Section(
        "plan", "Who trains together", [Text(text), Table("Predicted and measured", columns, rows, note), groups]
    )


def _gap(objective: float, bound: float) -> str:
    return format_percent((bound - objective) / abs(bound)) if bound else format_number(bound - objective)


def write_costs(record: FederationRecord) -> Section:
    """List every stage's cost."""
    columns = (
        Column("Stage", is_number=False),
        Column("Time"),
        Column("FLOPs"),
        Column("Tokens"),
        Column("Server's peak"),
    )
    rows = tuple(
        Row(
            (
                Cell(stage["stage"]),
                Cell(format_seconds(stage["wall_seconds"])),
                Cell(format_flops(stage["flops"])),
                Cell(f"{stage['n_tokens']:,}"),
                Cell(format_bytes(stage["peak_memory_bytes"])),
            )
        )
        for stage in record.costs["stages"]
    )
    server = record.outcome.server
    engine = record.config.engine.kind
    note = (
        f"FLOPs and tokens as clients count them. Engine: {engine}"
        f"{', so that the peak holds clients and model, too' if engine == 'process' else ''}. Of what the server "
        f"holds, features are {format_bytes(server['features_bytes'])} and adapters "
        f"{format_bytes(server['adapters_bytes'])}."
    )
    return Section("costs", "What it cost", [Table("Stages", columns, rows, note)])


def write_traffic(record: FederationRecord) -> Section:
    """List what was sent, and what was not used."""
    outcome = record.outcome
    columns = (
        Column("Stage", is_number=False),
        Column("Messages"),
        Column("No reply"),
        Column("Refused"),
        Column("To clients"),
        Column("From clients"),
        Column("Most of one"),
    )
    rows = tuple(
        Row(
            (
                Cell(name),
                Cell(f"{one['n_messages']:,}"),
                Cell(f"{one['n_missing']:,}"),
                Cell(f"{one['n_refused']:,}"),
                Cell(format_bytes(one["down_bytes"])),
                Cell(format_bytes(one["up_bytes"])),
                Cell(format_bytes(one["most_up_of_a_client_bytes"])),
            )
        )
        for name, one in outcome.traffic.items()
    )
    blocks: list[Block] = [Table("Messages", columns, rows, "Bytes of arrays and values; transport adds its own.")]
    if outcome.refused:
        told = tuple(f"{stage}: {client}: {reason}" for stage, client, reason in outcome.refused[:_MOST_REFUSED])
        more = len(outcome.refused) - len(told)
        blocks.append(Bullets((*told, *([f"and {more} more, in traffic.json"] if more else [])), is_warning=True))
    return Section("traffic", "What was sent", blocks)


def write_privacy(record: FederationRecord) -> Section:
    """Say what leaves a client, and what is guaranteed of it."""
    told, config = record.outcome.privacy, record.config.privacy
    kinds = (
        (
            "features",
            f"Features, sent {told['n_features']} times at most" if told["n_features"] > 1 else "Features, sent once",
            config.clip_norm,
            config.noise_multiplier,
        ),
        (
            "updates",
            f"Changed adapters, at most {told['n_updates']} of a client",
            config.update_clip_norm,
            config.update_noise_multiplier,
        ),
        ("together", "Both", None, None),
    )
    rows = tuple(
        Row((Cell(title), Cell(format_number(clip)), Cell(format_number(noise)), Cell(_write_epsilon(told[key]))))
        for key, title, clip, noise in kinds
    )
    columns = (
        Column("What", is_number=False),
        Column("Norm"),
        Column("Noise multiplier"),
        Column(f"Epsilon at delta {told['delta']:g}"),
    )
    note = (
        "Differential privacy of one row of a client, replaced by any other, against whoever reads what the client "
        "sends. Not covered: numbers of rows and tokens, and the losses and weights that clients report."
    )
    sent = "projected gradients of single rows" if record.config.features.send == "rows" else "sums over rows"
    return Section(
        "privacy",
        "What leaves a client",
        [Text(f"Texts never do. Features: {sent}."), Table("Guarantee", columns, rows, note)],
    )


def _write_epsilon(value: float | None) -> str:
    return "none" if value is None else format_number(value)


def write_again(record: FederationRecord) -> Section:
    """Say how to make the same again."""
    command = f"ensemblelora federate {record.folder / artifacts.CONFIG_FILE}"
    folded = Fold(dump_config(record.config).strip(), summary="The config (config.yaml)", language="yaml")
    names = join_names(list(record.plan.names), 8)
    return Section(
        "again", "Make it again", [Fold(command, language="sh"), Text(f"Clients: {names}.", is_quiet=True), folded]
    )
