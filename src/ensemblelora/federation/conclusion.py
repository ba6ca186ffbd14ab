"""The end of a federation: losses, costs, traffic and guarantees in one record.

In: what was trained, scored and sent. Out: :class:`~.results.Outcome`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts
from ensemblelora.federation.collection import ClientFeatures
from ensemblelora.federation.exchange import Traffic
from ensemblelora.federation.judging import Made, Served
from ensemblelora.federation.privacy import state_guarantee
from ensemblelora.federation.protocol import PARTS
from ensemblelora.federation.results import (
    LOSSES_FILE,
    MethodCost,
    Outcome,
    add_traffic,
    describe_traffic,
    judge_methods,
    list_refused,
    name_partition,
)
from ensemblelora.federation.scores import Scored, Sum
from ensemblelora.federation.stages import Federation

__all__ = ["LOSSES_FILE", "conclude"]

FloatArray = npt.NDArray[np.float64]


def conclude(
    fed: Federation,
    made: Made,
    served: Served,
    validation: Mapping[str, float],
    scored: Scored,
    tuned: Mapping[str, tuple[FloatArray, int]],
    features: ClientFeatures,
) -> Outcome:
    """Put everything together. Leaves ``losses.npz``."""
    losses = dict(scored.losses["test"]) | {name: values for name, (values, _) in tuned.items()}
    losses["ours"] = losses[served.name]
    artifacts.save_arrays(fed.work.path / LOSSES_FILE, losses)
    n_weighed = 0 if scored.weights is None else scored.weights.shape[1]
    methods, counted = judge_methods(losses, _count_costs(fed, made, served, tuned, n_weighed), fed.config)
    n_updates = _count_updates(made, fed.n_clients)
    weights = [] if scored.weights is None else np.nanmean(scored.weights, axis=0).tolist()
    adapters = (1 + sum(len(one.vectors) for one in made.trained.values())) * fed.template.start.nbytes
    peak = max((record.peak_memory_bytes for record in fed.work.ledger.stages), default=0)
    clients = fed.exchange.clients
    traffic = _without_others(
        fed, [*made.trained, *tuned, *(f"boost-{m}" for m, one in made.boosters.items() if one.rounds)]
    )
    return Outcome(
        n_clients=int(counted.sum()),
        n_registered=len(clients),
        n_rows={part: sum(client.n_rows[part] for client in clients) for part in PARTS},
        methods=methods,
        served=served.name,
        validation=dict(validation),
        weights=weights,
        residuals={name: float(one.residuals.mean()) for name, one in made.trained.items()},
        kept_boosters={str(m): (len(one.kept), len(one.rounds)) for m, one in made.boosters.items()},
        traffic={name: describe_traffic(record) for name, record in traffic.stages.items()},
        refused=list_refused(traffic),
        privacy=asdict(state_guarantee(fed.config.privacy, n_updates, n_features=features.n_asked)),
        server={"peak_memory_bytes": peak, "features_bytes": features.n_bytes, "adapters_bytes": adapters},
        confidence=fed.config.evaluation.confidence,
    )


def _without_others(fed: Federation, trainings: Sequence[str]) -> Traffic:
    """What was sent for the present config; what a larger one sent stays on disk, for when it is asked for again."""
    known = {"features", "validate", "evaluate", *trainings}
    return Traffic({name: record for name, record in fed.exchange.traffic.stages.items() if name in known})


def _count_costs(
    fed: Federation, made: Made, served: Served, tuned: Mapping[str, tuple[FloatArray, int]], n_weighed: int
) -> dict[str, MethodCost]:
    """What each method takes; features and the choice of groups are charged to every partition."""
    work, size, n = fed.work, fed.template.start.nbytes, fed.n_clients

    def sent(*stages: str) -> float:
        return add_traffic(fed.exchange.traffic, stages, n)

    costs = {"base": MethodCost(0, 0, 0.0)} if fed.has("base") else {}
    for name in ("global", "random"):
        if name in made.trained:
            n_bytes = len(made.trained[name].vectors) * size
            costs[name] = MethodCost(work.flops_of(name), n_bytes, sent(name))
    for one in made.list_served(fed.config.boosting.n_rounds):
        costs[one.name] = _count_partition(fed, made, one)
    for name, (_, flops) in tuned.items():
        before = costs["global"] if name == "mtl-ft" else MethodCost(0, 0, 0.0)
        costs[name] = MethodCost(before.flops + flops, n * size, before.bytes_per_client + sent(name))
    costs["ours"] = ours = costs[served.name]
    if n_weighed:
        shared = costs.get("global", MethodCost(0, 0, 0.0))
        costs["weighted"] = MethodCost(
            ours.flops + shared.flops,
            ours.adapter_bytes + shared.adapter_bytes,
            ours.bytes_per_client + shared.bytes_per_client,
            ours.passes + n_weighed - 1,
        )
    return costs


def _count_partition(fed: Federation, made: Made, one: Served) -> MethodCost:
    work, m = fed.work, one.found.n_groups
    boosters, name = made.boosters[m], name_partition(m)
    stages = ("features", name, *([f"boost-{m}"] if one.n_boosters else []))
    passes = [_count_passes(made.of(client, one.found, one.n_boosters)) for client in range(fed.n_clients)]
    return MethodCost(
        flops=work.flops_of("features", "plan", name) + boosters.count_flops(one.n_boosters),
        adapter_bytes=(len(one.found.groups) + min(one.n_boosters, len(boosters.kept))) * fed.template.start.nbytes,
        bytes_per_client=add_traffic(fed.exchange.traffic, stages, fed.n_clients),
        passes=float(np.mean(passes)),
    )


def _count_passes(terms: Sum) -> int:
    """Adapters of a sum, theta0 once."""
    vectors = [vector for vector, _ in terms]
    return sum(vector is not None for vector in vectors) + any(vector is None for vector in vectors)


def _count_updates(made: Made, n_clients: int) -> int:
    """How many changed adapters the client sent that sent most."""
    total = np.zeros(n_clients, np.int64)
    for trained in made.trained.values():
        total += trained.n_updates
    for found in made.plan.found:
        for one in made.boosters[found.n_groups].rounds:
            total[list(found.groups[one.group])] += one.n_updates
    return int(total.max())
