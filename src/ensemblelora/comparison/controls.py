"""Controls without which "grouping helps" is unproven: as many adapters or as much rank, without groups; and soups.

In: a pool. Out: candidates with as many adapters as ours has, or with one adapter of as many parameters. Where an
adapter of another shape is needed, the base model is loaded a second time for as long as it takes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from ensemblelora import artifacts
from ensemblelora.adapters import adapter_bytes, adapter_state, add_adapter, attach, draw_start
from ensemblelora.comparison.candidate import NOTHING, Candidate, Costs, make_candidate, make_ensemble
from ensemblelora.comparison.combined import boost_members
from ensemblelora.comparison.planned import make_plan
from ensemblelora.comparison.pool import Part, Pool, Runner, Trained, Wish
from ensemblelora.config import AdapterConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import ConfigError
from ensemblelora.folding import rank_of, stack_adapters
from ensemblelora.models import load_base
from ensemblelora.prediction import MemberScores, predict_members
from ensemblelora.seeding import seed_for
from ensemblelora.stages import identify_start
from ensemblelora.training import measure_validation_nll

__all__ = [
    "attach_anew",
    "average_factors",
    "count_ours",
    "mix_copies",
    "mix_groups",
    "score_elsewhere",
    "train_copies",
    "train_wide",
]


def train_copies(pool: Pool) -> Candidate:
    """As many adapters for all tasks as ours has in all, averaged; each has its own start and order of its rows.

    The first is the shared adapter; what is random in theta0 (LoRA's A) is drawn anew for every other. Costs as many
    trainings of the shared adapter, and as many passes at inference.
    """
    starts = [None, *(_draw_start(pool, c) for c in range(1, count_ours(pool)))]
    trained = pool.train_each([Wish(pool.everyone, start=start, copy=c) for c, start in enumerate(starts)])
    weights = np.full((pool.n_tasks, len(trained)), 1 / len(trained))
    ensemble = make_ensemble(pool, [one.name for one in trained], weights)
    return make_candidate(pool, ensemble, Costs.of(trained), n_members=len(trained))


def train_wide(pool: Pool) -> Candidate:
    """One adapter for all tasks whose rank is that of ours' adapters together, at the same scale ``lora_alpha / r``.

    Costs one training, by somewhat larger matrices, and one pass. The base model is in memory twice meanwhile.
    """
    n_members = count_ours(pool)
    adapter = _widen(pool.config.adapter, n_members)
    label = f"wide-{artifacts.fingerprint(adapter)[:8]}"

    def train() -> dict[str, object]:
        with attach_anew(pool, adapter, label) as wide:
            return asdict(wide.train(wide.everyone))

    identity = (adapter, pool.rows.learning_fingerprint(), pool.start_fingerprint, pool.config.training)
    trained = Trained.from_dict(pool.recall("wide", identity, train))

    def predict(part: Part) -> list[MemberScores]:
        return score_elsewhere(pool, trained.name, part, lambda: _run_anew(pool, adapter, label))

    notes = {"n_members": n_members, "adapter": adapter.model_dump(mode="json")}
    return Candidate(predict, Costs.of([trained]), (pool.everyone,), notes)


def mix_copies(pool: Pool) -> Candidate:
    """A soup: the averaged weights of as many adapters as :func:`train_copies` has, as one adapter.

    They have one start, without which an average of weights means nothing, and differ by the order of their rows. A
    and B are averaged each by itself, as the literature does it; this is not the average of what they do to the
    weights, ``B A``. Costs the copies' trainings, and one pass at inference.

    Reference:
        Wortsman and others, "Model soups" (2022), uniform soup.
    """
    return _mix(pool, pool.train_each([Wish(pool.everyone, copy=c) for c in range(count_ours(pool))]), NOTHING)


def mix_groups(pool: Pool, *, is_exact: bool = False) -> Candidate:
    """A soup of the plan's group adapters, as one adapter for all tasks. Costs the plan and the groups' trainings.

    Args:
        pool: The seed's.
        is_exact: Average the changes of the weights, ``B A``, which takes the ranks together (or fewer where adapters
            have their A in common); otherwise A and B each by itself.
    """
    planned = make_plan(pool)
    trained = pool.train_each([Wish(group) for group in planned.plan.groups])
    return (_mix_exactly if is_exact else _mix)(pool, trained, planned.costs)


def count_ours(pool: Pool) -> int:
    """How many adapters ours has in all, boosters included; at least two, so that there is something to average."""
    planned = make_plan(pool)
    groups = planned.plan.groups
    boosted = boost_members(pool, planned, groups, pool.train_each([Wish(group) for group in groups]))
    return max(2, len(groups) + len(boosted.members))


def average_factors(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of some adapters' tensors, each by itself, in their own precision."""
    return {
        key: torch.stack([state[key].double() for state in states]).mean(dim=0).to(tensor.dtype)
        for key, tensor in states[0].items()
    }


@contextmanager
def attach_anew(pool: Pool, adapter: AdapterConfig, label: str) -> Iterator[Pool]:
    """Load the base a second time, with adapters of another shape, and let it go afterwards.

    Args:
        pool: Whose rows, settings and folder are used.
        adapter: The other shape.
        label: Names a folder of the new pool's own inside the pool's.
    """
    config, base = pool.config.model_copy(update={"adapter": adapter}), pool.probe.base
    again = load_base(
        config.model,
        head=base.head,
        n_labels=base.model.config.num_labels or 2,
        max_length=config.data.max_length,
    )
    probe = attach(again, adapter, seed=config.seed)
    if probe.prefix and pool.probe.prefix:  # what lies below the adapted blocks is the same
        probe = replace(probe, prefix=replace(probe.prefix, cache=pool.probe.prefix.cache))
    other = Pool(config, pool.folder / label, pool.rows, probe, start_fingerprint=identify_start(config, probe))
    try:
        yield other
    finally:
        del again, probe, other.probe  # whoever still holds the pool shall not hold the model
        gc.collect()
        torch.cuda.empty_cache()


def score_elsewhere(
    pool: Pool, name: str, part: Part, open_runner: Callable[[], AbstractContextManager[Runner]]
) -> list[MemberScores]:
    """Score every task's rows with a model that is made for it only where some were not scored before.

    Args:
        pool: Keeps the scores.
        name: Under which.
        part: As in :meth:`Pool.score`.
        open_runner: Makes what scores rows, and takes it away.
    """
    if pool.is_scored(name, part):
        return [pool.score([name], task, part) for task in pool.everyone]
    with open_runner() as run:
        return [pool.score([name], task, part, run=run) for task in pool.everyone]


def _draw_start(pool: Pool, copy: int) -> Trained:
    """Another start than theta0, which the pool keeps as an adapter."""
    name = f"pool-start-{artifacts.fingerprint(pool.start_fingerprint, pool.config.seed, copy)[:16]}"

    def draw() -> dict[str, object]:
        state = draw_start(pool.probe, seed=seed_for(pool.config.seed, "copy", copy))
        return asdict(_keep_state(pool, name, state))

    return Trained.from_dict(pool.recall("start", name, draw))


def _mix(pool: Pool, trained: Sequence[Trained], select: Costs) -> Candidate:
    """Average adapters' tensors into one that the pool keeps."""
    name = f"pool-soup-{artifacts.fingerprint([one.name for one in trained])[:16]}"

    def mix() -> dict[str, object]:
        pool.load([one.name for one in trained])
        return asdict(_keep_state(pool, name, average_factors([adapter_state(pool.probe, t.name) for t in trained])))

    soup = _recall_soup(pool, name, mix)
    ensemble = make_ensemble(pool, [name], np.ones((pool.n_tasks, 1)))
    return make_candidate(pool, ensemble, _charge(trained, soup, select), parts=[one.name for one in trained])


def _mix_exactly(pool: Pool, trained: Sequence[Trained], select: Costs) -> Candidate:
    """Average what adapters do to the weights, in a model of as high a rank as that takes."""
    settings = pool.config.adapter
    pool.load([one.name for one in trained])
    states = [adapter_state(pool.probe, one.name) for one in trained]
    stacked = stack_adapters(states, [1 / len(states)] * len(states), settings.lora_alpha / settings.r)
    rank = rank_of(stacked)
    adapter = settings.model_copy(update={"r": rank, "lora_alpha": float(rank)})  # of scale 1, as the stack is
    label = f"soup-{artifacts.fingerprint(adapter)[:8]}"
    name = f"pool-stack-{artifacts.fingerprint([one.name for one in trained])[:16]}"

    def mix() -> dict[str, object]:
        with attach_anew(pool, adapter, label) as wide:
            return asdict(_keep_state(wide, name, stacked))

    soup = _recall_soup(pool, name, mix)

    def predict(part: Part) -> list[MemberScores]:
        return score_elsewhere(pool, name, part, lambda: _run_anew(pool, adapter, label))

    notes = {"parts": [one.name for one in trained], "r": rank}
    return Candidate(predict, _charge(trained, soup, select), None, notes)


def _keep_state(pool: Pool, name: str, state: dict[str, Tensor]) -> Trained:
    """Put tensors into the model as an adapter, and let the pool keep it."""
    add_adapter(pool.probe, name, state)
    tokens = 2 * pool.config.training.max_tokens_per_batch
    nll = measure_validation_nll(pool.probe, name, pool.rows.validation, max_tokens=tokens)
    return pool.keep(Trained(name, pool.everyone, 0, 0.0, 0, 0, nll, adapter_bytes(pool.probe, name)))


def _recall_soup(pool: Pool, name: str, mix: Callable[[], dict[str, object]]) -> Trained:
    return Trained.from_dict(pool.recall("soup", name, mix))


def _charge(trained: Sequence[Trained], soup: Trained, select: Costs) -> Costs:
    """A soup costs its parts' trainings, and is all that is kept."""
    return replace(Costs.of(trained, kept=[soup]).plus(select), forward_passes=1.0)


@contextmanager
def _run_anew(pool: Pool, adapter: AdapterConfig, label: str) -> Iterator[Runner]:
    """Score rows with adapters that another shape's pool holds."""
    with attach_anew(pool, adapter, label) as other:

        def run(names: list[str], split: EncodedSplit) -> np.ndarray:
            other.load(names)
            return predict_members(
                other.probe, split, names, max_tokens=pool.config.evaluation.max_tokens_per_batch
            ).values

        yield run


def _widen(adapter: AdapterConfig, times: int) -> AdapterConfig:
    """The same adapter with so many times the rank, at the same scale; a bottleneck so many times as wide.

    Raises:
        ConfigError: If the adapter has no rank.
    """
    if adapter.method == "ia3":
        raise ConfigError(
            f"adapter.method {adapter.method}: it has no rank that could be raised; leave this method out"
        )
    if adapter.method == "bottleneck":
        return adapter.model_copy(update={"reduction": max(1, round(adapter.reduction / times))})
    return adapter.model_copy(update={"r": times * adapter.r, "lora_alpha": times * adapter.lora_alpha})
