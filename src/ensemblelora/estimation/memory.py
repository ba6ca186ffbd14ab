"""The fits that an oracle knows, and how they go from one process to another. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensemblelora.estimation.problem import Subset, SubsetProblem

__all__ = ["FitMemory", "HandedFits", "KnownFit"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class KnownFit:
    """One subset's fit under one projection seed."""

    weights: FloatArray
    """(d,)"""
    converged: bool
    iterations: int


@dataclass(frozen=True, eq=False)
class HandedFits:
    """Fits of k subsets under one projection seed, as they leave a process."""

    subsets: tuple[Subset, ...]
    weights: FloatArray
    """(k, d)"""
    converged: npt.NDArray[np.bool_]
    iterations: npt.NDArray[np.int64]
    start_iterations: int


class FitMemory:
    """The fits of one projection seed, and its rows in the solver's form once anything was asked here.

    Attributes:
        fits: By subset.
        problem: None until a ridge fit is made in this process.
    """

    def __init__(self) -> None:
        self.fits: dict[Subset, KnownFit] = {}
        self.problem: SubsetProblem | None = None
        self._start_iterations = 0

    @property
    def start_iterations(self) -> int:
        """Over all rows at the base model, where ridge fits start; made here, or where the fits were made."""
        return self._start_iterations if self.problem is None else self.problem.start_iterations

    def hand_over(self, subsets: Sequence[Subset]) -> HandedFits:
        """Return fits that are known, in a form that is small on its way."""
        fits = [self.fits[subset] for subset in subsets]
        return HandedFits(
            subsets=tuple(subsets),
            weights=np.array([fit.weights for fit in fits]),
            converged=np.array([fit.converged for fit in fits], bool),
            iterations=np.array([fit.iterations for fit in fits], np.int64),
            start_iterations=self.start_iterations,
        )

    def take_over(self, handed: HandedFits) -> None:
        """Add fits that were made elsewhere; those that are known here stay."""
        self._start_iterations = handed.start_iterations
        found = zip(handed.subsets, handed.weights, handed.converged, handed.iterations, strict=True)
        for subset, weights, converged, iterations in found:
            self.fits.setdefault(subset, KnownFit(weights, bool(converged), int(iterations)))
