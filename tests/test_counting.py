"""What is entered in the ledger against torch's own counter, on a tiny Llama with eager attention."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ensemblelora.accounting.adapter_shapes import lora_shape
from ensemblelora.accounting.formulas import count_gram_flops
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, activate, attach
from ensemblelora.config import AdapterConfig, GradientsConfig
from ensemblelora.counting import (
    count_forward,
    count_generation,
    count_gradients,
    count_gram,
    count_training,
    read_costs,
)
from ensemblelora.data.batching import Batch, collate
from ensemblelora.gradients.backward import find_active_layers, list_parts
from ensemblelora.gradients.collect import collect_features, make_projector
from ensemblelora.gradients.projection import Projector
from ensemblelora.passes import score
from ensemblelora.scoring import cross_entropy, score_batch
from ensemblelora.store import FeatureStore
from tests.tiny import make_adapted, make_base, make_split

KINDS = ["verbalizer", "options", "sequence"]
TOLERANCE = 0.02


def make_batch(adapted, kind: str) -> Batch:
    split = make_split(kind, n=6)
    return collate([(split, example) for example in range(6)], adapted.base.pad_token_id)


def measure(call) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass(kind):
    adapted, meter = make_adapted(), Meter("t")
    batch = make_batch(adapted, kind)
    with activate(adapted, THETA0), torch.no_grad():
        true = measure(lambda: score_batch(adapted.network, batch))
    count_forward(meter, adapted.costs, batch)
    assert meter.record.flops == pytest.approx(true, rel=TOLERANCE)
    assert (meter.record.n_tokens, meter.record.n_padded_tokens) == (batch.n_real_tokens, batch.n_padded_tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["label_softmax", "vocab_softmax"])
def test_a_training_step(kind, loss):
    adapted, meter, normalize = make_adapted(vocab_size=4096), Meter("t"), loss == "vocab_softmax"
    batch = make_batch(adapted, kind)

    def step() -> None:
        z = score_batch(adapted.network, batch, normalize=normalize).z
        cross_entropy(z, batch, loss=loss).mean().backward()

    with activate(adapted, THETA0, trainable=True):
        true = measure(step)
    count_training(meter, adapted.costs, batch, normalize=normalize)
    assert meter.record.flops == pytest.approx(true, rel=TOLERANCE)


@pytest.mark.parametrize("layers", [None, "top_half"])
@pytest.mark.parametrize("train_a", [True, False])
def test_a_step_above_a_frozen_prefix_and_with_a_frozen_a(layers, train_a):
    config = AdapterConfig(r=4, layers_to_transform=layers, train_A=train_a)
    adapted, meter = attach(make_base(num_hidden_layers=4), config, seed=0), Meter("t")
    batch = make_batch(adapted, "options")

    def step() -> None:
        cross_entropy(score(adapted, batch, meter=meter).z, batch).mean().backward()

    with activate(adapted, THETA0, trainable=True):
        true = measure(step)
    lower = meter.record.flops
    assert (lower > 0) == (layers is not None)
    count_training(meter, adapted.costs, batch)
    assert meter.record.flops == pytest.approx(true, rel=TOLERANCE)


def test_a_vocabulary_that_label_tokens_meet_is_counted_in_forward_passes_too():
    adapted, meter = make_adapted(vocab_size=4096), Meter("t")
    batch = make_batch(adapted, "verbalizer")
    with activate(adapted, THETA0), torch.no_grad():
        true = measure(lambda: score_batch(adapted.network, batch, normalize=True))
    count_forward(meter, adapted.costs, batch, normalize=True)
    assert meter.record.flops == pytest.approx(true, rel=TOLERANCE)


def test_every_member_counts_and_nothing_is_entered_without_a_meter():
    adapted, once, thrice = make_adapted(), Meter("t"), Meter("t")
    batch = make_batch(adapted, "verbalizer")
    count_forward(once, adapted.costs, batch)
    count_forward(thrice, adapted.costs, batch, times=3)
    assert thrice.record.flops == 3 * once.record.flops and thrice.record.n_tokens == 3 * once.record.n_tokens
    count_forward(None, adapted.costs, batch)
    count_training(None, adapted.costs, batch)
    count_gradients(None, adapted.costs, batch, n_backwards=1, n_outputs=1, projection_flops=1)
    count_gram(None, adapted.costs, n_rows=1, n_coordinates=1)
    count_generation(None, adapted.costs, [3], n_steps=1)


def test_gradients_cost_a_pass_more_for_every_output_and_the_projection():
    adapted = make_adapted()
    batch, found = make_batch(adapted, "verbalizer"), []
    for n_backwards, flops in ((1, 0), (2, 0), (1, 1000)):
        meter = Meter("t")
        count_gradients(meter, adapted.costs, batch, n_backwards=n_backwards, n_outputs=6, projection_flops=flops)
        found.append(meter.record.flops)
        assert meter.record.n_tokens == batch.n_real_tokens
    forward = Meter("t")
    count_forward(forward, adapted.costs, batch)
    assert found[1] - found[0] == found[0] - forward.record.flops > 0
    assert found[2] - found[0] == 6 * 1000


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sjlt", "kronecker"])
@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (30, 30), (300,)])
def test_a_projection_is_counted_by_its_kind(kind, shape):
    projector, n = Projector(kind, 16, 0), 3
    true = measure(lambda: projector.project("part", torch.zeros(n, *shape)))
    if kind == "sjlt":  # no product that torch would see: four nonzeros in each row
        assert true == 0
        true = 2 * n * np.count_nonzero(projector.matrix("part", shape))
    assert n * projector.count_flops([("part", shape)]) == true
    twice = projector.count_flops([("part", shape), ("other", shape)])
    assert twice == 2 * projector.count_flops([("part", shape)])


def test_no_projection_costs_nothing():
    assert Projector("none", 16, 0).count_flops([("part", (40, 6))]) == 0


@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "kronecker", "none"])
def test_the_ledger_has_the_projection_of_every_output(kind, tmp_path):
    adapted, split, meters = make_adapted(), make_split("verbalizer", n=5), {}
    for name in (kind, "rademacher"):
        config = GradientsConfig(proj_type=name, proj_dim=8)
        with Meter(name) as meters[name]:
            store, prints = FeatureStore(tmp_path / name), {("t", "train"): name}
            collect_features(adapted, [split], store, config, seed=0, fingerprints=prints, meter=meters[name])
    p = adapted.costs.adapter.n_output_parameters
    parts = list_parts(find_active_layers(adapted, [split]))
    expected = {
        "rademacher": 10 * 2 * p * 8,
        "sjlt": 10 * 2 * p * 4,
        "kronecker": 10 * make_projector(GradientsConfig(proj_type="kronecker", proj_dim=8), seed=0).count_flops(parts),
        "none": count_gram_flops(10, p),
    }
    found = meters[kind].record.flops - meters["rademacher"].record.flops
    assert found == expected[kind] - expected["rademacher"], "5 examples of 2 contrasts"


def test_one_generated_token_costs_the_pass_over_its_context():
    adapted, meter = make_adapted(), Meter("t")
    count_generation(meter, adapted.costs, [5, 3], n_steps=1)
    assert (meter.record.n_tokens, meter.record.n_padded_tokens) == (8, 10)
    longer = Meter("t")
    count_generation(longer, adapted.costs, [5, 3], n_steps=3)
    assert (longer.record.n_tokens, longer.record.n_padded_tokens) == (12, 14)


def test_a_family_without_a_formula_is_counted_in_tokens(caplog):
    with caplog.at_level(logging.WARNING):
        costs = read_costs({"model_type": "unheard-of"}, lambda shape: lora_shape(shape, 4, ["q_proj"]))
    assert costs is None and "unheard-of" in caplog.text
    adapted, meter = make_adapted(), Meter("t")
    batch = make_batch(adapted, "verbalizer")
    count_training(meter, costs, batch)
    count_generation(meter, costs, [4], n_steps=2)
    assert meter.record.flops == 0 and meter.record.n_tokens == batch.n_real_tokens + 5
