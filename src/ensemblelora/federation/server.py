"""The main path of a federation, one line a stage; read :func:`federate` first, it is the method.

In: the config, a cohort that reaches clients, the model with theta0, which is let go of as soon as its shapes are
known. Out: :class:`~.results.Outcome`, and a run folder that a broken-off federation goes on from. The server never
sees a text: features, adapters and losses are all that comes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ensemblelora import __version__, artifacts
from ensemblelora.adapters import AdaptedModel
from ensemblelora.config import dump_config
from ensemblelora.config_federation import FederationConfig
from ensemblelora.federation import judging, stages
from ensemblelora.federation.adapters import make_template
from ensemblelora.federation.conclusion import conclude
from ensemblelora.federation.exchange import Cohort, Exchange, Traffic, register
from ensemblelora.federation.keeping import save_start
from ensemblelora.federation.page import write_page
from ensemblelora.federation.results import Outcome, name_partition
from ensemblelora.federation.stages import Federation
from ensemblelora.workspace import describe_environment, open_run

__all__ = ["TRAFFIC_FILE", "federate", "make_order"]

TRAFFIC_FILE = "traffic.json"
_ORDERED = {"seed", "clients", "model", "adapter", "features", "privacy", "training", "engine"}


def federate(config: FederationConfig, cohort: Cohort, adapted: AdaptedModel) -> Outcome:
    """Carry out a federation, or go on where it was broken off.

    Args:
        config: Everything about it.
        cohort: Reaches the clients.
        adapted: The model with theta0.

    Raises:
        UsageError: If the run folder can't be used, or fewer than two clients can take part.
        EnsembleLoraError: If a stage fails; what was finished is kept.
    """
    template = make_template(config, adapted)
    with open_run(Path(config.out), dump_config(config)) as work:
        _describe(work.path, config, adapted)
        del adapted
        traffic = Traffic.load(work.path / TRAFFIC_FILE)
        clients = register(cohort, start=template.identity, version=__version__)
        exchange = Exchange(cohort, clients, make_order(config), config.training.reply_seconds, traffic)
        fed = Federation(config, work, exchange, template)

        features = stages.take_features(fed)  # projected gradients or moments, section 2.2
        fed = fed.of(features.clients)
        plan = stages.choose_partitions(fed, features)  # subsets, surrogate, relaxation: groups for each number of them
        everyone = (tuple(range(fed.n_clients)),)
        trained = {"global": stages.train(fed, "global", everyone)} if fed.has("global") else {}
        for found in plan.found:
            name = name_partition(found.n_groups)
            trained[name] = stages.train(fed, name, found.groups)  # federated averaging inside each group
        if plan.random:
            trained["random"] = stages.train(fed, "random", plan.random)
        boosters = {
            found.n_groups: stages.boost(fed, found, trained) for found in plan.found
        }  # where a group still errs
        made = judging.Made(plan, trained, boosters)
        served, validation = judging.choose_served(fed, made)  # numbers of groups and boosters
        scored = judging.score_tests(fed, made, served)  # the test rows, for the first time; weights
        tuned = judging.tune_clients_alone(fed, made)  # from the global adapter, and from nothing
        judging.keep_served(fed, made, served)
        outcome = conclude(fed, made, served, validation, scored, tuned, features)
        artifacts.write_json(work.path / artifacts.RESULTS_FILE, asdict(outcome))
        write_page(work.path)
    return outcome


def make_order(config: FederationConfig) -> str:
    """The part of the config that goes with every request, as JSON; of a simulation, the place of its cache, too."""
    keys = _ORDERED | ({"out"} if config.engine.kind == "simulation" else set())
    return json.dumps(config.model_dump(mode="json", include=keys), sort_keys=True)


def _describe(folder: Path, config: FederationConfig, adapted: AdaptedModel) -> None:
    """Write ``environment.json`` and theta0."""
    base, path = adapted.base, folder / artifacts.ENVIRONMENT_FILE
    before: Mapping[str, object] = artifacts.read_json(path) if path.exists() else {}
    model = {
        "name": base.name,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "quantization": config.model.quantization,
        "fingerprint": base.fingerprint,
    }
    artifacts.write_json(
        path, describe_environment(model, str(base.device), config.training.max_tokens_per_batch, before)
    )
    save_start(adapted, folder / artifacts.ADAPTERS_FOLDER / "theta0")
