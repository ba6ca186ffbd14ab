"""Progress: silent unless somebody listens, and never in the way of the loop it watches."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ensemblelora import progress


def listen(*, terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=80, color_system=None), stream


@pytest.mark.parametrize("total", [None, 3])
@pytest.mark.parametrize("make_items", [lambda: [1, 2, 3], lambda: iter([1, 2, 3])], ids=["sized", "unsized"])
def test_items_pass_unchanged_when_nobody_listens(make_items, total, capsys):
    assert list(progress.track(make_items(), "loop", total)) == [1, 2, 3]
    with progress.stage("features"):
        progress.note("unheard")
    assert capsys.readouterr() == ("", "")


def test_a_stage_leaves_one_line_where_there_is_no_terminal():
    console, stream = listen(terminal=False)
    with progress.announcing(console), progress.stage("features"):
        assert list(progress.track(range(3), "loop")) == [0, 1, 2]
    assert stream.getvalue().splitlines() == ["features: 0.0 s"]


def test_stages_of_a_known_sequence_are_numbered_and_no_others():
    console, stream = listen(terminal=False)
    with progress.announcing(console), progress.counting(["features", "train", "baselines"]):
        with progress.stage("features"), progress.stage("routing"):
            pass
        progress.note(f"{progress.number('train')}: done before")
        progress.skip("baselines", "not needed")
        progress.skip("warmup", "not counted")
    with progress.announcing(console), progress.stage("features"):
        progress.skip("baselines", "not counted")
    assert stream.getvalue().splitlines() == [
        "[1/3] features ...", "routing: 0.0 s", "[1/3] features: 0.0 s", "[2/3] train: done before",
        "[3/3] baselines: not needed", "features: 0.0 s",
    ]  # fmt: skip


def test_a_terminal_numbers_the_stage_beside_its_bar():
    console, stream = listen(terminal=True)
    shown = []
    with progress.announcing(console), progress.counting(["features", "train"]), progress.stage("train"):
        drawn = console.render_lines(progress._bars.get().get_renderable())
        shown = ["".join(segment.text for segment in line) for line in drawn]
    assert any("[2/2] train" in line for line in shown)
    assert re.search(r"\[2/2\] train: \d\.\d s$", stream.getvalue().rstrip()) and "..." not in stream.getvalue()


def test_a_terminal_shows_the_loop_and_keeps_only_the_stage():
    console, stream = listen(terminal=True)
    with progress.announcing(console), progress.stage("features"):
        for _ in progress.track((item for item in range(3)), "rows of boolq", 3):
            pass
    assert re.search(r"features: \d\.\d s$", stream.getvalue().rstrip())


def test_a_nested_stage_and_loop_share_the_bars():
    console, stream = listen(terminal=True)
    with progress.announcing(console), progress.stage("outer"), progress.stage("inner"):
        pairs = [(i, j) for i in progress.track([0, 1], "a") for j in progress.track([0, 1], "b")]
    assert pairs == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert re.search(r"inner: \d+\.\d s", stream.getvalue()) and re.search(r"outer: \d+\.\d s", stream.getvalue())


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_broken_stage_says_so_and_passes_the_error_on(error):
    console, stream = listen(terminal=False)
    with pytest.raises(type(error)), progress.announcing(console), progress.stage("train"):
        raise error
    assert stream.getvalue().startswith("train: stopped after")


def test_a_loop_left_early_takes_its_bar_away():
    console, _ = listen(terminal=True)
    with progress.announcing(console), progress.stage("features"):
        for _ in progress.track(range(10), "left early"):
            break
        assert list(progress.track(range(2), "next")) == [0, 1]


def test_listening_ends_with_its_context():
    console, stream = listen(terminal=False)
    with progress.announcing(console):
        progress.note("[bold]heard[/bold]")
    progress.note("unheard")
    assert stream.getvalue() == "[bold]heard[/bold]\n"


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time by which loops are measured, in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def run_loop(
    clock: list[float], n: int, seconds: float, title: str = "train group-0", total: int | None = None
) -> None:
    for _ in progress.track(iter(range(n)) if total is None else range(n), title, total):
        clock[0] += seconds


def test_without_a_terminal_a_long_loop_speaks_every_half_minute(clock):
    console, stream = listen(terminal=False)
    with progress.announcing(console):
        run_loop(clock, 480, 0.5, total=480)
        run_loop(clock, 100, 1.0)
    lines = stream.getvalue().splitlines()
    assert lines[:3] == [
        "train group-0: 60/480, 2.0/s, 4 min left",
        "train group-0: 120/480, 2.0/s, 3 min left",
        "train group-0: 180/480, 2.0/s, 2 min left",
    ]
    assert lines[6] == "train group-0: 420/480, 2.0/s, 30 s left"
    assert lines[7:] == [f"train group-0: {n}, 1.0/s" for n in (1, 31, 61, 91)]


@pytest.mark.parametrize(
    ("seconds", "rate"), [(0.05, "20/s"), (0.5, "2.0/s"), (4.0, "4 s each"), (120.0, "2 min each")]
)
def test_a_bar_tells_the_rate_within_80_columns(clock, seconds, rate):
    console, _ = listen(terminal=True)
    shown = []
    with progress.announcing(console), progress.stage("features"):
        for _ in progress.track(range(4000), "train group-0-boost-12", 4000):
            clock[0] += seconds
            drawn = console.render_lines(progress._bars.get().get_renderable())
            shown.append("".join(segment.text for segment in drawn[-1]))
            if len(shown) == 3:
                break
    assert rate not in shown[0], "nothing is known before the first item is done"
    assert all(rate in line and "train group-0-boost-12" in line and "/4000" in line for line in shown[1:])
    assert max(len(line.rstrip()) for line in shown) <= 80 and not any("…" in line for line in shown)


def test_many_short_loops_speak_as_one_long_one(clock):
    console, stream = listen(terminal=False)
    with progress.announcing(console):
        for task in range(12):
            run_loop(clock, 10, 1.0, f"predict {task}", 10)
    assert 2 <= len(stream.getvalue().splitlines()) <= 4


@pytest.mark.parametrize("terminal", [True, False])
def test_short_loops_and_terminals_get_no_such_lines(clock, terminal):
    console, stream = listen(terminal=terminal)
    with progress.announcing(console):
        run_loop(clock, 10, 100.0 if terminal else 1.0, total=10)
    assert stream.getvalue() == ""


def test_the_end_of_a_stage_says_how_long_the_rest_will_take(monkeypatch):
    console, stream = listen(terminal=False)
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    work = {"features": 1.0, "train": 6.0, "combine": 2.0, "evaluate": 3.0}
    with progress.announcing(console), progress.counting(["features", "group", "train", "combine", "evaluate"], work):
        for name, seconds in (("features", 10), ("group", 2), ("combine", 20), ("evaluate", 30)):  # train: done before
            with progress.stage(name):
                clock[0] += seconds
    told = [line for line in stream.getvalue().splitlines() if "..." not in line]
    assert told == [
        "[1/5] features: 10.0 s, about 2 min to go",  # 11 units, 10 s each
        "[2/5] group: 2.0 s, about 2 min to go",
        "[4/5] combine: 20.0 s, about 32 s to go",
        "[5/5] evaluate: 30.0 s",
    ]


def test_nothing_is_said_of_the_rest_before_anything_tells(monkeypatch):
    console, stream = listen(terminal=False)
    with progress.announcing(console), progress.counting(["group", "train"], {"group": 0.01, "train": 5.0}):
        with progress.stage("group"):
            pass
    assert "to go" not in stream.getvalue()
