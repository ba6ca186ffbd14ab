"""Full fine-tuning on all tasks: the baseline that trains every weight of the base model, and no adapter.

In: a pool. Out: a candidate whose model is put in the base's place for as long as rows are scored. The fine-tuned
weights are kept in the pool's folder, in the base's precision: as many bytes as the base has, a seed and learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ensemblelora import __version__, artifacts
from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0
from ensemblelora.comparison.candidate import Candidate, Costs
from ensemblelora.comparison.controls import score_elsewhere
from ensemblelora.comparison.pool import Part, Pool, Runner, Trained
from ensemblelora.config import TrainingConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.prediction import MemberScores, predict_members
from ensemblelora.seeding import seed_for
from ensemblelora.tensors import load_tensors, save_tensors
from ensemblelora.training import TrainingJob
from ensemblelora.training.full import base_weights, fine_tune_full, replaced_weights

__all__ = ["RATE_SHARE", "train_full"]

RATE_SHARE = 0.1
"""of the adapters' learning rate: all weights together move a model faster than a few added ones, and every rate of a
grid is scaled alike"""
_WEIGHTS_FILE = "model.safetensors"


def train_full(pool: Pool) -> Candidate:
    """Full fine-tuning of the base model on all tasks, at a tenth of the adapters' learning rate.

    Costs three forward passes' FLOPs a token, and a whole model to keep.

    Raises:
        ModelError: If the base is quantised.

    Reference:
        Paper, section 3.1 (Full FT).
    """
    base_weights(pool.probe)  # refuses a base that can't be trained, before anything else
    rate = RATE_SHARE * pool.config.training.learning_rate
    settings = pool.config.training.model_copy(update={"learning_rate": rate})
    identity = artifacts.fingerprint(
        __version__, pool.rows.learning_fingerprint(), pool.probe.base.fingerprint, settings, pool.config.seed
    )
    folder = pool.folder / "full" / f"pool-full-{identity[:16]}"
    if artifacts.find_seal_fault(folder, may_lack_seal=True):
        _train(pool, settings, folder)
    trained = Trained.from_dict(artifacts.read_json(folder / "trained.json"))

    def predict(part: Part) -> list[MemberScores]:
        return score_elsewhere(pool, trained.name, part, lambda: _run_full(pool, folder))

    notes = {"learning_rate": rate, "learning_rate_share": RATE_SHARE, "n_steps": trained.n_steps}
    return Candidate(predict, Costs.of([trained]), (pool.everyone,), notes)


def _train(pool: Pool, settings: TrainingConfig, folder: Path) -> None:
    job = TrainingJob(folder.name, pool.rows.train, pool.rows.validation)
    with Meter("train") as meter:
        found, weights = fine_tune_full(
            pool.probe,
            job,
            settings,
            seed=seed_for(pool.config.seed, "full"),
            folder=pool.folder / "checkpoints" / folder.name,
            meter=meter,
        )
    n_bytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
    trained = Trained.of(folder.name, pool.everyone, found, meter.record, n_bytes)
    with artifacts.atomic_folder(folder) as scratch:
        save_tensors(scratch / _WEIGHTS_FILE, {path: weight.contiguous() for path, weight in weights.items()})
        artifacts.write_json(scratch / "trained.json", asdict(trained))
        artifacts.seal_folder(scratch)


@contextmanager
def _run_full(pool: Pool, folder: Path) -> Iterator[Runner]:
    """Score rows with the fine-tuned weights in the base's place."""
    weights = load_tensors(folder / _WEIGHTS_FILE)
    with replaced_weights(pool.probe, weights) as bare:

        def run(names: list[str], split: EncodedSplit) -> np.ndarray:
            return predict_members(bare, split, [THETA0], max_tokens=pool.config.evaluation.max_tokens_per_batch).values

        yield run
