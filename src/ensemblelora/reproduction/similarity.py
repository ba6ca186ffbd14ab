"""Figure 12 of the paper, how alike adapters for several tasks are to those for one: what it says, and what was found.

In: folders of ``ensemblelora analyze similarity``. Out: :class:`~.exhibit.Reproduction`, a row a claim. The paper's
figure has no numbers: its similarity falls as the tasks become more, fine-tuned together or averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensemblelora.analysis.record import read_result
from ensemblelora.report.wording import count
from ensemblelora.reproduction.claims import make_claim, name_claims
from ensemblelora.reproduction.exhibit import Reproduction, Row

__all__ = ["SIMILARITY_EXHIBITS"]


def _figure_12(folders: Sequence[Path]) -> Reproduction:
    found = [(folder, read_result(folder, "similarity")) for folder in folders]
    rows = [row for folder, result in found for row in name_claims(folder, folders, list(_claim_similarity(result)))]
    notes = (
        *(
            f"{folder.name}: {result['config']['model']['name']}, {count(len(result['seeds']), 'seed')}, "
            f"{count(result['options']['n_subsets'], 'subset')} of each size"
            for folder, result in found
        ),
        "The paper: Llama-3-1B, QLoRA and QAdapter, subsets of 2 to 10 tasks; its figure has no numbers. Correlations "
        "with the number of tasks, over subsets; a share at a size is the mean over subsets.",
    )
    return Reproduction("figure12", "Similarity with single-task adapters by number of tasks", tuple(rows), notes)


def _claim_similarity(result: Mapping[str, Any]) -> Iterator[Row]:
    for base in dict.fromkeys(record["base"] for record in result["by_size"]):
        for kind in ("together", "averaged"):
            for field in ("overlap", "left", "cosine"):
                own = [t for t in result["trends"] if (t["base"], t["kind"], t["field"]) == (base, kind, field)]
                name = {"overlap": "overlap", "left": "overlap of what is written", "cosine": "cosine"}[field]
                claim = f"{base}, {kind}: correlation of {name} and tasks"
                yield make_claim(claim, own[0]["spearman"] if own else None, sign=-1)
            sizes = [r for r in result["by_size"] if (r["base"], r["kind"]) == (base, kind)]
            for record in (sizes[0], sizes[-1]) if len(sizes) > 1 else sizes:
                yield make_claim(f"{base}, {kind}: overlap at {record['size']} tasks", record["overlap"], sign=0)


SIMILARITY_EXHIBITS: Mapping[str, Callable[[Sequence[Path]], Reproduction]] = {"figure12": _figure_12}
