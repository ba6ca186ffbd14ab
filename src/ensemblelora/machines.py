"""The machine that a run is sized for: devices of one kind, by the makers' sheets, a file, or what a run measured.

In: what a user names. Out: a :class:`Machine`. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ensemblelora.accounting.meter import Ledger
from ensemblelora.artifacts import COSTS_FILE, RunFolder, read_json
from ensemblelora.errors import ConfigError, first_line

__all__ = ["Machine", "read_machine", "with_measured_rates"]

# 16-bit peak without sparsity, memory in GB: the makers' data sheets.
_DEVICES = {
    "A100": (312e12, 80.0),
    "H100": (989e12, 80.0),
    "H200": (989e12, 141.0),
    "L40S": (362e12, 48.0),
    "RTX4090": (165e12, 24.0),
}
_LEAST_SECONDS = 1.0  # of a stage whose rate says something


@dataclass(frozen=True)
class Machine:
    """Devices of one kind, and what of them a run gets.

    Attributes:
        n_devices: As many jobs run at once.
        peak_flops: Operations a second of one, in 16 bits.
        memory_gb: Of one.
        utilisation: Share of the peak that passes reach; measure it with a run's ``costs.json``.
        host_flops: Operations a second that one job of the oracle reaches on its processor cores.
        rates: Operations a second of one device in stages that were measured, in place of peak and utilisation.
    """

    n_devices: int
    peak_flops: float
    memory_gb: float
    utilisation: float = 0.3
    host_flops: float = 1e10
    rates: Mapping[str, float] = field(default_factory=dict)

    def rate_of(self, stage: str) -> float:
        """Operations a second of one device."""
        return self.rates.get(stage, self.peak_flops * self.utilisation)


def read_machine(text: str) -> Machine:
    """Understand ``8xH100``, or a YAML file with the fields of :class:`Machine`.

    Raises:
        ConfigError: If it is neither.

    Example:
        >>> read_machine("8xH100").n_devices
        8
    """
    count, _, kind = text.partition("x")
    if count.isdigit() and int(count) > 0 and kind in _DEVICES:
        return Machine(int(count), *_DEVICES[kind])
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"--machine {text!r}: expected Nx and one of {', '.join(_DEVICES)}, such as 8xH100, or a YAML file"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        given: dict[str, Any] = {name: float(number) for name, number in content.items()}  # YAML takes 1e10 for text
        if "rates" in given:
            raise TypeError("rates are measured: --measured RUN")
        machine = Machine(int(given.pop("n_devices", 0)), **given)
        is_sound = min(machine.n_devices, machine.peak_flops, machine.memory_gb, machine.host_flops) > 0
    except (OSError, AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--machine {text}: {first_line(error)}; expected n_devices, peak_flops, memory_gb and, if known, "
            "utilisation and host_flops"
        ) from None
    if not (is_sound and 0 < machine.utilisation <= 1):
        raise ConfigError(f"--machine {text}: expected numbers above 0, and utilisation up to 1")
    return machine


def with_measured_rates(machine: Machine, folder: Path) -> Machine:
    """Take a device's rates from the ledger of a run on one such device, in place of peak and utilisation.

    Args:
        machine: Of such devices.
        folder: Of a run in one process. Stages of less than a second say nothing.

    Raises:
        OutputError: If it is no run folder.
        StoreError: If its ledger is damaged.
    """
    ledger = Ledger.from_dict(read_json(RunFolder.open(folder).path / COSTS_FILE))
    spent = [record for record in ledger.stages if record.wall_seconds >= _LEAST_SECONDS and record.flops]
    rates = {record.stage: record.flops / record.wall_seconds for record in spent}
    host = rates.pop("affinity", machine.host_flops)
    if "train" in rates:
        rates.setdefault("baselines", rates["train"])
    return replace(machine, host_flops=host, rates=rates)
