"""The paper's analyses from the command line to their pages and the paper's tables, on a tiny model."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemblelora import artifacts, pipeline
from ensemblelora.analysis import linearization
from ensemblelora.analysis.page import compose_analysis, write_page
from ensemblelora.analysis.record import find_analysis, make_request, read_options, read_result
from ensemblelora.analysis.registry import ANALYSES
from ensemblelora.analysis.request import AnalysisRequest
from ensemblelora.analysis_forecast import forecast_analysis
from ensemblelora.cli import main
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import dump_config
from ensemblelora.console import round_floats
from ensemblelora.data.loading import load_tasks
from ensemblelora.errors import ConfigError, OutputError, StoreError, UsageError
from ensemblelora.journal import Journal
from ensemblelora.report.build import render_html
from ensemblelora.reproduction.shape import judge_order, list_orders
from ensemblelora.reproduction.tables import EXHIBITS, reproduce
from tests.tiny_run import make_inputs, read_config

NAMES = ("family0_task0", "family1_task0", "family1_task1")
LINEARIZATION = ("n_subsets=2", "subset_size=2", "ranks=[]", "epochs=[]", "base_methods=[bottleneck]", "max_rows=3",
                 "reduction=4", "distances=[0.0005, 0.0025, 0.05, 5.0]")  # fmt: skip
TRANSFER = ("base_methods=[lora]", "pairs=2", "methods=[mtl-ft]", "averages=[plain, exact]", "n_adapters=[1, 2]")
BARE = ("n_subsets=2", "subset_size=1", "ranks=[]", "epochs=[]", "base_methods=[]", "oracle=false", "native=false",
        "max_rows=2", "distances=[0.01]")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _light() -> Iterator[None]:
    """Spare what takes longer than to train a tiny model: searches for garbage in all modules."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with few rows."""
    folder = tmp_path_factory.mktemp("inputs")
    full = make_inputs(folder)
    cards = [folder / "tasks" / f"{name}.yaml" for name in NAMES]
    data = {"tasks": [str(card) for card in cards], "max_train_examples": 8}
    config = read_config(full, data=data, boosting={"n_rounds": 0}, out=str(folder / "run"))
    (folder / "few.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder / "few.yaml"


def analyze(recipe: Path, home: Path, name: str, options: tuple[str, ...], *more: str) -> int:
    given = [part for option in options for part in ("--with", option)]
    return main(["analyze", name, str(recipe), "--out", str(home), *given, "--quiet", *more])


@pytest.fixture(scope="module")
def home(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both analyses in one folder, the second with two seeds."""
    folder = tmp_path_factory.mktemp("home") / "analyses"
    assert analyze(recipe, folder, "linearization", LINEARIZATION) == 0
    assert analyze(recipe, folder, "transfer", TRANSFER, "--seeds", "2") == 0
    return folder


def test_linearization_measures_every_variant_seed_and_subset(home: Path):
    result = read_result(home, "linearization")
    variants = {(r["base"], r["r"], r["epochs"], r["precision"]) for r in result["ends"]}
    # The model is float32: measuring in its own precision is the same; it is done where it is asked for.
    assert variants == {
        ("lora", 4, 2, "float32"), ("lora", 4, 2, "native"), ("bottleneck", None, 2, "float32"),
    }  # fmt: skip
    assert all(row["n_adapters"] == 2 for row in result["ends"])
    kinds = {cell["kind"] for cell in result["cells"]}
    assert kinds == {"path", "end", "line", "dual", "projected"}
    own = [c for c in result["cells"] if c["kind"] in ("dual", "projected")]
    assert {(c["base"], c["r"], c["epochs"]) for c in own} == {("lora", 4, 2)}
    asked = {cell["asked"] for cell in result["cells"] if cell["kind"] == "line"}
    assert asked == {0.0005, 0.0025, 0.05, 5.0}
    assert all(c["distance"] == pytest.approx(c["asked"], rel=1e-5) for c in result["cells"] if c["asked"])


def test_near_theta0_the_expansion_is_right_and_far_away_worthless(home: Path):
    result = read_result(home, "linearization")
    lines = [r for r in result["by_distance"] if r["kind"] == "line" and r["precision"] == "float32" and r["r"] == 4]
    near = [row["r2_over_zero_order"]["value"] for row in lines if row["asked"] == 0.0005]
    far = [row["r2_over_zero_order"]["value"] for row in lines if row["asked"] == 5.0]
    assert min(near) > 0.99 and max(far) < 0.5
    slopes = [
        r["exponent"]["value"]
        for r in result["law"]
        if r["kind"] == "line" and r["base"] == "lora" and r["to"] == 0.0025
    ]
    assert slopes == pytest.approx([2.0] * len(slopes), abs=0.35)
    (broken,) = [
        r
        for r in result["breaks"]
        if r["kind"] == "line" and r["epochs"] == 2 and r["r"] == 4 and r["precision"] == "float32"
    ]
    assert 0.0025 < broken["r2_below_0.9"] <= broken["r2_below_0.5"] < 5.0
    for row in result["distances"]:
        assert 0 < row["distance"]["value"] < row["distance_adapter"]["value"]


def test_a_finished_analysis_is_found_again_without_a_training(recipe: Path, home: Path, monkeypatch, capsys):
    before = read_result(home, "linearization")
    monkeypatch.setattr(Pool, "_train", None)
    monkeypatch.setattr(linearization, "_measure", lambda *_: pytest.fail("measured again"))
    assert analyze(recipe, home, "linearization", LINEARIZATION, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["cells"] == round_floats(before["cells"]) and shown["costs"] == round_floats(before["costs"])


def test_an_analysis_that_was_broken_off_goes_on(recipe: Path, tmp_path: Path, monkeypatch):
    whole, real, measured = linearization._measure, Journal.add, []

    def stop_after_one(*args: Any) -> Any:
        if measured:
            raise KeyboardInterrupt
        measured.append(args)
        return whole(*args)

    monkeypatch.setattr(linearization, "_measure", stop_after_one)
    with suppress(KeyboardInterrupt):  # what becomes of it, the program's last line decides
        assert analyze(recipe, tmp_path, "linearization", BARE) != 0
    assert not (tmp_path / "linearization" / "result.json").exists()
    journal = tmp_path / "linearization" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 1
    with journal.open("a", encoding="utf-8") as stream:
        stream.write('{"identity": "half a li')
    monkeypatch.setattr(linearization, "_measure", whole)
    added = []
    monkeypatch.setattr(Journal, "add", lambda self, *args: added.append(args) or real(self, *args))
    assert analyze(recipe, tmp_path, "linearization", BARE) == 0
    assert len(added) == 1 and read_result(tmp_path, "linearization")["ends"][0]["n_adapters"] == 2
    bare = ("base_methods=[lora, full]", "pairs=0", "methods=[]", "averages=[]", "n_adapters=[1]")
    assert analyze(recipe, tmp_path, "transfer", bare) == 0
    found = read_result(tmp_path, "transfer")
    assert found["map"] is None and list(found["memory"]) == ["lora"]
    lora, full = found["bases"]["lora"], found["bases"]["full"]
    assert lora["pairs"] is None is full["pairs"] and set(full["methods"]) == {"shared"}
    assert full["methods"]["shared"]["flops"] > lora["methods"]["shared"]["flops"]
    assert full["methods"]["shared"]["weight_bytes"] < lora["methods"]["shared"]["weight_bytes"]
    assert "One seed" in (tmp_path / "transfer.md").read_text(encoding="utf-8")


def test_transfer_has_rates_of_everything_with_intervals(home: Path):
    result = read_result(home, "transfer")
    assert list(result["bases"]) == ["lora"] and result["tasks"] == list(NAMES)
    lora = result["bases"]["lora"]
    assert set(lora["methods"]) == {"shared", "single", "average", "mtl-ft"}
    assert set(lora["averages"]) == {"plain", "exact"}
    assert len(lora["pairs"]["cells"]) == 4 and len(lora["all"]["cells"]) == 3
    assert lora["pairs"]["has_seed_noise"] and {cell["n_runs"] for cell in lora["pairs"]["cells"]} == {2}
    rate = lora["all"]["rate"]
    signs = np.mean([cell["difference"] < 0 for cell in lora["all"]["cells"]])
    assert rate["value"] == pytest.approx(signs) and rate["decided_low"] <= rate["value"] <= rate["decided_high"]
    assert lora["methods"]["shared"]["transfer"] == lora["all"]
    assert lora["methods"]["single"]["transfer"] is None
    costs = {name: method["flops"] for name, method in lora["methods"].items()}
    assert costs["mtl-ft"] > costs["shared"] and costs["average"] == costs["single"]


def test_the_map_has_every_direction_and_what_the_oracle_says(home: Path):
    found = read_result(home, "transfer")["map"]
    assert found["base"] == "lora" and len(found["cells"]) == 4
    assert {(c["task"], c["partner"]) for c in found["cells"]} == {
        (a, b) for c in found["cells"] for a, b in (c["subset"], c["subset"][::-1])
    }
    gains = found["gains"]
    measured, predicted = (
        [s * c[key] for c in found["cells"]] for s, key in ((-1, "difference"), (1, "predicted_gain"))
    )
    assert gains["pearson"]["value"] == pytest.approx(np.corrcoef(measured, predicted)[0, 1])
    assert found["one_or_all"]["tasks"] and found["losses"]["n_cells"] == 4 and found["signs"]["n_cells"] == 4


def test_what_was_trained_for_one_analysis_is_used_by_another(recipe: Path, home: Path):
    costs = read_result(home, "transfer")["costs"]
    assert costs["training"]["n"] == 2 * (3 + 2 + 1 + 3), "singles, pairs, all, and those that go on, for two seeds"
    adapters = [path for path in (home / "pools").rglob("trained.json") if "/paths/" not in str(path)]
    assert len(adapters) >= costs["training"]["n"]
    assert not list((home / "pools").rglob("cache")), "activations are let go"


@pytest.mark.parametrize("name", ["linearization", "transfer"])
def test_a_page_needs_no_network_and_trusts_no_name(home: Path, name: str):
    result = read_result(home, name)
    page = (home / f"{name}.html").read_text(encoding="utf-8")
    assert "family1_task0" in page and "http://" not in page.split("<script")[0].replace("http://www.w3.org", "")
    text = (home / f"{name}.md").read_text(encoding="utf-8")
    assert f"ensemblelora analyze {name} CONFIG --seeds {len(result['seeds'])} --with" in text
    nasty = json.loads(json.dumps(result).replace("family1_task0", "<b>first</b>"))
    assert write_page(home, ANALYSES[name], nasty) == home / f"{name}.html"
    page = (home / f"{name}.html").read_text(encoding="utf-8")
    assert "<b>first" not in page and "&lt;b&gt;first" in page
    document = compose_analysis("x", ANALYSES[name], result)
    assert len({figure.name for figure in document.figures}) == len(document.figures) >= 3
    assert render_html(document) != page and write_page(home, ANALYSES[name], result)


def test_a_forecast_prices_every_part_and_writes_nothing(recipe: Path, tmp_path: Path, capsys, monkeypatch):
    folder = tmp_path / "nothing"
    options = ("base_methods=[lora, full]", *TRANSFER[1:])
    assert analyze(recipe, folder, "transfer", options, "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["lora", "full", "total"] and not folder.exists()
    # Singles, pairs and all; those that go on from the shared one.
    assert shown["lora"]["fine_tunings"] == 3 + 2 + 1 + 3 and shown["full"]["fine_tunings"] == 6
    assert (
        shown["full"]["flops"] / shown["full"]["fine_tunings"] > shown["lora"]["flops"] / shown["lora"]["fine_tunings"]
    )
    for key in ("flops", "seconds"):
        assert shown["total"][key] == pytest.approx(shown["lora"][key] + shown["full"][key])
    analysis = find_analysis("linearization")
    options, config = read_options(analysis, (*LINEARIZATION, "ranks=[1]")), read_config(recipe)
    one, two = (
        forecast_analysis(analysis, make_request(analysis, config, options, n_seeds=n, home=folder)) for n in (1, 2)
    )
    assert two["total"]["fine_tunings"] == 2 * one["total"]["fine_tunings"]
    loaded: list[Any] = []
    monkeypatch.setattr(
        "ensemblelora.stages.request.load_tasks", lambda *some, **more: loaded.append(some) or load_tasks(*some, **more)
    )
    assert set(forecast_analysis(analysis, make_request(analysis, config, options, n_seeds=1, home=folder))) == set(one)
    assert len(loaded) == 1, "rows are read once for all parts"
    assert {"lora, r 4, 2 epochs", "lora, r 1, 2 epochs: measuring", "bottleneck, 2 epochs", "total"} <= set(one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "magic"], "analysis 'magic': expected one of linearization, transfer"),
        (["analyze", "transfer", "--with", "pears=2"], "pears"),
        (["analyze", "transfer", "--with", "pairs"], "expected KEY=VALUE"),
        (["analyze", "transfer", "--with", "pairs=[1"], "not valid YAML"),
        (["analyze", "transfer", "--with", "methods=[magic]"], "unknown methods magic"),
        (["analyze", "transfer", "--with", "base_methods=[magic]"], "base methods 'magic'"),
        (["analyze", "linearization", "--seeds", "0"], "0 seeds: expected 1 to 100"),
        (["analyze", "linearization", "--set", "gradients.linearize_at=warmup"], "starts every adapter at theta0"),
        (["analyze", "linearization", "--set", "adapter.method=ia3", "--set", "adapter.r=8", "--set",
          "adapter.lora_alpha=16"], "ranks: adapter.method ia3 has none"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_in_one_line(recipe: Path, tmp_path: Path, capsys, arguments, message):
    arguments = [*arguments[:2], str(recipe), *arguments[2:]]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    shown = capsys.readouterr().err.strip()
    assert message in shown and len(shown.splitlines()) == 1


def test_a_folder_that_holds_something_else_is_left_alone(recipe: Path, tmp_path: Path, capsys):
    artifacts.RunFolder.create(tmp_path / "run")
    assert analyze(recipe, tmp_path / "run", "transfer", ()) == 2
    assert "holds a run or a comparison" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no result of analysis transfer"):
        read_result(tmp_path, "transfer")
    artifacts.write_json(tmp_path / "transfer" / "result.json", {"analysis": "sharpness"})
    with pytest.raises(StoreError, match="no result of analysis transfer"):
        read_result(tmp_path, "transfer")


def test_a_request_knows_its_run_and_uses_its_oracle(recipe: Path, tmp_path: Path):
    config = read_config(recipe, out=str(tmp_path / "run"))
    pipeline.run(config, until="affinity")
    options = ANALYSES["transfer"].options()
    request = AnalysisRequest("transfer", config, options, seeds=[0], home=tmp_path / "a", run=tmp_path / "run")
    pool = request.open_pool()
    oracle = request.prepare_oracle(pool)()
    assert oracle.task_names == pool.rows.names and not pool.plan_folder.exists()
    pool = request.open_pool(changes={"training": {"num_train_epochs": 1}})
    request.prepare_oracle(pool)
    assert pool.plan_folder.exists(), "the run's oracle simulates another training"
    assert request.count_costs()["measuring"]["flops"] > 0
    request.close()


def test_help_names_every_analysis_and_loads_no_torch():
    code = "import sys; from ensemblelora.cli import main; main(['analyze', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
    assert all(name in done.stdout for name in ANALYSES)


# The journal.


def test_a_journal_gives_back_what_it_was_given_and_drops_half_a_line(tmp_path: Path):
    path = tmp_path / "deep" / "journal.jsonl"
    journal = Journal(path)
    assert journal.find("a") is None
    assert journal.add("a", {"result": [1, (2, 3)]})["result"] == [1, [2, 3]] == journal.find("a")["result"]
    journal.add("b", {"result": None})
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"identity": "c", "resu')
    again = Journal(path)
    assert again.find("a") == journal.find("a") and again.find("c") is None
    again.add("c", {"result": 1})
    assert [json.loads(line)["identity"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="Out of range"):
        again.add("d", {"result": float("nan")})
    path.write_text("not json\n" + path.read_text(), encoding="utf-8")
    with pytest.raises(StoreError, match=r"journal\.jsonl line 1"):
        Journal(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        Journal(tmp_path / "file" / "journal.jsonl").add("a", {})


# The paper's tables.


def test_orders_agree_disagree_or_stay_open():
    low, mid, high = ({"value": v, "low": v - 0.4, "high": v + 0.4} for v in (1.0, 1.5, 3.0))
    assert judge_order(high, low) == "agrees" and judge_order(low, high) == "disagrees"
    assert judge_order(mid, low) == "undecided" and judge_order({**high, "low": None}, low) == "undecided"
    lines = list(list_orders("size", {"a": low, "b": high, "c": mid}, {"a": 3.0, "b": 5.0, "c": 3.0, "d": 9.0}))
    assert lines == [
        "size: the paper has b above a; ours agrees",
        "size: the paper has b above c; ours agrees",
        "size: of 2 orders of the paper, 2 agrees, 0 disagrees, 0 undecided",
    ]


@pytest.mark.parametrize("exhibit", ["table2", "table5", "figure2"])
def test_tables_of_the_expansion_have_ours_beside_the_papers(home: Path, exhibit: str):
    made = reproduce(exhibit, [home])
    assert made.rows and {row["run"] for row in made.rows} == {home.name}
    lora = [row for row in made.rows if row["adapter"] == "lora" and row["r"] == 4 and row["epochs"] == 2]
    result = read_result(home, "linearization")
    if exhibit == "table2":
        assert lora[0]["paper Llama-3-1B"] == 0.0016 and lora[0]["mean"] < lora[0]["over the adapter's initial norm"]
        assert any("the paper has lora above bottleneck" in note for note in made.notes)
    if exhibit == "table5":
        assert [row["paper, smallest model"] for row in lora] == [9.1e-4, 5.4e-3, None, None]
        assert any(
            "a remainder of second order 625 times" in note and "in the paper 5.93 times" in note for note in made.notes
        )
    if exhibit == "figure2":
        end = next(row for row in result["ends"] if row["r"] == 4 and row["epochs"] == 2)
        assert (
            lora[0]["paper, at most"] == 0.01 and lora[0]["mean squared relative"] == end["squared_relative"]["value"]
        )


def test_tables_of_transfer_have_ours_beside_the_papers(home: Path, tmp_path: Path, capsys):
    result = read_result(home, "transfer")
    bases = {"full": result["bases"]["lora"] | {"averages": {}}, **result["bases"]}
    artifacts.write_json(tmp_path / "transfer" / "result.json", result | {"bases": bases})
    made = reproduce("sectionB.6", [tmp_path])
    cells = {(row["row"], row["column"]): row for row in made.rows}
    assert cells["pairs", "lora"]["paper"] == 0.38 and cells["all tasks", "full"]["paper"] == 0.60
    assert cells["pairs worse", "lora"]["paper"] == pytest.approx(27 / 45)
    assert cells["pairs worse", "lora"]["ours"] == pytest.approx(1 - result["bases"]["lora"]["pairs"]["rate"]["value"])
    assert cells["pairs, averaged A and B", "lora"]["paper"] is None
    assert cells["memory of one more adapter", "lora"]["paper"] == 2.8e9
    assert any("above averaging two adapters" in note for note in made.notes)
    assert any("pairs: the paper has full above lora; ours undecided" in note for note in made.notes)
    rate = result["bases"]["lora"]["pairs"]["rate"]
    verdict = "holds that" if rate["low"] <= 0.38 <= rate["high"] else "leaves that out"
    assert any("pairs, lora: the paper has 38%; ours" in note and note.endswith(verdict) for note in made.notes)
    assert any("2 of 3 pairs, tasks alike often" in note for note in made.notes)
    made = reproduce("figure11", [home / "transfer"])
    assert {row["column"] for row in made.rows} == {f"lora: {n}" for n in ("shared", "single", "average", "mtl-ft")}
    assert main(["reproduce", "figure11", str(home), "--quiet"]) == 0
    assert "figure11: Positive transfer" in capsys.readouterr().out
    assert {"figure11", "sectionB.6"} <= set(EXHIBITS)
    with pytest.raises(ConfigError):
        read_options(find_analysis("transfer"), ["tolerance=-1"])


def test_a_misspelt_analysis_is_guessed():
    with pytest.raises(UsageError, match=r"analysis 'linearisation': expected one of .*; did you mean linearization\?"):
        find_analysis("linearisation")
