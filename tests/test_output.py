"""The differentiated outputs reproduce the loss they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ensemblelora.blocks import helmert
from ensemblelora.errors import ConfigError
from ensemblelora.gradients.output import choose_mode, choose_modes, compute_outputs, label_of_mode
from tests.tiny import make_split

SEEDS = st.integers(0, 10**6)


def random_scores(seed: int, n_choices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels and numbers of choices; -inf past an example's own choices."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(n_choices)
    z = 5 * torch.randn(len(n_choices), max(n_choices), generator=generator, dtype=torch.float64)
    labels = torch.tensor([int(torch.randint(k, (1,), generator=generator)) for k in n_choices])
    return z.masked_fill(torch.arange(max(n_choices)) >= counts[:, None], -torch.inf), labels, counts


@given(SEEDS)
def test_margin_gives_the_binary_loss(seed: int) -> None:
    z, labels, counts = random_scores(seed, [2] * 5)
    h = compute_outputs(z, labels, counts, "margin")[:, 0]
    sign = 2.0 * labels - 1.0
    torch.testing.assert_close(functional.softplus(-sign * h), functional.cross_entropy(z, labels, reduction="none"))


@given(SEEDS, st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_logodds_give_the_loss_whatever_the_number_of_choices(seed: int, n_choices: list[int]) -> None:
    z, labels, counts = random_scores(seed, n_choices)
    h = compute_outputs(z, labels, counts, "logodds")[:, 0]
    torch.testing.assert_close(functional.softplus(-h), functional.cross_entropy(z, labels, reduction="none"))


@given(SEEDS, st.lists(st.integers(2, 8), min_size=1, max_size=6))
def test_contrasts_give_the_softmax_of_each_example_own_choices(seed: int, n_choices: list[int]) -> None:
    z, labels, counts = random_scores(seed, n_choices)
    u = compute_outputs(z, labels, counts, "contrast")
    decoded = u @ torch.from_numpy(helmert(z.shape[1]))
    decoded = decoded.masked_fill(torch.isinf(z), -torch.inf)
    torch.testing.assert_close(torch.softmax(decoded, 1), torch.softmax(z, 1))
    for row, k in zip(u, n_choices, strict=True):
        assert not row[k - 1 :].any(), "contrasts past an example's own choices mean nothing and must be zero"


@given(st.floats(1e-4, 600))
def test_sequence_gives_the_mean_token_loss(nll: float) -> None:
    z = torch.tensor([[-nll]], dtype=torch.float64, requires_grad=True)
    h = compute_outputs(z, torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long), "sequence")
    assert float(functional.softplus(-h.detach())) == pytest.approx(nll, rel=1e-6)
    h.sum().backward()
    assert float(z.grad) == pytest.approx(1 / -np.expm1(-nll), rel=1e-6), "dh = -d nll / (1 - exp(-nll))"


def test_outputs_and_slopes_are_finite_where_the_answer_is_certain_or_hopeless() -> None:
    labels, counts = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    z = torch.tensor([[-0.0], [-1e-9], [-1e4]], requires_grad=True)
    h = compute_outputs(z, labels, counts, "sequence")
    h.sum().backward()
    assert torch.isfinite(h).all() and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("mode", ["contrast", "logodds"])
def test_absent_choices_get_a_zero_slope(mode: str) -> None:
    z, labels, counts = random_scores(0, [4, 2, 3])
    z.requires_grad_(True)
    compute_outputs(z, labels, counts, mode).sum().backward()
    assert torch.isfinite(z.grad).all()
    assert not z.grad[torch.isinf(z)].any()


def test_outputs_do_not_change_when_scores_are_shifted() -> None:
    z, labels, counts = random_scores(3, [3, 3])
    for mode in ("contrast", "logodds"):
        torch.testing.assert_close(
            compute_outputs(z + 7.0, labels, counts, mode), compute_outputs(z, labels, counts, mode)
        )


@pytest.mark.parametrize(
    ("kind", "choices", "mode"),
    [
        ("verbalizer", 2, "margin"),
        ("options", 3, "contrast"),
        ("verbalizer", 8, "contrast"),
        ("options", 9, "logodds"),
        ("classification", 3, "contrast"),
        ("sequence", 1, "sequence"),
    ],
)
def test_auto_chooses_by_kind_and_number_of_choices(kind: str, choices: int, mode: str) -> None:
    assert choose_mode(kind, choices, "auto") == mode


@pytest.mark.parametrize(
    ("kind", "choices", "mode"),
    [("verbalizer", 3, "margin"), ("sequence", 1, "logodds"), ("options", 2, "sequence"), ("options", 1, "contrast")],
)
def test_outputs_that_do_not_fit_are_refused_by_name(kind: str, choices: int, mode: str) -> None:
    with pytest.raises(ConfigError, match=f"gradients.output {mode!r} does not fit task 'toy'"):
        choose_mode(kind, choices, mode, task="toy")


@pytest.mark.parametrize(("most", "mode"), [((4, 2), "contrast"), ((2, 4), "contrast"), ((8, 9), "logodds")])
def test_all_splits_of_a_task_get_the_outputs_of_its_widest_one(most: tuple[int, int], mode: str) -> None:
    train, validation = (make_split("options", n_choices=k, task="ragged") for k in most)
    other = make_split("verbalizer", n_choices=2, task="other")
    assert choose_modes([train, other, validation, other], "auto") == {"ragged": mode, "other": "margin"}


def test_outputs_that_fit_one_split_only_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'margin' does not fit task 'ragged' \(options, 4 choices\)"):
        choose_modes([make_split("options", n_choices=k, task="ragged") for k in (2, 4)], "margin")


def test_labels_are_zero_where_the_output_is_the_right_answers_own() -> None:
    labels = np.array([2, 0, 1])
    assert label_of_mode(labels, "logodds").tolist() == [0, 0, 0]
    assert label_of_mode(labels, "contrast").tolist() == [2, 0, 1]
