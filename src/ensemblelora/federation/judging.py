"""The stages of a federation that judge: which partition serves, and how all methods do on test rows.

In: plan, trained adapters, boosters. Out: what serves, and losses by client. Which partition serves is settled by
clients' validation rows; their test rows are scored afterwards, once for each method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.errors import TrainingError
from ensemblelora.federation.adapters import Vector
from ensemblelora.federation.boosters import Boosters
from ensemblelora.federation.keeping import write_adapter
from ensemblelora.federation.partition import FoundGroups, GroupPlan
from ensemblelora.federation.results import name_partition
from ensemblelora.federation.rounds import Trained
from ensemblelora.federation.scores import Method, Scored, Sum, score_methods, tune_clients
from ensemblelora.federation.stages import WEIGHTS_FILE, Federation

__all__ = ["SERVED_FILE", "Made", "Served", "choose_served", "keep_served", "score_tests", "tune_clients_alone"]

FloatArray = npt.NDArray[np.float64]
SERVED_FILE = "served.json"
"""which partition serves, and which adapters each of its groups has"""


@dataclass(frozen=True, eq=False)
class Made:
    """What was trained.

    Attributes:
        plan: The partitions.
        trained: By name: ``global``, ``random``, and every partition's.
        boosters: By number of groups.
    """

    plan: GroupPlan
    trained: Mapping[str, Trained]
    boosters: Mapping[int, Boosters]

    def of(self, client: int, found: FoundGroups, n_boosters: int) -> Sum:
        """The adapters of a client's group in a partition."""
        return self.of_group(find_group(found.groups, client), found, n_boosters)

    def of_group(self, group: int, found: FoundGroups, n_boosters: int) -> Sum:
        """The adapters of a group in a partition."""
        own = self.trained[name_partition(found.n_groups)].vectors[group]
        return self.boosters[found.n_groups].add_to(own, group, n_boosters)

    def list_served(self, n_rounds: Sequence[int]) -> list[Served]:
        """Every number of groups, with no boosters and with each number of them."""
        return [Served(found, n) for found in self.plan.found for n in (0, *sorted(n_rounds))]


@dataclass(frozen=True)
class Served:
    """A partition with so many boosters."""

    found: FoundGroups
    n_boosters: int

    @property
    def name(self) -> str:
        """In tables."""
        return name_partition(self.found.n_groups, self.n_boosters)


def choose_served(fed: Federation, made: Made) -> tuple[Served, dict[str, float]]:
    """Choose numbers of groups and boosters by clients' validation rows; of equals the fewest.

    Returns:
        What serves, and the mean validation loss of every choice.

    Raises:
        TrainingError: If no client sent losses of all of them.
    """
    choices = made.list_served(fed.config.boosting.n_rounds)
    methods = [
        Method(one.name, partial(made.of, found=one.found, n_boosters=one.n_boosters), ("validation",))
        for one in choices
    ]
    identity = _identify(fed, made, [one.name for one in choices])
    with fed.work.stage("validate", identity) as stage:
        keep = fed.scratch("validate.npz")
        if stage.is_needed:
            fed.begin(stage, identity)
        scored = _score(fed, methods, "validate", keep, stage.meter)
        if stage.is_needed:
            stage.files.append(keep)
    losses = scored.losses["validation"]
    answered = np.all([np.isfinite(values) for values in losses.values()], axis=0)
    if not answered.any():
        raise TrainingError("validate: no client sent its validation losses; see traffic.json for what they said")
    means = {name: float(values[answered].mean()) for name, values in losses.items()}
    return min(choices, key=lambda one: (means[one.name], one.found.n_groups, one.n_boosters)), means


def score_tests(fed: Federation, made: Made, served: Served) -> Scored:
    """Score the test rows under every method, for the first time; clients weigh members by their validation rows."""
    methods = [Method("base", _score_base)] if fed.has("base") else []
    whole: dict[str, Sequence[Sequence[int]]] = {"global": [range(fed.n_clients)], "random": made.plan.random}
    for name, groups in whole.items():
        if name in made.trained:
            methods.append(Method(name, partial(_pick, made.trained[name].vectors, groups)))
    methods += [
        Method(one.name, partial(made.of, found=one.found, n_boosters=one.n_boosters))
        for one in made.list_served(fed.config.boosting.n_rounds)
    ]
    n_weighed = min(fed.config.evaluation.n_candidates, len(served.found.groups) + ("global" in made.trained))
    weigh = partial(_list_weighed, fed.work.path, made, served, n_weighed) if n_weighed > 1 else None
    identity = _identify(fed, made, [method.name for method in methods], served.name, n_weighed)
    with fed.work.stage("evaluate", identity) as stage:
        keep = fed.scratch("evaluate.npz")
        if stage.is_needed:
            fed.begin(stage, identity)
        scored = _score(fed, methods, "evaluate", keep, stage.meter, weigh)
        if stage.is_needed:
            stage.files.append(keep)
    return scored


def tune_clients_alone(fed: Federation, made: Made) -> dict[str, tuple[FloatArray, int]]:
    """Let each client train alone, from the global adapter and from theta0: test losses, and FLOPs of training."""
    starts: dict[str, Vector] = {}
    if fed.has("mtl-ft"):
        starts["mtl-ft"] = made.trained["global"].vectors[0]
    if fed.has("local"):
        starts["local"] = fed.template.start
    settings, found = fed.config.training, {}
    for name, start in starts.items():
        identity = artifacts.fingerprint(fed.identity, name, start, settings, fed.config.seed)
        with fed.work.stage(name, identity) as stage:
            keep = fed.scratch(f"{name}.npz")
            if stage.is_needed:
                fed.begin(stage, identity)
            passes = settings.num_train_epochs * settings.local_passes
            found[name] = tune_clients(
                fed.exchange,
                partial(_begin_at, start),
                name=name,
                passes=passes,
                keep=keep,
                identity=identity,
                meter=stage.meter,
            )
            if stage.is_needed:
                stage.files.append(keep)
    return found


def keep_served(fed: Federation, made: Made, served: Served) -> None:
    """Write the adapters that serve as plain PEFT folders, and ``served.json``, which says whose they are."""
    found, boosters = served.found, made.boosters[served.found.n_groups]
    start = fed.work.path / artifacts.ADAPTERS_FOLDER / "theta0"
    own = made.trained[name_partition(found.n_groups)].vectors
    adapters = {f"group-{g}": own[g] for g in range(len(found.groups))}
    members = [[{"adapter": f"group-{g}", "rate": 1.0}] for g in range(len(found.groups))]
    for k, one in enumerate(boosters.kept[: served.n_boosters]):
        adapters[f"booster-{k}"] = boosters.vectors[k]
        members[one.group].append({"adapter": f"booster-{k}", "rate": boosters.rate})
    if "global" in made.trained:
        adapters["global"] = made.trained["global"].vectors[0]
    for name, vector in adapters.items():
        write_adapter(fed.work.folder.adapter(name), vector, fed.template, start)
    names = [client.name for client in fed.exchange.clients]
    groups = [
        {"clients": [names[client] for client in group], "members": own}
        for group, own in zip(found.groups, members, strict=True)
    ]
    artifacts.write_json(fed.work.path / SERVED_FILE, {"partition": name_partition(found.n_groups), "groups": groups})


def find_group(groups: Sequence[Sequence[int]], client: int) -> int:
    """The group that a client is in."""
    return next(g for g, group in enumerate(groups) if client in group)


def _score(
    fed: Federation,
    methods: Sequence[Method],
    stage: str,
    keep: Path,
    meter: Meter,
    weigh: Callable[[int], Sequence[Sum]] | None = None,
) -> Scored:
    return score_methods(
        fed.exchange,
        methods,
        size=fed.template.size,
        stage=stage,
        keep=keep,
        identity=fed.identity,
        meter=meter,
        weigh=weigh,
    )


def _identify(fed: Federation, made: Made, *more: object) -> str:
    """Identity of everything that losses of these adapters depend on."""
    vectors = {name: one.vectors for name, one in made.trained.items()}
    boosters = {str(m): (one.vectors, one.rate, [r.group for r in one.kept]) for m, one in made.boosters.items()}
    return artifacts.fingerprint(fed.identity, vectors, boosters, *more)


def _score_base(client: int) -> Sum:
    return ((None, 1.0),)


def _pick(vectors: npt.NDArray[np.float32], groups: Sequence[Sequence[int]], client: int) -> Sum:
    return ((vectors[find_group(groups, client)], 1.0),)


def _begin_at(start: Vector, client: int) -> Vector:
    return start


def _list_weighed(folder: Path, made: Made, served: Served, n_weighed: int, client: int) -> list[Sum]:
    """What a client weighs: its own group, the global adapter, and the groups with the next least predicted loss."""
    found, n = served.found, served.n_boosters
    own = find_group(found.groups, client)
    sums: list[Sum] = [made.of_group(own, found, n)]
    if "global" in made.trained:
        sums.append(((made.trained["global"].vectors[0], 1.0),))
    predicted = artifacts.load_arrays(folder / WEIGHTS_FILE)[f"predicted {name_partition(found.n_groups)}"][:, client]
    others = [g for g in np.argsort(predicted, kind="stable").tolist() if g != own]
    return [*sums, *(made.of_group(g, found, n) for g in others)][:n_weighed]
