"""How far the first-order expansion is off at given distances along the way to fine-tuned adapters.

In: a run's config, adapters that a validation kept. Out: :class:`ExpansionError` for each distance, over the rows of
each adapter's own tasks. A distance is reached on the straight line from theta0: the adapter's change is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemblelora import stages
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, adapter_state, add_adapter, load_adapter, remove_adapter
from ensemblelora.artifacts import RunFolder, find_seal_fault
from ensemblelora.config import RunConfig
from ensemblelora.errors import StoreError
from ensemblelora.evaluation.linearity import Linearity, measure_linearity
from ensemblelora.gradients.output import choose_modes
from ensemblelora.progress import track
from ensemblelora.stages import Rows
from ensemblelora.startpoint import load_start
from ensemblelora.validation.records import TrueRun
from ensemblelora.validation.validate import TRUTH_FILE

__all__ = ["ExpansionError", "measure_expansion"]

_ROWS = 8
_END, _SCALED = "end", "scaled"


@dataclass(frozen=True)
class ExpansionError:
    """Over all adapters and their own tasks.

    Attributes:
        distance: Relative to the model's norm; none: where fine-tuning ended.
        squared_relative: Mean over cells of ``sum (u_X - u_lin)^2 / sum u_X^2``.
        sd: Of that, over adapters.
        rms_relative: Mean over cells of its root.
        r2_over_zero_order: Median over cells of ``1 - sum (u_X - u_lin)^2 / sum (u_X - u*)^2``.
        n_adapters: Adapters measured.
    """

    distance: float | None
    squared_relative: float
    sd: float | None
    rms_relative: float
    r2_over_zero_order: float | None
    n_adapters: int


def measure_expansion(
    config: RunConfig, folder: Path, runs: Sequence[TrueRun], distances: Sequence[float | None]
) -> tuple[ExpansionError, ...]:
    """Load the model and the kept adapters, and measure each at every distance.

    Args:
        config: The run's.
        folder: Its validation folder.
        runs: Fine-tunings whose adapters are kept there.
        distances: Relative to the model's norm; none: as far as fine-tuning went.

    Raises:
        StoreError: If an adapter is damaged.
    """
    _, rows, probe = stages.prepare(config)
    probe = load_start(config, RunFolder(folder.parent), probe)
    cells: dict[float | None, list[list[Linearity]]] = {distance: [] for distance in distances}
    for run in track(list(runs), "expansion"):
        adapter = folder / "adapters" / run.identity[:16]
        if fault := find_seal_fault(adapter, may_lack_seal=True):
            line = f"the line of {run.identity[:16]} in {folder / TRUTH_FILE}"
            raise StoreError(f"{fault}; delete {line}, and validate again")
        load_adapter(probe, _END, adapter)
        for distance in distances:
            scale = 1.0 if distance is None else distance / run.relative_distance
            cells[distance].append(_measure(probe, rows, run, scale, config))
        remove_adapter(probe, _END)
    return tuple(_summarise(distance, found) for distance, found in cells.items())


def _measure(probe: AdaptedModel, rows: Rows, run: TrueRun, scale: float, config: RunConfig) -> list[Linearity]:
    start, end = adapter_state(probe, THETA0), adapter_state(probe, _END)
    add_adapter(probe, _SCALED, {key: start[key] + scale * (end[key] - start[key]) for key in start})
    own = [split for split in rows.validation if split.task in run.tasks]
    try:
        return list(
            measure_linearity(
                probe,
                own,
                [_SCALED] * len(own),
                choose_modes(rows.learning, config.gradients.output),
                max_rows=_ROWS,
                max_tokens=config.gradients.max_tokens_per_batch,
                meter=Meter("expansion"),
            )
        )
    finally:
        remove_adapter(probe, _SCALED)


def _summarise(distance: float | None, found: Sequence[Sequence[Linearity]]) -> ExpansionError:
    relative = [[cell.rms_relative_error for cell in cells if cell.rms_relative_error is not None] for cells in found]
    by_adapter = [float(np.mean(np.square(values))) for values in relative]
    r2 = [cell.r2_over_zero_order for cells in found for cell in cells if cell.r2_over_zero_order is not None]
    return ExpansionError(
        distance=distance,
        squared_relative=float(np.mean(by_adapter)),
        sd=float(np.std(by_adapter, ddof=1)) if len(by_adapter) > 1 else None,
        rms_relative=float(np.mean([value for values in relative for value in values])),
        r2_over_zero_order=float(np.median(r2)) if r2 else None,
        n_adapters=len(found),
    )
