"""Formulas agree with torch's own counter; meters measure; ledgers add up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    Qwen2Config,
)

from ensemblelora.accounting import formulas
from ensemblelora.accounting.adapter_shapes import AdapterShape, bottleneck_shape, lora_shape, scaling_shape
from ensemblelora.accounting.formulas import Workload
from ensemblelora.accounting.meter import Ledger, Meter, MethodCosts, StageRecord
from ensemblelora.accounting.shapes import ModelShape, model_shape
from ensemblelora.bottleneck import BottleneckConfig
from ensemblelora.errors import ModelError, StoreError

N_ROWS, WIDTH, N_LABELS, RANK, VOCAB = 3, 20, 3, 4, 150
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 64}
WIDE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, **WIDE, num_key_value_heads=2, head_dim=12),
    "qwen2": lambda: Qwen2Config(**SIZES, **WIDE, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(**GPT, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gptj": lambda: GPTJConfig(**GPT, rotary_dim=4),
    "bert": lambda: BertConfig(**SIZES, **WIDE, id2label=dict.fromkeys(range(N_LABELS), "x")),
}
ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "bert": ["query", "key", "value", "attention.output.dense"],
}
SINGLES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["k_proj", "up_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "gptj": ["q_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
    "bert": ["query", "value", "intermediate.dense"],
}


def build(family: str) -> tuple[nn.Module, ModelShape]:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    maker = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    model: nn.Module = maker.from_config(config, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    return model, model_shape(config.to_dict())


def attach(model: nn.Module, targets: list[str], layers: list[int] | None = None) -> nn.Module:
    is_conv1d = model.config.model_type == "gpt2"  # type: ignore[union-attr]
    settings = LoraConfig(r=RANK, target_modules=targets, layers_to_transform=layers, fan_in_fan_out=is_conv1d)
    return wrap(model, settings)


def wrap(model: nn.Module, settings: PeftConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name it is about to drop
        adapted: nn.Module = get_peft_model(model, settings).get_base_model()
    return adapted


def full_names(model: nn.Module, target: str, layer: int) -> list[str]:
    names = [name for name, _ in model.named_modules() if re.search(rf"\.{layer}\.(.*\.)?{re.escape(target)}$", name)]
    assert names
    return names


def run_forward(model: nn.Module) -> Tensor:
    """Score the last two positions of every row, or every row by its classifier."""
    ids = torch.arange(N_ROWS * WIDTH).reshape(N_ROWS, WIDTH) % VOCAB
    if hasattr(model, "classifier"):
        logits: Tensor = model(input_ids=ids).logits
        return logits
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
    scored: Tensor = model.get_output_embeddings()(hidden[:, -2:].reshape(2 * N_ROWS, -1))  # type: ignore[operator]
    return scored


def work_of(family: str) -> Workload:
    n_logits = N_ROWS * N_LABELS if family == "bert" else 2 * N_ROWS * VOCAB
    return formulas.measure_workload([WIDTH] * N_ROWS, n_logits=n_logits)


def count(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def train_step(model: nn.Module) -> None:
    run_forward(model).square().sum().backward()


def agrees(formula: int, counted: int) -> bool:
    # 2 % is the promise; what is really left out (rotary angles) is far smaller.
    return formula == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("family", CONFIGS)
def test_forward_agrees_with_torch(family: str) -> None:
    model, shape = build(family)
    with torch.no_grad():
        counted = count(lambda: run_forward(model))
    assert agrees(formulas.count_forward_flops(shape, work_of(family)), counted)


@pytest.mark.parametrize("family", CONFIGS)
def test_full_training_step_agrees_with_torch(family: str) -> None:
    model, shape = build(family)
    assert agrees(formulas.count_full_step_flops(shape, work_of(family)), count(lambda: train_step(model)))


@pytest.mark.parametrize("layers", [None, [1, 2], [2], [0], [0, 2]], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_adapter_forward_and_step_agree_with_torch(family: str, layers: list[int] | None) -> None:
    model, shape = build(family)
    adapter = lora_shape(shape, RANK, ATTENTION[family], layers=layers)
    adapted = attach(model, ATTENTION[family], layers)
    work = work_of(family)
    with torch.no_grad():
        forward = count(lambda: run_forward(adapted))
    assert agrees(formulas.count_forward_flops(shape, work, adapter), forward)
    assert agrees(formulas.count_training_step_flops(shape, work, adapter), count(lambda: train_step(adapted)))


@pytest.mark.parametrize(("family", "target"), [(family, target) for family in SINGLES for target in SINGLES[family]])
def test_one_adapted_matrix_stops_the_backward_pass_where_torch_stops(family: str, target: str) -> None:
    model, shape = build(family)
    adapter = lora_shape(shape, RANK, [target], layers=[1])
    adapted = attach(model, [target], [1])
    counted = count(lambda: train_step(adapted))
    assert agrees(formulas.count_training_step_flops(shape, work_of(family), adapter), counted)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", "self_attn.o_proj"),
        ("llama", "mlp.down_proj"),
        ("llama", "self_attn"),
        ("llama", "mlp"),
        ("llama", "k_proj"),
        ("llama", "gate_proj"),
        ("gpt2", "attn.c_proj"),
        ("gpt2", "mlp"),
        ("gptj", "out_proj"),
        ("gptj", "fc_out"),
        ("bert", "attention.output.dense"),
        ("bert", "intermediate.dense"),
    ],
)
def test_one_bottleneck_costs_what_torch_counts(family: str, target: str) -> None:
    model, shape = build(family)
    names = full_names(model, target, 1)
    adapter, work = bottleneck_shape(shape, 4, names), work_of(family)
    assert adapter == bottleneck_shape(shape, 4, [target], layers=[1])
    adapted = wrap(model, BottleneckConfig(target_modules=names, reduction=4))
    with torch.no_grad():
        forward = count(lambda: run_forward(adapted))
    assert agrees(formulas.count_forward_flops(shape, work, adapter), forward)
    assert agrees(formulas.count_training_step_flops(shape, work, adapter), count(lambda: train_step(adapted)))
    trained = [p.numel() for p in adapted.parameters() if p.requires_grad]
    assert adapter.n_parameters == sum(trained)


@pytest.mark.parametrize("scales_input", [True, False])
@pytest.mark.parametrize("target", ["self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_one_scaling_vector_costs_what_torch_counts(target: str, scales_input: bool) -> None:
    model, shape = build("llama")
    names = full_names(model, target, 1)
    inputs, work = names if scales_input else [], work_of("llama")
    adapter = scaling_shape(shape, names, scaled_inputs=inputs)
    adapted = wrap(model, IA3Config(target_modules=names, feedforward_modules=inputs))
    with torch.no_grad():
        forward = count(lambda: run_forward(adapted))
    assert agrees(formulas.count_forward_flops(shape, work, adapter), forward)
    assert agrees(formulas.count_training_step_flops(shape, work, adapter), count(lambda: train_step(adapted)))
    trained = [p.numel() for p in adapted.parameters() if p.requires_grad]
    assert adapter.n_parameters == adapter.n_output_parameters == sum(trained)


def test_a_trained_classifier_is_counted() -> None:
    model, shape = build("bert")
    adapter = lora_shape(shape, RANK, ATTENTION["bert"])
    adapted = attach(model, ATTENTION["bert"])
    plain = count(lambda: train_step(adapted))
    adapted.classifier.weight.requires_grad_(True)  # type: ignore[union-attr]
    more = count(lambda: train_step(adapted)) - plain
    work = work_of("bert")
    assert more == 2 * 32 * N_ROWS * N_LABELS
    with_head = formulas.count_training_step_flops(shape, work, adapter, trains_head=True)
    assert with_head - formulas.count_training_step_flops(shape, work, adapter) == more


def collect_projected_gradients(model: nn.Module, n_backwards: int, proj_dim: int) -> None:
    """The gradient pass as the features stage makes it: B's outputs as leaves, one outer product a row."""
    projected = []

    def after_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        output = output if output.requires_grad else output.detach().requires_grad_(True)

        def on_backward(delta: Tensor) -> None:
            rows = torch.einsum("bto,bti->boi", delta, x).flatten(1)
            projected.append(rows @ torch.zeros(rows.shape[1], proj_dim))

        output.register_hook(on_backward)
        return output

    for name, module in model.named_modules():
        if "lora_B." in name:
            module.register_forward_hook(after_forward)
    model.requires_grad_(False)
    outputs = run_forward(model)
    for k in range(n_backwards):
        outputs[:, k].sum().backward(retain_graph=k < n_backwards - 1)
    assert projected


@pytest.mark.parametrize("n_backwards", [1, 2])
@pytest.mark.parametrize("layers", [None, [1, 2]], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_gradient_pass_agrees_with_torch(family: str, layers: list[int] | None, n_backwards: int) -> None:
    model, shape = build(family)
    adapter = lora_shape(shape, RANK, ATTENTION[family], layers=layers)
    adapted = attach(model, ATTENTION[family], layers)
    counted = count(lambda: collect_projected_gradients(adapted, n_backwards, 16))
    expected = formulas.count_gradient_pass_flops(
        shape,
        work_of(family),
        adapter,
        n_backwards=n_backwards,
        n_outputs=N_ROWS * n_backwards,
        projection_flops=2 * adapter.n_output_parameters * 16,
    )
    assert agrees(expected, counted)


@pytest.mark.parametrize(("n_rows", "n_coordinates"), [(40, 3000), (1, 7), (64, 64)])
def test_inner_products_cost_half_of_a_product_with_all_pairs(n_rows: int, n_coordinates: int) -> None:
    rows = torch.zeros(n_rows, n_coordinates)
    whole = count(lambda: rows @ rows.T) + count(lambda: rows @ rows[:1].T)  # each pair twice, and the diagonal once
    assert formulas.count_gram_flops(n_rows, n_coordinates) == whole // 2 + n_rows**3 // 3


@pytest.mark.parametrize("family", CONFIGS)
def test_parameter_counts_are_the_models_own(family: str) -> None:
    model, shape = build(family)
    in_block = re.compile(r"\.(layers|layer|h)\.\d")
    matrices = [p.numel() for name, p in model.named_parameters() if p.ndim == 2 and in_block.search(name)]
    assert shape.block_parameters == sum(matrices)
    embedding = model.get_input_embeddings().weight.numel()  # type: ignore[operator]
    assert shape.n_parameters == sum(matrices) + embedding
    adapter = lora_shape(shape, RANK, ATTENTION[family], layers=[0, 2])
    adapted = attach(model, ATTENTION[family], [0, 2])
    sizes = {name: p.numel() for name, p in adapted.named_parameters() if "lora_" in name}
    assert adapter.n_parameters == sum(sizes.values())
    assert adapter.n_output_parameters == sum(n for name, n in sizes.items() if "lora_B" in name)
    assert adapter.n_bytes() == 4 * adapter.n_parameters


def test_the_rules_of_thumb_hold_for_wide_models() -> None:
    """2 P per token forward, 4 P + 6 P_a for a LoRA step, 6 P for a full one (attention and head apart)."""
    shape = model_shape(
        {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128256}
    )
    assert shape.n_parameters == pytest.approx(7.5e9, rel=0.01)
    work = Workload(n_rows=1, n_tokens=512, n_pairs=0, n_logits=0)
    adapter = lora_shape(shape, 8, ["q_proj", "k_proj", "v_proj", "o_proj"])
    forward, step = formulas.count_forward_flops(shape, work), formulas.count_training_step_flops(shape, work, adapter)
    assert forward == 2 * shape.block_parameters * 512
    assert step == pytest.approx(512 * (4 * shape.block_parameters + 6 * adapter.n_parameters), rel=0.01)
    assert formulas.count_full_step_flops(shape, work) == 6 * shape.block_parameters * 512


def test_full_names_and_ends_of_names_find_the_same_matrices() -> None:
    shape = build("llama")[1]
    short = lora_shape(shape, 4, ["q_proj", "o_proj"], layers=[1])
    full = lora_shape(shape, 4, ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"])
    assert short == full
    assert lora_shape(build("bert")[1], 4, ["bert.encoder.layer.0.output.dense"]).n_parameters == 4 * (80 + 32)


@pytest.mark.parametrize("target", ["lm_head", "model.layers.9.self_attn.q_proj", "proj", ""])
def test_unknown_targets_are_named(target: str) -> None:
    with pytest.raises(ModelError, match=r"adapter target.*self_attn\.q_proj"):
        lora_shape(build("llama")[1], 4, [target])


def test_unknown_families_and_missing_sizes_are_named() -> None:
    with pytest.raises(ModelError, match="'mamba': no cost formula; known are bert"):
        model_shape({"model_type": "mamba"})
    with pytest.raises(ModelError, match="'gpt2': its config has no 'n_embd'"):
        model_shape({"model_type": "gpt2"})


def test_workloads_add_up() -> None:
    a, b = formulas.measure_workload([2, 3], n_logits=5), formulas.measure_workload([4], n_logits=1)
    assert a + b == formulas.measure_workload([2, 3, 4], n_logits=6)
    assert a * 3 == a + a + a
    shape = build("gpt2")[1]
    adapter = lora_shape(shape, 2, ["c_attn"])
    step = formulas.count_training_step_flops
    assert step(shape, a + b, adapter) == step(shape, a, adapter) + step(shape, b, adapter)


def test_an_adapter_on_nothing_costs_nothing_more() -> None:
    shape = build("llama")[1]
    work = work_of("llama")
    empty = AdapterShape(((), (), ()))
    forward = formulas.count_forward_flops(shape, work)
    assert formulas.count_training_step_flops(shape, work, empty) == forward


def test_small_formulas() -> None:
    assert formulas.count_regression_flops(n_rows=10, n_iterations=3, proj_dim=5) == 600
    assert formulas.count_oracle_flops(n_subsets=4, n_rows=10, proj_dim=5) == 400
    assert formulas.feature_bytes(n_outputs=10, proj_dim=400) == 16_040


def test_formulas_do_not_load_torch() -> None:
    code = "import sys, ensemblelora.accounting.formulas, ensemblelora.accounting.meter as m\n"
    code += "with m.Meter('x'): pass\nassert 'torch' not in sys.modules"
    source = str(Path(formulas.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source})


def test_a_meter_counts_tokens_flops_and_seconds() -> None:
    with Meter("features") as meter:
        meter.add_tokens(90, 128)
        meter.add_tokens(10, 16)
        meter.add_flops(10**15)
        meter.add_flops(1)
        time.sleep(0.03)
    record = meter.record
    assert (record.stage, record.n_tokens, record.n_padded_tokens, record.flops) == ("features", 100, 144, 10**15 + 1)
    assert 0.03 <= record.wall_seconds < 5


def test_a_meter_sees_memory_that_is_given_back_before_the_end() -> None:
    with Meter("before") as quiet:
        pass
    with Meter("train") as meter:
        block = np.ones(40_000_000)  # 320 MB, touched
        time.sleep(0.1)
        del block
    assert meter.record.peak_memory_bytes - quiet.record.peak_memory_bytes > 250_000_000
    with Meter("after") as after:
        pass
    assert after.record.peak_memory_bytes < meter.record.peak_memory_bytes - 250_000_000


def test_a_failed_stage_still_has_a_record_and_leaves_no_thread() -> None:
    meter = Meter("train")
    with pytest.raises(RuntimeError, match="boom"), meter:
        meter.add_tokens(1, 2)
        raise RuntimeError("boom")
    assert meter.record.n_tokens == 1 and meter.record.wall_seconds > 0 and meter.record.peak_memory_bytes > 0
    assert not [thread for thread in threading.enumerate() if thread.name == "meter-train"]


def test_freed_memory_is_given_back_to_the_system() -> None:
    code = """
import psutil
from ensemblelora.accounting.meter import release_memory
rss = lambda: psutil.Process().memory_info().rss
blocks = [bytearray(60_000) for _ in range(4_000)]  # small enough to come from the heap, not from a mapping of its own
kept, full = blocks[-1], rss()  # what lies at the top keeps all below it
del blocks
before = rss()
release_memory()
print(full - before, full - rss())
"""
    held, released = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert released > 0.9 * 4_000 * 60_000 > held


def test_without_an_accelerator_there_is_no_accelerator_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Meter("x") as meter:
        pass
    assert meter.record.peak_accelerator_bytes is None


def test_the_accelerator_peak_is_that_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100 + device)
    with Meter("x") as meter:
        assert resets == [0, 1]
    assert meter.record.peak_accelerator_bytes == 201


@pytest.mark.gpu
def test_the_accelerator_peak_is_torchs_own() -> None:
    torch.empty(1, device="cuda")
    with Meter("x") as meter:
        torch.empty(50_000_000, dtype=torch.uint8, device="cuda")
    assert meter.record.peak_accelerator_bytes is not None
    assert 50_000_000 <= meter.record.peak_accelerator_bytes < 60_000_000


RECORD = StageRecord("train", 2.0, 10, 3, 4, 100, None)


def test_a_repeated_stage_is_replaced() -> None:
    later = StageRecord("train", 1.0, 5, 1, 2, 80, 7)
    first = Ledger().with_stage(StageRecord("features")).with_stage(RECORD)
    assert RECORD.joined(later) == StageRecord("train", 3.0, 15, 4, 6, 100, 7)
    assert first.with_stage(later).stages == (StageRecord("features"), later)
    assert first.stages[1] == RECORD


def part(flops: int, **more: Any) -> StageRecord:
    return StageRecord("train", flops=flops, **more)


def test_a_stage_costs_what_it_made_and_what_it_used_again_cost_to_make() -> None:
    made = part(12, parts={"a": part(4, peak_memory_bytes=9), "b": part(6)})
    ledger = Ledger().with_stage(made, parts=["a", "b"])
    assert ledger.stages == (made,), "all of it was made now: the stage's own 2 too"
    for before in (ledger, ledger.doubting(["train"])):
        (again,) = before.with_stage(part(8, parts={"c": part(7)}), parts=["a", "c", "never noted"]).stages
        assert (again.flops, again.peak_memory_bytes) == (8 + 4, 9) and not again.parts["a"].parts
    (twice,) = ledger.with_stage(part(5, parts={"b": part(5)}), parts=["b", "b"]).stages
    assert (twice.flops, twice.parts["b"]) == (5, part(5)), "made anew, it is not what it was"
    unfinished = ledger.with_stage(part(1, parts={"b": part(1)}))
    assert unfinished.stages[0].flops == 1
    assert unfinished.with_stage(part(6, parts={"b": part(6)}), parts=["a", "b"]).stages[0].flops == 10


def test_a_meter_notes_parts_while_they_are_made_and_shares_out_what_is_made_together() -> None:
    with Meter("train") as meter:
        meter.add_flops(1)
        with pytest.raises(ZeroDivisionError), meter.part({"a": 1}):
            meter.add_tokens(3, 5)
            assert meter.record.parts["a"].n_padded_tokens == 5, "a killed process has noted it"
            raise ZeroDivisionError
        with meter.part({"b": 1, "c": 2}):
            meter.add_flops(10)
            meter.add_dequantization(2)
        with meter.part({"a": 1}):
            meter.add_flops(100)
    a, b, c = (meter.record.parts[name] for name in "abc")
    assert (a.n_tokens, a.n_padded_tokens, a.flops) == (3, 5, 100) and a.peak_memory_bytes > 0
    assert (b.flops, c.flops, b.dequantization_flops + c.dequantization_flops) == (3, 7, 2)
    assert meter.record.flops == 111 and meter.record.wall_seconds > a.wall_seconds + b.wall_seconds + c.wall_seconds
    assert c.wall_seconds == pytest.approx(2 * b.wall_seconds)


def test_the_total_sums_costs_and_takes_the_highest_peak() -> None:
    ledger = Ledger().with_stage(RECORD).with_stage(StageRecord("evaluate", 1.0, 1, 1, 1, 900, 5))
    assert ledger.total == StageRecord("total", 3.0, 11, 4, 5, 900, 5)
    assert Ledger().total == StageRecord("total")


def test_a_ledger_survives_json() -> None:
    ledger = Ledger().with_stage(RECORD).with_method("ensemble", MethodCosts(train_flops=9, adapter_bytes=3))
    ledger = ledger.with_method("shared", MethodCosts())
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger
    assert ledger.to_dict().keys() == {"stages", "methods"}, "as it always was"
    doubted = ledger.doubting(["train"])
    assert Ledger.from_dict(json.loads(json.dumps(doubted.to_dict()))) == doubted != ledger
    noted = ledger.with_stage(part(3, parts={"a": part(3)}))
    assert Ledger.from_dict(json.loads(json.dumps(noted.to_dict()))) == noted != ledger


def test_a_doubted_cost_counts_again_once_it_is_confirmed_or_done_anew() -> None:
    ledger = Ledger().with_stage(StageRecord("features", flops=1)).with_stage(RECORD)
    doubted = ledger.doubting(["train", "boost"])
    assert doubted.stages == (StageRecord("features", flops=1),) and doubted.total.flops == 1
    assert doubted.doubting(["train"]) == doubted and doubted.confirming("boost") == doubted
    assert doubted.confirming("train") == ledger == ledger.confirming("train")
    again = StageRecord("train", 1.0, 5, 1, 2, 80, 7)
    assert doubted.with_stage(again) == ledger.with_stage(again), "what it cost before is not counted beside it"


@pytest.mark.parametrize(
    "values",
    [
        {},
        [],
        {"stages": [{"x": 1}], "methods": {}},
        {"stages": [], "methods": []},
        {"stages": ["x"], "methods": {}},
        {"stages": [{"stage": "train", "parts": {"a": 1}}], "methods": {}},
    ],
)
def test_a_damaged_ledger_is_refused(values: Any) -> None:
    with pytest.raises(StoreError, match=r"costs\.json.*delete it"):
        Ledger.from_dict(values)
