"""What choosing costs, and what it would cost if every set that a search forward asks about were truly fine-tuned."""

from __future__ import annotations

from ensemblelora.accounting.formulas import count_oracle_flops, count_regression_flops
from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import TrainingConfig
from ensemblelora.counting import count_training
from ensemblelora.data.batching import iterate_batches
from ensemblelora.selection.prospect import Choice, Prospect
from ensemblelora.selection.search import Found
from ensemblelora.selection.strategies import Selection
from ensemblelora.training import choose_layout

__all__ = ["count_new", "count_search", "count_true_search", "list_asked"]


def count_new(before: StageRecord | None, after: StageRecord | None) -> tuple[int, float]:
    """FLOPs and seconds that a stage took since its costs were last looked at; what it used again counts nothing.

    Args:
        before: The stage's costs then; none: there were none.
        after: Its costs now.
    """
    if after is None or after == before:
        return 0, 0.0
    if before is None or not after.parts:
        return after.flops, after.wall_seconds
    made = [part for identity, part in after.parts.items() if identity not in before.parts]
    return sum(part.flops for part in made), sum(part.wall_seconds for part in made)


def count_search(prospect: Prospect, found: Selection) -> int:
    """FLOPs of a strategy's fits and of predicting the target's validation rows under them."""
    first = prospect.oracle.replicates[0]
    width, held = first.train[0].proj_dim, first.validation[0].outputs.size
    n_asked = len(prospect.oracle.replicates) * found.n_asked
    return count_regression_flops(found.row_iterations, 1, width) + count_oracle_flops(n_asked, held, width)


def count_true_search(
    pool: Pool, prospect: Prospect, found: Selection, settings: TrainingConfig, *, max_sources: int | None = None
) -> int:
    """FLOPs of the same search forward with a true fine-tuning in place of every prediction.

    Every set that the search asks about is fine-tuned once, and the target's validation rows are scored at each of its
    evaluations. By the formulas of the ledger, from the lowest adapted block up: what lies below is run once a row.

    Args:
        pool: Its task 0 is the target, the others are the sources.
        prospect: The same tasks.
        found: Of the strategy ``forward``.
        settings: How each set would be trained.
        max_sources: The search's limit.
    """
    one = [settings.num_train_epochs * _count_epoch(pool, task, settings) for task in range(pool.n_tasks)]
    n_evaluations = 1 + settings.num_train_epochs * settings.evaluations_per_epoch  # the start is one, too
    checking = n_evaluations * pool.count_scoring(0, "validation", 1)
    sets = [prospect.subset_of(chosen) for chosen in list_asked(prospect, found, max_sources)]
    return sum(sum(one[task] for task in tasks) + checking for tasks in sets if tasks)


def list_asked(prospect: Prospect, found: Selection | Found, max_sources: int | None) -> list[Choice]:
    """The distinct sets that a search forward asked about, the step that it did not take included."""
    chosen: Choice = ()
    asked: dict[Choice, None] = {chosen: None}
    for added in [*(move.added for move in found.moves), ()]:
        if max_sources is None or len(chosen) < max_sources:
            asked |= {tuple(sorted((*chosen, j))): None for j in prospect.everything if j not in chosen}
        chosen = tuple(sorted((*chosen, *added)))
    return list(asked)


def _count_epoch(pool: Pool, task: int, settings: TrainingConfig) -> int:
    """FLOPs of training on one task's rows once."""
    probe, split, meter = pool.probe, pool.split(task, "train"), Meter("count")
    layout = choose_layout(probe, settings)
    for batch in iterate_batches(split, settings.max_tokens_per_batch, probe.base.pad_token_id, layout=layout):
        count_training(meter, probe.costs, batch, normalize=settings.loss == "vocab_softmax")
    return meter.record.flops
