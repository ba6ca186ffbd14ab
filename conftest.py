"""What is collected: Flower has no release for Python 3.10, and its apps are what Flower imports, not what tests do."""

from __future__ import annotations

import sys

_NEEDS_FLOWER = ("src/ensemblelora/federation/apps.py", "src/ensemblelora/federation/transport.py")
collect_ignore = list(_NEEDS_FLOWER)
collect_ignore_glob = ["tests/test_federation_flower*.py"] if sys.version_info < (3, 11) else []
