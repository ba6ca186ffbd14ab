"""Label scores against their slow twin: full logits of one unpadded row at a time, and Python loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from ensemblelora.adapters import THETA0, attach
from ensemblelora.config import AdapterConfig
from ensemblelora.data.batching import collate
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.errors import ModelError
from ensemblelora.scoring import check_output_layer, cross_entropy, score_batch
from tests.tiny import CLASSIFIERS, DECODERS, VOCABULARY, disturb, make_base, make_network, make_split

LM_KINDS = ("verbalizer", "options", "sequence")


@torch.no_grad()
def score_slowly(
    network: PreTrainedModel, split: EncodedSplit, example: int, *, normalize: bool = False
) -> list[float]:
    """Scores of one example's own choices."""
    scores: list[float] = []
    for row in range(split.example_rows[example], split.example_rows[example + 1]):
        tokens = split.tokens[split.row_starts[row] : split.row_starts[row + 1]].tolist()
        logits = network(torch.tensor([tokens])).logits[0].float()
        if split.kind == "classification":
            if normalize:
                logits = torch.log_softmax(logits, dim=-1)
            return logits[: split.n_choices[example]].tolist()
        log_p = torch.log_softmax(logits, dim=-1)
        if split.kind == "verbalizer":
            chosen = log_p if normalize else logits
            return [float(chosen[-1, token]) for token in split.label_tokens]
        start = int(split.answer_starts[row])
        total = sum(float(log_p[place - 1, tokens[place]]) for place in range(start, len(tokens)))
        scores.append(total / float(split.divisors[row]))
    return scores


def assert_scores(network: PreTrainedModel, parts: list[tuple[EncodedSplit, int]], *, normalize: bool = False) -> None:
    batch = collate(parts, pad_token_id=0)
    z = score_batch(network, batch, normalize=normalize).z.detach().numpy()
    assert z.dtype == np.float32
    for row, (split, example) in zip(z, parts, strict=True):
        expected = score_slowly(network, split, example, normalize=normalize)
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert np.isneginf(row[len(expected) :]).all()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", LM_KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_scores_equal_full_logits_in_a_loop(family: str, kind: str, normalize: bool) -> None:
    network, split = make_network(family).eval(), make_split(kind, n_choices=4, ragged=kind == "options")
    assert_scores(network, [(split, e) for e in range(split.n_examples)], normalize=normalize)


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_classifier_head_may_be_wider_than_a_task(family: str, normalize: bool) -> None:
    network = make_network(family, head="sequence_classification", n_labels=5).eval()
    split = make_split("classification", n_choices=3)
    parts = [(split, e) for e in range(split.n_examples)]
    assert_scores(network, parts, normalize=normalize)
    assert score_batch(network, collate(parts, 0)).z.shape == (6, 3)


def test_tasks_of_every_kind_share_a_batch() -> None:
    network = make_network("llama").eval()
    splits = [
        make_split("verbalizer", n_choices=2, seed=1),
        make_split("options", n_choices=4, ragged=True, seed=2),
        make_split("sequence", seed=3),
        make_split("verbalizer", n_choices=5, seed=4),
    ]
    assert_scores(network, [(split, e) for e in (4, 0, 2) for split in splits])


def test_label_order_is_the_cards_own() -> None:
    network, split = make_network("llama").eval(), make_split("verbalizer", n_choices=3)
    z = score_batch(network, collate([(split, 0)], 0)).z
    swapped = make_split("verbalizer", n_choices=3)
    swapped.label_tokens[:] = split.label_tokens[[2, 0, 1]]
    torch.testing.assert_close(score_batch(network, collate([(swapped, 0)], 0)).z, z[:, [2, 0, 1]])


@pytest.mark.parametrize("kind", LM_KINDS)
def test_scores_do_not_depend_on_the_padding_token_or_the_company(kind: str) -> None:
    network, split = make_network("llama").eval(), make_split(kind, n=5)
    together = [score_batch(network, collate([(split, e) for e in range(5)], pad)).z for pad in (0, 17)]
    torch.testing.assert_close(together[0], together[1])
    for e in range(5):
        alone = score_batch(network, collate([(split, e)], 0)).z
        torch.testing.assert_close(together[0][e : e + 1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALED = {
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.05)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)),
}


@pytest.mark.parametrize("family", SCALED)
@pytest.mark.parametrize("kind", ["verbalizer", "options"])
def test_families_that_scale_their_logits(family: str, kind: str) -> None:
    torch.manual_seed(0)
    network, split = SCALED[family]().eval(), make_split(kind)
    parts = [(split, e) for e in range(split.n_examples)]
    check_output_layer(network, collate(parts[:1], 0))
    assert_scores(network, parts)


@pytest.mark.parametrize("family", DECODERS)
def test_output_layer_of_every_family_is_known(family: str) -> None:
    check_output_layer(make_network(family).eval(), collate([(make_split("options"), 0)], 0))


def test_a_family_that_does_more_after_its_output_layer_is_refused() -> None:
    network = make_network("llama").eval()
    network.config.logits_scaling = 3.0  # named, but not what this family does
    with pytest.raises(ModelError, match="LlamaForCausalLM: it makes logits"):
        check_output_layer(network, collate([(make_split("verbalizer"), 0)], 0))


def test_an_adapted_output_layer_is_run_as_a_whole() -> None:
    adapted = attach(make_base("llama"), AdapterConfig(target_modules=("lm_head",), r=2), seed=0)
    split = make_split("verbalizer")
    disturb(adapted, THETA0, scale=3.0)
    assert_scores(adapted.network, [(split, e) for e in range(split.n_examples)])  # type: ignore[arg-type]


def test_bfloat16_models_give_float32_scores_close_to_their_float32_twins() -> None:
    parts = [(make_split("verbalizer"), 0), (make_split("options"), 1)]
    exact = score_batch(make_network("llama").eval(), collate(parts, 0)).z
    low = score_batch(make_network("llama").eval().bfloat16(), collate(parts, 0)).z
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.03, atol=0.03)


def test_loss_is_the_softmax_over_own_labels_and_the_token_loss_of_a_sequence() -> None:
    network = make_network("llama").eval()
    splits = [make_split("options", n_choices=4, ragged=True), make_split("verbalizer"), make_split("sequence")]
    parts = [(split, e) for split in splits for e in range(3)]
    batch = collate(parts, 0)
    losses = cross_entropy(score_batch(network, batch).z, batch).tolist()
    for loss, (split, example) in zip(losses, parts, strict=True):
        scores = np.array(score_slowly(network, split, example))
        expected = -scores[0]
        if split.kind != "sequence":
            expected = np.log(np.exp(scores).sum()) - scores[split.labels[example]]
        assert loss == pytest.approx(expected, rel=1e-4)


def test_vocabulary_loss_is_the_log_probability_of_the_right_answer() -> None:
    network = make_network("llama").eval()
    parts = [(make_split(kind), e) for kind in LM_KINDS for e in range(2)]
    batch = collate(parts, 0)
    losses = cross_entropy(score_batch(network, batch, normalize=True).z, batch, loss="vocab_softmax")
    expected = [-score_slowly(network, s, e, normalize=True)[s.labels[e]] for s, e in parts]
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-4)


def test_absent_choices_leave_the_gradient_finite() -> None:
    network = make_network("llama").requires_grad_(True)
    splits = (make_split("options", n_choices=4, ragged=True), make_split("sequence"), make_split("verbalizer"))
    batch = collate([(split, e) for split in splits for e in range(3)], 0)
    cross_entropy(score_batch(network, batch).z, batch).mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
