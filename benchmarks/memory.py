"""A feature store of a million rows and 500 tasks, built and solved within 4 GB.

    python benchmarks/memory.py --json

Rows are drawn, 400 numbers each, and handed to the store in pieces as a gradient pass would; then the oracle fits
subsets of ten tasks, says every task's loss under each, and the tasks are grouped by the affinity that follows. The
process may take no more memory of its own than the limit (the system refuses it), and the peak of all that is resident,
mapped files included, is measured. 1.6 GB of disk are used, in ``--folder``, and freed.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import finish_worker, keep_record, make_parser, run_worker
from threadpoolctl import threadpool_limits

from ensemblelora import affinity as affinities
from ensemblelora.config import AffinityConfig, EstimationConfig
from ensemblelora.estimation import build_oracle, read_features
from ensemblelora.grouping import cluster
from ensemblelora.seeding import generator_for
from ensemblelora.store import FeatureStore

DIMENSION = 400
LIMIT_BYTES = 4 * 10**9
PIECE = 256
VALIDATION_SHARE = 0.2
SUBSET_SIZE = 10
N_GROUPS = 6


def main() -> None:
    """Measure in a process of its own, and keep the record."""
    parser = make_parser(__doc__, rows=None, repeats="repeats", n_repeats=1)
    parser.add_argument("--examples", type=int, default=1_000_000, help="rows of all tasks together")
    parser.add_argument("--tasks", type=int, default=500, help="tasks they belong to")
    parser.add_argument("--subsets", type=int, default=500, help="subsets that the oracle fits")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the store is made")
    parser.add_argument("--trial", action="store_true", help="print, and leave the record as it is")
    arguments = parser.parse_args()
    sizes = [arguments.examples, arguments.tasks, arguments.subsets]
    if arguments.worker:
        with limited_to(LIMIT_BYTES), threadpool_limits(1):
            return finish_worker(build_and_solve(*sizes, arguments.folder))
    given = [
        text for name, n in zip(("examples", "tasks", "subsets"), sizes, strict=True) for text in (f"--{name}", str(n))
    ]
    result = run_worker(__file__, ["all", *given, "--folder", str(arguments.folder)])
    config = {"n_examples": sizes[0], "n_tasks": sizes[1], "n_subsets": sizes[2], "proj_dim": DIMENSION}
    keep_record(
        "memory", config | {"limit_bytes": LIMIT_BYTES}, result, as_json=arguments.json, is_kept=not arguments.trial
    )


@contextmanager
def limited_to(n_bytes: int) -> Iterator[None]:
    """Let the process have no more memory of its own than this; mapped files are the system's."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def build_and_solve(n_examples: int, n_tasks: int, n_subsets: int, folder: Path) -> dict[str, Any]:
    """Build the store, fit the subsets, group the tasks; seconds and the peak after each."""
    place = Path(tempfile.mkdtemp(prefix="ensemblelora-memory-", dir=folder))
    found: dict[str, Any] = {}
    try:
        with measured(found, "build"):
            store, names = build_store(place, n_examples, n_tasks)
        found["store_bytes"] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        with measured(found, "solve"):
            matrix = solve(store, names, n_subsets)
        with measured(found, "group"):
            groups = cluster(matrix, min(N_GROUPS, n_tasks), n_restarts=2, is_bound_needed=False).groups
        found["group_sizes"] = [len(group) for group in groups]
    finally:
        shutil.rmtree(place)
    return found


@contextmanager
def measured(found: dict[str, Any], name: str) -> Iterator[None]:
    """Note how long something took, and the highest resident memory by its end."""
    began = time.perf_counter()
    yield
    found[f"{name}_seconds"] = time.perf_counter() - began
    found[f"{name}_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build_store(folder: Path, n_examples: int, n_tasks: int) -> tuple[FeatureStore, list[str]]:
    """Write rows whose labels follow one of ``N_GROUPS`` directions, task by task and piece by piece."""
    store, names = FeatureStore(folder), [f"task{i:03d}" for i in range(n_tasks)]
    directions = generator_for(0, "directions").standard_normal((N_GROUPS, DIMENSION), dtype=np.float32)
    n_each = n_examples // n_tasks
    n_validation = max(2, round(VALIDATION_SHARE * n_each))
    for i, name in enumerate(names):
        for split, n_rows in (("train", n_each - n_validation), ("validation", n_validation)):
            with store.writer(name, split, "drawn", mode="margin") as writer:
                for first in range(0, n_rows, PIECE):
                    n = min(PIECE, n_rows - first)
                    features = generator_for(0, name, split, first).standard_normal((n, 1, DIMENSION), dtype=np.float32)
                    labels = (features[:, 0] @ directions[i % N_GROUPS] > 0).astype(np.int64)
                    writer.append(
                        outputs=np.zeros((n, 1)),
                        features=features,
                        labels=labels,
                        n_choices=np.full(n, 2),
                        squared_norms=np.full(n, float(DIMENSION)),
                        groups=np.arange(first, first + n),
                        ids=[f"{split}:{row}" for row in range(first, first + n)],
                    )
    return store, names


def solve(store: FeatureStore, names: list[str], n_subsets: int) -> np.ndarray[Any, Any]:
    """Fit subsets of tasks, and average what they predict into the affinity ``(n_tasks, n_tasks)``."""
    wanted = AffinityConfig(subset_size=min(SUBSET_SIZE, len(names)), n_subsets=n_subsets, min_pair_count=0)
    design = affinities.sample_subsets(len(names), wanted, seed=0)
    oracle = build_oracle(read_features(store, names, 1), EstimationConfig(method="ridge", l2_penalty=1.0))
    oracle.solve(design.subsets)
    scores = oracle.score(design.subsets)
    return affinities.affinity_from_scores(design, affinities.select_values(scores.nll, scores.accuracy, "nll")).matrix


if __name__ == "__main__":
    main()
