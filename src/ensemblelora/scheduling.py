"""Independent jobs by name: here, one after the other, or on a Ray cluster. The only module that knows Ray.

In: a function, jobs (a name and arguments each), and :class:`Equipment`, what every job works with. Out: results as
they come. A process makes its equipment once and keeps it for later jobs; what it is made of goes by reference, once a
machine. Arguments and results should be small: what is large, a job leaves in the run folder.

A job whose worker is lost is begun again elsewhere, so it must leave the same behind however often it is begun. What a
job says and warns of is said here while it runs, under its name. No torch; Ray is imported when a cluster is opened.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, fields
from typing import Any, Protocol

from ensemblelora.errors import ClusterError, EnsembleLoraError, MissingExtraError, UsageError, first_line
from ensemblelora.progress import note, track
from ensemblelora.relay import Line, relayed, say

__all__ = ["HERE", "Cluster", "Equipment", "Job", "Needs", "Scheduler", "open_scheduler", "read_cluster"]

_INSTALL = "run: pip install 'ensemblelora[cluster]'"
_RETRIES = 3
_MOST_KEPT = 2  # equipments of a process: the model of a run, and its oracle
_LISTENING_SECONDS = 1.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One piece of work that needs nothing of the others."""

    name: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Needs:
    """What a job holds of a machine while it runs; parts of an accelerator included."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float = 0.0


@dataclass(frozen=True, eq=False)
class Equipment:
    """What every job works with: as it is in this process, and how another process makes the same.

    Attributes:
        value: Of this process.
        identity: A process that has made one of this identity keeps it.
        make: Called with ``given`` in another process.
        given: What it is made of.
    """

    value: Any
    identity: str
    make: Callable[..., Any]
    given: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """Where jobs run; made by :func:`read_cluster`.

    Attributes:
        address: Of a running Ray cluster, or ``auto``; none: processes of this machine.
        n_local: How many of these.
        needs: Of one job; none: by what there is.
    """

    address: str | None
    n_local: int = 0
    needs: Needs | None = None


class Scheduler(Protocol):
    """Carries out jobs."""

    @property
    def n_workers(self) -> int:
        """How many jobs run at once in other processes; 0: all run in this one."""

    def run(
        self,
        function: Callable[..., Any],
        jobs: Sequence[Job],
        equipment: Equipment,
        *,
        what: str,
        on_gpu: bool = True,
    ) -> Iterator[tuple[Job, Any]]:
        """Carry out jobs, and yield each with its result when it is done; elsewhere all begin with the call.

        Args:
            function: Of a module; called with the equipment's value and a job's arguments.
            jobs: In any number.
            equipment: What they work with.
            what: Names them all together, for progress.
            on_gpu: Whether a job uses the accelerator.

        Raises:
            ClusterError: If a job's worker is lost again and again.
        """


class _Here:
    """One job after the other, in this process."""

    n_workers = 0

    def run(
        self,
        function: Callable[..., Any],
        jobs: Sequence[Job],
        equipment: Equipment,
        *,
        what: str,
        on_gpu: bool = True,
    ) -> Iterator[tuple[Job, Any]]:
        """As :meth:`Scheduler.run`."""
        for job in track(jobs, what):
            yield job, function(equipment.value, *job.arguments)


HERE: Scheduler = _Here()
"""jobs run in this process"""


def read_cluster(text: str | None, per_job: str | None = None) -> Cluster | None:
    """Understand what a user names a cluster by; none where nothing is named.

    Args:
        text: ``local:N`` for N processes of this machine, ``auto`` for the cluster that this machine is part of, or the
            address of one.
        per_job: What one job holds, such as ``cpus=4,gpus=0.5,memory_gb=16``.

    Raises:
        UsageError: If one of them can't be understood.
        MissingExtraError: If Ray is not installed.

    Example:
        >>> read_cluster("local:2", "gpus=0.5")
        Cluster(address=None, n_local=2, needs=Needs(cpus=1.0, gpus=0.5, memory_gb=0.0))
    """
    if text is None:
        if per_job is not None:
            raise UsageError(f"--per-job {per_job}: says what a job holds on a cluster; name one with --cluster")
        return None
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError(f"--cluster {text}: package ray is not installed; {_INSTALL}")
    needs = None if per_job is None else _read_needs(per_job)
    kind, _, count = text.partition(":")
    if kind != "local":
        return Cluster(text, needs=needs)
    if not count.isdigit() or int(count) < 1:
        raise UsageError(f"--cluster {text}: expected local:N with a number of processes, such as local:2")
    return Cluster(None, int(count), needs)


@contextmanager
def open_scheduler(cluster: Cluster | None) -> Iterator[Scheduler]:
    """Give what carries out jobs: this process, or a cluster that is started or joined, and left at the end.

    Raises:
        UsageError: If the cluster can't be reached, or no job fits into it.
    """
    if cluster is None:
        yield HERE
        return
    ray = importlib.import_module("ray")
    is_new = not ray.is_initialized()
    with redirect_stdout(sys.stderr):  # where Ray says that a worker was lost, as late as while it ends
        if is_new:
            _connect(ray, cluster)
        try:
            scheduler = _OnRay(ray, _settle_needs(ray, cluster))
            _check_room(ray, cluster, scheduler.needs)
            note(f"cluster: {scheduler.n_workers} jobs at once, each holds {_describe_needs(scheduler.needs)}")
            yield scheduler
        finally:
            if is_new:
                ray.shutdown()


class _OnRay:
    """Jobs as tasks of a Ray cluster."""

    def __init__(self, ray: Any, needs: Needs) -> None:
        self.needs, self._ray = needs, ray
        self._task = ray.remote(_carry_out)
        self._shared: dict[str, tuple[Any, ...]] = {}
        here = ray.get_runtime_context().get_node_id()  # which is lost only with this process
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        place = strategies.NodeAffinitySchedulingStrategy(here, soft=True)
        self._mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=place).remote()

    @property
    def n_workers(self) -> int:
        """How many jobs fit into the cluster as it is now."""
        return max(1, sum(_count_fitting(node, self.needs) for node in _list_nodes(self._ray)))

    def run(
        self,
        function: Callable[..., Any],
        jobs: Sequence[Job],
        equipment: Equipment,
        *,
        what: str,
        on_gpu: bool = True,
    ) -> Iterator[tuple[Job, Any]]:
        """As :meth:`Scheduler.run`."""
        if equipment.identity not in self._shared:
            self._shared[equipment.identity] = tuple(self._ray.put(value) for value in equipment.given)
        options: dict[str, Any] = {"max_retries": _RETRIES, "scheduling_strategy": "SPREAD"}
        options |= {"num_cpus": self.needs.cpus, "memory": int(self.needs.memory_gb * 1e9) or None}
        options["num_gpus"] = self.needs.gpus if on_gpu else 0
        start = (self._mailbox, function, equipment.make, equipment.identity)
        given = self._shared[equipment.identity]
        running = {self._task.options(name=job.name, **options).remote(job, *start, *given): job for job in jobs}
        return self._collect(running, what)

    def _collect(self, running: dict[Any, Job], what: str) -> Iterator[tuple[Job, Any]]:
        try:
            yield from track(self._wait_for(running), what, total=len(running))
        finally:
            for reference in running:  # one failed, or nobody wants the rest
                self._ray.cancel(reference, force=True)

    def _wait_for(self, running: dict[Any, Job]) -> Iterator[tuple[Job, Any]]:
        while running:
            done, _ = self._ray.wait(list(running), timeout=_LISTENING_SECONDS)
            with suppress(self._ray.exceptions.RayError):  # nothing is said then; jobs go on
                say(self._ray.get(self._mailbox.take.remote()))
            for reference in done:
                job = running.pop(reference)
                yield job, self._read(reference, job)

    def _read(self, reference: Any, job: Job) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:  # the job itself failed
            if isinstance(error.cause, EnsembleLoraError):
                raise error.cause from None
            raise error.cause from error
        except errors.RayError as error:
            raise ClusterError(
                f"job {job.name!r}: lost with its worker {1 + _RETRIES} times ({first_line(error)}); what was finished "
                "is kept: give the same command again"
            ) from error


_made: dict[str, Any] = {}
"""equipment of this process, the latest last"""


class _Mailbox:
    """Keeps what jobs say until it is taken; a process of the cluster, beside the one that was started."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def put(self, line: Line) -> None:
        """Keep one line."""
        self._lines.append(line)

    def take(self) -> list[Line]:
        """All since the last time."""
        lines, self._lines = self._lines, []
        return lines


def _carry_out(
    job: Job, mailbox: Any, function: Callable[..., Any], make: Callable[..., Any], identity: str, *given: Any
) -> Any:
    """Carry out one job in a worker, sending what it says meanwhile."""
    sent: list[Any] = []

    def send(line: Line) -> None:
        sent[:] = [mailbox.put.remote(line)]

    try:
        with relayed(job.name, send):
            if identity not in _made:
                while len(_made) >= _MOST_KEPT:
                    del _made[next(iter(_made))]
                _made[identity] = make(*given)
            return function(_made[identity], *job.arguments)
    finally:
        if sent:  # in their order: with the last, all have arrived
            importlib.import_module("ray").wait(sent, timeout=10 * _LISTENING_SECONDS)


def _read_needs(text: str) -> Needs:
    """Understand ``cpus=4,gpus=0.5``."""
    known, given = [field.name for field in fields(Needs)], dict[str, float]()
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            given[name] = float(number)
        except ValueError:
            given[name] = -1.0
        if name not in known or not 0 <= given[name] < float("inf"):
            raise UsageError(f"--per-job {text}: expected some of {', '.join(f'{key}=NUMBER' for key in known)}")
    return Needs(**given)


def _connect(ray: Any, cluster: Cluster) -> None:
    """Start Ray on this machine, or join a cluster; its own talk is left out."""
    # "local", and not none, which would join a cluster that runs here or that RAY_ADDRESS names.
    address = cluster.address or "local"
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "address": address}
    if cluster.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cpus = (cluster.needs or _share_cores(cluster)).cpus
        # A job's threads are the cores it holds: several with all of them would fight over the machine. Elsewhere Ray
        # sees to it; here it would take over what is set for this process.
        variables = {"OMP_NUM_THREADS": str(max(1, int(cpus))), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        options |= {"num_cpus": max(1, round(cluster.n_local * cpus)), "include_dashboard": False}
        options["runtime_env"] = {"env_vars": variables}
    try:
        with warnings.catch_warnings():
            # What another version of Ray will do, and files that it leaves open.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", ResourceWarning)
            ray.init(**options)
    except Exception as error:  # a machine that is too busy is a plain one
        ray.shutdown()
        remedy = "try again when it is less busy" if cluster.address is None else "start it with `ray start --head`"
        raise UsageError(
            f"--cluster {cluster.address or f'local:{cluster.n_local}'}: Ray can't be started or reached "
            f"({first_line(error)}); {remedy}"
        ) from error


def _share_cores(cluster: Cluster) -> Needs:
    """The cores of this machine in equal parts; of a cluster elsewhere, one."""
    if cluster.address is not None:
        return Needs()
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Needs(cpus=max(1, n_cores // cluster.n_local))


def _settle_needs(ray: Any, cluster: Cluster) -> Needs:
    """What a job holds: as asked for; else an equal part of this machine, or one accelerator and its share of cores."""
    if cluster.needs is not None:
        return cluster.needs
    nodes = [node for node in _list_nodes(ray) if node.get("GPU")]
    if cluster.address is None:
        share = sum(node["GPU"] for node in nodes) / cluster.n_local
        return Needs(_share_cores(cluster).cpus, share if share < 1 else float(int(share)))
    shares = [node.get("CPU", 0.0) // node["GPU"] for node in nodes]  # where cores are without accelerators, no job is
    return Needs(float(max(1, min(shares))), 1.0) if shares else Needs()


def _check_room(ray: Any, cluster: Cluster, needs: Needs) -> None:
    """Say where no machine could take a job.

    Raises:
        UsageError: If that won't change.
    """
    if any(_count_fitting(node, needs) for node in _list_nodes(ray)):
        return
    fault = f"no machine of the cluster has {_describe_needs(needs)} for a job"
    if cluster.address is None:
        raise UsageError(f"--per-job: {fault}; ask for less")
    _logger.warning("%s yet; jobs wait for one that has", fault)


def _list_nodes(ray: Any) -> list[dict[str, float]]:
    """Resources of the machines that are there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _count_fitting(node: dict[str, float], needs: Needs) -> int:
    """How many jobs a machine takes."""
    held = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory_gb * 1e9}
    return min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in held.items() if amount), default=1)


def _describe_needs(needs: Needs) -> str:
    held = [f"{field.name}={getattr(needs, field.name):g}" for field in fields(needs) if getattr(needs, field.name)]
    return ",".join(held) or "nothing"
