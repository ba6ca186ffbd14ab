"""Keep a comparison's outcome, as ``ensemblelora compare --json`` printed it, with command, commit and machine.

    ensemblelora compare recipes/comparison-opposed.yaml --seeds 3 --json > outcome.json
    python benchmarks/record_comparison.py outcome.json runs/comparison-opposed --commit 1a2b3c4 --command "..."

writes ``benchmarks/results/<name of the folder's config>.json``. The commit is the one the study was made with.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import yaml

from ensemblelora import artifacts

_RESULTS = Path(__file__).parent / "results"


def collect(outcome: dict[str, Any], folder: Path, *, command: str, commit: str) -> dict[str, Any]:
    """Put an outcome and what its folder says about itself into one record."""
    config = yaml.safe_load((folder / artifacts.CONFIG_FILE).read_text(encoding="utf-8"))
    return {
        "command": command,
        "commit": commit,
        "machine": {"n_processors": os.cpu_count()},
        "environment": artifacts.read_json(folder / artifacts.ENVIRONMENT_FILE),
        "config": {key: value for key, value in config.items() if key != "out"},
        "comparison": outcome,
    }


def main() -> None:
    """Read the arguments, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("outcome", type=Path, help="what the command printed")
    parser.add_argument("folder", type=Path, help="the comparison's")
    parser.add_argument("--name", required=True, help="of the result")
    parser.add_argument("--command", required=True, help="that made it")
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()
    outcome = artifacts.read_json(arguments.outcome)
    record = collect(outcome, arguments.folder, command=arguments.command, commit=arguments.commit)
    artifacts.write_json(_RESULTS / f"{arguments.name}.json", record)


if __name__ == "__main__":
    main()
