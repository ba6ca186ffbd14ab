"""A client's features: outputs and projected gradients of its own rows at theta0, or the moments of them.

In: a :class:`~.worker.Worker`, a client's index. Out: plain arrays. The projection is drawn from the seed that all
sides share, so features of different clients belong together although none of them was ever sent a projection.

Cost: a forward and a backward pass of each row. Slow twin: autograd, one row at a time, in tests/test_collect.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ensemblelora.accounting.meter import Meter
from ensemblelora.adapters import THETA0, activate
from ensemblelora.counting import count_gradients
from ensemblelora.federation.moments import list_row_moments
from ensemblelora.federation.privacy import clip_rows
from ensemblelora.federation.protocol import Part
from ensemblelora.federation.worker import Worker
from ensemblelora.gradients.backward import compute_features, list_parts

__all__ = ["compute_rows", "sum_rows"]

_ROWS_AT_ONCE = 64  # whose own moments are held


def compute_rows(worker: Worker, client: int, part: Part, *, meter: Meter) -> npt.NDArray[np.float32]:
    """Return each row's output and its projected gradient at theta0, ``(n, 1 + d)``.

    Args:
        worker: Model and rows.
        client: Whose rows.
        part: Which of them.
        meter: Told what every pass costs.
    """
    config, adapted = worker.config.features, worker.adapted
    rows = np.zeros((len(worker.rows.find(client, part)), 1 + config.proj_dim), np.float32)
    flops = worker.projector.count_flops(list_parts(worker.layers))
    with activate(adapted, THETA0):
        for places, batch in worker.list_batches(client, part, max_tokens=config.max_tokens_per_batch):
            found = compute_features(adapted, worker.layers, worker.projector, batch, "sequence", meter=meter)
            rows[places, 0], rows[places, 1:] = found.outputs[:, 0], found.features[:, 0]
            n = len(places)
            count_gradients(meter, adapted.costs, batch, n_backwards=1, n_outputs=n, projection_flops=flops)
    return rows


def sum_rows(rows: npt.NDArray[np.float32], clip_norm: float | None) -> npt.NDArray[np.float64]:
    """Sum rows' own moments, each cut to the norm.

    Args:
        rows: Of :func:`compute_rows`.
        clip_norm: None: nothing is cut.

    Returns:
        ``(1 + d + d (d + 1) / 2,)``; see :mod:`.moments`.
    """
    pieces = (rows[first : first + _ROWS_AT_ONCE] for first in range(0, len(rows), _ROWS_AT_ONCE))
    sums = [clip_rows(list_row_moments(piece[:, 0], piece[:, 1:]), clip_norm).sum(axis=0) for piece in pieces]
    return np.asarray(np.sum(sums, axis=0), np.float64)
