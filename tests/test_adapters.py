"""Adapters on a shared base: found by structure, kept apart, and plain PEFT folders on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    activate,
    adapter_bytes,
    adapter_state,
    add_adapter,
    attach,
    is_at_start,
    load_adapter,
    measure_distance,
    remove_adapter,
    save_adapter,
    set_adapter_state,
    trainable_layers,
)
from ensemblelora.config import AdapterConfig
from ensemblelora.errors import ModelError, StoreError
from ensemblelora.models import prepare_base
from tests.tiny import DECODERS, PadOnly, disturb, make_adapted, make_base, make_network

ALL = [
    *((family, "lm") for family in DECODERS),
    ("bert", "sequence_classification"),
    ("llama", "sequence_classification"),
]
ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
    "gptj": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "bert": {"query", "key", "value", "dense"},
}
IDS = torch.tensor([[5, 9, 33, 2, 71], [8, 8, 1, 60, 3]])


def run(network: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return network(input_ids=IDS).logits


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def adapted_layers(adapted: AdaptedModel) -> set[str]:
    return {name.partition(".lora_")[0] for name in trainable_layers(adapted, THETA0) if ".lora_" in name}


@pytest.mark.parametrize(("family", "head"), ALL)
def test_attention_layers_are_found_in_every_family(family: str, head: str) -> None:
    layers = adapted_layers(make_adapted(family, head=head))
    assert {layer.rpartition(".")[2] for layer in layers} == ATTENTION[family]
    assert all("att" in layer for layer in layers), "feed-forward layers of the same last name stay as they are"
    assert len(layers) == 2 * len(ATTENTION[family])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_layers_asked_for_are_adapted(family: str) -> None:
    adapted = attach(make_base(family), AdapterConfig(layers_to_transform=(1,)), seed=0)
    assert all(".1." in layer for layer in adapted_layers(adapted))
    assert len(adapted_layers(adapted)) == len(ATTENTION[family])


def test_named_modules_are_matched_whole_and_within_the_layers_asked_for() -> None:
    config = AdapterConfig(target_modules=("q_proj", "mlp.up_proj"), layers_to_transform=(0,))
    layers = adapted_layers(attach(make_base("llama"), config, seed=0))
    assert layers == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AdapterConfig(target_modules=("q_proj", "query")),
            r"no module is named \['query'\]; auto would take .*'q_proj'",
        ),
        (AdapterConfig(layers_to_transform=(0, 7)), r"adapter.layers_to_transform: \[7\] not in 0..1"),
        (AdapterConfig(target_modules=("q_proj",), layers_to_transform=(7,)), r"layers_to_transform: \[7\]"),
        (AdapterConfig(target_modules=("lm_head",), layers_to_transform=(0,)), r"none of \['lm_head'\] is in layers"),
        (AdapterConfig(target_modules=("self_attn",)), r"adapter.target_modules \('self_attn',\)"),
    ],
)
def test_modules_that_are_not_there_are_refused_in_one_line(config: AdapterConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        attach(make_base("llama"), config, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "head"), ALL)
def test_the_start_adapter_computes_what_the_base_computes(family: str, head: str) -> None:
    plain = run(make_network(family, head=head).eval())
    torch.testing.assert_close(run(make_adapted(family, head=head).network), plain)


def test_the_start_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    base = make_base("llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    adapted = attach(base, AdapterConfig(r=4, lora_alpha=8), seed=0)
    add_adapter(adapted, "other")
    torch.testing.assert_close(torch.rand(4), expected)
    assert same(adapter_state(adapted, THETA0), adapter_state(make_adapted("llama", seed=0), THETA0))
    assert not same(adapter_state(adapted, THETA0), adapter_state(make_adapted("llama", seed=1), THETA0))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("models/tiny.gguf", "models/tiny.gguf"),
        ("somebody/model", "where it was loaded from"),  # which is its own name, or the folder's
    ],
)
def test_a_saved_adapter_names_its_base_and_no_cache_of_this_machine(name: str, written: str, tmp_path: Path) -> None:
    adapted = make_adapted()
    adapted.peft.peft_config[THETA0].base_model_name_or_path = "where it was loaded from"
    save_adapter(replace(adapted, base=replace(adapted.base, name=name)), THETA0, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == written


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize(("family", "head"), ALL)
def test_a_saved_folder_loads_with_peft_alone_and_gives_the_same_logits(family: str, head: str, tmp_path: Path) -> None:
    adapted = make_adapted(family, head=head)
    add_adapter(adapted, "group-0")
    disturb(adapted, "group-0")
    save_adapter(adapted, "group-0", tmp_path / "a")
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    alone = PeftModel.from_pretrained(make_network(family, head=head, seed=0), str(tmp_path / "a")).eval()
    with activate(adapted, "group-0"):
        ours = run(adapted.network)
    torch.testing.assert_close(run(alone), ours)
    assert not torch.allclose(ours, run(adapted.network)), "the adapter must do something, or the test proves nothing"


def test_the_same_adapter_gives_the_same_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save_adapter(make_adapted("llama"), THETA0, tmp_path / folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["inference_mode"] is True


@pytest.mark.parametrize("head", ["lm", "sequence_classification"])
def test_loading_gives_back_every_tensor_head_included(head: str, tmp_path: Path) -> None:
    adapted = make_adapted("llama", head=head)
    disturb(adapted)
    save_adapter(adapted, THETA0, tmp_path)
    fresh = make_adapted("llama", head=head)
    load_adapter(fresh, "again", tmp_path)
    assert same(adapter_state(fresh, "again"), adapter_state(adapted, THETA0))
    assert any("score" in key for key in adapter_state(fresh, "again")) == (head != "lm")


def drop_settings(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def break_settings(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def empty_settings(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def drop_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage", [drop_settings, break_settings, empty_settings, drop_weights, cut_weights, shutil.rmtree]
)
def test_a_damaged_folder_is_refused_and_nothing_is_added(damage, tmp_path: Path) -> None:
    adapted = make_adapted("llama")
    save_adapter(adapted, THETA0, tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(StoreError, match=r"adapter folder .*: (can't be read|made with peft_type None)"):
        load_adapter(adapted, "loaded", tmp_path / "a")
    assert list(adapted.peft.peft_config) == [THETA0]


def test_an_adapter_of_another_shape_or_setting_is_refused(tmp_path: Path) -> None:
    adapted = make_adapted("llama", r=4)
    save_adapter(make_adapted("llama", r=2), THETA0, tmp_path / "rank")
    with pytest.raises(StoreError, match="made with r 2, this run has 4"):
        load_adapter(adapted, "loaded", tmp_path / "rank")
    scaled = attach(make_base("llama"), AdapterConfig(r=4, lora_alpha=64), seed=0)
    save_adapter(scaled, THETA0, tmp_path / "alpha")
    with pytest.raises(StoreError, match=r"made with lora_alpha 64.0, this run has 8"):
        load_adapter(adapted, "loaded", tmp_path / "alpha")
    save_adapter(make_adapted("qwen2", hidden_size=64), THETA0, tmp_path / "model")
    with pytest.raises(StoreError, match="tensors missing, unknown or of another shape"):
        load_adapter(adapted, "loaded", tmp_path / "model")
    assert list(adapted.peft.peft_config) == [THETA0]


def test_a_missing_or_unknown_tensor_is_refused() -> None:
    adapted = make_adapted("llama")
    state = adapter_state(adapted, THETA0)
    first = next(iter(state))
    for wrong in ({key: value for key, value in state.items() if key != first}, state | {"more": state[first]}):
        with pytest.raises(StoreError, match="1 tensors missing, unknown or of another shape"):
            set_adapter_state(adapted, THETA0, wrong)


def test_a_new_adapter_starts_at_theta0_and_is_its_own() -> None:
    adapted = make_adapted("llama", head="sequence_classification")
    disturb(adapted)
    add_adapter(adapted, "new")
    start = adapter_state(adapted, THETA0)
    assert same(adapter_state(adapted, "new"), start)
    disturb(adapted, "new")
    assert same(adapter_state(adapted, THETA0), start)
    add_adapter(adapted, "new")
    assert same(adapter_state(adapted, "new"), start), "adding again sets it back"


def test_switching_changes_the_output_and_switches_back() -> None:
    adapted = make_adapted("llama")
    for seed, name in enumerate(("one", "two")):
        add_adapter(adapted, name)
        disturb(adapted, name, seed=seed)
    base = run(adapted.network)
    with activate(adapted, "one"):
        first = run(adapted.network)
        with activate(adapted, "two"):
            second = run(adapted.network)
        torch.testing.assert_close(run(adapted.network), first)
    torch.testing.assert_close(run(adapted.network), base)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, base)


def trainable(adapted: AdaptedModel) -> set[str]:
    return {name for name, parameter in adapted.peft.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("head", ["lm", "sequence_classification"])
def test_what_may_be_trained_is_restored_even_after_an_error(head: str) -> None:
    adapted = make_adapted("llama", head=head)
    before = trainable(adapted)
    add_adapter(adapted, "one")
    assert trainable(adapted) == before, "adding an adapter must not unfreeze the active one"
    with pytest.raises(RuntimeError, match="inside"), activate(adapted, "one", trainable=True):
        assert all(".one." in name for name in trainable(adapted))
        with activate(adapted, THETA0):
            assert trainable(adapted) == set()
        assert all(".one." in name for name in trainable(adapted))
        raise RuntimeError("inside")
    assert trainable(adapted) == before
    assert adapted.peft.active_adapter == THETA0


def test_removing_an_adapter_leaves_the_others() -> None:
    adapted = make_adapted("llama")
    base = run(adapted.network)
    add_adapter(adapted, "one")
    disturb(adapted, "one")
    remove_adapter(adapted, "one")
    remove_adapter(adapted, "never there")
    assert list(adapted.peft.peft_config) == [THETA0]
    torch.testing.assert_close(run(adapted.network), base)


@pytest.mark.parametrize(("family", "head"), ALL)
def test_trainable_layers_have_the_same_neutral_names_for_every_adapter(family: str, head: str) -> None:
    adapted = make_adapted(family, head=head)
    add_adapter(adapted, "group-1")
    first, second = trainable_layers(adapted, THETA0), trainable_layers(adapted, "group-1")
    assert first.keys() == second.keys()
    assert not any(THETA0 in name or "group-1" in name for name in [*first, *second])
    n_bytes = sum(4 * p.numel() for module in first.values() for p in module.parameters())
    assert adapter_bytes(adapted) == n_bytes


def test_distance_is_the_norm_of_the_step() -> None:
    adapted = make_adapted("llama")
    add_adapter(adapted, "one")
    disturb(adapted, "one")
    start, end = adapter_state(adapted, THETA0), adapter_state(adapted, "one")
    step = torch.cat([(end[key] - start[key]).flatten() for key in start])
    init = torch.cat([value.flatten() for value in start.values()])
    base = torch.cat([p.detach().flatten() for p in make_network("llama").parameters()])
    distance = measure_distance(adapted, "one")
    assert distance["absolute"] == pytest.approx(float(step.norm()), rel=1e-5)
    assert distance["relative_to_model"] == pytest.approx(float(step.norm() / base.norm()), rel=1e-5)
    assert distance["relative_to_adapter_init"] == pytest.approx(float(step.norm() / init.norm()), rel=1e-5)
    assert measure_distance(adapted, THETA0)["absolute"] == 0.0


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_adapters_and_heads_are_float32_on_a_bfloat16_base(family: str) -> None:
    network = make_network(family, head="sequence_classification").bfloat16()
    base = prepare_base("low", network, PadOnly(), head="sequence_classification")  # type: ignore[arg-type]
    adapted = attach(base, AdapterConfig(r=4, lora_alpha=8), seed=0)
    add_adapter(adapted, "one")
    assert {tensor.dtype for tensor in adapter_state(adapted, "one").values()} == {torch.float32}
    small = {key: tensor + 1e-4 for key, tensor in adapter_state(adapted, "one").items()}
    set_adapter_state(adapted, "one", small)
    assert same(adapter_state(adapted, "one"), small), "bfloat16 would have swallowed a small step"
    with activate(adapted, "one"):
        np.testing.assert_allclose(
            run(adapted.network).float(), run(make_adapted(family, head="sequence_classification").network), atol=0.02
        )


@pytest.mark.parametrize(("family", "head"), [("llama", "lm"), ("bert", "sequence_classification")])
def test_an_adapter_is_at_its_start_until_any_of_it_moves(family: str, head: str) -> None:
    adapted = make_adapted(family, head=head)
    add_adapter(adapted, "group-0")
    add_adapter(adapted, "group-1")
    assert is_at_start(adapted, "group-0") and is_at_start(adapted, THETA0)
    disturb(adapted, "group-0")
    assert not is_at_start(adapted, "group-0") and is_at_start(adapted, "group-1")
