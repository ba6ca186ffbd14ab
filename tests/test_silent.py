"""The gradient pass without LoRA's low-rank terms, held against PEFT's own layers with hooks on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemblelora.adapters import THETA0, activate
from ensemblelora.config import GradientsConfig
from ensemblelora.data.batching import collate
from ensemblelora.gradients import backward
from ensemblelora.gradients.collect import Features, compute_features, find_active_layers, make_projector
from ensemblelora.gradients.silent import find_silent
from tests.tiny import disturb, make_adapted, make_split


def features_of(adapted, split, mode: str) -> Features:
    projector = make_projector(GradientsConfig(proj_type="none"), seed=0)
    with activate(adapted, THETA0):
        layers = find_active_layers(adapted, [split])
        batch = collate([(split, example) for example in range(split.n_examples)], adapted.base.pad_token_id)
        return compute_features(adapted, layers, projector, batch, mode)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "mode"), [("verbalizer", "margin"), ("options", "contrast")])
def test_leaving_the_low_rank_terms_out_changes_nothing(
    family: str, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, split = make_adapted(family), make_split(kind, n_choices=2 if mode == "margin" else 3)
    quick = features_of(adapted, split, mode)
    monkeypatch.setattr(backward, "find_silent", lambda *_: {})
    slow = features_of(adapted, split, mode)
    assert np.abs(slow.features).max() > 0
    np.testing.assert_allclose(quick.features, slow.features, rtol=1e-4, atol=1e-6 * np.abs(slow.features).max())
    np.testing.assert_allclose(quick.outputs, slow.outputs, rtol=1e-5, atol=1e-6)


def test_layers_are_silent_only_while_their_b_is_zero() -> None:
    adapted = make_adapted()
    layers = find_active_layers(adapted, [make_split("verbalizer")])
    assert set(find_silent(adapted, layers)) == set(layers)
    moved = next(iter(layers.values()))
    with torch.no_grad():
        moved.weight[0, 0] = 1e-3
    assert len(find_silent(adapted, layers)) == len(layers) - 1
    disturb(adapted)
    assert not find_silent(adapted, layers)


def test_the_layers_own_forward_comes_back() -> None:
    adapted = make_adapted()
    before = [vars(layer).get("forward") for layer in adapted.adapter_layers]
    features_of(adapted, make_split("verbalizer"), "margin")
    assert [vars(layer).get("forward") for layer in adapted.adapter_layers] == before
