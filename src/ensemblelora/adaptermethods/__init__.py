"""The kinds of adapter that a run can train, by the name a config gives them.

What is asked of each is in ``method``; ``targets`` finds the modules. A kind is allowed here when the gradient of each
of its trained tensors is known for every row of a batch: those of linear layers, and of vectors that scale activations.
"""

from __future__ import annotations

from collections.abc import Mapping

from ensemblelora.adaptermethods.bottleneck import BottleneckMethod
from ensemblelora.adaptermethods.ia3 import IA3Method
from ensemblelora.adaptermethods.lora import LoraMethod
from ensemblelora.adaptermethods.method import AbstractMethod, Scaling, TrainedLayer
from ensemblelora.adaptermethods.targets import choose_targets

__all__ = ["METHODS", "AbstractMethod", "Scaling", "TrainedLayer", "choose_targets"]

METHODS: Mapping[str, AbstractMethod] = {
    "lora": LoraMethod(has_magnitudes=False),
    "dora": LoraMethod(has_magnitudes=True),
    "ia3": IA3Method(),
    "bottleneck": BottleneckMethod(),
}
