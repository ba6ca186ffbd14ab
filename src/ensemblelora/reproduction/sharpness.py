"""Figures 6 and 9 of the paper, sharpness and the generalisation gap: what it says of them, and what was found.

In: folders of ``ensemblelora analyze sharpness``. Out: :class:`~.exhibit.Reproduction`, a row a claim. The paper's
figures have no numbers; those of its text stand beside ours, and else its ordering alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensemblelora.analysis.record import read_result
from ensemblelora.analysis.sharpness_summary import ALL
from ensemblelora.errors import UsageError
from ensemblelora.report.wording import count
from ensemblelora.reproduction import paper
from ensemblelora.reproduction.claims import make_claim, name_claims
from ensemblelora.reproduction.exhibit import Reproduction, Row

__all__ = ["SHARPNESS_EXHIBITS"]

Result = Mapping[str, Any]

_TRACE = "largest trace"
_GGN_TRACE = "largest GGN trace"
_WEIGHTS_TRACE = "largest trace of the weights"


def _figure_6(folders: Sequence[Path]) -> Reproduction:
    found = [(folder, read_result(folder, "sharpness")) for folder in folders]
    rows: list[Row] = []
    for folder, result in found:
        claims = [*_claim_ranks(result), *_claim_members(result), *_claim_bases(result), *_claim_all(result)]
        if not claims:
            raise UsageError(f"{folder}: figure 6 needs one of the parts rank, ensemble, quantization")
        rows += name_claims(folder, folders, claims)
    notes = (
        *(_describe(folder, result) for folder, result in found),
        "The paper: Llama-3-8B, RTE and COPA, traces of the largest sample, without intervals. Changes are shares of "
        "the reference's value; intervals of gaps are over rows, those of traces over random vectors, those of "
        "correlations over ways to train.",
        "Of k equal adapters, averaging alone takes 1 - 1/k off the trace over all of them and 1 - 1/k^2, for k = 2 75 "
        "per cent, off that of one.",
        "With a model dequantised from a 4-bit file, such as smollm2-135m, LoRA and QLoRA have both a quantised base.",
    )
    return Reproduction("figure6", "Generalisation gap and sharpness", tuple(rows), notes)


def _figure_9(folders: Sequence[Path]) -> Reproduction:
    found = [(folder, read_result(folder, "sharpness")) for folder in folders]
    rows: list[Row] = []
    for folder, result in found:
        claims = list(_claim_widths(result))
        if not claims:
            raise UsageError(
                f"{folder}: no bottleneck adapters of several widths in it, of which figure 9 is; measure them with: "
                "ensemblelora analyze sharpness CONFIG --with parts=[width]"
            )
        rows += name_claims(folder, folders, claims)
    notes = (
        *(_describe(folder, result) for folder, result in found),
        "The paper: Llama-3-8B, QAdapter; its figure and text have no numbers.",
    )
    return Reproduction("figure9", "Generalisation gap and sharpness by bottleneck width", tuple(rows), notes)


def _claim_ranks(result: Result) -> Iterator[Row]:
    scopes = _list_scopes(result, "rank")
    for scope in scopes:
        yield _claim_smallest(result, scope, f"6a, {scope}: rank of the smallest gap", float(paper.BEST_RANK))
        for measure in (_TRACE, _GGN_TRACE, _WEIGHTS_TRACE):
            claim = f"6a, {scope}: correlation of gap and {measure}"
            yield make_claim(claim, _find_correlation(result, scope, measure), sign=1)


def _claim_members(result: Result) -> Iterator[Row]:
    if not _list_scopes(result, "ensemble"):
        return
    two = _find_change(result, "ensemble", size=2, reference_size=1)
    printed = paper.ENSEMBLE_OF_TWO
    yield from _claim_gap("6b: gap of two adapters", "one's", two, printed["gap"])
    told = {
        _TRACE: "all members",
        _GGN_TRACE: "its GGN part, exact",
        "largest trace, first member": "first member alone",
        f"{_TRACE}, rescaled": "times k",
    }
    for measure, what in told.items():
        is_printed = measure == _TRACE
        yield make_claim(
            f"6b: {_TRACE} of two adapters, {what}, over one's",
            two and two["sharpness_changes"].get(measure),
            sign=-1 if is_printed else 0,
            printed=printed["trace"] if is_printed else None,
        )
    sizes = sorted({point["size"] for point in result["points"] if point["scope"] == "ensemble"})
    most = _find_change(result, "ensemble", size=sizes[-1], reference_size=2)
    if most is not None and sizes[-1] > 2:
        yield make_claim(f"6b: gap of {sizes[-1]:.0f} adapters less that of two", most["gap_change"], sign=-1)
    yield make_claim(f"6b: correlation of gap and {_TRACE}", _find_correlation(result, "ensemble", _TRACE), sign=1)


def _claim_bases(result: Result) -> Iterator[Row]:
    change = _find_change(result, "quantization", size=4, reference_size=16)
    if change is not None:
        printed = paper.QUANTISED_SHARPNESS
        yield from _claim_gap("6c: gap of QLoRA", "LoRA's", change, printed["gap"])
        trace = change["sharpness_changes"].get(_TRACE)
        yield make_claim(f"6c: {_TRACE} of QLoRA, over LoRA's", trace, sign=-1, printed=printed["trace"])


def _claim_all(result: Result) -> Iterator[Row]:
    """Correlations over all adapters, whichever studies they are part of."""
    for measure in (_TRACE, _GGN_TRACE, _WEIGHTS_TRACE):
        found = _find_correlation(result, ALL, measure)
        if found is not None:
            yield make_claim(f"6, all adapters: correlation of gap and {measure}", found, sign=1)


def _claim_widths(result: Result) -> Iterator[Row]:
    if not _list_scopes(result, "width"):
        return
    narrowest = min(point["size"] for point in result["points"] if point["scope"] == "width")
    yield _claim_smallest(result, "width", "9: width of the smallest gap", narrowest)
    for measure, what in (("size", "width"), (_TRACE, _TRACE)):
        yield make_claim(f"9: correlation of gap and {what}", _find_correlation(result, "width", measure), sign=1)


def _claim_gap(what: str, reference: str, change: Mapping[str, Any] | None, printed: float) -> Iterator[Row]:
    """A gap's relative change, undecided where the reference's is not surely positive, and the change in nats."""
    relative = change and change["relative_gap_change"]
    verdict = "undecided" if change and relative is None else None
    yield make_claim(f"{what}, over {reference}", relative, sign=-1, printed=printed, verdict=verdict)
    yield make_claim(f"{what} less {reference}, nats", change and change["gap_change"], sign=-1)


def _claim_smallest(result: Result, scope: str, claim: str, printed: float) -> Row:
    """The size of the smallest mean gap; undecided where the paper's is not surely larger."""
    own = _list_changes(result, scope)
    best = min(own, key=lambda change: change["gap"])
    wanted = next((change for change in own if change["size"] == printed), None)
    verdict = "agrees" if best["size"] == printed else "not measured" if wanted is None else "undecided"
    if verdict == "undecided" and wanted is not None and best["reference"] == wanted["label"]:
        high = best["gap_change"]["high"]
        verdict = "disagrees" if high is not None and high < 0 else "undecided"
    estimate = {"value": float(best["size"]), "low": None, "high": None}
    return make_claim(claim, estimate, sign=0, printed=printed, verdict=verdict)


def _list_scopes(result: Result, part: str) -> list[str]:
    return list(dict.fromkeys(point["scope"] for point in result["points"] if point["part"] == part))


def _list_changes(result: Result, scope: str) -> list[Mapping[str, Any]]:
    """Changes against a scope's first reference in the mean over tasks, or of the only one."""
    own = [change for change in result["changes"] if change["scope"] == scope]
    means = [change for change in own if change["task"] == ALL] or own
    return [change for change in means if change["reference"] == means[0]["reference"]]


def _find_change(result: Result, scope: str, *, size: float, reference_size: float) -> Mapping[str, Any] | None:
    """The change of one variant against another, in the mean over tasks."""
    own = [change for change in result["changes"] if change["scope"] == scope]
    means = [change for change in own if change["task"] == ALL] or own
    labels = {change["label"] for change in own if change["size"] == reference_size}
    return next((c for c in means if c["size"] == size and c["reference"] in labels), None)


def _find_correlation(result: Result, scope: str, measure: str) -> Mapping[str, Any] | None:
    own = [r for r in result["correlations"] if (r["scope"], r["measure"]) == (scope, measure)]
    return own[0]["spearman"] if own else None


def _describe(folder: Path, result: Result) -> str:
    config, options, points = result["config"], result["options"], result["points"]
    tasks = list(dict.fromkeys(point["task"] for point in points))
    rows = [point["n_train"] for point in points]
    told = f"{min(rows)} to {max(rows)}" if min(rows) < max(rows) else str(rows[0])
    return (
        f"{folder.name}: {config['model']['name']}, {', '.join(tasks)}; {told} training rows "
        f"behind a gap, {count(options['n_examples'], 'row')} and {count(options['n_probes'], 'random vector')} behind "
        f"a trace, {count(config['training']['num_train_epochs'], 'epoch')}, {count(len(result['seeds']), 'seed')}"
    )


SHARPNESS_EXHIBITS: Mapping[str, Callable[[Sequence[Path]], Reproduction]] = {
    "figure6": _figure_6,
    "figure9": _figure_9,
}
