"""The sizes of adapters that decide what they cost. No torch.

Every kind of adapter is the same to the formulas: at some matrices of the blocks, two small products and their biases,
or a vector that multiplies activations, or both. In: a :class:`ModelShape` and the names of what is adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ensemblelora.accounting.shapes import Matrix, ModelShape
from ensemblelora.errors import ModelError

__all__ = ["AdapterShape", "Site", "bottleneck_shape", "lora_shape", "scaling_shape"]


@dataclass(frozen=True)
class Site:
    """What an adapter has at one matrix of a block.

    Attributes:
        matrix: The matrix.
        r: Width between two small products, ``n_down -> r -> matrix.n_out``; 0: there are none.
        n_down: Width of what the first of them reads: the matrix's input (LoRA), or its output (bottleneck).
        has_biases: Whether both products have a bias.
        n_scales: Numbers that multiply activations.
        scales_input: Whether these are what enters the matrix, and not what it gives.
    """

    matrix: Matrix
    r: int = 0
    n_down: int = 0
    has_biases: bool = False
    n_scales: int = 0
    scales_input: bool = False

    @property
    def n_weights(self) -> int:
        """Entries of both small matrices."""
        return self.r * (self.n_down + self.matrix.n_out)

    @property
    def n_up_weights(self) -> int:
        """Entries of the second one, which begins at zero and so alone has a gradient there."""
        return self.r * self.matrix.n_out

    @property
    def n_parameters(self) -> int:
        """Numbers that are trained."""
        return self.n_weights + self.n_scales + self.has_biases * (self.r + self.matrix.n_out)

    @property
    def n_start_parameters(self) -> int:
        """Those of them with a gradient at the start point."""
        return self.n_up_weights + self.n_scales + self.has_biases * self.matrix.n_out


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter has in each block; made by :func:`lora_shape` and its like.

    Attributes:
        layers: The adapted matrices of each block, first block first.
        trains_down: Whether the first of the small products is trained (LoRA's A), or the second alone.
    """

    layers: tuple[tuple[Site, ...], ...]
    trains_down: bool = True

    @property
    def sites(self) -> tuple[Site, ...]:
        """All of them."""
        return tuple(site for layer in self.layers for site in layer)

    @property
    def n_weights(self) -> int:
        """Entries of the small matrices: the P_a of 2 P_a FLOPs a token."""
        return sum(site.n_weights for site in self.sites)

    @property
    def n_up_weights(self) -> int:
        """Entries of those that have a gradient at the start point."""
        return sum(site.n_up_weights for site in self.sites)

    @property
    def n_parameters(self) -> int:
        """Numbers of an adapter."""
        return sum(site.n_parameters for site in self.sites)

    @property
    def n_output_parameters(self) -> int:
        """p': the coordinates with a gradient at the start point."""
        return sum(site.n_start_parameters for site in self.sites)

    @property
    def flops_per_pass(self) -> int:
        """What a pass takes whatever its size: DoRA's product B A, whose norms it needs, as PEFT computes it."""
        return sum(2 * site.n_down * site.n_weights for site in self.sites if site.n_scales)

    def n_bytes(self, bytes_per_parameter: int = 4) -> int:
        """Bytes of the adapter's weights as saved."""
        return self.n_parameters * bytes_per_parameter


def lora_shape(
    shape: ModelShape,
    r: int,
    target_modules: Iterable[str],
    *,
    layers: Sequence[int] | None = None,
    trains_a: bool = True,
    has_magnitudes: bool = False,
) -> AdapterShape:
    """Find which matrices a LoRA of rank r sits on.

    Args:
        shape: The base model.
        r: The rank.
        target_modules: Names as PEFT takes them: full (``model.layers.3.self_attn.q_proj``) or ends of names.
        layers: Blocks that ends of names stand for; none: all.
        trains_a: Whether A is trained, or B alone.
        has_magnitudes: Whether a number for each output is trained too (DoRA).

    Raises:
        ModelError: If a name is no linear layer of the model's blocks.
    """

    def make(matrix: Matrix) -> Site:
        return Site(matrix, r, matrix.n_in, n_scales=matrix.n_out * has_magnitudes)

    return AdapterShape(_place(shape, target_modules, layers, make), trains_a)


def bottleneck_shape(
    shape: ModelShape, reduction: int, target_modules: Iterable[str], *, layers: Sequence[int] | None = None
) -> AdapterShape:
    """Find where bottlenecks sit: each after a matrix, or after the last matrix of a sub-block.

    Args:
        shape: The base model.
        reduction: Width of what is adapted over that of the bottleneck.
        target_modules: Names as PEFT takes them, of linear layers or of whole sub-blocks (``self_attn``).
        layers: Blocks that ends of names stand for; none: all.

    Raises:
        ModelError: If a name is neither.
    """

    def make(matrix: Matrix) -> Site:
        return Site(matrix, max(1, matrix.n_out // reduction), matrix.n_out, has_biases=True)

    return AdapterShape(_place(shape, [_name_last(shape, target) for target in target_modules], layers, make))


def scaling_shape(
    shape: ModelShape,
    target_modules: Sequence[str],
    *,
    scaled_inputs: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> AdapterShape:
    """Find which matrices' activations are multiplied by vectors.

    Args:
        shape: The base model.
        target_modules: Names as PEFT takes them.
        scaled_inputs: Those of them whose input is multiplied; of the others it is the output.
        layers: Blocks that ends of names stand for; none: all.

    Raises:
        ModelError: If a name is no linear layer of the model's blocks.
    """
    inputs = _place(shape, scaled_inputs, layers, lambda m: Site(m, n_scales=m.n_in, scales_input=True))
    others = [target for target in target_modules if target not in scaled_inputs]
    outputs = _place(shape, others, layers, lambda m: Site(m, n_scales=m.n_out))
    return AdapterShape(tuple((*own, *more) for own, more in zip(outputs, inputs, strict=True)))


def _place(
    shape: ModelShape, targets: Iterable[str], layers: Sequence[int] | None, make: Callable[[Matrix], Site]
) -> tuple[tuple[Site, ...], ...]:
    chosen: list[set[str]] = [set() for _ in range(shape.n_layers)]
    for target in targets:
        found = _find_matrices(shape, target, range(shape.n_layers) if layers is None else layers)
        if not found:
            known = ", ".join(matrix.path for matrix in shape.matrices)
            raise ModelError(f"adapter target {target!r}: not a linear layer of {shape.family}'s blocks ({known})")
        for layer, path in found:
            chosen[layer].add(path)
    return tuple(tuple(make(matrix) for matrix in shape.matrices if matrix.path in paths) for paths in chosen)


def _name_last(shape: ModelShape, target: str) -> str:
    """Name the last matrix of a sub-block in its place; a matrix's own name stays as it is."""
    _, path = _split(target)
    inside = [matrix.path for matrix in shape.matrices if path and matrix.path.startswith(f"{path}.")]
    return target + inside[-1].removeprefix(path) if inside else target


def _find_matrices(shape: ModelShape, target: str, layers: Iterable[int]) -> list[tuple[int, str]]:
    layer, path = _split(target)
    if layer is not None:
        return [(layer, matrix.path) for matrix in shape.matrices if matrix.path == path and layer < shape.n_layers]
    matches = [m.path for m in shape.matrices if m.path == target or m.path.endswith(f".{target}")]
    return [(layer, path) for layer in layers for path in matches]


def _split(target: str) -> tuple[int | None, str]:
    """A full name's block and what follows it; none, and the name itself, for the end of a name."""
    parts = target.split(".")
    index = next((k for k, part in enumerate(parts) if part.isdigit()), None)
    return (None, target) if index is None else (int(parts[index]), ".".join(parts[index + 1 :]))
