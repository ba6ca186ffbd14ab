"""The frozen prefix: what is computed once below the adapted layers changes no number above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate, add_adapter, attach
from ensemblelora.boosting import BoostTask, boost
from ensemblelora.config import (
    AdapterConfig,
    BoostingConfig,
    EnsembleConfig,
    GradientsConfig,
    TrainingConfig,
    load_config,
)
from ensemblelora.data.batching import collate
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.gradients.collect import collect_features, make_projector
from ensemblelora.passes import run_lower, score, with_cache, without_cache
from ensemblelora.pipeline import run
from ensemblelora.prediction import predict_members
from ensemblelora.stages import settle_weights
from ensemblelora.store import FeatureStore
from ensemblelora.training import fine_tune
from tests.tiny import DECODERS, disturb, make_base, make_learnable_split, make_split
from tests.tiny_run import make_inputs

KINDS = ("verbalizer", "options", "sequence")


def make_top(family: str = "llama", *, head: str = "lm", n_layers: int = 4, **options) -> AdaptedModel:
    """A model whose top half is adapted."""
    size = {"n_layer": n_layers} if family.startswith("gpt") else {"num_hidden_layers": n_layers}
    base = make_base(family, head=head, **size, **options)
    return attach(base, AdapterConfig(r=2, lora_alpha=4, layers_to_transform="top_half"), seed=0)


def without_prefix(adapted: AdaptedModel) -> AdaptedModel:
    return replace(adapted, prefix=None)


def splits(kinds: Sequence[str] = KINDS, n: int = 6) -> list[EncodedSplit]:
    return [make_split(kind, n=n, seed=i) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_scores_and_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    head = "sequence_classification" if family == "bert" else "lm"
    adapted = make_top(family, head=head)
    assert adapted.prefix is not None
    assert adapted.prefix.depth == 2
    rows = splits(("classification",)) if family == "bert" else splits()
    cached = with_cache(adapted, tmp_path, rows, max_bytes=10**8)
    disturb(adapted)
    for split in rows:
        batch = collate([(split, e) for e in range(split.n_examples)], 0, layout=adapted.layout)
        found = []
        for model in (without_prefix(adapted), adapted, cached, cached):  # the second time from the file
            with activate(model, THETA0, trainable=True):
                z = score(model, batch).z
                z[torch.isfinite(z)].sum().backward()
            gradients = [p.grad.clone() for p in model.peft.parameters() if p.grad is not None]
            model.peft.zero_grad(set_to_none=True)
            found.append((z.detach(), gradients))
        assert found[0][1], "there is a gradient to compare"
        for z, gradients in found[1:]:
            torch.testing.assert_close(z, found[0][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradients, found[0][1], rtol=1e-3, atol=1e-6)


def test_the_lowest_layer_adapted_leaves_nothing_to_keep(tmp_path: Path) -> None:
    adapted = attach(make_base("llama"), AdapterConfig(r=2), seed=0)
    assert adapted.prefix is None
    assert with_cache(adapted, tmp_path / "cache", splits(), max_bytes=10**8) is adapted
    assert not (tmp_path / "cache").exists()


def test_a_row_is_run_once_whoever_asks(tmp_path: Path) -> None:
    (split,) = splits(("options",))
    adapted = with_cache(make_top(), tmp_path, [split], max_bytes=10**8)
    batches = [collate([(split, e)], 0, layout="rows") for e in range(split.n_examples)]
    meters = [Meter("first"), Meter("then")]
    for meter in meters:
        hidden = [run_lower(adapted, batch, meter=meter) for batch in batches]
    assert meters[0].record.flops > 0
    assert meters[1].record.flops == 0
    assert adapted.prefix is not None
    for batch, found in zip(batches, hidden, strict=True):
        real = torch.from_numpy(batch.attention_mask).bool()
        assert found is not None
        torch.testing.assert_close(found[real], adapted.prefix.run(batch)[real], rtol=1e-5, atol=1e-6)


def test_an_example_keeps_its_common_context_once(tmp_path: Path) -> None:
    (split,) = splits(("options",))
    assert split.shared_lengths.sum() > 0
    adapted = with_cache(make_top(), tmp_path, [split], max_bytes=10**8)
    run_lower(adapted, collate([(split, 0)], 0))
    (file,) = tmp_path.rglob("hidden.npy")
    unshared = split.input_lengths.sum() - ((split.row_counts - 1) * split.shared_lengths).sum()
    assert np.load(file, mmap_mode="r").shape == (unshared, 32)


def test_what_does_not_fit_is_run_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = splits(("verbalizer", "sequence"))
    room = int(first.input_lengths.sum()) * 32 * 4
    adapted = with_cache(make_top(), tmp_path, [first, second], max_bytes=room)
    meter = Meter("lower")
    for _ in range(2):
        before = meter.record.flops
        for split in (first, second):
            assert run_lower(adapted, collate([(split, 0)], 0), meter=meter) is not None
    assert meter.record.flops > before, "the second split runs again"
    assert len(list(tmp_path.rglob("hidden.npy"))) == 1
    assert sum(f.stat().st_size for f in tmp_path.rglob("hidden.npy")) <= room + 128


def test_a_batch_is_run_as_far_as_it_is_not_kept(tmp_path: Path) -> None:
    first, second = splits(("options", "sequence"))
    unshared = int(first.input_lengths.sum() - ((first.row_counts - 1) * first.shared_lengths).sum())
    adapted = with_cache(make_top(), tmp_path, [first, second], max_bytes=unshared * 32 * 4)
    batch = collate([(first, 0), (second, 1), (first, 2)], 0, layout=adapted.layout)
    run_lower(adapted, batch)  # fills the first split
    meter, whole = Meter("lower"), Meter("whole")
    found = run_lower(adapted, batch, meter=meter)
    expected = run_lower(without_cache(adapted), batch, meter=whole)
    real = torch.from_numpy(batch.attention_mask).bool()
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-6)
    assert 0 < meter.record.flops < whole.record.flops


def test_other_weights_or_rows_do_not_find_the_file_and_take_its_place(tmp_path: Path) -> None:
    (split,), (other,) = splits(("verbalizer",)), [make_split("verbalizer", n=6, seed=9)]
    for adapted, rows in ((make_top(), split), (make_top(n_layers=6), split), (make_top(), other), (make_top(), split)):
        meter = Meter("fills")
        run_lower(with_cache(adapted, tmp_path, [rows], max_bytes=10**8), collate([(rows, 0)], 0), meter=meter)
        assert meter.record.flops > 0
        assert len(list(tmp_path.rglob("hidden.npy"))) == 1, "the limit is for all files together"
    meter = Meter("again")
    run_lower(with_cache(make_top(), tmp_path, [split], max_bytes=10**8), collate([(split, 0)], 0), meter=meter)
    assert meter.record.flops == 0


def test_a_family_that_can_not_be_taken_up_in_the_middle_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblelora.prefix._can_resume", lambda prefix: False)
    assert make_top().prefix is None
    monkeypatch.undo()
    monkeypatch.setattr("ensemblelora.prefix._count_outputs", lambda *_: 3)  # a tuple where a tensor is read
    assert make_top().prefix is None


def test_a_half_filled_file_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (split,) = splits(("verbalizer",), n=300)
    adapted = with_cache(make_top(), tmp_path, [split], max_bytes=10**8)
    assert adapted.prefix is not None
    with monkeypatch.context() as patch:
        runs: list[int] = []

        def stumble(self: object, batch: object) -> torch.Tensor:
            raise KeyboardInterrupt

        patch.setattr(type(adapted.prefix), "run", stumble)
        with pytest.raises(KeyboardInterrupt):
            run_lower(adapted, collate([(split, 0)], 0))
        assert not runs
    assert not list(tmp_path.rglob("hidden.npy"))
    assert run_lower(adapted, collate([(split, 0)], 0)) is not None


def test_training_features_and_prediction_agree_with_and_without(tmp_path: Path) -> None:
    train, held = splits(("verbalizer", "options"), n=16), splits(("verbalizer", "options"), n=8)
    config = TrainingConfig(learning_rate=0.01, num_train_epochs=2, max_examples_per_batch=8)
    found = []
    for name, max_bytes in (("plain", None), ("prefix", 0), ("cache", 10**8)):
        adapted = make_top()
        model = (
            without_prefix(adapted)
            if max_bytes is None
            else with_cache(adapted, tmp_path / name, [*train, *held], max_bytes=max_bytes)
        )
        store = FeatureStore(tmp_path / f"{name}-features")
        prints = {(s.task, s.split): "x" for s in train[:1]}
        collect_features(model, train[:1], store, GradientsConfig(proj_dim=16), seed=0, fingerprints=prints)
        trained = fine_tune(
            model, "one", train, held, config, seed=0, checkpoints=tmp_path / f"{name}-checkpoints", meter=Meter("t")
        )
        add_adapter(model, "two")
        values = [predict_members(model, s, ["one", "two", THETA0], max_tokens=200).values for s in held]
        features = np.asarray(store.read(train[0].task, "train").features)
        found.append((features, trained.best_validation_nll, values))
    for features, nll, values in found[1:]:
        np.testing.assert_allclose(features, found[0][0], rtol=1e-3, atol=1e-5)
        assert nll == pytest.approx(found[0][1], rel=1e-4)
        for ours, theirs in zip(values, found[0][2], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_dropout_below_the_adapted_layers_is_off_in_training() -> None:
    adapted = make_top("gpt2")
    (split,) = splits(("verbalizer",))
    batch = collate([(split, 0)], 0)
    assert adapted.prefix is not None
    adapted.peft.train()
    torch.testing.assert_close(adapted.prefix.run(batch), adapted.prefix.run(batch))
    assert adapted.network.training


def test_a_run_keeps_the_files_while_it_lasts_and_no_longer(tmp_path: Path) -> None:
    changes = ("adapter.layers_to_transform=top_half", "training.num_train_epochs=1", "evaluation.baselines=[]")
    config = load_config(make_inputs(tmp_path), changes)
    run(config, until="train")
    assert list((tmp_path / "run" / "cache").rglob("hidden.npy"))
    run(config)
    assert (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "cache").exists()


def test_boosting_and_weights_agree_with_and_without(tmp_path: Path) -> None:
    train, held = (
        [make_learnable_split(kind, n=24, seed=seed, task=kind, split=name) for kind in ("verbalizer", "options")]
        for seed, name in ((0, "train"), (50, "validation"))
    )
    settings = BoostingConfig(n_rounds=1, l2_penalty=0.1)
    gradients, found = GradientsConfig(proj_dim=16), []
    for name in ("plain", "prefix", "cache"):
        adapted = make_top(initializer_range=0.15)
        model = without_prefix(adapted) if name == "plain" else adapted
        if name == "cache":
            model = with_cache(adapted, tmp_path / name, [*train, *held], max_bytes=10**8)
        store = FeatureStore(tmp_path / f"{name}-features")
        prints = {(split.task, split.split): "x" for split in train}
        collect_features(model, train, store, gradients, seed=0, fingerprints=prints)
        tasks = [BoostTask(t, v, store.read(t.task, "train")) for t, v in zip(train, held, strict=True)]
        for member in ("group-0", "group-1"):
            add_adapter(model, member)
        disturb(model, "group-1", seed=3)
        members, projector = ["group-0", "group-1"], make_projector(gradients, seed=0)
        given = {"projector": projector, "max_tokens": 200, "seed": 0, "meter": Meter("boost")}
        rounds = boost(model, members, [tasks, []], settings, **given)
        scores = [predict_members(model, split, members, max_tokens=200) for split in held]
        weights, _ = settle_weights(
            scores, held, [0, 0], [(0, 1)] * 2, EnsembleConfig(min_weight=0.0), n_groups=2, seed=0
        )
        found.append(([(r.train_nll_before, r.train_nll_after, r.heldout_nll_after) for r in rounds], weights))
    assert found[0][0] and found[0][0][0][1] < found[0][0][0][0], "the booster has changed something"
    assert 0 < found[0][1].min(), "both members count, so that the weights say something"
    for losses, weights in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-3)
        np.testing.assert_allclose(weights, found[0][1], atol=2e-3)
