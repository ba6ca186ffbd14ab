"""A run's ensemble as a model of lm-evaluation-harness, which then scores it with its own tasks and metrics.

``python -m ensemblelora.harness`` is the harness's own command with one more model, ``ensemblelora``:

    python -m ensemblelora.harness --model ensemblelora --model_args run=runs/demo --tasks boolq

In Python, importing this package is all that it takes; ``lm_eval.simple_evaluate(model="ensemblelora", ...)`` knows it
then. The harness finds models by their names in its own list and has no way to add one from outside, hence the command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ensemblelora.harness.model import EnsembleModel

__all__ = ["EnsembleModel", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness's own command line, which knows ensembles now.

    Args:
        arguments: What follows the program's name; by default, this process's own.
    """
    from lm_eval.__main__ import cli_evaluate

    if arguments is not None:
        sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
