"""Low-rank terms in the base's precision, and several members in one pass: PEFT's own layers are the slow twin."""

from __future__ import annotations

import pytest
import torch

from ensemblelora.adapters import THETA0, AdaptedModel, activate, add_adapter, attach
from ensemblelora.config import AdapterConfig
from ensemblelora.data.batching import collate, repeat_batch
from ensemblelora.lora import can_fuse, fused
from ensemblelora.passes import members_in_turn
from ensemblelora.scoring import score_batch
from tests.tiny import DECODERS, disturb, make_adapted, make_base, make_split

MEMBERS = ("one", "two", THETA0)


def make_members(family: str) -> AdaptedModel:
    adapted = make_adapted(family)
    for seed, name in enumerate(MEMBERS[:2]):
        add_adapter(adapted, name)
        disturb(adapted, name, seed=seed)
    return adapted


@pytest.mark.parametrize("family", DECODERS)
def test_one_member_computes_and_learns_as_in_peft(family: str) -> None:
    adapted = make_members(family)
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


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_members_in_one_pass_score_as_one_by_one(family: str, layout: str) -> None:
    adapted = make_members(family)
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


def test_pefts_own_forward_is_back_afterwards() -> None:
    adapted = make_members("llama")
    batch = collate([(make_split("verbalizer"), 0)], 0)
    with activate(adapted, "one"), torch.inference_mode():
        before = score_batch(adapted.network, batch).z
    with pytest.raises(RuntimeError), fused(adapted, ["two"]), fused(adapted, ["one"]):
        raise RuntimeError
    assert not any("forward" in vars(module) for module in adapted.network.modules())
    with activate(adapted, "one"), torch.inference_mode():
        torch.testing.assert_close(score_batch(adapted.network, batch).z, before)


def test_bfloat16_rounds_and_no_more() -> None:
    exact = make_members("llama")
    low = make_members("llama")
    low.base.model.bfloat16()
    for name, parameter in low.peft.named_parameters():
        if "lora_" in name:
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
