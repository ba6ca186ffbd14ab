"""From a residual to a step away from theta0 in the adapter's own parameters.

``dual`` sums the unprojected gradients with the ridge fit's dual variables, in one weighted backward pass.
``projected`` is the paper's: the fit expanded through the random projection, most of which is noise orthogonal to
every gradient. ``steps`` takes a few real optimiser steps on the residual loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, adapter_state, set_adapter_state, trainable_layers
from ensemblelora.blocks import OutputMode
from ensemblelora.boosting.residual import fit_residual, guess_length, residual_targets
from ensemblelora.boosting.state import GroupState, Setup
from ensemblelora.config import TrainingConfig
from ensemblelora.counting import count_training
from ensemblelora.data.batching import collate, iterate_batches, schedule_training
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import StoreError
from ensemblelora.gradients.collect import find_active_layers
from ensemblelora.gradients.output import compute_outputs
from ensemblelora.gradients.projection import Projector
from ensemblelora.gradients.tap import layer_parts
from ensemblelora.passes import blocks_run_again, score
from ensemblelora.seeding import seed_for

__all__ = ["expand_weights", "find_direction", "sum_gradients"]

_LayerSteps = Mapping[str, tuple[Tensor | None, Tensor | None]]
"""(weight, bias) of each trained layer; a vector that scales activations has no bias"""


def find_direction(setup: Setup, name: str, state: GroupState) -> tuple[dict[str, Tensor], float]:
    """Return the step from theta0 that lowers the group's residual loss, and a first guess of its best length.

    The step is keyed as the adapter's saved tensors.

    Args:
        setup: Model, config and projection.
        name: An adapter at theta0, used as the place to compute in and left as it was.
        state: The group's current scores.

    Raises:
        StoreError: If a task's features are not in the order of its rows.
        SolverError: If there is nothing to fit.
    """
    if setup.config.direction == "steps":
        return _train_on_residual(setup, name, state), 1.0
    w, alphas, length = _fit_group(state, setup.config.l2_penalty)
    if setup.config.direction == "projected":
        return expand_weights(setup.adapted, name, setup.projector, state.splits("train"), w), length
    weighted = [(task.train, task.features.mode, alpha) for task, alpha in zip(state.tasks, alphas, strict=True)]
    step = sum_gradients(setup.adapted, name, weighted, max_tokens=setup.max_tokens, meter=setup.meter)
    return step, length


def _fit_group(
    state: GroupState, l2_penalty: float
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64]], float]:
    """Fit the residuals of all tasks with one w; return it, the dual variables per task, and a guess of its length."""
    for task in state.tasks:
        if task.features.ids != task.train.ids:
            raise StoreError(
                f"features of task {task.train.task!r} are in another order than its rows; take the features again"
            )
    features = [np.asarray(task.features.features) for task in state.tasks]
    targets = [
        residual_targets(scores, task.train.labels, task.features.mode)
        for scores, task in zip(state.scores("train"), state.tasks, strict=True)
    ]
    width = max(block.shape[1] for block in features)  # tasks with fewer outputs get outputs without a gradient
    jacobian = np.concatenate([np.pad(f, ((0, 0), (0, width - f.shape[1]), (0, 0))) for f in features])
    target = np.concatenate([np.pad(t, ((0, 0), (0, width - t.shape[1]))) for t in targets])
    w, alpha = fit_residual(jacobian, target, l2_penalty)
    ends = np.cumsum([len(f) for f in features])
    alphas = [piece[:, : f.shape[1]] for piece, f in zip(np.split(alpha, ends[:-1]), features, strict=True)]
    return w, alphas, guess_length(jacobian, target, w)


def sum_gradients(
    adapted: AdaptedModel,
    name: str,
    weighted: Sequence[tuple[EncodedSplit, OutputMode, npt.NDArray[np.float64]]],
    *,
    max_tokens: int,
    meter: Meter | None = None,
) -> dict[str, Tensor]:
    """Return ``sum_s alpha_s grad u_s`` by one weighted backward pass over the rows, keyed as saved tensors are.

    Args:
        adapted: The model.
        name: The adapter at whose weights gradients are taken; left as it was.
        weighted: Rows, the outputs that are differentiated, and alpha ``(n, c)``, of each task.
        max_tokens: Padded tokens of a pass.
        meter: Told what every pass costs.
    """
    layers = trainable_layers(adapted, name)
    with activate(adapted, name, trainable=True), blocks_run_again(adapted), torch.enable_grad():
        for split, mode, alpha in weighted:
            for batch in iterate_batches(split, max_tokens, adapted.base.pad_token_id, layout=adapted.layout):
                z = score(adapted, batch, meter=meter).z
                labels, n_choices = (torch.from_numpy(a).to(z.device) for a in (batch.labels, batch.n_choices))
                outputs = compute_outputs(z, labels, n_choices, mode)
                # A batch whose examples all have few choices has fewer contrasts than its split.
                weights = torch.from_numpy(alpha[batch.examples, : outputs.shape[1]]).to(z)
                (outputs * weights).sum().backward()
                count_training(meter, adapted.costs, batch)
        gradients = {n: (m.weight.grad, None if m.bias is None else m.bias.grad) for n, m in layers.items()}
        adapted.peft.zero_grad(set_to_none=True)
    return _as_state(adapted, name, gradients)


def expand_weights(
    adapted: AdaptedModel,
    name: str,
    projector: Projector,
    splits: Sequence[EncodedSplit],
    w: npt.NDArray[np.float64],
) -> dict[str, Tensor]:
    """Return ``P w``, the coordinates themselves where nothing was projected, keyed as saved tensors are.

    Args:
        adapted: The model.
        name: An adapter at theta0, used as the place to compute in and left as it was.
        projector: P.
        splits: Any rows, for which layers have a gradient at theta0.
        w: Weights of a linear model of projected gradients ``(proj_dim,)``.
    """
    layers = find_active_layers(adapted, splits)
    weights, start = torch.from_numpy(w.astype(np.float32)), 0
    steps: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for layer, module in layers.items():
        parts: list[Tensor | None] = []
        for part, shape in layer_parts(layer, module):
            size = math.prod(shape)
            own = weights[start : start + size] if projector.proj_type == "none" else weights
            parts.append(projector.expand(part, shape, own))
            start += size
        weight, bias = (*parts, None)[:2]
        steps[layer] = (weight, bias)
    return _as_state(adapted, name, steps)


def _train_on_residual(setup: Setup, name: str, state: GroupState) -> dict[str, Tensor]:
    """A few real optimiser steps on ``CE(F + rate (z - z_theta0))`` from theta0; the step is where they lead."""
    adapted, config = setup.adapted, setup.config
    splits = state.splits("train")
    start = adapter_state(adapted, THETA0)
    with activate(adapted, name, trainable=True), blocks_run_again(adapted), torch.enable_grad():
        parameters = [p for p in adapted.peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        for step in _plan_steps(setup, name, state):
            batch = collate(
                [(splits[task], example) for task, example in step], adapted.base.pad_token_id, layout=adapted.layout
            )
            z = score(adapted, batch, meter=setup.meter).z
            current, base = (
                torch.from_numpy(_stack([values[t][e] for t, e in step], z.shape[1])).to(z.device)
                for values in (state.scores("train"), state.base("train"))
            )
            moved = torch.where(torch.isfinite(z), current + config.boosting_rate * (z - base), -torch.inf)
            loss = torch.nn.functional.cross_entropy(moved, torch.from_numpy(batch.labels).to(z.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count_training(setup.meter, adapted.costs, batch)
        adapted.peft.zero_grad(set_to_none=True)
    end = adapter_state(adapted, name)
    set_adapter_state(adapted, name, start)
    return {key: end[key] - start[key] for key in start}


def _plan_steps(setup: Setup, name: str, state: GroupState) -> list[list[tuple[int, int]]]:
    """``n_steps`` batches, going round the rows as often as it takes."""
    seed, n_steps = seed_for(setup.seed, "boosting", name), setup.config.n_steps
    layout = setup.adapted.layout
    once = schedule_training(state.splits("train"), TrainingConfig(num_train_epochs=1), seed=seed, layout=layout)
    epochs = -(-n_steps // len(once))
    return schedule_training(state.splits("train"), TrainingConfig(num_train_epochs=epochs), seed=seed, layout=layout)[
        :n_steps
    ]


def _stack(rows: Sequence[npt.NDArray[np.float32]], width: int) -> npt.NDArray[np.float32]:
    """Rows of different tasks as one matrix, -inf past each row's own choices."""
    return np.stack([np.pad(r[:width], (0, width - len(r[:width])), constant_values=-np.inf) for r in rows])


def _as_state(adapted: AdaptedModel, name: str, steps: _LayerSteps) -> dict[str, Tensor]:
    """Rename per-layer steps to the keys of the saved adapter, by writing them through the layers themselves."""
    before = adapter_state(adapted, name)
    set_adapter_state(adapted, name, {key: torch.zeros_like(tensor) for key, tensor in before.items()})
    layers = trainable_layers(adapted, name)
    with torch.no_grad():
        for layer, (weight, bias) in steps.items():
            for part, step in ((layers[layer].weight, weight), (layers[layer].bias, bias)):
                if part is not None and step is not None:
                    part.copy_(step)
    found = adapter_state(adapted, name)
    set_adapter_state(adapted, name, before)
    return found
