"""Bottleneck adapters: where they sit, what they compute, what PEFT does with them, and a whole run of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from ensemblelora import pipeline
from ensemblelora.adaptermethods.targets import find_outputs
from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    activate,
    adapter_state,
    add_adapter,
    attach,
    load_adapter,
    set_adapter_state,
)
from ensemblelora.bottleneck import BottleneckConfig, BottleneckLayer
from ensemblelora.cli import main
from ensemblelora.config import AdapterConfig
from ensemblelora.errors import ModelError, UsageError
from ensemblelora.exporting import export_run
from ensemblelora.fusion import can_mix, fused
from ensemblelora.gradients.backward import find_active_layers, list_parts
from ensemblelora.models import load_base, prepare_base
from ensemblelora.stages import learning
from tests.snippets import DOCS, list_blocks
from tests.tiny import PadOnly, disturb, make_base, make_network, make_split
from tests.tiny_run import TASKS, make_inputs, read_config, read_json, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

CONFIG = AdapterConfig(method="bottleneck", reduction=8)
IDS = torch.tensor([[5, 9, 33, 2, 71], [8, 8, 1, 60, 3]])
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"pad_token_id": 0, "attn_implementation": "eager"}
OUTPUTS = {
    "llama": ("model.layers", ("self_attn.o_proj", "mlp.down_proj")),
    "qwen2": ("model.layers", ("self_attn.o_proj", "mlp.down_proj")),
    "gpt2": ("transformer.h", ("attn.c_proj", "mlp.c_proj")),
    "gptj": ("transformer.h", ("attn.out_proj", "mlp.fc_out")),
    "bert": ("bert.encoder.layer", ("attention.output.dense", "output.dense")),
    "gpt_neox": ("gpt_neox.layers", ("attention.dense", "mlp.dense_4h_to_h")),
    "bloom": ("transformer.h", ("self_attention.dense", "mlp.dense_4h_to_h")),
    "opt": ("model.decoder.layers", ("self_attn.out_proj", "fc2")),
    "mixtral": ("model.layers", ("self_attn.o_proj", "mlp")),
}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48)).eval()
    if family == "bloom":
        return BloomForCausalLM(BloomConfig(**{k: v for k, v in SIZES.items() if k != "num_attention_heads"}, n_head=4))
    if family == "opt":
        return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)).eval()
    if family == "mixtral":
        sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
        return MixtralForCausalLM(MixtralConfig(**SIZES, **sizes)).eval()
    return make_network(family, head="sequence_classification" if family == "bert" else "lm").eval()


def wrap(network: PreTrainedModel, config: AdapterConfig = CONFIG) -> AdaptedModel:
    return attach(prepare_base("tiny", network.eval(), PadOnly()), config, seed=0)  # type: ignore[arg-type]


def run(network: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(input_ids=IDS).logits
    return logits


# Where they sit.


@pytest.mark.parametrize("family", OUTPUTS)
def test_they_sit_after_attention_and_mlp_of_every_block_or_of_the_chosen_ones(family: str) -> None:
    (place, names), network = OUTPUTS[family], build(family)
    assert find_outputs(network) == [f"{place}.{i}.{name}" for i in (0, 1) for name in names]
    assert find_outputs(network, (1,)) == [f"{place}.1.{name}" for name in names]
    with pytest.raises(ModelError, match=r"layers_to_transform: \[2\] not in 0..1"):
        find_outputs(network, (2,))


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "opt", "mixtral"])
def test_families_beside_those_with_formulas_begin_at_the_base_and_move_from_it(family: str) -> None:
    plain = run(build(family).eval())
    adapted = wrap(build(family))
    assert torch.equal(run(adapted.network), plain)
    assert len(adapted.adapter_layers) == 4
    disturb(adapted)
    assert not torch.allclose(run(adapted.network), plain)


def test_a_block_without_such_layers_is_refused_until_modules_are_named() -> None:
    network = make_network("llama")
    for layer in network.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(
        ModelError, match=r"a block without MLP that ends in a linear layer 32 wide; name adapter.target"
    ):
        wrap(network)
    named = wrap(network, CONFIG.model_copy(update={"target_modules": ("o_proj",)}))
    assert len(named.adapter_layers) == 2


def test_after_a_whole_sub_block_is_after_its_last_layer() -> None:
    """Attention gives a tuple, the MLP a tensor."""
    adapted = [wrap(make_network("llama"), CONFIG.model_copy(update={"target_modules": names}))
               for names in (("o_proj", "down_proj"), ("self_attn", "mlp"))]  # fmt: skip
    inner, outer = ([type(layer.base_layer).__name__ for layer in model.adapter_layers] for model in adapted)
    assert (set(inner), set(outer)) == ({"Linear"}, {"LlamaAttention", "LlamaMLP"})
    disturb(adapted[0])
    state = adapter_state(adapted[0], THETA0)
    renamed = {k.replace("self_attn.o_proj", "self_attn").replace("mlp.down_proj", "mlp"): t for k, t in state.items()}
    set_adapter_state(adapted[1], THETA0, renamed)
    assert torch.equal(run(adapted[0].network), run(adapted[1].network))
    with fused(adapted[1], [THETA0]):
        torch.testing.assert_close(run(adapted[1].network), run(adapted[0].network), rtol=1e-4, atol=1e-5)
    assert adapted[0].costs == adapted[1].costs


# What they compute.


@pytest.mark.parametrize(("width", "reduction", "hidden"), [(32, 8, 4), (32, 256, 1), (32, 5, 6), (4096, 256, 16)])
def test_the_width_is_the_models_over_the_reduction_and_at_least_one(width: int, reduction: int, hidden: int) -> None:
    layer = BottleneckLayer(nn.Linear(8, width), width, "one", BottleneckConfig(reduction=reduction))
    assert layer.bottleneck_down["one"].weight.shape == (hidden, width)
    assert layer.bottleneck_up["one"].weight.shape == (width, hidden)
    assert (layer.bottleneck_down["one"].bias.shape, layer.bottleneck_up["one"].bias.shape) == ((hidden,), (width,))


@pytest.mark.parametrize("non_linearity", ["relu", "gelu", "silu", "tanh"])
def test_a_layer_computes_the_formula(non_linearity: str) -> None:
    torch.manual_seed(0)
    settings = BottleneckConfig(reduction=2, non_linearity=non_linearity, scaling=0.5)
    layer = BottleneckLayer(nn.Linear(6, 8), 8, "one", settings)
    for parameter in layer.bottleneck_up["one"].parameters():
        nn.init.normal_(parameter)
    nn.init.normal_(layer.bottleneck_down["one"].bias)
    x = torch.randn(3, 5, 6)
    h, act = layer.base_layer(x), getattr(nn.functional, non_linearity)
    down, up = layer.bottleneck_down["one"], layer.bottleneck_up["one"]
    expected = h + 0.5 * (act(h @ down.weight.T + down.bias) @ up.weight.T + up.bias)
    torch.testing.assert_close(layer(x), expected)


def test_units_that_are_all_off_leave_the_gradient_of_the_bias() -> None:
    adapted = wrap(make_network("llama"))
    state = adapter_state(adapted, THETA0)
    off = {k: torch.full_like(t, -1e4) if k.endswith("down.bias") else t for k, t in state.items()}
    set_adapter_state(adapted, THETA0, off)
    parts = [name for name, _ in list_parts(find_active_layers(adapted, [make_split("verbalizer")]))]
    assert len(parts) == 8 and all("bottleneck_up" in name for name in parts)


def test_experts_keep_members_apart() -> None:
    """Rows reach the adapter behind the experts in their own order, but LoRA's rule for such models holds."""
    adapted = wrap(build("mixtral"))
    assert not can_mix(adapted)


# What PEFT does with them.


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"reduction": 0}, "reduction 0: expected a whole"),
        ({"non_linearity": "exec"}, "non_linearity 'exec': expected"),
    ],
)
def test_settings_from_a_file_are_checked(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    BottleneckConfig(target_modules=["o_proj"]).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path)), BottleneckConfig)
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=told):
        PeftConfig.from_pretrained(str(tmp_path))


def test_peft_adds_loads_disables_and_unloads_them(tmp_path: Path) -> None:
    plain = run(make_network("llama").eval())
    model = get_peft_model(make_network("llama"), BottleneckConfig(target_modules=["o_proj"], reduction=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    moved = run(model.eval())
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(make_network("llama"), str(tmp_path), low_cpu_mem_usage=True).eval()
    assert torch.equal(run(again), moved) and not torch.allclose(moved, plain)
    with again.disable_adapter():
        assert torch.equal(run(again), plain)
    again.load_adapter(str(tmp_path), adapter_name="other")
    again.set_adapter("other")
    again.delete_adapter("default")
    assert torch.equal(run(again), moved)
    with pytest.raises(ValueError, match="not linear and can't be merged"):
        again.merge_and_unload()
    assert torch.equal(run(again.unload()), plain)


def test_the_page_on_kinds_of_adapter_loads_one_as_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = list_blocks(DOCS / "adapter-methods.md", "python")
    model = get_peft_model(make_network("llama"), BottleneckConfig(target_modules=["o_proj"], reduction=4))
    model.save_pretrained(str(tmp_path / "runs" / "mine" / "adapters" / "group-0"))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"base": make_network("llama")}
    exec(block.text, scope)
    assert scope["model"].peft_config["default"].reduction == 4


def test_several_active_adapters_add_up() -> None:
    model = get_peft_model(make_network("llama"), BottleneckConfig(target_modules=["down_proj"], reduction=4))
    model.add_adapter("other", BottleneckConfig(target_modules=["down_proj"], reduction=4))
    layer = next(module for module in model.modules() if isinstance(module, BottleneckLayer))
    for name in ("default", "other"):
        nn.init.normal_(layer.bottleneck_up[name].weight)
    x = torch.randn(2, 48)
    found = {}
    for names in (["default"], ["other"], ["default", "other"], ["other", "default"]):
        layer.set_adapter(names)
        found[tuple(names)] = layer(x) - layer.base_layer(x)
    both = found["default",] + found["other",]
    torch.testing.assert_close(found["default", "other"], both, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["other", "default"], both, rtol=1e-4, atol=1e-5)


def test_no_target_is_refused() -> None:
    with pytest.raises(ValueError, match="name target_modules"):
        get_peft_model(make_network("llama"), BottleneckConfig())


# A whole run.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of bottlenecks above a frozen prefix, its groups trained together; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    pipeline.run(read(make_inputs(folder)))
    return folder


def read(recipe: Path, **changes: Any) -> Any:
    config = read_config(recipe, training={"together": True}, **changes)
    adapter = AdapterConfig(method="bottleneck", reduction=8, layers_to_transform="top_half")
    return config.model_copy(update={"adapter": adapter})


def test_a_run_gives_adapters_weights_and_a_report(finished: Path) -> None:
    results = read_json(finished, "results.json")
    assert set(results["methods"]) >= {"ensemble", "shared", "base"}
    settings = json.loads(next((finished / "run" / "adapters").glob("group-*/adapter_config.json")).read_text())
    assert (settings["peft_type"], settings["reduction"]) == ("BOTTLENECK", 8)
    text = (finished / "run" / "report.md").read_text(encoding="utf-8")
    assert all(task in text for task in TASKS)
    costs = read_json(finished, "costs.json")
    assert all(stage["flops"] > 0 for stage in costs["stages"] if stage["stage"] in ("features", "train", "evaluate"))


def test_a_run_that_was_broken_off_goes_on_and_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_inputs(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learning.boosting, "boost", interrupt)
        patch.setattr(learning.boosting, "start_boosting", interrupt, raising=False)
        pipeline.run(read(recipe))
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.setattr(learning.training, "fine_tune", only_shared(learning.training.fine_tune))
    pipeline.run(read(recipe))
    assert tensors_of(tmp_path) == tensors_of(finished)
    for name in ("affinity.npz", "plan.json", "ensemble.json", "results.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / "run" / name).read_bytes(), name


def interrupt(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def only_shared(fine_tune: Any) -> Any:
    """Groups were trained before the interruption, and are not trained again."""

    def check(adapted: Any, name: str, *args: Any, **options: Any) -> Any:
        assert name == "shared"
        return fine_tune(adapted, name, *args, **options)

    return check


@pytest.mark.parametrize("format", ["folded", "merged"])
def test_they_can_not_be_folded_or_merged_and_say_so_before_anything_is_loaded(
    format: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ensemblelora.exporting.write.load_members", interrupt)
    told = f"format {format}: only LoRA adapters add up to one, and this run's are of method bottleneck; give --format"
    with pytest.raises(UsageError, match=told):
        export_run(finished / "run", tmp_path / "out", format=format)  # type: ignore[arg-type]
    assert main(["export", str(finished / "run"), "--format", format, "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_export_of_every_member_says_how_peft_is_told_of_them(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = export_run(finished / "run", tmp_path / "out", format="peft")
    note = (export.folder / "README.md").read_text(encoding="utf-8")
    code = note.partition("```python\n")[2].partition("```")[0]
    assert code.startswith("import ensemblelora.bottleneck  # tells PEFT of these adapters\nfrom peft import PeftModel")
    monkeypatch.chdir(export.folder)
    scope: dict[str, Any] = {}
    exec(code, scope)
    config = read(finished / "recipe.yaml")
    ours = attach(load_base(config.model), config.adapter, seed=config.seed)
    load_adapter(ours, "group-0", finished / "run" / "adapters" / "group-0")
    with activate(ours, "group-0"):  # another attention kernel than the note's, so that bits may differ
        torch.testing.assert_close(run(scope["model"].eval()), run(ours.network), rtol=1e-4, atol=1e-5)


def test_members_of_one_shape_share_a_pass() -> None:
    adapted = attach(make_base(), CONFIG, seed=0)
    for seed, name in enumerate(("one", "two")):
        add_adapter(adapted, name)
        disturb(adapted, name, seed=seed)
    assert can_mix(adapted)
    alone = []
    for name in ("one", "two"):
        with activate(adapted, name):
            alone.append(run(adapted.network))
    with fused(adapted, ["one", "two"]) as switch, torch.no_grad():
        for counts in ((2, 2), (1, 2)):
            switch.use(["one", "two"], counts)
            rows = torch.cat([IDS[: counts[0]], IDS[: counts[1]]])
            together = adapted.network(input_ids=rows).logits
            expected = torch.cat([alone[0][: counts[0]], alone[1][: counts[1]]])
            torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
