from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, activate, adapter_state, add_adapter, attach
from ensemblelora.analysis.hessian import compute_ggn_traces, count_coordinates
from ensemblelora.analysis.jointloss import expanded, twice_differentiable
from ensemblelora.analysis.sharpness import measure_sharpness
from ensemblelora.config import AdapterConfig, ModelConfig
from ensemblelora.data.batching import collate
from ensemblelora.errors import DataError, ModelError
from ensemblelora.models import in_float32, load_base, prepare_base
from ensemblelora.passes import score, with_cache
from ensemblelora.quantization import dequantize_layers
from ensemblelora.scoring import cross_entropy
from tests.tiny import disturb, make_adapted, make_base, make_network, make_split
from tests.toys import load_tokenizer

PROBES = 50


def make_members(*seeds: int, r: int = 2, family: str = "llama", **options):
    adapted = make_adapted(family, r=r, **options)
    for seed in seeds:
        add_adapter(adapted, f"m{seed}")
        disturb(adapted, f"m{seed}", scale=2.0, seed=seed)
    return adapted, [f"m{seed}" for seed in seeds]


def make_batch(adapted, split, example=0):
    return collate([(split, example)], adapted.base.pad_token_id, layout=adapted.layout)


def slow_traces(adapted, batch, members, weights) -> list[float]:
    """Each member's trace of the loss's second derivatives: every number's own gradient, differentiated again."""
    tensors = {}
    scores = 0.0
    for name, weight in zip(members, weights, strict=True):
        with activate(adapted, name, trainable=True), torch.enable_grad():
            tensors[name] = [p for p in adapted.peft.parameters() if p.requires_grad]
            scores = scores + weight * score(adapted, batch).z
    every = [p for own in tensors.values() for p in own]
    for p in every:
        p.requires_grad_(True)
    with torch.enable_grad():
        gradients = torch.autograd.grad(cross_entropy(scores, batch).sum(), every, create_graph=True)
    found, place = [], 0
    for own in tensors.values():
        total = 0.0
        for p in own:
            flat = gradients[place].flatten()
            for i in range(p.numel()):
                (row,) = torch.autograd.grad(flat[i], [p], retain_graph=True)
                total += float(row.flatten()[i])
            place += 1
        found.append(total)
    for p in every:
        p.requires_grad_(False)
    return found


def ggn_traces(adapted, batch, members, weights, **options):
    with twice_differentiable(adapted), expanded(adapted, batch, members, weights, **options) as expansion:
        return compute_ggn_traces(expansion), count_coordinates(expansion)


@pytest.mark.parametrize("kind", ["verbalizer", "options"])
def test_the_trace_over_all_members_is_that_of_all_second_derivatives(kind):
    adapted, members = make_members(1, 2, r=1, num_hidden_layers=1)
    split = make_split(kind, n=1, seed=3)
    exact = slow_traces(adapted, make_batch(adapted, split), members, [0.3, 0.7])
    found = measure_sharpness(adapted, split, [0], members, [0.3, 0.7], n_probes=1000, seed=0)
    assert abs(found.mean - sum(exact)) < 3.5 * found.mean_se
    assert abs(found.first_mean - exact[0]) < 3.5 * found.first_mean_se
    assert abs(found.mean_plain - sum(exact)) < 3.5 * found.mean_plain_se
    assert found.mean_se < found.mean_plain_se
    assert found.n_coordinates == 2 * sum(t.numel() for t in adapter_state(adapted, THETA0).values())


def test_equal_members_have_a_share_of_the_trace_that_rescaling_takes_back():
    adapted, (name,) = make_members(1)
    for number in range(3):
        add_adapter(adapted, f"copy{number}", adapter_state(adapted, name))
    copies = [name, *(f"copy{number}" for number in range(3))]
    batch = make_batch(adapted, make_split("verbalizer", n=2))
    one, n_one = ggn_traces(adapted, batch, [name], [1.0])
    four, n_four = ggn_traces(adapted, batch, copies, [0.25] * 4)
    assert n_four == 4 * n_one
    np.testing.assert_allclose(four, one[0] / 16, rtol=1e-4)
    found = measure_sharpness(adapted, make_split("verbalizer", n=2), [0], copies, [0.25] * 4, n_probes=PROBES, seed=0)
    assert (found.n_members, found.rescale) == (4, pytest.approx(4.0))
    assert found.mean_ggn == pytest.approx(one[0] / 4, rel=1e-4)
    assert found.mean_rescaled == pytest.approx(4 * found.mean)
    assert found.greatest_rescaled == pytest.approx(4 * found.greatest)


def test_the_weights_coordinates_do_not_depend_on_how_an_adapter_is_put_together():
    # The same change of the weights, as rank 2 and as rank 4 with a scale half as large.
    base = make_base()
    narrow = attach(base, AdapterConfig(r=2, lora_alpha=4), seed=0)
    disturb(narrow, THETA0, scale=2.0)
    state = adapter_state(narrow, THETA0)
    batch = make_batch(narrow, make_split("verbalizer", n=1))
    weights, n_weights = ggn_traces(narrow, batch, [THETA0], [1.0], coordinates="weights")
    own, _ = ggn_traces(narrow, batch, [THETA0], [1.0])
    wide = attach(make_base(), AdapterConfig(r=4, lora_alpha=4), seed=0)
    doubled = {
        key: torch.cat([t, t], dim=0 if "lora_A" in key else 1) for key, t in state.items()
    }  # twice the product at half the scale
    add_adapter(wide, "wide", doubled)
    wide_weights, n_wide = ggn_traces(wide, batch, ["wide"], [1.0], coordinates="weights")
    wide_own, _ = ggn_traces(wide, batch, ["wide"], [1.0])
    assert n_weights == n_wide
    np.testing.assert_allclose(wide_weights, weights, rtol=1e-4)
    np.testing.assert_allclose(wide_own, own / 2, rtol=1e-4)  # twice the numbers, each with half the gradient


def test_the_weights_coordinates_are_the_base_weights_own():
    adapted, (name,) = make_members(1)
    batch = make_batch(adapted, make_split("verbalizer", n=1, n_choices=2))
    found, n_found = ggn_traces(adapted, batch, [name], [1.0], coordinates="weights")
    with activate(adapted, name), torch.enable_grad():
        weights = [layer.get_base_layer().weight.requires_grad_(True) for layer in adapted.adapter_layers]
        z = score(adapted, batch).z[0]
        p = torch.softmax(z.detach(), 0)
        gradients = torch.autograd.grad(z[1] - z[0], weights)
    for weight in weights:
        weight.requires_grad_(False)
    assert n_found == sum(weight.numel() for weight in weights)
    assert found[0] == pytest.approx(float(p[0] * p[1] * sum(g.square().sum() for g in gradients)), rel=1e-4)


def test_the_largest_trace_is_found_and_estimated_anew():
    adapted, members = make_members(1, 2)
    split = make_split("verbalizer", n=5)
    found = measure_sharpness(adapted, split, [4, 0, 2], members, [0.5, 0.5], n_probes=PROBES, n_eigenvalues=2, seed=0)
    assert (found.n_examples, len(found.traces), found.n_probes) == (3, 3, PROBES)
    assert found.greatest_before == max(found.traces)
    assert found.greatest_example == [4, 0, 2][int(np.argmax(found.traces))]
    assert found.greatest != found.greatest_before  # other vectors
    assert abs(found.greatest - found.greatest_before) < 6 * found.greatest_se
    assert found.mean == pytest.approx(np.mean(found.traces))
    alone = measure_sharpness(adapted, split, [found.greatest_example], members, [0.5, 0.5], n_probes=PROBES, seed=0)
    assert alone.mean == pytest.approx(found.greatest_before, rel=1e-4)  # examples do not depend on each other
    assert alone.greatest == pytest.approx(found.greatest, rel=1e-4)
    assert alone.largest_eigenvalue is None
    assert 0 < found.largest_eigenvalue


def test_seeds_decide_the_random_vectors_and_nothing_else_does():
    adapted, members = make_members(1)
    split = make_split("verbalizer", n=2)
    one, again, other = (
        measure_sharpness(adapted, split, [0, 1], members, [1.0], n_probes=PROBES, seed=seed) for seed in (0, 0, 1)
    )
    assert one == again
    assert one.mean != other.mean
    assert one.mean_ggn == other.mean_ggn


def test_the_model_is_left_as_it_was():
    adapted, members = make_members(1, 2)
    for name, parameter in adapted.network.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    flags = [p.requires_grad for p in adapted.peft.parameters()]
    before = [(p.dtype, p.detach().clone()) for p in adapted.peft.parameters()]
    active = adapted.peft.active_adapter
    split = make_split("verbalizer", n=1)
    for coordinates in ("adapter", "weights"):
        measure_sharpness(adapted, split, [0], members, [0.5, 0.5], coordinates=coordinates, n_probes=PROBES, seed=0)
    assert [p.requires_grad for p in adapted.peft.parameters()] == flags
    after = [(p.dtype, p.detach()) for p in adapted.peft.parameters()]
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))
    assert adapted.peft.active_adapter == active
    assert not any(layer._forward_hooks for layer in adapted.adapter_layers)


def test_a_model_of_lower_precision_is_looked_at_in_float32():
    adapted, members = make_members(1)
    split = make_split("verbalizer", n=1)
    wide = measure_sharpness(adapted, split, [0], members, [1.0], n_probes=PROBES, seed=0)
    with in_float32(adapted.network):
        same = measure_sharpness(adapted, split, [0], members, [1.0], n_probes=PROBES, seed=0)
    assert same == wide


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_other_families_and_fused_attention_can_be_differentiated_twice(family):
    adapted, members = make_members(1, family=family)
    split = make_split("options", n=1)
    eager = measure_sharpness(adapted, split, [0], members, [1.0], n_probes=PROBES, seed=0)
    adapted.base.model.set_attn_implementation("sdpa")
    fused = measure_sharpness(adapted, split, [0], members, [1.0], n_probes=PROBES, seed=0)
    assert fused.mean == pytest.approx(eager.mean, rel=1e-3)


def test_bottleneck_adapters_are_measured_in_their_own_coordinates():
    config = AdapterConfig(method="bottleneck", reduction=32, non_linearity="tanh")
    adapted = attach(make_base(num_hidden_layers=1), config, seed=0)
    disturb(adapted, THETA0, scale=2.0)
    split = make_split("verbalizer", n=1, n_choices=2)
    found = measure_sharpness(adapted, split, [0], [THETA0], [1.0], n_probes=200, seed=0)
    (exact,) = slow_traces(adapted, make_batch(adapted, split), [THETA0], [1.0])
    assert abs(found.mean - exact) < 4 * found.mean_se
    with pytest.raises(ModelError, match="plain LoRA"):
        measure_sharpness(adapted, split, [0], [THETA0], [1.0], coordinates="weights", n_probes=PROBES, seed=0)


def test_a_base_in_4_bits_is_as_sharp_as_its_unpacked_weights(tmp_path):
    network = make_network("llama", hidden_size=64, intermediate_size=64, vocab_size=len(load_tokenizer()))
    network.save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    packed = load_base(ModelConfig(name=str(tmp_path), dtype="float32", device="cpu", quantization="nf4"), head="lm")
    unpacked = copy.deepcopy(packed.model)
    dequantize_layers(unpacked)
    found = {}
    for name, base in {"packed": packed, "twin": prepare_base("twin", unpacked, packed.tokenizer)}.items():
        adapted = attach(base, AdapterConfig(r=2, lora_alpha=4), seed=0)
        disturb(adapted, scale=2.0)
        for coordinates in ("adapter", "weights"):
            found[name, coordinates] = measure_sharpness(
                adapted, make_split("verbalizer", n=1), [0], [THETA0], [1.0], coordinates=coordinates,
                n_probes=PROBES, n_eigenvalues=1, seed=0,
            )  # fmt: skip
    for coordinates in ("adapter", "weights"):
        one, twin = found["packed", coordinates], found["twin", coordinates]
        assert (one.mean, one.mean_se) == pytest.approx((twin.mean, twin.mean_se), rel=1e-4)
        assert one.largest_eigenvalue == pytest.approx(twin.largest_eigenvalue, rel=1e-3)


def test_lower_layers_that_are_kept_are_not_read_in_another_precision(tmp_path):
    adapted = attach(make_base(), AdapterConfig(r=2, lora_alpha=4, layers_to_transform=(1,)), seed=0)
    disturb(adapted, scale=2.0)
    split = make_split("options", n=2)
    plain = measure_sharpness(adapted, split, [0, 1], [THETA0], [1.0], n_probes=PROBES, seed=0)
    kept = with_cache(adapted, tmp_path, [split], max_bytes=10**8)
    same = measure_sharpness(kept, split, [0, 1], [THETA0], [1.0], n_probes=PROBES, seed=0)
    assert same.traces == pytest.approx(plain.traces, rel=1e-4)


def test_what_can_not_be_measured_is_refused():
    adapted, members = make_members(1)
    with pytest.raises(DataError, match="free text"):
        measure_sharpness(adapted, make_split("sequence"), [0], members, [1.0], n_probes=PROBES, seed=0)
    with pytest.raises(DataError, match="no example"):
        measure_sharpness(adapted, make_split("verbalizer"), [], members, [1.0], n_probes=PROBES, seed=0)
    adapted.base.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="flash_attention_2: can't be differentiated twice"):
        measure_sharpness(adapted, make_split("verbalizer"), [0], members, [1.0], n_probes=PROBES, seed=0)


@pytest.mark.parametrize(("coordinates", "tolerance"), [("adapter", 0.05), ("weights", 0.15)])
def test_the_ledger_agrees_with_counted_operations(coordinates, tolerance):
    adapted, members = make_members(1, r=4, hidden_size=64, intermediate_size=160, num_hidden_layers=3)
    meter, options = Meter("sharpness"), {"coordinates": coordinates, "n_probes": PROBES, "n_eigenvalues": 1}
    with FlopCounterMode(display=False) as counter:
        measure_sharpness(adapted, make_split("verbalizer", n=1), [0], members, [1.0], **options, seed=0, meter=meter)
    assert meter.record.flops == pytest.approx(counter.get_total_flops(), rel=tolerance)
