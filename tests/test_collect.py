"""Features against their slow twin: autograd, one example at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, activate, attach
from ensemblelora.config import AdapterConfig, EstimationConfig, GradientsConfig
from ensemblelora.data.batching import collate
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import ModelError
from ensemblelora.estimation import TaskFeatures, build_oracle
from ensemblelora.gradients.collect import collect_features, compute_features, find_active_layers, make_projector
from ensemblelora.gradients.health import _measure_distortion, _pair_up
from ensemblelora.gradients.output import choose_mode, compute_outputs
from ensemblelora.gradients.projection import Projector
from ensemblelora.gradients.tap import layer_parts
from ensemblelora.models import prepare_base
from ensemblelora.scoring import score_batch
from ensemblelora.store import FeatureStore
from tests.tiny import CLASSIFIERS, DECODERS, PadOnly, disturb, make_adapted, make_base, make_network, make_split

EXACT = GradientsConfig(proj_type="none")
KINDS = ("rademacher", "gaussian", "sjlt", "kronecker")
CLASSIFICATION = {"lm": "verbalizer", "sequence_classification": "classification"}


def autograd_features(adapted, split: EncodedSplit, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (n, c) and unprojected gradients (n, c, p') by one backward pass per example and output."""
    linears = find_active_layers(adapted, [split])
    outputs, gradients = [], []
    with activate(adapted, THETA0, trainable=True):
        for example in range(split.n_examples):
            batch = collate([(split, example)], adapted.base.pad_token_id)
            z = score_batch(adapted.network, batch).z
            k = int(split.n_choices.max())
            z = torch.nn.functional.pad(z, (0, k - z.shape[1]), value=-torch.inf)
            u = compute_outputs(z, torch.from_numpy(batch.labels), torch.from_numpy(batch.n_choices), mode)[0]
            rows = []
            for value in u:
                adapted.peft.zero_grad(set_to_none=True)
                if value.requires_grad and value.grad_fn is not None:
                    value.backward(retain_graph=True)
                parts = []
                for module in linears.values():
                    for p in (module.weight, module.bias):
                        if p is not None:
                            parts.append((torch.zeros_like(p) if p.grad is None else p.grad).flatten())
                rows.append(torch.cat(parts).numpy().copy())
            outputs.append(u.detach().numpy())
            gradients.append(np.stack(rows))
    return np.stack(outputs), np.stack(gradients)


def hook_features(adapted, split: EncodedSplit, mode: str, config=EXACT, examples=None):
    projector = make_projector(config, seed=0)
    linears = find_active_layers(adapted, [split])
    chosen = range(split.n_examples) if examples is None else examples
    with activate(adapted, THETA0):
        batch = collate([(split, e) for e in chosen], adapted.base.pad_token_id)
        return compute_features(adapted, linears, projector, batch, mode, with_gram=True)


CASES = [
    ("llama", "lm", "verbalizer", 2, "margin"),
    ("llama", "lm", "verbalizer", 3, "contrast"),
    ("llama", "lm", "verbalizer", 4, "logodds"),
    ("llama", "lm", "options", 4, "contrast"),
    ("llama", "lm", "options", 2, "margin"),
    ("llama", "lm", "options", 3, "logodds"),
    ("llama", "lm", "sequence", 1, "sequence"),
    ("llama", "sequence_classification", "classification", 3, "contrast"),
    ("bert", "sequence_classification", "classification", 3, "contrast"),
    ("gpt2", "lm", "options", 3, "contrast"),
    ("gptj", "lm", "verbalizer", 3, "contrast"),
    ("qwen2", "lm", "sequence", 1, "sequence"),
]


@pytest.mark.parametrize(("family", "head", "kind", "n_choices", "mode"), CASES)
def test_hooks_equal_autograd_per_example(family: str, head: str, kind: str, n_choices: int, mode: str) -> None:
    adapted = make_adapted(family, head=head)
    split = make_split(kind, n_choices=n_choices)
    outputs, gradients = autograd_features(adapted, split, mode)
    fast = hook_features(adapted, split, mode)
    np.testing.assert_allclose(fast.outputs, outputs, rtol=1e-4, atol=1e-5)
    scale = np.abs(gradients).max()
    np.testing.assert_allclose(fast.features, gradients, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(fast.squared_norms, (gradients**2).sum((1, 2)), rtol=1e-4)
    gram = np.einsum("ncp,mcp->cnm", gradients, gradients)
    np.testing.assert_allclose(fast.gram, gram, rtol=1e-3, atol=1e-4 * np.abs(gram).max())


@pytest.mark.parametrize("kind", ["verbalizer", "options", "sequence"])
def test_an_adapted_output_layer_equals_autograd(kind: str) -> None:
    adapted = attach(make_base("llama"), AdapterConfig(r=2, target_modules=("lm_head", "q_proj")), seed=0)
    split, mode = make_split(kind), "sequence" if kind == "sequence" else "contrast"
    outputs, gradients = autograd_features(adapted, split, mode)
    fast = hook_features(adapted, split, mode)
    np.testing.assert_allclose(fast.outputs, outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fast.features, gradients, rtol=1e-4, atol=1e-5 * np.abs(gradients).max())


def test_ragged_choices_equal_autograd() -> None:
    adapted, split = make_adapted(), make_split("options", n_choices=4, ragged=True)
    outputs, gradients = autograd_features(adapted, split, "contrast")
    fast = hook_features(adapted, split, "contrast")
    np.testing.assert_allclose(fast.outputs, outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fast.features, gradients, rtol=1e-4, atol=1e-5 * np.abs(gradients).max())


def test_a_has_no_gradient_at_the_start_and_has_one_after_a_warm_up() -> None:
    adapted, split = make_adapted(), make_split("verbalizer")
    assert all(".lora_B" in name for name in find_active_layers(adapted, [split]))
    disturb(adapted)
    names = find_active_layers(adapted, [split])
    assert any(".lora_A" in name for name in names)
    assert any(".lora_B" in name for name in names)
    outputs, gradients = autograd_features(adapted, split, "contrast")
    fast = hook_features(adapted, split, "contrast")
    np.testing.assert_allclose(fast.features, gradients, rtol=1e-4, atol=1e-5 * np.abs(gradients).max())
    np.testing.assert_allclose(fast.outputs, outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_the_batch_or_its_padding(kind: str) -> None:
    adapted, split = make_adapted(), make_split("options", n=5)
    config = GradientsConfig(proj_type=kind, proj_dim=24)
    together = hook_features(adapted, split, "contrast", config)
    for example in range(split.n_examples):
        alone = hook_features(adapted, split, "contrast", config, examples=[example])
        np.testing.assert_allclose(alone.features[0], together.features[example], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "head"), [("llama", "lm"), ("bert", "sequence_classification")])
def test_projected_features_are_the_exact_ones_projected(kind: str, family: str, head: str) -> None:
    adapted, split = make_adapted(family, head=head), make_split(CLASSIFICATION[head], n_choices=3)
    if head == "lm":
        disturb(adapted)  # A gets a gradient too: wide matrices beside tall ones
    config = GradientsConfig(proj_type=kind, proj_dim=16)
    exact = hook_features(adapted, split, "contrast").features
    fast = hook_features(adapted, split, "contrast", config).features
    projector, expected, start = make_projector(config, seed=0), 0.0, 0
    for name, module in find_active_layers(adapted, [split]).items():
        for part, shape in layer_parts(name, module):
            size = int(np.prod(shape))
            expected = expected + exact[:, :, start : start + size] @ projector.matrix(part, shape)
            start += size
    assert start == exact.shape[2]
    np.testing.assert_allclose(fast, expected, rtol=1e-3, atol=1e-5 * np.abs(fast).max() + 1e-6)


@pytest.mark.parametrize("kind", ["verbalizer", "options"])
def test_every_output_is_projected_once_however_many_passes_there_are(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, split = make_adapted(), make_split(kind, n=6, n_choices=4)
    projected: Counter[str] = Counter()
    project = Projector.project

    def count(self: Projector, part: str, gradients: torch.Tensor) -> torch.Tensor:
        projected[part] += len(gradients)
        return project(self, part, gradients)

    monkeypatch.setattr(Projector, "project", count)
    hook_features(adapted, split, "contrast", GradientsConfig(proj_dim=8))
    assert projected and set(projected.values()) == {6 * 3}, "6 examples of 3 contrasts, in 3 passes or in one"


def test_store_holds_every_example_in_order_and_is_not_computed_twice(tmp_path: Path) -> None:
    adapted = make_adapted()
    splits = [make_split("verbalizer", n=7, task="a"), make_split("options", n=5, task="b", ragged=True)]
    identity = {(s.task, s.split): "x" for s in splits}
    store, config = FeatureStore(tmp_path), GradientsConfig(proj_dim=32, max_tokens_per_batch=24)
    with Meter("features") as meter:
        health = collect_features(adapted, splits, store, config, seed=0, fingerprints=identity, meter=meter)
    assert meter.record.n_tokens == sum(int(s.input_lengths.sum()) for s in splits)
    assert meter.record.flops > 0
    assert health.batch_error < 1e-5
    for split in splits:
        block = store.read(split.task, split.split)
        mode = choose_mode(split.kind, int(split.n_choices.max()), "auto")
        expected = hook_features(adapted, split, mode, config)
        assert block.ids == split.ids
        np.testing.assert_array_equal(block.labels, split.labels)
        np.testing.assert_allclose(block.features, expected.features, rtol=1e-3, atol=1e-4)
    with Meter("again") as again:
        collect_features(adapted, splits, store, config, seed=0, fingerprints=identity, meter=again)
    assert again.record.n_tokens == 0
    with Meter("changed") as changed:
        other = dict.fromkeys(identity, "y")
        collect_features(adapted, splits, store, config, seed=0, fingerprints=other, meter=changed)
    assert changed.record.flops == meter.record.flops


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_family_gives_features(family: str) -> None:
    features = hook_features(make_adapted(family), make_split("verbalizer"), "contrast", GradientsConfig(proj_dim=16))
    assert features.features.shape == (6, 2, 16)
    assert np.abs(features.features).min(axis=(1, 2)).max() > 0


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_head_counts_among_the_trained_coordinates(family: str) -> None:
    adapted = make_adapted(family, head="sequence_classification")
    names = find_active_layers(adapted, [make_split("classification")])
    assert any("classifier" in name or "score" in name for name in names)


def test_features_of_a_head_wider_than_the_task_are_those_of_the_tasks_own_classes(tmp_path: Path) -> None:
    adapted = make_adapted("llama", head="sequence_classification", n_labels=5)
    splits = [make_split("classification", n_choices=k, task=f"of-{k}") for k in (2, 3, 5)]
    store, identity = FeatureStore(tmp_path), {(s.task, s.split): "x" for s in splits}
    collect_features(adapted, splits, store, GradientsConfig(proj_dim=16), seed=0, fingerprints=identity)
    assert [store.read(s.task, s.split).n_outputs for s in splits] == [1, 2, 4]
    outputs, gradients = autograd_features(adapted, splits[1], "contrast")
    fast = hook_features(adapted, splits[1], "contrast")
    np.testing.assert_allclose(fast.outputs, outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fast.features, gradients, rtol=1e-4, atol=1e-5 * np.abs(gradients).max())


def test_a_model_that_sees_its_padding_is_refused(tmp_path: Path) -> None:
    adapted = make_adapted("bert", head="sequence_classification", initializer_range=0.3)
    split = make_split("classification")

    def see_everything(module, args, options):
        return args, options | {"attention_mask": torch.ones_like(options["attention_mask"])}

    adapted.network.register_forward_pre_hook(see_everything, with_kwargs=True)
    with pytest.raises(ModelError, match=r"gradient changes with its batch .* attention masks are not respected"):
        collect_features(
            adapted, [split], FeatureStore(tmp_path), GradientsConfig(), seed=0, fingerprints={("t", "train"): "x"}
        )


@pytest.mark.parametrize("widest", ["train", "validation"])
def test_splits_with_other_numbers_of_choices_meet_in_one_oracle(widest: str, tmp_path: Path) -> None:
    adapted, store = make_adapted(), FeatureStore(tmp_path)
    splits = [make_split("options", n=8, n_choices=4 if s == widest else 2, ragged=s == widest, split=s)
              for s in ("train", "validation")]  # fmt: skip
    collect_features(
        adapted, splits, store, GradientsConfig(proj_dim=16), seed=0,
        fingerprints={("t", "train"): "x", ("t", "validation"): "x"},
    )  # fmt: skip
    blocks = [store.read("t", split) for split in ("train", "validation")]
    assert [block.mode for block in blocks] == ["contrast", "contrast"]
    features = TaskFeatures(*((block,) for block in blocks))
    scores = build_oracle([features], EstimationConfig(method="ridge", l2_penalty=1.0)).score([(), (0,)])
    batch = collate([(splits[1], e) for e in range(8)], adapted.base.pad_token_id)
    with torch.no_grad():
        z = score_batch(adapted.network, batch).z
    true = torch.nn.functional.cross_entropy(z, torch.from_numpy(splits[1].labels))
    assert scores.nll[0, 0] == pytest.approx(float(true), rel=1e-4), "the base model's loss"


@pytest.mark.parametrize("head", ["lm", "sequence_classification"])
def test_precision_of_a_bfloat16_model_is_measured_and_its_weights_are_left_alone(head: str, tmp_path: Path) -> None:
    network = make_network("llama", head=head, initializer_range=0.15).bfloat16()
    base = prepare_base("low", network, PadOnly(), head=head)  # type: ignore[arg-type]
    adapted = attach(base, AdapterConfig(r=4), seed=0)
    split = make_split("verbalizer" if head == "lm" else "classification")
    before = {name: tensor.clone() for name, tensor in adapted.peft.state_dict().items()}
    health = collect_features(
        adapted, [split], FeatureStore(tmp_path), GradientsConfig(), seed=0, fingerprints={("t", "train"): "x"}
    )
    assert 0.98 < health.precision_cosine < 1.0
    after = adapted.peft.state_dict()
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())


def health_of(splits: list[EncodedSplit], folder: Path, **config):
    names = {(split.task, split.split): "x" for split in splits}
    settings = GradientsConfig(**config)
    return collect_features(make_adapted(), splits, FeatureStore(folder), settings, seed=0, fingerprints=names)


def test_health_of_a_float32_model(tmp_path: Path) -> None:
    health = health_of([make_split("verbalizer", n=12)], tmp_path)
    assert health.precision_cosine is None
    linears = find_active_layers(make_adapted(), [make_split("verbalizer")])
    assert health.n_coordinates == sum(m.weight.numel() for m in linears.values())
    assert (health.form, health.proj_dim) == ("projected", 400)


@pytest.mark.parametrize("kind", KINDS)
def test_the_measured_distortion_is_that_of_the_kind_and_dimension(kind: str, tmp_path: Path) -> None:
    """The median of a normal error's size is 0.67 of its standard deviation, 1/sqrt(d) or a little more."""
    splits = [make_split("verbalizer", n=12, task=f"t{i}", seed=i) for i in range(5)]
    for proj_dim in (16, 256):
        found = health_of(splits, tmp_path / str(proj_dim), proj_type=kind, proj_dim=proj_dim).projection_error
        assert 0.4 < found * proj_dim**0.5 < 1.3


@pytest.mark.parametrize(("n", "form"), [(20, "gram"), (500, "coordinates")])
def test_without_a_projection_nothing_is_distorted(n: int, form: str, tmp_path: Path) -> None:
    health = health_of([make_split("verbalizer", n=n)], tmp_path, proj_type="none")
    assert health.projection_error < 1e-6
    assert health.form == form
    assert health.proj_dim == (40 if form == "gram" else health.n_coordinates)


def test_distortion_is_the_median_error_over_all_pairs_of_some_batches() -> None:
    adapted, split = make_adapted(), make_split("verbalizer", n=7)
    exact = hook_features(adapted, split, "contrast").features.astype(np.float64)
    fast = hook_features(adapted, split, "contrast", GradientsConfig(proj_dim=8))
    errors = [
        abs(float(fast.features[i, k] @ fast.features[j, k]) - float(exact[i, k] @ exact[j, k]))
        / float(np.linalg.norm(exact[i, k]) * np.linalg.norm(exact[j, k]))
        for i, j in itertools.combinations(range(7), 2)
        for k in range(2)
    ]
    assert _measure_distortion([fast, fast]) == pytest.approx(np.median(errors), rel=1e-3)
    assert _measure_distortion([]) is None


@pytest.mark.parametrize(
    ("n", "max_tokens", "n_pairs"), [(40, 2048, 55), (40, 30, 5), (40, 1, 5), (3, 2048, 3), (1, 9, 0)]
)
def test_pairs_come_from_batches_within_the_limit_on_tokens(n: int, max_tokens: int, n_pairs: int) -> None:
    split = make_split("verbalizer", n=n)
    batches = _pair_up(split, "rows", max_tokens)
    assert sum(len(batch) * (len(batch) - 1) // 2 for batch in batches) >= n_pairs
    assert (n_pairs > 0) == bool(batches)
    longest = int(split.example_lengths.max())
    for batch in batches:
        assert len(set(batch)) == len(batch) > 1
        assert len(batch) * split.example_lengths[batch].max() <= max(max_tokens, 2 * longest)


def test_a_split_of_one_example_has_features(tmp_path: Path) -> None:
    adapted, split = make_adapted(), make_split("options", n=1)
    store = FeatureStore(tmp_path)
    config, identity = GradientsConfig(proj_dim=8), {("t", "train"): "x"}
    health = collect_features(adapted, [split], store, config, seed=0, fingerprints=identity)
    assert store.read("t", "train").features.shape == (1, 2, 8)
    assert health.projection_error is None, "one example makes no pair"
