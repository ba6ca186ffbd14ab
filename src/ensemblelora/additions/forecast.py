"""What a change will cost: the passes that it will make through the model, counted before they are made.

In: a :class:`~.carry.Carrier`. Out: FLOPs by stage, by the ledger's names. Scores of adapters that stay are known for
rows that stay, and cost nothing. What depends on the outcome is expected as it was in the earlier run: as many
boosters, and the same groups used for a task. Tests write the answers to free text and measure linearity anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ensemblelora.accounting.meter import Meter
from ensemblelora.additions.carry import Carrier
from ensemblelora.counting import count_forward, count_generation, count_gradients, count_lower, count_training
from ensemblelora.data.batching import collate, iterate_batches, plan_batches, plan_evaluations, schedule_training
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.subset import take_examples
from ensemblelora.evaluation.linearity import spread_batches
from ensemblelora.generation import list_contexts
from ensemblelora.gradients.backward import count_outputs
from ensemblelora.gradients.output import choose_modes
from ensemblelora.gradients.plan import choose_examples
from ensemblelora.judging import LINEARITY_ROWS
from ensemblelora.passes import FILL_TOKENS, choose_max_tokens
from ensemblelora.training import choose_layout

__all__ = ["forecast_flops"]

_USUAL_LENGTHS = 3
"""step lengths that a line search tries"""


def forecast_flops(carrier: Carrier) -> dict[str, int]:
    """FLOPs of every stage from training on."""
    return {
        "train": sum(_count_training(carrier, g) for g in carrier.list_trained()),
        "boost": sum(_count_boosting(carrier, g) for g in range(len(carrier.groups))),
        "combine": _count_combining(carrier),
        "evaluate": _count_tests(carrier),
    }


def _count_training(carrier: Carrier, group: int) -> int:
    """One adapter: its optimiser steps, and the validation passes that choose a checkpoint."""
    settings, probe = carrier.settle_training(group), carrier.probe
    train, layout = carrier.pick_rows(group), choose_layout(probe, settings)
    judges = [carrier.rows.validation[i] for i in carrier.groups[group]]
    judges = carrier.pick_judges(group) if carrier.is_onward(group) else judges
    epoch = settings.model_copy(update={"num_train_epochs": 1})
    schedule, meter = schedule_training(train, epoch, seed=carrier.work.config.seed, layout=layout), Meter("train")
    for step in schedule:
        batch = collate([(train[task], e) for task, e in step], probe.base.pad_token_id, layout=layout)
        count_training(meter, probe.costs, batch, normalize=settings.loss == "vocab_softmax")
    n_epochs = settings.num_train_epochs
    n_stops = len(plan_evaluations(n_epochs * len(schedule), n_epochs * settings.evaluations_per_epoch))
    checks = n_stops * _count(carrier, judges, 2 * settings.max_tokens_per_batch)
    return n_epochs * meter.record.flops + checks + _count_below(carrier, [s for s in train if s.task != carrier.task])


def _count_boosting(carrier: Carrier, group: int) -> int:
    """Boosters of one group: copied, judged beside an adapter that was trained onward, or tried again."""
    earlier = carrier.list_boosters(group)
    if carrier.is_kept(group) or not earlier:
        return 0
    tokens, tasks = _tokens(carrier), carrier.groups[group]
    if carrier.is_onward(group):
        splits = [carrier.rows.validation[i] for i in tasks]
        return sum((_new(carrier, group, s) + _start(carrier, s)) * _count(carrier, [s], tokens) for s in splits)
    config = carrier.work.config
    train, validation = (
        [part[i] for i in tasks if part[i].kind != "sequence"] for part in (carrier.rows.train, carrier.rows.validation)
    )
    train = [take_examples(s, choose_examples(s, config.gradients, seed=config.seed)) for s in train]
    tokens = config.gradients.max_tokens_per_batch
    forward, backward = _count(carrier, train, tokens), _count(carrier, train, tokens, count_training)
    search = _USUAL_LENGTHS * forward + _count(carrier, validation, tokens) + backward
    return 2 * _count(carrier, [*train, *validation], tokens) + len(earlier) * search


def _count_combining(carrier: Carrier) -> int:
    """Scores of validation rows, by which weights are fitted; what boosting has scored is not scored again."""
    flops, m = 0, len(carrier.groups)
    asked = carrier.work.config.ensemble.count_candidates(m)
    share = (asked - 1) / (m - 1) if m > 1 else 0.0  # which of the others compete is not known yet
    for i, split in enumerate(carrier.rows.validation):
        own = next(g for g, group in enumerate(carrier.groups) if i in group)
        others = sum(_new(carrier, g, split) for g in range(m) if g != own)
        every = _new(carrier, own, split) + share * others + _start(carrier, split)
        if carrier.is_onward(own) and carrier.list_boosters(own):
            every -= _new(carrier, own, split) + _start(carrier, split)
        flops += round(every * _count(carrier, [split], _tokens(carrier)))
    if carrier.list_trained():
        flops += _count_below(carrier, [s for s in carrier.rows.validation if s.task != carrier.task])
    return flops


def _count_tests(carrier: Carrier) -> int:
    """Scores of test rows, written answers, and how linear the adapters are."""
    flops, has_base = 0, "base" in carrier.work.config.evaluation.baselines
    for i, split in enumerate(carrier.rows.test):
        used = _expect_used(carrier, i)
        passes = sum(share * _new(carrier, g, split) for g, share in enumerate(used))
        if split.task == carrier.task:
            boosted = sum(share * bool(carrier.list_boosters(g)) for g, share in enumerate(used))
            passes += has_base + min(boosted, 1) * _start(carrier, split)
        flops += round(passes * _count(carrier, [split], _tokens(carrier)))
        flops += _count_below(carrier, [split]) if passes else 0
        if split.kind == "sequence":
            n_used = sum(used)
            flops += _count_answers(carrier, split, times=has_base + 1 + (round(n_used) if n_used >= 1.5 else 0))
    return flops + _count_linearity(carrier)


def _count_answers(carrier: Carrier, split: EncodedSplit, *, times: int) -> int:
    meter, n_steps = Meter("evaluate"), int((split.row_lengths - split.answer_starts).max())
    lengths = np.array([len(context) for context in list_contexts(split)])
    for batch in plan_batches(lengths + n_steps, split.row_counts, _tokens(carrier)):
        count_generation(meter, carrier.probe.costs, lengths[batch].tolist(), n_steps=n_steps, times=times)
    return meter.record.flops


def _count_linearity(carrier: Carrier) -> int:
    probe, gradients = carrier.probe, carrier.work.config.gradients
    modes, meter = choose_modes(carrier.rows.learning, gradients.output), Meter("evaluate")
    for split in carrier.rows.validation:
        n_outputs = count_outputs(split, modes[split.task])
        pad = probe.base.pad_token_id
        for batch in spread_batches(split, LINEARITY_ROWS, gradients.max_tokens_per_batch, pad):
            count_forward(meter, probe.costs, batch)
            n_backwards, n = (1 if split.kind == "options" else n_outputs), n_outputs * len(batch.labels)
            count_gradients(meter, probe.costs, batch, n_backwards=n_backwards, n_outputs=n, projection_flops=0)
    return meter.record.flops


def _new(carrier: Carrier, group: int, split: EncodedSplit) -> int:
    """How many of a group's adapters have no scores of a split yet."""
    n_boosters = len(carrier.list_boosters(group)) if split.kind != "sequence" else 0
    is_whole = not carrier.is_kept(group) and not carrier.is_onward(group)
    if split.task == carrier.task or is_whole:
        return 1 + n_boosters
    return int(not carrier.is_kept(group))


def _start(carrier: Carrier, split: EncodedSplit) -> int:
    """Whether the start point, which boosters are measured from, has to be scored on a split."""
    is_boosted = any(carrier.list_boosters(g) for g in range(len(carrier.groups)))
    return int(is_boosted and split.task == carrier.task and split.kind != "sequence")


def _expect_used(carrier: Carrier, task: int) -> list[float]:
    """The share with which each group is expected to answer a task: 1 for its own, else as in the earlier run."""
    weights = np.asarray(carrier.source.ensemble.weights) > 0
    n_tasks, m = weights.shape
    usual = (weights.sum() - n_tasks) / (n_tasks * (m - 1)) if m > 1 else 0.0
    names, name = carrier.source.names, carrier.rows.names[task]
    shares = []
    for g, group in enumerate(carrier.groups):
        parent = carrier.parent_of(g)
        is_known = parent is not None and name in names
        share = float(weights[names.index(name), parent]) if is_known else float(max(usual, 0.0))
        shares.append(1.0 if task in group else share)
    return shares


def _tokens(carrier: Carrier) -> int:
    return choose_max_tokens(carrier.probe, carrier.work.config.evaluation.max_tokens_per_batch)


def _count(
    carrier: Carrier, splits: Iterable[EncodedSplit], max_tokens: int, enter: Callable[..., None] = count_forward
) -> int:
    """FLOPs of one adapter's pass over some splits, above the blocks that all adapters share."""
    meter, probe = Meter(""), carrier.probe
    for split in splits:
        for batch in iterate_batches(split, max_tokens, probe.base.pad_token_id, layout=probe.layout):
            enter(meter, probe.costs, batch)
    return meter.record.flops


def _count_below(carrier: Carrier, splits: Iterable[EncodedSplit]) -> int:
    """FLOPs of the blocks below the lowest adapted one, once a row."""
    return _count(carrier, splits, FILL_TOKENS, count_lower) if carrier.probe.prefix is not None else 0
