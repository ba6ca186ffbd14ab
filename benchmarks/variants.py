"""What adapting fewer layers, or B alone, costs in accuracy, saves in time, and does to linearity.

    ENSEMBLELORA_DATA=../shared/data python benchmarks/variants.py --json

One adapter for all ten datasets, the same rows, steps and rate for every variant, three seeds (of theta0 and of the
order of rows). Test rows are scored once, with the checkpoint that validation chose.

* ``all``: every layer; ``top-half``, ``top-third``: those alone, activations below kept; ``frozen-a``: every layer,
  A as theta0 has it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Journal, finish_worker, keep_record, load_model, load_rows, make_parser, spread

MAX_LENGTH = 256
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "top-half": {"layers_to_transform": "top_half"},
    "top-third": {"layers_to_transform": "top_third"},
    "frozen-a": {"train_A": False},
}
LINEARITY_ROWS = 12


def main() -> None:
    """Measure every variant once before any is measured again."""
    parser = make_parser(__doc__, rows=24, repeats="seeds", n_repeats=3)
    arguments = parser.parse_args()
    if arguments.worker:
        finish_worker(measure(arguments.worker, arguments.rows, arguments.seed))
        return
    journal = Journal(Path(__file__).parent / ".journal" / "variants.jsonl", fresh=arguments.fresh)
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for seed in range(arguments.seeds):
        for variant, entries in found.items():
            where = [variant, "--rows", str(arguments.rows), "--seed", str(seed)]
            entries.append(journal.measure(__file__, where))
    config = {"rows_per_task": arguments.rows, "seeds": arguments.seeds, "max_length": MAX_LENGTH}
    keep_record("variants", config, compare(found), as_json=arguments.json)


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Differences to adapting every layer, seed by seed, with their spread."""
    against = found["all"]

    def differences(variant: str, key: str) -> dict[str, float]:
        return spread([ours[key] - theirs[key] for ours, theirs in zip(found[variant], against, strict=True)])

    prices = {
        variant: {
            "accuracy_points": {k: 100 * v for k, v in differences(variant, "accuracy").items()},
            "test_nll": differences(variant, "test_nll"),
            "speedup": statistics.median(e["seconds"] for e in against)
            / statistics.median(e["seconds"] for e in found[variant]),
        }
        for variant in VARIANTS
        if variant != "all"
    }
    systems = {v: {key: spread([e[key] for e in entries]) for key in entries[0]} for v, entries in found.items()}
    return {"differences_to_all": prices, "variants": systems}


def measure(variant: str, n_rows: int, seed: int) -> dict[str, Any]:
    """Train one adapter on all tasks and score it on the test rows."""
    from ensemblelora.accounting.meter import Meter
    from ensemblelora.adapters import attach
    from ensemblelora.config import AdapterConfig, GradientsConfig, TrainingConfig
    from ensemblelora.evaluation.linearity import measure_linearity
    from ensemblelora.gradients.output import choose_modes
    from ensemblelora.passes import with_cache
    from ensemblelora.prediction import member_nll, predict_members
    from ensemblelora.training import fine_tune

    base = load_model(MAX_LENGTH)
    rows = load_rows(base, n_train=n_rows, n_validation=16, n_test=48, max_length=MAX_LENGTH, seed=0)
    adapted = attach(base, AdapterConfig(**VARIANTS[variant]), seed=seed)
    meter = Meter("train")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        adapted = with_cache(adapted, Path(folder) / "cache", rows.learning, max_bytes=4 * 10**9)
        scratch = Path(folder) / "checkpoints"
        trained = fine_tune(
            adapted, "one", rows.train, rows.validation, TrainingConfig(), seed=seed, checkpoints=scratch, meter=meter
        )
        seconds = time.perf_counter() - started
        found = measure_linearity(
            adapted,
            rows.validation,
            ["one"] * len(rows.names),
            choose_modes(rows.learning, GradientsConfig().output),
            max_rows=LINEARITY_ROWS,
            max_tokens=2048,
            meter=meter,
        )
    nll, accuracy = [], []
    for split in rows.test:
        scores = predict_members(adapted, split, ["one"], max_tokens="auto")
        nll.append(float(member_nll(scores, split.labels)[0].mean()))
        accuracy.append(float((scores.values[0].argmax(1) == split.labels).mean()))
    return {
        "seconds": seconds,
        "validation_nll": trained.best_validation_nll,
        "test_nll": float(np.mean(nll)),
        "accuracy": float(np.mean(accuracy)),
        "linearity_r2": float(
            np.median([entry.r2_over_zero_order for entry in found if entry.r2_over_zero_order is not None])
        ),
        "train_flops": meter.record.flops,
    }


if __name__ == "__main__":
    main()
