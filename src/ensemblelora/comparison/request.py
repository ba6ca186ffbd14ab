"""What a comparison is asked for, checked before anything dear; and its folder, which holds one comparison.

In: a config, names, numbers and a place. Out: :class:`Request`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ensemblelora import artifacts
from ensemblelora.comparison.methods import METHODS, Method
from ensemblelora.comparison.pooled import RANDOM, RANDOM_OURS, list_pooled
from ensemblelora.comparison.record import OURS, STUDY_FILE
from ensemblelora.config import RunConfig, dump_config, load_config
from ensemblelora.earlier import list_settings
from ensemblelora.errors import OutputError, UsageError
from ensemblelora.files import describe_error, is_temporary
from ensemblelora.startpoint import is_warm

__all__ = ["Request", "check_request", "choose_methods", "choose_primary", "hold_folder", "keep_config"]

_MOST_SEEDS = 100
_OF_GROUPS = (
    ("grouped", RANDOM),
    ("grouped", "gradient-cosine"),
    ("grouped", "tag"),
    (OURS, RANDOM_OURS),
)
_MOST_NAMED_KEYS = 4


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        config: Of every method and seed; the seed of its rows is set.
        methods: In the order of the list of methods.
        seeds: The first one chooses the learning rates.
        learning_rates: Tried for every trained method, rising.
        primary: Pairs of methods whose comparison is the purpose.
        folder: Where it goes.
    """

    config: RunConfig
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    primary: tuple[tuple[str, str], ...]
    folder: Path


def check_request(
    config: RunConfig,
    methods: Sequence[str],
    n_seeds: int,
    learning_rates: Sequence[float],
    out: Path | str,
    primary: Sequence[tuple[str, str]] | None,
) -> Request:
    """Check names and numbers.

    Args:
        config: Its seed is the first; rows are drawn by ``data.seed``, or else by it, for all seeds.
        methods: As :func:`choose_methods` takes them.
        n_seeds: At least 1.
        learning_rates: Empty: the config's own.
        out: The comparison's folder.
        primary: As :func:`choose_primary` takes them.

    Raises:
        UsageError: If one is wrong.
    """
    if not 1 <= n_seeds <= _MOST_SEEDS:
        raise UsageError(f"{n_seeds} seeds: expected 1 to {_MOST_SEEDS}")
    rates = tuple(sorted(set(learning_rates))) or (config.training.learning_rate,)
    if not all(0 < rate < float("inf") for rate in rates):
        raise UsageError(f"learning rates {', '.join(map(str, rates))}: expected positive numbers")
    if is_warm(config):
        raise UsageError(
            "gradients.linearize_at warmup: a comparison has methods of its own for that, warm and warm-plan; name "
            "them in --methods, and leave the key out"
        )
    chosen, rows_seed = choose_methods(methods), config.seed if config.data.seed is None else config.data.seed
    data = config.data.model_copy(update={"seed": rows_seed})
    return Request(
        config=config.model_copy(update={"out": str(out), "data": data}),
        methods=chosen,
        seeds=tuple(range(config.seed, config.seed + n_seeds)),
        learning_rates=rates,
        primary=choose_primary(chosen, primary),
        folder=Path(out),
    )


def choose_methods(names: Sequence[str]) -> tuple[Method, ...]:
    """Find methods by name; ``all`` and ``core`` stand for several.

    Raises:
        UsageError: If a name is unknown; lists those there are.
    """
    several = {"all": list(METHODS), "core": [method.name for method in METHODS.values() if method.is_core]}
    wanted = [one for name in names for one in several.get(name, [name])]
    unknown = list(dict.fromkeys(name for name in wanted if name not in METHODS))
    if unknown or not wanted:
        told = f"unknown methods {', '.join(unknown)}" if unknown else "no methods"
        raise UsageError(f"{told}: expected all, core, or some of {', '.join(METHODS)}")
    return tuple(method for name, method in METHODS.items() if name in wanted)


def choose_primary(methods: Sequence[Method], primary: Sequence[tuple[str, str]] | None) -> tuple[tuple[str, str], ...]:
    """Say which comparisons are the purpose of a study.

    Where none are named: ours against every rival, and, as ours has boosters and weights that rivals have not, what the
    groups alone are worth: ours without these against other ways to group, ours against random groups with them.

    Args:
        methods: Those compared.
        primary: Pairs of methods, or of draws as one (:mod:`.pooled`); none: as above, as far as they are there.

    Raises:
        UsageError: If a pair names a method that is not compared, or one twice.
    """
    names = [method.name for method in methods]
    names += list_pooled(names)
    if primary is None:
        rivals = [(OURS, method.name) for method in methods if method.is_rival]
        return tuple(pair for pair in (*rivals, *_OF_GROUPS) if set(pair) <= set(names))
    for a, b in primary:
        if a == b or not {a, b} <= set(names):
            raise UsageError(f"primary comparison {a}:{b}: expected two of the methods {', '.join(names)}")
    return tuple(dict.fromkeys((a, b) for a, b in primary))


@contextmanager
def hold_folder(request: Request) -> Iterator[None]:
    """Make the folder, or take up the comparison in it, and keep other processes out.

    Raises:
        OutputError: If the place can't be written, holds something else, or is in use.
        UsageError: If it holds a comparison of another config; names the keys.
    """
    folder = request.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = [e.name for e in folder.iterdir() if not (e.name.startswith(".lock") or is_temporary(e))]
    except OSError as error:
        reason = describe_error(error)
        raise OutputError(f"{folder}: can't be used as a comparison's folder ({reason}); choose another") from None
    is_ours = {STUDY_FILE, artifacts.CONFIG_FILE} & set(entries) and artifacts.RUN_FILE not in entries
    if entries and not is_ours:
        stranger = sorted(entries)[0]
        raise OutputError(f"{folder}: not empty and no comparison (holds {stranger!r}); choose a new or empty folder")
    with artifacts.RunFolder(folder).lock():
        _check_config(request)
        yield


def keep_config(request: Request) -> None:
    """Write the config that the folder is for; called when rows and model are found to be right.

    Raises:
        OutputError: If the place can't be written.
    """
    artifacts.write_text(request.folder / artifacts.CONFIG_FILE, dump_config(request.config))


def _check_config(request: Request) -> None:
    path = request.folder / artifacts.CONFIG_FILE
    if not path.exists():
        return
    # Read as a config: keys that it does not name yet have their defaults.
    before, now = (dict(list_settings(one.model_dump(mode="json"))) for one in (load_config(path), request.config))
    keys = sorted({*before, *now} - {"out"})
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if changed:
        more = [f"{len(changed) - _MOST_NAMED_KEYS} more"] if len(changed) > _MOST_NAMED_KEYS else []
        told = ", ".join([*changed[:_MOST_NAMED_KEYS], *more])
        raise UsageError(f"{request.folder}: holds a comparison of another config ({told}); choose another folder")
