"""How much a server takes on, and how it says no. No torch, no web framework."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from ensemblelora.errors import MissingExtraError, UsageError

__all__ = ["Limits", "Refusal", "check_installed"]

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Limits:
    """What a server accepts at once and in one request, and how long it takes over it."""

    max_batch_rows: int = 32
    """rows that are answered together; one request's stay together, whatever their number"""
    batch_wait_ms: float = 5.0
    """how long a batch that isn't full waits for more"""
    max_waiting_rows: int = 256
    """beyond these, requests are refused at once"""
    max_rows: int = 128
    """of one request"""
    max_body_bytes: int = 2**20
    """of one request"""
    timeout_seconds: float = 30.0
    """from a request's last byte to its answer; and from its first byte to its last"""

    def __post_init__(self) -> None:
        for name in ("max_batch_rows", "max_waiting_rows", "max_rows", "max_body_bytes", "timeout_seconds"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} {getattr(self, name)}: expected a number above 0")
        if not 0 <= self.batch_wait_ms < 1000 * self.timeout_seconds:
            raise UsageError(f"batch_wait_ms {self.batch_wait_ms}: expected 0 or more, and less than the time limit")
        if self.max_rows > self.max_waiting_rows:
            raise UsageError(
                f"max_rows {self.max_rows} (--rows) is more than max_waiting_rows {self.max_waiting_rows} (--queue): "
                "a request of as many rows would always be refused; lower the first or raise the second"
            )


class Refusal(Exception):
    """A request that is not answered, through no fault of its own or of the run's."""

    def __init__(self, reason: str, message: str, *, status: int) -> None:
        super().__init__(message)
        self.reason, self.status = reason, status


def check_installed() -> None:
    """Refuse to serve without the packages it takes.

    Raises:
        MissingExtraError: If one is missing; carries the install command.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"serve: package {package.replace('_', '-')} is not installed; run: pip install 'ensemblelora[serve]'"
            )
