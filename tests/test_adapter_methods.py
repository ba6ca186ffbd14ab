"""What holds of every kind of adapter: where it begins, what its gradients are, how it is kept apart and saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    activate,
    adapter_bytes,
    adapter_state,
    add_adapter,
    attach,
    load_adapter,
    measure_distance,
    remove_adapter,
    save_adapter,
    trainable_layers,
)
from ensemblelora.boosting.direction import sum_gradients
from ensemblelora.config import AdapterConfig, ModelConfig, TrainingConfig, dump_config, load_config, parse_config
from ensemblelora.counting import count_forward, count_gradients, count_training
from ensemblelora.data.batching import collate
from ensemblelora.errors import ConfigError, ModelError, StoreError
from ensemblelora.fusion import can_fuse, can_mix, fused
from ensemblelora.gradients.backward import compute_features, count_coordinates, find_active_layers, list_parts
from ensemblelora.gradients.projection import Projector
from ensemblelora.models import load_base, prepare_base
from ensemblelora.passes import score
from ensemblelora.quantization import dequantize_layers
from ensemblelora.scoring import cross_entropy, score_batch
from ensemblelora.training import fine_tune, measure_validation_nll
from tests.test_collect import autograd_features, hook_features
from tests.tiny import PadOnly, disturb, make_base, make_learnable_split, make_network, make_split
from tests.toys import load_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8},
    "dora": {"r": 4, "lora_alpha": 8},
    "ia3": {},
    "bottleneck": {"reduction": 8},
}
METHODS = tuple(SETTINGS)
NEW = ("dora", "ia3", "bottleneck")
FAMILIES = [("llama", "lm"), ("gpt2", "lm"), ("gptj", "lm"), ("bert", "sequence_classification")]
PLACES = [*FAMILIES, ("qwen2", "lm"), ("llama", "sequence_classification")]
IDS = torch.tensor([[5, 9, 33, 2, 71], [8, 8, 1, 60, 3]])
MINIMAL = {"data": {"tasks": ["a"]}}


def make(method: str, family: str = "llama", *, head: str = "lm", layers: Any = None, **sizes: Any) -> AdaptedModel:
    config = AdapterConfig(method=method, layers_to_transform=layers, **SETTINGS[method])  # type: ignore[arg-type]
    return attach(make_base(family, head=head, **sizes), config, seed=0)


def run(network: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(input_ids=IDS).logits
    return logits


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Where an adapter begins.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "head"), PLACES)
def test_the_start_computes_what_the_base_computes_to_the_last_bit(method: str, family: str, head: str) -> None:
    plain = run(make_network(family, head=head).eval())
    assert torch.equal(run(make(method, family, head=head).network), plain)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_bfloat16_base_too_and_the_adapter_stays_float32(method: str) -> None:
    plain = run(make_network("llama").bfloat16().eval())
    base = prepare_base("low", make_network("llama").bfloat16(), PadOnly())  # type: ignore[arg-type]
    adapted = attach(base, AdapterConfig(method=method, **SETTINGS[method]), seed=0)
    assert torch.equal(run(adapted.network), plain)
    add_adapter(adapted, "one")
    assert {tensor.dtype for tensor in adapter_state(adapted, "one").values()} == {torch.float32}
    disturb(adapted, "one")
    with activate(adapted, "one"):
        assert run(adapted.network).dtype == torch.bfloat16
        assert not torch.equal(run(adapted.network), plain)


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_a_function_of_the_seed(method: str) -> None:
    config = AdapterConfig(method=method, **SETTINGS[method])  # type: ignore[arg-type]
    first, again, other = (adapter_state(attach(make_base(), config, seed=s), THETA0) for s in (0, 0, 1))
    assert same(first, again)
    assert same(first, other) == (method == "ia3"), "all of IA3 begins at one"


# Gradients.


@pytest.mark.parametrize(
    ("family", "kind", "n_choices", "mode"),
    [
        ("llama", "verbalizer", 3, "contrast"),
        ("llama", "options", 3, "contrast"),
        ("llama", "sequence", 1, "sequence"),
        ("gpt2", "options", 3, "contrast"),
        ("gptj", "verbalizer", 3, "contrast"),
    ],
)
@pytest.mark.parametrize("method", NEW)
def test_tapped_gradients_equal_autograd_per_example(
    method: str, family: str, kind: str, n_choices: int, mode: str
) -> None:
    check_gradients(make(method, family), make_split(kind, n_choices=n_choices), mode)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", NEW)
def test_tapped_gradients_of_a_classifier_too(method: str, family: str) -> None:
    adapted = make(method, family, head="sequence_classification")
    check_gradients(adapted, make_split("classification", n_choices=3), "contrast")


@pytest.mark.parametrize("method", METHODS)
def test_away_from_the_start_every_tensor_has_a_gradient_and_they_are_right_too(method: str) -> None:
    adapted, split = make(method), make_split("options", n=4)
    disturb(adapted)
    layers = find_active_layers(adapted, [split])
    assert layers.keys() == trainable_layers(adapted, THETA0).keys()
    check_gradients(adapted, split, "contrast")


def check_gradients(adapted: AdaptedModel, split: Any, mode: str) -> None:
    outputs, gradients = autograd_features(adapted, split, mode)
    fast = hook_features(adapted, split, mode)
    np.testing.assert_allclose(fast.outputs, outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fast.features, gradients, rtol=1e-4, atol=1e-5 * np.abs(gradients).max())
    np.testing.assert_allclose(fast.squared_norms, (gradients**2).sum((1, 2)), rtol=1e-4)
    assert fast.features.shape[2] == count_coordinates(find_active_layers(adapted, [split]))
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in adapted.base.model.parameters())


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("lora", {"lora_B.weight"}),
        ("dora", {"lora_B.weight", "lora_magnitude_vector.weight"}),
        ("ia3", {"ia3_l.weight"}),
        ("bottleneck", {"bottleneck_up.weight", "bottleneck_up.bias"}),
    ],
)
def test_which_tensors_have_a_gradient_at_the_start(method: str, parts: set[str]) -> None:
    adapted = make(method)
    found = {name for name, _ in list_parts(find_active_layers(adapted, [make_split("verbalizer")]))}
    assert {".".join(name.split(".")[-2:]) for name in found} == parts


@pytest.mark.parametrize("method", METHODS)
def test_the_weighted_backward_pass_is_the_sum_of_the_gradients(method: str) -> None:
    """What boosting's dual direction is made of, keyed as the adapter is saved."""
    adapted, split = make(method), make_split("options", n=4)
    alpha = np.random.default_rng(0).normal(size=(4, 2))
    _, gradients = autograd_features(adapted, split, "contrast")
    adapted.peft.zero_grad(set_to_none=True)
    step = sum_gradients(adapted, THETA0, [(split, "contrast", alpha)], max_tokens=1000)
    assert step.keys() == adapter_state(adapted, THETA0).keys()
    summed = np.einsum("nc,ncp->p", alpha, gradients)
    assert sum(float(t.double().pow(2).sum()) for t in step.values()) == pytest.approx((summed**2).sum(), rel=1e-4)
    found = np.sort(torch.cat([tensor.flatten() for tensor in step.values()]).numpy())
    expected = np.sort(np.concatenate([summed, np.zeros(len(found) - len(summed))]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(summed).max())


@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_4_bits_is_adapted_as_its_unpacked_twin(method: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": len(load_tokenizer()), "hidden_size": 64, "intermediate_size": 128}
    make_network("llama", initializer_range=0.15, **sizes).save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    packed = load_base(ModelConfig(name=str(tmp_path), dtype="float32", device="cpu", quantization="nf4"))
    plain, unpacked = run(packed.model), copy.deepcopy(packed.model)
    dequantize_layers(unpacked)
    config = AdapterConfig(method=method, **SETTINGS[method])  # type: ignore[arg-type]
    adapted = attach(packed, config, seed=0)
    twin = attach(prepare_base("twin", unpacked, PadOnly()), config, seed=0)  # type: ignore[arg-type]
    assert torch.equal(run(adapted.network), plain)
    for model in (adapted, twin):
        disturb(model)
    torch.testing.assert_close(run(adapted.network), run(twin.network), rtol=1e-4, atol=1e-5)
    if can_fuse(adapted):
        with fused(adapted, [THETA0]):
            torch.testing.assert_close(run(adapted.network), run(twin.network), rtol=1e-4, atol=1e-5)
    check_gradients(adapted, make_split("verbalizer", n=3), "contrast")


# Kept apart, saved and loaded.


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_a_saved_folder_loads_with_peft_alone_and_gives_the_same_bits(
    method: str, family: str, head: str, tmp_path: Path
) -> None:
    adapted = make(method, family, head=head)
    add_adapter(adapted, "group-0")
    disturb(adapted, "group-0")
    save_adapter(adapted, "group-0", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    alone = PeftModel.from_pretrained(make_network(family, head=head, seed=0), str(tmp_path)).eval()
    with activate(adapted, "group-0"):
        ours = run(adapted.network)
    assert torch.equal(run(alone), ours)
    assert not torch.allclose(ours, run(adapted.network)), "the adapter must do something, or the test proves nothing"


@pytest.mark.parametrize("method", METHODS)
def test_the_same_adapter_gives_the_same_files_and_reads_back_equal(method: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save_adapter(make(method), THETA0, tmp_path / folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    adapted = make(method)
    disturb(adapted)
    save_adapter(adapted, THETA0, tmp_path / "moved")
    fresh = make(method)
    load_adapter(fresh, "again", tmp_path / "moved")
    assert same(adapter_state(fresh, "again"), adapter_state(adapted, THETA0))
    assert adapter_bytes(fresh, "again") == sum(4 * t.numel() for t in adapter_state(adapted, THETA0).values())


@pytest.mark.parametrize("method", NEW)
def test_a_folder_of_another_kind_is_refused(method: str, tmp_path: Path) -> None:
    save_adapter(make("lora"), THETA0, tmp_path / "lora")
    with pytest.raises(StoreError, match=r"made with (peft_type 'LORA'|use_dora False), this run has "):
        load_adapter(make(method), "loaded", tmp_path / "lora")
    save_adapter(make(method), THETA0, tmp_path / "other")
    with pytest.raises(StoreError, match=r"adapter folder .*: made with "):
        load_adapter(make("lora"), "loaded", tmp_path / "other")


@pytest.mark.parametrize("method", NEW)
def test_adapters_are_switched_and_removed_and_do_not_touch_each_other(method: str) -> None:
    adapted = make(method)
    base, start = run(adapted.network), adapter_state(adapted, THETA0)
    for seed, name in enumerate(("one", "two")):
        add_adapter(adapted, name)
        assert same(adapter_state(adapted, name), start), "a new adapter starts at theta0"
        disturb(adapted, name, seed=seed)
    with activate(adapted, "one"):
        first = run(adapted.network)
        with activate(adapted, "two"):
            second = run(adapted.network)
        assert torch.equal(run(adapted.network), first)
    assert not torch.allclose(first, second)
    assert torch.equal(run(adapted.network), base)
    with activate(adapted, "one", trainable=True):
        trained = {name for name, parameter in adapted.peft.named_parameters() if parameter.requires_grad}
    assert trained and all("one" in name.split(".") for name in trained)
    remove_adapter(adapted, "one")
    assert not any("one" in name.split(".") for name, _ in adapted.peft.named_parameters())
    with activate(adapted, "two"):
        assert torch.equal(run(adapted.network), second)


@pytest.mark.parametrize("method", METHODS)
def test_the_distance_is_over_the_norm_of_the_base_alone(method: str) -> None:
    adapted = make(method)
    add_adapter(adapted, "one")
    disturb(adapted, "one")
    start, end = adapter_state(adapted, THETA0), adapter_state(adapted, "one")
    step = torch.cat([(end[key] - start[key]).flatten() for key in start])
    base = torch.cat([p.detach().flatten() for p in make_network("llama").parameters()])
    assert measure_distance(adapted, "one")["relative_to_model"] == pytest.approx(float(step.norm() / base.norm()))


# A pass over upper blocks alone, training, and what both cost.


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_frozen_prefix_changes_no_number(method: str, family: str) -> None:
    size = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    adapted, split = make(method, family, layers="top_half", **size), make_split("options")
    assert adapted.prefix is not None and adapted.prefix.depth == 2
    disturb(adapted)
    batch, found = collate([(split, e) for e in range(6)], 0, layout=adapted.layout), []
    for call in (lambda: score_batch(adapted.network, batch), lambda: score(adapted, batch)):
        with activate(adapted, THETA0, trainable=True):
            z = call().z
            z[torch.isfinite(z)].sum().backward()
        gradients = [p.grad.clone() for p in adapted.peft.parameters() if p.grad is not None]
        adapted.peft.zero_grad(set_to_none=True)
        found.append((z.detach(), gradients))
    assert found[0][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", NEW)
def test_choices_share_their_context_as_rows_of_their_own(method: str) -> None:
    adapted, split = make(method), make_split("options")
    assert adapted.shares_context
    disturb(adapted)
    batches = [collate([(split, e) for e in range(6)], 0, layout=layout) for layout in ("rows", "shared")]
    with torch.inference_mode():
        apart, together = (score(adapted, batch).z for batch in batches)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "ia3"])  # bottlenecks learn in a whole run of theirs
def test_it_learns_what_can_be_learnt(method: str, tmp_path: Path) -> None:
    """Random weights large enough for attention to matter."""
    adapted = make(method, initializer_range=0.15)
    train, held_out = ([make_learnable_split("options", n=16, n_choices=2, seed=seed)] for seed in (0, 1))
    config = TrainingConfig(learning_rate=0.02, num_train_epochs=3, max_examples_per_batch=8)
    before = measure_validation_nll(adapted, THETA0, held_out, max_tokens=1000)
    with Meter("train") as meter:
        trained = fine_tune(adapted, "one", train, held_out, config, seed=0, checkpoints=tmp_path / "x", meter=meter)
    assert trained.best_validation_nll < 0.97 * before
    assert meter.record.flops > 0
    assert torch.equal(run(adapted.network), run(make_network("llama", initializer_range=0.15).eval())), "theta0 stays"


def measure(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("layers", [None, (1,)], ids=["all", "top"])
@pytest.mark.parametrize(("family", "head"), FAMILIES)
@pytest.mark.parametrize("method", NEW)
def test_passes_cost_what_torch_counts(method: str, family: str, head: str, layers: Any) -> None:
    adapted = make(method, family, head=head, layers=layers)
    split = make_split("verbalizer" if head == "lm" else "classification", n=6, n_choices=3)
    batch = collate([(split, e) for e in range(6)], 0)
    layers_at_start, projector = find_active_layers(adapted, [split]), Projector("rademacher", 16, 0)
    trains_head = head != "lm"

    def train() -> None:
        cross_entropy(score(adapted, batch, meter=meters["train"]).z, batch).mean().backward()

    def take_features() -> None:
        compute_features(adapted, layers_at_start, projector, batch, "contrast", meter=meters["features"])

    meters = {name: Meter(name) for name in ("forward", "train", "features")}
    with activate(adapted, THETA0), torch.no_grad():
        true = {"forward": measure(lambda: score(adapted, batch, meter=meters["forward"]))}
    with activate(adapted, THETA0):
        true["features"] = measure(take_features)
    with activate(adapted, THETA0, trainable=True):
        true["train"] = measure(train)
    count_forward(meters["forward"], adapted.costs, batch)
    count_training(meters["train"], adapted.costs, batch)
    flops = projector.count_flops(list_parts(layers_at_start))
    count_gradients(meters["features"], adapted.costs, batch, n_backwards=2, n_outputs=12, projection_flops=flops)
    found = {name: meter.record.flops for name, meter in meters.items()}
    # A classifier's own gradients are left out, as they always were.
    tolerance = 0.04 if trains_head else 0.02
    assert found == {name: pytest.approx(count, rel=tolerance) for name, count in true.items()}


@pytest.mark.parametrize(("family", "head"), FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_sizes_are_those_of_the_tensors(method: str, family: str, head: str) -> None:
    adapted = make(method, family, head=head)
    assert adapted.costs is not None
    own = {k: t for k, t in adapter_state(adapted, THETA0).items() if any(f"{m}_" in k for m in (*METHODS, "lora"))}
    assert adapted.costs.adapter.n_parameters == sum(t.numel() for t in own.values())
    split = make_split("verbalizer" if head == "lm" else "classification")
    inner = {n: layer for n, layer in find_active_layers(adapted, [split]).items() if "modules_to_save" not in n}
    assert adapted.costs.adapter.n_output_parameters == count_coordinates(inner)


# One pass for several members.


@pytest.mark.parametrize(("method", "shares"), [("lora", True), ("ia3", True), ("bottleneck", True), ("dora", False)])
def test_which_kinds_share_a_pass(method: str, shares: bool) -> None:
    assert can_fuse(make(method)) == can_mix(make(method)) == shares
    assert not can_fuse(make(method, "bert", head="sequence_classification"))


# What is asked for.


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"method": "bottleneck", "r": 4}, "adapter: r 4 is for method lora or dora, and method is bottleneck; leave"),
        ({"method": "bottleneck", "train_A": False}, "adapter: train_A False is for method lora, and method is bottle"),
        ({"method": "dora", "train_A": False}, "train_A False is for method lora, and"),
        ({"method": "dora", "lora_dropout": 0.1}, "lora_dropout 0.1 is for method lora, and"),
        ({"method": "ia3", "lora_alpha": 1, "r": 2}, "r 2 is for method lora or dora, lora_alpha 1.0 is for method"),
        ({"reduction": 64}, "adapter: reduction 64 is for method bottleneck, and method is lora; leave that out"),
        ({"method": "prefix"}, "adapter.method: got 'prefix'"),
        ({"method": "bottleneck", "reduction": 0}, "adapter.reduction: got 0"),
        ({"method": "bottleneck", "non_linearity": "step"}, "adapter.non_linearity: got 'step'"),
    ],
)
def test_what_a_method_would_not_heed_is_refused_in_one_line(adapter: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "adapter": adapter})
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_written_config_of_any_method_reads_back_equal_with_and_without_the_papers_values(
    method: str, tmp_path: Path
) -> None:
    for compat in ("none", "paper"):
        config = parse_config({**MINIMAL, "compat": compat, "adapter": {"method": method}})
        assert (config.adapter.r, config.adapter.reduction) == (4 if compat == "paper" and "ora" in method else 8, 256)
        (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(tmp_path / "config.yaml") == config


def test_a_family_whose_scaled_modules_are_unknown_is_refused_until_they_are_named() -> None:
    network = make_network("llama")
    network.config.model_type = "unheard-of"
    base = prepare_base("tiny", network, PadOnly())  # type: ignore[arg-type]
    with pytest.raises(
        ModelError, match=r"ia3: PEFT does not know .* unheard-of to scale; name adapter.target_modules"
    ):
        attach(base, AdapterConfig(method="ia3"), seed=0)
    named = AdapterConfig(method="ia3", target_modules=("k_proj", "down_proj"), layers_to_transform=(1,))
    layers = trainable_layers(attach(base, named, seed=0), THETA0)
    assert layers.keys() == {f"model.layers.1.{name}.ia3_l" for name in ("self_attn.k_proj", "mlp.down_proj")}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_whole_sub_block_is_refused_where_linear_layers_are_wanted(method: str) -> None:
    config = AdapterConfig(method=method, target_modules=("self_attn",))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"adapter.target_modules \('self_attn',\)") as caught:
        attach(make_base(), config, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_families_without_a_cost_formula_are_adapted_too(method: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = GPTNeoXConfig(vocab_size=96, **sizes, attn_implementation="eager", pad_token_id=0)  # type: ignore[arg-type]
    network = GPTNeoXForCausalLM(config).eval()
    plain = run(copy.deepcopy(network))
    base = prepare_base("neox", network, PadOnly())  # type: ignore[arg-type]
    adapted = attach(base, AdapterConfig(method=method, **SETTINGS[method]), seed=0)  # type: ignore[arg-type]
    assert torch.equal(run(adapted.network), plain)
    assert adapted.costs is None
    check_gradients(adapted, make_split("verbalizer"), "contrast")
