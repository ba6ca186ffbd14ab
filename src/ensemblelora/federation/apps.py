"""Flower's ServerApp and ClientApp: what a SuperLink and its SuperNodes, or the simulation, load by name.

A SuperNode answers for one client, which its node config names: ``client-file="/data/alice.txt"``, or
``partition-id=3`` for the fourth client of the recipe's ``clients.source``; ``cache="/var/cache/alice"`` keeps what
need not be computed twice, and ``device="cuda"`` and ``model="/models/base"`` replace the recipe's. In the simulation
one process answers for all clients in turn. Needs the extra ``federated``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import ConfigError, EnsembleLoraError
from ensemblelora.federation.adapters import open_model
from ensemblelora.federation.answers import answer
from ensemblelora.federation.clients import ClientText, load_clients, read_client
from ensemblelora.federation.keeping import keep_fault
from ensemblelora.federation.protocol import Action
from ensemblelora.federation.server import federate, make_order
from ensemblelora.federation.transport import MESSAGE_TYPES, GridCohort, read_request, to_record
from ensemblelora.federation.worker import Worker, open_worker

__all__ = ["CACHE_FOLDER", "client_app", "server_app"]

CACHE_FOLDER = "cache"

NodeConfig = tuple[tuple[str, object], ...]


def answer_message(action: Action, message: Message, context: Context) -> Message:
    """Answer one message for the client that the node's config names."""
    request = read_request(message.content, action)
    worker, client = _find_worker(request.order, context.node_config)
    return Message(to_record(answer(worker, client, request)), reply_to=message)


def serve(grid: Grid, context: Context) -> None:
    """Carry out the federation whose config, as JSON, is the run's ``federation``."""
    text = str(context.run_config.get("federation", ""))
    if not text:
        raise ConfigError("the run has no key `federation`; start it with `ensemblelora federate CONFIG`")
    config = FederationConfig.model_validate_json(text)
    cohort = GridCohort(
        grid,
        make_order(config),
        n_expected=config.engine.min_clients,
        wait_seconds=config.engine.wait_seconds,
        reply_seconds=config.training.reply_seconds,
    )
    try:
        federate(config, cohort, open_model(config))
    except EnsembleLoraError as error:
        if Path(config.out).is_dir():
            keep_fault(Path(config.out), error)
        raise


def _find_worker(order: str, node_config: Mapping[str, object]) -> tuple[Worker, int]:
    """The process's worker for an order, and which of its clients the node is."""
    config = FederationConfig.model_validate(json.loads(order))
    if config.engine.kind == "simulation":
        return _open_for_all(order), int(str(node_config["partition-id"]))
    return _open_for_one(order, tuple(sorted(node_config.items()))), 0


@cache
def _open_for_all(order: str) -> Worker:
    config = FederationConfig.model_validate(json.loads(order))
    return open_worker(config, load_clients(config.clients, seed=config.seed), cache=Path(config.out) / CACHE_FOLDER)


@cache
def _open_for_one(order: str, node_config: NodeConfig) -> Worker:
    """The worker of a node with a client of its own."""
    own = dict(node_config)
    values = json.loads(order)
    for key in ("device", "model"):
        if key in own:
            values["model"]["name" if key == "model" else key] = own[key]
    config = FederationConfig.model_validate(values)
    folder = None if "cache" not in own else Path(str(own["cache"]))
    return open_worker(config, [_find_client(config, own)], cache=folder)


def _find_client(config: FederationConfig, node_config: Mapping[str, object]) -> ClientText:
    if "client-file" in node_config:
        return read_client(Path(str(node_config["client-file"])).expanduser(), config.clients.text_column)
    if "partition-id" in node_config:
        return load_clients(config.clients, seed=config.seed)[int(str(node_config["partition-id"]))]
    raise ConfigError("the SuperNode names no client; start it with --node-config 'client-file=\"/path/to/its.txt\"'")


client_app = ClientApp()
for _action, _type in MESSAGE_TYPES.items():
    _category, _, _name = _type.partition(".")
    getattr(client_app, _category)(_name)(partial(answer_message, _action))

server_app = ServerApp()
server_app.main()(serve)
