"""The blocks below the lowest adapted one, whose activations are constants of the base model.

They are the same for features, every group's training, boosting, weights and each member at inference. So they are run
once for a batch, however many members read it, and for rows that come again and again (those that are learnt from)
once in all: :class:`HiddenCache` keeps what enters the first adapted block in memory-mapped files, as many splits as
fit a given number of bytes. Rows of one question keep their common context once.

In: a transformers model and the batches of :mod:`ensemblelora.data.batching`. Out: hidden states ``(rows, width, h)``.
Dropout below the adapted blocks is off, in training too: there is nothing to train there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ensemblelora.artifacts import find_seal_fault, fingerprint, seal_folder
from ensemblelora.data.batching import Batch, Span, collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit, Layout
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.errors import OutputError
from ensemblelora.files import atomic_folder, map_new_array
from ensemblelora.forwards import replaced_forwards
from ensemblelora.models import find_blocks
from ensemblelora.progress import note, track
from ensemblelora.scoring import model_inputs
from ensemblelora.sharing import make_probe

__all__ = ["FrozenPrefix", "HiddenCache", "choose_kept", "count_slots", "find_prefix", "find_room"]

_FILE = "hidden.npy"
_DISK_SHARE = 0.8
_INTACT: set[tuple[Path, int]] = set()
"""files that this process has written or found as they were written, with their times of modification"""
_BITS: dict[int, Any] = {2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}  # numpy has no bfloat16


_logger = logging.getLogger(__name__)


class _Reached(Exception):
    """Leaves the model's forward pass at the first adapted block."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("reached the first adapted block")
        self.hidden = hidden


class _Relay:
    """Stands in for the lower blocks; one object for all batches, so that a compiled model is compiled once."""

    def __init__(self, n_outputs: int | None) -> None:
        self.n_outputs = n_outputs
        """how many values this family's blocks return; none: the hidden states themselves"""
        self.hidden: Tensor | None = None

    def pass_on(self, *args: Any, **kwargs: Any) -> Any:
        return self.hidden if self.n_outputs is None else (self.hidden, *[None] * (self.n_outputs - 1))


@dataclass(frozen=True, eq=False)
class FrozenPrefix:
    """Runs a model's lower blocks alone, or its upper blocks on what the lower ones gave."""

    network: nn.Module
    blocks: tuple[nn.Module, ...]
    """the lower blocks"""
    first: nn.Module
    """the lowest adapted block"""
    relay: _Relay
    cache: HiddenCache | None = None

    @property
    def depth(self) -> int:
        """How many blocks are below the lowest adapted one."""
        return len(self.blocks)

    def run(self, batch: Batch) -> Tensor:
        """Compute what enters the first adapted block, ``(rows, width, h)``; no gradient is kept."""
        handle = self.first.register_forward_pre_hook(_leave, with_kwargs=True)
        was_training = self.network.training
        body: nn.Module = self.network.base_model  # type: ignore[assignment]  # a property that torch's types don't know
        try:
            self.network.eval()
            with torch.no_grad(), _uncompiled(body):  # a forward pass that is left half-way is not worth compiling
                body(**model_inputs(self.network, batch), use_cache=False)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
            self.network.train(was_training)
        raise AssertionError("a transformers model runs all of its blocks")

    @contextmanager
    def resumed(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the model's forward pass starts at the first adapted block, from these hidden states."""
        self.relay.hidden = hidden
        try:
            with replaced_forwards(self.blocks, lambda block: self.relay.pass_on):
                yield
        finally:
            self.relay.hidden = None


@dataclass(eq=False)
class HiddenCache:
    """What enters the first adapted block, for whole splits, in one memory-mapped file each.

    A split that does not fit the limit is not kept, and computed anew each time.

    Attributes:
        folder: Where the files go; what lies there of other models or rows is removed.
        identity: Of the model and the depth; with a split's own, the name of its file.
        max_bytes: All files together.
        width: Numbers a token.
        dtype: The model's precision.
    """

    folder: Path
    identity: str
    max_bytes: int
    width: int
    dtype: torch.dtype
    _places: dict[int, _Place] = field(default_factory=dict)

    @property
    def bytes_to_come(self) -> int:
        """What the splits that are to be kept and are not filled yet will take on disk."""
        files = {place.folder: place for place in self._places.values()}  # parts of a split share its file
        n_slots = sum(place.n_slots for place in files.values() if not place.is_filled)
        return n_slots * self.width * self.dtype.itemsize

    def enlist(self, splits: Sequence[EncodedSplit], *, cleans: bool = True) -> None:
        """Choose, in this order, the splits to keep, run when first asked for; with ``cleans`` all others go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [fingerprint(self.identity, fingerprint_split(split))[:32] for split in splits]
        for path in self.folder.iterdir() if cleans else ():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
        room = find_room(self.folder, self.max_bytes)
        sizes = [count_slots(split) * self.width * self.dtype.itemsize for split in splits]
        are_kept = choose_kept(sizes, room)
        for split, name, is_kept in zip(splits, names, are_kept, strict=True):
            if is_kept:
                self._places[id(split)] = _Place(split, self.folder / name, self.width)
        if not all(are_kept):
            limit = "the free disk" if room < self.max_bytes else f"model.prefix_cache_gb ({self.max_bytes / 1e9:.1f})"
            note(
                f"activations below the adapted layers: {are_kept.count(False)} of {len(splits)} splits don't fit "
                f"{limit} and are computed each time"
            )

    def holds(self, split: EncodedSplit) -> bool:
        """Whether a split's rows have been run and are kept."""
        place = self._places.get(id(split))
        return place is not None and place.is_filled

    def enlist_part(self, part: EncodedSplit, whole: EncodedSplit, rows: NDArray[np.int64]) -> None:
        """Let some rows of a split be found as those of a split of their own; nothing if the whole is not kept."""
        if (place := self._places.get(id(whole))) is not None:
            self._places[id(part)] = place.take(part, rows)

    def read(self, batch: Batch, device: torch.device) -> tuple[Tensor, NDArray[np.bool_]]:
        """Gather a batch's hidden states ``(rows, width, h)``, and say which rows were kept ``(rows,)``."""
        is_kept = np.ones(len(batch.input_ids), bool)
        hidden = np.zeros((*batch.input_ids.shape, self.width), dtype=_BITS[self.dtype.itemsize][1])
        for span in batch.spans:
            place, (row, column) = self._places.get(id(span.split)), span.at
            if place is None or not place.is_filled:
                is_kept[row] = False
                continue
            for at, slots in place.find_slots(span):
                hidden[row, column + at : column + at + len(slots)] = place.values[slots.start : slots.stop]
        return torch.from_numpy(hidden).view(self.dtype).to(device), is_kept

    def missing(self, batch: Batch) -> list[EncodedSplit]:
        """Splits of the batch that are to be kept and are not filled yet."""
        found = (self._places.get(key) for key in {id(span.split): None for span in batch.spans})
        unfilled = {place.folder: place.split for place in found if place is not None and not place.is_filled}
        return list(unfilled.values())

    def fill(
        self, split: EncodedSplit, run: Callable[[Batch], Tensor], *, layout: Layout, max_tokens: int, pad_token_id: int
    ) -> None:
        """Run every row of a split once and keep what comes out; the file appears when it is whole.

        Where the disk has no room for it, the split is not kept.
        """
        place = self._places[id(split)]
        bits_of, bits = _BITS[self.dtype.itemsize]
        plan = plan_batches(*split.measure(layout), max_tokens)
        with self._giving_up(place), atomic_folder(place.folder) as scratch:
            values = map_new_array(scratch / _FILE, (place.n_slots, self.width), bits)
            for indices in track(plan, f"lower layers {split.task} ({split.split})"):
                batch = collate([(split, int(e)) for e in indices], pad_token_id, layout=layout)
                hidden = run(batch).contiguous().view(bits_of).cpu().numpy()
                for span in batch.spans:
                    row, column = span.at
                    for at, slots in place.find_slots(span):
                        values[slots.start : slots.stop] = hidden[row, column + at : column + at + len(slots)]
            values.flush()
            del values
            seal_folder(scratch)
        if place.file.exists():
            _INTACT.add(_stamp(place.file))

    @contextmanager
    def _giving_up(self, place: _Place) -> Iterator[None]:
        """Keep nothing of a split whose file can't be written: it is a shortcut, and no part of a run's outcome."""
        try:
            yield
        except OutputError as error:
            self._places = {key: other for key, other in self._places.items() if other.folder != place.folder}
            note(f"activations of {place.split.task} ({place.split.split}) are computed each time: {error}")


class _Place:
    """One split's file, and where in it each row's tokens are: the common context of an example's rows once."""

    def __init__(self, split: EncodedSplit, folder: Path, width: int) -> None:
        self.split, self.folder, self._width = split, folder, width
        self.part = split  # whose rows are found; held, since it is known by its address
        shared = split.shared_lengths
        per_row = np.repeat(shared, split.row_counts)
        own = split.input_lengths - per_row
        sizes = own.copy()
        sizes[split.example_rows[:-1]] += shared  # the context comes before its first row's own tokens
        ends = np.cumsum(sizes)
        self.n_slots = int(ends[-1]) if len(ends) else 0
        self._own_starts: NDArray[np.int64] = ends - own
        first = split.example_rows[:-1]
        self._shared, self._shared_starts = per_row, np.repeat(ends[first] - sizes[first], split.row_counts)
        self._values: NDArray[Any] | None = None

    def take(self, part: EncodedSplit, rows: NDArray[np.int64]) -> _Place:
        """The same file, where ``part`` is a split of some of the rows."""
        place = copy(self)
        place.part, place._own_starts = part, self._own_starts[rows]
        place._shared, place._shared_starts = self._shared[rows], self._shared_starts[rows]
        return place

    @property
    def file(self) -> Path:
        return self.folder / _FILE

    @property
    def is_filled(self) -> bool:
        if self._values is None and self.file.exists() and self._is_intact():
            found = np.load(self.file, mmap_mode="r", allow_pickle=False)
            self._values = found if found.shape == (self.n_slots, self._width) else None
        return self._values is not None

    def _is_intact(self) -> bool:
        """Whether the file is as it was written; one that is not is removed, and filled again."""
        stamp = _stamp(self.file)
        fault = None if stamp in _INTACT else find_seal_fault(self.folder)
        if fault:
            _logger.warning("activations of %s are computed again: %s", self.split.task, fault)
            shutil.rmtree(self.folder, ignore_errors=True)
            return False
        _INTACT.add(stamp)
        return True

    @property
    def values(self) -> NDArray[Any]:
        if self._values is None:
            raise AssertionError("read before it was filled")
        return self._values

    def find_slots(self, span: Span) -> Iterator[tuple[int, range]]:
        """Yield where in the span a run of tokens begins, and its slots."""
        n_shared = int(self._shared[span.row])
        end = span.start + span.length
        if span.start < n_shared:
            first = int(self._shared_starts[span.row]) + span.start
            yield 0, range(first, first + min(end, n_shared) - span.start)
        if end > n_shared:
            start = max(span.start, n_shared)
            first = int(self._own_starts[span.row]) + start - n_shared
            yield start - span.start, range(first, first + end - start)


def _stamp(file: Path) -> tuple[Path, int]:
    return file.resolve(), file.stat().st_mtime_ns


def count_slots(split: EncodedSplit) -> int:
    """Tokens whose activations are kept of a split: all that are read, a context that choices share once."""
    return int(split.input_lengths.sum() - (split.shared_lengths * (split.row_counts - 1)).sum())


def choose_kept(sizes: Sequence[int], room: int) -> list[bool]:
    """Say which of some splits, of so many bytes, fit the room that those before them leave."""
    kept: list[bool] = []
    for size in sizes:
        kept.append(size <= room)
        room -= size * kept[-1]
    return kept


def find_room(folder: Path, max_bytes: int) -> int:
    """Bytes that activations may take in a folder, which need not be there yet, so that the disk is never full.

    Writing to a mapped file on a full disk would kill the process; what was written before is room, too.
    """
    ground = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    on_disk = sum(file.stat().st_size for file in folder.rglob(_FILE))
    return min(max_bytes, int(_DISK_SHARE * shutil.disk_usage(ground).free) + on_disk)


def find_prefix(network: PreTrainedModel) -> FrozenPrefix | None:
    """Find the blocks below the lowest adapted one.

    Returns:
        None where the lowest block or something before it is adapted, and for a family whose forward pass can't be
        taken up in the middle, which is tried once: such a model is run whole each time.
    """
    _, blocks = find_blocks(network)
    carries = [any(isinstance(module, BaseTunerLayer) for module in block.modules()) for block in blocks]
    if not any(carries) or carries[0]:
        return None
    depth = carries.index(True)
    above = {id(module) for block in blocks[depth:] for module in block.modules()}
    above.add(id(network.get_output_embeddings()))
    if any(isinstance(module, BaseTunerLayer) and id(module) not in above for module in network.modules()):
        return None
    try:
        relay = _Relay(_count_outputs(network, blocks[0]))
        prefix = FrozenPrefix(network, tuple(blocks[:depth]), blocks[depth], relay)
        return prefix if _can_resume(prefix) else None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None


def _count_outputs(network: nn.Module, block: nn.Module) -> int | None:
    seen: list[int | None] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(len(output) if isinstance(output, tuple) else None)

    handle = block.register_forward_hook(look)
    try:
        _run_body(network, make_probe(_vocabulary(network)))
    finally:
        handle.remove()
    return seen[0]


def _can_resume(prefix: FrozenPrefix) -> bool:
    """Compare the last hidden states of a pass in two parts with those of a whole one."""
    probe = make_probe(_vocabulary(prefix.network))
    whole = _run_body(prefix.network, probe)
    with prefix.resumed(prefix.run(probe)):
        resumed = _run_body(prefix.network, probe)
    return torch.allclose(whole.float(), resumed.float(), rtol=1e-3, atol=1e-3)


def _run_body(network: nn.Module, batch: Batch) -> Tensor:
    body: nn.Module = network.base_model  # type: ignore[assignment]
    with torch.inference_mode():
        hidden: Tensor = body(**model_inputs(network, batch), use_cache=False).last_hidden_state
    return hidden


def _vocabulary(network: nn.Module) -> int:
    return int(network.config.vocab_size)  # type: ignore[union-attr, arg-type]


@contextmanager
def _uncompiled(body: nn.Module) -> Iterator[None]:
    if body._compiled_call_impl is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else kwargs["hidden_states"])
