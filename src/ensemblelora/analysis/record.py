"""One analysis carried out: its request, its lock, its result on disk.

In: a name, a config, options, seeds, a folder. Out: ``NAME/result.json`` in the folder, plain values, with what they
were made from and what they cost, and the page. Broken off, the same call goes on where it was.
"""

from __future__ import annotations

import difflib
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ensemblelora import __version__, artifacts, progress
from ensemblelora.analysis.registry import ANALYSES, Analysis
from ensemblelora.analysis.request import AnalysisRequest
from ensemblelora.comparison.record import STUDY_FILE
from ensemblelora.config import RunConfig
from ensemblelora.config_errors import list_faults
from ensemblelora.config_stage import Stage
from ensemblelora.errors import ConfigError, OutputError, StoreError, UsageError
from ensemblelora.files import describe_error
from ensemblelora.startpoint import is_warm
from ensemblelora.yamltext import YamlError, parse_yaml

__all__ = ["RESULT_FILE", "carry_out", "find_analysis", "find_result", "make_request", "read_options", "read_result"]

RESULT_FILE = "result.json"

_MOST_SEEDS = 100


def find_analysis(name: str) -> Analysis:
    """Find an analysis by name.

    Raises:
        UsageError: If it is unknown; lists those there are.
    """
    if name not in ANALYSES:
        close = difflib.get_close_matches(name, ANALYSES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"analysis {name!r}: expected one of {', '.join(ANALYSES)}{hint}")
    return ANALYSES[name]


def read_options(analysis: Analysis, given: Sequence[str]) -> Stage:
    """Read an analysis' options.

    Args:
        analysis: Whose.
        given: ``KEY=VALUE`` each, the value in YAML; the last one of a key counts.

    Raises:
        ConfigError: Names every fault at once, and the keys there are.
    """
    values: dict[str, Any] = {}
    for one in given:
        key, separator, text = one.partition("=")
        if not separator or not key:
            raise ConfigError(f"--with {one!r}: expected KEY=VALUE, such as n_subsets=2")
        try:
            values[key] = parse_yaml(text)
        except YamlError:
            raise ConfigError(f"--with {one!r}: the value is not valid YAML") from None
    known = list(analysis.options.model_fields)
    if unknown := [key for key in values if key not in known]:
        raise ConfigError(
            f"--with: unknown options {', '.join(unknown)}; analysis {analysis.name} has {', '.join(known)}"
        )
    try:
        return analysis.options.model_validate(values)
    except ValidationError as error:
        told = "; ".join(line for _, line in list_faults(error, analysis.options))
        raise ConfigError(f"--with: {told}") from None


def make_request(
    analysis: Analysis,
    config: RunConfig,
    options: Stage,
    *,
    n_seeds: int,
    home: Path | str,
    run: Path | None = None,
) -> AnalysisRequest[Any]:
    """Check numbers and put a request together; nothing is loaded or written.

    Args:
        analysis: What is asked for.
        config: Its seed is the first.
        options: The analysis' own.
        n_seeds: ``config.seed`` and those that follow.
        home: Shared by analyses of one config.
        run: The run that was named instead of a config.

    Raises:
        UsageError: If the number of seeds is wrong, or features are to be taken after a warm-up.
        StoreError: If the analysis' journal is damaged.
    """
    if not 1 <= n_seeds <= _MOST_SEEDS:
        raise UsageError(f"{n_seeds} seeds: expected 1 to {_MOST_SEEDS}")
    if is_warm(config):
        raise UsageError(
            "gradients.linearize_at warmup: an analysis starts every adapter at theta0 itself; set it to base"
        )
    seeds = range(config.seed, config.seed + n_seeds)
    return AnalysisRequest(analysis.name, config, options, seeds=seeds, home=home, run=run)


def carry_out(analysis: Analysis, request: AnalysisRequest[Any]) -> dict[str, Any]:
    """Carry out an analysis, or go on with it, and write its result.

    Args:
        analysis: What is asked for.
        request: From :func:`make_request`.

    Returns:
        What ``result.json`` holds.

    Raises:
        UsageError: If config, data, model or options are wrong.
        OutputError: If the folder can't be written, is something else, or is in use.
    """
    home = request.folder.parent
    _check_home(home)
    with artifacts.RunFolder(home).lock(), progress.stage(f"analyze {analysis.name}"):
        try:
            found = analysis.run(request)
        finally:
            request.close()
        result = {**_describe(analysis, request), **found, "costs": request.count_costs()}
        artifacts.write_json(request.folder / RESULT_FILE, result)
    return read_result(home, analysis.name)


def read_result(home: Path | str, name: str) -> dict[str, Any]:
    """Read what an analysis found.

    Args:
        home: Shared by analyses of one config, or one analysis' own folder; or the record of a benchmark, a file that
            has it as its ``outcome``.
        name: The analysis'.

    Raises:
        UsageError: If there is no such result.
        StoreError: If the file is damaged or of another analysis.
    """
    path = find_result(home, name)
    if path is None:
        raise UsageError(f"{home}: no result of analysis {name}; make one with: ensemblelora analyze {name} CONFIG")
    content = artifacts.read_json(path)
    if path == Path(home) and isinstance(content, Mapping):
        content = content.get("outcome")
    if not isinstance(content, Mapping) or content.get("analysis") != name:
        raise StoreError(f"{path}: no result of analysis {name}; delete it and analyze again")
    return dict(content)


def find_result(home: Path | str, name: str) -> Path | None:
    """Find the file in which an analysis' result lies; none where there is none. A file stands for itself."""
    home = Path(home)
    places = [home / name / RESULT_FILE, *([home / RESULT_FILE] if home.name == name else []), home]
    return next((place for place in places if place.is_file()), None)


def _check_home(home: Path) -> None:
    """Make the folder, and refuse one that holds something else."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in home.iterdir()}
    except OSError as error:
        raise OutputError(f"{home}: can't be used ({describe_error(error)}); choose another") from None
    if taken := names & {artifacts.RUN_FILE, STUDY_FILE}:
        raise OutputError(f"{home}: holds a run or a comparison ({taken.pop()}); choose another folder with --out")


def _describe(analysis: Analysis, request: AnalysisRequest[Any]) -> dict[str, Any]:
    """What the result was made from."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "numpy")}
    return {
        "analysis": analysis.name,
        "title": analysis.title,
        "options": request.options.model_dump(mode="json"),
        "seeds": list(request.seeds),
        "config": request.config.model_dump(mode="json"),
        "environment": {
            "package_version": __version__,
            "python": platform.python_version(),
            **versions,
            "platform": f"{platform.system()} {platform.machine()}",
            "n_processors": os.cpu_count(),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    }
