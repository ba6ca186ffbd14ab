"""Scores of adapters on rows, kept beside the run, so that a run that goes on from it need not score them again.

One file a task and split, ``scores/TASK.SPLIT.npz``, holds an array for each adapter under the checksum of its weights.
Test rows are kept by the stage that opens them. A run made from the beginning does not read its own file: a stage that
is done again is charged with all of its passes, as it was the first time. A file that can't be read counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ensemblelora import artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import AdaptedModel
from ensemblelora.config import MaxTokens
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.errors import StoreError
from ensemblelora.prediction import MemberScores, arrange_scores, predict_members

__all__ = ["SCORES_FOLDER", "score_members"]

SCORES_FOLDER = "scores"


def score_members(
    folder: Path,
    adapted: AdaptedModel,
    split: EncodedSplit,
    names: Sequence[str],
    digests: Mapping[str, str],
    *,
    earlier: Sequence[Path] = (),
    max_tokens: MaxTokens,
    meter: Meter | None = None,
) -> MemberScores:
    """Score a split with each adapter, or take over what an earlier run found; leaves the scores in the run folder.

    Args:
        folder: The run's.
        adapted: The model with these adapters.
        split: The rows.
        names: Adapters, in the order of the result.
        digests: Identity of each: of its weights, and of what it stands on.
        earlier: Folders of runs whose scores count, the first that has one; none: every adapter is run.
        max_tokens: Padded tokens in one forward pass.
        meter: Told what every pass costs.

    Returns:
        Values of shape ``(len(names), n_rows, K)``, as of :func:`~ensemblelora.prediction.predict_members`.
    """
    file = Path(SCORES_FOLDER) / f"{split.task}.{split.split}.npz"
    rows = fingerprint_split(split)
    keys = {name: artifacts.fingerprint(rows, digests[name]) for name in names}
    known = {key: values for run in reversed(earlier) for key, values in _read(run / file).items()}
    missing = [name for name in names if keys[name] not in known]
    if missing:
        found = predict_members(adapted, split, missing, max_tokens=max_tokens, meter=meter)
        known |= {keys[name]: values for name, values in zip(missing, found.values, strict=True)}
    kept = {keys[name]: known[keys[name]] for name in names}
    artifacts.save_arrays(folder / file, kept)
    return arrange_scores(split, np.stack([known[keys[name]] for name in names]))


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return artifacts.load_arrays(path) if path.exists() else {}
    except StoreError:
        return {}
