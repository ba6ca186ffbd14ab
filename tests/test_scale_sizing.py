"""What a run would take elsewhere, from a config alone, against what a run here counts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ensemblelora.accounting.meter import Meter
from ensemblelora.accounting.shapes import model_shape
from ensemblelora.adapters import attach
from ensemblelora.cli import main
from ensemblelora.config import AdapterConfig, GradientsConfig, RunConfig, TrainingConfig, parse_config
from ensemblelora.counting import count_training
from ensemblelora.data.batching import iterate_batches
from ensemblelora.errors import ConfigError, ModelError, OutputError
from ensemblelora.forecast import list_stages, make_forecaster
from ensemblelora.gradients.plan import count_pass
from ensemblelora.machines import Machine, read_machine, with_measured_rates
from ensemblelora.sizing import DataSize, read_model_shape, size_run
from ensemblelora.speed import Speed
from ensemblelora.stages import Rows
from tests.tiny import make_adapted, make_base, make_split
from tests.tiny_run import finished_run, read_json

ROOT = Path(__file__).resolve().parent.parent
LLAMA_13B = {
    "model_type": "llama", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
    "intermediate_size": 13824, "vocab_size": 32000,
}  # fmt: skip
MACHINE = Machine(8, 989e12, 80.0)
MILLION = DataSize(10, 1_000_000, 100_000, 100_000, 256)


def make_config(**sections: Any) -> RunConfig:
    return parse_config({"data": {"tasks": ["some"]}, "grouping": {"max_groups": 6}, **sections})


def test_flops_of_rows_of_one_length_are_those_that_a_run_counts():
    adapted = make_adapted("llama", r=4)
    wide = make_split("verbalizer", n=40, n_choices=2, task="t")
    length = int(wide.example_lengths[0])
    split = trim(wide, length)
    config = make_config(adapter={"r": 4, "lora_alpha": 8}, gradients={"proj_dim": 16}, boosting={"n_rounds": 0})
    shape = model_shape(adapted.base.model.config.to_dict())
    data = DataSize(1, split.n_examples, 0, 0, length)
    found = size_run(config, shape, data, MACHINE)

    features, training = Meter("features"), Meter("train")
    count_pass(adapted, [split], GradientsConfig(proj_dim=16), seed=0, meter=features)
    for batch in iterate_batches(split, TrainingConfig().max_tokens_per_batch, 0, layout=adapted.layout):
        count_training(training, adapted.costs, batch)
    assert found["features"].flops == features.record.flops
    assert found["train"].flops == config.training.num_train_epochs * training.record.flops
    assert found["features"].disk_bytes == 4 * split.n_examples * 17


@pytest.mark.parametrize(
    ("keys", "n_devices"),
    [({}, 1), ({"prefix_cache_gb": 0.0}, 1), ({"prefix_cache_gb": 6e-6}, 1), ({}, 2)],
)
def test_blocks_below_the_adapted_ones_count_as_a_forecast_here_counts_them(keys, n_devices, tmp_path, monkeypatch):
    adapter = AdapterConfig(r=4, lora_alpha=8, layers_to_transform=(1,))
    probe, parts = attach(make_base("llama"), adapter, seed=0), []
    for part, n in (("train", 40), ("validation", 24), ("test", 24)):
        splits = [make_split("verbalizer", n=n, n_choices=2, task=task, split=part, seed=1) for task in "ab"]
        length = int(splits[0].example_lengths[0])
        parts.append(tuple(trim(split, length) for split in splits))
    assert probe.prefix is not None and probe.prefix.depth == 1
    rows = Rows(*parts)
    config = make_config(
        out=str(tmp_path / "run"), model={"dtype": "float32", **keys}, adapter=adapter.model_dump(),
        gradients={"proj_dim": 16}, boosting={"n_rounds": 0}, affinity={"subset_size": 2},
    )  # fmt: skip
    here = list_stages(make_forecaster(config, probe, rows, Speed(1e9, 1e9, math.inf, 1.0, 1.0)))
    counts = [sum(split.n_examples for split in part) for part in parts]
    data = DataSize(2, *counts, length)
    if n_devices > 1:  # a split that is more than one job is not kept on a cluster
        monkeypatch.setattr("ensemblelora.sizing._PIECE", 1)
        here = list_stages(make_forecaster(config.model_copy(
            update={"model": config.model.model_copy(update={"prefix_cache_gb": 0.0})}
        ), probe, rows, Speed(1e9, 1e9, math.inf, 1.0, 1.0)))  # fmt: skip
    shape = model_shape(probe.base.model.config.to_dict())
    found = size_run(config, shape, data, replace(MACHINE, n_devices=n_devices))
    for name in ("features", "train", "baselines", "combine"):
        assert found[name].flops == here[name].flops, name
    assert found["features"].disk_bytes == here["features"].disk_bytes
    every = {"model": {"dtype": "float32"}, "adapter": {"r": 4, "lora_alpha": 8}, "boosting": {"n_rounds": 0}}
    whole = size_run(make_config(**every), shape, data, MACHINE)
    assert found["train"].memory_bytes < whole["train"].memory_bytes, "activations of the adapted blocks alone"


def trim(split: Any, length: int) -> Any:
    """The rows of one length."""
    from ensemblelora.data.subset import take_examples

    return take_examples(split, [e for e in range(split.n_examples) if split.example_lengths[e] == length])


@pytest.mark.parametrize("times", [2, 4, 8])
def test_cost_is_linear_in_rows_and_memory_of_a_device_is_the_same(times):
    config, shape = make_config(), model_shape(LLAMA_13B)
    small = size_run(config, shape, MILLION, MACHINE)
    more = {name: times * getattr(MILLION, name) for name in ("n_train", "n_validation", "n_test")}
    large = size_run(config, shape, replace(MILLION, **more), MACHINE)
    for name in small:
        assert large[name].flops == pytest.approx(times * small[name].flops, rel=1e-6), name
        assert large[name].seconds == pytest.approx(times * small[name].seconds, rel=1e-6), name
        assert large[name].memory_bytes == small[name].memory_bytes
    assert large["features"].disk_bytes == times * small["features"].disk_bytes


def test_a_model_of_13b_fits_a_device_of_80_gb_and_none_of_24_until_it_is_packed():
    shape = model_shape(LLAMA_13B)
    assert shape.n_parameters == pytest.approx(13e9, rel=0.02)
    found = size_run(make_config(), shape, MILLION, MACHINE)
    assert all(stage.fits for stage in found.values()) and 26e9 < found["train"].memory_bytes < 60e9
    little = replace(MACHINE, memory_gb=24.0)
    assert not size_run(make_config(), shape, MILLION, little)["total"].fits
    packed = make_config(model={"quantization": "nf4"}, training={"gradient_checkpointing": True})
    assert size_run(packed, shape, MILLION, little)["train"].fits
    assert found["train"].n_devices == 6 and found["features"].n_devices == 8 and found["boost"].n_devices == 1


def test_a_layout_takes_as_few_devices_for_a_job_as_hold_it_and_the_others_run_beside():
    shape, small = model_shape(LLAMA_13B), replace(MACHINE, memory_gb=24.0)
    whole = size_run(make_config(), shape, MILLION, MACHINE)
    assert not size_run(make_config(), shape, MILLION, small)["total"].fits
    spread = size_run(make_config(model={"device_map": "auto"}), shape, MILLION, small)
    n = spread["train"].per_job
    assert 2 <= n <= 4 and all(stage.fits for stage in spread.values())
    assert spread["train"].n_devices == 8 // n - 1, "the baseline of all tasks has one of them"
    assert spread["train"].memory_bytes < whole["train"].memory_bytes
    assert spread["train"].seconds == pytest.approx(whole["train"].seconds * 6 / (8 // n - 1)), "devices take turns"
    roomy = size_run(make_config(model={"device_map": "auto"}), shape, MILLION, MACHINE)
    assert roomy == whole, "what fits a device lies on it"
    tiny = size_run(make_config(model={"device_map": "auto"}), shape, MILLION, replace(MACHINE, memory_gb=2.0))
    assert not tiny["train"].fits and tiny["train"].per_job == 8


def test_processes_that_share_blocks_share_the_steps_of_training_and_nothing_else():
    shape = model_shape(LLAMA_13B)
    one = size_run(make_config(), shape, MILLION, replace(MACHINE, n_devices=1))
    team = size_run(make_config(model={"device_map": "fsdp"}), shape, MILLION, MACHINE)
    for name, ratio in {"train": 8, "baselines": 8, "features": 1, "affinity": 1, "evaluate": 1}.items():
        assert one[name].seconds == pytest.approx(ratio * team[name].seconds), name
        assert team[name].flops == one[name].flops
    outside = 2 * 2 * shape.vocab_size * shape.hidden_size
    gathered = 2 * shape.block_parameters * (1 / 8 + 1 / 40)
    assert outside + gathered < team["combine"].memory_bytes < outside + 1.2 * gathered


def test_rates_of_a_run_stand_in_for_peak_and_utilisation(tmp_path, monkeypatch):
    monkeypatch.setattr("ensemblelora.machines._LEAST_SECONDS", 0.0)
    ledger = {entry["stage"]: entry for entry in read_json(finished_run(), "costs.json")["stages"]}
    rated = with_measured_rates(MACHINE, finished_run() / "run")
    assert rated.rate_of("train") == ledger["train"]["flops"] / ledger["train"]["wall_seconds"]
    assert rated.host_flops == ledger["affinity"]["flops"] / ledger["affinity"]["wall_seconds"]
    assert rated.rate_of("unknown") == MACHINE.peak_flops * MACHINE.utilisation
    found, plain = (size_run(make_config(), model_shape(LLAMA_13B), MILLION, m) for m in (rated, MACHINE))
    for name in ("features", "train", "baselines", "evaluate"):
        ratio = MACHINE.rate_of(name) / rated.rate_of(name)
        assert found[name].seconds == pytest.approx(ratio * plain[name].seconds), name
    monkeypatch.setattr("ensemblelora.machines._LEAST_SECONDS", 1e9)
    assert with_measured_rates(MACHINE, finished_run() / "run") == MACHINE
    with pytest.raises(OutputError, match="not a run folder"):
        with_measured_rates(MACHINE, tmp_path)


def test_memory_of_the_host_is_near_what_the_oracle_took_with_a_million_rows():
    record = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text(encoding="utf-8"))
    sizes = record["config"]
    n_rows = sizes["n_examples"]
    data = DataSize(sizes["n_tasks"], round(0.8 * n_rows), round(0.2 * n_rows), 1, 64)
    found = size_run(make_config(gradients={"proj_dim": sizes["proj_dim"]}), model_shape(LLAMA_13B), data, MACHINE)
    assert 1.0 < found["affinity"].host_bytes / record["peak_memory_bytes"] < 1.3


def test_devices_that_can_work_at_once_divide_the_time_and_change_no_flops():
    config, shape = make_config(), model_shape(LLAMA_13B)
    one, eight = (size_run(config, shape, MILLION, replace(MACHINE, n_devices=n)) for n in (1, 8))
    for name, ratio in {"features": 8, "affinity": 8, "train": 6, "evaluate": 1}.items():
        assert one[name].seconds == pytest.approx(ratio * eight[name].seconds), name
        assert one[name].flops == eight[name].flops
    stages = [name for name in eight if name != "total"]
    assert one["total"].seconds == pytest.approx(sum(one[name].seconds for name in stages))
    rest = [name for name in stages if name not in ("train", "boost", "combine", "baselines")]
    beside = max(sum(eight[name].seconds for name in ("train", "boost", "combine")), eight["baselines"].seconds)
    assert eight["total"].seconds == pytest.approx(sum(eight[name].seconds for name in rest) + beside)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("8xTPU", "expected Nx and one of A100, H100"),
        ("0xH100", "such as 8xH100"),
        ("none.yaml", "expected n_devices, peak_flops, memory_gb"),
        ("wrong.yaml", "unexpected keyword argument"),
        ("share.yaml", "utilisation up to 1"),
    ],
)
def test_a_machine_that_is_none_is_refused(text, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("devices: 8\n", encoding="utf-8")
    fields = {key: value for key, value in asdict(MACHINE).items() if key != "rates"} | {"utilisation": 30}
    Path("share.yaml").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        read_machine(text)
    text = "n_devices: 8\npeak_flops: 9.89e14\nmemory_gb: 80\nutilisation: 0.3\nhost_flops: 1e10\n"
    Path("mine.yaml").write_text(text, encoding="utf-8")
    assert read_machine("mine.yaml") == MACHINE == read_machine("8xH100")


def test_what_has_no_closed_form_is_refused():
    for section in ({"adapter": {"method": "ia3"}}, {"gradients": {"proj_type": "sjlt"}}):
        with pytest.raises(ConfigError, match="sized are"):
            size_run(make_config(**section), model_shape(LLAMA_13B), MILLION, MACHINE)
    with pytest.raises(ModelError, match="name it or its folder with --model"):
        read_model_shape("nowhere")


def test_the_page_shows_what_the_command_says(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- forecast: begin -->")[2].partition("<!-- forecast: end -->")[0]
    (command,) = (line for line in page.splitlines() if line.startswith("ensemblelora forecast") and "13b" in line)
    (tmp_path / "llama-13b").mkdir()
    (tmp_path / "llama-13b" / "config.json").write_text(json.dumps(LLAMA_13B), encoding="utf-8")
    (tmp_path / "CONFIG").write_text("data: {tasks: [demo_rte]}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(command.split()[1:]) == 0
    told = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert shown.strip().splitlines()[1:-1] == told, "\n".join(told)


def test_the_command_needs_no_weights(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_13B), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {tasks: [demo_rte]}\ngrouping: {max_groups: 6}\n", encoding="utf-8")
    asked = ["forecast", str(recipe), "--model", str(tmp_path), "--machine", "8xH100", "--rows", "1000000", "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    expected = size_run(make_config(), model_shape(LLAMA_13B), MILLION, MACHINE)
    assert found.keys() == expected.keys()
    for name, stage in expected.items():
        assert found[name] == pytest.approx(asdict(stage), rel=1e-12), name
    monkeypatch.setattr("ensemblelora.machines._LEAST_SECONDS", 0.0)
    run = finished_run() / "run"
    assert main([*asked, "--measured", str(run)]) == 0
    slow, rated = json.loads(capsys.readouterr().out), with_measured_rates(MACHINE, run)
    assert slow["evaluate"]["seconds"] == pytest.approx(slow["evaluate"]["flops"] / rated.rate_of("evaluate"))
    assert main([*asked, "--tokens", "0"]) == 2
