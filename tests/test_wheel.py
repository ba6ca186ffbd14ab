"""The wheel, in an environment of its own: it holds what is needed, and its command runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ensemblelora import __version__
from ensemblelora.data.synthetic import make_planted_tasks
from tests.snippets import ROOT
from tests.tiny_run import save_model, write_task

pytestmark = pytest.mark.slow

MOST_BYTES = 2_500_000
CACHES = re.compile(r"(^|/)(__pycache__|\.[a-z_]*cache|\.hypothesis|\.journal)(/|$)|\.pyc$")
SOURCES = {
    *(".ci", "benchmarks", "docs", "examples", "recipes", "scripts", "src", "tests"),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
    *("conftest.py", "mkdocs.yml", "requirements.txt", "requirements-demo.txt"),
}
CHOSEN_TESTS = ("tests/test_files.py", "tests/test_paper_map.py")
"""one that needs the package alone, and one that looks into the documentation"""


def build(kind: str, folder: Path, suffix: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (made,) = folder.glob(f"*{suffix}")
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"), ".whl")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    made = build("sdist", folder, ".tar.gz")
    assert made.stat().st_size < MOST_BYTES, "more than what is tracked is in it"
    with tarfile.open(made) as archive:
        archive.extractall(folder, filter="data")
    return folder / made.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of an environment that holds the wheel, and sees this one's other packages but not its checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A plain path: what an editable install put there is not followed.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def call(environment: Path, *words: str, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [environment / "bin" / words[0], *words[1:]], cwd=cwd, capture_output=True, text=True, env=clean
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_the_package_and_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "ensemblelora").rglob("*")
        if path.is_file()
    }
    expected = {name for name in shipped if "__pycache__" not in name and "_cache" not in name}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sources_hold_what_the_checkout_holds_and_no_cache(source):
    def list_files(root: Path, names: Iterable[str]) -> set[str]:
        found = (path for name in names for path in [root / name, *(root / name).rglob("*")] if path.is_file())
        files = {path.relative_to(root).as_posix() for path in found}
        return {file for file in files if not CACHES.search(file)}

    inside = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert not [name for name in inside if CACHES.search(name)]
    top = {name.partition("/")[0] for name in inside} - {"PKG-INFO", ".gitignore", "pyproject.toml"}
    assert top == SOURCES
    assert inside == list_files(ROOT, {*SOURCES, "pyproject.toml", ".gitignore"}) | {"PKG-INFO"}


def test_tests_and_generated_pages_run_from_the_sources(source):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for words in (["-m", "pytest", "-q", *CHOSEN_TESTS], ["scripts/generate_docs.py", "--check"]):
        environment = clean | {"PYTHONPATH": f"{source / 'src'}{os.pathsep}{source / 'scripts'}"}
        done = subprocess.run([sys.executable, *words], cwd=source, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr


def test_its_command_runs_a_method_from_files_to_predictions(installed, tmp_path):
    where = call(installed, "python", "-c", "import ensemblelora; print(ensemblelora.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    assert call(installed, "ensemblelora", "--version", cwd=tmp_path).split()[-1] == __version__
    assert "plan" in call(installed, "ensemblelora", "--help", cwd=tmp_path)
    assert "--self-test" in call(installed, "ensemblelora", "doctor", "--help", cwd=tmp_path)
    assert "demo_rte" in call(installed, "ensemblelora", "tasks", cwd=tmp_path)

    save_model(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    for task in make_planted_tasks(2, 1, n_train=16, n_validation=8, n_test=8).tasks:
        write_task(tmp_path / "tasks", task.name, task)
    changes = ("training.num_train_epochs=1", "gradients.proj_dim=16", "evaluation.n_bootstrap=100")
    settings = [word for change in changes for word in ("--set", change)]
    made: Any = json.loads(
        call(installed, "ensemblelora", "run", "tasks", "--model", "./model", *settings, "--json", cwd=tmp_path)
    )
    assert made["plan"]["task_names"] == ["family0_task0", "family1_task0"]
    assert (tmp_path / made["report"]).exists()
    answer = ["predict", "runs/tasks", "--task", "family0_task0", "--text", "sun and fire"]
    assert call(installed, "ensemblelora", *answer, cwd=tmp_path).strip() in ("yes", "no")


def test_its_demo_runs_to_a_report(installed, tmp_path):
    """The recipe and cards it ships, the pinned package's rows, a model of two layers: `make demo`, made small."""
    save_model(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 2048'))
    sizes = {"train": 8, "validation": 4, "test": 4}
    changes = ["data.max_length=1024", *(f"data.max_{split}_examples={n}" for split, n in sizes.items())]
    changes += ["training.num_train_epochs=1", "gradients.proj_dim=16", "evaluation.n_bootstrap=100"]
    settings = [word for change in changes for word in ("--set", change)]
    words = ("ensemblelora", "demo", "--model", "./model", *settings, "--json")
    made: Any = json.loads(call(installed, *words, cwd=tmp_path))
    assert len(made["plan"]["task_names"]) == 8
    assert (tmp_path / made["report"]).read_text(encoding="utf-8").count("demo_piqa_plain") > 3
    assert made["results"]["methods"].keys() >= {"base", "shared", "ensemble"}
