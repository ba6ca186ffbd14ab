"""Every stage of the pipeline: what it reads, what it leaves in the run folder, when it need not run again.

A stage takes plain values from the stages before it and returns one. If its marker in the run folder has the
fingerprint of its inputs, the value is read back instead of computed. The order is pipeline.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ensemblelora import affinity as affinities
from ensemblelora import artifacts, boosting, planning, progress, training, weighting
from ensemblelora.accounting.meter import Ledger, Meter
from ensemblelora.adapters import THETA0, AdaptedModel, adapter_bytes, load_adapter, measure_distance, save_adapter
from ensemblelora.blocks import FeatureBlock
from ensemblelora.boosting import BoostRound, BoostTask
from ensemblelora.config import RunConfig
from ensemblelora.data.encoding import EncodedSplit
from ensemblelora.ensemble import Ensemble, Member, combined_scores, group_scores, load_ensemble, save_ensemble
from ensemblelora.errors import EnsembleLoraError
from ensemblelora.estimation import Oracle, TaskFeatures, build_oracle
from ensemblelora.evaluation import evaluate, linearity
from ensemblelora.generation import generate_answers, matches_exactly
from ensemblelora.gradients.collect import collect_features, make_projector
from ensemblelora.planning import Plan
from ensemblelora.prediction import MemberScores, predict_members
from ensemblelora.store import FeatureStore

__all__ = ["STAGES"]

STAGES = ("features", "affinity", "group", "train", "boost", "combine", "evaluate", "report")
