"""Adapters as single vectors, the form in which they travel and are averaged.

In: a model's start adapter theta0, which server and clients make from the seed. Out: :class:`Template`, which turns
tensors into a vector and back. The order of tensors is that of their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora.adapters import THETA0, AdaptedModel, adapter_state, attach, count_trained
from ensemblelora.artifacts import fingerprint
from ensemblelora.config_federation import FederationConfig
from ensemblelora.models import load_base

__all__ = ["Template", "Vector", "make_template", "open_model"]

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Template:
    """Names and shapes of an adapter's tensors, and their values at theta0.

    Attributes:
        start: theta0, ``(p,)``.
        shapes: By name, in the order in which tensors lie in a vector.
        identity: Changes with the base model, its precision, the adapter's settings and the seed.
        n_coordinates: How many of its numbers have a gradient at theta0.
    """

    start: Vector
    shapes: Mapping[str, tuple[int, ...]]
    identity: str
    n_coordinates: int

    @property
    def size(self) -> int:
        """p: numbers of an adapter."""
        return len(self.start)

    def unpack(self, vector: Vector) -> dict[str, Tensor]:
        """Cut a vector into tensors, as PEFT saves them."""
        state: dict[str, Tensor] = {}
        first = 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            part = np.array(vector[first : first + size], dtype=np.float32)  # a copy: what comes may be read-only
            state[name] = torch.from_numpy(part.reshape(shape))
            first += size
        return state

    def pack(self, state: Mapping[str, Tensor]) -> Vector:
        """Put tensors behind each other."""
        parts = [state[name].detach().float().cpu().numpy().reshape(-1) for name in self.shapes]
        return np.concatenate(parts).astype(np.float32, copy=False)


def open_model(config: FederationConfig) -> AdaptedModel:
    """Load the base model and put theta0 on it.

    Raises:
        ModelError: If the model can't be loaded, or the adapter does not fit it.
    """
    base = load_base(config.model, max_length=config.clients.max_length)
    return attach(base, config.adapter, seed=config.seed)


def make_template(config: FederationConfig, adapted: AdaptedModel) -> Template:
    """Describe the adapters of a model."""
    state = adapter_state(adapted, THETA0)
    names = sorted(state)
    start = np.concatenate([state[name].float().numpy().reshape(-1) for name in names])
    identity = fingerprint(adapted.base.fingerprint, config.adapter, config.seed)
    costs, shapes = adapted.costs, {name: tuple(state[name].shape) for name in names}
    n_coordinates = count_trained(adapted) if costs is None else costs.adapter.n_output_parameters
    return Template(start, shapes, identity, n_coordinates)
