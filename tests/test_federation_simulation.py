"""Predicted losses of federated averaging against those of groups that were truly trained, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pytest
import torch

from ensemblelora import __version__
from ensemblelora.accounting.meter import Meter
from ensemblelora.config_federation import FederationConfig
from ensemblelora.federation.collection import ClientFeatures
from ensemblelora.federation.engines import ProcessCohort
from ensemblelora.federation.exchange import Exchange, register
from ensemblelora.federation.gradients import compute_rows, sum_rows
from ensemblelora.federation.local import score_sums
from ensemblelora.federation.partition import make_oracle
from ensemblelora.federation.rounds import Plan, train_groups
from ensemblelora.federation.worker import Worker
from tests.federation_tiny import DIALECTS, make_config, make_worker

Groups = Sequence[tuple[int, ...]]
ALIKE = ((0, 2, 4), (1, 3, 5))
MIXED = ((0, 1, 4), (2, 3, 5))
WIDE = {"moments": 400, "rows": 4000}  # as near as projections come: a root of 1 / d


class OneMoment:
    """AdamW with one second moment for all numbers: the geometry that projected coordinates can follow."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        self._parameters, self.param_groups = list(parameters), [{"lr": lr}]
        self._momentum = [torch.zeros_like(p) for p in self._parameters]
        self._moment, self._done = 0.0, 0
        assert weight_decay == 0

    def zero_grad(self, *, set_to_none: bool) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._done += 1
        square = torch.cat([g.reshape(-1) for g in gradients]).square().mean().item()
        self._moment = 0.999 * self._moment + 0.001 * square
        root = (self._moment / (1 - 0.999**self._done)) ** 0.5 + 1e-8
        for parameter, momentum, gradient in zip(self._parameters, self._momentum, gradients, strict=True):
            momentum.mul_(0.9).add_(gradient, alpha=0.1)
            parameter -= self.param_groups[0]["lr"] * momentum / (1 - 0.9**self._done) / root


@dataclass(frozen=True, eq=False)
class Bench:
    """A worker, its clients' rows of features, and the base model's validation losses."""

    worker: Worker
    rows: dict[str, list[np.ndarray]]
    base: np.ndarray


def make_bench(folder: Path, **adapter: Any) -> Bench:
    """Bench of the clients whose texts are in the folder."""
    worker = make_worker(folder, adapter=adapter, features={"proj_dim": WIDE["rows"]})
    rows = {
        part: [compute_rows(worker, client, part, meter=Meter("m")) for client in range(6)]
        for part in ("train", "validation")
    }
    return Bench(worker, rows, measure(worker, worker.template.start[None])[0])


def measure(worker: Worker, vectors: np.ndarray) -> np.ndarray:
    """Validation loss of every client under every adapter, ``(k, n)``."""
    sums = [((k + 1, 1.0),) for k in range(len(vectors))]
    found = [score_sums(worker, c, "validation", vectors, sums, meter=Meter("m")).losses() for c in range(6)]
    return np.array(found).T


def compare(
    bench: Bench, groups: Groups, *, send: Literal["rows", "moments"] = "rows", **training: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Measured and predicted gains over the base model of every client in every group, ``(k, n)`` in nats a token."""
    values, d = bench.worker.config.model_dump(), WIDE[send]
    values["training"] |= {"participation": 1.0, "max_examples_per_batch": 8, **training}
    values["features"] |= {"send": send, "proj_dim": d}
    config = FederationConfig.model_validate(values)
    worker = replace(bench.worker, config=config)
    features = send_features(bench, send, d)
    oracle = make_oracle(features, config, groups, n_coordinates=worker.template.n_coordinates)
    before = oracle.at(np.zeros((1, d)))[0]
    assert before == pytest.approx(bench.base, abs=1e-5), "nats a token, as measured"
    return bench.base - measure(worker, train(worker, groups)), before - oracle.at(oracle.weights(groups))


def send_features(bench: Bench, send: Literal["rows", "moments"], d: int) -> ClientFeatures:
    """What clients send, at a width of d."""
    scale = np.r_[1.0, np.full(d, (WIDE["rows"] / d) ** 0.5)]
    values: dict[Any, np.ndarray] = {}
    for part, own in bench.rows.items():
        narrow = [(rows[:, : 1 + d] * scale).astype(np.float32) for rows in own]
        sent = narrow if send == "rows" else [sum_rows(rows, None)[None] for rows in narrow]
        values[part] = np.concatenate(sent, dtype=np.float32)
    clients = register(ProcessCohort(bench.worker, ""), start=bench.worker.template.identity, version=__version__)
    return ClientFeatures(clients, send, values)


def train(worker: Worker, groups: Groups) -> np.ndarray:
    """Adapters of groups, trained by federated averaging, ``(k, p)``."""
    cohort = ProcessCohort(worker, "")
    clients = register(cohort, start=worker.template.identity, version=__version__)
    with TemporaryDirectory() as scratch:
        return train_groups(
            Exchange(cohort, clients, "", 1e3),
            Plan("x", groups, [worker.template.start] * len(groups), worker.config.training.num_train_epochs),
            worker.template,
            worker.config,
            checkpoint=Path(scratch) / "rounds.npz",
            identity="x",
            stage="x",
            meter=Meter("m"),
        ).vectors


@pytest.fixture(scope="module")
def open_bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Bench]:
    """Two dialects, A trained or not."""
    folder = tmp_path_factory.mktemp("simulation")
    return cache(lambda trains_a: make_bench(folder / str(trains_a), train_A=trains_a))


@pytest.mark.parametrize("send", ["rows", "moments"])
@pytest.mark.parametrize(("n_rounds", "passes"), [(1, 1), (3, 4)])
def test_short_trainings_end_where_they_are_predicted(
    open_bench: Callable[[bool], Bench],
    n_rounds: int,
    passes: int,
    send: Literal["rows", "moments"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", OneMoment)
    budget = {"learning_rate": 5e-4, "num_train_epochs": n_rounds, "local_passes": passes}
    measured, predicted = (gains[0, [0, 2]] for gains in compare(open_bench(False), ((0, 2),), send=send, **budget))
    assert predicted == pytest.approx(measured, rel=0.1 if send == "rows" else 0.2)
    assert measured.min() > 2e-4 * n_rounds * passes / 2


@pytest.mark.slow
@pytest.mark.parametrize("trains_a", [False, True])
def test_longer_trainings_are_predicted_to_go_farther(open_bench: Callable[[bool], Bench], trains_a: bool) -> None:
    """AdamW itself divides each number by its own moment, which has less in common with the gradient."""
    budgets = [{"num_train_epochs": 1}, {"num_train_epochs": 4}, {"num_train_epochs": 4, "local_passes": 2}]
    found = [compare(open_bench(trains_a), ALIKE, learning_rate=2e-3, **budget) for budget in budgets]
    measured, predicted = ([float(gains[k].mean()) for gains in found] for k in (0, 1))
    assert measured == sorted(measured) and predicted == sorted(predicted)
    for own, other in zip(measured, predicted, strict=True):
        assert 1.0 < other / own < 2.0
    for own, other in found:
        assert np.corrcoef(own.ravel(), other.ravel())[0, 1] > 0.9


@pytest.mark.slow
def test_clients_that_contradict_each_other_are_told_apart(tmp_path: Path) -> None:
    """Half of them write the objects of the others as subjects: the same words, in the opposite order."""
    make_config(tmp_path)
    for client in range(6):
        rng = np.random.default_rng(client)
        pairs = [(rng.choice(DIALECTS[0][:4]), rng.choice(DIALECTS[1][:4])) for _ in range(10)]
        lines = [" sees ".join(pair[:: 1 - 2 * (client % 2)]) for pair in pairs]
        (tmp_path / "texts" / f"client{client}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    bench = make_bench(tmp_path)
    budget = {"learning_rate": 5e-3, "num_train_epochs": 4}
    alike, mixed = (compare(bench, groups, **budget) for groups in (ALIKE, MIXED))
    for own, other in zip(alike, mixed, strict=True):  # measured, then predicted
        assert mean_in_groups(own, ALIKE) > mean_in_groups(other, MIXED)
    cells = [np.concatenate([alike[k].ravel(), mixed[k].ravel()]) for k in (0, 1)]
    assert np.corrcoef(*cells)[0, 1] > 0.8
    away = [np.mean([gains[g, i] for g in (0, 1) for i in range(6) if i not in ALIKE[g]]) for gains in alike]
    assert all(mean_in_groups(gains, ALIKE) > other for gains, other in zip(alike, away, strict=True))


def mean_in_groups(gains: np.ndarray, groups: Groups) -> float:
    """Mean gain of clients in their own groups."""
    return float(np.mean([gains[g, i] for g, group in enumerate(groups) for i in group]))
