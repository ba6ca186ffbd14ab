"""Keep a finished run's outcome: plan, table, costs, config, with command, commit and machine.

    python benchmarks/record_run.py runs/superglue-cpu --commit $(git rev-parse --short HEAD)

writes ``benchmarks/results/<name of the run folder>.json``; ``--json`` prints it too. The commit is the one the run
was made with, which need not be the one checked out now.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml

from ensemblelora import artifacts

_RESULTS = Path(__file__).parent / "results"


def collect(run: Path, *, command: str, commit: str) -> dict[str, Any]:
    """Put what a run folder says about itself into one record."""

    def read(name: str) -> Any:
        return artifacts.read_json(run / name)

    costs = read(artifacts.COSTS_FILE)
    config = yaml.safe_load((run / artifacts.CONFIG_FILE).read_text(encoding="utf-8"))
    return {
        "command": command,
        "commit": commit,
        "wall_seconds": sum(stage["wall_seconds"] for stage in costs["stages"]),
        "n_processors": os.cpu_count(),
        "environment": read(artifacts.ENVIRONMENT_FILE),
        "config": {key: value for key, value in config.items() if key != "out"},
        "plan": read(artifacts.PLAN_FILE),
        "ensemble": read(artifacts.ENSEMBLE_FILE),
        "results": read(artifacts.RESULTS_FILE),
        "costs": costs,
    }


def main() -> None:
    """Read the arguments, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", help="of the result; the run folder's by default")
    parser.add_argument("--command", help="that made the run")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--json", action="store_true", help="print the record")
    arguments = parser.parse_args()
    name = arguments.name or arguments.run.resolve().name
    command = arguments.command or f"ensemblelora run recipes/{name}.yaml"
    record = collect(arguments.run, command=command, commit=arguments.commit)
    artifacts.write_json(_RESULTS / f"{name}.json", record)
    if arguments.json:
        print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
