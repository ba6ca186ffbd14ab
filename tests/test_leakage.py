"""What test rows say changes no choice: every command is given other test labels, and chooses and trains the same.

The whole pipeline's own twin is in test_pipeline.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ensemblelora.comparison.record import MethodRecord
from ensemblelora.comparison.study import compare
from ensemblelora.federation.clients import read_client
from ensemblelora.federation.engines import run_federation
from ensemblelora.selection.record import SelectionRecord
from ensemblelora.selection.select import select_sources
from tests.federation_tiny import finished, make_config
from tests.tiny_run import edit_rows, flip, make_inputs, make_mixed_inputs, read_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own
]


def poison(folder: Path) -> None:
    """Turn every answer of every test row around; free text gets other answers."""
    for file in (folder / "tasks").glob("*.test.jsonl"):
        edit_rows(file, lambda _, row: row | {"label": flip(row["label"])})


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.rglob("adapter_model.safetensors")}


def test_poisoned_test_labels_change_nothing_that_select_chooses_or_trains(tmp_path):
    found: list[SelectionRecord] = []
    for name in ("true", "poisoned"):
        recipe = make_mixed_inputs(tmp_path / name, ("family0", "family1", "spelled", "written"), n_test=10)
        if name == "poisoned":
            poison(tmp_path / name)
        config = read_config(recipe, out=str(tmp_path / name / "run"))
        found.append(select_sources(config, "family0", ["forward", "loo"]))
    true, poisoned = found
    assert [choice.sources for choice in poisoned.strategies] == [choice.sources for choice in true.strategies]
    assert [(f.method, f.sources, f.validation_nll) for f in poisoned.finals] == [
        (f.method, f.sources, f.validation_nll) for f in true.finals
    ]
    assert weights_of(poisoned.folder) == weights_of(true.folder) != {}
    accuracies = [record.test.scores["base"].accuracy for record in found]
    assert sum(accuracies) == pytest.approx(1.0), "the poison works"


def test_poisoned_test_labels_change_nothing_that_compare_chooses(tmp_path):
    found: list[dict[str, MethodRecord]] = []
    for name in ("true", "poisoned"):
        recipe = make_inputs(tmp_path / name)
        if name == "poisoned":
            poison(tmp_path / name)
        config = read_config(recipe, training={"num_train_epochs": 1})
        study = compare(config, ["base", "shared", "grouped"], 1, [0.005, 0.02], tmp_path / name / "compared")
        found.append({record.method: record for record in study.record.records})
    for method, true in found[0].items():
        poisoned = found[1][method]
        tried = [[(t.learning_rate, t.validation_nll) for t in record.trials] for record in (poisoned, true)]
        assert tried[0] == tried[1] and poisoned.learning_rate == true.learning_rate
        assert (poisoned.groups, poisoned.validation_nll) == (true.groups, true.validation_nll)
        assert poisoned.nll != true.nll, "the poison works"
    assert weights_of(tmp_path / "true" / "compared") == weights_of(tmp_path / "poisoned" / "compared") != {}


def test_other_test_texts_change_nothing_that_federate_chooses_or_trains(tmp_path):
    folder, true = finished()
    config = make_config(tmp_path)
    for file in (tmp_path / "texts").iterdir():
        parts = read_client(file).split(config.clients)
        turned = [" ".join(reversed(line.split())) for line in parts["test"]]
        file.write_text("\n".join([*parts["train"], *parts["validation"], *turned]) + "\n", encoding="utf-8")
    poisoned = run_federation(config)
    assert (poisoned.served, poisoned.validation) == (true.served, true.validation)
    np.testing.assert_array_equal(poisoned.weights, true.weights)
    assert weights_of(tmp_path / "run") == weights_of(folder / "run") != {}
    assert {name: m.nll for name, m in poisoned.methods.items()} != {name: m.nll for name, m in true.methods.items()}
