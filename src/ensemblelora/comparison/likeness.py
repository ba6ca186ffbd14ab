"""How alike tasks are by other signs than the oracle's: their trained adapters, their texts, their form, their kind.

In: adapters' tensors, or encoded rows. Out: symmetric matrices ``(n_tasks, n_tasks)``, higher is more alike, which the
same clustering takes as it takes the affinity; for categories, the groups themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.embedding import embed_contexts
from ensemblelora.errors import DataError
from ensemblelora.grouping import Partition, sort_groups
from ensemblelora.seeding import generator_for

__all__ = ["CATEGORIES", "compare_adapters", "compare_formats", "compare_texts", "find_categories"]

FloatArray = npt.NDArray[np.float64]

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "sentence completion": ("copa", "hellaswag", "story_cloze"),
    "natural language inference": ("cb", "rte"),
    "coreference resolution": ("wsc", "winogrande"),
    "question answering": ("boolq", "multirc"),
    "word sense disambiguation": ("wic",),
}
"""The paper's five categories of its ten datasets (section 2.1), by the names of their cards."""

_DEMO = "demo_"  # the same datasets as another package brings them
_A, _B = ".lora_A.weight", ".lora_B.weight"


def compare_adapters(
    states: Sequence[Mapping[str, Tensor]], start: Mapping[str, Tensor], *, scale: float = 1.0
) -> FloatArray:
    """Return cosines between the changes that adapters make, ``(n, n)``.

    LoRA changes a weight by ``scale B A``, and ``<B A, B' A'> = <B^T B', A A'^T>``, products of r by r: the change
    itself, of the weight's size, is never formed. What a state holds beside, and adapters without A and B, are
    compared by the difference of their tensors.

    Args:
        states: Adapters' tensors, keyed as PEFT saves them.
        start: Those that all began with.
        scale: ``lora_alpha / r``; matters where there are tensors of both sorts.
    """
    pairs = itertools.combinations_with_replacement(range(len(states)), 2)
    products = np.zeros((len(states),) * 2)
    for i, j in pairs:
        products[i, j] = products[j, i] = _multiply_changes(states[i], states[j], start, scale)
    return _to_cosines(products)


def compare_texts(
    adapted: AdaptedModel,
    splits: Sequence[EncodedSplit],
    *,
    n_rows: int,
    max_tokens: int,
    seed: int,
    meter: Meter | None = None,
) -> FloatArray:
    """Return cosines between the tasks' mean embeddings, ``(n, n)``.

    A row's embedding is the mean over its context's tokens of the base model's last hidden states: no other model can
    be counted on to be there. Costs one forward pass over the rows.

    Args:
        adapted: The model; its theta0 computes what the base computes.
        splits: One a task.
        n_rows: Examples of each, drawn by seed.
        max_tokens: Padded tokens of a pass.
        seed: The run's seed.
        meter: Told what every pass costs.
    """
    means = []
    for split in splits:
        chosen = generator_for(seed, "texts", split.task).permutation(split.n_examples)[:n_rows]
        embedded = embed_contexts(adapted, split, chosen, max_tokens=max_tokens, meter=meter)
        means.append(embedded.mean(axis=0))
    embeddings = np.stack(means)
    return _to_cosines(embeddings @ embeddings.T)


def compare_formats(splits: Sequence[EncodedSplit]) -> FloatArray:
    """Return in how many of three things tasks agree, ``(n, n)``: kind of scoring, number of choices, and labels.

    Labels are token sequences; choices that change from row to row agree with nothing, nor do varying numbers.
    """
    formats = [_describe_format(split) for split in splits]
    alike = np.array(
        [[sum(_agree(a, b) for a, b in zip(one, other, strict=True)) for other in formats] for one in formats]
    )
    np.fill_diagonal(alike, 3)
    return alike.astype(np.float64)


def find_categories(names: Sequence[str]) -> Partition:
    """Group tasks by the paper's categories.

    Args:
        names: Of the tasks, in their order.

    Raises:
        DataError: If a task is none of the paper's ten datasets; names all such.

    Example:
        >>> find_categories(["rte", "copa", "cb"])
        ((0, 2), (1,))
    """
    category_of = {name: category for category, known in CATEGORIES.items() for name in known}
    found: dict[str, list[int]] = {}
    unknown = [name for name in names if name.removeprefix(_DEMO) not in category_of]
    if unknown:
        raise DataError(
            f"tasks {', '.join(unknown)} are in none of the paper's five categories, which hold "
            f"{', '.join(sorted(category_of))}; compare other methods on them"
        )
    for task, name in enumerate(names):
        found.setdefault(category_of[name.removeprefix(_DEMO)], []).append(task)
    return sort_groups(found.values())


def _to_cosines(products: FloatArray) -> FloatArray:
    """Divide inner products by both norms; what is next to nothing is like nothing, itself included."""
    squares = np.diag(products)
    is_some = squares > 1e-12 * squares.max(initial=0.0)
    factors = np.where(is_some, 1.0 / np.sqrt(np.where(is_some, squares, 1.0)), 0.0)
    return np.asarray(products * factors[:, None] * factors)


def _multiply_changes(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], start: Mapping[str, Tensor], scale: float
) -> float:
    total = 0.0
    for key in start:
        if key.endswith(_A):
            module = key.removesuffix(_A)
            (a, b), (a_other, b_other) = (_stack_change(state, start, module) for state in (one, other))
            total += scale**2 * float(((b.T @ b_other) * (a @ a_other.T)).sum())
        elif not key.endswith(_B):
            total += float(((one[key] - start[key]).double() * (other[key] - start[key]).double()).sum())
    return total


def _stack_change(state: Mapping[str, Tensor], start: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is ``B A`` less the start's, which is zero where nothing was trained before."""
    a, b = state[module + _A].double(), state[module + _B].double()
    if not start[module + _B].any():
        return a, b
    return torch.cat([a, start[module + _A].double()]), torch.cat([b, -start[module + _B].double()], dim=1)


def _describe_format(split: EncodedSplit) -> tuple[str, int | None, tuple[tuple[int, ...], ...] | None]:
    """Kind of scoring, number of choices and the choices' tokens; none for what changes from row to row."""
    counts = set(split.n_choices.tolist())
    n_choices = counts.pop() if len(counts) == 1 else None
    if split.kind == "verbalizer":
        return split.kind, n_choices, tuple((int(token),) for token in split.label_tokens)
    if split.kind != "options" or n_choices is None:
        return split.kind, n_choices, None
    seen = {
        tuple(_read_answer(split, row) for row in range(split.example_rows[e], split.example_rows[e + 1]))
        for e in range(split.n_examples)
    }
    return split.kind, n_choices, seen.pop() if len(seen) == 1 else None


def _read_answer(split: EncodedSplit, row: int) -> tuple[int, ...]:
    first, last = split.row_starts[row] + split.answer_starts[row], split.row_starts[row + 1]
    return tuple(split.tokens[first:last].tolist())


def _agree(one: object, other: object) -> bool:
    return one is not None and one == other
