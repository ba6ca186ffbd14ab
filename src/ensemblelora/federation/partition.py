"""Which clients train together: subsets, a surrogate where pairs never meet, the relaxation, groups. No torch.

In: clients' features. Out: :class:`GroupPlan`, one partition for each number of groups asked for. With 500 clients
and 2,000 subsets of ten, half of all pairs are in no subset: equation 1 is undefined there, and a surrogate of each
client's scores gives the whole matrix on equation 1's own level (:mod:`ensemblelora.affinity`). Predictions are made by
simulated rounds of averaging (:mod:`.simulation`), or by the convex fit: from rows by the subset oracle with its ridge,
from moments in closed form (:mod:`.moments`).

Cost: 2,000 fits in seconds from rows, from moments of d = 400 in a minute; a relaxation of n^3 an iteration for each
number of groups. Slow twins: those of the stages this is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.formulas import count_oracle_flops, count_regression_flops
from ensemblelora.affinity import affinity_from_scores, compare_surrogates, sample_subsets
from ensemblelora.blocks import FeatureBlock
from ensemblelora.config import AffinityConfig, EstimationConfig
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import ConfigError, StoreError
from ensemblelora.estimation import AbstractClients, Oracle, RowClients, TaskFeatures, build_oracle
from ensemblelora.federation.collection import ClientFeatures
from ensemblelora.federation.moments import MomentClients, MomentOracle, choose_moment_penalty
from ensemblelora.federation.simulation import Simulation, plan_local_budget
from ensemblelora.grouping import cluster
from ensemblelora.seeding import generator_for

__all__ = ["ClientOracle", "FoundGroups", "GroupPlan", "choose_groups", "draw_groups", "make_oracle", "read_plan"]

FloatArray = npt.NDArray[np.float64]
Subset = tuple[int, ...]
Partition = tuple[Subset, ...]


@dataclass(frozen=True, eq=False)
class ClientOracle:
    """Predictions for clients trained together, from whatever they sent.

    Attributes:
        own: Subsets to the validation losses predicted for their own clients ``(k, n)``; others are not to be read.
        weights: Subsets to the weights fitted to them, ``(k, d)``.
        at: Weights ``(k, d)`` to the losses predicted for all clients, ``(k, n)``.
        count_flops: Of what was asked so far.
        l2_penalty: Relative ridge; none: training is simulated.
    """

    own: Callable[[Sequence[Subset]], FloatArray]
    weights: Callable[[Sequence[Subset]], FloatArray]
    at: Callable[[FloatArray], FloatArray]
    count_flops: Callable[[], int]
    l2_penalty: float | None


@dataclass(frozen=True)
class FoundGroups:
    """One partition.

    Attributes:
        n_groups: As many as were asked for.
        groups: Clients' indices, largest group first.
        objective: Sum of the groups' densities of affinity.
        bound: No partition into as many groups has more.
        predicted_nll: Mean predicted validation loss of clients in their groups, in nats.
    """

    n_groups: int
    groups: Partition
    objective: float
    bound: float
    predicted_nll: float


@dataclass(frozen=True)
class GroupPlan:
    """All partitions, and what they are compared with.

    Attributes:
        names: The clients'.
        found: One for each number of groups, in their order.
        random: Groups drawn at random, of the sizes of one of those; empty if none are wanted.
        l2_penalty: Of the oracle; none: it simulates the training.
        n_subsets: Asked about.
        share_uncovered: Of pairs of clients that no subset holds.
        surrogate_errors: Root mean square error of predicting a subset's score from the others: by each surrogate, and
            by the client's mean.
        predicted: Predicted validation loss of the base model, of one group for all, of random groups.
    """

    names: tuple[str, ...]
    found: tuple[FoundGroups, ...]
    random: Partition
    l2_penalty: float | None
    n_subsets: int
    share_uncovered: float
    surrogate_errors: Mapping[str, float | None]
    predicted: Mapping[str, float]


def make_oracle(
    features: ClientFeatures, config: FederationConfig, subsets: Sequence[Subset], *, n_coordinates: int
) -> ClientOracle:
    """Make an oracle of what clients sent.

    Args:
        features: The clients'.
        config: The federation's.
        subsets: Choose the ridge, if there is one and the config leaves it open.
        n_coordinates: Numbers of an adapter that have a gradient at theta0.
    """
    if config.groups.method == "steps":
        budget = plan_local_budget(features.clients, config, n_coordinates=n_coordinates)
        make = _simulate_moments if features.send == "moments" else _simulate_rows
        return make(features, partial(Simulation, config=config, budget=budget), config.features.proj_dim)
    if features.send == "moments":
        return _make_moment_oracle(features, config, subsets)
    replicate = TaskFeatures(features.blocks("train"), features.blocks("validation"))
    settings = EstimationConfig(method="ridge", l2_penalty=config.groups.l2_penalty, l2_grid=config.groups.l2_grid)
    oracle = build_oracle([replicate], settings, subsets=subsets)
    held = replicate.validation
    return ClientOracle(
        own=lambda asked: oracle.score(asked).nll,
        weights=lambda asked: oracle.weights(asked)[0],
        at=partial(_predict_rows, held),
        count_flops=lambda: _count_flops(oracle, sum(block.n_examples for block in held), config.features.proj_dim),
        l2_penalty=oracle.l2_penalty,
    )


def choose_groups(
    features: ClientFeatures, config: FederationConfig, *, n_coordinates: int
) -> tuple[GroupPlan, FloatArray, ClientOracle]:
    """Find the groups.

    Args:
        features: The clients'.
        config: The federation's.
        n_coordinates: Numbers of an adapter that have a gradient at theta0.

    Returns:
        The plan; the affinity, symmetric ``(n, n)``; the oracle.

    Raises:
        ConfigError: If there are more groups than clients, or too few subsets to have all of them.
        SolverError: If a relaxation can't be solved.
    """
    n, settings = len(features.clients), config.groups
    if max(settings.n_groups) > n:
        raise ConfigError(f"groups.n_groups {max(settings.n_groups)}: there are {n} clients; ask for no more groups")
    # Coverage costs subsets, and the surrogate that serves so many clients needs none.
    asked = AffinityConfig(subset_size=settings.subset_size, n_subsets=settings.n_subsets, min_pair_count=0)
    design = sample_subsets(n, asked, seed=config.seed)
    if absent := sorted(set(range(n)).difference(*design.subsets)):
        raise ConfigError(
            f"groups.n_subsets {settings.n_subsets}: {len(absent)} of {n} clients are in no subset, such as "
            f"{features.clients[absent[0]].name!r}; ask for more"
        )
    oracle = make_oracle(features, config, design.subsets, n_coordinates=n_coordinates)
    values = -oracle.own(design.subsets)
    affinity = affinity_from_scores(design, values, surrogate=settings.surrogate)
    found = tuple(_find(affinity.matrix, m, oracle, config) for m in settings.n_groups)
    random = draw_groups(found, config)
    everyone = (tuple(range(n)),)
    base = oracle.at(np.zeros((1, config.features.proj_dim)))
    predicted = {"base": float(base.mean()), "global": _predict(oracle, everyone)}
    plan = GroupPlan(
        names=tuple(client.name for client in features.clients),
        found=found,
        random=random,
        l2_penalty=oracle.l2_penalty,
        n_subsets=len(design.subsets),
        share_uncovered=float((affinity.counts[np.triu_indices(n, 1)] == 0).mean()),
        surrogate_errors=compare_surrogates(design, np.nan_to_num(values)),
        predicted=predicted | ({"random": _predict(oracle, random)} if random else {}),
    )
    return plan, affinity.matrix, oracle


def draw_groups(found: Sequence[FoundGroups], config: FederationConfig) -> Partition:
    """Draw groups of the sizes that one of the found partitions has; empty if no such baseline is asked for."""
    if "random" not in config.evaluation.baselines:
        return ()
    wanted = config.evaluation.random_groups or found[0].n_groups
    like = next(one for one in found if one.n_groups == wanted)
    sizes = [len(group) for group in like.groups]
    order = generator_for(config.seed, "random groups").permutation(sum(sizes))
    return tuple(tuple(sorted(part.tolist())) for part in np.split(order, np.cumsum(sizes)[:-1]))


def read_plan(values: Mapping[str, Any]) -> GroupPlan:
    """Take back what ``dataclasses.asdict`` gave and JSON kept.

    Raises:
        StoreError: If it is no plan.
    """
    try:
        found = tuple(FoundGroups(**{**one, "groups": _to_partition(one["groups"])}) for one in values["found"])
        plain = {**values, "names": tuple(values["names"]), "found": found, "random": _to_partition(values["random"])}
        return GroupPlan(**plain)
    except (KeyError, TypeError) as error:
        raise StoreError(f"plan.json: no plan of a federation ({error!r}); delete it and run again") from None


def _simulate_rows(
    features: ClientFeatures, simulate: Callable[[AbstractClients], Simulation], proj_dim: int
) -> ClientOracle:
    held, n_rows = features.blocks("validation"), [client.n_rows["train"] for client in features.clients]
    simulation, n_held = simulate(RowClients(features.blocks("train"))), len(features.values["validation"])

    def count_flops() -> int:
        fitted = simulation.fitted
        n_trained = simulation.n_passes * sum(n_rows[i] for subset in fitted for i in subset)
        return count_regression_flops(n_trained, 1, proj_dim) + count_oracle_flops(len(fitted), n_held, proj_dim)

    at = partial(_predict_rows, held)
    return ClientOracle(lambda asked: at(simulation.fit(asked)), simulation.fit, at, count_flops, None)


def _simulate_moments(
    features: ClientFeatures, simulate: Callable[[AbstractClients], Simulation], proj_dim: int
) -> ClientOracle:
    oracle = MomentOracle(features.moments("train", proj_dim), features.moments("validation", proj_dim), 0.0)
    simulation = simulate(MomentClients(oracle.train))

    def count_flops() -> int:
        return 2 * proj_dim**2 * sum(simulation.count_steps(subset) + len(subset) for subset in simulation.fitted)

    def own(asked: Sequence[Subset]) -> FloatArray:
        return oracle.predict_own(asked, simulation.fit(asked))

    return ClientOracle(own, simulation.fit, oracle.predict_at, count_flops, None)


def _predict_rows(held: Sequence[FeatureBlock], weights: FloatArray) -> FloatArray:
    """Mean loss of every client's rows at some weights ``(k, d)``, as ``(k, n)``."""
    changes = [block.outputs + block.features[:, 0] @ weights.T for block in held]  # (rows, k) each
    return np.stack([np.logaddexp(0.0, -change).mean(axis=0) for change in changes], axis=1)


def _make_moment_oracle(features: ClientFeatures, config: FederationConfig, subsets: Sequence[Subset]) -> ClientOracle:
    d, settings, is_noisy = config.features.proj_dim, config.groups, config.privacy.noise_multiplier > 0
    train, validation = features.moments("train", d), features.moments("validation", d)
    penalty = settings.l2_penalty
    if penalty == "auto":
        penalty = choose_moment_penalty(train, validation, subsets, settings.l2_grid, is_noisy=is_noisy)
    oracle = MomentOracle(train, validation, penalty, is_noisy)
    per_fit = d**3 + 4 * d * d * settings.subset_size
    return ClientOracle(oracle.predict, oracle.fit, oracle.predict_at, lambda: len(subsets) * per_fit, penalty)


def _count_flops(oracle: Oracle, n_rows: int, proj_dim: int) -> int:
    return count_regression_flops(oracle.row_iterations, 1, proj_dim) + count_oracle_flops(
        oracle.n_fits, n_rows, proj_dim
    )


def _find(matrix: FloatArray, n_groups: int, oracle: ClientOracle, config: FederationConfig) -> FoundGroups:
    found = cluster(matrix, n_groups, n_restarts=config.groups.n_restarts, seed=config.seed)
    return FoundGroups(n_groups, found.groups, found.objective, found.bound, _predict(oracle, found.groups))


def _predict(oracle: ClientOracle, groups: Partition) -> float:
    losses = oracle.own(groups)
    return float(np.mean([losses[g, client] for g, group in enumerate(groups) for client in group]))


def _to_partition(groups: Sequence[Sequence[int]]) -> Partition:
    return tuple(tuple(group) for group in groups)
