"""Modules whose forward pass is another one for a while, and is put back afterwards.

In: modules and a function for each. Out: a context; what an instance had set before, by whoever, comes back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["replaced_forwards"]


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], make: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module computes what ``make(module)`` computes."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = make(module)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
