"""The stages of a federation that learn: what each asks of clients, and what it leaves in the run folder.

A stage whose inputs are the same and whose files are intact is passed over; one that was broken off goes on at its last
round or lot of clients. Test rows enter none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensemblelora import __version__, artifacts
from ensemblelora.config_federation import Baseline, FederationConfig
from ensemblelora.federation.adapters import Template, Vector
from ensemblelora.federation.boosters import Boosters, boost_groups
from ensemblelora.federation.collection import ClientFeatures, collect_features, find_known, load_features
from ensemblelora.federation.exchange import Exchange, Registered
from ensemblelora.federation.keeping import load_trained, save_trained
from ensemblelora.federation.partition import FoundGroups, GroupPlan, choose_groups, read_plan
from ensemblelora.federation.results import name_partition
from ensemblelora.federation.rounds import Plan, Trained, train_groups
from ensemblelora.progress import note
from ensemblelora.workspace import OpenRun, StageRun

__all__ = ["WEIGHTS_FILE", "Federation", "boost", "choose_partitions", "take_features", "train"]

WEIGHTS_FILE = "group_weights.npz"
"""what a new client is assigned by: each group's fitted weights, and the losses predicted for known clients there"""

_TRAINED, _SCRATCH = "trained", "rounds"
Groups = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Federation:
    """One federation at work.

    Attributes:
        config: Everything about it.
        work: The open run folder.
        exchange: Reaches the clients.
        template: Of adapters.
    """

    config: FederationConfig
    work: OpenRun
    exchange: Exchange
    template: Template

    @property
    def n_clients(self) -> int:
        """How many take part."""
        return len(self.exchange.clients)

    @property
    def identity(self) -> str:
        """Of theta0, the clients and what they send: what every later stage depends on."""
        clients = [asdict(client) for client in self.exchange.clients]
        config = self.config
        return artifacts.fingerprint(__version__, self.template.identity, clients, config.features, config.privacy)

    def has(self, baseline: Baseline) -> bool:
        """Whether a baseline is asked for."""
        return baseline in self.config.evaluation.baselines

    def of(self, clients: tuple[Registered, ...]) -> Federation:
        """The same federation with some of the clients, in their order."""
        return replace(self, exchange=replace(self.exchange, clients=clients))

    def scratch(self, name: str) -> Path:
        """Where a stage keeps what it goes on from."""
        return self.work.path / _SCRATCH / name

    def begin(self, stage: StageRun, identity: str) -> None:
        """Forget what was sent for a stage that begins anew."""
        self.exchange.traffic.begin(stage.name, identity)


def take_features(fed: Federation) -> ClientFeatures:
    """Have every client's gradients at the base model, as rows or moments. Leaves ``features/``."""
    config, folder = fed.config, fed.work.path / artifacts.FEATURES_FOLDER
    present = {client.name: client for client in fed.exchange.clients}
    known = find_known(folder)
    changed = [client.name for client in known if present.get(client.name, client) != client]
    if changed:
        note(f"{len(changed)} clients have other rows than before, such as {changed[0]!r}: features are taken again")
    cut = config.clients.model_copy(update={"source": ""})  # texts that were moved are the same ones
    inputs = (fed.template.identity, cut, config.features, config.privacy)
    with fed.work.stage("features", *inputs, is_complete=bool(known) and not changed) as stage:
        if stage.is_needed:
            identity = artifacts.fingerprint(__version__, *inputs, [asdict(client) for client in present.values()])
            fed.begin(stage, identity)
            collect_features(fed.exchange, config, folder, identity=identity, meter=stage.meter)
            stage.files.append(folder)
    features = load_features(folder, config)
    new = sorted(set(present) - {client.name for client in features.clients})
    if new and known:
        note(f"{len(new)} clients came later, such as {new[0]!r}: they can be assigned to a group, see `assign`")
    return features


def choose_partitions(fed: Federation, features: ClientFeatures) -> GroupPlan:
    """Choose groups for every number of them.

    Leaves ``plan.json``, ``affinity.npz`` and what new clients are assigned by.
    """
    config, path = fed.config, fed.work.path / artifacts.PLAN_FILE
    simulated = config.training if config.groups.method == "steps" else None
    asked = (config.groups, simulated, config.seed)
    wanted = (*asked, "random" in config.evaluation.baselines, config.evaluation.random_groups)
    with fed.work.stage("plan", fed.identity, *wanted) as stage:
        if stage.is_needed:
            plan, matrix, oracle = choose_groups(features, config, n_coordinates=fed.template.n_coordinates)
            arrays: dict[str, npt.NDArray[np.float64]] = {}
            for found in plan.found:
                name = name_partition(found.n_groups)
                arrays[f"weights {name}"] = oracle.weights(found.groups)
                arrays[f"predicted {name}"] = oracle.at(arrays[f"weights {name}"])
            artifacts.save_arrays(fed.work.path / artifacts.AFFINITY_FILE, {"matrix": matrix})
            artifacts.save_arrays(fed.work.path / WEIGHTS_FILE, arrays)
            artifacts.write_json(path, asdict(plan))
            stage.meter.add_flops(oracle.count_flops())
            stage.files += [path, fed.work.path / artifacts.AFFINITY_FILE, fed.work.path / WEIGHTS_FILE]
    return read_plan(artifacts.read_json(path))


def train(fed: Federation, name: str, groups: Groups) -> Trained:
    """Train an adapter for each group by federated averaging. Leaves ``trained/NAME.npz``."""
    config, path = fed.config, fed.work.path / _TRAINED / f"{name}.npz"
    identity = artifacts.fingerprint(fed.identity, groups, config.training, config.seed)
    with fed.work.stage(name, identity) as stage:
        if stage.is_needed:
            checkpoint = fed.scratch(f"{name}.npz")
            fed.begin(stage, identity)
            starts: list[Vector] = [fed.template.start] * len(groups)
            found = train_groups(
                fed.exchange,
                Plan(name, groups, starts, config.training.num_train_epochs),
                fed.template,
                config,
                checkpoint=checkpoint,
                identity=identity,
                stage=name,
                meter=stage.meter,
            )
            save_trained(path, found)
            stage.files.append(path)
            checkpoint.unlink(missing_ok=True)
    return load_trained(path)


def boost(fed: Federation, found: FoundGroups, trained: Mapping[str, Trained]) -> Boosters:
    """Add boosters to one partition. Leaves ``rounds/boost-M-T.npz``, from which they are read back."""
    config, own = fed.config, trained[name_partition(found.n_groups)]
    name, n_rounds = f"boost-{found.n_groups}", max(fed.config.boosting.n_rounds, default=0)
    if not n_rounds:
        return Boosters((), np.zeros((0, fed.template.size), np.float32), config.boosting.boosting_rate)
    settings = config.boosting.model_copy(update={"n_rounds": ()})  # more rounds go on from fewer
    identity = artifacts.fingerprint(fed.identity, found.groups, config.training, settings, config.seed, own.vectors)
    folder = fed.work.path / _SCRATCH
    with fed.work.stage(name, identity, n_rounds) as stage:
        if stage.is_needed:
            fed.begin(stage, identity)
        # Where the stage was done before, every round is read back and nobody is asked.
        made = boost_groups(
            fed.exchange,
            name,
            found.groups,
            own,
            fed.template,
            config,
            n_rounds=n_rounds,
            folder=folder,
            identity=identity,
            meter=stage.meter,
        )
        if stage.is_needed:
            stage.files += [folder / f"{name}-{t + 1}.npz" for t in range(len(made.rounds))]
    return made
