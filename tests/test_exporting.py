"""An export loads without this package, computes what was measured, and hurts no more than it may."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ensemblelora import artifacts, cli
from ensemblelora.adapters import THETA0, AdaptedModel, adapter_state, add_adapter, attach, load_adapter, save_adapter
from ensemblelora.api import load_run
from ensemblelora.cli import main
from ensemblelora.data.encoding import encode_split
from ensemblelora.data.identity import fingerprint_split
from ensemblelora.data.loading import load_tasks
from ensemblelora.ensemble import Ensemble, Member, load_ensemble, predict_ensemble, save_ensemble
from ensemblelora.errors import DataError, OutputError, StoreError, UsageError
from ensemblelora.exporting import TOLERANCE, Export, export_run
from ensemblelora.exporting.notes import BaseNote, describe_fold
from ensemblelora.gguf import EMBEDDED_ORIGIN
from ensemblelora.models import load_base, prepare_base
from ensemblelora.prediction import member_nll, predict_members
from tests.tiny import disturb, make_network
from tests.tiny_run import TASKS, edit_rows, finished_run, make_inputs, read_config
from tests.toys import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

MEMBERS = (
    Member("group-0", 0, "group", 1.0),
    Member("group-1", 1, "group", 1.0),
    Member("group-0-boost-1", 0, "booster", 0.5),
)
USED = (TASKS[0], TASKS[3], TASKS[4])  # label words, labels of several tokens, free text
CLASSIFIED = (TASKS[0], TASKS[2])
ALL = 100.0  # a tolerance that accepts everything


def make_run(
    folder: Path,
    *,
    family: str = "llama",
    head: str = "lm",
    scale: float = 2.0,
    weights=(0.7, 0.3),
    used=None,
    layers=None,
    **model,
):
    """A run folder as the combine stage leaves it, its adapters random: no pipeline is needed to export one."""
    recipe = make_inputs(folder)
    network = make_network(family, head=head, n_labels=2, vocab_size=len(load_tokenizer()))
    network.to(getattr(torch, model.get("dtype", "float32"))).save_pretrained(folder / "model")
    for card in (folder / "tasks").glob("*.yaml"):
        if card.stem not in (used or (USED if head == "lm" else CLASSIFIED)):
            card.unlink()
        elif head != "lm":
            card.write_text(card.read_text(encoding="utf-8") + f"head: {head}\n", encoding="utf-8")
    config = read_config(recipe, model=model, adapter={"layers_to_transform": layers})
    run = artifacts.RunFolder.create(folder / "run")
    tasks = load_tasks(config.data, seed=0)
    base = load_base(config.model, head=head, n_labels=2)
    adapted = attach(base, config.adapter, seed=config.seed)
    for seed, member in enumerate(MEMBERS, start=1):
        add_adapter(adapted, member.name)
        disturb(adapted, member.name, scale=scale, seed=seed)
        save_adapter(adapted, member.name, run.adapter(member.name))
    facts = {"dtype": str(base.model.dtype).removeprefix("torch."), "fingerprint": base.fingerprint}
    artifacts.write_json(run.path / "environment.json", {"model": facts})
    cards = [
        {
            "card": task.card.model_dump(mode="json"),
            "kind": encode_split(task, "train", base.tokenizer, max_length=512).kind,
            "n_examples": {name: len(rows) for name, rows in task.splits.items()},
            "validation_fingerprint": fingerprint_split(
                encode_split(task, "validation", base.tokenizer, max_length=config.data.max_length)
            ),
        }
        for task in tasks.tasks
    ]
    artifacts.write_json(run.path / "tasks.json", {"tasks": cards})
    artifacts.write_text(run.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
    set_weights(
        run.path, Ensemble(tasks.names, ((0,), tuple(range(1, len(tasks.names)))), MEMBERS, (), (), "logits"), weights
    )
    return run.path


def set_weights(run: Path, ensemble: Ensemble, weights) -> None:
    """Give every task the same weights and write the ensemble."""
    n = len(ensemble.task_names)
    ensemble = replace(ensemble, weights=(tuple(weights),) * n, routed=(False,) * n)
    folder = artifacts.RunFolder.open(run)
    digests = {m.name: artifacts.file_sha256(folder.adapter(m.name) / "adapter_model.safetensors") for m in MEMBERS}
    save_ensemble(ensemble, run / "ensemble.json", adapter_sha256=digests)


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[..., Path]:
    """Runs that tests share, made when first asked for; not to be changed."""

    @cache
    def once(**options) -> Path:
        return make_run(tmp_path_factory.mktemp("run"), **options)

    return once


@pytest.fixture(scope="module")
def export(make, tmp_path_factory) -> Callable[..., Export]:
    """Exports that tests share, whatever they do to the loss; not to be changed."""

    @cache
    def once(run: Path, **options) -> Export:
        return export_run(run, tmp_path_factory.mktemp("export") / "out", tolerance=ALL, **options)

    return once


def load_plain(run: Path, folder: Path | None = None, *, head: str = "lm", dtype: str = "float32"):
    """The base model as a user loads it, and on it an exported adapter."""
    torch.manual_seed(0)  # of a classification head, as the run's own loading does
    loader = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    sizes = {} if head == "lm" else {"num_labels": 2}
    network = loader.from_pretrained(run.parent / "model", dtype=dtype, **sizes)
    return network.eval() if folder is None else PeftModel.from_pretrained(network, folder, adapter_name=THETA0).eval()


def run_rows(network: torch.nn.Module) -> torch.Tensor:
    """Logits of a few rows of arbitrary tokens."""
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def split_of(run: Path, task: str, split: str = "validation"):
    config = load_run(run).config
    [found] = [t for t in load_tasks(config.data, seed=0).tasks if t.name == task]
    return encode_split(found, split, load_tokenizer(), max_length=config.data.max_length)


def nll_of(adapted: AdaptedModel, name: str, split) -> float:
    return float(member_nll(predict_members(adapted, split, [name], max_tokens=512), split.labels).mean())


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fold_densely(run: Path, weights, network: torch.nn.Module) -> torch.nn.Module:
    """The slow twin: add every member's whole weight change to a plain model."""
    for name, weight in weights.items():
        if name == THETA0:
            continue  # its B is zero
        state = adapter_state(load_run(run)._model[0], name)
        for key, a in state.items():
            if ".lora_A." in key:
                module = network.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                change = weight * 2.0 * (state[key.replace(".lora_A.", ".lora_B.")] @ a)  # lora_alpha / r = 2
                module.weight.data += change.T if type(module).__name__ == "Conv1D" else change
    return network


@pytest.mark.parametrize(("family", "layers"), [("llama", (1,)), ("gpt2", None)])
def test_exact_stack_loads_in_peft_alone_and_is_the_dense_sum(make, export, family, layers):
    run = make(family=family, layers=layers)
    made = export(run, format="folded", rank=99)
    assert made.weights == pytest.approx({"group-0": 0.7, "group-1": 0.3, "group-0-boost-1": 0.7 / 3, THETA0: -0.7 / 3})
    assert (made.rank, made.exact_rank) == (12, 12) and made.residual == pytest.approx(0, abs=1e-6)
    expected = run_rows(fold_densely(run, made.weights, load_plain(run)))
    assert not torch.allclose(expected, run_rows(load_plain(run)), atol=0.01), "the adapters change the model"
    torch.testing.assert_close(run_rows(load_plain(run, made.folder)), expected, atol=1e-4, rtol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(export(run, format="merged").folder).eval()
    torch.testing.assert_close(run_rows(merged), expected, atol=1e-4, rtol=1e-4)


def nll_alone(run: Path, network: PeftModel, split) -> float:
    """The loss under what peft alone loaded, by this package's scoring."""
    return float(member_nll(scores_alone(run, network, split), split.labels).mean())


def scores_alone(run: Path, network: PeftModel, split):
    base = prepare_base("plain", network.get_base_model(), load_tokenizer())
    adapted = replace(load_run(run)._model[0], base=base, peft=network)
    return predict_members(adapted, split, [THETA0], max_tokens=512)


@pytest.mark.parametrize("task", [None, "written"])
def test_what_was_measured_is_what_a_user_gets(make, export, task):
    run = make()
    made = export(run, format="folded", task=task)
    assert made.rank == load_run(run).config.adapter.r < made.exact_rank and 0 < made.residual < 1
    assert [change.task for change in made.tasks] == ([task] if task else list(USED))
    plain, (adapted, ensemble) = load_plain(run, made.folder), load_run(run)._model
    for change in made.tasks:
        split = split_of(run, change.task)
        scores = scores_alone(run, plain, split)
        assert change.nll_folded == pytest.approx(member_nll(scores, split.labels).mean(), rel=1e-5)
        combined = predict_ensemble(adapted, ensemble, USED.index(change.task), split, max_tokens=512)
        assert change.nll_ensemble == pytest.approx(
            member_nll(replace(scores, values=combined[None]), split.labels).mean(), rel=1e-6
        )
        if change.task == "written":
            assert change.accuracy_ensemble is None and change.accuracy_folded is None
        else:
            assert change.accuracy_folded == (scores.values[0].argmax(axis=1) == split.labels).mean()
            assert change.accuracy_ensemble == (combined.argmax(axis=1) == split.labels).mean()
    assert made.nll_rise == pytest.approx(np.mean([c.nll_folded - c.nll_ensemble for c in made.tasks]))
    assert (made.accuracy_change is None) == (task == "written")


def test_free_text_has_no_boosters_and_the_whole_run_takes_their_mean(make, export):
    run = make()
    alone = export(run, format="folded", task="written")
    assert alone.weights == pytest.approx({"group-0": 0.7, "group-1": 0.3})
    assert alone.exact_rank == 8
    one = export(run, format="folded", task=TASKS[0])
    assert one.weights == pytest.approx({"group-0": 0.7, "group-1": 0.3, "group-0-boost-1": 0.35, THETA0: -0.35})
    every = export(run, format="folded", task=None)
    assert every.weights["group-0-boost-1"] == pytest.approx(2 / 3 * 0.35)
    for made in (alone, one, every):
        assert sum(made.weights.values()) == pytest.approx(1.0)


def test_fold_and_ensemble_differ_by_the_second_order_of_the_change(make, export):
    apart, booster = [], []
    for scale in (0.4, 0.05):
        run = make(scale=scale)
        made = export(run, format="folded", rank=99, task=TASKS[0])
        (adapted, ensemble), split = load_run(run)._model, split_of(run, TASKS[0])
        expected = predict_ensemble(adapted, ensemble, 0, split, max_tokens=512)
        found = scores_alone(run, load_plain(run, made.folder), split).values[0]
        bare = replace(ensemble, members=tuple(m for m in ensemble.members if m.kind == "group"))
        apart.append(np.abs(found - expected).max())
        booster.append(np.abs(predict_ensemble(adapted, bare, 0, split, max_tokens=512) - expected).max())
    assert apart[0] > 40 * apart[1] > 0, "an eighth of the change, a 64th of the difference"
    assert apart[1] < 0.2 * booster[1], "leaving the booster out would show: its part is of the first order"


def test_the_fold_of_one_adapter_is_that_adapter(make, tmp_path):
    run = make(weights=(0.0, 1.0))
    made = export_run(run, tmp_path / "out", format="folded", tolerance=1e-4)
    assert made.weights == {"group-1": 1.0} and made.rank == made.exact_rank == 4
    assert made.residual == pytest.approx(0, abs=1e-6) and made.nll_rise == pytest.approx(0, abs=1e-5)
    assert made.accuracy_change == 0


def test_a_lower_rank_cuts_more_and_rank_one_is_written_as_such(make, export):
    run = make(weights=(0.0, 1.0))
    made = [export(run, format="folded", task=TASKS[0], rank=rank) for rank in (1, 2)]
    residuals = [one.residual for one in made]
    assert residuals == sorted(residuals, reverse=True) and residuals[-1] > 0
    settings = json.loads((made[0].folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (1, 1, {})


def copy_run(run: Path, folder: Path) -> Path:
    """A run and its tasks, to be changed."""
    shutil.copytree(run.parent, folder, dirs_exist_ok=True)
    file = folder / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config["data"]["tasks"] = [str(folder / "tasks")]
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "run"


def agree_with_the_ensemble(run: Path, tasks) -> None:
    """Let the right answers be the ensemble's own, so that whatever changes it does harm."""
    for task in tasks:
        file = run.parent / "tasks" / f"{task}.validation.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        answers = [prediction.label for prediction in load_run(run).predict(task, rows)]
        edit_rows(file, lambda number, row, answers=answers: row | {"label": answers[number]})
    record = artifacts.read_json(run / "tasks.json")
    for entry in record["tasks"]:  # as if the run had learnt from these
        entry["validation_fingerprint"] = fingerprint_split(split_of(run, entry["card"]["task"]))
    artifacts.write_json(run / "tasks.json", record)


def test_a_fold_that_hurts_is_refused_in_one_line_and_leaves_nothing(make, export, tmp_path):
    used, out = (TASKS[0], TASKS[3]), tmp_path / "out"
    run = copy_run(make(scale=8.0, weights=(0.5, 0.5), used=used), tmp_path)
    agree_with_the_ensemble(run, used)
    cut, exact = (export(run, format="folded", rank=rank).nll_rise for rank in (4, 12))
    assert cut > 2 * exact > 2 * TOLERANCE, "so large a change is far from linear"
    with pytest.raises(UsageError) as refusal:
        export_run(run, out, format="folded")
    message = str(refusal.value)
    assert "\n" not in message and "one adapter of rank 4 for all tasks" in message
    assert f"by {cut:.3g} nats (most: '{TASKS[0]}'" in message and "more than the tolerance of 0.02" in message
    assert f"the exact stack, rank 12, raises it by {exact:.3g}" in message
    assert "--rank" not in message, "no rank would be enough"
    with pytest.raises(UsageError, match="give --rank 12, --task NAME to fold for one task, or --tolerance"):
        export_run(run, out, format="folded", tolerance=(cut + exact) / 2)
    with pytest.raises(UsageError, match=r"of rank 12 for all tasks .*; this is the exact stack, so that no rank"):
        export_run(run, out, format="merged")
    assert not out.exists()
    [advice] = re.findall(r"--tolerance ([\d.]+)", message)
    assert export_run(run, out, format="folded", tolerance=float(advice)).nll_rise == cut


@pytest.mark.parametrize(("dtype", "is_told"), [("bfloat16", True), ("float32", False)])
def test_a_tiny_rise_without_a_cut_is_told_from_rounding(make, tmp_path, monkeypatch, dtype, is_told):
    run = make(dtype=dtype, weights=(0.0, 1.0), used=(TASKS[0],))  # the fold of one adapter is that adapter
    for rise, is_small in ((0.009, True), (0.02, False)):
        monkeypatch.setattr("ensemblelora.exporting.write.mean_rise", lambda changes, rise=rise: rise)
        with pytest.raises(UsageError) as refusal:
            export_run(run, tmp_path / "out", format="folded", tolerance=0.0)
        told = "nothing was cut away, and up to about 0.01 may be rounding in bfloat16"
        assert (told in str(refusal.value)) == (is_told and is_small)


def test_a_merged_model_in_low_precision_is_measured_as_it_is_written(make, export, tmp_path, monkeypatch):
    run = make(dtype="bfloat16", scale=1.0)
    made = export(run, format="merged", task=TASKS[0])
    network = AutoModelForCausalLM.from_pretrained(made.folder)
    assert network.dtype == torch.bfloat16 and not hasattr(network.config, "quantization_config")
    plain = attach(prepare_base("merged", network, load_tokenizer()), load_run(run).config.adapter, seed=0)
    for change in made.tasks:
        assert nll_of(plain, THETA0, split_of(run, change.task)) == pytest.approx(change.nll_folded, rel=2e-3)
    rises = iter([0.0, 1.0, 1.0, 1.0])  # the fold's, then what rounding made of it
    monkeypatch.setattr("ensemblelora.exporting.write.mean_rise", lambda changes: next(rises))
    with pytest.raises(UsageError, match="rounded to bfloat16 weights it raises the mean validation loss by 1;"):
        export_run(run, tmp_path / "refused", format="merged", task=TASKS[0])
    assert not (tmp_path / "refused").exists()


def test_every_member_is_exported_as_it_is(make, export):
    run = make()
    made = export(run, format="peft")
    assert (made.rank, made.nll_rise, made.tasks) == (None, None, ())
    for member in MEMBERS:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (made.folder / member.name / name).read_bytes() == (
                run / "adapters" / member.name / name
            ).read_bytes()
    assert load_ensemble(made.folder / "ensemble.json") == load_ensemble(run / "ensemble.json")
    plain, split = load_plain(run, made.folder / "group-1"), split_of(run, TASKS[0])
    expected = nll_of(load_run(run)._model[0], "group-1", split)
    assert nll_alone(run, plain, split) == pytest.approx(expected, rel=1e-6)
    assert {name.partition("/")[0] for name in made.files} == {
        *(member.name for member in MEMBERS), "README.md", "ensemble.json", "export.json"
    }  # fmt: skip


@pytest.mark.parametrize("head", ["lm", "sequence_classification"])
@pytest.mark.parametrize("format", ["peft", "folded", "merged"])
def test_the_readme_loads_the_export_and_the_record_tells_what_was_measured(make, export, monkeypatch, format, head):
    run = make(head=head)
    made = export(run, format=format)
    note = (made.folder / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", note, re.S)
    monkeypatch.chdir(made.folder)
    names: dict[str, object] = {}
    exec(code, names)
    assert run_rows(names["model"].eval()).isfinite().all()
    assert set(made.files) == set(files_in(made.folder))
    record = json.loads((made.folder / "export.json").read_text(encoding="utf-8"))
    facts = json.loads(json.dumps(asdict(made), default=str))
    assert {key: record[key] for key in facts if key != "folder"} == {k: v for k, v in facts.items() if k != "folder"}
    for change in made.tasks:
        assert f"| {change.task} | 12 | {change.nll_ensemble:.4f} | {change.nll_folded:.4f} |" in note
    assert ("The classifier head (1 tensors) is the mean" in note) == (head != "lm" and format != "peft")


def test_a_classifier_head_is_averaged_and_loads_in_peft_alone(make, export):
    run = make(head="sequence_classification")
    made = export(run, format="folded")
    [head] = made.averaged
    adapted = load_run(run)._model[0]
    expected = sum(weight * adapter_state(adapted, name)[head] for name, weight in made.weights.items())
    network = load_plain(run, made.folder, head="sequence_classification")
    found = network.get_base_model().score.modules_to_save[THETA0].weight
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    split = split_of(run, TASKS[0])
    assert nll_alone(run, network, split) == pytest.approx(made.tasks[0].nll_folded, rel=1e-5)
    whole = AutoModelForSequenceClassification.from_pretrained(export(run, format="merged").folder)
    torch.testing.assert_close(whole.score.weight, expected, atol=1e-5, rtol=1e-5)


def test_the_start_goes_along_where_boosters_need_its_head(make, export):
    run = make(head="sequence_classification")
    made = export(run, format="peft")
    adapted = load_run(run)._model[0]
    start = adapter_state(adapted, THETA0)
    load_adapter(adapted, "read-back", made.folder / THETA0)
    assert all(start[key].equal(tensor) for key, tensor in adapter_state(adapted, "read-back").items())
    assert "start is `theta0`" in (made.folder / "README.md").read_text(encoding="utf-8")


def test_an_export_leaves_the_run_as_it_was(make, tmp_path):
    run = make(weights=(0.0, 1.0))
    before = files_in(run)
    for format, task in (("peft", None), ("folded", None), ("merged", TASKS[0])):
        export_run(run, tmp_path / format, format=format, task=task)
    assert files_in(run) == before
    made = load_run(run).export(format="folded", task=TASKS[3])
    assert made.folder == run / "export" / f"folded-{TASKS[3]}"
    after = files_in(run)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("export/") for name in after.keys() - before.keys() - {".lock"})


def forget_ensemble(run: Path) -> None:
    (run / "ensemble.json").unlink()


def alter_adapter(run: Path) -> None:
    file = run / "adapters" / "group-1" / "adapter_model.safetensors"
    file.write_bytes((run / "adapters" / "group-0" / "adapter_model.safetensors").read_bytes())


def lose_adapter(run: Path) -> None:
    (run / "adapters" / "group-0-boost-1" / "adapter_config.json").unlink()


def drop_rows(run: Path) -> None:
    file = run.parent / "tasks" / f"{TASKS[0]}.validation.jsonl"
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")


def fill_place(run: Path) -> None:
    (run.parent / "out").mkdir()
    (run.parent / "out" / "mine.txt").write_text("mine", encoding="utf-8")


def take_place(run: Path) -> None:
    (run.parent / "out").write_text("mine", encoding="utf-8")


REFUSALS = [
    ({"task": "nothing"}, None, UsageError, f"task 'nothing': not in this run; its tasks are {', '.join(USED)}"),
    ({"rank": 0}, None, UsageError, "rank 0: expected a whole number from 1 on"),
    ({"tolerance": -1.0}, None, UsageError, "tolerance -1.0: expected nats, 0 or more"),
    ({"tolerance": math.nan}, None, UsageError, "tolerance nan: expected nats, 0 or more"),
    ({"format": "gguf"}, None, UsageError, "format 'gguf': expected one of peft, folded, merged"),
    ({"format": "peft", "rank": 4}, None, UsageError, "format peft keeps every member as it is"),
    ({"format": "peft", "task": TASKS[0]}, None, UsageError, "format peft keeps every member as it is"),
    ({}, forget_ensemble, UsageError, "no trained ensemble yet; make it with: ensemblelora run"),
    ({"format": "peft"}, alter_adapter, StoreError, "group-1: damaged, or not what ensemble.json was fitted to"),
    ({}, lose_adapter, StoreError, "group-0-boost-1: damaged, or not what ensemble.json was fitted to"),
    ({}, drop_rows, DataError, f"'{TASKS[0]}': 11, .* give it its data back"),
    ({}, fill_place, OutputError, "out: not an empty folder; remove it or choose another"),
    ({"format": "peft"}, take_place, OutputError, "out: not an empty folder"),
]


@pytest.mark.parametrize(("options", "spoil", "error", "message"), REFUSALS)
def test_what_can_not_be_exported_is_refused_before_the_model_is_loaded(
    make, tmp_path, monkeypatch, options, spoil, error, message
):
    run = copy_run(make(), tmp_path)
    if spoil is not None:
        spoil(run)
    before = files_in(tmp_path)
    monkeypatch.setattr(
        "ensemblelora.exporting.write.load_members", lambda *a, **k: pytest.fail("the model was loaded")
    )
    with pytest.raises(error, match=message):
        export_run(run, tmp_path / "out", **{"format": "folded"} | options)
    assert files_in(tmp_path) == before


def test_other_rows_in_place_of_the_runs_are_refused(make, tmp_path):
    run = copy_run(make(), tmp_path)
    file = tmp_path / "tasks" / f"{TASKS[0]}.validation.jsonl"
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join([*rows[1:], rows[0]]), encoding="utf-8")
    with pytest.raises(DataError, match=f"rows of task '{TASKS[0]}' are not those it was made with"):
        export_run(run, tmp_path / "out", format="folded")
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_at_work_is_not_written_into(make, tmp_path):
    run = copy_run(make(), tmp_path)
    with artifacts.RunFolder.open(run).lock():
        with pytest.raises(OutputError, match="in use by process"):
            export_run(run, format="peft")
        assert export_run(run, tmp_path / "out", format="peft").files, "reading it is no harm"


def test_the_command_shows_what_was_measured_and_where_it_lies(tmp_path, capsys):
    run = finished_run() / "run"  # of the whole pipeline
    out, task = tmp_path / "out", TASKS[0]
    command = ["export", str(run), "--format", "folded", "--task", task, "--tolerance", "0.5", "--out"]
    assert main([*command, str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"{out}\n") and task in shown and "folded loss" in shown and "mean loss rise" in shown
    assert main([*command, str(tmp_path / "again"), "--json", "--rank", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rank"], found["task"], found["tolerance"]) == (2, task, 0.5)
    assert found["nll_rise"] == pytest.approx(found["tasks"][0]["nll_folded"] - found["tasks"][0]["nll_ensemble"])
    assert main([*command, str(out)]) == 2
    assert capsys.readouterr().err.endswith(f"error: {out}: not an empty folder; remove it or choose another\n")
    assert main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'peft'}\n"
    assert main(["export", str(run), "--format", "onnx"]) == 2
    assert "Invalid value for '--format'" in capsys.readouterr().err


def test_the_command_states_the_tolerance_of_the_library():
    assert inspect.signature(cli.export).parameters["tolerance"].default == TOLERANCE
    [option] = [p for p in typer.main.get_command(cli.app).commands["export"].params if p.name == "tolerance"]
    assert option.help.endswith(f"by default {TOLERANCE:g}.")


@pytest.mark.parametrize(
    ("name", "location", "code", "is_original"),
    [
        ("smollm2-135m", EMBEDDED_ORIGIN, f'from_pretrained("{EMBEDDED_ORIGIN}", dtype', True),
        ("m/tiny.gguf", "m/tiny.gguf", 'from_pretrained("m", gguf_file="tiny.gguf", dtype', False),
        ("somebody/model", "somebody/model", 'from_pretrained("somebody/model", dtype', False),
    ],
)
def test_the_note_loads_the_base_by_a_name_that_others_have_too(name, location, code, is_original):
    note = describe_fold(BaseNote(name, location, "bfloat16", "lm", 2), {"group-0": 1.0}, [["task"], ["a"]], 0)
    assert code in note
    assert ("not rounded to 4 bits" in note) == is_original
    assert "comes out again to about 0.01 nats" in note
    exact = describe_fold(BaseNote(name, location, "float32", "lm", 2), {"group-0": 1.0}, [["task"], ["a"]], 0)
    assert "comes out again" not in exact
