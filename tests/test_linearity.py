"""The measured linearity of trained adapters against autograd, and in the limit where every model is linear."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, activate, adapter_state, add_adapter, set_adapter_state
from ensemblelora.data.batching import collate
from ensemblelora.evaluation import linearity
from ensemblelora.evaluation.linearity import measure_linearity
from ensemblelora.gradients.output import choose_modes, compute_outputs
from ensemblelora.scoring import score_batch
from tests.tiny import disturb, make_adapted, make_split

CASES = [
    ("llama", "lm", "verbalizer", 2),
    ("llama", "lm", "verbalizer", 3),
    ("gpt2", "lm", "options", 3),
    ("qwen2", "lm", "sequence", 1),
    ("bert", "sequence_classification", "classification", 3),
]


def move(adapted, name: str, scale: float) -> None:
    """Put an adapter at theta0 plus a scaled random step in the coordinates that have a gradient there (LoRA's B)."""
    add_adapter(adapted, name)
    start = adapter_state(adapted, THETA0)
    disturb(adapted, name, scale=1.0, seed=7)
    end = adapter_state(adapted, name)
    moved = {k: start[k] if "lora_A" in k else start[k] + scale * (end[k] - start[k]) for k in start}
    set_adapter_state(adapted, name, moved)


def outputs_of(adapted, split, name: str, *, with_gradient: bool = False, mode: str | None = None):
    """Every example's outputs, one example at a time."""
    mode = mode or choose_modes([split], "auto")[split.task]
    found = []
    with activate(adapted, name, trainable=with_gradient), torch.set_grad_enabled(with_gradient):
        for example in range(split.n_examples):
            batch = collate([(split, example)], adapted.base.pad_token_id)
            z = score_batch(adapted.network, batch).z
            labels, n_choices = torch.from_numpy(batch.labels), torch.from_numpy(batch.n_choices)
            found.append(compute_outputs(z, labels, n_choices, mode)[0])
    return found


def measure(adapted, splits, members, *, max_rows=99, max_tokens=40, meter=None):
    modes = choose_modes(splits, "auto")
    options = {"max_rows": max_rows, "max_tokens": max_tokens, "meter": meter or Meter("t")}
    return measure_linearity(adapted, splits, members, modes, **options)


def predict_by_autograd(adapted, split, name: str, *, mode: str | None = None) -> np.ndarray:
    """``u* + grad u . (X - theta0)`` with one backward pass per example and output, all parameters at once."""
    start, end = adapter_state(adapted, THETA0), adapter_state(adapted, name)
    rows = []
    for u in outputs_of(adapted, split, THETA0, with_gradient=True, mode=mode):
        row = []
        for value in u:
            with activate(adapted, THETA0, trainable=True):
                parameters = {n: p for n, p in adapted.peft.named_parameters() if p.requires_grad}
                gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
            change = 0.0
            for path, gradient in zip(parameters, gradients, strict=True):
                key = path.replace(f".{THETA0}", "").replace(".modules_to_save", "")
                if gradient is not None:
                    change += float((gradient.double() * (end[key] - start[key]).double()).sum())
            row.append(float(value.detach()) + change)
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(("family", "head", "kind", "n_choices"), CASES)
def test_it_is_what_autograd_gives_one_example_at_a_time(family, head, kind, n_choices):
    adapted = make_adapted(family, head=head)
    move(adapted, "far", 4.0)
    split = make_split(kind, n=5, n_choices=n_choices)
    (found,) = measure(adapted, [split], ["far"])
    true = torch.stack(outputs_of(adapted, split, "far")).double().numpy()
    start = torch.stack(outputs_of(adapted, split, THETA0)).double().numpy()
    missed = ((true - predict_by_autograd(adapted, split, "far")) ** 2).sum()
    assert found.n_rows == 5
    assert found.r2_over_zero_order == pytest.approx(1 - missed / ((true - start) ** 2).sum(), rel=1e-4, abs=1e-4)
    assert found.rms_relative_error == pytest.approx(np.sqrt(missed / (true**2).sum()), rel=1e-3)


@pytest.mark.parametrize(("family", "head", "kind", "n_choices"), CASES)
def test_for_a_tiny_step_every_model_is_linear_and_the_rest_falls_with_its_square(family, head, kind, n_choices):
    adapted = make_adapted(family, head=head)
    split = make_split(kind, n=6, n_choices=n_choices)
    errors = []
    for name, scale in (("near", 0.05), ("nearer", 0.025)):
        move(adapted, name, scale)
        (found,) = measure(adapted, [split], [name])
        assert found.r2_over_zero_order > 0.98
        errors.append(found.rms_relative_error)
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.35), "the remainder is not of second order"


def test_every_task_is_measured_under_its_own_member():
    adapted = make_adapted()
    move(adapted, "near", 0.05)
    move(adapted, "far", 30.0)
    splits = [make_split("verbalizer", seed=seed, task=f"t{seed}") for seed in range(3)]
    found = measure(adapted, splits, ["near", "far", "near"])
    assert found[0].r2_over_zero_order > 0.99 > found[1].r2_over_zero_order
    assert found[2].r2_over_zero_order > 0.99


def test_an_adapter_that_did_not_move_has_nothing_to_explain():
    adapted = make_adapted()
    add_adapter(adapted, "still")
    (found,) = measure(adapted, [make_split("verbalizer")], ["still"], max_rows=4)
    assert found.r2_over_zero_order is None
    assert found.rms_relative_error == pytest.approx(0.0, abs=1e-6) and found.n_rows == 4


@pytest.mark.parametrize(
    ("kind", "n_choices", "n_backwards"), [("verbalizer", 3, 2), ("options", 3, 1), ("sequence", 1, 1)]
)
def test_its_passes_are_counted_as_they_are_run(monkeypatch, kind, n_choices, n_backwards):
    counted: list[tuple[int, int]] = []
    monkeypatch.setattr(
        linearity,
        "count_gradients",
        lambda *a, n_backwards, n_outputs, projection_flops: counted.append((n_backwards, projection_flops)),
    )
    adapted, meter = make_adapted(), Meter("t")
    move(adapted, "far", 1.0)
    split = make_split(kind, n_choices=n_choices)
    measure(adapted, [split], ["far"], max_tokens=2048, meter=meter)
    assert counted == [(n_backwards, 2 * adapted.costs.adapter.n_output_parameters)], "onto one member's step"
    assert meter.record.n_tokens == split.input_lengths.sum(), "the member's own forward pass"


def test_a_task_is_measured_on_the_outputs_that_its_features_have():
    adapted = make_adapted()
    move(adapted, "far", 4.0)
    validation = make_split("options", n=5, n_choices=3, split="validation")
    modes = choose_modes([make_split("options", n_choices=9), validation], "auto")
    (found,) = measure_linearity(adapted, [validation], ["far"], modes, max_rows=99, max_tokens=40, meter=Meter("t"))
    true, start = (
        torch.stack(outputs_of(adapted, validation, name, mode="logodds")).double().numpy() for name in ("far", THETA0)
    )
    missed = ((true - predict_by_autograd(adapted, validation, "far", mode="logodds")) ** 2).sum()
    assert found.r2_over_zero_order == pytest.approx(1 - missed / ((true - start) ** 2).sum(), rel=1e-4, abs=1e-4)
