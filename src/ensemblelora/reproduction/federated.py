"""The paper's extension to 500 clients, from finished federations: ours beside its numbers. No torch.

In: folders of ``ensemblelora federate``. Out: :class:`~.exhibit.Reproduction`. The paper prints no table of it; its
text (section 3.3, "Extension") has four ratios that can be compared, and ``extension`` has them; ``extension-sizes``
has every number of groups and boosters that a federation tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ensemblelora.federation.record import FederationRecord, read_record, title_of
from ensemblelora.federation.results import MethodCost, MethodOutcome
from ensemblelora.report.wording import count
from ensemblelora.reproduction import paper
from ensemblelora.reproduction.exhibit import Reproduction, Row

__all__ = ["FEDERATED_EXHIBITS"]

_PAPER = (
    "The paper: Llama-3-1B, QLoRA, 500 speaking roles of Shakespeare's plays, 2,000 subsets of 10, 10 to 30 groups, 1 "
    "to 10 boosters; memory is a GPU's. Its loss is as printed, of what tokens it does not say."
)
_OURS = (
    "Ours: next tokens, in the mean over clients. Memory: bytes of all adapters a method needs. MTL-FT: fine-tuned "
    "from the global adapter by each client."
)


def _extension(folders: Sequence[Path]) -> Reproduction:
    rows: list[Row] = []
    for folder in folders:
        record = read_record(folder)
        methods = record.outcome.methods
        for label, printed in paper.FEDERATED.items():
            what, _, other = label.partition(" over ")
            value = _relate(methods.get("ours"), methods.get(other), what)
            rows.append(_cell(record, what, f"ours over {other}", "ratio", value, printed))
    return _finish("extension", "One adapter a group of clients, against one for all and one for each", rows, folders)


def _extension_sizes(folders: Sequence[Path]) -> Reproduction:
    rows: list[Row] = []
    for folder in folders:
        record = read_record(folder)
        methods, shared = record.outcome.methods, record.outcome.methods.get("global")
        for name, one in methods.items():
            for what in ("loss", "flops", "memory", "sent"):
                rows.append(
                    _cell(record, title_of(name), f"{what} over global", "ratio", _relate(one, shared, what), None)
                )
    return _finish("extension-sizes", "Numbers of groups and boosters, over one adapter for all", rows, folders)


def _relate(method: MethodOutcome | None, other: MethodOutcome | None, what: str) -> float | None:
    """A method's number over another's; none where one is missing or zero."""
    if method is None or other is None:
        return None
    if what == "loss":
        return method.nll / other.nll if other.nll else None
    read: Mapping[str, Callable[[MethodCost], float]] = {
        "flops": lambda cost: cost.flops,
        "memory": lambda cost: cost.adapter_bytes,
        "sent": lambda cost: cost.bytes_per_client,
    }
    if method.cost is None or other.cost is None or not read[what](other.cost):
        return None
    return read[what](method.cost) / read[what](other.cost)


def _cell(record: FederationRecord, row: str, column: str, unit: str, ours: float | None, printed: float | None) -> Row:
    return {
        "folder": record.folder.resolve().name,
        "row": row,
        "column": column,
        "unit": unit,
        "ours": ours,
        "sd": None,
        "paper": printed,
    }


def _finish(exhibit: str, title: str, rows: Sequence[Row], folders: Sequence[Path]) -> Reproduction:
    return Reproduction(exhibit, title, tuple(rows), (*(_describe(read_record(f)) for f in folders), _OURS, _PAPER))


def _describe(record: FederationRecord) -> str:
    outcome, config = record.outcome, record.config
    rounded = " (itself a dequantised 4-bit file)" if config.model.name.endswith((".gguf", "smollm2-135m")) else ""
    sizes = ", ".join(f"{n:,} {part}" for part, n in outcome.n_rows.items())
    return (
        f"{record.folder.resolve().name}: {config.model.name}{rounded}, {config.adapter.method}, "
        f"{count(outcome.n_registered, 'client')}, {sizes} rows in all, "
        f"{count(config.training.num_train_epochs, 'epoch')}; ours is {outcome.served}"
    )


FEDERATED_EXHIBITS: Mapping[str, Callable[[Sequence[Path]], Reproduction]] = {
    "extension": _extension,
    "extension-sizes": _extension_sizes,
}
