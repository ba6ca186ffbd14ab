"""What all sections of a config have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Stage"]


class Stage(BaseModel):
    """Common rules: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
