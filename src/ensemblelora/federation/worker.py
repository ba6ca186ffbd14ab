"""What a client's process holds: the model with one adapter that takes any client's state, and the rows.

In: the federation's config and clients' texts. Out: :class:`Worker`. In a deployment a process answers for one client;
in one process or in the simulation for all of them in turn, which share the model and three flat splits. Activations
below the lowest adapted block are kept on disk, if a folder is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import get_peft_model_state_dict
from torch import nn

from ensemblelora.adaptermethods import TrainedLayer
from ensemblelora.adapters import AdaptedModel, activate, add_adapter
from ensemblelora.config import GradientsConfig
from ensemblelora.config_federation import FederationConfig
from ensemblelora.data.batching import Batch, collate, plan_batches
from ensemblelora.errors import ModelError
from ensemblelora.federation.adapters import Template, Vector, make_template, open_model
from ensemblelora.federation.clients import ClientText
from ensemblelora.federation.protocol import Part
from ensemblelora.federation.rows import ClientRows, encode_clients
from ensemblelora.gradients.backward import find_active_layers
from ensemblelora.gradients.plan import make_projector
from ensemblelora.gradients.projection import Projector
from ensemblelora.passes import with_cache

__all__ = ["CLIENT", "Worker", "open_worker"]

CLIENT = "client"
"""the one adapter beside theta0; it is always active and trainable, and holds whatever state is worked with"""


@dataclass(frozen=True, eq=False)
class Worker:
    """A model and the rows of the clients it answers for; made by :func:`open_worker`.

    Attributes:
        config: The federation's.
        adapted: The model.
        template: How an adapter becomes a vector.
        rows: Of all clients.
        layers: Those with a gradient at theta0.
        projector: Made from the seed, as on every other client.
        tensors: The active adapter's own, by the template's names.
        is_trained: Which numbers of a vector are trained, bool ``(p,)``.
        active: Keeps the adapter active; left when the worker is.
        noise: Of what is sent; not made from the seed, which the server has.
    """

    config: FederationConfig
    adapted: AdaptedModel
    template: Template
    rows: ClientRows
    layers: Mapping[str, TrainedLayer]
    projector: Projector
    tensors: Mapping[str, nn.Parameter]
    is_trained: NDArray[np.bool_]
    active: AbstractContextManager[None]
    noise: np.random.Generator = field(default_factory=np.random.default_rng)

    def load(self, vector: Vector) -> None:
        """Put an adapter's state into the model."""
        with torch.no_grad():
            for name, tensor in self.template.unpack(vector).items():
                self.tensors[name].copy_(tensor)

    def read(self) -> Vector:
        """Take the state of the adapter in the model."""
        return self.template.pack({name: tensor.data for name, tensor in self.tensors.items()})

    def list_batches(self, client: int, part: Part, *, max_tokens: int) -> list[tuple[NDArray[np.int64], Batch]]:
        """Cut one client's rows of a part into batches; with each, the places of its rows among the client's."""
        split, rows = self.rows.splits[part], self.rows.find(client, part)
        plan = plan_batches(split.input_lengths[rows], np.ones(len(rows), np.int64), max_tokens)
        return [(places, self.collate(part, rows[places])) for places in plan]

    def collate(self, part: Part, rows: NDArray[np.int64]) -> Batch:
        """Put rows of a part's split into one batch."""
        return collate([(self.rows.splits[part], int(row)) for row in rows], self.adapted.base.pad_token_id)


def open_worker(
    config: FederationConfig,
    clients: Sequence[ClientText],
    *,
    adapted: AdaptedModel | None = None,
    cache: Path | None = None,
) -> Worker:
    """Load the model, encode the clients' lines, and find out what has a gradient.

    Args:
        config: The federation's.
        clients: Those the worker answers for.
        adapted: The model with theta0, where it is loaded already; it is changed in place.
        cache: Folder for activations below the adapted blocks, of which ``model.prefix_cache_gb`` are kept; none: they
            are computed each time.

    Raises:
        ModelError: If the model can't be loaded, or its adapter has parts other than in its layers.
        DataError: If a client's text has no tokens.
    """
    adapted = open_model(config) if adapted is None else adapted
    template = make_template(config, adapted)
    rows = encode_clients(clients, adapted.base.tokenizer, config.clients, seed=config.seed)
    add_adapter(adapted, CLIENT)
    layers = find_active_layers(adapted, [rows.splits["train"]])
    active = activate(adapted, CLIENT, trainable=True)
    active.__enter__()  # for good: switching would walk through the model each time
    tensors = _find_tensors(adapted, template, config.adapter.method)
    if cache is not None:
        splits = list(rows.splits.values())
        adapted = with_cache(adapted, cache, splits, max_bytes=int(config.model.prefix_cache_gb * 1e9))
    kinds = GradientsConfig(output="sequence", proj_type=config.features.proj_type, proj_dim=config.features.proj_dim)
    return Worker(
        config=config,
        adapted=adapted,
        template=template,
        rows=rows,
        layers=layers,
        projector=make_projector(kinds, seed=config.seed),
        tensors=tensors,
        is_trained=np.concatenate([np.full(t.numel(), t.requires_grad) for t in tensors.values()]),
        active=active,
    )


def _find_tensors(adapted: AdaptedModel, template: Template, method: str) -> dict[str, nn.Parameter]:
    """The active adapter's parameters by the names under which PEFT saves them, in the template's order."""
    parameters = {parameter.data_ptr(): parameter for parameter in adapted.peft.parameters()}
    saved = get_peft_model_state_dict(adapted.peft, adapter_name=CLIENT, save_embedding_layers=False)
    for name in template.shapes:
        if saved[name].data_ptr() not in parameters:
            raise ModelError(
                f"adapter.method {method}: {name!r} is saved otherwise than it is trained, which a federation can't "
                "average; use lora"
            )
    return {name: parameters[saved[name].data_ptr()] for name in template.shapes}
