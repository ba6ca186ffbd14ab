"""What comes from strangers (adapters, cards, data, run folders) is data: it runs no code and reaches no other file."""

from __future__ import annotations

import ast
import json
import pickle
import re
import struct
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import audit_dependencies
from ensemblelora import pipeline
from ensemblelora.adapters import THETA0, load_adapter, save_adapter
from ensemblelora.artifacts import RunFolder
from ensemblelora.config import ModelConfig, parse_config
from ensemblelora.data.loading import load_card
from ensemblelora.data.reading import read_split
from ensemblelora.data.rendering import compile_card
from ensemblelora.errors import ConfigError, DataError, ModelError, OutputError, StoreError
from ensemblelora.files import load_arrays
from ensemblelora.models import load_base
from ensemblelora.tensors import load_tensors
from ensemblelora.training import state
from ensemblelora.yamltext import YamlError, parse_yaml
from tests.faults import ROOT
from tests.tiny import make_adapted
from tests.tiny_run import edit_rows, make_inputs, read_config, save_model
from tests.toys import make_card, write_rows


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


# No pickles


@cache
def read_sources() -> dict[Path, tuple[set[str], list[tuple[str, dict[str | None, str], int]]]]:
    """Of every module: what it imports; what it calls, with which named arguments, in which line."""
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        calls = [
            (ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno)
            for node in nodes
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
        ]
        found[path] = (imported, calls)
    return found


def test_no_source_reads_or_writes_pickles_or_runs_text():
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    forbidden = {"torch.load", "torch.save", "eval", "exec", "compile", "__import__", "os.system", "yaml.load"}
    forbidden |= {"yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "pandas.read_pickle"}
    for path, (imported, calls) in read_sources().items():
        assert not {name.partition(".")[0] for name in imported} & modules, path
        assert not {name for name, _, _ in calls} & forbidden, path


def test_numpy_is_always_told_to_refuse_pickles_and_no_code_of_a_model_is_trusted():
    for path, (_, calls) in read_sources().items():
        for name, given, line in calls:
            if name in ("np.load", "np.save", "np.savez", "np.savez_compressed"):
                assert given.get("allow_pickle") == "False", f"{path} line {line}"
            assert given.get("trust_remote_code", "False") == "False", f"{path} line {line}"


def poisons(mark: Path) -> dict[str, bytes]:
    """One pickle in every wrapping that a reader might take off."""
    bare = pickle.dumps(Bomb(mark))
    header = repr({"descr": "|O", "fortran_order": False, "shape": (1,)}).ljust(117) + "\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bare
    return {"bare": bare, "npy": array}


def test_a_poisoned_file_in_any_place_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "it ran"
    pickle.loads(poisons(mark)["bare"])
    assert mark.exists(), "the poison works"
    mark.unlink()
    torch.save(Bomb(mark), tmp_path / "bomb.pt")
    mark.unlink(missing_ok=True)
    adapter = tmp_path / "adapter"
    adapted = make_adapted("llama")
    save_adapter(adapted, THETA0, adapter)
    contents = {**poisons(mark), "torch": (tmp_path / "bomb.pt").read_bytes()}
    for content in contents.values():
        (tmp_path / "arrays.npz").write_bytes(content)
        (tmp_path / "tensors.safetensors").write_bytes(content)
        (adapter / "adapter_model.safetensors").write_bytes(content)
        for read in (
            lambda: load_arrays(tmp_path / "arrays.npz"),
            lambda: load_tensors(tmp_path / "tensors.safetensors"),
            lambda: load_adapter(adapted, "stranger", adapter),
        ):
            with pytest.raises(StoreError):
                read()
        # PEFT alone would look for the older format beside it.
        (adapter / "adapter_model.safetensors").unlink()
        (adapter / "adapter_model.bin").write_bytes(content)
        with pytest.raises(StoreError):
            load_adapter(adapted, "stranger", adapter)
    assert not mark.exists(), "code from a file was run"


def test_a_poisoned_checkpoint_is_refused(tmp_path):
    mark = tmp_path / "it ran"
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state.save_optimizer(tmp_path, optimizer, schedule)
    state.save_random(tmp_path)
    for content in poisons(mark).values():
        for name, load in (("optimizer", lambda: state.load_optimizer(tmp_path, optimizer, schedule)),
                           ("random", lambda: state.load_random(tmp_path))):  # fmt: skip
            before = (tmp_path / f"{name}.safetensors").read_bytes()
            (tmp_path / f"{name}.safetensors").write_bytes(content)
            with pytest.raises(StoreError, match=name):
                load()
            (tmp_path / f"{name}.safetensors").write_bytes(before)
    assert not mark.exists()


def test_the_state_of_a_training_comes_back_to_the_bit(tmp_path):
    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(3, 2))
        optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.1}, {"params": []}], lr=0.1 + 0.2)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1 / (1 + step)] * 2)

    def step(optimizer: Any, schedule: Any) -> list[Any]:
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = torch.randn(3, 2)
        optimizer.step()
        schedule.step()
        return [weight.detach().clone(), *(group["lr"] for group in optimizer.param_groups), np.random.rand()]  # noqa: NPY002

    first = make()
    step(*first)
    state.save_optimizer(tmp_path, *first)
    state.save_random(tmp_path)
    kept = first[0].param_groups[0]["params"][0].detach().clone()
    expected = step(*first)
    second = make()
    second[0].param_groups[0]["params"][0].data.copy_(kept)
    state.load_optimizer(tmp_path, *second)
    state.load_random(tmp_path)
    found = step(*second)
    assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]
    with pytest.raises(StoreError, match="not the state of this training"):
        state.load_optimizer(tmp_path, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), second[1])


def test_models_with_pickled_weights_or_code_of_their_own_do_not_run_it(tmp_path):
    mark = tmp_path / "it ran"
    save_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"a": Bomb(mark)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        load_base(ModelConfig(name=str(tmp_path / "model")))
    assert "\n" not in str(caught.value)
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "stranger",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model" / "evil.py").write_text(f"open({str(mark)!r}, 'w')", encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        load_base(ModelConfig(name=str(tmp_path / "model")))
    assert not mark.exists(), "code of the model was run"


def test_no_setting_turns_a_models_own_code_on():
    with pytest.raises(ConfigError, match="unknown key"):
        parse_config({"data": {"tasks": ["a"]}, "model": {"name": "x", "trust_remote_code": True}})


# Cards


@pytest.mark.parametrize("path", ["pandas", "arrow", "text", "webdataset", "generator", "sql"])
def test_other_readers_than_the_three_are_no_data(tmp_path, path):
    rows = {"train": str(tmp_path / "evil.pkl")}
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "it ran")))
    with pytest.raises(DataError):
        read_split(make_card(dataset_path=path, dataset_kwargs={"data_files": rows}), "train")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "options", [{"cache_dir": "elsewhere"}, {"streaming": True}, {"split": "test"}, {"token": "secret"}, {"name": "a"}]
)
def test_a_card_can_not_set_where_or_how_the_loader_works(tmp_path, options):
    write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 0}])
    kwargs = {"data_files": {"train": str(tmp_path / "a.jsonl")}, **options}
    with pytest.raises(DataError, match=f"dataset_kwargs.{next(iter(options))}: can't be set in a card"):
        read_split(make_card(dataset_kwargs=kwargs), "train")


def test_a_cards_wish_to_have_its_code_run_is_left_out(tmp_path, caplog):
    write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 0}])
    kwargs = {"data_files": {"train": str(tmp_path / "a.jsonl")}, "trust_remote_code": True}
    assert read_split(make_card(dataset_kwargs=kwargs), "train")[0] == {"text": "a", "label": 0}
    assert "a dataset's own code is never run" in caplog.text


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ text.__class__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ [].append.__self__.__class__ }}",
    "{{ text.format.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(text) }}",
    "{{ '{a.__class__}'.format_map({'a': text}) }}",
    "{{ '%s'|format(self.__dict__) }}",
    "{{ (text|map).gi_frame.f_globals }}",
    "{% import 'os' as os %}{{ os }}",
    "{% include '/etc/passwd' %}",
    "{% extends 'base' %}",
    "{{ range.__init__.__globals__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ ().__class__.__bases__[0] }}",
    "{{ config.__class__ }}{{ request.application }}",
    "{{ text|xmlattr }}",
]
LARGE = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**(10**8) }}",
    "{{ (10**9999) * (10**9999) * (10**9999) * (10**9999) }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'|indent(10**9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ '{a:{b}}'.format(a=1, b=999999999) }}",
    "{{ [0] * 10**9 }}",
    "{{ range(10**9)|list }}",
    "{{ ('a' * 99999).replace('a', 'b' * 10**7) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "9" * 5000 + " }}",
]


@pytest.mark.parametrize("template", [*ESCAPES, *LARGE], ids=lambda text: text[:40])
def test_a_template_can_neither_leave_its_row_nor_fill_the_memory(template):
    row = {"text": "a row", "label": "no"}
    with pytest.raises(DataError) as caught:
        compile_card(make_card(doc_to_text=template), list(row)).example(row, "0")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


def test_the_bounds_leave_ordinary_templates_alone():
    row = {"text": "word " * 5000, "n": 7_000_000, "label": "no"}
    template = (
        "{{ text }}{{ '-' * 20 }}{{ n + n * 300 }} {{ '%5.1f' % 2.5 }} {{ '%s of 1000000' % n }} {{ n|default(1) }}"
        "{{ '{:>8}'.format('x') }}{{ 'In 1000000: {}'.format(n) }}{{ 2 ** 10 }}{{ text|truncate(9) }}{{ n|int|abs }}"
        "{% for i in range(3) %}{{ i }}{% endfor %}{{ [1, 2] + [3] }}{{ text + text }}"
    )
    context = compile_card(make_card(doc_to_text=template), list(row)).example(row, "0").context
    assert context.startswith(row["text"] + "-" * 20 + "2107000000   2.5 7000000 of 1000000 7000000       xIn 1000000")
    assert context.endswith("012[1, 2, 3]" + 2 * row["text"])


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "a/b", "..", "a\\b", "a\0b", "con\n", "\uff41", "a\u202eb", "x" * 65]
)
def test_names_stay_inside_the_run_folder(name, tmp_path):
    with pytest.raises(ValueError, match="a task's name has 1 to 64"):
        make_card(task=name)
    if "/" in name or "\\" in name or name == "..":
        with pytest.raises(OutputError, match="expected a plain name"):
            RunFolder(tmp_path).adapter(name)


# YAML

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
BAD_YAML = {
    "a billion values": (BOMB, "stands for"),
    "merged keys without end": (
        "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{'<<': [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
        "stands for",
    ),
    "itself": ("a: &a [*a]", "leads back to itself"),
    "deep": ("[" * 1100, "nested too deeply|expected"),
    "too long": ("a: " + "b" * 2**20, "characters, at most"),
    "twice": ("seed: 1\nseed: 2", "key 'seed' is there twice"),
    "a function": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "a number without end": ("a: " + "1" * 5000, "can't be read"),
    "no date": ("a: 2020-13-45", "can't be read"),
    "half a character": ('a: "\\ud800"', "half of a character"),
    "a zero byte": ('a: "\\0"', "a zero byte"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "a key that is a list": ("? [a]\n: b", "unhashable"),
    "a tab": ("a:\n\tb: 1", "cannot start any token"),
    "no end of a quote": ("a: 'b", "quoted scalar"),
}


@pytest.mark.parametrize(("text", "message"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_is_none_or_too_much_is_told_in_one_line(text, message, tmp_path):
    with pytest.raises(YamlError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    (tmp_path / "card.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(DataError, match=r"card\.yaml"):
        load_card(tmp_path / "card.yaml")


def test_plain_yaml_is_what_the_safe_reader_gives():
    for text in ("", "a: 1", "- a\n- {b: [c, 2, null, yes]}", "a: &x {b: 1}\nc: {<<: *x, d: 2}", "&a [1, b]"):
        assert parse_yaml(text) == yaml.safe_load(text)


# Pages


def test_every_template_of_a_page_escapes_and_none_marks_foreign_text_as_safe():
    templates = sorted((ROOT / "src").rglob("*.j2"))
    assert templates
    for path in templates:
        found = re.findall(r"\{\{[^}]*\|\s*safe[^}]*\}\}|autoescape\s+false", path.read_text(encoding="utf-8"))
        assert not found, path
    for path, (_, calls) in read_sources().items():
        assert path.parent.name == "report" or not any(name.endswith("Markup") for name, _, _ in calls), path


@pytest.mark.slow
def test_markup_in_labels_texts_and_names_of_models_is_none_on_the_pages_of_a_run(tmp_path):
    """Names of tasks are letters and digits; pages of others are tried in test_report.py."""
    recipe, strange = make_inputs(tmp_path), {"it is not so": "<script>alert(1)</script>", "it is so": "<b>yes</b>"}
    (tmp_path / "model").rename(tmp_path / "<img src=x onerror=alert(2)>")
    card = tmp_path / "tasks" / "family1_task1.yaml"
    values = yaml.safe_load(card.read_text(encoding="utf-8"))
    card.write_text(yaml.safe_dump(values | {"doc_to_choice": [*strange.values()]}), encoding="utf-8")
    for file in (tmp_path / "tasks").glob("*.jsonl"):
        edit_rows(
            file,
            lambda _, row: {
                "text": f"<script>alert(3)</script> {row['text']}",
                "label": strange.get(row["label"], row["label"]),
            },
        )
    pipeline.run(read_config(recipe, model={"name": str(tmp_path / "<img src=x onerror=alert(2)>")}))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "&lt;img src=x" in page, "the name is shown"
    assert "<img" not in page and "<script>alert" not in page and page.count("<script") == 3


def test_a_card_can_not_show_what_another_file_holds(tmp_path):
    (tmp_path / "secret.txt").write_text("password: hunter2", encoding="utf-8")
    (tmp_path / "card.yaml").write_text(f"include: {tmp_path / 'secret.txt'}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_card(tmp_path / "card.yaml")
    assert "hunter2" not in str(caught.value)


# Dependencies

FAKE_AUDIT = """
import json
print(json.dumps({"dependencies": [
    {"name": "fine", "version": "1.0", "vulns": []},
    {"name": "poor", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]},
]}))
raise SystemExit(1)
"""


@pytest.fixture
def audit(tmp_path, monkeypatch, capfd):
    """Run the audit with a source in pip-audit's place, and return its code and what it says."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(audit_dependencies, "find_auditor", lambda folder: Path(sys.executable))
    monkeypatch.setattr(audit_dependencies, "ACCEPTED", tmp_path / "accepted.yaml")

    def run(source: str, accepted: str = "") -> tuple[int, str]:
        (tmp_path / "pip_audit.py").write_text(source, encoding="utf-8")
        (tmp_path / "accepted.yaml").write_text(accepted, encoding="utf-8")
        return audit_dependencies.main(), capfd.readouterr().err

    return run


def test_known_vulnerabilities_fail_the_check_unless_they_are_accepted_with_a_reason(audit):
    assert audit(FAKE_AUDIT) == (1, "poor 2.0: PYSEC-1, mended in 2.1\n")
    assert audit(FAKE_AUDIT, "PYSEC-1: only of its server, which nobody here starts") == (0, "")
    code, told = audit(FAKE_AUDIT, "PYSEC-1: its server is never started here\nPYSEC-0: of a package long since gone")
    assert code == 1 and told == "accepted.yaml: PYSEC-0 is known no more; take it out\n"
    with pytest.raises(ValueError, match="PYSEC-1 has no reason"):
        audit(FAKE_AUDIT, "PYSEC-1: fine")


def test_a_machine_that_can_not_look_says_so_and_checks_the_rest(audit, tmp_path, monkeypatch):
    told = "dependencies not audited: "
    assert audit("raise SystemExit('no network')") == (0, f"{told}no network\n")
    unknown = {"name": "a", "skip_reason": "not found"}
    code, why = audit(f"print({json.dumps({'dependencies': [unknown]})!r})")
    assert code == 0 and why.endswith("tells nothing about vulnerabilities\n")
    monkeypatch.setattr(audit_dependencies, "SECONDS", 0.01)
    assert audit("import time; time.sleep(60)") == (0, f"{told}no answer within 0.01 seconds\n")


def test_the_accepted_vulnerabilities_have_reasons():
    audit_dependencies.read_accepted(audit_dependencies.ACCEPTED)


def test_an_environment_that_can_not_be_installed_into_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_dependencies, "PIN", "a-package-that-is-nowhere==1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(audit_dependencies.UnavailableError, match="No matching distribution"):
        audit_dependencies.find_auditor(tmp_path / "audit")
    assert list(tmp_path.iterdir()) == []
