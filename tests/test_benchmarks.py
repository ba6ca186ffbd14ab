"""What the benchmarks of speed make of their measurements, and what the README makes of their records."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ensemblelora.adapters import add_adapter, attach, save_adapter
from ensemblelora.config import AdapterConfig
from ensemblelora.ensemble import Ensemble, Member, save_ensemble
from measured import render_measured, summarize_speed
from tests.tiny import disturb, make_base, make_split

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROUTES = (0, 3)


@pytest.fixture(scope="module")
def inference() -> Iterator[ModuleType]:
    """The script, which finds its neighbours as it does when it is run."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("inference")
    sys.path.remove(str(FOLDER))
    for name in ("inference", "common"):
        sys.modules.pop(name)


@pytest.fixture
def prepared(inference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Members and ensemble as the benchmark's training leaves them, on a tiny model and two tasks."""
    validation, test = (
        tuple(
            make_split("verbalizer", n=n, n_choices=2, seed=seed, task=name, split=split)
            for seed, name in enumerate("ab")
        )
        for n, split in ((4, "validation"), (8, "test"))
    )
    rows = SimpleNamespace(names=("a", "b"), validation=validation, test=test)

    def load(sizes: object, *, layers: str | None = "top_third") -> tuple[Any, Any]:
        settings = AdapterConfig.model_validate({"layers_to_transform": layers})
        return attach(make_base("llama"), settings, seed=0), rows

    monkeypatch.setattr(inference, "_load", load)
    adapted, _ = load(None)
    members = tuple(Member(f"group-{g}", g, "group", 1.0) for g in range(4))
    for seed, name in enumerate([*(member.name for member in members), "booster"]):
        add_adapter(adapted, name)
        disturb(adapted, name, scale=3.0, seed=seed)
        save_adapter(adapted, name, tmp_path / name)
    weights = ((1.0, 0.0, 0.0, 0.0), (0.1, 0.2, 0.3, 0.4))
    ensemble = Ensemble(("a", "b"), ((0,), (1,), (), ()), members, weights, (True, False), "logits")
    save_ensemble(ensemble, tmp_path / "ensemble.json", routes=ROUTES)
    return tmp_path


def measure_passes(inference: ModuleType, folder: Path, system: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Score with one system, and list the adapters that ran for each task."""
    from ensemblelora import ensemble

    seen: dict[str, tuple[str, ...]] = {}
    predict = ensemble.predict_members

    def spy(adapted: Any, split: Any, names: Any, **options: Any) -> Any:
        seen[split.task] = tuple(names)
        return predict(adapted, split, names, **options)

    monkeypatch.setattr(ensemble, "predict_members", spy)
    layout = next(name for name, systems in inference.LAYOUTS.items() if system in systems)
    monkeypatch.setitem(inference.LAYOUTS, layout, (system,))
    return inference.score_all(folder, {"n_test": 4}, layout)[system], seen


FOUR = ("group-0", "group-1", "group-2", "group-3")


@pytest.mark.parametrize(
    ("system", "passes"),
    [
        ("one", (("group-0",), ("group-0",))),
        ("exact", (FOUR, FOUR)),  # a weight of zero spares no pass here
        ("booster", ((*FOUR[:3], "booster", "theta0"),) * 2),
        ("routed", (("group-0",), ("group-3",))),
        ("folded", (("folded",), ("folded",))),
        ("folded-per-task", (("folded-0",), ("folded-1",))),
        ("one-all-layers", (("group-0",), ("group-0",))),
        ("exact-all-layers", (FOUR, FOUR)),
    ],
)
def test_each_system_runs_what_it_is_said_to_run(inference, prepared, monkeypatch, system, passes):
    found, seen = measure_passes(inference, prepared, system, monkeypatch)
    assert (seen["a"], seen["b"]) == passes
    assert ("accuracy" in found) == (not system.endswith("all-layers"))
    assert found["batch_seconds"] > 0 and found["single_seconds"] > 0


def test_one_fold_for_all_is_of_the_mean_weights_and_one_per_task_of_its_own(inference, prepared, monkeypatch):
    found = inference.score_all(prepared, {"n_test": 4}, "top-third")
    nll = {system: found[system]["rows"]["nll"] for system in ("one", "folded", "folded-per-task")}
    np.testing.assert_allclose(nll["folded-per-task"][0], nll["one"][0], rtol=1e-4)  # task a: all weight on group 0
    assert not np.allclose(nll["folded"][0], nll["one"][0], rtol=1e-3)


def test_another_system_begins_each_time_and_all_answer_everything(inference):
    asked: list[tuple[str, int]] = []

    def answer(system: str, task: int, split: Any) -> np.ndarray:
        asked.append((system, task))
        return np.full(1, len(asked))

    scores, seconds = inference._time_in_turn(("one", "exact", "routed"), answer, [(task, None) for task in range(4)])
    assert [system for system, _ in asked[::3]] == ["one", "exact", "routed", "one"]
    assert sorted(asked) == sorted((system, task) for system in scores for task in range(4))
    assert [int(value[0]) for value in scores["exact"]] == [2, 4, 9, 11] and min(seconds.values()) > 0


def entry(seconds: float, right: list[int], *, memory: int = 100) -> dict[str, Any]:
    nll = [0.1 if value else 2.0 for value in right]
    return {
        "batch_seconds": seconds,
        "single_seconds": seconds / 10,
        "accuracy": sum(right) / len(right),
        "test_nll": sum(nll) / len(nll),
        "rows": {"right": [right], "nll": [nll], "groups": [list(range(len(right)))]},
        "peak_memory_bytes": memory,
    }


def make_measurements(inference: ModuleType) -> dict[str, list[dict[str, Any]]]:
    right = {"exact": [1, 1, 1, 0], "routed": [1, 1, 1, 0], "folded": [1, 0, 0, 0], "folded-per-task": [1, 1, 0, 0]}
    seconds = {"one": 2.0, "exact": 4.0, "one-all-layers": 3.0, "exact-all-layers": 12.0}
    found = {
        system: [entry(seconds.get(system, 3.0), right.get(system, [1, 0, 0, 0])) for _ in range(2)]
        for system in inference.SYSTEMS
    }
    for system in ("one-all-layers", "exact-all-layers"):
        found[system] = [
            {key: item[key] for key in ("batch_seconds", "single_seconds", "peak_memory_bytes")}
            for item in found[system]
        ]
    return found


def test_ratios_are_against_one_adapter_of_the_same_layout(inference):
    record = inference.compare(make_measurements(inference))
    for prefix in ("", "single_"):
        ratios = {key: record[f"{prefix}latency_ratio_{key}"] for key in ("exact", "folded", "exact_all_layers")}
        assert ratios == pytest.approx({"exact": 2.0, "folded": 1.5, "exact_all_layers": 4.0})
        assert f"{prefix}latency_ratio_folded_per_task" in record and f"{prefix}latency_ratio_booster" in record
    assert inference.compare_peaks({"one": [100.0, 90.0, 400.0], "exact": [110.0, 500.0, 90.0]})[
        "memory_ratio_exact"
    ] == pytest.approx(1.1)
    assert "rows" not in record["systems"]["exact"] and "accuracy" not in record["systems"]["exact-all-layers"]


def test_what_is_lost_is_against_the_exact_ensemble_with_its_interval(inference):
    record = inference.compare(make_measurements(inference))
    lost = {key: record[f"accuracy_points_lost_{key}"] for key in ("routed", "folded", "folded_per_task")}
    assert lost == pytest.approx({"routed": 0.0, "folded": 50.0, "folded_per_task": 25.0})
    assert record["accuracy_points_lost_routed_interval"] == [0.0, 0.0]
    low, high = record["accuracy_points_lost_folded_interval"]
    assert low < 50 < high
    assert record["nll_rise_folded"] == pytest.approx(0.95)


def spread(mean: float, n: int = 2) -> dict[str, float]:
    return {"mean": mean, "min": mean - 0.5, "max": mean + 0.5} | ({"sd": 0.7} if n > 1 else {})


def make_training(**ratios: float) -> dict[str, Any]:
    def system(n: int) -> dict[str, Any]:
        rate = {"tokens_per_second": spread(100, n), "validation_nll": spread(1.0, n)}
        return rate | {"peak_memory_bytes": spread(2e9, n)}

    systems = {"all, 3 epochs": system(2), "groups-together, 3 epochs": system(2), "stock, 1 epochs": system(1)}
    return {"config": {"rows_per_task": 16, "seeds": 2}, "systems": systems, **ratios}


def write_page(records: dict) -> list[str]:
    """The page of records that say no more than a test needs."""
    known = {"machine": {"n_processors": 2}, "command": "python x.py", "commit": "abc"}
    return list(render_measured({name: known | record for name, record in records.items()}))


def test_the_summary_has_one_line_a_ratio():
    lines = list(summarize_speed({"training": {"speedup_all_layers": 3.96}, "oracle": {}}))
    assert lines[-1] == "| fine-tuning, every layer | Trainer + PEFT, bf16 | 4.0x as fast |" and len(lines) == 4
    record = {"ratio_to_train_step": 1.08, "spread": {"ratio_to_train_step": {"mean": 1.03}}}
    assert "1.03x" in list(summarize_speed({"features": record}))[-1], "the mean, as on the page of what was measured"


def test_every_record_is_shown():
    records = {path.stem: json.loads(path.read_text()) for path in (FOLDER / "results").glob("*.json")}
    commands = {record["command"] for record in records.values()}
    page = "\n".join(write_page(records))
    assert {command for command in commands if f"`{command}`" not in page} == set()


def test_what_the_readme_says_of_records_in_words_is_in_them():
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    opposed, ten = (
        json.loads((FOLDER / "results" / f"{name}.json").read_text())
        for name in ("comparison-opposed", "comparison-cpu")
    )
    told = readme.partition("*Where tasks conflict*")[2].partition("\n\n")[0]
    points = {
        (item["a"], item["b"]): 100 * item["difference"]
        for item in opposed["comparison"]["primary"]
        if item["metric"] == "accuracy" and not item["is_above_chance"]
    }
    shown = (
        ("ours", "shared", ".0f"),
        ("grouped", "random", ".1f"),
        ("ours", "single", ".1f"),
        ("ours", "mtl-ft", ".1f"),
    )
    assert [pair for *pair, form in shown if f" {points[tuple(pair)]:{form}} " not in told.replace("\n", " ")] == []
    told = " ".join(readme.partition("*On the paper's ten datasets*")[2].partition("\n\n")[0].split())
    means = [ten["comparison"]["methods"][name]["mean"] for name in ("shared", "mtl-ft", "ours", "single")]
    losses = [f"{mean['nll']['value']:.3f}" for mean in means]
    places = [told.index(f"{100 * mean['accuracy']['value']:.1f}") for mean in means]
    assert places == sorted(places) and [told.index(loss) for loss in losses] == sorted(map(told.index, losses))
    assert "nothing is told apart" in told and f"{len(ten['comparison']['study']['seeds'])} seeds" == "3 seeds"
    assert all((item["p_holm"] or 0.0) > 0.05 for item in ten["comparison"]["primary"])


def test_brackets_stand_where_there_were_several_seeds():
    lines = write_page({"training": make_training()})
    assert "| ensemblelora, every layer, 3 epochs | 100 [100, 100] | 1.000 [0.500, 1.500] | 2.0 GB |" in lines
    assert "| Trainer + PEFT, their defaults, 1 epoch | 100 | 1.000 | 2.0 GB |" in lines
    assert not any("training.together" in line for line in lines)


def test_ratios_that_a_record_has_are_told_in_a_line():
    text = "\n".join(write_page({"training": make_training(speedup_together=1.25, speedup_compiled=0.5)}))
    assert "(`training.together`): 1.25x" in text and "compiling included: 0.50x" in text


def test_a_new_record_of_inference_gives_every_row_with_both_latencies(inference):
    text = "\n".join(write_page({"inference": inference.compare(make_measurements(inference))}))
    assert "| exact, top third | 2.00x | 2.00x | - | - |" in text
    assert "| folded, one adapter for all tasks, top third | 1.50x | 1.50x | -50.00 [" in text
    assert "| folded, one adapter for each task (ten), top third |" in text
    assert "| exact, every layer (the default) | 4.00x | 4.00x | - | - |" in text
    assert "no difference is shown" in text


def test_an_old_record_of_inference_leaves_out_what_it_does_not_have():
    old = {"latency_ratio_exact": 1.9, "single_latency_ratio_exact": 1.8, "memory_ratio_exact": 1.1}
    old |= {"latency_ratio_folded": 1.06, "accuracy_points_lost_folded": 0.86}  # of one fold per task
    lines = write_page({"inference": old})
    assert "| exact, top third | 1.90x | 1.80x | - | - |" in lines
    assert not any("| folded" in line or "no difference" in line for line in lines)


@pytest.mark.parametrize("has_differences", [True, False])
def test_validation_loss_stands_beside_test_loss(has_differences):
    change = {"accuracy_points": spread(-1.0), "test_nll": spread(0.1), "speedup": 2.0}
    if has_differences:
        change["validation_nll"] = spread(0.25)
    variants = {"all": {"validation_nll": spread(1.0)}, "frozen-a": {"validation_nll": spread(1.25)}}
    record = {"config": {"seeds": 3}, "differences_to_all": {"frozen-a": change}, "variants": variants}
    [row] = [line for line in write_page({"variants": record}) if "| every layer, frozen A" in line]
    brackets = " [-0.250, +0.750]" if has_differences else ""
    assert row == (
        f"| every layer, frozen A | -1.0 [-1.5, -0.5] | +0.100 [-0.400, +0.600] | +0.250{brackets} | 0.50x |"
    )


def test_the_help_needs_no_model(inference, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference.py", "--help"])
    with pytest.raises(SystemExit) as done:
        inference.main()
    assert done.value.code == 0 and "--test-rows" in capsys.readouterr().out


def test_a_question_alone_is_the_row_it_was(inference):
    split = make_split("options", n=5, ragged=True)
    picked = inference.take_examples(split, 1, first=3)
    assert picked.n_examples == 1 and picked.labels.tolist() == [split.labels[3]]
    first = split.example_rows[3]
    np.testing.assert_array_equal(picked.tokens[: picked.row_starts[1]],
                                  split.tokens[split.row_starts[first] : split.row_starts[first + 1]])  # fmt: skip
    assert picked.ids == split.ids[3:4]
