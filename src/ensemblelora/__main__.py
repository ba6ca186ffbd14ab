"""``python -m ensemblelora`` is the command ``ensemblelora``."""

from __future__ import annotations

import sys

from ensemblelora.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
