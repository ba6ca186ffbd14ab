"""The benchmark of a large store, at a size of which nothing is large."""

from __future__ import annotations

import importlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script, which finds its neighbours as it does when it is run."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("memory")
    sys.path.remove(str(FOLDER))
    for name in ("memory", "common"):
        sys.modules.pop(name)


def test_a_store_is_built_solved_and_grouped_and_leaves_nothing(script, tmp_path):
    found = script.build_and_solve(2400, 12, 40, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert found["store_bytes"] > 4 * 400 * 2400
    assert sum(found["group_sizes"]) == 12 and len(found["group_sizes"]) == script.N_GROUPS
    assert 0 < found["build_peak_bytes"] <= found["solve_peak_bytes"] <= found["group_peak_bytes"]


def test_the_limit_is_the_systems_and_ends_with_the_block(script):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with script.limited_to(script.LIMIT_BYTES):
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == script.LIMIT_BYTES
        with pytest.raises(MemoryError):
            bytearray(2 * script.LIMIT_BYTES)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
