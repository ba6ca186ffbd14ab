"""Several adapters trained in lock step over one base: training them one by one is the slow twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from ensemblelora import pipeline
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, adapter_state, add_adapter, attach
from ensemblelora.config import AdapterConfig, TrainingConfig
from ensemblelora.data.batching import collate
from ensemblelora.errors import ModelError, TrainingError
from ensemblelora.fusion import can_mix, fused
from ensemblelora.passes import with_cache
from ensemblelora.progress import announcing
from ensemblelora.scoring import score_batch
from ensemblelora.stages import learning
from ensemblelora.switch import MemberSwitch
from ensemblelora.training import TrainedAdapter, TrainingJob, fine_tune, fine_tune_together, steps
from ensemblelora.training.steps import StepPlan, plan_passes
from tests.test_training import DyingMeter, Killed, make_dropping
from tests.tiny import disturb, make_adapted, make_base, make_learnable_split, make_split
from tests.tiny_run import copy_run, finished_run, read_config, read_json, tensors_of

CONFIG = TrainingConfig(learning_rate=1e-2, num_train_epochs=2, max_examples_per_batch=8, weight_decay=0.1)
GROUPS = {"small": (("options",), 7), "large": (("verbalizer", "options"), 16), "text": (("sequence",), 14)}


def make_job(name: str, kinds: Sequence[str], n: int) -> TrainingJob:
    def make(split: str, size: int, seed: int) -> list[Any]:
        tasks = enumerate(kinds)
        return [make_learnable_split(k, n=size, seed=seed + i, task=f"{name}-{k}", split=split) for i, k in tasks]

    return TrainingJob(name, make("train", n, n), make("validation", 8, n + 50))


def make_jobs() -> list[TrainingJob]:
    return [make_job(name, *group) for name, group in GROUPS.items()]


def make_attached(**settings: Any) -> AdaptedModel:
    settings = {"r": 4, "lora_alpha": 8} | settings
    return attach(make_base("llama"), AdapterConfig(**settings), seed=0)


def train_one_by_one(
    adapted: AdaptedModel, jobs: Sequence[TrainingJob], config: TrainingConfig, folder: Path, meter: Meter
) -> list[TrainedAdapter]:
    options = {"seed": 0, "checkpoints": folder / "alone", "meter": meter}
    return [fine_tune(adapted, job.name, job.train, job.validation, config, **options) for job in jobs]


def train_together(
    adapted: AdaptedModel,
    folder: Path,
    config: TrainingConfig = CONFIG,
    *,
    jobs: Sequence[TrainingJob] | None = None,
    meter: Meter | None = None,
) -> tuple[TrainedAdapter, ...]:
    return fine_tune_together(
        adapted, jobs or make_jobs(), config, seed=0, checkpoints=folder / "scratch", meter=meter or Meter("train")
    )


def assert_alike(ours: AdaptedModel, theirs: AdaptedModel, name: str) -> None:
    found, expected = adapter_state(ours, name), adapter_state(theirs, name)
    assert found.keys() == expected.keys() != set()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4, msg=f"{name} {key}")


@pytest.fixture
def members_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Whose rows each training pass holds."""
    seen: list[tuple[str, ...]] = []
    use = MemberSwitch.use

    def spy(self: MemberSwitch, members: Sequence[str], row_counts: Sequence[int] | None = None) -> None:
        if row_counts is not None:
            seen.append(tuple(members))
        use(self, members, row_counts)

    monkeypatch.setattr(MemberSwitch, "use", spy)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("counts", [(3, 1, 5), (2, 2, 2), (0, 4, 1)])
def test_unequal_parts_compute_and_learn_as_each_alone(family: str, counts: tuple[int, ...]) -> None:
    adapted, names = make_adapted(family), ("one", "two", "three")
    for seed, name in enumerate(names):
        add_adapter(adapted, name)
        disturb(adapted, name, seed=seed)
    split = make_split("verbalizer", n=sum(counts))
    ends = np.cumsum((0, *counts))
    parts = [[(split, int(e)) for e in range(ends[i], ends[i + 1])] for i in range(3)]
    expected: dict[str, torch.Tensor] = {}
    scores = []
    for name, own in zip(names, parts, strict=True):
        with activate(adapted, name, trainable=True):
            if own:
                scores.append(score_batch(adapted.network, collate(own, 0)).z)
                scores[-1].pow(2).sum().backward()
            expected |= {path: p.grad.clone() for path, p in adapted.peft.named_parameters() if p.grad is not None}
        adapted.peft.zero_grad(set_to_none=True)
    with fused(adapted, names) as switch:
        for path, parameter in adapted.peft.named_parameters():
            parameter.requires_grad_(path in expected)
        switch.use(names, counts)
        z = score_batch(adapted.network, collate([part for own in parts for part in own], 0)).z
        z.pow(2).sum().backward()
    torch.testing.assert_close(z, torch.cat(scores), rtol=1e-4, atol=1e-5)
    for path, gradient in expected.items():
        torch.testing.assert_close(dict(adapted.peft.named_parameters())[path].grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        ({}, False),
        ({"layers_to_transform": "top_half"}, False),
        ({"layers_to_transform": "top_half", "train_A": False}, True),
    ],
    ids=["all layers", "frozen prefix", "frozen prefix kept, frozen A"],
)
def test_together_is_one_by_one(
    settings: dict[str, Any], keeps: bool, tmp_path: Path, members_of_passes: list[tuple[str, ...]]
) -> None:
    jobs, ours, theirs = make_jobs(), make_attached(**settings), make_attached(**settings)
    splits = [split for job in jobs for split in (*job.train, *job.validation)]
    probe = with_cache(ours, tmp_path / "cache", splits, max_bytes=10**8 if keeps else 0)
    meters = Meter("together"), Meter("alone")
    found = train_together(probe, tmp_path, jobs=jobs, meter=meters[0])
    assert len(list((tmp_path / "cache").rglob("hidden.npy"))) == (len(splits) if keeps else 0)
    assert len({len(members) for members in members_of_passes}) > 1, "some batches share a pass, some don't"
    n_passes = len(members_of_passes)
    expected = train_one_by_one(theirs, jobs, CONFIG, tmp_path, meters[1])
    assert len({trained.n_steps for trained in expected}) == len(GROUPS)
    assert n_passes < sum(trained.n_steps for trained in expected)
    for trained, alone in zip(found, expected, strict=True):
        assert (trained.name, trained.tasks, trained.n_steps) == (alone.name, alone.tasks, alone.n_steps)
        assert trained.best_step == alone.best_step
        assert [r["step"] for r in trained.history] == [r["step"] for r in alone.history]
        losses = [[r["validation_nll"] for r in record.history] for record in (trained, alone)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
        assert trained.best_validation_nll == min(losses[0])
        assert_alike(ours, theirs, trained.name)
        moved = [adapter_state(ours, trained.name)[key] - start for key, start in adapter_state(ours, THETA0).items()]
        assert max(float(move.abs().max()) for move in moved) > 1e-2
    assert meters[0].record.n_tokens == meters[1].record.n_tokens
    assert meters[0].record.n_padded_tokens >= meters[1].record.n_padded_tokens


@pytest.mark.parametrize(
    ("limit", "change"),
    [
        (
            {"_BUDGETS_PER_PASS": 0},
            {"gradient_checkpointing": True, "lr_scheduler_type": "cosine", "evaluations_per_epoch": 2},
        ),
        ({"_MAX_WASTE": -1.0}, {"loss": "vocab_softmax", "max_grad_norm": 0.1}),
    ],
)
def test_how_batches_share_passes_changes_nothing(
    limit: dict[str, float],
    change: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    members_of_passes: list[tuple[str, ...]],
) -> None:
    config = CONFIG.model_copy(update=change)
    ours, theirs = make_adapted("llama"), make_adapted("llama")
    monkeypatch.setattr(steps, "_MAX_WASTE", 1.0)
    found = train_together(ours, tmp_path, config)
    assert {len(members) for members in members_of_passes} == {1, 2, 3}, "all that are still at work"
    members_of_passes.clear()
    for name, value in limit.items():
        monkeypatch.setattr(steps, name, value)
    expected = train_together(theirs, tmp_path, config)
    assert {len(members) for members in members_of_passes} == {1}
    for trained, alone in zip(found, expected, strict=True):
        assert (trained.n_steps, trained.best_step) == (alone.n_steps, alone.best_step)
        assert_alike(ours, theirs, trained.name)


def test_passes_hold_every_batch_once_within_their_limits() -> None:
    generator = np.random.default_rng(0)
    n_shared = 0
    for _ in range(300):
        sizes = [(int(generator.integers(1, 20)), int(generator.integers(5, 200))) for _ in range(6)]
        plan = plan_passes(sizes, max_tokens=4000)
        assert sorted(i for indices in plan for i in indices) == list(range(6))
        for indices in plan:
            padded = sum(sizes[i][0] for i in indices) * max(sizes[i][1] for i in indices)
            own = sum(sizes[i][0] * sizes[i][1] for i in indices)
            assert len(indices) == 1 or (padded <= 4000 and own >= 0.75 * padded)
            n_shared += len(indices) > 1
    assert n_shared > 100
    assert plan_passes([(4, 10)] * 5, max_tokens=120) == [[0, 1, 2], [3, 4]]
    assert plan_passes([], max_tokens=1) == []


@pytest.mark.parametrize("layout", ["rows", "shared", "answer"])
def test_an_adapters_batches_are_its_own_whoever_trains_beside_it(layout: Any) -> None:
    jobs, options = make_jobs(), {"seed": 0, "layout": layout, "pad_token_id": 0}
    together = StepPlan(jobs, CONFIG, **options)
    assert len(together) == max(together.step_counts.values())
    for job in jobs:
        alone = StepPlan([job], CONFIG, **options)
        assert len(alone) == together.step_counts[job.name]
        for step in range(len(together)):
            own = [p for p in together[step] if job.name in p.members]
            assert len(own) == (step < len(alone))
            for shared in own:
                (one,) = alone[step]
                assert one.batch.input_ids.shape == alone._measure(0, step)
                j = shared.members.index(job.name)
                first = sum(shared.row_counts[:j])
                rows = slice(first, first + shared.row_counts[j])
                width = one.batch.input_ids.shape[1]
                np.testing.assert_array_equal(shared.batch.input_ids[rows, :width], one.batch.input_ids)
                assert not shared.batch.attention_mask[rows, width:].any()
                first = sum(shared.example_counts[:j])
                examples = slice(first, first + shared.example_counts[j])
                np.testing.assert_array_equal(shared.batch.examples[examples], one.batch.examples)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdaptedModel, tuple[TrainedAdapter, ...], int]:
    """A joint training with dropout that nothing disturbed: model, records, passes."""
    adapted, meter = make_dropping(), DyingMeter(10**6)
    return adapted, train_together(adapted, tmp_path_factory.mktemp("whole"), meter=meter), 10**6 - meter.left


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    share: float, uninterrupted: tuple[AdaptedModel, tuple[TrainedAdapter, ...], int], tmp_path: Path
) -> None:
    whole, expected, n_passes = uninterrupted
    with pytest.raises(Killed):
        train_together(make_dropping(), tmp_path, meter=DyingMeter(round(share * n_passes)))
    resumed, meter = make_dropping(), DyingMeter(n_passes - 1)  # what was done is not done again
    torch.manual_seed(99)  # another process is in another state
    assert train_together(resumed, tmp_path, meter=meter) == expected
    for name in GROUPS:
        ours, theirs = adapter_state(resumed, name), adapter_state(whole, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("file", ["adapter_model", "best"])
def test_a_damaged_checkpoint_is_named_and_its_steps_are_done_again(
    file: str,
    uninterrupted: tuple[AdaptedModel, tuple[TrainedAdapter, ...], int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(Killed):
        train_together(make_dropping(), tmp_path, meter=DyingMeter(12))
    for path in (tmp_path / "scratch").glob(f"checkpoint-*/text/{file}.safetensors"):
        path.write_bytes(b"cut")
    assert train_together(make_dropping(), tmp_path) == uninterrupted[1]
    assert f"text/{file}.safetensors: 3 bytes" in caplog.text


def test_the_adapter_whose_loss_breaks_is_named(tmp_path: Path) -> None:
    jobs = make_jobs()
    broken = [replace(split, divisors=np.full_like(split.divisors, math.nan)) for split in jobs[2].train]
    jobs[2] = replace(jobs[2], train=broken)
    adapted = make_adapted("llama")
    with pytest.raises(TrainingError, match="adapter 'text': training loss became nan after 0 steps"):
        train_together(adapted, tmp_path, jobs=jobs)
    assert adapted.peft.active_adapter == THETA0
    assert not adapted.peft.training


def test_what_overflows_in_one_adapter_stays_there() -> None:
    adapted = make_adapted("llama")
    for name in ("one", "two"):
        add_adapter(adapted, name)
        disturb(adapted, name)
    for path, parameter in adapted.peft.named_parameters():
        if ".lora_A.two." in path:
            parameter.data.fill_(math.inf)
    split = make_split("verbalizer", n=5)
    with fused(adapted, ["one", "two"]) as switch, torch.inference_mode():
        switch.use(["one", "two"], [2, 3])
        z = score_batch(adapted.network, collate([(split, e) for e in range(5)], 0)).z
    assert z[:2].isfinite().all()
    assert not z[2:].isfinite().any()


def test_nothing_but_the_adapters_changes_and_no_file_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapted = make_adapted("llama")
    before = {name: tensor.clone() for name, tensor in adapted.peft.state_dict().items()}
    trainable = {name for name, p in adapted.peft.named_parameters() if p.requires_grad}
    train_together(adapted, tmp_path)
    after = adapted.peft.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name for name, p in adapted.peft.named_parameters() if p.requires_grad} == trainable
    assert all(p.grad is None for p in adapted.peft.parameters())
    assert adapted.peft.active_adapter == THETA0
    assert not any("forward" in vars(module) for module in adapted.network.modules())
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_heads_of_their_own_are_refused(tmp_path: Path) -> None:
    adapted = make_adapted("bert", head="sequence_classification")
    assert not can_mix(adapted)
    with pytest.raises(ModelError, match=r"adapters small, large, text: .* one by one"):
        train_together(adapted, tmp_path)
    output = attach(make_base("llama"), AdapterConfig(target_modules=("q_proj", "lm_head")), seed=0)
    assert not can_mix(output)


def forget_groups(folder: Path, *names: str) -> None:
    for name in ("train", *names):
        (folder / "run" / "stages" / f"{name}.json").unlink()


def test_a_run_trains_its_groups_together(tmp_path: Path, members_of_passes: list[tuple[str, ...]]) -> None:
    recipe = copy_run(tmp_path)
    alone = {name: read_json(tmp_path, f"adapters/{name}/training.json") for name in ("group-0", "group-1")}
    config = read_config(recipe, training={"together": True})
    pipeline.run(config, until="train")
    assert ("group-0", "group-1") in members_of_passes
    for name, record in alone.items():
        ours = read_json(tmp_path, f"adapters/{name}/training.json")
        assert (ours["tasks"], ours["n_steps"], ours["best_step"]) == (
            record["tasks"],
            record["n_steps"],
            record["best_step"],
        )
        assert ours["best_validation_nll"] == pytest.approx(record["best_validation_nll"], rel=1e-4)
    assert not (tmp_path / "run" / "checkpoints").exists()
    trained = tensors_of(tmp_path, ["group-0", "group-1"])
    assert len(trained) == 2
    members_of_passes.clear()
    forget_groups(tmp_path, "group-1")
    pipeline.run(config, until="train")
    assert set(members_of_passes) == {("group-1",)}, "the other is there already"
    assert tensors_of(tmp_path, ["group-0"]) == {"group-0": trained["group-0"]}
    members_of_passes.clear()
    pipeline.run(config, until="train")
    assert members_of_passes == []


def test_a_run_that_can_not_trains_one_by_one_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members_of_passes: list[tuple[str, ...]]
) -> None:
    recipe, said = copy_run(tmp_path), StringIO()
    monkeypatch.setattr(learning, "can_mix", lambda probe: False)
    with announcing(Console(file=said)):
        pipeline.run(read_config(recipe, training={"together": True}), until="train")
    assert "training.together: " in said.getvalue()
    assert {len(members) for members in members_of_passes} == {1}
    assert tensors_of(tmp_path, ["group-0"]) == tensors_of(finished_run(), ["group-0"])


@pytest.mark.parametrize("compiles", [True, False])
def test_compiling_on_a_processor_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    said = StringIO()
    with announcing(Console(file=said, width=200)):
        train_together(make_adapted("llama"), tmp_path, CONFIG.model_copy(update={"compile": compiles}))
    assert said.getvalue().count("compiling takes minutes on a processor; it pays in long runs on a GPU") == compiles


@pytest.mark.slow
def test_compiled_steps_begin_above_the_frozen_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: make(self, backend="eager", **options))
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    settings = AdapterConfig(r=2, lora_alpha=4, layers_to_transform="top_half")
    compiled, plain = (attach(make_base("llama"), settings, seed=0) for _ in range(2))
    assert compiled.prefix is not None
    jobs = make_jobs()[2:]
    train_together(compiled, tmp_path, CONFIG.model_copy(update={"compile": True}), jobs=jobs)
    assert 0 < graphs["unique_graphs"] <= 2, "the stand-in for the lower blocks is compiled once"
    train_together(plain, tmp_path, jobs=jobs)
    assert_alike(compiled, plain, "text")


@pytest.mark.slow
def test_compiled_steps_are_made_once_for_each_way_the_model_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = torch.nn.Module.compile
    # What is captured is the same with the real backend, which takes minutes.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: make(self, backend="eager", **options))
    graphs = torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()
    graphs.clear()
    config = CONFIG.model_copy(update={"evaluations_per_epoch": 4})
    jobs, alone = make_jobs(), make_jobs()[2:]
    compiled, plain = make_adapted("llama"), make_adapted("llama")
    train_together(compiled, tmp_path, config.model_copy(update={"compile": True}), jobs=alone)
    assert graphs["unique_graphs"] <= 2, "validation leaves the compiled code alone"
    train_together(plain, tmp_path, config, jobs=alone)
    assert_alike(compiled, plain, "text")
    train_together(compiled, tmp_path, config.model_copy(update={"compile": True}), jobs=jobs)
    train_together(plain, tmp_path, config, jobs=jobs)
    for name in GROUPS:
        assert_alike(compiled, plain, name)
