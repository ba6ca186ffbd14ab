"""What adapters cost at inference, and which numbers of groups that allows."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """Costs of one adapter, and the most that is allowed.

    Attributes:
        bytes_per_adapter: Memory of one adapter.
        n_boosters: Boosting adapters beside those of the groups.
        max_memory_bytes: Most bytes of adapters; none: no limit.
        max_latency_ratio: Most forward passes against one adapter; none: no limit.
    """

    bytes_per_adapter: int = 0
    n_boosters: int = 0
    max_memory_bytes: int | None = None
    max_latency_ratio: float | None = None

    def adapter_bytes(self, n_groups: int) -> int:
        """Memory of the groups' adapters and the boosters."""
        return self.bytes_per_adapter * (n_groups + self.n_boosters)

    def latency_ratio(self, n_groups: int) -> float:
        """Forward passes: one per group and booster, and one of the base model that boosters are measured from.

        The most an ensemble takes; tasks routed to one member, or boosters folded into one adapter, take fewer.
        """
        return float(n_groups + self.n_boosters + (self.n_boosters > 0))

    def list_faults(self, n_groups: int) -> list[str]:
        """Say which limits a number of groups breaks."""
        memory, latency = self.adapter_bytes(n_groups), self.latency_ratio(n_groups)
        faults = []
        if self.max_memory_bytes is not None and memory > self.max_memory_bytes:
            faults.append(f"{memory} bytes of adapters (grouping.max_memory_bytes is {self.max_memory_bytes})")
        if self.max_latency_ratio is not None and latency > self.max_latency_ratio:
            faults.append(f"{latency:g} forward passes (grouping.max_latency_ratio is {self.max_latency_ratio:g})")
        return faults
