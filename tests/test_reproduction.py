"""Tables and figures of the paper, made from comparisons: its numbers as printed, ours from the records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from benchmarks import record_comparison
from ensemblelora import artifacts
from ensemblelora.cli import main
from ensemblelora.comparison.page import describe_study, write_page
from ensemblelora.comparison.record import Primary
from ensemblelora.config import dump_config, parse_config
from ensemblelora.errors import StoreError, UsageError
from ensemblelora.reproduction import paper
from ensemblelora.reproduction.exhibit import Reproduction, name_base_method
from ensemblelora.reproduction.pairs import count_worse_pairs
from ensemblelora.reproduction.tables import EXHIBITS, reproduce
from ensemblelora.validation.records import TrueRun, append_run
from tests.study_records import make_study, make_tasks

SKILLS = {
    "base": 0.5, "shared": 0.7, "mtl-ft": 0.8, "mtl-ft-ensemble": 0.82, "tag": 0.75, "gradient-cosine": 0.76,
    "full": 0.79, "ours": 0.85,
}  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the paper's tasks and one of our own, a base in 4 bits."""
    tasks = [
        task.__class__(**vars(task) | {"name": name})
        for task, name in zip(make_tasks(), ("boolq", "wsc", "own"), strict=True)
    ]
    folder = tmp_path_factory.mktemp("compared") / "qlora"
    return make_study(
        folder,
        skills=SKILLS,
        tasks=tasks,
        primary=[Primary("ours", "shared")],
        config={"model": {"quantization": "nf4"}},
    )


def cells_of(made: Reproduction) -> dict[tuple[str, str], Mapping[str, object]]:
    return {(str(row["row"]), str(row["column"])): row for row in made.rows}


def mean_of(folder: Path, method: str) -> float:
    numbers = [artifacts.read_json(folder / "records" / f"{method}-seed-{seed}.json")["correct"] for seed in range(3)]
    return float(np.mean([[np.mean(values) for values in record.values()] for record in numbers]))


def test_the_papers_lines_add_up_as_far_as_they_do() -> None:
    # Its printed averages: those of ten tasks where all are printed, and known not to be the means in table 6.
    for table, expected in ((paper.TABLE_6, {"qlora": 0.8661, "mtl-ft": 0.9105, "ours": 0.8925}),):
        for name, mean in expected.items():
            accuracies = [value for value, _ in table[name].accuracy.values()]
            assert len(accuracies) == 10 and np.mean(accuracies) == pytest.approx(mean, abs=5e-4)
    lines = [np.mean([value for value, _ in line.accuracy.values()]) for line in paper.TABLE_7.values()]
    assert lines == pytest.approx([0.8725, 0.8810], abs=5e-5)
    assert {len(line.accuracy) for line in paper.TABLE_4.values()} == {7}
    assert all(
        paper.TABLE_4["ours"].accuracy[task] == paper.TABLE_7["ours"].accuracy[task]
        for task in paper.TABLE_4["ours"].accuracy
    )
    assert paper.TABLE_4["ours"].flops / paper.TABLE_4["qlora"].flops == pytest.approx(1.09, abs=0.005)
    assert set(paper.TABLE_4["ours"].accuracy) == set(paper.TASKS) - {"rte", "wic", "wsc"}


@pytest.mark.parametrize("exhibit", ["table1", "table4", "table6", "table7", "figure4", "figure7", "section2.1"])
def test_every_exhibit_names_model_sizes_and_epochs(compared: Path, exhibit: str) -> None:
    made = reproduce(exhibit, [compared])
    assert made.rows and made.exhibit == exhibit
    (line,) = [note for note in made.notes if note.startswith("qlora: ")]
    assert line == (
        "qlora: smollm2-135m (itself a dequantised 4-bit file), qlora, 90 to 92 train, 30 validation, 40 test rows a "
        "task, 3 epochs, 3 seeds"
    )
    assert any(note.startswith("The paper: ") for note in made.notes)
    assert {row["folder"] for row in made.rows} == {"qlora"}
    assert all(set(row) == {"folder", "row", "column", "unit", "ours", "sd", "paper"} for row in made.rows)


def test_table_4_has_ours_beside_the_papers(compared: Path) -> None:
    cells = cells_of(reproduce("table4", [compared]))
    assert cells["average", "ours"]["ours"] == pytest.approx(mean_of(compared, "ours"))
    assert [cells["average", name]["paper"] for name in ("shared", "mtl-ft", "tag", "full", "ours")] == [
        0.786, 0.894, 0.881, 0.846, 0.886,
    ]  # fmt: skip
    assert cells["boolq", "shared"]["paper"] == 0.82, "QLoRA's line, as the base is in 4 bits"
    assert cells["wsc", "ours"]["paper"] is None and cells["wsc", "ours"]["ours"] is not None
    assert cells["cb", "ours"]["ours"] is None and cells["own", "ours"]["paper"] is None
    assert cells["x one adapter", "mtl-ft"]["ours"] == pytest.approx(2.0)
    assert cells["x one adapter", "mtl-ft"]["paper"] == pytest.approx(2.0)
    assert cells["memory", "ours"]["paper"] == 21.4e9


def test_the_papers_line_for_one_adapter_is_that_of_the_base_method(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "lora", skills={"shared": 0.7})
    cells = cells_of(reproduce("table4", [folder]))
    assert cells["average", "shared"]["paper"] == 0.816 and cells["average", "ours"]["ours"] is None
    ratios = [cells["x one adapter", name]["paper"] for name in ("shared", "mtl-ft", "ours")]
    assert ratios == pytest.approx([1.0, 2.0, 1.09], abs=0.01), "its MTL-FT and ours are on QLoRA, whatever ours is"
    packed = make_study(tmp_path / "bottle", skills={"shared": 0.7}, config={"adapter": {"method": "bottleneck"}})
    assert cells_of(reproduce("table4", [packed]))["average", "shared"]["paper"] is None
    both = reproduce("table4", [folder, packed])
    assert [row["folder"] for row in both.rows if row["row"] == "average" and row["column"] == "ours"] == [
        "lora",
        "bottle",
    ]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "lora"),
        ({"model": {"quantization": "nf4"}}, "qlora"),
        ({"adapter": {"method": "bottleneck"}}, "bottleneck"),
        ({"adapter": {"method": "bottleneck"}, "model": {"quantization": "nf4"}}, "quantised bottleneck"),
    ],
)
def test_base_methods_have_the_papers_names(config: dict[str, object], name: str) -> None:
    assert name_base_method(parse_config({"data": {"tasks": ["a"]}} | config)) == name
    assert name in paper.DISTANCE and name in paper.WORSE_PAIRS


def test_table_1_counts_in_trainings_of_one_adapter(compared: Path) -> None:
    cells = cells_of(reproduce("table1", [compared]))
    assert cells["runtime (T)", "shared"]["ours"] == 1 and cells["runtime (T)", "mtl-ft"]["paper"] == 2
    assert cells["memory (A)", "mtl-ft"]["paper"] == 3, "as many adapters as tasks"
    assert cells["runtime (T)", "ours"]["ours"] == pytest.approx(7.1)
    assert cells["runtime (T)", "ours"]["paper"] == pytest.approx(1.1), "T + G, with G as measured"
    with pytest.raises(UsageError, match="compare the method shared"):
        reproduce("table1", [make_study(compared.parent / "alone", skills={"ours": 0.8})])


def test_table_7_figure_4_and_figure_7_are_from_the_same_records(compared: Path) -> None:
    cells = cells_of(reproduce("table7", [compared]))
    assert cells["average", "gradient-cosine"]["ours"] == pytest.approx(mean_of(compared, "gradient-cosine"))
    assert cells["wsc", "gradient-cosine"]["paper"] == pytest.approx(0.796)
    cells = cells_of(reproduce("figure4", [compared]))
    assert cells["error", "ours"]["ours"] == pytest.approx(1 - mean_of(compared, "ours"))
    assert cells["error", "ours"]["paper"] == pytest.approx(0.114)
    cells = cells_of(reproduce("figure7", [compared]))
    gain = mean_of(compared, "ours") - mean_of(compared, "shared")
    assert cells["accuracy over shared", "ours"]["ours"] == pytest.approx(gain)
    assert cells["flops over ours", "mtl-ft"]["paper"] == pytest.approx(1 / 0.54)
    assert cells["flops over ours", "mtl-ft"]["ours"] == pytest.approx(2e9 / 7.1e9)
    cells = cells_of(reproduce("section2.1", [compared]))
    gain = mean_of(compared, "mtl-ft-ensemble") - mean_of(compared, "shared")
    assert cells["accuracy over one adapter", "mtl-ft-ensemble"]["ours"] == pytest.approx(gain)
    assert cells["accuracy over one adapter", "mtl-ft-ensemble"]["paper"] == 0.108
    memory = cells["memory over one adapter", "mtl-ft-ensemble"]
    assert memory["ours"] == pytest.approx(1.0) and memory["paper"] == 4.0, "of processes, as the paper's is of a GPU"
    kept = cells["adapter bytes over one adapter", "mtl-ft-ensemble"]
    assert kept["ours"] == pytest.approx(3.0) and kept["paper"] is None, "what adapters take is another thing"


def true_run(tasks: tuple[str, ...], nll: Mapping[str, float], seed: int = 0) -> TrueRun:
    return TrueRun(
        identity="-".join([*tasks, str(seed)]),
        tasks=tasks,
        seed=seed,
        nll={task: [nll[task]] * 3 for task in tasks},
        correct={task: [1.0] * 3 for task in tasks},
        chance=dict.fromkeys(tasks, 0.5),
        n_steps=1,
        best_step=1,
        distance=0.1,
        relative_distance=0.001,
        flops=1,
        seconds=0.1,
    )


def test_pairs_are_counted_by_halves_and_in_the_mean() -> None:
    singles = [true_run((task,), {task: 1.0}, seed) for task in "abc" for seed in (0, 1)]
    pairs = [
        true_run(("a", "b"), {"a": 1.5, "b": 0.9}),  # one worse, and so their mean
        true_run(("a", "b"), {"a": 1.1, "b": 0.7}, 1),  # the other seed alone would say better in the mean
        true_run(("b", "c"), {"b": 1.1, "c": 1.2}),  # both worse
    ]
    found = count_worse_pairs([*singles, *pairs, true_run(("a", "b", "c"), {"a": 9.0, "b": 9.0, "c": 9.0})])
    assert found == {"pairs": 2, "worse": 1.5, "worse_in_mean": 2}
    assert count_worse_pairs(singles) is None
    rng = np.random.default_rng(0)
    losses = {pair: dict(zip(pair, rng.normal(1.0, 0.1, 2), strict=True)) for pair in combinations("abc", 2)}
    found = count_worse_pairs([*singles, *(true_run(pair, nll) for pair, nll in losses.items())])
    assert found["worse"] == sum(value > 1 for nll in losses.values() for value in nll.values()) / 2


def test_section_2_1_takes_validated_runs_for_its_pairs(tmp_path: Path) -> None:
    run = artifacts.RunFolder.create(tmp_path / "run").path
    artifacts.write_text(run / "config.yaml", dump_config(parse_config({"data": {"tasks": ["a", "b"]}})))
    artifacts.write_json(run / "validation" / "validation.json", {})
    with pytest.raises(UsageError, match=r"no pair of tasks was fine-tuned; run with affinity\.subset_size=2"):
        reproduce("section2.1", [run])
    for one in (
        true_run(("a",), {"a": 1.0}),
        true_run(("b",), {"b": 1.0}),
        true_run(("a", "b"), {"a": 1.2, "b": 1.2}),
    ):
        append_run(run / "validation" / "truth.jsonl", one)
    cells = cells_of(reproduce("section2.1", [run]))
    assert cells["pairs worse, of 1", "lora"]["ours"] == 1.0
    assert cells["pairs worse, of 1", "lora"]["paper"] == pytest.approx(27 / 45)


def test_an_exhibit_needs_its_folders(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exhibit 'table9': expected one of extension, extension-sizes, figure11"):
        reproduce("table9", [compared])
    with pytest.raises(UsageError, match=r"no comparison \(study.json is missing\)"):
        reproduce("table4", [tmp_path])
    assert list(EXHIBITS)[-1] == "section2.1"


def test_the_command_shows_a_table_a_folder(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table4", str(compared), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "table4: Test accuracy" in shown and "ours | the paper's" in shown and "| 88.6%" in shown
    assert main(["reproduce", "table7", str(compared), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["exhibit"] == "table7"


RECORDS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("exhibit", ["table1", "table4", "table6", "table7", "figure4", "figure7", "section2.1"])
def test_a_record_gives_what_its_folder_gives(compared: Path, tmp_path: Path, exhibit: str) -> None:
    page = write_page(compared)
    outcome = {"study": describe_study(page.study)} | asdict(page.statistics)
    record = record_comparison.collect(json.loads(json.dumps(outcome)), compared, command="-", commit="-")
    path = tmp_path / "qlora.json"
    artifacts.write_json(path, record)
    of_record, of_folder = (reproduce(exhibit, [place]) for place in (path, compared))
    assert of_record.notes == of_folder.notes and len(of_record.rows) == len(of_folder.rows)
    for one, other in zip(of_record.rows, of_folder.rows, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():  # a record's numbers have fifteen digits
            assert one[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value)


@pytest.mark.parametrize("name", ["comparison-cpu", "comparison-opposed"])
def test_the_committed_comparisons_give_the_papers_tables(name: str) -> None:
    record = artifacts.read_json(RECORDS / f"{name}.json")
    cells = cells_of(reproduce("table4", [RECORDS / f"{name}.json"]))
    mean = record["comparison"]["methods"]["ours"]["mean"]["accuracy"]["value"]
    assert cells["average", "ours"]["ours"] == mean and cells["average", "ours"]["paper"] == pytest.approx(0.886)
    assert reproduce("figure7", [RECORDS / f"{name}.json"]).title.endswith("the paper with QAdapter, ours with lora")


def test_what_is_no_record_of_a_comparison_is_refused_with_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such folder or file; give a folder of ensemblelora compare"):
        reproduce("table1", [tmp_path / "nowhere"])
    with pytest.raises(UsageError, match=r"oracle\.json: no record of a comparison; give a folder"):
        reproduce("table1", [RECORDS / "oracle.json"])
    with pytest.raises(UsageError, match=r"section 3\.3 needs what each training kept, and a record has figures alone"):
        reproduce("section3.3", [RECORDS / "comparison-cpu.json"])
    old = artifacts.read_json(RECORDS / "comparison-cpu.json")
    del old["comparison"]["methods"]
    artifacts.write_json(tmp_path / "old.json", old)
    with pytest.raises(StoreError, match=r"old\.json: a record of a comparison of another version"):
        reproduce("table1", [tmp_path / "old.json"])


def test_measurements_are_one_table_with_figures_that_can_be_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    path = RECORDS / "analysis-linearization.json"
    rows = reproduce("table2", [path]).rows
    assert main(["reproduce", "table2", str(path), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("table2: ") == 1 and f"all rows: {path.name}, smollm2-135m, fine-tunings 3" in shown
    for row in rows:
        (line,) = (line for line in shown.splitlines() if f" {row['mean']:.3g} " in line)
        assert line.startswith(str(row["adapter"])) and f"{row['low']:.3g}\u2013{row['high']:.3g}" in line
    assert max(map(len, shown.splitlines())) <= 100


def test_a_tables_cells_stay_on_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["reproduce", "table4", str(RECORDS / "comparison-cpu.json")]) == 0
    lines = capsys.readouterr().out.replace("\u00a0", " ").splitlines()
    flops, memory = (next(line for line in lines if line.startswith(name)) for name in ("FLOPs", "memory"))
    assert flops.count(" T | ") == 3 and flops.count(" E") == 5 and memory.count(" | ") == memory.count(" GB") == 5
    assert not [line for line in lines if "The average of" in line], "it has the paper's ten"
    assert main(["reproduce", "table4", str(RECORDS / "comparison-opposed.json")]) == 0
    assert (
        "The average of comparison-opposed is over 6 tasks, and stands beside one over ten." in capsys.readouterr().out
    )


@pytest.mark.parametrize("exhibit", ["table2", "table3"])
def test_what_is_no_run_is_refused_with_what_would_be_one(exhibit: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run folder; give one that `ensemblelora validate` has measured"):
        reproduce(exhibit, [tmp_path])
