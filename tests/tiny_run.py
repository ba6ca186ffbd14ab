"""A whole run small enough for tests: planted tasks in JSONL files, a tiny random Llama, a recipe.

Four tasks follow two opposed label conventions (one of them with answers of several tokens), and one asks for free
text. A run takes a few seconds; the finished one is made once per process and copied.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from ensemblelora import artifacts, pipeline
from ensemblelora.config import RunConfig, parse_config
from ensemblelora.data.synthetic import make_planted_tasks
from ensemblelora.data.task import SPLITS, Task
from tests.toys import TOKENIZER, load_tokenizer

SIZES = {"n_train": 16, "n_validation": 12, "n_test": 12}
TASKS = ("family0_task0", "family0_task1", "family1_task0", "family1_task1", "written")

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "model": {"dtype": "float32", "device": "cpu"},
    "adapter": {"r": 4, "lora_alpha": 8},
    "gradients": {"proj_dim": 24},
    "training": {"num_train_epochs": 2, "learning_rate": 0.01, "max_examples_per_batch": 8},
    "grouping": {"n_groups": 2, "max_groups": 3, "n_random_partitions": 2},
    "boosting": {"n_rounds": 1, "min_errors": 0.0},  # few rows tell nothing, and a booster is to be had
    "evaluation": {"n_bootstrap": 100},
}


def make_inputs(folder: Path) -> Path:
    """Write model and tasks under ``folder``, and return the path of a recipe whose run folder is ``run`` beside it."""
    planted = make_planted_tasks(2, 2, **SIZES).tasks
    spelled = make_planted_tasks(2, 2, kind="options", **SIZES).tasks[3]
    written = make_planted_tasks(1, 1, kind="sequence", seed=1, **SIZES).tasks[0]
    named = dict(zip(TASKS, (*planted[:3], spelled, written), strict=True))
    return _write_inputs(folder, named, {"out": str(folder / "run")})


def make_mixed_inputs(folder: Path, names: Sequence[str], *, n_test: int) -> Path:
    """A recipe of two tasks of opposed rules, the second one again with longer answers, and one of free text."""
    sizes = {"n_train": 16, "n_validation": 8, "n_test": n_test}
    planted = make_planted_tasks(2, 1, **sizes).tasks
    spelled = make_planted_tasks(2, 1, kind="options", **sizes).tasks[1]
    written = make_planted_tasks(1, 1, kind="sequence", seed=1, **sizes).tasks[0]
    return _write_inputs(folder, dict(zip(names, (*planted, spelled, written), strict=True)), {})


def _write_inputs(folder: Path, tasks: dict[str, Task], changes: dict[str, Any]) -> Path:
    save_model(folder / "model")
    (folder / "tasks").mkdir()
    for name, task in tasks.items():
        write_task(folder / "tasks", name, task)
    settings = {
        **SETTINGS,
        **changes,
        "data": {"tasks": [str(folder / "tasks")]},
        "model": SETTINGS["model"] | {"name": str(folder / "model")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "recipe.yaml"


def save_model(folder: Path) -> None:
    """Save a random Llama with the tests' tokenizer."""
    shape = LlamaConfig(
        vocab_size=len(load_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)


def write_task(folder: Path, name: str, task: Task) -> None:
    """Write a planted task as a card and a JSONL file per split."""
    choices = {
        "verbalizer": {"doc_to_choice": ["no", "yes"]},
        "options": {"doc_to_choice": ["it is not so", "it is so"], "length_normalization": "tokens"},
    }
    card = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: f"{name}.{split}.jsonl" for split in SPLITS}},
        **{f"{key}_split": split for key, split in zip(("training", "validation", "test"), SPLITS, strict=True)},
        "doc_to_text": "Words: {{text}}\nAnswer:",
        "doc_to_target": "label",
        "output_type": task.card.output_type,
        **choices.get(task.card.scoring or "", {}),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    for split in SPLITS:
        rows = [
            {"text": e.context.removeprefix("Words: ").partition("\n")[0], "label": e.choices[e.label].strip()}
            for e in task.splits[split]
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")


def edit_rows(path: Path, edit: Any) -> None:
    """Apply a function to every row of a JSONL file, given its number."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(edit(number, row)) + "\n" for number, row in enumerate(rows))
    path.write_text(text, encoding="utf-8")


def flip(label: str) -> str:
    """The other answer, of either kind of task."""
    return {"no": "yes", "yes": "no", "it is so": "it is not so", "it is not so": "it is so"}[label]


def read_config(recipe: Path, **changes: Any) -> RunConfig:
    """Read a recipe, with some sections changed: ``training={"num_train_epochs": 1}``."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return parse_config(values)


@cache
def finished_run() -> Path:
    """The folder that holds the recipe, its inputs, and the finished run in ``run``; not to be changed."""
    folder = Path(tempfile.mkdtemp(prefix="ensemblelora-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pipeline.run(read_config(make_inputs(folder)))
    return folder


def copy_run(folder: Path) -> Path:
    """Copy the finished run and its inputs into ``folder``, and return the recipe's path."""
    shutil.copytree(finished_run(), folder, dirs_exist_ok=True)
    recipe = folder / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values |= {"out": str(folder / "run"), "data": {"tasks": [str(folder / "tasks")]}}
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe


def read_json(folder: Path, name: str) -> Any:
    """Read a file of the run beside a recipe."""
    return artifacts.read_json(folder / "run" / name)


def tensors_of(folder: Path, names: Sequence[str] = ()) -> dict[str, bytes]:
    """The weights files of the run's adapters, byte by byte."""
    files = sorted((folder / "run" / "adapters").glob("*/adapter_model.safetensors"))
    return {file.parent.name: file.read_bytes() for file in files if not names or file.parent.name in names}
