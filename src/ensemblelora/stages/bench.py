"""What the independent jobs of a run work with, in this process or in others: config, folder, rows, model.

Another process loads the same model and attaches the same theta0; rows are handed to it as they are encoded, and what a
job leaves goes into the run folder, which all machines of a cluster must see under the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ensemblelora import __version__, artifacts
from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.adapters import AdaptedModel, attach
from ensemblelora.config import RunConfig
from ensemblelora.errors import ClusterError
from ensemblelora.gradients.plan import CHUNK
from ensemblelora.models import Head, load_base
from ensemblelora.scheduling import Equipment, Job, Scheduler
from ensemblelora.stages.rows import Rows, share_lower_layers
from ensemblelora.startpoint import load_start

__all__ = ["Bench", "equip", "measure_job", "run_measured"]


@dataclass(frozen=True, eq=False)
class Bench:
    """One process's own."""

    config: RunConfig
    folder: artifacts.RunFolder
    rows: Rows
    probe: AdaptedModel


def equip(
    config: RunConfig,
    path: Path,
    rows: Rows,
    probe: AdaptedModel,
    start_fingerprint: str,
    *,
    marker: str = artifacts.RUN_FILE,
) -> Equipment:
    """Say what a run's jobs work with.

    Args:
        config: The run's.
        path: Its folder.
        rows: Of all tasks.
        probe: The model at its start point.
        start_fingerprint: Identity of that.
        marker: A file that is in the folder.
    """
    folder = artifacts.RunFolder(path.resolve())
    identity = artifacts.fingerprint(start_fingerprint, rows.learning_fingerprint(), config, str(folder.path))
    n_labels = int(getattr(probe.base.model.config, "num_labels", 2))
    given = (__version__, rows, config, folder, probe.base.head, n_labels, probe.base.fingerprint, marker)
    return Equipment(Bench(config, folder, rows, probe), identity, _set_up, given)


def run_measured(
    scheduler: Scheduler,
    function: Callable[..., Any],
    jobs: Sequence[Job],
    equipment: Equipment,
    meter: Meter,
    *,
    what: str,
) -> Iterator[tuple[Job, Any]]:
    """Carry out jobs elsewhere whose function takes a meter last, and enter what they cost.

    Args:
        scheduler: Of a cluster.
        function: Called with the equipment's value, a job's arguments and a meter.
        jobs: Independent of each other.
        equipment: What they work with.
        meter: Of the stage.
        what: Names them all together.

    Yields:
        Each job with its result, when it is done.
    """
    for job, (result, spent) in scheduler.run(partial(measure_job, function), jobs, equipment, what=what):
        meter.add_record(spent)
        yield job, result


def measure_job(function: Callable[..., Any], value: Any, *arguments: Any) -> tuple[Any, StageRecord]:
    """Carry out a job whose function takes a meter last; give its result and what it cost."""
    with Meter("job") as meter:
        result = function(value, *arguments, meter)
    return result, meter.record


def _set_up(
    version: str,
    rows: Rows,
    config: RunConfig,
    folder: artifacts.RunFolder,
    head: Head,
    n_labels: int,
    fingerprint: str,
    marker: str = artifacts.RUN_FILE,
) -> Bench:
    """Make the same in another process.

    Raises:
        ClusterError: If this package is of another version there, the run folder is not, or the model is another one.
    """
    if version != __version__:
        raise ClusterError(
            f"a worker of the cluster has ensemblelora {__version__}, this command is {version}; install the same"
        )
    if not (folder.path / marker).exists():
        raise ClusterError(
            f"{folder.path}: a worker of the cluster does not see this run folder; put it on a file system that all "
            "machines share (--out)"
        )
    # Which accelerator a job has is the cluster's to say.
    device = config.model.device.partition(":")[0]
    model = config.model.model_copy(update={"device": device})
    base = load_base(model, head=head, n_labels=n_labels, max_length=config.data.max_length)
    if base.fingerprint != fingerprint:
        raise ClusterError(
            f"model {config.model.name!r}: a worker of the cluster has other weights or another precision than this "
            "process; set model.dtype, and a revision or a folder that all machines share"
        )
    probe = load_start(config, folder, attach(base, config.adapter, seed=config.seed))
    probe = share_lower_layers(config, folder.path, probe, rows, most_examples=CHUNK)
    return Bench(config, folder, rows, probe)
