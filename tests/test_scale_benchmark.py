"""What the benchmark of scale measures, on very little, and what it makes of it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ensemblelora.recipe import read_request
from measured import render_measured
from tests.tiny_run import make_inputs

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, which finds its neighbours as it does when it is run, with little to do and records elsewhere."""
    sys.path.insert(0, str(FOLDER))
    module = importlib.import_module("scale")
    sizes = {
        "SAMPLES": (4, 8),
        "TOKENS": (8, 16),
        "SUBSETS": (2, 4),
        "ROWS": 4,
        "TIMED_ROWS": 4,
        "LENGTH": 8,
        "TASKS": 4,
        "FEW": 4,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys.modules["common"], "RESULTS", tmp_path / "results")
    yield module
    sys.path.remove(str(FOLDER))
    for name in ("scale", "common"):
        sys.modules.pop(name)


def test_the_exponent_is_that_of_the_power_law(script):
    for power in (0.5, 1.0, 2.0):
        assert script.fit_exponent({str(n): 3 * n**power for n in (1, 4, 16)}) == pytest.approx(power)


def test_every_curve_has_its_sizes(script):
    found = {name: script.MEASURES[name](0) for name in ("samples", "subsets")}
    assert [list(entry["seconds"]) for entry in found.values()] == [[4, 8], [2, 4]]
    assert all(seconds > 0 for entry in found.values() for seconds in entry["seconds"].values())
    narrow, wide = (script.MEASURES[name](0)["coordinates"] for name in ("few", "wide"))
    assert wide == 16 * narrow > 0


@pytest.mark.slow
def test_the_demo_leaves_the_same_twice_and_not_with_another_seed(script, tmp_path, monkeypatch):
    recipe = make_inputs(tmp_path)
    monkeypatch.setattr("ensemblelora.recipe.read_demo", lambda changes: read_request(recipe, changes))
    first, again, other = (script.carry_out_demo(None, changes)["left"] for changes in ((), (), ("seed=3",)))
    assert first == again and {*script.OUTCOMES} < first.keys()
    found = script._compare_demos({"left": first, "seconds": 3.0}, {"left": other, "seconds": 2.0})
    assert not found["demo_is_equal"] and "affinity.npz" in found["demo_differs"]
    assert found["demo_seconds"] == {"here": 3.0, "cluster": 2.0}


def test_a_record_takes_medians_and_pairs_one_worker_with_two(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "scale.py"))

    def measure(self, path, arguments):
        kind, repeat = arguments[0], int(arguments[2])
        if kind.startswith("cluster"):
            seconds = {"cluster-1": 10.0, "cluster-2": (5.0, 4.0, 8.0)[repeat]}[kind]
            return {part: seconds for part in ("total_seconds", "features_seconds", "oracle_seconds")}
        if kind.startswith("demo"):
            left = {"plan.json": "a", "results.json": "b"}
            return {"seconds": {"demo-here": 9.0, "demo-cluster": 6.0}[kind], "left": left}
        if kind in script.MEMORY:
            peaks = {"few": (10**9, 100), "many": (10**9 + 384_000, 100), "wide": (1.25e9, 1600)}
            return dict(zip(("peak_memory_bytes", "coordinates"), peaks[kind], strict=True))
        return {"seconds": {str(n): n * (100.0 if repeat == 1 else 1.0) for n in (1, 16)}}

    monkeypatch.setattr(script.Journal, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["scale.py", "--json"])
    script.main()
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "results" / "scale.json").read_text(encoding="utf-8"))
    assert record["speedup_two_workers"] == 2.0 and record["memory_growth_coordinates"] == pytest.approx(1.25)
    assert record["bytes_per_row"] == pytest.approx(384_000 / (4096 - 4))
    assert record["demo_is_equal"] and record["demo_differs"] == []
    page = "\n".join(render_measured({"scale": record}))
    assert "subsets 2.00x, both 2.00x as fast" in page and "all 2 results and adapters are the same" in page
    assert "| tokens of a row | 1 | 16 | 1.00 |" in page and "94 B a row more" in page
    for kind in ("samples", "tokens", "subsets"):
        assert record[f"exponent_{kind}"] == pytest.approx(1.0) and record["range"][kind] == 16

    monkeypatch.setattr(sys, "argv", ["scale.py", "--minutes", "0"])
    script.main()
    assert "out of time before samples, repeat 0" in capsys.readouterr().err
