"""Measured cost of each stage, and the ledger that ``costs.json`` is written from.

A :class:`Meter` wraps one stage and counts wall seconds, peak memory, tokens and FLOPs. Peak process memory is
sampled by a thread, since the system's own high-water mark can't be set back between stages; a peak shorter than
the sampling interval can be missed. Torch is asked about its accelerator only if the stage itself loaded it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]  # ships no types

from ensemblelora.errors import StoreError

__all__ = ["Ledger", "Meter", "MethodCosts", "StageRecord", "release_memory"]

_SAMPLING_SECONDS = 0.02
_WORTH_RELEASING = 2**27
_after_release = [0]
"""resident bytes of this process when memory was last given back"""
_COUNTS = ("flops", "n_tokens", "n_padded_tokens", "dequantization_flops")


@dataclass(frozen=True)
class StageRecord:
    """What one stage cost.

    Attributes:
        stage: The stage's name.
        wall_seconds: Elapsed time.
        flops: Floating-point operations, by formula.
        n_tokens: Tokens the model read, without padding; each pass counts.
        n_padded_tokens: Positions the model computed, padding included.
        peak_memory_bytes: Highest resident memory of a process during the stage.
        peak_accelerator_bytes: Highest memory torch held on the accelerator; none where there is none.
        dequantization_flops: Operations that unpack a 4-bit base, one a weight and pass; not in ``flops``.
        added_memory_bytes: Of the peak, what was not resident when the stage began.
        parts: What single parts took, by identity, that can be used again without the others; in a ledger, of earlier
            inputs too.
    """

    stage: str
    wall_seconds: float = 0.0
    flops: int = 0
    n_tokens: int = 0
    n_padded_tokens: int = 0
    peak_memory_bytes: int = 0
    peak_accelerator_bytes: int | None = None
    dequantization_flops: int = 0
    added_memory_bytes: int = 0
    parts: Mapping[str, StageRecord] = field(default_factory=dict, hash=False)

    def joined(self, later: StageRecord) -> StageRecord:
        """Return the cost of a stage that was interrupted and went on: sums, and the higher of the peaks."""
        peaks = [peak for peak in (self.peak_accelerator_bytes, later.peak_accelerator_bytes) if peak is not None]
        return StageRecord(
            stage=self.stage,
            wall_seconds=self.wall_seconds + later.wall_seconds,
            flops=self.flops + later.flops,
            n_tokens=self.n_tokens + later.n_tokens,
            n_padded_tokens=self.n_padded_tokens + later.n_padded_tokens,
            peak_memory_bytes=max(self.peak_memory_bytes, later.peak_memory_bytes),
            peak_accelerator_bytes=max(peaks, default=None),
            dequantization_flops=self.dequantization_flops + later.dequantization_flops,
            added_memory_bytes=max(self.added_memory_bytes, later.added_memory_bytes),
            parts=_join_parts(self.parts, later.parts),
        )

    def shared_out(self, shares: Mapping[str, int]) -> dict[str, StageRecord]:
        """Divide the counts and the time in proportion; what is whole stays whole, and adds up again."""
        found, stop, total = {}, 0, sum(shares.values())
        for name, share in shares.items():
            start, stop = stop, stop + share
            values = {key: getattr(self, key) for key in _COUNTS}
            counts = {key: value * stop // total - value * start // total for key, value in values.items()}
            found[name] = replace(self, wall_seconds=self.wall_seconds * share / total, **counts)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; without parts, where there are none."""
        values = dataclasses.asdict(replace(self, parts={}))
        del values["parts"]
        return values | ({"parts": {name: one.to_dict() for name, one in self.parts.items()}} if self.parts else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageRecord:
        """Read what :meth:`to_dict` gave; a TypeError or AttributeError if it is something else."""
        parts = {name: cls.from_dict(one) for name, one in values.get("parts", {}).items()}
        return cls(**{**values, "parts": parts})


@dataclass(frozen=True)
class MethodCosts:
    """What one way of serving the tasks costs to choose, to train and to use.

    Attributes:
        train_flops: FLOPs of fine-tuning.
        select_flops: FLOPs spent before fine-tuning on deciding what to train.
        inference_forward_passes: Forward passes per prediction.
        adapter_bytes: Bytes of all adapters kept.
        train_seconds: Measured time of fine-tuning.
    """

    train_flops: int = 0
    select_flops: int = 0
    inference_forward_passes: float = 1.0
    adapter_bytes: int = 0
    train_seconds: float = 0.0


@dataclass(frozen=True)
class Ledger:
    """The costs of a run so far.

    Attributes:
        stages: Of the run as it is now, in the order they first ran: of what was used again, what it cost to make.
        methods: By name.
        unconfirmed: Of stages that have not been looked at again since something before them was done anew. What they
            left may still be used, and is counted then.
    """

    stages: tuple[StageRecord, ...] = ()
    methods: Mapping[str, MethodCosts] = field(default_factory=dict)
    unconfirmed: tuple[StageRecord, ...] = ()

    def with_stage(self, record: StageRecord, *, parts: Collection[str] = ()) -> Ledger:
        """Return the ledger with a stage's cost entered; one that is already there is replaced.

        Args:
            record: What the stage has cost now, all attempts at it together.
            parts: What it consists of, once it is finished: of a part that was not made now, what it cost is added.
        """
        noted = next((old.parts for old in (*self.stages, *self.unconfirmed) if old.stage == record.stage), {})
        made = record.parts
        for name in dict.fromkeys(parts):
            if name in noted and name not in made:
                record = record.joined(noted[name])
        # Parts of other inputs stay noted: their files may be there still when they are asked for again.
        record = replace(record, parts={**noted, **made})
        known = {old.stage: old for old in self.stages} | {record.stage: record}
        waiting = tuple(one for one in self.unconfirmed if one.stage != record.stage)
        return replace(self, stages=tuple(known.values()), unconfirmed=waiting)

    def doubting(self, names: Collection[str]) -> Ledger:
        """Return the ledger with these stages' costs uncounted until each is confirmed or done again."""
        doubted = tuple(record for record in self.stages if record.stage in names)
        again = {record.stage for record in doubted}
        return replace(
            self,
            stages=tuple(record for record in self.stages if record.stage not in again),
            unconfirmed=(*(record for record in self.unconfirmed if record.stage not in again), *doubted),
        )

    def confirming(self, name: str) -> Ledger:
        """Return the ledger with a stage's cost counted again, since what the stage left is of the present inputs."""
        found = [record for record in self.unconfirmed if record.stage == name]
        return self.with_stage(found[0]) if found else self

    def with_method(self, name: str, costs: MethodCosts) -> Ledger:
        """Return the ledger with one method's costs entered or replaced."""
        return replace(self, methods={**self.methods, name: costs})

    @property
    def total(self) -> StageRecord:
        """The cost of all stages together."""
        total = StageRecord("total")
        for record in self.stages:
            total = total.joined(record)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``costs.json``."""
        values: dict[str, Any] = {
            "stages": [record.to_dict() for record in self.stages],
            "methods": {name: dataclasses.asdict(costs) for name, costs in self.methods.items()},
        }
        if self.unconfirmed:
            values["unconfirmed"] = [record.to_dict() for record in self.unconfirmed]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ledger:
        """Read what :meth:`to_dict` gave, so that a resumed run goes on counting.

        Raises:
            StoreError: If a value is missing or unknown.
        """
        try:
            stages, unconfirmed = (
                tuple(StageRecord.from_dict(record) for record in records)
                for records in (values["stages"], values.get("unconfirmed", ()))
            )
            methods = {name: MethodCosts(**costs) for name, costs in values["methods"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"costs.json: not a ledger of this version ({error}); delete it and run again") from None
        return cls(stages, methods, unconfirmed)


class Meter:
    """Measures one stage; use it in a ``with`` statement, then read :attr:`record`.

    Stages follow each other: the accelerator's peak is set back when a meter starts, so meters do not nest.

    Example:
        >>> with Meter("features") as meter:
        ...     meter.add_tokens(90, 128)
        >>> meter.record.n_padded_tokens
        128
    """

    def __init__(self, stage: str) -> None:
        """Name the stage; counting starts on entering the context."""
        self._record = StageRecord(stage)
        self._open: tuple[StageRecord, float, Mapping[str, int]] | None = None
        self.on_part: Callable[[], object] = lambda: None
        """called when a part is made"""
        self._started = time.perf_counter()
        self._process = psutil.Process()
        self._peak = self._resident = 0
        self._is_over = threading.Event()
        self._sampler = threading.Thread(target=self._sample_until_over, name=f"meter-{stage}", daemon=True)

    def __enter__(self) -> Meter:
        """Start the clock and the memory sampler."""
        self._started = time.perf_counter()
        _reset_accelerator_peak()
        self._sample()
        self._resident = self._peak
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting; the record is complete even if the stage failed."""
        self._is_over.set()
        self._sampler.join()
        self._sample()
        own = StageRecord(
            self._record.stage,
            wall_seconds=time.perf_counter() - self._started,
            peak_memory_bytes=self._peak,
            added_memory_bytes=self._peak - self._resident,
            peak_accelerator_bytes=_read_accelerator_peak(),
        )
        self._record = self._record.joined(own)

    @property
    def record(self) -> StageRecord:
        """The counts so far; time and memory are filled in when the stage ends."""
        if (opened := self._open) is None:
            return self._record
        (before, started, shares), now = opened, self._record
        own = StageRecord(
            now.stage,
            wall_seconds=time.perf_counter() - started,
            peak_memory_bytes=self._peak,
            added_memory_bytes=self._peak - self._resident,
            peak_accelerator_bytes=_read_accelerator_peak(),
            **{key: getattr(now, key) - getattr(before, key) for key in _COUNTS},
        )
        return replace(now, parts=_join_parts(before.parts, own.shared_out(shares)))

    @contextmanager
    def part(self, shares: Mapping[str, int]) -> Iterator[None]:
        """Note what is counted inside for the parts that are made there, too; peaks are the stage's so far.

        Args:
            shares: Identity of each part, and its weight in the sum.
        """
        self._open = self._record, time.perf_counter(), shares
        try:
            yield
        finally:
            self._record, self._open = self.record, None
            self.on_part()

    def add_tokens(self, n_tokens: int, n_padded_tokens: int) -> None:
        """Count tokens that a model read: real ones, and the positions computed for them."""
        self._record = replace(
            self._record,
            n_tokens=self._record.n_tokens + n_tokens,
            n_padded_tokens=self._record.n_padded_tokens + n_padded_tokens,
        )

    def add_flops(self, flops: int) -> None:
        """Count floating-point operations, as a formula of :mod:`~ensemblelora.accounting.formulas` gives them."""
        self._record = replace(self._record, flops=self._record.flops + flops)

    def add_dequantization(self, flops: int) -> None:
        """Count operations that unpack weights, apart from what is computed with them."""
        total = self._record.dequantization_flops + flops
        self._record = replace(self._record, dequantization_flops=total)

    def add_record(self, record: StageRecord) -> None:
        """Count what another process did for this stage: its work and its peaks; its time passed beside this one's."""
        elsewhere = replace(record, wall_seconds=0.0)
        self._record = self._record.joined(elsewhere)
        self.on_part()

    def add_seconds(self, seconds: float) -> None:
        """Count time in which this stage's work was done before it began."""
        self._record = replace(self._record, wall_seconds=self._record.wall_seconds + seconds)

    def _sample(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)

    def _sample_until_over(self) -> None:
        while not self._is_over.wait(_SAMPLING_SECONDS):
            self._sample()


def _join_parts(first: Mapping[str, StageRecord], second: Mapping[str, StageRecord]) -> dict[str, StageRecord]:
    return {**first, **{name: first[name].joined(one) if name in first else one for name, one in second.items()}}


def _find_cuda() -> Any:
    # Looked up, not imported: a stage without torch must not pay for loading it.
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def release_memory() -> None:
    """Give memory that was freed, but kept by the C library for later, back to the system.

    Passes over batches of every length leave holes that no later one fits, until a process holds far more than it uses.
    Nothing is done where the library has no call for it (it is glibc's), nor where little was taken since last time,
    for it looks through all there is.
    """
    process = psutil.Process()
    if process.memory_info().rss - _after_release[0] < _WORTH_RELEASING:
        return
    trim = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim", None)
    if trim is not None:
        trim(0)
    _after_release[0] = process.memory_info().rss


def _reset_accelerator_peak() -> None:
    if (cuda := _find_cuda()) is not None:
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def _read_accelerator_peak() -> int | None:
    if (cuda := _find_cuda()) is None:
        return None
    return sum(int(cuda.max_memory_allocated(device)) for device in range(cuda.device_count()))
