"""What a run asks of a kind of adapter, whichever it is; one class each in this package says the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ensemblelora.accounting.adapter_shapes import AdapterShape
from ensemblelora.accounting.shapes import ModelShape
from ensemblelora.config import AdapterConfig
from ensemblelora.models import BaseModel
from ensemblelora.switch import MemberSwitch

__all__ = ["AbstractMethod", "Scaling", "Shared", "TrainedLayer", "task_type_of"]

Shared = Callable[..., Any]
"""stands in for a layer's forward pass"""


@dataclass(frozen=True, eq=False)
class Scaling:
    """A trained vector that multiplies activations elementwise; beside linear layers the one kind of trained part."""

    weight: nn.Parameter
    """of any shape; as many numbers as the activations have features"""
    module: nn.Module
    """where the product is seen"""
    place: Literal["input", "output", "change"]
    """the product is what enters the module, what it gives, or what it gives beyond its keyword ``base_result``"""
    bias: None = None


TrainedLayer = nn.Linear | Scaling


class AbstractMethod(ABC):
    """A kind of adapter: how to attach it, which layers carry it, how members share a pass, what it costs."""

    layer_type: ClassVar[type[BaseTunerLayer]]
    """PEFT's class of the layers that carry it"""
    settings: ClassVar[tuple[str, ...]]
    """PEFT's settings that change what the same tensors compute"""

    @abstractmethod
    def find_targets(self, base: BaseModel, layers: Sequence[int] | None) -> list[str]:
        """Full names of the modules that ``target_modules: auto`` stands for, in these blocks; none: in all.

        Raises:
            ModelError: If this model's can't be told.
        """

    @abstractmethod
    def make_settings(self, base: BaseModel, config: AdapterConfig, targets: list[str]) -> PeftConfig:
        """What PEFT is told."""

    @abstractmethod
    def read_shape(self, shape: ModelShape, config: AdapterConfig, targets: Sequence[str]) -> AdapterShape:
        """Sizes of an adapter, which decide what it costs.

        Raises:
            ModelError: If a target is no linear layer of the model's blocks.
        """

    @abstractmethod
    def can_share(self, layer: Any) -> bool:
        """Whether :meth:`run_shared` computes what this layer does."""

    @abstractmethod
    def run_shared(self, switch: MemberSwitch, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute a layer's output where every row belongs to the member that the switch says."""

    def list_frozen(self, config: AdapterConfig) -> tuple[str, ...]:
        """Parts of the paths of tensors that stay as they are while the others are trained."""
        return ()

    def find_scalings(self, layer: Any, adapter: str) -> Iterator[tuple[str, Scaling]]:
        """Yield the vectors of an adapter that scale activations, by their paths within the layer."""
        return iter(())

    def settle(self, layer: Any, adapter: str) -> None:
        """Mend what PEFT leaves of a layer's fresh adapter, so that it computes what the base computes."""
        return


def task_type_of(base: BaseModel) -> TaskType:
    """PEFT's word for what the model's output layer gives."""
    return TaskType.CAUSAL_LM if base.head == "lm" else TaskType.SEQ_CLS
