"""Rules of the code base that no other tool checks."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ensemblelora
from generate_docs import render_pages

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "src" / "ensemblelora").rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 50
# Standard library names that came after Python 3.10, which the package still supports.
NEW_NAMES = {
    "typing": {"LiteralString", "Never", "NotRequired", "Required", "Self", "TypeVarTuple", "Unpack", "assert_never",
               "assert_type", "dataclass_transform", "override", "reveal_type"},
    "datetime": {"UTC"},
    "enum": {"StrEnum"},
    "contextlib": {"chdir"},
    "itertools": {"batched"},
}  # fmt: skip
NEW_MODULES = {"tomllib", "wsgiref.types"}
PICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "src").as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def count_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring, which is asked to be long."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function, clean=False) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_is_small_says_what_it_is_and_what_it_offers(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) <= MAX_MODULE_LINES
    assert ast.get_docstring(tree), "a module says in its docstring what it is for"
    # AnnAssign too: an empty list needs a type.
    targets = [target.id for node in tree.body for target in getattr(node, "targets", [getattr(node, "target", None)])
               if isinstance(target, ast.Name)]  # fmt: skip
    is_bare_package = path.name == "__init__.py" and len(tree.body) <= 2
    assert "__all__" in targets or is_bare_package


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short(path):
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    too_long = {function.name: count_lines(function) for function in functions}
    assert {name: lines for name, lines in too_long.items() if lines > MAX_FUNCTION_LINES} == {}


def test_nothing_is_pickled():
    for path in MODULES:
        for module, name in imported_names(parse(path)):
            assert module.partition(".")[0] not in PICKLERS, f"{name_of(path)} imports {module} {name or ''}"
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"allow_pickle\s*=\s*True|torch\.(save|load)\(", source), name_of(path)


def test_one_module_alone_knows_ray():
    """Imported by a statement or by its name."""
    imports = re.compile(r"(^|\W)(import|from)\s+ray\b|(import_module|__import__)\(\s*[\"']ray\b", re.M)
    knowing = {name_of(path) for path in MODULES if imports.search(path.read_text(encoding="utf-8"))}
    assert knowing == {"ensemblelora/scheduling.py"}


def test_python_3_10_has_every_name_that_is_imported():
    newer = [
        f"{name_of(path)}: {module}.{name}"
        for path in MODULES
        for module, name in imported_names(parse(path))
        if module in NEW_MODULES or name in NEW_NAMES.get(module, ())
    ]
    assert newer == []


def test_generated_pages_are_current():
    for path, text in render_pages().items():
        assert path.exists() and path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run `make docs`"


def test_public_names():
    # What users import; a name that leaves this list needs a line in the changelog.
    assert ensemblelora.__all__ == [
        "EnsembleLoraError", "Run", "RunConfig", "RunResult", "__version__", "dump_config", "estimate", "load_config",
        "load_run", "load_tasks", "parse_config", "read_request", "run",
    ]  # fmt: skip
    assert set(dir(ensemblelora)) >= set(ensemblelora.__all__)


@pytest.mark.parametrize("name", sorted(set(ensemblelora.__all__) - {"__version__"}))
def test_a_public_name_loads_from_its_home(name):
    value = getattr(ensemblelora, name)
    assert value.__name__ == name and value.__module__.startswith("ensemblelora.")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ensemblelora.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, ensemblelora; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert not {"torch", "transformers", "numpy", "pydantic", "typer", "rich"} & set(ast.literal_eval(done.stdout))


def test_no_package_index_is_named():
    pattern = re.compile(r"https?://[^\s\"']*(pypi|pythonhosted|anaconda|download\.pytorch)|--(extra-)?index-url")
    names = ["Makefile", "pyproject.toml", "requirements.txt", "requirements-demo.txt", ".ci/run"]
    for name in names:
        assert not pattern.search((ROOT / name).read_text(encoding="utf-8")), name


def test_requirements_pin_everything_the_project_asks_for():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[a-z0-9._-]+==[^=*]+$", line.partition(" ;")[0]) for line in lines)
    pinned = {re.split("==", line)[0] for line in lines}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = re.search(r"^dependencies = \[(.*?)^\]", project, re.S | re.M).group(1)
    asked += re.search(r"^dev = \[(.*?)^\]", project, re.S | re.M).group(1)
    names = {name.lower() for name in re.findall(r'"([A-Za-z0-9-]+)>=', asked)}
    assert names and names <= pinned


def test_what_is_imported_is_asked_for():
    """Else a clean environment, into which nothing else brings it by chance, fails at the import."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\ndev = [")[0]
    asked = {plain(name) for name in re.findall(r'"([A-Za-z0-9_-]+)(?:\[\w+\])?>=', project)}
    asked |= {required for name in asked for required in list_required(name)}
    imported = {name.partition(".")[0] for path in MODULES for name, _ in imported_names(parse(path))}
    others = imported - sys.stdlib_module_names - {"ensemblelora"}
    named_otherwise = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
    assert len(others) > 20 and {plain(named_otherwise.get(name, name)) for name in others} - asked == set()


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def list_required(name: str) -> set[str]:
    """What a package asks for itself, where it is installed."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return set()
    return {plain(re.match(r"[\w-]+", line)[0]) for line in lines if "extra ==" not in line}


def test_readme_citation_and_changelog_fit():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
    assert f"\nversion: {ensemblelora.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{ensemblelora.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_shipped_files_are_found_beside_the_code():
    package = Path(importlib.util.find_spec("ensemblelora").origin).parent
    for pattern in ("py.typed", "recipes/*.yaml", "data/cards/*.yaml", "report/templates/*.j2"):
        assert list(package.glob(pattern)), pattern


@pytest.mark.parametrize(
    ("flags", "code", "line"),
    [
        ("", 0, "tests skipped: 1\n"),
        ("--no-skips", 1, "tests skipped: 1, and --no-skips forbids it\n"),
        pytest.param("--no-skips -n 2", 1, "tests skipped: 1, and --no-skips forbids it\n", marks=pytest.mark.slow),
    ],
)
def test_a_skipped_test_is_counted_and_can_be_forbidden(tmp_path, flags, code, line):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    tests = "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no data')\n"
    (tmp_path / "test_some.py").write_text(tests, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, line in done.stdout) == (code, True), done.stdout + done.stderr
