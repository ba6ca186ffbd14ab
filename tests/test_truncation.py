"""How much is cut, against counting by hand, and the line that says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblelora.artifacts import read_json
from ensemblelora.cli import main
from ensemblelora.data.truncation import describe_cuts, measure_cuts
from ensemblelora.report import write_report
from tests.tiny_run import make_mixed_inputs


@dataclass(frozen=True)
class Split:
    task: str
    n_examples: int
    n_truncated: int
    fitting_length: int


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=120), st.integers(1, 40))
def test_cuts_are_counted_by_example(lengths: list[list[int]], max_length: int) -> None:
    rows = [length for example in lengths for length in example]
    n_read = [min(length, max_length) for length in rows]
    n_cut = [length - read for length, read in zip(rows, n_read, strict=True)]
    found, fitting = measure_cuts(n_cut, n_read, np.array([len(example) for example in lengths]))
    longest = [max(example) for example in lengths]
    assert found == sum(length > max_length for length in longest)
    if found:
        assert np.mean([length <= fitting for length in longest]) >= 0.99
        assert np.mean([length < fitting for length in longest]) < 0.99
    else:
        assert fitting == 0
    assert measure_cuts([], [], np.zeros(0, np.int64)) == (0, 0)


def test_the_line_names_the_tasks_the_most_cut_first_and_what_would_do() -> None:
    tasks = [
        (Split("few", 97, 3, 900), Split("few", 3, 0, 0)),
        (Split("some", 80, 8, 300), Split("some", 20, 2, 310)),
        (Split("most", 50, 50, 250), Split("most", 10, 4, 200)),
    ]
    assert describe_cuts(tasks, 128) == (
        "Rows over data.max_length 128 lost the start of their text: 90% of most's, 10% of some's; data.max_length 310 "
        "would keep 99% of each task's whole."
    )
    assert describe_cuts(tasks[:1], 128) is None and describe_cuts([(Split("none", 0, 0, 0),)], 8) is None


@pytest.mark.parametrize("n_tasks", [7, 9])
def test_of_many_tasks_the_first_are_named(n_tasks: int) -> None:
    line = describe_cuts([(Split(f"t{i}", 10, 5, 20 + i),) for i in range(n_tasks)], 16)
    assert line is not None and f"and of {n_tasks - 6} more tasks'; data.max_length {19 + n_tasks} would" in line


@pytest.mark.slow
def test_a_plan_of_three_tasks_says_what_was_cut_and_tells_the_tasks_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_mixed_inputs(tmp_path, ("one", "two", "three", "four"), n_test=8)
    (card,) = tmp_path.glob("tasks/four.yaml")
    card.unlink()
    run = tmp_path / "run"
    assert main(["plan", str(recipe), "--out", str(run), "--set", "data.max_length=8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    plan = read_json(run / "plan.json")
    (line,) = (warning for warning in plan["warnings"] if "data.max_length 8" in warning)
    assert f"warning: {line}" in shown and "24 validation rows, 8 a task" in shown
    page = write_report(run).with_suffix(".md").read_text(encoding="utf-8")
    assert "Rows cut" in page and "training sets of 2 tasks (affinity.subset_size asks for 3" in page
    fits = next(int(word) for word in line.split("; data.max_length ")[1].split())
    again = ["plan", str(recipe), "--out", str(tmp_path / "again"), "--set", f"data.max_length={fits}"]
    assert main(again) == 0 and "lost the start" not in capsys.readouterr().out
