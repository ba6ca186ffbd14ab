"""Features: projected per-example gradients of the label outputs at the expansion point theta0.

:mod:`.output` says which numbers are differentiated, :mod:`.tap` reads every example's gradient off one backward pass,
:mod:`.projection` shrinks it to a few hundred dimensions, :mod:`.collect` runs the model and writes the feature store.
"""

from __future__ import annotations

__all__: list[str] = []
