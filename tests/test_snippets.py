"""What the pages show is so: commands parse, code imports, data reads, links lead somewhere; the first pages run."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

import ensemblelora
from ensemblelora.cli import app, main
from ensemblelora.config import RunConfig, parse_config
from ensemblelora.config_federation import FederationConfig
from ensemblelora.data.task import TaskCard
from tests.snippets import (
    DOCS,
    ROOT,
    Block,
    Command,
    list_blocks,
    list_commands,
    list_inline_commands,
    list_pages,
)

PAGES = list_pages()
SHELLS = ("bash", "sh", "shell", "console")
BLOCKS = [block for page in PAGES for block in list_blocks(page)]
COMMANDS = [command for block in BLOCKS if block.language in SHELLS for command in list_commands(block)]
INLINE = [command for page in PAGES for command in list_inline_commands(page)]
OURS = [command for command in [*COMMANDS, *INLINE] if command.words[0] == "ensemblelora"]
SMALL = ("training.num_train_epochs=2", "model.dtype=float32", "gradients.proj_dim=16", "evaluation.n_bootstrap=100")
HELD_ELSEWHERE = {  # commands that their own tests run
    "analyze": "test_analyze.py",
    "assign": "test_federation_cli.py",
    "doctor": "test_doctor.py",
    "federate": "test_federation_cli.py",
    "forecast": "test_scale_sizing.py",
    "serve": "test_serving.py",
}
TOUR = (  # in this order: later pages work on what earlier ones leave
    "quickstart.md", "how-to/run.md", "serving.md", "using-elsewhere.md", "later-datasets.md", "selection.md",
    "how-to/compare.md", "how-to/plan.md", "how-to/custom-task.md", "how-to/custom-adapter.md", "index.md",
)  # fmt: skip
WALKED = {"README.md", *(f"docs/{page}" for page in TOUR)}
SET_UP = {"cd", "export", "make", "pip", "source"}
ON_RECORDS = [
    command
    for command in [*OURS, *list_inline_commands(DOCS / "measured.md")]
    if any(word.startswith("benchmarks/results/") for word in command.words)
]


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def parse(words: tuple[str, ...]) -> dict[str, Any]:
    """Parse as the command line does, without carrying anything out."""
    root = command_line()
    if words[0].startswith("-"):
        assert words[0] in {option for parameter in root.params for option in parameter.opts} | {"-h", "--help"}
        return {}
    assert words[0] in root.commands, f"no command {words[0]}"
    if words[1:] in ((), ("--help",), ("-h",)):
        return {}
    with root.commands[words[0]].make_context(words[0], list(words[1:])) as context:
        return dict(context.params)


def has_key(kind: Any, key: str) -> bool:
    """Whether a config has a key such as ``training.learning_rate``."""
    first, _, rest = key.partition(".")
    field = kind.model_fields.get(first)
    return field is not None and (
        not rest or (hasattr(field.annotation, "model_fields") and has_key(field.annotation, rest))
    )


# Everything that is shown


def test_there_are_blocks_of_every_kind():
    assert len(PAGES) > 20 and len(OURS) > 60
    assert {"bash", "python", "yaml", "json", "csv"} <= {block.language for block in BLOCKS}


@pytest.mark.parametrize("command", OURS, ids=str)
def test_a_command_parses_on_the_real_command_line(command: Command):
    given = parse(command.words[1:])
    kind = FederationConfig if command.words[1] in ("federate", "assign") else RunConfig
    for change in given.get("changes") or ():
        key, equals, _ = change.partition("=")
        assert equals and has_key(kind, key), f"{command}: no key {key}"


def test_shell_blocks_are_shell():
    text = "\n".join(block.text for block in BLOCKS if block.language in SHELLS)
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_targets_scripts_and_extras_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1], re.M))
    for command in COMMANDS:
        program, *rest = command.words
        if program == "make":
            assert rest[0] in targets, str(command)
        if program in ("python", "python3") and rest[0].endswith(".py"):
            source = (ROOT / rest[0]).read_text(encoding="utf-8")
            options = [word.partition("=")[0] for word in rest if word.startswith("--")]
            assert [option for option in options if f'"{option}"' not in source] == [], str(command)
        if program == "pip":
            named = [extra for word in rest for extra in re.findall(r"ensemblelora\[([\w,]+)\]", word)]
            assert {extra for names in named for extra in names.split(",")} <= extras, str(command)


@cache
def offers(module: str) -> frozenset[str]:
    """What a module of ours names in ``__all__``, read and not imported."""
    home = ROOT / "src" / Path(*module.split("."))
    source = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
    assert source.exists(), f"no module {module}"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def list_unknown_names(code: str) -> list[str]:
    """Names of the package that code uses and that are not there."""
    unknown = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ensemblelora"):
            unknown += [alias.name for alias in node.names if alias.name not in offers(node.module)]
        if isinstance(node, ast.Import):
            homes = [alias.name for alias in node.names if alias.name.startswith("ensemblelora.")]
            unknown += [home for home in homes if not offers(home)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ensemblelora":
            unknown += [node.attr] if node.attr not in (*ensemblelora.__all__, "bottleneck") else []
    return unknown


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_code_parses_and_its_names_exist(block: Block):
    assert list_unknown_names(block.text) == []


def test_what_is_wrong_is_noticed():
    for words in (
        "plan --json",
        "plann tasks/",
        "plan tasks/ --sed 1",
        "compare tasks/ --seeds many",
        "export r --format zip",
    ):
        with pytest.raises((AssertionError, click.ClickException)):
            parse(tuple(words.split()))
    assert not has_key(RunConfig, "training.rate") and not has_key(RunConfig, "seed.x") and has_key(RunConfig, "seed")
    assert list_unknown_names("from ensemblelora.api import load\nimport ensemblelora\nensemblelora.go()") == [
        "load",
        "go",
    ]
    block = Block(ROOT / "README.md", 1, "bash", None, "a --b 'it # is' | c > d  # hours: that's long\nX=1 e 'f\ng'\n")
    told = [(command.words, command.is_run) for command in list_commands(block)]
    assert told == [(("a", "--b", "it # is"), False), (("c",), False), (("e", "f\ng"), True)]
    below = Block(ROOT / "README.md", 1, "bash", None, "a\n# elsewhere: on a cluster\nb  # fast\nc\n")
    assert [command.is_run for command in list_commands(below)] == [True, False, False]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_is_a_card_or_a_recipe(block: Block):
    for values in yaml.safe_load_all(block.text):
        assert isinstance(values, dict)
        if "doc_to_text" in values:
            output = "multiple_choice" if "doc_to_choice" in values else "generate_until"
            source = {"task": "shown", "dataset_path": "csv", "training_split": "train", "output_type": output}
            TaskCard.model_validate(source | values)
        elif values.keys() <= RunConfig.model_fields.keys():
            parse_config({"data": {"tasks": ["demo_rte"]}} | values)


def test_json_and_csv_read():
    for block in BLOCKS:
        lines = re.sub(r",?\s*\.\.\.", "", block.text).splitlines()  # what is left out
        if block.language == "json":
            values = lines if lines[0].endswith("}") else ["".join(lines)]
            assert [json.loads(value) for value in values], str(block)
        if block.language == "csv":
            assert len({line.count(",") for line in lines}) == 1, str(block)


def test_keys_in_the_text_are_keys():
    sections = [name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")]
    pattern = re.compile(rf"`((?:{'|'.join(sections)})\.[A-Za-z_]\w*)[^`]*`")
    files = ("py", "md", "npz", "json", "jsonl", "yaml", "html")
    found = {(page, key) for page in PAGES for key in pattern.findall(page.read_text(encoding="utf-8"))}
    shown = {(page, key) for page, key in found if key.rpartition(".")[2] not in files}
    unknown = [
        (page.name, key)
        for page, key in sorted(shown)
        if not any(has_key(kind, key) for kind in (RunConfig, FederationConfig))
    ]
    assert len(shown) > 20 and unknown == []


def test_links_lead_to_files():
    dead = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path = target.partition("#")[0]
            if path and "://" not in path and not (page.parent / path).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []


def where(command: Command) -> str:
    return command.where.rpartition(":")[0]


def test_every_command_is_run_or_says_why_not():
    """By the walks below, by tests of its own, or a comment tells readers what it would take."""
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    left = []
    for command in COMMANDS:
        program, *rest = command.words
        if not command.is_run or program in SET_UP or where(command) in WALKED or command in ON_RECORDS:
            continue
        is_script = program == "python" and (rest[1] if rest[0] == "-m" else Path(rest[0]).stem) in scripts
        if not is_script and (program != "ensemblelora" or rest[0] not in HELD_ELSEWHERE):
            left.append(str(command))
    assert left == []


@pytest.mark.parametrize(("command", "file"), HELD_ELSEWHERE.items())
def test_what_is_said_to_be_run_elsewhere_is(command: str, file: str):
    assert re.search(rf'"{command}"[],]', (ROOT / "tests" / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", ON_RECORDS, ids=str)
def test_what_is_asked_of_a_record_is_answered(command: Command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(list(command.words[1:])) == 0
    assert "paper" in capsys.readouterr().out


def test_every_block_of_code_is_run():
    shown = {str(block.page.relative_to(ROOT)) for block in BLOCKS if block.language == "python"}
    assert shown - WALKED == {"docs/adapter-methods.md"}, "that one is run by tests/test_bottleneck.py"


# The pages that a newcomer follows are really followed


@pytest.fixture
def walk(tmp_path, monkeypatch, capsys):
    """A folder with a tiny model, in which commands of a page can be run as they stand."""
    from tests.tiny_run import save_model  # the other tests here need no torch

    save_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return Walk(tmp_path, capsys)


class Walk:
    """Carries out what a page shows."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.url = ""
        self.done: list[str] = []
        self.said: dict[str, str] = {}

    def write_files(self, blocks: list[Block]) -> None:
        for block in blocks:
            if block.title:
                self.write(block.title, block.text)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def run(self, blocks: list[Block]) -> None:
        for block in blocks:
            if block.language in SHELLS:
                for command in list_commands(block):
                    self.carry_out(command)
            if block.language == "python":
                smaller = '", "'.join(("model.name=./model", *SMALL))
                code = block.text.replace("model.name=smollm2-135m", smaller)
                exec(compile(code, str(block), "exec"), {})
                self.done.append("python")

    def carry_out(self, command: Command) -> None:
        program, *rest = command.words
        if not command.is_run or program in SET_UP:  # what these set up is there
            return
        if program == "ensemblelora":
            self._run_ours(command)
        elif program == "python":
            if rest[0] == "examples/make_tasks.py":  # the others want a model: they have a test below
                subprocess.run([sys.executable, ROOT / rest[0], *rest[1:]], check=True, capture_output=True)
        elif program == "curl":
            words = [program, "--fail", *(word.replace("http://127.0.0.1:8000", self.url) for word in rest)]
            self.said[str(command)] = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        else:
            subprocess.run(command.words, check=True, capture_output=True, input=self.last, text=True)

    @property
    def last(self) -> str:
        """What the command before said, for one behind a pipe."""
        return next(reversed(self.said.values()), "")

    def _run_ours(self, command: Command) -> None:
        name, *rest = command.words[1:]
        if name in HELD_ELSEWHERE:
            return
        takes_model = any(parameter.name == "model" for parameter in command_line().commands[name].params)
        if takes_model and not (self.folder / rest[0] / "run.json").exists():  # a run folder stands for its own config
            rest += ["--model", "./model", *(word for change in SMALL for word in ("--set", change))]
        self._capsys.readouterr()
        code = main([name, *rest])
        out, err = self._capsys.readouterr()
        assert code == 0, f"{command}\n{out}\n{err}"
        self.done.append(name)
        self.said[str(command)] = out


@pytest.mark.slow
def test_the_quickstart_runs_as_it_stands_and_the_pages_after_it(walk: Walk):
    blocks = list_blocks(DOCS / "quickstart.md")
    walk.write_files(blocks)
    walk.run(blocks)
    assert walk.done == ["plan", "plan", "run", "predict", "predict", "python", "ask", "export", "plan"]
    assert (walk.folder / "runs" / "tasks" / "report.html").exists()
    assert (walk.folder / "runs" / "small" / "plan.json").exists()
    labels = next(out for command, out in walk.said.items() if "predict" in command and "--text" in command)
    assert labels.strip() in ("positive", "negative")
    answers = json.loads(next(out for command, out in walk.said.items() if "questions.jsonl" in command))
    choices = [{"tin", "a wren", "a carp"}, {"an oak", "a wren", "a carp"}]
    assert [set(answer["probabilities"]) for answer in answers] == choices

    (walk.folder / "runs" / "tasks" / "export").rename(walk.folder / "exported")
    for page in TOUR[1:]:
        before = len(walk.done)
        PREPARE.get(page, lambda walk: None)(walk)
        walk.write_files(list_blocks(DOCS / page))
        with serving_at(walk) if page == "serving.md" else nullcontext():
            walk.run(list_blocks(DOCS / page))
        assert len(walk.done) > before, page
    answers = [json.loads(out)["predictions"] for command, out in walk.said.items() if "/predict" in command]
    assert [len(answer) for answer in answers] == [2, 1]
    said = " ".join(next(out for command, out in walk.said.items() if "add runs/tasks later.csv" in command).split())
    is_placed = "No place is predicted to save more" not in said  # of a model of random weights either may come
    assert (walk.folder / "runs" / "tasks-with-later" / "report.html").exists() == is_placed, said


def write_recipe(walk: Walk) -> None:
    walk.write("recipe.yaml", yaml.safe_dump({"data": {"tasks": ["tasks"]}}))


def write_later_rows(walk: Walk) -> None:
    """The reviews once more, turned around, as a task that comes later; and more rows of the first ones."""
    rows = [line.rpartition(",") for line in (walk.folder / "tasks" / "reviews.csv").read_text().splitlines()[1:]]
    turned = {"positive": "negative", "negative": "positive"}
    walk.write("later.csv", "\n".join(["text,label", *(f"Later: {text},{turned[label]}" for text, _, label in rows)]))
    more = [json.dumps({"text": f"Again: {text}", "label": label}) for text, _, label in rows]
    walk.write("more-reviews.jsonl", "\n".join(more))


def write_notes(walk: Walk) -> None:
    walk.write("notes/notes.csv", (walk.folder / "tasks" / "reviews.csv").read_text())


def compare_a_little(walk: Walk) -> None:
    """What the page says takes hours."""
    words = "compare tasks/ --methods base,shared --learning-rates 1e-3 --seeds 1 --model ./model"
    assert main([*words.split(), *(word for change in SMALL for word in ("--set", change))]) == 0


def write_mails(walk: Walk) -> None:
    rows = [f"person{n}@example.org,{('Lunch', 'Server down')[n % 2]},{n % 2}" for n in range(40)]
    walk.write("mails/mails.csv", "\n".join(["sender,subject,urgent", *rows]))


PREPARE: dict[str, Callable[[Walk], None]] = {
    "how-to/run.md": write_recipe,
    "later-datasets.md": write_later_rows,
    "selection.md": write_notes,
    "how-to/compare.md": compare_a_little,
    "how-to/custom-task.md": write_mails,
}


@contextmanager
def serving_at(walk: Walk) -> Iterator[None]:
    from tests.test_serving import serving

    with serving(run=walk.folder / "runs" / "tasks") as (started, _):
        walk.url = started["url"]
        yield


@pytest.mark.slow
def test_the_readme_runs_on_the_files_that_it_shows(walk: Walk):
    """Every file format that the README shows, with more rows of the same kind; then its commands and its Python."""
    blocks = list_blocks(ROOT / "README.md")
    make_tasks = [sys.executable, ROOT / "examples" / "make_tasks.py", "tasks"]
    subprocess.run(make_tasks, check=True, capture_output=True)
    (walk.folder / "tasks" / "quiz.csv").unlink()
    for number, block in enumerate(block for block in blocks if block.language == "json"):
        rows = [json.loads(line) for line in block.text.splitlines()] * 14
        rows = [row | {"question": f"{row['question']} ({place})"} for place, row in enumerate(rows)]
        name = ("quiz", "facts")[number]
        (walk.folder / "tasks" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    card = next(block.text for block in blocks if block.language == "yaml" and "doc_to_text" in block.text)
    (walk.folder / "tasks" / "notes.yaml").write_text(card, encoding="utf-8")
    notes = [f"Note {place} is {('bad', 'good')[place % 2]}.,{place % 2}" for place in range(40)]
    (walk.folder / "tasks" / "notes.csv").write_text("\n".join(["sentence,target", *notes]), encoding="utf-8")

    later = [f"Later {place} is {('bad', 'good')[place % 2]}.,{('bad', 'good')[place % 2]}" for place in range(40)]
    (walk.folder / "later.csv").write_text("\n".join(["text,label", *later]), encoding="utf-8")

    walk.run([block for block in blocks if block.language in (*SHELLS, "python")])
    assert {"plan", "run", "predict", "select", "python"} <= set(walk.done)
    assert json.loads((walk.folder / "runs" / "tasks" / "tasks.json").read_text())["tasks"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [("own_files", "plan: "), ("ask_the_oracle", "reviews with tickets: "), ("custom_task", "--- office, answer")],
)
def test_an_example_runs(walk: Walk, monkeypatch, capsys, name: str, shown: str):
    path = ROOT / "examples" / f"{name}.py"
    settings = [word for change in SMALL for word in ("--set", change)]
    monkeypatch.setattr(sys, "argv", [str(path), "--model", "./model", *settings])
    monkeypatch.syspath_prepend(path.parent)  # as Python does for a script
    runpy.run_path(str(path), run_name="__main__")
    assert shown in capsys.readouterr().out


def test_every_example_is_run_and_named_in_a_page():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert scripts == {"ask_the_oracle", "custom_task", "make_tasks", "own_files"}
    assert [script for script in sorted(scripts) if f"examples/{script}.py" not in pages] == []
