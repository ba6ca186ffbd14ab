"""A model laid out over memory and disk computes, learns and answers as it does whole.

Places are chosen by accelerate, whose rule is the same for accelerators; here they are the processor's memory and disk.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import MixtralConfig, MixtralForCausalLM

from ensemblelora import pipeline
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import (
    THETA0,
    AdaptedModel,
    adapter_state,
    add_adapter,
    attach,
    draw_start,
    load_adapter,
    measure_distance,
    save_adapter,
)
from ensemblelora.config import AdapterConfig, GradientsConfig, ModelConfig, TrainingConfig, dump_config, load_config
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import ConfigError, ModelError
from ensemblelora.generation import generate
from ensemblelora.gradients.collect import collect_features
from ensemblelora.models import BaseModel, find_blocks, in_float32, load_base
from ensemblelora.passes import with_cache
from ensemblelora.placement import iterate_parameters
from ensemblelora.prediction import predict_members
from ensemblelora.store import FeatureStore
from ensemblelora.training import fine_tune
from ensemblelora.training.full import base_weights
from tests.tiny import disturb, make_learnable_split, make_network, make_split
from tests.tiny_run import make_inputs, read_config
from tests.toys import load_tokenizer

KINDS = ("verbalizer", "options", "sequence")
Save = Callable[..., Path]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Folders of tiny models of four blocks, made when first asked for."""

    @cache
    def once(family: str = "llama", head: str = "lm", **sizes: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        depth = {"n_layer": 4} if family.startswith("gpt") else {"num_hidden_layers": 4}
        make_network(family, head=head, initializer_range=0.15, **depth, **sizes).save_pretrained(folder)
        load_tokenizer().save_pretrained(folder)
        return folder

    return once


def load(folder: Path, *, head: str = "lm", dtype: str = "float32", **options: Any) -> BaseModel:
    return load_base(ModelConfig(name=str(folder), dtype=dtype, device="cpu", **options), head=head, n_labels=3)


def room_for(folder: Path, n_blocks: int, *, head: str = "lm") -> dict[str, str]:
    """A budget for so many of the blocks; one block more is kept free for the one that is being run."""
    model = load(folder, head=head).model
    prefix, blocks = find_blocks(model)
    outside = sum(p.numel() * 4 for name, p in model.named_parameters() if not name.startswith(f"{prefix}."))
    block = sum(p.numel() * 4 for p in blocks[0].parameters())
    return {"cpu": f"{(outside + (n_blocks + 1.5) * block) / 1000:.3f}KB"}


def spread(folder: Path, n_blocks: int = 2, *, head: str = "lm", **options: Any) -> BaseModel:
    return load(folder, head=head, device_map="auto", max_memory=room_for(folder, n_blocks, head=head), **options)


def pair(folder: Path, *, head: str = "lm", n_blocks: int = 2, **adapter: Any) -> tuple[AdaptedModel, AdaptedModel]:
    """An adapted model, whole and laid out."""
    config = AdapterConfig(**{"r": 4, "lora_alpha": 8} | adapter)
    whole, parts = load(folder, head=head), spread(folder, n_blocks, head=head)
    assert parts.is_waiting, "nothing is on disk"
    return attach(whole, config, seed=0), attach(parts, config, seed=0)


def waits(model: torch.nn.Module) -> list[bool]:
    """Whether each block's weights are elsewhere."""
    _, blocks = find_blocks(model)
    return [any(p.is_meta for p in block.parameters()) for block in blocks]


def features_of(adapted: AdaptedModel, splits: list[EncodedSplit], folder: Path) -> list[np.ndarray]:
    store, names = FeatureStore(folder), {(s.task, s.split): f"{i}" for i, s in enumerate(splits)}
    collect_features(adapted, splits, store, GradientsConfig(proj_dim=16), seed=0, fingerprints=names)
    return [np.asarray(store.read(s.task, s.split).features) for s in splits]


def states_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=SLOW) for family in ("qwen2", "gpt2", "gptj"))]
)
def test_features_scores_and_identity_are_those_of_the_whole_model(family: str, save: Save, tmp_path: Path) -> None:
    whole, parts = pair(save(family))
    assert waits(parts.network) == [False, False, True, True]
    assert parts.base.fingerprint == whole.base.fingerprint
    assert states_equal(adapter_state(whole, THETA0), adapter_state(parts, THETA0))
    splits = [make_split(kind, task=kind, n=5, seed=i) for i, kind in enumerate(KINDS)]
    kept = [features_of(one, splits, tmp_path / str(i)) for i, one in enumerate((whole, parts))]
    for first, second in zip(*kept, strict=True):
        assert np.abs(first).max() > 0
        np.testing.assert_array_equal(first, second)
    for one in (whole, parts):
        for seed in (1, 2):
            add_adapter(one, f"m{seed}")
            disturb(one, f"m{seed}", seed=seed)
    for split in splits:  # both members in one pass, where the family allows it
        first, second = (predict_members(m, split, ["m1", "m2"], max_tokens=400).values for m in (whole, parts))
        assert not np.array_equal(first[0], first[1])
        np.testing.assert_array_equal(first, second)
    assert measure_distance(whole, "m1") == measure_distance(parts, "m1")
    assert waits(parts.network) == [False, False, True, True], "weights are let go after each pass"


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "options"), *(pytest.param("gpt2", kind, marks=SLOW) for kind in KINDS)],
)
def test_fine_tuning_gives_the_same_adapter(family: str, kind: str, save: Save, tmp_path: Path) -> None:
    found = []
    for i, adapted in enumerate(pair(save(family), lora_dropout=0.1)):
        train, validation = (
            [make_learnable_split(kind, n=n, split=part, seed=seed)]
            for n, part, seed in ((16, "train", 0), (16, "validation", 9))
        )
        config = TrainingConfig(learning_rate=3e-3, num_train_epochs=1, max_examples_per_batch=4)
        trained = fine_tune(
            adapted, "g", train, validation, config, seed=0, checkpoints=tmp_path / str(i), meter=Meter("train")
        )
        found.append((trained, adapter_state(adapted, "g")))
    assert found[0][0] == found[1][0]
    assert found[0][0].best_step > 0
    assert states_equal(found[0][1], found[1][1])


@SLOW
def test_the_classifier_head_of_an_encoder_is_trained_too(save: Save, tmp_path: Path) -> None:
    found = []
    for i, adapted in enumerate(pair(save("bert", head="sequence_classification"), head="sequence_classification")):
        splits = [make_split("classification", n=8, split=part) for part in ("train", "validation")]
        config = TrainingConfig(learning_rate=1e-2, num_train_epochs=1)
        fine_tune(
            adapted, "g", splits[:1], splits[1:], config, seed=0, checkpoints=tmp_path / str(i), meter=Meter("train")
        )
        found.append(adapter_state(adapted, "g"))
    assert states_equal(*found)


@SLOW
@pytest.mark.parametrize("method", ["ia3", "bottleneck"])
def test_other_kinds_of_adapters_are_laid_out_with_their_layers(method: str, save: Save, tmp_path: Path) -> None:
    own: dict[str, Any] = {"reduction": 8} if method == "bottleneck" else {}
    found = []
    for i, base in enumerate((load(save()), spread(save()))):
        adapted = attach(base, AdapterConfig(method=method, **own), seed=0)  # type: ignore[arg-type]
        splits = [make_split("verbalizer", n=6, split=part) for part in ("train", "validation")]
        kept = features_of(adapted, splits, tmp_path / f"f{i}")
        config = TrainingConfig(learning_rate=1e-2, num_train_epochs=1)
        fine_tune(
            adapted, "g", splits[:1], splits[1:], config, seed=0, checkpoints=tmp_path / f"t{i}", meter=Meter("train")
        )
        found.append((kept, adapter_state(adapted, "g")))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert states_equal(found[0][1], found[1][1])


@SLOW
def test_blocks_below_the_adapted_ones_are_run_once(save: Save, tmp_path: Path) -> None:
    """The lower blocks' activations are kept; then their weights are not read again."""
    found = []
    for i, adapted in enumerate(pair(save(), n_blocks=1, layers_to_transform="top_half")):
        split = make_split("options", n=6)
        cached = with_cache(adapted, tmp_path / f"cache{i}", [split], max_bytes=10**8)
        assert cached.prefix is not None
        disturb(cached)
        twice = [features_of(cached, [split], tmp_path / f"f{i}{j}")[0] for j in range(2)]
        np.testing.assert_array_equal(*twice)
        found.append(twice[0])
    np.testing.assert_array_equal(*found)


@SLOW
def test_generated_texts_and_saved_adapters_are_the_same(save: Save, tmp_path: Path) -> None:
    whole, parts = pair(save())
    add_adapter(parts, "m", draw_start(parts, seed=3))
    disturb(parts, "m")
    save_adapter(parts, "m", tmp_path / "m")
    load_adapter(whole, "m", tmp_path / "m")
    contexts = [np.array([3, 5, 7]), np.array([11, 2, 9, 4])]
    answers = [
        generate(one, contexts, [THETA0, "m"], [0.4, 0.6], max_new_tokens=4, max_tokens=99) for one in (whole, parts)
    ]
    assert answers[0] == answers[1]
    assert any(answers[0])


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes read from disk that are still there, at every reading."""
    loaded: list[tuple[StorageWeakRef, int]] = []
    counts: list[int] = []
    read = OffloadedWeightsLoader.__getitem__

    def reading(self: OffloadedWeightsLoader, key: str) -> torch.Tensor:
        tensor = read(self, key)
        loaded[:] = [(ref, size) for ref, size in loaded if not ref.expired()]
        loaded.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
        counts.append(sum(size for _, size in loaded))
        return tensor

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", reading)
    return counts


def test_one_block_at_a_time_is_read_back_from_disk(save: Save, tmp_path: Path, held: list[int]) -> None:
    _, parts = pair(save(), n_blocks=0)
    assert all(waits(parts.network))
    _, blocks = find_blocks(parts.network)
    block = sum(p.nbytes for name, p in blocks[0].named_parameters() if "lora" not in name)
    split = make_split("options", n=6)
    held.clear()
    features_of(parts, [split], tmp_path / "f")
    gc.collect()
    n_for_features = len(held)
    config = TrainingConfig(num_train_epochs=1)
    fine_tune(parts, "g", [split], [split], config, seed=0, checkpoints=tmp_path / "t", meter=Meter("train"))
    assert len(held) > n_for_features > 0
    assert max(held) <= block


def test_a_model_that_fits_is_loaded_as_if_nothing_was_said(save: Save) -> None:
    base = load(save(), device_map="auto", max_memory={"cpu": "1GB"})
    assert not base.is_waiting
    assert not hasattr(base.model, "hf_device_map")


def test_every_parameter_is_seen_in_its_place(save: Save) -> None:
    whole, parts = load(save("gpt2")), spread(save("gpt2"))
    assert [name for name, _ in iterate_parameters(whole.model)] == [n for n, _ in whole.model.named_parameters()]
    pairs = zip(iterate_parameters(whole.model), iterate_parameters(parts.model), strict=True)
    assert all(first == second and torch.equal(a, b) for (first, a), (second, b) in pairs)


def make_experts(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = MixtralConfig(
        **sizes, vocab_size=96, num_hidden_layers=3, num_local_experts=2, pad_token_id=0, max_position_embeddings=128
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


@SLOW
def test_blocks_that_are_rebuilt_on_loading_go_to_the_folder_given(tmp_path: Path) -> None:
    make_experts(tmp_path / "model")
    base = spread(tmp_path / "model", 1, offload_folder=str(tmp_path / "disk"))
    assert base.is_waiting
    assert list((tmp_path / "disk").iterdir())
    found = [attach(one, AdapterConfig(r=2), seed=0) for one in (load(tmp_path / "model"), base)]
    split = make_split("options", n=4)
    scores = [predict_members(one, split, [THETA0], max_tokens=400).values for one in found]
    np.testing.assert_array_equal(*scores)


@SLOW
@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_bits_are_laid_out_as_far_as_devices_hold_them(checkpointing: bool, save: Save, tmp_path: Path) -> None:
    folder = save(hidden_size=64, intermediate_size=128)
    found = []
    for i, options in enumerate(({}, {"device_map": "auto", "max_memory": {"cpu": "100MB"}})):
        base = load(folder, quantization="nf4", **options)
        adapted = attach(base, AdapterConfig(r=2), seed=0)
        split = make_split("verbalizer", n=6)
        config = TrainingConfig(num_train_epochs=1, gradient_checkpointing=checkpointing)
        fine_tune(adapted, "g", [split], [split], config, seed=0, checkpoints=tmp_path / str(i), meter=Meter("train"))
        found.append(adapter_state(adapted, "g"))
    assert states_equal(*found)
    with pytest.raises(ModelError, match="blocks in 4 bits fit no device, and packed weights can't wait elsewhere"):
        load(folder, quantization="nf4", device_map="auto", max_memory={"cpu": "100KB"})


def refusals(parts: BaseModel) -> Iterator[tuple[str, Callable[[], Any]]]:
    adapted = attach(parts, AdapterConfig(r=2), seed=0)
    yield "full fine-tuning of model", partial(base_weights, adapted)
    yield "computing in float32", in_float32(adapted.network).__enter__
    yield "adapter.method dora", partial(attach, parts, AdapterConfig(method="dora"), seed=0)


def test_what_needs_all_weights_at_once_says_so(save: Save) -> None:
    for what, call in refusals(spread(save())):
        with pytest.raises(ModelError, match=f"{what}.*: needs weights that model.device_map keeps"):
            call()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_memory": {"0": "1GB"}}, "names device 0, and this machine has 0 accelerators"),
        ({"max_memory": {"cpu": "1KB"}}, "embeddings and output layer take 0.0.* MB, and device cpu may hold 0.001 MB"),
    ],
)
def test_budgets_that_can_not_be_kept_are_refused(options: dict[str, Any], told: str, save: Save) -> None:
    if torch.accelerator.device_count():
        told = told.replace("has 0", f"has {torch.accelerator.device_count()}")
    with pytest.raises(ModelError, match=told):
        load(save(), device_map="auto", **options)


def test_the_config_takes_devices_by_number_and_comes_back_the_same(tmp_path: Path) -> None:
    text = "data: {tasks: [a]}\nmodel: {device_map: auto, max_memory: {0: 20GiB, cpu: 60GB}}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    config = load_config(tmp_path / "recipe.yaml")
    assert config.model.max_memory == {"0": "20GiB", "cpu": "60GB"}
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("{max_memory: {cpu: 1GB}}", "model: max_memory given, and device_map is one; set that to auto"),
        ("{device_map: auto, max_memory: {cpu: lots}}", "model.max_memory: got .*: expected sizes by device, such as"),
        ("{device_map: auto, max_memory: {gpu: 1GB}}", "model.max_memory: got .*: expected sizes by device, such as"),
        ("{device_map: all}", "model.device_map: got 'all'"),
    ],
)
def test_faults_of_the_section_are_named(section: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"data: {{tasks: [a]}}\nmodel: {section}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        load_config(tmp_path / "recipe.yaml")


@SLOW
def test_a_whole_run_leaves_what_it_leaves_without(tmp_path: Path, held: list[int]) -> None:
    results = []
    for name, model in (("whole", {}), ("parts", {"device_map": "sequential", "max_memory": {"cpu": "190KB"}})):
        (tmp_path / name).mkdir()
        recipe = make_inputs(tmp_path / name)
        pipeline.run(read_config(recipe, model=model))
        results.append(json.loads((tmp_path / name / "run" / "results.json").read_text(encoding="utf-8")))
    assert held, "blocks were read from disk"
    assert results[0] == results[1]


def test_compiling_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    config = read_config(make_inputs(tmp_path), model={"device_map": "auto"}, training={"compile": True})
    with pytest.raises(ConfigError, match=r"training.compile: not for a model spread over devices"):
        pipeline.run(config)
