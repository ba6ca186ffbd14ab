"""Adapter layers computed here instead of in PEFT, for one adapter or several at once.

What is computed is the method's own (:mod:`ensemblelora.adaptermethods`), whose rows are whose the switch says.

In: the adapted model and member names. Out: a switch that says whose rows come next. Leaving the context puts PEFT's
own forward back, which is the slow twin in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from peft.tuners.tuners_utils import BaseTunerLayer

from ensemblelora.adapters import AdaptedModel
from ensemblelora.forwards import replaced_forwards
from ensemblelora.switch import MemberSwitch

__all__ = ["can_fuse", "can_mix", "fused"]


def can_fuse(adapted: AdaptedModel) -> bool:
    """Whether every adapted layer can be computed here, and nothing but these layers is trained."""
    layers = adapted.adapter_layers
    return bool(layers) and all(map(adapted.method.can_share, layers)) and not adapted.trains_whole_modules


def can_mix(adapted: AdaptedModel) -> bool:
    """Whether one pass can serve several members."""
    # An adapted output layer reads scored positions, which are not the batch's rows.
    has_adapted_output = isinstance(adapted.base.model.get_output_embeddings(), BaseTunerLayer)
    return can_fuse(adapted) and not adapted.has_experts and not has_adapted_output


@contextmanager
def fused(adapted: AdaptedModel, members: Sequence[str]) -> Iterator[MemberSwitch]:
    """Compute adapter layers here instead of in PEFT, for these members until the switch says otherwise.

    The members' weights must not change inside unless gradients are on.
    """
    switch = MemberSwitch(members)
    with replaced_forwards(adapted.adapter_layers, lambda layer: partial(adapted.method.run_shared, switch, layer)):
        yield switch
