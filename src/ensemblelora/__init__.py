"""Which datasets to fine-tune together, one adapter per group, and the ensemble of them.

The public names load on first use, so that importing the package costs nothing::

    import ensemblelora

    result = ensemblelora.run(ensemblelora.read_request("tasks/"))
    model = ensemblelora.load_run(result.folder)
    model.predict("boolq", ["..."])
    model.ask(["boolq", "rte"])
    model.export("boolq-adapter", format="folded", task="boolq")
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemblelora.api import Run as Run
    from ensemblelora.api import load_run as load_run
    from ensemblelora.config import RunConfig as RunConfig
    from ensemblelora.config import dump_config as dump_config
    from ensemblelora.config import load_config as load_config
    from ensemblelora.config import parse_config as parse_config
    from ensemblelora.data.loading import load_tasks as load_tasks
    from ensemblelora.errors import EnsembleLoraError as EnsembleLoraError
    from ensemblelora.pipeline import RunResult as RunResult
    from ensemblelora.pipeline import estimate as estimate
    from ensemblelora.pipeline import run as run
    from ensemblelora.recipe import read_request as read_request

__version__ = "0.1.0"

# peft imports bitsandbytes, which on some processors looks for a kernel on a hub, and says that it isn't there. Nothing
# here would run it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

_HOMES = {
    "EnsembleLoraError": "errors",
    "Run": "api",
    "RunConfig": "config",
    "RunResult": "pipeline",
    "dump_config": "config",
    "estimate": "pipeline",
    "load_config": "config",
    "load_run": "api",
    "load_tasks": "data.loading",
    "parse_config": "config",
    "read_request": "recipe",
    "run": "pipeline",
}

__all__ = [
    "EnsembleLoraError",
    "Run",
    "RunConfig",
    "RunResult",
    "__version__",
    "dump_config",
    "estimate",
    "load_config",
    "load_run",
    "load_tasks",
    "parse_config",
    "read_request",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
