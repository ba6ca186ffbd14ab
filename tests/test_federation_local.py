"""What a client computes, against the plain model one adapter and one row at a time; and what it lets go of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemblelora.accounting.meter import Meter
from ensemblelora.config import AdapterConfig
from ensemblelora.errors import DataError, ModelError
from ensemblelora.federation import answers
from ensemblelora.federation import worker as worker_module
from ensemblelora.federation.adapters import Vector
from ensemblelora.federation.answers import answer
from ensemblelora.federation.clients import load_clients
from ensemblelora.federation.gradients import compute_rows, sum_rows
from ensemblelora.federation.local import Leaning, TokenScores, score_sums, train_locally
from ensemblelora.federation.protocol import PARTS, Part, Reply, Request, Term
from ensemblelora.federation.worker import Worker, open_worker
from tests.federation_tiny import make_config, make_worker, shared_worker

SUMS: tuple[tuple[Term, ...], ...] = (
    ((0, 1.0),),
    ((1, 1.0),),
    ((1, 1.0), (2, 0.5), (0, -0.5)),
)


def move(worker: Worker, seed: int, size: float = 0.2) -> Vector:
    """An adapter away from theta0."""
    noise = np.random.default_rng(seed).normal(size=worker.template.size)
    return (worker.template.start + size * noise).astype(np.float32)


def compute_logits(worker: Worker, vector: Vector, tokens: np.ndarray) -> torch.Tensor:
    worker.load(vector)
    return worker.adapted.peft(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float()


def list_rows(worker: Worker, client: int, part: Part) -> list[tuple[np.ndarray, int]]:
    """Each row's tokens, and where its answer begins."""
    split = worker.rows.splits[part]
    return [
        (split.tokens[split.row_starts[r] : split.row_starts[r + 1]], int(split.answer_starts[r]))
        for r in worker.rows.find(client, part)
    ]


def measure(logits: torch.Tensor, tokens: np.ndarray, start: int) -> torch.Tensor:
    """Mean loss of a row's next tokens."""
    targets = torch.from_numpy(tokens[start:].astype(np.int64))
    return torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets)


def score_plainly(worker: Worker, client: int, part: Part, members: np.ndarray, terms: Sequence[Term]) -> list[float]:
    """Loss of each row under a sum of logits."""
    losses = []
    vectors = [worker.template.start, *members]
    for tokens, start in list_rows(worker, client, part):
        with torch.no_grad():
            total = sum(share * compute_logits(worker, vectors[member], tokens) for member, share in terms)
        losses.append(float(measure(total, tokens, start)))
    return losses


@pytest.mark.parametrize("part", PARTS)
def test_sums_of_hidden_states_are_sums_of_logits(part: Part) -> None:
    worker = shared_worker()
    members = np.stack([move(worker, 1), move(worker, 2)])
    found = score_sums(worker, 1, part, members, SUMS, meter=Meter("m"))
    slow = [np.mean(score_plainly(worker, 1, part, members, terms)) for terms in SUMS]
    assert found.losses() == pytest.approx(slow, abs=1e-4)
    assert len(set(np.round(slow, 4))) == 3
    alone = score_sums(worker, 1, part, members[:1], SUMS[1:2], meter=Meter("m"))
    assert alone.values[0] == pytest.approx(found.values[1], abs=1e-6)


def test_a_loss_is_the_mean_over_rows_of_each_ones_mean() -> None:
    scores = TokenScores(np.array([[-1.0, -3.0, -5.0], [0.0, 0.0, -1.0]]), np.array([0, 0, 1]))
    assert scores.losses().tolist() == [3.5, 0.5]


def step_by_hand(
    worker: Worker, client: int, start: Vector, rate: float, leaning: Leaning | None
) -> tuple[Vector, float]:
    """One step of AdamW on all of a client's rows, every row by itself in the plain model."""
    fixed = []
    for tokens, _ in list_rows(worker, client, "train"):
        if leaning is not None:
            vectors = [worker.template.start, *leaning.members]
            with torch.no_grad():
                own = sum(share * compute_logits(worker, vectors[member], tokens) for member, share in leaning.terms)
                fixed.append(own - leaning.rate * compute_logits(worker, worker.template.start, tokens))
    worker.load(start)
    parameters = list(worker.tensors.values())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for k, (tokens, begin) in enumerate(list_rows(worker, client, "train")):
        logits = worker.adapted.peft(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float()
        losses.append(measure(logits if leaning is None else fixed[k] + leaning.rate * logits, tokens, begin))
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, worker.config.training.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return worker.read(), float(loss.detach())


@pytest.mark.parametrize("boosts", [False, True])
def test_a_step_is_that_of_the_plain_model(tmp_path: Path, boosts: bool) -> None:
    worker = make_worker(tmp_path, training={"max_examples_per_batch": 64})
    members = np.stack([move(worker, 3), move(worker, 4)])
    leaning = Leaning(members, ((1, 1.0), (2, 0.5), (0, -0.5)), 0.5) if boosts else None
    start = move(worker, 5)
    found = train_locally(worker, 2, start, name="a", rates=[0.01], meter=Meter("m"), leaning=leaning)
    slow, loss = step_by_hand(worker, 2, start, 0.01, leaning)
    # AdamW's first step is the rate times a sign, so that numbers whose gradient is nearly zero may go either way.
    assert np.isclose(found.vector, slow, atol=1e-4).mean() > 0.99
    assert found.loss == pytest.approx(loss, abs=1e-4)
    assert found.n_rows == len(worker.rows.find(2, "train")) and np.abs(found.vector - start).max() > 1e-3


def test_training_lowers_the_loss_and_tells_what_it_was() -> None:
    worker = shared_worker()
    start = worker.template.start

    def measure_train(vector: Vector) -> float:
        return float(score_sums(worker, 0, "train", vector[None], [((1, 1.0),)], meter=Meter("m")).losses()[0])

    found = train_locally(worker, 0, start, name="a", rates=[0.02] * 20, meter=Meter("m"))
    assert measure_train(found.vector) < measure_train(start) - 0.1
    still = train_locally(worker, 0, start, name="a", rates=[0.0], meter=Meter("m"))
    np.testing.assert_array_equal(still.vector, start)
    assert still.loss == pytest.approx(measure_train(start), abs=1e-4)


def test_a_clients_training_depends_on_nothing_but_itself(tmp_path: Path) -> None:
    config = make_config(tmp_path, training={"max_examples_per_batch": 2}, adapter={"r": 2, "lora_dropout": 0.2})
    clients = load_clients(config.clients, seed=config.seed)
    all_of_them, alone = open_worker(config, clients), open_worker(config, clients[3:4])

    def train(worker: Worker, client: int, name: str = "a") -> Vector:
        return train_locally(
            worker, client, worker.template.start, name=name, rates=[0.02] * 2, meter=Meter("m")
        ).vector

    first = train(all_of_them, 3)
    train(all_of_them, 1)
    np.testing.assert_array_equal(train(all_of_them, 3), first)
    np.testing.assert_allclose(train(alone, 0), first, atol=1e-6)
    assert np.abs(train(all_of_them, 3, "b") - first).max() > 1e-3, "another order of rows in another round"


def test_features_are_the_same_whoever_else_there_is_and_whatever_was_trained(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    clients = load_clients(config.clients, seed=config.seed)
    worker, alone = open_worker(config, clients), open_worker(config, clients[4:5])
    before = compute_rows(worker, 4, "train", meter=Meter("m"))
    train_locally(worker, 1, move(worker, 1), name="a", rates=[0.1], meter=Meter("m"))
    np.testing.assert_allclose(compute_rows(worker, 4, "train", meter=Meter("m")), before, atol=1e-6)
    np.testing.assert_allclose(compute_rows(alone, 0, "train", meter=Meter("m")), before, atol=1e-5)


def test_an_outputs_loss_is_the_rows_own() -> None:
    worker = shared_worker()
    rows = compute_rows(worker, 1, "train", meter=Meter("m"))
    slow = score_plainly(worker, 1, "train", np.zeros((0, worker.template.size)), ((0, 1.0),))
    assert np.logaddexp(0.0, -rows[:, 0]) == pytest.approx(slow, abs=1e-4)
    assert (np.abs(rows[:, 1:]).sum(axis=1) > 0).all()


def ask(worker: Worker, client: int, action: Any, **parts: Any) -> Reply:
    return answer(worker, client, Request(action, "", **parts))


def test_moments_that_are_sent_are_those_of_the_rows(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, features={"send": "moments"}, privacy={"clip_norm": 0.5})
    reply = ask(worker, 1, "features")
    for part in ("train", "validation"):
        rows = compute_rows(worker, 1, part, meter=Meter("m"))
        assert reply.arrays[part] == pytest.approx(sum_rows(rows, 0.5), rel=1e-5)
    assert set(reply.arrays) == {"train", "validation"}, "test rows enter no feature"
    assert reply.values["flops"] > 0 and reply.values["n_tokens"] > 0


def test_rows_are_cut_and_noisy_and_the_noise_is_not_the_seeds(tmp_path: Path) -> None:
    config = make_config(tmp_path, privacy={"clip_norm": 0.5, "noise_multiplier": 3.0})
    clients = load_clients(config.clients, seed=config.seed)
    one, other = open_worker(config, clients), open_worker(config, clients)
    first, second = (ask(worker, 0, "features").arrays["train"] for worker in (one, other))
    assert not np.allclose(first, second)
    plain = ask(make_worker(tmp_path, privacy={"clip_norm": 0.5}), 0, "features").arrays["train"]
    assert np.linalg.norm(plain, axis=1).max() <= 0.5 * (1 + 1e-6)
    noisy = ask(replace(one, noise=np.random.default_rng(0)), 0, "features").arrays["train"]
    assert (noisy - plain).std() == pytest.approx(3.0 * 2 * 0.5, rel=0.2)


@pytest.mark.parametrize("trains_a", [True, False])
def test_an_updates_change_is_cut_and_noise_reaches_what_is_trained_alone(tmp_path: Path, trains_a: bool) -> None:
    adapter = {"r": 2, "train_A": trains_a}
    privacy = {"update_clip_norm": 0.01}
    worker = make_worker(tmp_path, adapter=adapter, privacy=privacy)
    start = worker.template.start
    request = {"arrays": {"start": start}, "values": {"name": "a 0", "learning_rate": 0.1}}
    cut = ask(worker, 0, "train", **request).arrays["adapter"] - start
    assert np.linalg.norm(cut) == pytest.approx(0.01, rel=1e-4)
    noisy = make_worker(tmp_path, adapter=adapter, privacy={**privacy, "update_noise_multiplier": 5.0})
    noisy = replace(noisy, noise=np.random.default_rng(0))
    change = ask(noisy, 0, "train", **request).arrays["adapter"] - start
    assert (change != 0).tolist() == noisy.is_trained.tolist()
    assert noisy.is_trained.all() == trains_a and noisy.is_trained.any()
    assert change[noisy.is_trained].std() == pytest.approx(5.0 * 2 * 0.01, rel=0.15)


def test_a_client_that_trains_alone_sends_losses_and_keeps_its_adapter(tmp_path: Path) -> None:
    worker = shared_worker()
    start = move(worker, 7)
    reply = ask(worker, 2, "tune", arrays={"start": start}, values={"passes": 2, "name": "alone"})
    assert {name: array.shape for name, array in reply.arrays.items()} == {"validation": (1,), "test": (1,)}
    rate = worker.config.training.learning_rate
    own = train_locally(worker, 2, start, name="alone", rates=[rate, rate / 2], meter=Meter("m"))
    for part in ("validation", "test"):
        slow = np.mean(score_plainly(worker, 2, part, own.vector[None], ((1, 1.0),)))
        assert reply.arrays[part][0] == pytest.approx(slow, abs=1e-4)
    assert 0 < reply.values["train_flops"] < reply.values["flops"]


def test_weights_are_fitted_on_validation_rows_and_mix_probabilities() -> None:
    worker = shared_worker()
    members = np.stack([move(worker, 1), move(worker, 2)])
    values = {
        "methods": [[[1, 1.0]], [[2, 1.0]], [[0, 1.0]]],
        "parts": {"validation": [0, 1], "test": [2, 0, 1]},
        "weigh": [0, 1],
    }
    reply = ask(worker, 3, "score", arrays={"members": members}, values=values)
    weights = reply.arrays["weights"]
    assert weights.sum() == pytest.approx(1.0) and (weights >= 0).all()
    for part, n_plain in (("validation", 2), ("test", 3)):
        assert reply.arrays[part].shape == (n_plain + 1,)
        scores = score_sums(worker, 3, part, members, (SUMS[1], ((2, 1.0),)), meter=Meter("m"))
        mixed = np.log(weights @ np.exp(scores.values))
        expected = TokenScores(mixed[None], scores.row_of).losses()[0]
        assert reply.arrays[part][-1] == pytest.approx(expected, abs=1e-6)
    best = min(reply.arrays["validation"][:2])
    assert reply.arrays["validation"][-1] < best + 0.05


def test_hello_says_how_many_and_which_start() -> None:
    worker = shared_worker()
    values = ask(worker, 5, "hello").values
    assert values["client"] == "client5" and values["start"] == worker.template.identity
    assert {part: values[f"n_{part}"] for part in PARTS} == worker.rows.count(5)
    assert values["n_test_tokens"] == worker.rows.list_answers(5, "test").sum()


def test_a_fault_with_a_name_is_answered_and_any_other_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = shared_worker()

    def fail(error: Exception) -> None:
        def raise_it(*arguments: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(answers, "compute_rows", raise_it)

    fail(DataError("no rows any more"))
    reply = ask(worker, 0, "features")
    assert reply.values == {"error": "no rows any more"} and not reply.arrays
    fail(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        ask(worker, 0, "features")


def test_activations_below_the_adapter_are_kept_and_change_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    clients = load_clients(config.clients, seed=config.seed)
    plain, cached = open_worker(config, clients), open_worker(config, clients, cache=tmp_path / "cache")
    start, meters = plain.template.start, [Meter("m") for _ in range(4)]
    for _ in range(2):
        one, other = (
            train_locally(worker, 1, start, name="a", rates=[0.02], meter=meters[2 * (worker is cached)])
            for worker in (plain, cached)
        )
        np.testing.assert_allclose(other.vector, one.vector, atol=1e-6)
    assert any((tmp_path / "cache").iterdir())
    train_locally(plain, 1, start, name="a", rates=[0.02], meter=meters[1])
    train_locally(cached, 1, start, name="a", rates=[0.02], meter=meters[3])
    assert meters[3].record.flops < meters[1].record.flops, "the lower block is not run again"


@pytest.mark.parametrize("method", ["dora", "ia3", "bottleneck"])
def test_other_kinds_of_adapters_travel_whole(tmp_path: Path, method: str) -> None:
    adapter = {"method": method, "layers_to_transform": [1], **({"reduction": 8} if method == "bottleneck" else {})}
    for key in ("r", "lora_alpha"):
        adapter[key] = 2 if method == "dora" else AdapterConfig.model_fields[key].default
    worker = make_worker(tmp_path, adapter=adapter, training={"aggregation": "factors"})
    start = worker.template.start
    found = train_locally(worker, 0, start, name="a", rates=[0.02], meter=Meter("m"))
    for name, tensor in worker.template.unpack(found.vector - start).items():
        # theta0's second factor is zero, so that the first has no gradient in the first step.
        if not name.endswith(("lora_A.weight", "down.weight", "down.bias")):
            assert tensor.any(), name
    slow = [score_plainly(worker, 0, "test", found.vector[None], ((k, 1.0),)) for k in (0, 1)]
    scores = score_sums(worker, 0, "test", found.vector[None], SUMS[:2], meter=Meter("m"))
    assert scores.losses() == pytest.approx(np.mean(slow, axis=1), abs=1e-4)


def test_what_is_saved_otherwise_than_it_is_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = worker_module.get_peft_model_state_dict

    def copy(*given: Any, **more: Any) -> dict[str, torch.Tensor]:
        return {key: tensor.clone() for key, tensor in saved(*given, **more).items()}

    monkeypatch.setattr(worker_module, "get_peft_model_state_dict", copy)
    with pytest.raises(ModelError, match=r"adapter\.method lora: .* is saved otherwise than it is trained"):
        make_worker(tmp_path)
