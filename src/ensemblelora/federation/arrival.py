"""A client that comes later: which group it belongs to, by its own features; nobody is trained again.

In: a finished federation's run folder, the client's file. Out: :class:`Assignment`. All it takes are the weights that
were fitted to each group, one vector of d numbers a group: the client's features stay where its text is.

    predicted loss in group g = mean over its rows of log(1 + exp(-(u + g.w_g)))

Cost: a gradient pass over the client's rows, and if asked for a forward pass for each adapter that is tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.config import load_as
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import StoreError, UsageError
from ensemblelora.federation.clients import read_client
from ensemblelora.federation.gradients import compute_rows
from ensemblelora.federation.judging import SERVED_FILE
from ensemblelora.federation.local import score_sums
from ensemblelora.federation.protocol import Part, Term
from ensemblelora.federation.stages import WEIGHTS_FILE
from ensemblelora.federation.worker import Worker, open_worker
from ensemblelora.tensors import load_tensors

__all__ = ["Assignment", "GroupFit", "assign_client"]

_SEEN: tuple[Part, ...] = ("train", "validation")
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class GroupFit:
    """How a group suits a client.

    Attributes:
        n_clients: Of the group.
        nll: Predicted loss of the client's rows there, in nats.
        gain: Predicted loss of the base model, less that.
        gain_se: Its standard error over the client's rows.
    """

    n_clients: int
    nll: float
    gain: float
    gain_se: float


@dataclass(frozen=True)
class Assignment:
    """Where a client belongs.

    Attributes:
        client: Its name.
        n_rows: Rows that were looked at.
        base_nll: Their loss under the base model, in nats.
        groups: Every group's fit.
        group: The one with the least predicted loss.
        adapters: Folders of its adapters, with what each one's output is multiplied with; those after the first are
            boosters, whose change from theta0 counts.
        measured: Loss of the client's last rows under the base model, the global adapter and the group's; empty unless
            asked for.
    """

    client: str
    n_rows: int
    base_nll: float
    groups: tuple[GroupFit, ...]
    group: int
    adapters: tuple[tuple[str, float], ...]
    measured: Mapping[str, float]


def assign_client(run: Path, file: Path, *, device: str | None = None, is_measured: bool = False) -> Assignment:
    """Assign a client to one of a finished federation's groups.

    Args:
        run: The run folder.
        file: The client's: .txt, .jsonl or .csv.
        device: Where the model runs; none: as in the federation.
        is_measured: Whether the group's adapters are tried on the client's last rows.

    Raises:
        UsageError: If the folder holds no finished federation, or the model is another than the federation's.
        DataError: If the file can't be read or is too short.
        StoreError: If a file of the run is damaged.
    """
    path = artifacts.RunFolder.open(run).path
    if not (path / SERVED_FILE).exists():
        raise UsageError(f"{path}: no finished federation; make one with `ensemblelora federate CONFIG`")
    config = load_as(FederationConfig, path / artifacts.CONFIG_FILE)
    if device is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"device": device})})
    worker = open_worker(config, [read_client(file, config.clients.text_column)])
    made_with = artifacts.read_json(path / artifacts.ENVIRONMENT_FILE)["model"]["fingerprint"]
    if worker.adapted.base.fingerprint != made_with:
        raise UsageError(
            f"{path}: made with another version of {config.model.name!r} or another model.dtype than the one loaded "
            "now; give the original"
        )
    served, weights = _read_served(path)
    rows = np.concatenate([compute_rows(worker, 0, part, meter=Meter("assign")) for part in _SEEN]).astype(np.float64)
    base = np.logaddexp(0.0, -rows[:, 0])
    fits = tuple(
        _fit(base, np.logaddexp(0.0, -(rows[:, 0] + rows[:, 1:] @ own)), len(group["clients"]))
        for own, group in zip(weights, served, strict=True)
    )
    best = min(range(len(fits)), key=lambda g: fits[g].nll)
    members = served[best]["members"]
    return Assignment(
        client=worker.rows.names[0],
        n_rows=len(rows),
        base_nll=float(base.mean()),
        groups=fits,
        group=best,
        adapters=tuple((str(path / artifacts.ADAPTERS_FOLDER / one["adapter"]), float(one["rate"])) for one in members),
        measured=_measure(path, worker, members) if is_measured else {},
    )


def _fit(base: np.ndarray, losses: np.ndarray, n_clients: int) -> GroupFit:
    gains = base - losses
    se = float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else float("nan")
    return GroupFit(n_clients, float(losses.mean()), float(gains.mean()), se)


def _read_served(path: Path) -> tuple[list[dict[str, Any]], np.ndarray]:
    content = artifacts.read_json(path / SERVED_FILE)
    try:
        groups = list(content["groups"])
        weights = artifacts.load_arrays(path / WEIGHTS_FILE)[f"weights {content['partition']}"]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path / SERVED_FILE}: not of this version ({error!r}); run the federation again") from None
    return groups, np.asarray(weights, np.float64)


def _measure(path: Path, worker: Worker, members: list[dict[str, Any]]) -> dict[str, float]:
    """Losses of the client's test rows, which were not looked at before."""
    names = [one["adapter"] for one in members]
    terms: list[Term] = [(1, 1.0)]
    for k, one in enumerate(members[1:], start=2):
        terms += [(k, float(one["rate"])), (0, -float(one["rate"]))]
    sums: dict[str, list[Term]] = {"base": [(0, 1.0)], "group": terms}
    folder = path / artifacts.ADAPTERS_FOLDER
    if (folder / "global").is_dir():
        names.append("global")
        sums["global"] = [(len(names), 1.0)]
    for name in names:
        if fault := artifacts.find_seal_fault(folder / name, may_lack_seal=True):
            raise StoreError(f"{fault}; it is made anew by: ensemblelora federate {path / artifacts.CONFIG_FILE}")
    vectors = np.stack([worker.template.pack(load_tensors(folder / name / _WEIGHTS)) for name in names])
    found = score_sums(worker, 0, "test", vectors, list(sums.values()), meter=Meter("assign")).losses()
    return {name: float(loss) for name, loss in zip(sums, found, strict=True)}
