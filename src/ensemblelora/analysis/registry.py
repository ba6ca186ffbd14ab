"""Every analysis by name.

An analysis is a function of an :class:`~.request.AnalysisRequest` that returns plain values for ``result.json``, and a
function that says what it would take. A new one is a line in :data:`ANALYSES`: its name, its title, its options (a
:class:`~ensemblelora.config_stage.Stage` whose fields have defaults and descriptions), both functions, and the sections
of its page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ensemblelora.analysis import linearization, sharpness_study, similarity_study, transfer
from ensemblelora.analysis.linearization import LinearizationOptions
from ensemblelora.analysis.linearization_page import headline_linearization, write_linearization
from ensemblelora.analysis.request import AnalysisRequest, Work
from ensemblelora.analysis.sharpness_page import headline_sharpness, write_sharpness
from ensemblelora.analysis.sharpness_variants import SharpnessOptions
from ensemblelora.analysis.similarity_page import headline_similarity, write_similarity
from ensemblelora.analysis.similarity_study import SimilarityOptions
from ensemblelora.analysis.transfer import TransferOptions
from ensemblelora.analysis.transfer_page import headline_transfer, write_transfer
from ensemblelora.config_stage import Stage
from ensemblelora.report.document import Section
from ensemblelora.stages import Rows

__all__ = ["ANALYSES", "Analysis"]


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: On the command line.
        title: Of its page.
        options: What can be set; all have defaults.
        run: Gives plain values; ``costs`` is added to them. Whatever is dear goes through the request.
        forecast: What it would take, by parts, from the rows alone: the framework knows what a row costs.
        write: Sections of its page, from its plain values alone.
        headline: One sentence on what came out, from the same.
    """

    name: str
    title: str
    options: type[Stage]
    run: Callable[[AnalysisRequest[Any]], dict[str, Any]]
    forecast: Callable[[AnalysisRequest[Any], Rows], Mapping[str, Work]]
    write: Callable[[Mapping[str, Any]], Iterable[Section]]
    headline: Callable[[Mapping[str, Any]], str]


ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in (
        Analysis(
            "linearization",
            "How far the first-order expansion can be relied on",
            LinearizationOptions,
            linearization.run,
            linearization.forecast,
            write_linearization,
            headline_linearization,
        ),
        Analysis(
            "transfer",
            "Who helps whom",
            TransferOptions,
            transfer.run,
            transfer.forecast,
            write_transfer,
            headline_transfer,
        ),
        Analysis(
            "sharpness",
            "Sharpness and generalisation",
            SharpnessOptions,
            sharpness_study.run,
            sharpness_study.forecast,
            write_sharpness,
            headline_sharpness,
        ),
        Analysis(
            "similarity",
            "How alike adapters are",
            SimilarityOptions,
            similarity_study.run,
            similarity_study.forecast,
            write_similarity,
            headline_similarity,
        ),
    )
}
