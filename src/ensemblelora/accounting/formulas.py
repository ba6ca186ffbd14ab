"""Floating-point operations and bytes in closed form, from a model's config alone. No torch.

In: a :class:`~ensemblelora.accounting.shapes.ModelShape`, an
:class:`~ensemblelora.accounting.adapter_shapes.AdapterShape`, a :class:`Workload`. Out: integers.

What is counted: matrix products, a multiply-add as two operations, over every position a model computes, padding
included. Attention counts the full square of each row's width, which is what eager attention computes; causal
kernels do about half of it. Not counted: embeddings, norms, activations, rotary angles. Unpacking the weights of a
4-bit base is counted apart (:func:`count_dequantization_flops`), so that a QLoRA step costs what a LoRA step does.

A backward pass reaches down to the lowest adapted layer and no further, and inside that layer only to the adapted
matrices: this is decided per matrix, by the same rule autograd uses. Adapters differ by their small products alone:
LoRA's read what enters a matrix, a bottleneck's what it gives; vectors that scale activations have none. Checked
against ``torch.utils.flop_counter.FlopCounterMode`` in tests/test_accounting.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.adapter_shapes import AdapterShape, Site
from ensemblelora.accounting.shapes import ModelShape, Role

__all__ = [
    "Workload",
    "count_dequantization_flops",
    "count_forward_flops",
    "count_full_step_flops",
    "count_gradient_pass_flops",
    "count_gram_flops",
    "count_oracle_flops",
    "count_regression_flops",
    "count_training_step_flops",
    "feature_bytes",
    "measure_workload",
]

# Which value inside a block each of its matrices reads.
_INPUT_OF: Mapping[Role, str] = {
    "query": "input",
    "key": "input",
    "value": "input",
    "fused": "input",
    "attention_out": "context",
    "mlp_in": "mlp_input",
    "mlp_out": "activation",
}


@dataclass(frozen=True)
class Workload:
    """What passes through a model; workloads add up.

    Attributes:
        n_rows: Rows.
        n_tokens: Positions computed, padding included, T.
        n_pairs: Sum over rows of the squared width: what attention works on.
        n_logits: Numbers the output layer computes (positions scored x vocabulary or labels).
    """

    n_rows: int
    n_tokens: int
    n_pairs: int
    n_logits: int

    def __add__(self, other: Workload) -> Workload:
        """Return both workloads together."""
        return Workload(
            self.n_rows + other.n_rows,
            self.n_tokens + other.n_tokens,
            self.n_pairs + other.n_pairs,
            self.n_logits + other.n_logits,
        )

    def __mul__(self, times: int) -> Workload:
        """Return the workload repeated."""
        return Workload(self.n_rows * times, self.n_tokens * times, self.n_pairs * times, self.n_logits * times)


def measure_workload(widths: npt.ArrayLike, *, n_logits: int) -> Workload:
    """Add up rows as they are run.

    Args:
        widths: Positions computed for each row, padding included.
        n_logits: Numbers the output layer computes for all of them.
    """
    sizes = np.asarray(widths, dtype=np.int64)
    return Workload(len(sizes), int(sizes.sum()), int((sizes**2).sum()), n_logits)


def count_forward_flops(shape: ModelShape, work: Workload, adapter: AdapterShape | None = None) -> int:
    """FLOPs of a forward pass: 2 P_m T + attention + 2 P_a T + output layer."""
    attention = 2 * shape.n_layers * _attention_product(shape, work)
    small = 2 * work.n_tokens * adapter.n_weights if adapter else 0
    return 2 * work.n_tokens * shape.block_parameters + attention + small + _head_product(shape, work)


def count_training_step_flops(
    shape: ModelShape, work: Workload, adapter: AdapterShape, *, trains_head: bool = False
) -> int:
    """FLOPs of forward and backward passes that train an adapter.

    Adapters on every matrix of every block give about 4 P_m T + 3 attention + 6 P_a T.

    Args:
        shape: The base model.
        work: What is trained on.
        adapter: The adapter.
        trains_head: Whether the classifier is trained too.
    """
    backward = _count_backward_flops(shape, work, adapter, with_weight_gradients=True)
    head = 2 * shape.hidden_size * work.n_logits if trains_head else 0
    return count_forward_flops(shape, work, adapter) + backward + head


def count_full_step_flops(shape: ModelShape, work: Workload) -> int:
    """FLOPs of forward and backward passes that train every weight: three times the forward pass."""
    return 3 * count_forward_flops(shape, work)


def count_gradient_pass_flops(
    shape: ModelShape,
    work: Workload,
    adapter: AdapterShape,
    *,
    n_backwards: int,
    n_outputs: int,
    projection_flops: int,
    reaches_down: bool = False,
) -> int:
    """FLOPs of taking projected gradients at the start point, or at an adapter that has moved from there.

    One forward pass; ``n_backwards`` backward passes to the outputs of the matrices that begin at zero (LoRA's B, a
    bottleneck's up-projection), which give each row's gradient of these (2 T P_B); and the projection of each
    differentiated number's gradient. Where these matrices have moved, the passes reach the others (LoRA's A, a
    down-projection), too, and give each row's gradient of all (2 T P_a).

    Args:
        shape: The base model.
        work: What is differentiated.
        adapter: The adapter.
        n_backwards: Backward passes per forward pass.
        n_outputs: Differentiated numbers, all examples together.
        projection_flops: Of projecting one gradient, which depends on the kind of projection; a dense one takes
            2 p' proj_dim.
        reaches_down: Whether the first of the small products has a gradient, as after a warm-up.
    """
    if reaches_down:
        backward, rows = _count_backward_flops(shape, work, adapter, with_weight_gradients=True), 0
    else:
        backward = _count_backward_flops(shape, work, adapter, with_weight_gradients=False)
        rows = 2 * work.n_tokens * adapter.n_up_weights
    return count_forward_flops(shape, work, adapter) + n_backwards * (backward + rows) + projection_flops * n_outputs


def count_dequantization_flops(shape: ModelShape, n_passes: int) -> int:
    """FLOPs of unpacking the 4-bit weights of all blocks: a product of value and scale for each, whatever the batch.

    Unpacking the scales themselves, where they are quantised too, adds 2 for every 64 weights and is left out.

    Args:
        shape: The base model.
        n_passes: Passes of a batch through the blocks: one forward, and each backward, which unpacks all weights again
            but those of the lowest adapted block that have no gradient to pass on (counted nevertheless).
    """
    return n_passes * shape.block_parameters


def count_gram_flops(n_rows: int, n_coordinates: int) -> int:
    """FLOPs of all inner products of some gradients, 2 p' a pair, and of the triangular factor of their matrix.

    Args:
        n_rows: Gradients, N.
        n_coordinates: Length of a gradient, p'.
    """
    n_pairs = n_rows * (n_rows + 1) // 2
    return 2 * n_coordinates * n_pairs + n_rows**3 // 3


def count_regression_flops(n_rows: int, n_iterations: int, proj_dim: int) -> int:
    """FLOPs of fitting subsets: 4 d per row and iteration, for the margins and the gradient.

    Args:
        n_rows: Feature rows, summed over subsets.
        n_iterations: Iterations of each fit.
        proj_dim: d.
    """
    return 4 * n_rows * n_iterations * proj_dim


def count_oracle_flops(n_subsets: int, n_rows: int, proj_dim: int) -> int:
    """FLOPs of predicting ``n_rows`` feature rows under each of ``n_subsets`` fits: 2 d a row."""
    return 2 * n_subsets * n_rows * proj_dim


def feature_bytes(n_outputs: int, proj_dim: int) -> int:
    """Bytes of stored features: a float32 gradient and output for each differentiated number."""
    return 4 * n_outputs * (proj_dim + 1)


def _attention_product(shape: ModelShape, work: Workload) -> int:
    """FLOPs of one of a block's two attention products (scores, or their sum over values)."""
    return 2 * work.n_pairs * shape.n_heads * shape.head_dim


def _head_product(shape: ModelShape, work: Workload) -> int:
    pooler = 2 * shape.hidden_size**2 * work.n_rows if shape.has_pooler else 0
    return 2 * shape.hidden_size * work.n_logits + pooler


def _count_backward_flops(
    shape: ModelShape, work: Workload, adapter: AdapterShape, *, with_weight_gradients: bool
) -> int:
    total, is_reached = 0, False
    for sites in adapter.layers:
        flops, is_reached = _count_block_backward(shape, work, adapter, sites, is_reached, with_weight_gradients)
        total += flops
    return total + (_head_product(shape, work) if is_reached else 0)


def _count_block_backward(
    shape: ModelShape,
    work: Workload,
    adapter: AdapterShape,
    sites: Sequence[Site],
    is_reached: bool,
    with_weight_gradients: bool,
) -> tuple[int, bool]:
    """Return one block's backward FLOPs, and whether its output depends on anything trained.

    ``is_reached`` says the same of its input: only then are gradients with respect to that input computed.
    """
    live, total = _find_live(shape, sites, is_reached), 0
    adapted = {site.matrix.path: site for site in sites}
    for matrix in shape.matrices:
        site = adapted.get(matrix.path)
        needs_input_gradient = live[_INPUT_OF[matrix.role]] or (site is not None and site.scales_input)
        if needs_input_gradient:
            total += 2 * work.n_tokens * matrix.n_parameters
        if site is not None:
            total += _count_small_backward(site, work, adapter, needs_input_gradient, with_weight_gradients)
    # Of scores QK and context PV: dV, dP (if the scores depend on anything trained), dQ, dK.
    products = live["value"] + (live["query"] or live["key"]) + live["query"] + live["key"]
    return total + products * _attention_product(shape, work), live["output"]


def _find_live(shape: ModelShape, sites: Sequence[Site], is_reached: bool) -> dict[str, bool]:
    """Say which values inside a block depend on anything trained, and so get a gradient."""
    roles = {site.matrix.role for site in sites}
    live = {"input": is_reached}
    for role in ("query", "key", "value"):
        live[role] = is_reached or role in roles or "fused" in roles
    live["context"] = live["query"] or live["key"] or live["value"]
    attended = live["context"] or "attention_out" in roles
    live["mlp_input"] = is_reached if shape.is_parallel else is_reached or attended
    live["activation"] = live["mlp_input"] or "mlp_in" in roles
    live["output"] = is_reached or attended or live["activation"] or "mlp_out" in roles
    return live


def _count_small_backward(
    site: Site, work: Workload, adapter: AdapterShape, needs_input_gradient: bool, with_weight_gradients: bool
) -> int:
    """FLOPs of the two small products' gradients: of their weights, and of what goes into them.

    A bottleneck's input, the matrix's output, depends on anything trained exactly where the matrix's input does.
    """
    trains_down = with_weight_gradients and adapter.trains_down
    through_up = trains_down or needs_input_gradient  # its input leads to the first, and to whatever is trained below
    entries = site.matrix.n_out * (with_weight_gradients + through_up)
    entries += site.n_down * (trains_down + needs_input_gradient)
    return 2 * work.n_tokens * site.r * entries
