"""What the base model makes of a text: the mean of its last hidden states over the text's tokens.

In: the adapted model and rows, or texts. Out: one vector a row, numpy float64. No other model can be counted on to be
there, and this one has read the text anyway. Costs one forward pass over the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, AdaptedModel, activate
from ensemblelora.counting import count_forward, count_lower
from ensemblelora.data.batching import collate, plan_batches
from ensemblelora.data.encoding import EncodedSplit, encode_split
from ensemblelora.data.task import Example, Task, TaskCard
from ensemblelora.scoring import model_inputs

__all__ = ["embed_contexts", "embed_texts"]

FloatArray = npt.NDArray[np.float64]

_ANY_ANSWER = " a"  # tells where a context ends; not part of the mean
_CARD = TaskCard(
    task="texts",
    dataset_path="json",
    training_split="test",
    doc_to_text="text",
    doc_to_target="answer",
    output_type="loglikelihood",
)


def embed_contexts(
    adapted: AdaptedModel,
    split: EncodedSplit,
    examples: Sequence[int] | npt.NDArray[np.int64],
    *,
    max_tokens: int,
    adapter: str = THETA0,
    meter: Meter | None = None,
) -> FloatArray:
    """Mean last hidden states over the contexts of some examples; answers don't count.

    Args:
        adapted: The model.
        split: Where the examples are taken from.
        examples: Their indices.
        max_tokens: Padded tokens of a pass.
        adapter: The one that is active meanwhile; theta0 computes what the base computes, unless a warm-up moved it.
        meter: Told what every pass costs.

    Returns:
        ``(n, hidden)``, in the order of ``examples``.
    """
    chosen = np.asarray(examples, np.int64)
    lengths = split.measure("answer")[0][chosen]
    contexts = split.answer_starts[split.answer_rows()]
    body: nn.Module = adapted.network.base_model  # type: ignore[assignment]  # a property that torch's types don't know
    options: dict[str, Any] = {"use_cache": False} if adapted.base.head == "lm" else {}
    found = np.zeros((len(chosen), int(adapted.base.model.config.hidden_size)))
    with activate(adapted, adapter), torch.inference_mode():
        for indices in plan_batches(lengths, np.ones_like(lengths), max_tokens):
            batch = collate([(split, int(e)) for e in chosen[indices]], adapted.base.pad_token_id, layout="answer")
            hidden = body(**model_inputs(adapted.network, batch), **options).last_hidden_state.float()
            columns = torch.arange(hidden.shape[1], device=hidden.device)
            ends = torch.from_numpy(contexts[chosen[indices]]).to(hidden.device).clamp(min=1)
            is_read = (columns < ends[:, None]).unsqueeze(2)  # (rows, width, 1)
            found[indices] = ((hidden * is_read).sum(dim=1) / is_read.sum(dim=1)).cpu().numpy()
            count_lower(meter, adapted.costs, batch)
            count_forward(meter, adapted.costs, batch)
    return found


def embed_texts(adapted: AdaptedModel, texts: Sequence[str], *, max_length: int, max_tokens: int) -> FloatArray:
    """Mean last hidden states of the base model over each text, ``(n, hidden)``, in the texts' order.

    Args:
        adapted: The model; whatever adapters it carries, the base alone is run.
        texts: Any; one without a token is stood for by the token that begins a text.
        max_length: Tokens of a text that are read; a longer one loses its beginning.
        max_tokens: Padded tokens of a pass.
    """
    examples = [Example(f"text:{i}", text, (_ANY_ANSWER,), 0, "") for i, text in enumerate(texts)]
    task = Task(_CARD, {"train": [], "validation": [], "test": examples})
    split = encode_split(task, "test", adapted.base.tokenizer, max_length=max_length)
    return embed_contexts(adapted, split, range(len(texts)), max_tokens=max_tokens, adapter=adapted.origin)
