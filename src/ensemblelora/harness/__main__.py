"""``python -m ensemblelora.harness``: the harness's command line, with ensembles among its models."""

from __future__ import annotations

from ensemblelora.harness import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
