"""What the benchmark of a federation recorded, as sections of docs/measured.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from ensemblelora.reproduction import paper

__all__ = ["render_federated", "render_ways"]

Record = dict[str, Any]

_NOTHING = "-"
_RATIOS = {
    "loss over global": "What serves over one adapter for all, loss",
    "flops over global": "The same, FLOPs",
    "flops over mtl-ft": "Over one for all, then each client alone, FLOPs",
    "memory over mtl-ft": "The same, bytes of adapters",
}
_TITLES = {
    "base": "the model as it is",
    "global": "one adapter for all",
    "random": "random groups",
    "mtl-ft": "one for all, then each client alone",
    "local": "each client alone",
    "weighted": "the groups that serve, weighed by each client",
}


def render_federated(record: Record) -> Iterator[str]:
    """Every method over all clients."""
    outcome, recipe = record["outcome"], record["config"]["recipe"]
    if record.get("left"):
        yield from _wrap(f"**Partial**: the time was over before {'; '.join(record['left'])}.")
        yield ""
    rows, engine, n_epochs = outcome["n_rows"], recipe["engine"]["kind"], recipe["training"]["num_train_epochs"]
    yield from _wrap(
        f"`ensemblelora federate`, {outcome['n_registered']} clients, {rows['train']:,} training and "
        f"{rows['test']:,} test rows of up to {recipe['clients']['max_length']} tokens, "
        f"{n_epochs} epoch{'s' * (n_epochs > 1)}, engine {engine}, {record['wall_seconds'] / 60:.0f} minutes. "
        f"Mean over clients of each one's test loss (nats a token), {outcome['confidence']:.0%} intervals over clients "
        "in brackets. Bytes: sent to and from a client, on average. Numbers of groups and boosters were chosen by "
        f"validation rows: {outcome['served']} serves."
    )
    yield ""
    yield "| method | test loss | against one for all | better for | FLOPs | bytes of a client |"
    yield "|---|---|---|---|---|---|"
    for name, one in sorted(outcome["methods"].items(), key=lambda item: item[1]["nll"]):
        if name == "ours":
            continue
        change = _format_change(one)
        better = _NOTHING if one["share_better"] is None else f"{one['share_better']:.0%}"
        flops, sent = one["cost"]["flops"], one["cost"]["bytes_per_client"] / 1e6
        loss = f"{one['nll']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        yield f"| {_title(name)} | {loss} | {change} | {better} | {flops:.3g} | {sent:.2f} MB |"
    for key, label in _RATIOS.items():
        if (ratio := record.get(key.replace(" ", "_"))) is not None:
            yield from ("", f"{label}: {ratio:.3g} times; the paper: {paper.FEDERATED[key]:.3g}.")
    if "global" in record["stages"]:
        flops = {name: record["stages"][name]["flops"] for name in ("features", "plan", "global")}
        share = (flops["features"] + flops["plan"]) / flops["global"]
        yield ""
        yield from _wrap(
            f"Gradients and the choice of groups cost {share:.2f} times the FLOPs of one adapter for all; beside a "
            f"training of ten epochs, the paper's, it would be {share * n_epochs / 10:.2f} times."
        )
    chosen = record["chosen"]
    told = ", ".join(f"{name} {value:.3f}" for name, value in chosen["predicted"].items())
    yield ""
    yield from _wrap(
        f"Predicted validation loss: {told}. {chosen['share_uncovered']:.1%} of all pairs of clients are in no subset."
    )
    server, cut = outcome["server"], outcome["residuals"]
    kept = ", ".join(f"{kept} of {tried} with {m} groups" for m, (kept, tried) in outcome["kept_boosters"].items())
    yield ""
    yield from _wrap(
        f"The server holds {server['features_bytes'] / 1e6:.1f} MB of features and "
        f"{server['adapters_bytes'] / 1e6:.1f} MB of adapters. What the rank could not hold of a round's mean change: "
        f"{max(cut.values()):.1%} at most. Boosters kept: {kept}."
    )


def render_ways(record: Record) -> Iterator[str]:
    """Exact means against means of factors."""
    yield from _wrap(
        f"Federated averaging of B A, exactly and cut to the adapter's rank, against means of B and of A; the same "
        f"{record['n_clients']} clients, rows and steps. *Cut off*: what the rank could not hold of a round's mean "
        "change, in norm."
    )
    yield ""
    yield "| trained | exact | factors | difference | cut off |"
    yield "|---|---|---|---|---|"
    for name, one in record["ways"].items():
        change = f"{one['difference']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"
        yield f"| {_title(name)} | {one['exact']:.4f} | {one['factors']:.4f} | {change} | {one['cut_off']:.1%} |"


def _title(name: str) -> str:
    if name in _TITLES:
        return _TITLES[name]
    numbers = [part for part in name.split("-") if part.isdigit()]
    return f"{numbers[0]} groups" + (f", {numbers[1]} booster{'s' * (numbers[1] != '1')}" if len(numbers) > 1 else "")


def _format_change(one: Record) -> str:
    if one["difference"] is None:
        return _NOTHING
    return f"{one['difference']:+.3f} [{one['difference_low']:+.3f}, {one['difference_high']:+.3f}]"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, width=120, break_on_hyphens=False)
