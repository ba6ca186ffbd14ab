"""Adapter layers in the base's precision, and several members in one pass: PEFT's own layers are the slow twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ensemblelora.adapters import THETA0, AdaptedModel, activate, add_adapter, attach
from ensemblelora.config import AdapterConfig
from ensemblelora.data.batching import collate, repeat_batch
from ensemblelora.fusion import can_fuse, fused
from ensemblelora.passes import members_in_turn
from ensemblelora.scoring import score_batch
from ensemblelora.switch import MemberSwitch
from tests.tiny import DECODERS, disturb, make_adapted, make_base, make_split

MEMBERS = ("one", "two", THETA0)
SETTINGS: dict[str, dict[str, Any]] = {"lora": {"r": 4}, "ia3": {}, "bottleneck": {"reduction": 8, "scaling": 2.0}}


def make_members(family: str, method: str = "lora") -> AdaptedModel:
    config = AdapterConfig(method=method, **SETTINGS[method])  # type: ignore[arg-type]
    adapted = attach(make_base(family), config, seed=0)
    for seed, name in enumerate(MEMBERS[:2]):
        add_adapter(adapted, name)
        disturb(adapted, name, seed=seed)
    return adapted


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", DECODERS)
def test_one_member_computes_and_learns_as_in_peft(family: str, method: str) -> None:
    adapted = make_members(family, method)
    batch = collate([(make_split("options", n=5), e) for e in range(5)], 0)
    found = []
    for is_fused in (False, True):
        with activate(adapted, "one", trainable=True):
            if is_fused:
                with fused(adapted, ["one"]):
                    z = score_batch(adapted.network, batch).z
            else:
                z = score_batch(adapted.network, batch).z
            z[torch.isfinite(z)].pow(2).sum().backward()
        gradients = {n: p.grad.clone() for n, p in adapted.peft.named_parameters() if p.grad is not None}
        adapted.peft.zero_grad(set_to_none=True)
        found.append((z.detach(), gradients))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    assert found[0][1].keys() == found[1][1].keys() != set()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_members_in_one_pass_score_as_one_by_one(family: str, layout: str, method: str) -> None:
    adapted = make_members(family, method)
    parts = [(make_split(kind, n=4, seed=k), e) for k, kind in enumerate(("options", "verbalizer")) for e in range(4)]
    batch = collate(parts, 0, layout=layout)  # type: ignore[arg-type]
    alone = []
    for member in MEMBERS:
        with activate(adapted, member), torch.inference_mode():
            alone.append(score_batch(adapted.network, batch).z)
    with members_in_turn(adapted, MEMBERS) as runner:
        assert runner.can_mix
        together = runner.score(repeat_batch(batch, 3), MEMBERS, None).z.chunk(3)
        last = runner.score(repeat_batch(batch, 1), MEMBERS[1:2], None).z
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, alone[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1])


@pytest.mark.parametrize("method", SETTINGS)
def test_members_with_other_numbers_of_rows_learn_as_one_by_one(method: str) -> None:
    """Each member's gradients come from its own rows alone."""
    adapted, split = make_members("llama", method), make_split("verbalizer", n=6)
    batch = collate([(split, e) for e in range(6)], 0)
    found: list[dict[str, torch.Tensor]] = []
    for shares in ([(("one", "two"), (2, 4))], [(("one",), (6,)), (("two",), (6,))]):
        with activate(adapted, "one", trainable=True), fused(adapted, ["one", "two"]) as switch:
            for name, parameter in adapted.peft.named_parameters():
                parameter.requires_grad_("one" in name.split(".") or "two" in name.split("."))
            for members, counts in shares:
                switch.use(members, counts)
                z = score_batch(adapted.network, batch).z
                own = {"one": z[:2], "two": z[2:]}
                sum(own[name].pow(2).sum() for name in members).backward()  # type: ignore[union-attr]
        found.append({n: p.grad.clone() for n, p in adapted.peft.named_parameters() if p.grad is not None})
        adapted.peft.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys() != set()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_what_overflows_in_one_member_stays_there() -> None:
    switch = MemberSwitch(["one", "two"])
    x, vectors = torch.ones(6, 3), torch.tensor([[torch.inf] * 3, [2.0] * 3])
    weights = vectors[:, :, None].expand(2, 3, 4)
    for counts in (None, (2, 4), (3, 3)):
        switch.use(["one", "two"], counts)
        n_first = 3 if counts is None else counts[0]
        product = switch.multiply(x, weights, torch.ones(2, 1, 4))
        assert product[:n_first].isinf().all() and (product[n_first:] == 7).all()
        scaled = switch.scale(x[:, None], vectors)
        assert scaled[:n_first].isinf().all() and (scaled[n_first:] == 2).all()


@pytest.mark.parametrize("method", SETTINGS)
def test_pefts_own_forward_is_back_afterwards(method: str) -> None:
    adapted = make_members("llama", method)
    batch = collate([(make_split("verbalizer"), 0)], 0)
    with activate(adapted, "one"), torch.inference_mode():
        before = score_batch(adapted.network, batch).z
    with pytest.raises(RuntimeError), fused(adapted, ["two"]), fused(adapted, ["one"]):
        raise RuntimeError
    assert not any("forward" in vars(module) for module in adapted.network.modules())
    with activate(adapted, "one"), torch.inference_mode():
        torch.testing.assert_close(score_batch(adapted.network, batch).z, before)


@pytest.mark.parametrize("method", SETTINGS)
def test_bfloat16_rounds_and_no_more(method: str) -> None:
    exact = make_members("llama", method)
    low = make_members("llama", method)
    low.base.model.bfloat16()
    for name, parameter in low.peft.named_parameters():
        if not {*MEMBERS}.isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()
    batch = collate([(make_split("options", n=5), e) for e in range(5)], 0)
    with activate(exact, "one"), torch.inference_mode():
        true = score_batch(exact.network, batch).z
    with activate(low, "one"), torch.inference_mode(), fused(low, ["one"]):
        ours = score_batch(low.network, batch).z
    present = torch.isfinite(true)
    torch.testing.assert_close(ours[present], true[present], rtol=0.05, atol=0.1)


def test_a_classification_head_is_left_to_peft() -> None:
    adapted = make_adapted("bert", head="sequence_classification")
    assert not can_fuse(adapted)
    assert can_fuse(make_adapted("llama"))


def test_dropout_acts_in_training_only() -> None:
    adapted = attach(make_base("llama"), AdapterConfig(r=4, lora_alpha=8, lora_dropout=0.5), seed=0)
    disturb(adapted)
    batch = collate([(make_split("verbalizer"), 0)], 0)
    with activate(adapted, THETA0, trainable=True), fused(adapted, [THETA0]):
        quiet = [score_batch(adapted.network, batch).z.detach() for _ in range(2)]
        adapted.peft.train()
        noisy = [score_batch(adapted.network, batch).z.detach() for _ in range(2)]
    adapted.peft.eval()
    torch.testing.assert_close(quiet[0], quiet[1])
    assert not torch.allclose(noisy[0], noisy[1])


def test_a_frozen_a_stays_where_it_is_and_is_shared() -> None:
    adapted = attach(make_base("llama"), AdapterConfig(r=4, train_A=False), seed=0)
    add_adapter(adapted, "one")
    with activate(adapted, "one", trainable=True):
        trained = [name for name, p in adapted.peft.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_B.one." in name for name in trained)
    weights = dict(adapted.peft.named_parameters())
    for name in trained:
        own = name.replace("lora_B", "lora_A")
        torch.testing.assert_close(weights[own], weights[own.replace(".one.", f".{THETA0}.")])
