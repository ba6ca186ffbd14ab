"""Base models in 4 bits: what is packed, and that everything downstream sees the dequantised model's own function.

The slow twin of a packed model is the same model with its weights unpacked beforehand: a plain float network.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ensemblelora import doctor, pipeline, quantization, stages
from ensemblelora.accounting.meter import Meter, StageRecord
from ensemblelora.adapters import THETA0, AdaptedModel, activate, adapter_state, attach, measure_distance
from ensemblelora.api import load_run
from ensemblelora.config import AdapterConfig, GradientsConfig, ModelConfig, TrainingConfig
from ensemblelora.counting import count_forward, count_generation, count_gradients, count_lower, count_training
from ensemblelora.data.batching import collate
from ensemblelora.errors import MissingExtraError, ModelError
from ensemblelora.exporting import export_run
from ensemblelora.exporting.notes import BaseNote, describe_fold
from ensemblelora.forecast import forecast_run
from ensemblelora.gradients.collect import find_active_layers, make_projector
from ensemblelora.gradients.health import check_health
from ensemblelora.models import BaseModel, find_blocks, load_base, prepare_base
from ensemblelora.passes import score
from ensemblelora.prediction import predict_members
from ensemblelora.quantization import (
    count_numbers,
    count_weight_bytes,
    dequantize_layers,
    dequantize_weight,
    find_packed_layers,
    list_tensors,
)
from ensemblelora.scoring import score_batch
from ensemblelora.speed import measure_speed
from ensemblelora.training import fine_tune
from tests.gguf_files import write_gguf
from tests.test_collect import autograd_features, hook_features
from tests.tiny import make_learnable_split, make_network, make_split
from tests.tiny_run import TASKS, make_inputs, read_config, read_json, tensors_of
from tests.toys import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

INSTALL = r"run: pip install 'ensemblelora\[quantization\]'"
KINDS = {"lm": "verbalizer", "sequence_classification": "classification"}
TRAINING = TrainingConfig(learning_rate=1e-2, num_train_epochs=2, max_examples_per_batch=8)
NAME = "group-0"


def make_wide_network(family: str = "llama", **options: Any) -> PreTrainedModel:
    """Random weights, large enough for attention to matter, in rows of whole runs of 64."""
    width = {"n_embd": 64} if family.startswith("gpt") else {"hidden_size": 64, "intermediate_size": 128}
    options = {"vocab_size": len(load_tokenizer()), "initializer_range": 0.15} | width | options
    return make_network(family, **options)


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models in full precision, made when first asked for."""

    @cache
    def once(family: str = "llama", head: str = "lm", **sizes: int) -> Path:
        folder = tmp_path_factory.mktemp(family)
        network = make_wide_network(family, head=head, **sizes)
        network.save_pretrained(folder)
        load_tokenizer().save_pretrained(folder)
        return folder

    return once


def load(folder: Path, *, head: str = "lm", quantization: str = "nf4", dtype: str = "float32", **options) -> BaseModel:
    config = ModelConfig(name=str(folder), dtype=dtype, device="cpu", quantization=quantization, **options)
    return load_base(config, head=head, n_labels=3)


def unpack(base: BaseModel) -> BaseModel:
    """The slow twin: the same weights as plain numbers."""
    network = copy.deepcopy(base.model)
    dequantize_layers(network)
    return prepare_base(base.name, network, base.tokenizer, head=base.head)


def adapt(base: BaseModel, **adapter: Any) -> AdaptedModel:
    return attach(base, AdapterConfig(**adapter or {"r": 4, "lora_alpha": 8}), seed=0)


def pair(folder: Path, *, adapter: dict[str, Any] | None = None, **options: Any) -> tuple[AdaptedModel, AdaptedModel]:
    """An adapted model on packed weights, and its twin."""
    base = load(folder, **options)
    twin = unpack(base)
    return adapt(base, **adapter or {}), adapt(twin, **adapter or {})


CASES = [
    ("llama", "lm", {"lm_head"}),
    ("gptj", "lm", {"lm_head"}),
    ("gpt2", "lm", {"lm_head"}),
    ("llama", "sequence_classification", {"score"}),
    ("bert", "sequence_classification", {"classifier", "bert.pooler.dense"}),
]


@pytest.mark.parametrize(("family", "head", "kept"), CASES)
def test_every_linear_layer_of_the_blocks_is_packed_and_no_other_tensor(family, head, kept, save) -> None:
    base = load(save(family, head), head=head)
    prefix, blocks = find_blocks(base.model)
    linears = {name for name, module in base.model.named_modules() if isinstance(module, torch.nn.Linear)}
    packed = set(find_packed_layers(base.model))
    assert {name for name in linears if name.startswith(prefix)} == packed != set()
    assert linears - packed == kept
    assert len(packed) % len(blocks) == 0, "every block alike"
    others = {name: p for name, p in base.model.named_parameters() if name.removesuffix(".weight") not in packed}
    assert {p.dtype for p in others.values()} == {torch.float32}
    plain = load(save(family, head), head=head, quantization="none").model
    for name, parameter in others.items():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=0, atol=0)
    assert sum(map(count_numbers, base.model.parameters())) == sum(p.numel() for p in plain.parameters())


def round_to_codes(weight: np.ndarray, codes: np.ndarray, *, size: int = 64) -> np.ndarray:
    """The slow twin of packing: every run of 64 weights over its largest magnitude, each to the nearest code."""
    rounded = []
    for start in range(0, weight.size, size):
        block = weight.reshape(-1)[start : start + size]
        scale = np.abs(block).max()
        nearest = np.abs(block[:, None] / scale - codes).argmin(axis=1)
        rounded.append(codes[nearest] * scale)
    return np.concatenate(rounded).reshape(weight.shape)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_rounded_to_sixteen_levels_of_a_scale_for_every_64(family, save) -> None:
    base = load(save(family), bnb_4bit_use_double_quant=False)
    plain, doubled = load(save(family), quantization="none").model, load(save(family)).model
    for name, layer in find_packed_layers(base.model).items():
        codes = layer.weight.quant_state.code.numpy()
        assert len(codes) == 16 and codes.min() == -1 and codes.max() == 1
        weight = plain.get_submodule(name).weight
        weight = (weight.T if family == "gpt2" else weight).detach().numpy()
        expected = round_to_codes(weight, codes)
        found = dequantize_weight(layer.weight).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        assert 0.05 < np.linalg.norm(found - weight) / np.linalg.norm(weight) < 0.12
        twice = dequantize_weight(doubled.get_submodule(name).weight).numpy()
        assert 0 < np.abs(twice - found).max() < 0.02 * np.abs(weight).max(), "scales in 8 bits"


def test_bytes_are_those_that_bitsandbytes_keeps(save) -> None:
    folder = save(hidden_size=128, intermediate_size=256)
    plain, single, double = (
        load(folder, quantization=kind, bnb_4bit_use_double_quant=twice).model
        for kind, twice in (("none", False), ("nf4", False), ("nf4", True))
    )
    n_packed = sum(count_numbers(layer.weight) for layer in find_packed_layers(single).values())
    sizes = [sum(map(count_weight_bytes, model.parameters())) for model in (plain, single, double)]
    n_layers, table = len(find_packed_layers(single)), 16 * 4
    fixed = [n_layers * (table + n) for n in (200, 1500)]  # tables of codes, and a few words on the format
    assert 0 < sizes[0] - sizes[1] - n_packed * (4 - 4.5 / 8) + fixed[0] < fixed[0]
    assert 0 < sizes[0] - sizes[2] - n_packed * (4 - (4 + 8 / 64 + 32 / 64 / 256) / 8) + fixed[1] < fixed[1]


def test_the_fingerprint_sees_codes_scales_and_the_kind_of_packing(save, tmp_path: Path) -> None:
    base = load(save())
    assert load(save()).fingerprint == base.fingerprint
    seen = {base.fingerprint, load(save(), quantization="none").fingerprint}
    seen.add(load(save(), bnb_4bit_use_double_quant=False).fingerprint)
    seen.add(load(save(), dtype="bfloat16").fingerprint)
    # Twice the weights have the same codes; only their scales tell them apart.
    network = make_wide_network()
    network.model.layers[1].mlp.up_proj.weight.data *= 2
    network.save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    doubled = load(tmp_path)
    assert torch.equal(doubled.model.model.layers[1].mlp.up_proj.weight, base.model.model.layers[1].mlp.up_proj.weight)
    seen.add(doubled.fingerprint)
    base.model.model.layers[0].self_attn.q_proj.weight.data[5] ^= 1
    seen.add(prepare_base(base.name, base.model, base.tokenizer).fingerprint)
    assert len(seen) == 6


def test_packing_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    # 32,768 scales or more: torch adds up so many in parts.
    network = make_wide_network(hidden_size=1024, intermediate_size=2560, num_hidden_layers=1)
    network.save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    n_threads, prints = torch.get_num_threads(), set()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            prints.add(load(tmp_path).fingerprint)
            assert torch.get_num_threads() == n, "set back"
    finally:
        torch.set_num_threads(n_threads)
    assert len(prints) == 1


def test_passes_leave_the_weights_as_they_are(save) -> None:
    adapted = adapt(load(save()))
    before, split = adapted.base.fingerprint, make_split("verbalizer")
    with torch.inference_mode():
        score_batch(adapted.network, collate([(split, 0)], 0))
    hook_features(adapted, split, "contrast")
    predict_members(adapted, split, [THETA0], max_tokens=200)
    tensors = {name: tensor for name, tensor in list_tensors(load(save()).model)}
    found = dict(list_tensors(adapted.peft.unload()))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert prepare_base(adapted.base.name, adapted.base.model, adapted.base.tokenizer).fingerprint == before


METHODS = [
    ("llama", "lm", {"r": 4, "lora_alpha": 8}),
    ("gpt2", "lm", {"r": 4}),
    ("bert", "sequence_classification", {"r": 4}),
    ("llama", "lm", {"method": "bottleneck", "reduction": 8}),
    ("llama", "lm", {"method": "dora", "r": 4}),
    ("llama", "lm", {"method": "ia3"}),
]


@pytest.mark.parametrize(("family", "head", "adapter"), METHODS)
def test_hooks_equal_the_unpacked_twin_and_autograd(family, head, adapter, save) -> None:
    packed, twin = pair(save(family, head), head=head, adapter=adapter)
    split = make_split(KINDS[head])
    predict_members(packed, split, [THETA0], max_tokens=200)  # gradients come after passes without any
    fast, expected = hook_features(packed, split, "contrast"), hook_features(twin, split, "contrast")
    scale = np.abs(expected.features).max()
    np.testing.assert_allclose(fast.outputs, expected.outputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fast.features, expected.features, rtol=1e-4, atol=1e-5 * scale)
    if adapter.get("method") in (None, "bottleneck"):  # linear layers alone are trained
        outputs, gradients = autograd_features(packed, split, "contrast")
        np.testing.assert_allclose(fast.outputs, outputs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fast.features, gradients, rtol=1e-4, atol=1e-5 * scale)


def test_features_do_not_depend_on_the_batch_and_their_rounding_is_measured(save) -> None:
    split = make_split("options", n=8)
    for dtype in ("float32", "bfloat16"):
        adapted = adapt(load(save(), dtype=dtype))
        layers = find_active_layers(adapted, [split])
        before = [tensor.clone() for _, tensor in list_tensors(adapted.network)]
        projector = make_projector(GradientsConfig(proj_type="none"), seed=0)
        with activate(adapted, THETA0):
            health = check_health(adapted, layers, projector, [(split, "contrast")], 200)
        assert health.batch_error < (1e-5 if dtype == "float32" else 1e-2)
        assert (health.precision_cosine is None) == (dtype == "float32")
        assert health.precision_cosine is None or 0.98 < health.precision_cosine < 1
        after = [tensor for _, tensor in list_tensors(adapted.network)]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))


def tune(adapted: AdaptedModel, folder: Path, config: TrainingConfig = TRAINING, meter: Meter | None = None):
    train = [make_learnable_split("verbalizer", n=24, task="a", split="train")]
    validation = [make_learnable_split("verbalizer", n=16, seed=9, task="a", split="validation")]
    meter = meter or Meter("train")
    return fine_tune(adapted, NAME, train, validation, config, seed=0, checkpoints=folder / "scratch", meter=meter)


def test_training_takes_the_steps_it_would_take_on_the_unpacked_weights(save, tmp_path: Path) -> None:
    packed, twin = pair(save())
    recomputing = adapt(load(save()))
    tune(packed, tmp_path)
    tune(twin, tmp_path)
    tune(recomputing, tmp_path, TRAINING.model_copy(update={"gradient_checkpointing": True}))
    expected = adapter_state(twin, NAME)
    for other in (packed, recomputing):
        for key, tensor in adapter_state(other, NAME).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)
    moved, by_twin = measure_distance(packed, NAME), measure_distance(twin, NAME)
    assert moved == pytest.approx(by_twin, rel=1e-3)
    assert moved["absolute"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler and bitsandbytes call old code of torch
def test_a_compiled_model_takes_the_same_steps(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: make(self, backend="eager", **options))
    plain, compiled = adapt(load(save())), adapt(load(save()))
    tune(plain, tmp_path)
    tune(compiled, tmp_path, TRAINING.model_copy(update={"compile": True}))
    expected = adapter_state(plain, NAME)
    for key, tensor in adapter_state(compiled, NAME).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)


class UnpackingCounter(TorchDispatchMode):
    """Counts the weights that bitsandbytes unpacks."""

    def __init__(self) -> None:
        super().__init__()
        self.n_weights = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "gemm_4bit" in str(function):
            self.n_weights += int(np.prod(args[2]))
        if "dequantize_4bit" in str(function):
            self.n_weights += int(np.prod(args[4]))
        return function(*args, **(kwargs or {}))


def test_flops_are_those_of_lora_and_unpacking_is_counted_apart(save) -> None:
    packed, plain = adapt(load(save())), adapt(load(save(), quantization="none"))
    split = make_split("verbalizer")
    batch = collate([(split, e) for e in range(split.n_examples)], 0)
    meters = []
    for adapted in (packed, plain):
        meter = Meter("any")
        count_lower(meter, adapted.costs, batch)
        count_forward(meter, adapted.costs, batch, times=3, n_passes=1)
        count_training(meter, adapted.costs, batch)
        count_gradients(meter, adapted.costs, batch, n_backwards=2, n_outputs=12, projection_flops=7)
        count_generation(meter, adapted.costs, [5, 7], n_steps=4, times=2)
        meters.append(meter.record)
    assert meters[0].flops == meters[1].flops > 0
    assert meters[1].dequantization_flops == 0
    n_weights = sum(count_numbers(layer.weight) for layer in find_packed_layers(packed.base.model).values())
    assert meters[0].dequantization_flops == (1 + 2 + 3 + 8) * n_weights
    with activate(packed, THETA0, trainable=True), UnpackingCounter() as forward:
        z = score(packed, batch).z
    with UnpackingCounter() as backward:
        z.sum().backward()
    assert forward.n_weights == n_weights
    block = packed.network.model.layers[0].self_attn
    spared = sum(count_numbers(getattr(block, name).base_layer.weight) for name in ("q_proj", "k_proj", "v_proj"))
    assert backward.n_weights == n_weights - spared, "the lowest block's input needs no gradient"


def test_a_missing_package_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"model.quantization nf4: .*bitsandbytes is not installed; {INSTALL}"):
        load(tmp_path / "nowhere")
    recipe = make_inputs(tmp_path)
    monkeypatch.setattr("ensemblelora.stages.request.load_tasks", lambda *a, **k: pytest.fail("rows were read"))
    with pytest.raises(MissingExtraError, match=INSTALL):
        pipeline.run(read_config(recipe, model={"quantization": "nf4"}))


def save_packed(folder: Path, target: Path, **settings) -> Path:
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=packing, device_map="cpu").save_pretrained(target)
    load_tokenizer().save_pretrained(target)
    return target


def test_files_that_are_packed_already_are_taken_as_they_are(save, tmp_path: Path, monkeypatch) -> None:
    folder = save_packed(save(), tmp_path / "packed", bnb_4bit_use_double_quant=True)
    again, ours = load(folder, quantization="none"), load(save())
    for name, layer in find_packed_layers(ours.model).items():
        torch.testing.assert_close(
            dequantize_weight(again.model.get_submodule(name).weight), dequantize_weight(layer.weight)
        )
        assert again.model.get_submodule(name).support_avx512bf16_for_cpu is False
    with pytest.raises(ModelError, match=r"in 4 bits already \(nf4\); set model.quantization to none"):
        load(folder)
    monkeypatch.setattr(quantization, "_is_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=f"its files are in 4 bits, .*; {INSTALL}"):
        load(folder, quantization="none")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq; give a model in full precision, with model.quantiz"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"quantised by LLM.int8\(\); give a model in full"),
    ],
)
def test_other_ways_to_quantise_are_refused_before_the_weights_are_read(own, message, save, tmp_path: Path) -> None:
    network = make_wide_network()
    network.config.quantization_config = own
    network.config.save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, quantization="none")


def test_weights_that_bitsandbytes_has_rearranged_are_refused(save) -> None:
    base = load(save())
    layer = base.model.model.layers[0].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ModelError, match=r"layers.0.mlp.up_proj was rearranged by bitsandbytes in a pass; load it anew"
    ):
        prepare_base(base.name, base.model, base.tokenizer)


def test_widths_that_a_processor_unpacks_wrongly_are_refused(tmp_path: Path) -> None:
    network = make_wide_network(intermediate_size=96)
    network.save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"down_proj reads 96 numbers, no multiple of 64.*set model.quantization"):
        load(tmp_path)


def test_a_gguf_file_is_packed_after_its_conversion(tmp_path: Path, empty_cache: Path, capfd) -> None:
    network = make_wide_network()
    write_gguf(tmp_path / "tiny.gguf", network)
    network.save_pretrained(tmp_path / "plain")
    load_tokenizer().save_pretrained(tmp_path / "plain")
    capfd.readouterr()
    base, plain = load(tmp_path / "tiny.gguf"), load(tmp_path / "plain")
    assert capfd.readouterr() == ("", ""), "loading is silent"
    for name, layer in find_packed_layers(plain.model).items():
        torch.testing.assert_close(base.model.get_submodule(name).weight, layer.weight, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_an_unpacked_model_is_saved_and_loaded_as_any_other(family, save, tmp_path: Path) -> None:
    head = "sequence_classification" if family == "bert" else "lm"
    base = load(save(family, head), head=head)
    twin = unpack(base)
    twin.model.save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    again = load(tmp_path, head=head, quantization="none")
    assert not find_packed_layers(twin.model) and not hasattr(again.model.config, "quantization_config")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (base.model, twin.model, again.model)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    torch.testing.assert_close(logits[1], logits[2], rtol=0, atol=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a finished run on a base in 4 bits, wide enough for bitsandbytes' own kernels."""
    folder = tmp_path_factory.mktemp("run")
    recipe = make_inputs(folder)
    network = make_wide_network()
    network.save_pretrained(folder / "model")
    pipeline.run(read_config(recipe, model={"quantization": "nf4"}))
    return recipe


def test_the_whole_method_runs_on_a_base_in_4_bits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.parent
    model = read_json(folder, "environment.json")["model"]
    network = make_wide_network()
    assert model["n_parameters"] == sum(p.numel() for p in network.parameters())
    assert model["weight_bytes"] < 4 * model["n_parameters"]
    assert model["quantization"]["bnb_4bit_use_double_quant"] is True
    stages = {record["stage"]: record for record in read_json(folder, "costs.json")["stages"]}
    for name in ("features", "train", "boost", "combine", "evaluate"):
        assert stages[name]["dequantization_flops"] > 0, name
        assert stages[name]["flops"] > stages[name]["dequantization_flops"], name
    before = tensors_of(folder)
    monkeypatch.setattr(Meter, "add_tokens", lambda *a: pytest.fail("a finished stage ran again"))
    pipeline.run(read_config(run, model={"quantization": "nf4"}))
    assert tensors_of(folder) == before


def test_unpacking_is_foreseen_in_operations_and_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(run, model={"quantization": "nf4"})
    _, rows, probe = stages.prepare(config)
    found = forecast_run(config, probe, rows)
    spent = {record["stage"]: record for record in read_json(run.parent, "costs.json")["stages"]}
    for stage in ("features", "baselines"):
        assert found[stage].dequantization_flops == spent[stage]["dequantization_flops"] > 0
    assert found["total"].dequantization_flops == sum(found[s].dequantization_flops for s in found if s != "total")
    measured = measure_speed(probe, rows.train, 200)
    assert 0 < measured.unpacking < math.inf
    passes = StageRecord("", flops=10**9), StageRecord("", flops=10**9, dequantization_flops=10**8)
    with_it, without = (replace(measured, unpacking=rate).predict_seconds(*passes) for rate in (1e8, math.inf))
    assert with_it == pytest.approx(without + 1.0)


def test_a_finished_run_answers_questions(run: Path) -> None:
    answers = load_run(run.parent / "run").predict(TASKS[0], ["one two three", "four"])
    assert all(sum(answer.probabilities.values()) == pytest.approx(1) for answer in answers)


def follow_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run the code that an export's README shows, and give what it defines."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    monkeypatch.chdir(folder)
    exec(code, names)
    return names


def test_an_export_says_how_to_load_the_packed_base_and_merges_into_unpacked_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        kind: export_run(run.parent / "run", tmp_path / kind, format=kind, tolerance=100)
        for kind in ("peft", "folded", "merged")
    }
    models = {kind: follow_readme(export.folder, monkeypatch) for kind, export in made.items()}
    for kind in ("peft", "folded"):
        assert any(isinstance(module, Linear4bit) for module in models[kind]["model"].modules())
        quantization.settle_layers(models[kind]["base"])
    assert find_packed_layers(models["merged"]["model"]) == {}
    assert "merged into the dequantised weights" in (made["merged"].folder / "README.md").read_text(encoding="utf-8")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        logits = {kind: names["model"].eval()(input_ids=ids).logits for kind, names in models.items()}
    exact = export_run(run.parent / "run", tmp_path / "exact", format="folded", rank=made["merged"].rank, tolerance=100)
    with torch.no_grad():
        stacked = PeftModel.from_pretrained(load(run.parent / "model").model, exact.folder)(input_ids=ids).logits
    torch.testing.assert_close(logits["merged"], stacked, rtol=1e-4, atol=1e-4)
    assert (logits["folded"] - logits["peft"]).abs().max() > 1e-4, "members differ"
    assert [c.nll_folded for c in made["merged"].tasks] == pytest.approx([c.nll_folded for c in exact.tasks], abs=1e-4)


def test_the_readme_of_a_packed_gguf_base_uses_this_package(tmp_path: Path) -> None:
    note = BaseNote("m.gguf", "m.gguf", "float32", "lm", 2, {"bnb_4bit_quant_type": "nf4"}, is_packed_on_loading=True)
    shown = describe_fold(note, {"group-0": 1.0}, [["task"], ["a"]], 0)
    call = 'ModelConfig(name="m.gguf", dtype="float32", quantization="nf4", bnb_4bit_use_double_quant=False)'
    assert f"base = load_base({call}).model" in shown
    assert "gguf_file" not in shown


def test_the_doctor_packs_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> doctor.Finding:
        return {finding.name: finding for finding in doctor.examine(self_test=False)}["4-bit bases"]

    monkeypatch.setattr(doctor, "_find_caches", lambda: ())  # of the user's; they may be large
    assert (find().state, find().remedy) == ("ok", "")
    assert re.search(r"^bitsandbytes \d.*; a weight packed and unpacked is off by (8|9|10)%$", find().detail)

    def fail(device: torch.device) -> float:
        raise OSError("no such library")

    monkeypatch.setattr(quantization, "measure_packing_error", fail)
    assert find().state == "note" and "does not work here: no such library" in find().detail
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: version("nothing" if name == "bitsandbytes" else name)
    )
    assert find().state == "note" and re.search("pip install 'ensemblelora.quantization.'", find().remedy)
