"""Label scores of a batch: the one place where a language model's output becomes numbers about answers.

In: a model and a :class:`~ensemblelora.data.batching.Batch`. Out: ``z``, float32 ``(examples, K_max)``, higher is
better, ``-inf`` past an example's own number of choices. Only scored positions reach the output layer, and label
tokens only meet their own rows of it, so the vocabulary never costs more than the answers do.

==============  ===============================================================================
kind            z
==============  ===============================================================================
verbalizer      logits of the K label tokens at the answer position (one row an example)
options         log-likelihood of each choice's tokens, divided as the card says
sequence        mean log-likelihood of the answer's tokens (one column)
classification  logits of the classifier head
==============  ===============================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ensemblelora.data.batching import Batch
from ensemblelora.errors import ModelError

__all__ = [
    "Scores",
    "check_output_layer",
    "cross_entropy",
    "model_inputs",
    "score_batch",
    "score_hidden",
    "scored_hidden",
]

_OUTPUT_TOLERANCE = 0.02  # of the largest logit; bfloat16 rounding stays well below, a forgotten scaling does not
# 25 MB of float32 logits with 49,152 tokens: twice that is handed back to the system after each piece, and clearing
# new pages for the next costs as much as the product itself.
_POSITIONS_AT_ONCE = 128


@dataclass(frozen=True, eq=False)
class Scores:
    """What one forward pass says about a batch."""

    z: Tensor
    """(examples, K_max) label scores, -inf past an example's choices."""
    token_logprobs: Tensor
    """(n_scored,) log-probability of each predicted token; NaN where only label tokens were looked at."""


def score_batch(network: nn.Module, batch: Batch, *, normalize: bool = False) -> Scores:
    """Run one forward pass and score every example.

    Args:
        network: The transformers model, adapters in place.
        batch: Right-padded rows and the positions to score.
        normalize: Make scores of single tokens log-probabilities over the whole vocabulary, and those of classes
            over the whole head, instead of plain logits.

    Reference:
        docs/paper.md, row "output h"; tokenisation and scoring as lm-evaluation-harness does it.
    """
    if len(batch.kinds) and batch.kinds[0] == "classification":  # a model has one head, so all examples are
        return _score_classes(network, batch, normalize=normalize)
    return score_hidden(network, batch, scored_hidden(network, batch), normalize=normalize)


def cross_entropy(z: Tensor, batch: Batch, *, loss: str = "label_softmax") -> Tensor:
    """Loss of each example: softmax over its own labels; for a sequence, its mean token NLL.

    Args:
        z: Scores of the batch, ``(examples, K_max)``.
        batch: What was scored.
        loss: ``label_softmax``; or ``vocab_softmax``, which takes the right answer's score as the log-probability
            it is (verbalizer scores must be made with ``normalize=True`` then).

    Returns:
        Losses in nats, ``(examples,)``.
    """
    labels = torch.from_numpy(batch.labels).to(z.device)
    picked = z.gather(1, labels[:, None])[:, 0]
    if loss == "vocab_softmax":
        return -picked
    is_sequence = torch.tensor([kind == "sequence" for kind in batch.kinds], device=z.device)
    return torch.where(is_sequence, -picked, torch.logsumexp(z, dim=1) - picked)


def check_output_layer(network: nn.Module, batch: Batch) -> None:
    """Compare the scored logits with the model's own, which some families make with more than their output layer.

    Args:
        network: A model with a language-modelling head.
        batch: One or two examples; the whole vocabulary is computed at every position of theirs.

    Raises:
        ModelError: If the two differ by more than rounding.
    """
    with torch.inference_mode():
        logits: Tensor = network(**model_inputs(network, batch), use_cache=False).logits
        rows, columns = torch.from_numpy(batch.positions).to(logits.device).unbind(1)
        own, ours = logits[rows, columns].float(), _output_layer(network, scored_hidden(network, batch))
    error = float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))
    if not error <= _OUTPUT_TOLERANCE:
        raise ModelError(
            f"model family {type(network).__name__}: it makes logits from its last hidden state in a way unknown here "
            f"(they differ by {error:.2g} of the largest); choose a Llama, Qwen2, GPT-2 or GPT-J type model"
        )


def model_inputs(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What the transformers model is called with: ids, mask and, where rows hold several choices, positions."""
    device = next(network.parameters()).device
    ids, mask = (torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.attention_mask))
    if batch.segments is None or batch.position_ids is None:
        return {"input_ids": ids, "attention_mask": mask}
    segments, width = torch.from_numpy(batch.segments).to(device), ids.shape[1]
    is_before = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    is_own = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    is_seen = is_before & is_own & mask[:, None, :].bool()  # (rows, query, key)
    # Added to the attention scores, which both the eager and the fused kernels understand.
    dtype = network.dtype if isinstance(network, PreTrainedModel) else torch.float32
    hidden = torch.zeros(is_seen.shape, dtype=dtype, device=device).masked_fill(~is_seen, torch.finfo(dtype).min)
    positions = torch.from_numpy(batch.position_ids).to(device)
    return {"input_ids": ids, "attention_mask": hidden[:, None], "position_ids": positions}


def scored_hidden(network: nn.Module, batch: Batch) -> Tensor:
    """Run the model's body: last hidden states at the scored positions, ``(n_scored, hidden)``; not for classifiers."""
    body: nn.Module = network.base_model  # type: ignore[assignment]  # a property that torch's types don't know
    hidden: Tensor = body(**model_inputs(network, batch), use_cache=False).last_hidden_state
    rows, columns = torch.from_numpy(batch.positions).to(hidden.device).unbind(1)
    return hidden[rows, columns]


def _score_classes(network: nn.Module, batch: Batch, *, normalize: bool) -> Scores:
    logits: Tensor = network(**model_inputs(network, batch)).logits.float()
    if normalize:
        logits = torch.log_softmax(logits, dim=1)
    n_choices = torch.from_numpy(batch.n_choices).to(logits.device)
    z = logits[:, : int(batch.n_choices.max())]  # the head may be wider than this task
    absent = torch.arange(z.shape[1], device=z.device) >= n_choices[:, None]
    return Scores(z=z.masked_fill(absent, -torch.inf), token_logprobs=z.new_empty(0))


def score_hidden(network: nn.Module, batch: Batch, hidden: Tensor, *, normalize: bool = False) -> Scores:
    """Score every example from last hidden states, whose sums have the summed logits where the output layer is linear.

    Args:
        network: The transformers model; its output layer alone is run.
        batch: What the states are of.
        hidden: ``(n_scored, hidden)``, as :func:`scored_hidden` gives them.
        normalize: See :func:`score_batch`.
    """
    # targets (n_scored,), -1 marks a verbalizer row
    device = hidden.device
    targets = torch.from_numpy(batch.targets).to(device)
    choice_of = torch.from_numpy(batch.position_choice).to(device)
    example_of, index_of = (torch.from_numpy(a).to(device) for a in (batch.choice_example, batch.choice_index))
    is_label = targets < 0
    n_examples, width = len(batch.labels), max(int(batch.n_choices.max()), 1)
    token_logprobs = torch.full((len(targets),), torch.nan, device=device)
    z = torch.full((n_examples, width), -torch.inf, device=device)

    spelled = torch.nonzero(~is_label)[:, 0]
    if len(spelled):
        logprobs = _token_logprobs(network, hidden[spelled], targets[spelled])
        token_logprobs = token_logprobs.index_put((spelled,), logprobs)
        divisors = torch.from_numpy(batch.divisors).to(device)
        sums = torch.zeros(len(example_of), device=device).index_add(0, choice_of[spelled], logprobs) / divisors
        choices = torch.unique(choice_of[spelled])
        z = z.index_put((example_of[choices], index_of[choices]), sums[choices])

    labelled = torch.nonzero(is_label)[:, 0]
    if len(labelled):
        examples = example_of[choice_of[labelled]]
        tokens = torch.from_numpy(batch.label_tokens).to(device)[examples]  # (n_labelled, K_max), -1 pads
        z = z.index_put((examples,), _label_logits(network, hidden[labelled], tokens, normalize=normalize, width=width))
    return Scores(z=z, token_logprobs=token_logprobs)


def _token_logprobs(network: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, ``(n,)``; a few positions at a time, so that (n, V) logits never exist."""
    pieces = zip(hidden.split(_POSITIONS_AT_ONCE), targets.split(_POSITIONS_AT_ONCE), strict=True)
    losses = [functional.cross_entropy(_output_layer(network, h), t, reduction="none") for h, t in pieces]
    return -torch.cat(losses)


def _label_logits(network: nn.Module, hidden: Tensor, tokens: Tensor, *, normalize: bool, width: int) -> Tensor:
    head = network.get_output_embeddings()  # type: ignore[operator]
    absent = tokens < 0
    if normalize or not _is_plain_head(network):
        logits = _output_layer(network, hidden)
        if normalize:
            logits = torch.log_softmax(logits, dim=-1)
        picked = logits.gather(1, tokens.clamp(min=0))
    else:
        weight = head.weight[tokens.clamp(min=0)]  # (n, K_max, h): only the labels' rows of the output layer
        picked = torch.einsum("nh,nkh->nk", hidden.float(), weight.float())
        if head.bias is not None:
            picked = picked + head.bias[tokens.clamp(min=0)].float()
    picked = picked.masked_fill(absent, -torch.inf)
    return functional.pad(picked, (0, width - picked.shape[1]), value=-torch.inf)


def _output_layer(network: nn.Module, hidden: Tensor) -> Tensor:
    """Vocabulary logits in float32, with the scalings some families put after their output layer."""
    head = network.get_output_embeddings()  # type: ignore[operator]
    logits: Tensor = head(hidden.to(head.weight.dtype)).float()
    config = network.config
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def _is_plain_head(network: nn.Module) -> bool:
    # An adapted or quantised output layer is more than its weight rows, so it is run as a whole.
    plain = type(network.get_output_embeddings()) is nn.Linear  # type: ignore[operator]
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    return plain and all(getattr(network.config, name, None) is None for name in names)
