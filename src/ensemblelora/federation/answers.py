"""How a client answers: one function an action, from its own rows to what is allowed to leave it.

In: a :class:`~.worker.Worker`, a client's index, a request. Out: a reply, clipped and with noise as the config says.
A fault that has a name is answered as such, so that the server can say which client had it; any other is an error here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblelora import __version__
from ensemblelora.accounting.meter import Meter
from ensemblelora.config import EnsembleConfig
from ensemblelora.errors import EnsembleLoraError
from ensemblelora.federation.adapters import Vector
from ensemblelora.federation.gradients import compute_rows, sum_rows
from ensemblelora.federation.local import Leaning, TokenScores, score_sums, train_locally
from ensemblelora.federation.privacy import add_noise, clip_rows
from ensemblelora.federation.protocol import PARTS, Action, Part, Reply, Request, Term
from ensemblelora.federation.worker import Worker
from ensemblelora.weighting import MemberLogits, combine, fit_weights

__all__ = ["answer"]

Answer = tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]
_HELD: tuple[Part, ...] = ("validation", "test")


def answer(worker: Worker, client: int, request: Request) -> Reply:
    """Do what a server asks of one client.

    Args:
        worker: Model and rows.
        client: Its index among the worker's.
        request: What is asked.

    Returns:
        Arrays and plain values; with a value ``error`` where the client can't do it.
    """
    meter = Meter("client")
    try:
        arrays, values = _ACTIONS[request.action](worker, client, request, meter)
    except EnsembleLoraError as error:
        return Reply(values={"error": str(error)})
    spent = meter.record
    costs = {"flops": spent.flops, "n_tokens": spent.n_tokens, "n_padded_tokens": spent.n_padded_tokens}
    return Reply(arrays, {**values, **costs})


def _say_hello(worker: Worker, client: int, request: Request, meter: Meter) -> Answer:
    counts = worker.rows.count(client)
    tokens = {part: int(worker.rows.list_answers(client, part).sum()) for part in PARTS}
    return {}, {
        "client": worker.rows.names[client],
        "version": __version__,
        "start": worker.template.identity,
        **{f"n_{part}": counts[part] for part in PARTS},
        **{f"n_{part}_tokens": tokens[part] for part in PARTS},
        "check": worker.rows.check(client),
    }


def _take_features(worker: Worker, client: int, request: Request, meter: Meter) -> Answer:
    arrays: dict[str, npt.NDArray[Any]] = {}
    privacy = worker.config.privacy
    for part in ("train", "validation"):
        rows = compute_rows(worker, client, part, meter=meter)
        if worker.config.features.send == "rows":
            kept = clip_rows(rows, privacy.clip_norm)
        else:
            kept = sum_rows(rows, privacy.clip_norm)
        noisy = add_noise(kept, privacy.noise_multiplier, privacy.clip_norm, worker.noise)
        arrays[part] = noisy.astype(np.float32)
    return arrays, {}


def _train(worker: Worker, client: int, request: Request, meter: Meter) -> Answer:
    values, start = request.values, np.asarray(request.arrays["start"], np.float32)
    leaning = None
    if "members" in request.arrays:
        members = np.asarray(request.arrays["members"], np.float32)
        leaning = Leaning(members, _read_terms(values["terms"]), float(values["rate"]))
    rates = [float(values["learning_rate"])] * worker.config.training.local_passes
    run = train_locally(worker, client, start, name=str(values["name"]), rates=rates, meter=meter, leaning=leaning)
    return {"adapter": _protect(worker, start, run.vector)}, {"n_examples": run.n_rows, "loss": run.loss}


def _protect(worker: Worker, start: Vector, end: Vector) -> Vector:
    """Cut an adapter's change to the norm, and add noise to every number of it that is trained."""
    privacy, mask = worker.config.privacy, worker.is_trained
    if privacy.update_clip_norm is None:
        return end
    change = clip_rows((end - start)[None, mask], privacy.update_clip_norm)
    noisy = add_noise(change, privacy.update_noise_multiplier, privacy.update_clip_norm, worker.noise)
    moved = start.copy()
    moved[mask] += noisy[0].astype(np.float32)
    return moved


def _score(worker: Worker, client: int, request: Request, meter: Meter) -> Answer:
    """Losses of methods; where some are to be weighed by validation rows, the weighed ones' at each part's end."""
    members = np.asarray(request.arrays["members"], np.float32)
    methods = [_read_terms(terms) for terms in request.values["methods"]]
    asked = {part: [int(k) for k in request.values["parts"][part]] for part in _HELD if part in request.values["parts"]}
    found = {
        part: score_sums(worker, client, part, members, [methods[k] for k in own], meter=meter)
        for part, own in asked.items()
    }
    arrays: dict[str, npt.NDArray[Any]] = {part: scores.losses() for part, scores in found.items()}
    weighed = [int(k) for k in request.values.get("weigh", ())]
    if weighed:
        places = {part: [own.index(k) for k in weighed] for part, own in asked.items()}
        weights = _fit(found["validation"], places["validation"], worker.config.seed)
        arrays["weights"] = weights
        for part, scores in found.items():
            mixed = combine(scores.values[places[part]][:, :, None], weights, "mixture")[:, 0]
            arrays[part] = np.append(arrays[part], TokenScores(mixed[None], scores.row_of).losses())
    return arrays, {}


def _fit(scores: TokenScores, weighed: Sequence[int], seed: int) -> npt.NDArray[np.float64]:
    """Weights of some methods' token probabilities, ``(len(weighed),)``; the first is the client's own group."""
    n_rows = int(scores.row_of.max()) + 1
    own = MemberLogits(
        values=scores.values[weighed][:, :, None],
        labels=np.zeros(n_rows, np.int64),
        groups=np.arange(n_rows),
        row_example=scores.row_of,
    )
    return np.asarray(fit_weights([own], [0], EnsembleConfig(), seed=seed).weights[0])


def _tune(worker: Worker, client: int, request: Request, meter: Meter) -> Answer:
    """Train an adapter that stays with the client, and say how it does."""
    start, n = np.asarray(request.arrays["start"], np.float32), int(request.values["passes"])
    settings = worker.config.training
    falling = settings.lr_scheduler_type == "linear"
    rates = [settings.learning_rate * (1 - k / n if falling else 1.0) for k in range(n)]
    run = train_locally(worker, client, start, name=str(request.values["name"]), rates=rates, meter=meter)
    train_flops = meter.record.flops
    own, terms = run.vector[None], [((1, 1.0),)]
    losses: dict[str, npt.NDArray[Any]] = {
        part: score_sums(worker, client, part, own, terms, meter=meter).losses() for part in _HELD
    }
    return losses, {"loss": run.loss, "train_flops": train_flops}


def _read_terms(terms: Sequence[Sequence[float]]) -> tuple[Term, ...]:
    return tuple((int(member), float(share)) for member, share in terms)


_ACTIONS: Mapping[Action, Callable[[Worker, int, Request, Meter], Answer]] = {
    "hello": _say_hello,
    "features": _take_features,
    "train": _train,
    "score": _score,
    "tune": _tune,
}
