"""Several processes that run one program side by side, each with a part of every block's weights (FSDP).

torchrun starts them. All read the same rows and compute the same numbers, so that all take the same way through a run;
a block's weights are gathered for the time of its pass, by ``torch.distributed.fsdp``. Only fine-tuning shares the work
out: each process takes a part of a step's examples, and the adapters' gradients are added up. Adapters are whole in
every process, and so are embeddings, output layer and classifier head. The first process alone writes the run folder;
the others keep theirs in a temporary one.

In: what torchrun leaves in the environment. Out: the team that this process is of, itself alone where there is none.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

__all__ = ["Team", "agree_on_least", "find_place", "gather", "is_sharded", "join_team", "shard_blocks", "take_share"]

_PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Team:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1

    def add_up(self, gradients: Iterable[Tensor | None]) -> None:
        """Replace gradients by their sums over all processes."""
        for gradient in gradients if self.size > 1 else ():
            if gradient is not None:
                distributed.all_reduce(gradient)


@cache
def join_team() -> Team:
    """Meet the processes that torchrun has started beside this one; alone where it hasn't.

    What it left in the environment is taken out: transformers would set up training in parallel by itself.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        return Team()
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=size)
    atexit.register(distributed.destroy_process_group)
    for name in _PLACES:
        os.environ.pop(name, None)
    return Team(rank, size)


def shard_blocks(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Leave each process of the team its part of every block; nothing where it is alone."""
    team = join_team()
    if team.size == 1:
        return
    mesh = init_device_mesh(device.type, (team.size,))
    for block in blocks:
        sharded: Any = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        sharded.unshard()  # what is first gathered in inference mode could not be gathered in another
        sharded.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only a part of some weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather(parameter: nn.Parameter) -> nn.Parameter:
    """A whole weight, of which this process may have a part; all processes must ask for it."""
    if not isinstance(parameter, DTensor):
        return parameter
    whole: Any = parameter.full_tensor()
    return nn.Parameter(whole, requires_grad=False)


def take_share(items: Sequence[_Item]) -> tuple[Sequence[_Item], float]:
    """Choose which of a step's examples this process runs.

    Returns:
        The examples, and what the mean of their losses is multiplied with, so that the team's sum is the mean over all
        examples. Where there are too few for all, each process runs all of them.

    Example:
        >>> take_share([4, 7, 9])
        ([4, 7, 9], 1.0)
    """
    team = join_team()
    if len(items) < team.size:
        return items, 1 / team.size
    own = items[team.rank :: team.size]
    return own, len(own) / len(items)


def agree_on_least(value: int) -> int:
    """The smallest of the team's values."""
    if join_team().size == 1:
        return value
    least = torch.tensor(value)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return int(least)


def find_place(folder: Path) -> Path:
    """Where this process keeps the run folder: the first as it is, the others as a copy that goes when they end."""
    team = join_team()
    if team.size == 1:
        return folder
    place = folder
    if team.rank:
        scratch = Path(tempfile.mkdtemp(prefix="ensemblelora-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        place = scratch / folder.name
        if folder.exists():
            shutil.copytree(folder, place, ignore=shutil.ignore_patterns(".lock*"))
    distributed.barrier()  # the first goes on when all have their copies
    return place
