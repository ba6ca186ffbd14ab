"""docs/paper.md: every module, test and record that it names is there, and the tests are those of the modules."""

from __future__ import annotations

import ast
import re

import pytest
import typer.main

from ensemblelora.cli import app
from ensemblelora.config import RunConfig
from tests.snippets import DOCS, ROOT

PACKAGE = ROOT / "src" / "ensemblelora"


def read_rows() -> list[list[str]]:
    text = (DOCS / "paper.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    first = rows.index("|---|---|---|---|---|---|") + 1
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[first:] if row.count("|") == 7]


ROWS = read_rows()


def find_module(name: str) -> bool:
    """Whether a name is a file or folder of the package or the project, a function of a module, or a config's key."""
    if any((home / name).exists() for home in (PACKAGE, ROOT)):
        return True
    first, _, rest = name.partition(".")
    source = PACKAGE / f"{first}.py"
    if source.exists():
        tree = ast.parse(source.read_text(encoding="utf-8"))
        return rest in {node.name for node in tree.body if hasattr(node, "name")}
    section = RunConfig.model_fields.get(first)
    return section is not None and rest in section.annotation.model_fields


def imports_of(test: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob(test)))


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}: {row[1]}"[:60] for row in ROWS])
def test_modules_and_tests_of_a_line_are_there(row: list[str]):
    part, _, modules, tests, _, status = row
    named, held = re.findall(r"`([^`]+)`", modules), re.findall(r"`([^`]+)`", tests)
    assert named and held, part
    assert [name for name in named if not find_module(name)] == []
    assert [test for test in held if not list((ROOT / "tests").glob(test))] == []
    assert status


def test_there_are_rows_and_a_line_for_what_is_ours():
    assert len(ROWS) > 35
    assert any(row[0] == "(ours)" for row in ROWS) and any(row[0] == "equation 1" for row in ROWS)


def read_exhibits() -> list[list[str]]:
    text = (DOCS / "paper.md").read_text(encoding="utf-8").partition("| exhibit |")[2]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| `.*$", text, re.M)]


def test_measured_names_records_or_says_that_there_is_none():
    measured = [row[4] for row in ROWS] + [row[3] for row in read_exhibits()]
    assert all(cell == "-" or "`" in cell for cell in measured)
    named = {name for cell in measured for name in re.findall(r"`([^`]+)`", cell)}
    results = ROOT / "benchmarks" / "results"
    records = {path.stem for path in results.iterdir()}
    assert (named - records, records - named) == (set(), set()), "named without a record; records that no line names"


def test_every_exhibit_has_a_line():
    (argument, *_) = typer.main.get_command(app).commands["reproduce"].params
    made = set(re.findall(r"\b(?:table|figure|section|extension)[\w.-]*", argument.help.replace(".-", "")))
    named = re.findall(r"^\| `([\w.-]+)` \| `", (DOCS / "paper.md").read_text(encoding="utf-8"), re.M)
    assert len(named) == len(set(named)) and set(named) == made


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}: {row[1]}"[:60] for row in ROWS])
def test_a_lines_tests_use_its_modules(row: list[str]):
    sources = "".join(imports_of(test) for test in re.findall(r"`([^`]+)`", row[3]))
    names = [re.split(r"[./]", name.removesuffix(".py").rstrip("/")) for name in re.findall(r"`([^`]+)`", row[2])]
    assert any(name[-1] in sources or name[0] in sources for name in names)
