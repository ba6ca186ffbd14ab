"""What validating a run would take, before it starts: what is measured already, and what is left to fine-tune.

In: a run folder and what ``validate`` is asked. Out: fine-tunings, FLOPs and seconds. One adapter for all tasks is
forecast as a run's baseline, a subset's by its share of the tokens. The scoring of rows, a few per cent, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ensemblelora import stages
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.forecast import list_stages, make_forecaster
from ensemblelora.validation.validate import find_unmeasured, open_validated

__all__ = ["forecast_validation"]


def forecast_validation(
    folder: Path | str,
    *,
    n_subsets: int = 50,
    n_seeds: int = 1,
    all_dimensions: bool = False,
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Predict the fine-tunings, FLOPs and seconds of a validation; nothing is written, nothing is trained.

    Args are those of :func:`ensemblelora.validation.validate.validate_run`.

    Returns:
        ``fine_tunings``, ``flops`` and ``seconds`` of the true fine-tunings that are not measured yet, of the gradient
        passes that ``all_dimensions`` adds, and of their ``total``.

    Raises:
        UsageError: As the validation would.
    """
    run, config = open_validated(folder, n_subsets=n_subsets, n_seeds=n_seeds, device=device)
    _, rows, probe = stages.prepare(config)
    missing = find_unmeasured(run, config, rows, probe, n_subsets=n_subsets, n_seeds=n_seeds)
    asked = config.evaluation.model_copy(update={"baselines": ("shared",)})
    forecaster = make_forecaster(config.model_copy(update={"evaluation": asked}), probe, rows)
    one, sizes = list_stages(forecaster)["baselines"], _count_tokens(rows.train)
    shares = sum(sum(sizes[task] for task in subset) / sum(sizes) for subset, _ in missing)
    lines = {
        "true fine-tunings": {
            "fine_tunings": len(missing),
            "flops": round(shares * one.flops),
            "seconds": shares * one.seconds,
        }
    }
    if all_dimensions:
        features = forecaster.features(config.gradients.train_fraction)
        lines["gradient passes"] = {"fine_tunings": 0, "flops": 2 * features.flops, "seconds": 2 * features.seconds}
    total = {name: sum(line[name] for line in lines.values()) for name in ("fine_tunings", "flops", "seconds")}
    return lines | {"total": total}


def _count_tokens(splits: Sequence[EncodedSplit]) -> list[int]:
    return [int(split.example_lengths.sum()) for split in splits]
