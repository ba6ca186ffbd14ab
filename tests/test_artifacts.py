"""The run folder: honest markers, one process at a time."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from ensemblelora import artifacts
from ensemblelora.artifacts import RunFolder, read_json, write_json, write_text
from ensemblelora.errors import OutputError


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_create_makes_an_empty_run_and_takes_it_up_again(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "deep" / "run")
    assert folder == RunFolder.create(folder.path) == RunFolder.open(str(folder.path))
    (folder.path / "user-notes.txt").write_text("mine")
    assert RunFolder.create(folder.path) == folder


def test_create_refuses_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"not a run folder \(holds 'thesis.tex'\).*empty folder") as caught:
        RunFolder.create(tmp_path)
    assert caught.value.exit_code == 2 and names_in(tmp_path) == {"thesis.tex"}


def test_create_refuses_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/nowhere/run")):
        with pytest.raises(OutputError) as caught:
            RunFolder.create(place)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"not a run folder.*ensemblelora run"):
        RunFolder.open(tmp_path)
    write_json(tmp_path / artifacts.RUN_FILE, {"format": 99})
    with pytest.raises(OutputError, match="format 1"):
        RunFolder.open(tmp_path)


def test_the_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    code = textwrap.dedent(f"""
        import sys
        from ensemblelora.artifacts import RunFolder
        with RunFolder.open({str(tmp_path)!r}).lock():
            print("held", flush=True)
            sys.stdin.read()
    """)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=rf"in use by process {other.pid} on .*; wait") as caught, folder.lock():
            pytest.fail("two processes hold the lock")
        assert caught.value.exit_code == 2
        other.stdin.close()
    with folder.lock():
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    code = "import os; from ensemblelora.artifacts import RunFolder\n"
    code += f"with RunFolder.open({str(tmp_path)!r}).lock(): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], env=_environment(), check=False).returncode == 9
    with folder.lock():
        assert read_json(tmp_path / ".lock.json")["pid"] == os.getpid()


def test_the_lock_sweeps_what_a_killed_process_left_half_written(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    half = tmp_path / artifacts.ADAPTERS_FOLDER / ".g0.12345678.tmp"
    half.mkdir(parents=True)
    (half / "weights").write_text("")
    (tmp_path / ".plan.json.12345678.tmp").write_text("")
    (tmp_path / "notes.tmp").write_text("")
    with folder.lock():
        left = {path.name for path in tmp_path.rglob("*")}
    assert {"notes.tmp", artifacts.ADAPTERS_FOLDER} <= left and not any("12345678" in name for name in left)


def test_a_half_made_run_can_be_taken_up(tmp_path: Path) -> None:
    (tmp_path / ".run.json.12345678.tmp").write_text("{")
    (tmp_path / ".lock").write_text("")
    assert RunFolder.create(tmp_path).path == tmp_path


def test_a_stage_is_done_only_with_the_same_inputs(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    assert not folder.is_done("plan", "f")
    write_json(tmp_path / artifacts.PLAN_FILE, {})
    folder.mark_done("plan", "f", files=[tmp_path / artifacts.PLAN_FILE])
    assert RunFolder.open(tmp_path).is_done("plan", "f")
    assert not folder.is_done("plan", "g")
    assert not folder.is_done("train", "f")
    folder.forget("plan")
    folder.forget("plan")
    assert not folder.is_done("plan", "f")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda path: path.write_text("longer than it was"), _flip],
    ids=["gone", "resized", "flipped"],
)
def test_a_damaged_result_means_not_done(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder.create(tmp_path)
    path = folder.adapter("g0") / "sub" / "weights"
    write_text(path, "weights")
    folder.mark_done("train", "f", files=[folder.path / artifacts.ADAPTERS_FOLDER])
    assert folder.is_done("train", "f")
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert not folder.is_done("train", "f")
    assert "stage train is done again" in caplog.text and "weights" in caplog.text


def test_large_files_are_compared_to_the_last_bit(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    path = tmp_path / "big"
    with path.open("wb") as stream:
        stream.truncate(65 * 2**20)
    folder.mark_done("features", "f", files=[path])
    assert folder.is_done("features", "f")
    with path.open("r+b") as stream:
        stream.seek(64 * 2**20)
        stream.write(b"\x01")
    assert not folder.is_done("features", "f")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": "f"}', '{"fingerprint": "f", "files": {"a": 1}}'])
def test_a_damaged_marker_means_not_done(tmp_path: Path, content: str) -> None:
    folder = RunFolder.create(tmp_path)
    write_text(tmp_path / "a", "")
    write_text(tmp_path / artifacts.STAGES_FOLDER / "plan.json", content)
    assert not folder.is_done("plan", "f")


def test_only_existing_files_of_the_run_can_be_recorded(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    (tmp_path / "outside").write_text("")
    for path in (tmp_path / "outside", folder.path / "missing"):
        with pytest.raises(OutputError, match="stage plan"):
            folder.mark_done("plan", "f", files=[path])
    assert not folder.is_done("plan", "f")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/x", "a\\b"])
def test_adapter_names_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="adapter name"):
        RunFolder.create(tmp_path).adapter(name)


def test_a_run_folder_can_be_moved(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a")
    write_text(folder.path / "x.txt", "1")
    folder.mark_done("plan", "f", files=[folder.path / "x.txt"])
    folder.path.rename(tmp_path / "b")
    assert RunFolder.open(tmp_path / "b").is_done("plan", "f")


def test_file_names_are_constants_of_one_place() -> None:
    names = [value for name, value in vars(artifacts).items() if name.endswith(("_FILE", "_FOLDER"))]
    assert len(set(names)) == len(names)
    assert {name for name in vars(artifacts) if name.endswith(("_FILE", "_FOLDER")) and name[0] != "_"} <= set(
        artifacts.__all__
    )


def _environment() -> dict[str, str]:
    source = str(Path(artifacts.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source}
