"""Federated averaging in groups, against a plain loop; and clients that go, come back, or send what they should not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblelora.accounting.meter import Meter
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import TrainingError
from ensemblelora.federation.aggregation import aggregate
from ensemblelora.federation.dealing import deal_clients
from ensemblelora.federation.exchange import Exchange, register
from ensemblelora.federation.protocol import Reply, Request
from ensemblelora.federation.rounds import Base, Plan, Trained, train_groups
from tests.federation_tiny import ToyCohort, make_template

NAMES = tuple(f"client{c}" for c in range(7))
ROWS = {name: 3 + c for c, name in enumerate(NAMES)}
GROUPS = ((0, 2, 4, 6), (1, 3, 5))
TEMPLATE = make_template()

Spoil = Callable[[str, Request, Reply], Reply | None]


def make_config(**training: Any) -> FederationConfig:
    values = {"learning_rate": 0.1, "num_train_epochs": 2, "participation": 0.5, **training}
    return FederationConfig.model_validate({"clients": {"source": "x"}, "adapter": {"r": 1}, "training": values})


def answer(name: str, request: Request) -> Reply:
    """What a client of this name does in a round: a step that depends on both, as large as the rate."""
    if request.action == "hello":
        counts = {f"n_{part}{kind}": ROWS[name] for part in ("train", "validation", "test") for kind in ("", "_tokens")}
        return Reply(values={"version": "1", "start": "start", "check": 0, **counts})
    rng = np.random.default_rng([*f"{name} {request.values['name']}".encode()])
    start, rate = request.arrays["start"], request.values["learning_rate"]
    adapter = (start + rate * rng.normal(size=start.size)).astype(np.float32)
    return Reply({"adapter": adapter}, {"n_examples": ROWS[name], "loss": float(rng.random())})


def train(
    folder: Path,
    config: FederationConfig,
    *,
    spoil: Spoil = lambda name, request, reply: reply,
    backwards: bool = False,
    groups: Sequence[Sequence[int]] = GROUPS,
    base: Base | None = None,
    identity: str = "one",
) -> tuple[Trained, ToyCohort, Exchange]:
    cohort = ToyCohort(answer, NAMES, spoil=spoil, backwards=backwards)
    exchange = Exchange(cohort, register(cohort, start="start", version="1"), "{}", 1.0)
    plan = Plan("toy", groups, [TEMPLATE.start] * len(groups), config.training.num_train_epochs, base)
    found = train_groups(
        exchange,
        plan,
        TEMPLATE,
        config,
        checkpoint=folder / "toy.npz",
        identity=identity,
        stage="toy",
        meter=Meter("toy"),
    )
    return found, cohort, exchange


def train_plainly(config: FederationConfig, *, without: Mapping[int, int] | None = None) -> np.ndarray:
    """One group after the other, one client after the other; ``without`` leaves a client out of a round."""
    settings, vectors = config.training, []
    for g, group in enumerate(GROUPS):
        vector = TEMPLATE.start
        dealt = deal_clients(
            GROUPS, participation=settings.participation, n_epochs=settings.num_train_epochs, seed=0, name="toy"
        )
        for t, clients in enumerate(dealt[g]):
            assert set(clients) <= set(group)
            rate = settings.learning_rate * (1 - t / len(dealt[g]))
            request = Request("train", "", {"start": vector}, {"name": f"toy {t}", "learning_rate": rate})
            taking_part = [NAMES[c] for c in clients if (without or {}).get(t) != c]
            vector = aggregate(
                [answer(name, request).arrays["adapter"] for name in taking_part],
                [ROWS[name] for name in taking_part],
                TEMPLATE,
                how=settings.aggregation,
                scale=config.adapter.lora_alpha / config.adapter.r,
            ).vector
        vectors.append(vector)
    return np.stack(vectors)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.floats(0.05, 1.0), st.integers(1, 3))
def test_every_client_of_a_group_takes_part_once_an_epoch(sizes: list[int], share: float, n_epochs: int) -> None:
    ends = np.cumsum([0, *sizes])
    groups = [range(ends[g], ends[g + 1]) for g in range(len(sizes))]
    dealt = deal_clients(groups, participation=share, n_epochs=n_epochs, seed=0, name="a")
    for group, rounds in zip(groups, dealt, strict=True):
        per_epoch = len(rounds) // n_epochs
        for first in range(0, len(rounds), per_epoch):
            assert sorted(np.concatenate(rounds[first : first + per_epoch])) == list(group)
        assert max(map(len, rounds)) <= max(1, round(share * len(group)))
        assert min(map(len, rounds)) >= 1


def test_rounds_are_dealt_by_seed_and_name() -> None:
    def deal(seed: int, name: str) -> list[list[int]]:
        dealt = deal_clients([range(8)], participation=0.5, n_epochs=2, seed=seed, name=name)
        return [clients.tolist() for clients in dealt[0]]

    assert deal(0, "a") == deal(0, "a")
    assert deal(0, "a") != deal(1, "a") and deal(0, "a") != deal(0, "b")


@pytest.mark.parametrize("how", ["exact", "factors"])
@pytest.mark.parametrize("backwards", [False, True])
def test_groups_at_once_are_groups_one_by_one(tmp_path: Path, how: str, backwards: bool) -> None:
    config = make_config(aggregation=how)
    found, cohort, _ = train(tmp_path, config, backwards=backwards)
    np.testing.assert_array_equal(found.vectors, train_plainly(config))
    assert len(cohort.asked) == 2 * len(NAMES) and found.n_updates.tolist() == [2] * len(NAMES)
    assert found.n_rounds.tolist() == [4, 4]


def test_losses_are_those_last_told(tmp_path: Path) -> None:
    told: dict[str, float] = {}

    def note(name: str, request: Request, reply: Reply) -> Reply:
        told[name] = float(reply.values["loss"])
        return reply

    found, _, _ = train(tmp_path, make_config(), spoil=note)
    assert found.losses == pytest.approx([np.mean([told[NAMES[c]] for c in group]) for group in GROUPS])


def find_victim(t: int) -> int:
    """A client of the first group that takes part in a round with another."""
    dealt = deal_clients(GROUPS, participation=0.5, n_epochs=2, seed=0, name="toy")
    return int(dealt[0][t][0])


BROKEN: Mapping[str, Callable[[Reply], Reply | None]] = {
    "gone": lambda reply: None,
    "nan": lambda reply: Reply({"adapter": np.full(6, np.nan, np.float32)}, reply.values),
    "one infinite": lambda reply: Reply({"adapter": np.array([1, 1, 1, 1, 1, np.inf], np.float32)}, reply.values),
    "huge": lambda reply: Reply({"adapter": np.full(6, 3e38, np.float32)}, reply.values),
    "short": lambda reply: Reply({"adapter": reply.arrays["adapter"][:3]}, reply.values),
    "no rows": lambda reply: Reply(reply.arrays, {**reply.values, "n_examples": 0}),
    "no loss": lambda reply: Reply(reply.arrays, {**reply.values, "loss": "small"}),
    "fails": lambda reply: Reply(values={"error": "out of memory"}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_client_is_as_one_that_was_not_there_and_takes_part_again(tmp_path: Path, kind: str) -> None:
    victim = find_victim(1)
    config = make_config()
    found, cohort, exchange = train(
        tmp_path,
        config,
        spoil=lambda name, request, reply: (
            BROKEN[kind](reply) if (name, request.values["name"]) == (NAMES[victim], "toy 1") else reply
        ),
    )
    np.testing.assert_array_equal(found.vectors, train_plainly(config, without={1: victim}))
    assert sum(name == NAMES[victim] for name, _ in cohort.asked) == 2, "it is asked again in the next epoch"
    record = exchange.traffic.of("toy")
    assert record.n_missing == (kind == "gone") and [name for name, _ in record.refused] == (
        [] if kind == "gone" else [NAMES[victim]]
    )


def test_a_client_that_claims_more_rows_weighs_as_much_as_it_registered(tmp_path: Path) -> None:
    honest, _, _ = train(tmp_path / "a", make_config())
    lying, _, _ = train(
        tmp_path / "b",
        make_config(),
        spoil=lambda name, request, reply: Reply(reply.arrays, {**reply.values, "n_examples": 10**9}),
    )
    np.testing.assert_array_equal(lying.vectors, honest.vectors)


def test_with_too_few_replies_a_round_changes_nothing(tmp_path: Path) -> None:
    victim = find_victim(1)

    def leave(name: str, request: Request, reply: Reply) -> Reply | None:
        return None if name == NAMES[victim] and request.values["name"] == "toy 1" else reply

    config = make_config(min_reply_share=0.9)
    found, _, _ = train(tmp_path, config, spoil=leave)
    assert found.n_rounds.tolist() == [3, 4]
    rates = config.training.learning_rate * (1 - np.arange(4) / 4)
    vector = TEMPLATE.start
    dealt = deal_clients(GROUPS, participation=0.5, n_epochs=2, seed=0, name="toy")[0]
    for t in (0, 2, 3):
        request = Request("train", "", {"start": vector}, {"name": f"toy {t}", "learning_rate": rates[t]})
        names = [NAMES[c] for c in dealt[t]]
        adapters = [answer(name, request).arrays["adapter"] for name in names]
        scale = config.adapter.lora_alpha
        vector = aggregate(adapters, [ROWS[n] for n in names], TEMPLATE, how="exact", scale=scale).vector
    np.testing.assert_array_equal(found.vectors[0], vector)


def test_a_group_that_never_answers_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"toy: in no round of group 1 \(3 clients\) enough clients answered"):
        train(tmp_path, make_config(), spoil=lambda name, request, reply: None if name in NAMES[1::2] else reply)


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [1, 8, 13])
def test_a_broken_off_training_ends_like_one_that_was_not(tmp_path: Path, at: int) -> None:
    whole, _, _ = train(tmp_path / "whole", make_config())
    asked: list[tuple[str, str]] = []

    def stop(name: str, request: Request, reply: Reply) -> Reply:
        asked.append((name, str(request.values["name"])))
        if len(asked) == at:
            raise _Stopped
        return reply

    with pytest.raises(_Stopped):
        train(tmp_path / "part", make_config(), spoil=stop)
    found, cohort, _ = train(tmp_path / "part", make_config())
    for name in ("vectors", "losses", "residuals", "n_rounds"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    again = set(asked) & set(cohort.asked)
    assert len({round_name for _, round_name in again}) <= 1, "only the round it was broken off in is asked for again"


def test_a_round_that_was_broken_off_was_sent_and_counts(tmp_path: Path) -> None:
    values = make_config().model_dump() | {"privacy": {"update_clip_norm": 1.0, "update_noise_multiplier": 1.0}}
    config, asked = FederationConfig.model_validate(values), []

    def stop(name: str, request: Request, reply: Reply) -> Reply:
        asked.append(name)
        if len(asked) == 5:
            raise _Stopped
        return reply

    with pytest.raises(_Stopped):
        train(tmp_path, config, spoil=stop)
    found, _, _ = train(tmp_path, config)
    again = [3 if c in find_round(1) else 2 for c in range(len(NAMES))]
    assert found.n_updates.tolist() == again and 3 in again


def find_round(t: int) -> set[int]:
    """Everybody of a round."""
    dealt = deal_clients(GROUPS, participation=0.5, n_epochs=2, seed=0, name="toy")
    return {int(client) for rounds in dealt for client in rounds[t]}


def test_a_checkpoint_of_another_training_is_not_taken_up(tmp_path: Path) -> None:
    first, _, _ = train(tmp_path, make_config(), identity="one")
    other, cohort, _ = train(tmp_path, make_config(), identity="two")
    assert len(cohort.asked) == 2 * len(NAMES)
    np.testing.assert_array_equal(first.vectors, other.vectors)
    _, cohort, _ = train(tmp_path, make_config(), identity="two")
    assert cohort.asked == []


def test_a_boosters_clients_are_sent_what_it_is_added_to(tmp_path: Path) -> None:
    base = Base(np.ones((2, 6), np.float32), ((1, 1.0), (2, 0.5), (0, -0.5)), 0.5)
    seen: list[Request] = []
    train(tmp_path, make_config(), base=base, spoil=lambda name, request, reply: seen.append(request) or reply)
    for request in seen:
        assert request.arrays["members"].shape == (2, 6)
        assert request.values["terms"] == [[1, 1.0], [2, 0.5], [0, -0.5]] and request.values["rate"] == 0.5
