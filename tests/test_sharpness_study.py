"""The studies of sharpness and similarity on a tiny model, their pages, and the paper's figures made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemblelora.analysis import similarity_study
from ensemblelora.analysis.generalization import RowLosses
from ensemblelora.analysis.page import write_page
from ensemblelora.analysis.record import carry_out, find_analysis, make_request, read_options, read_result
from ensemblelora.analysis.sharpness_summary import Point, summarise
from ensemblelora.analysis.sharpness_variants import SharpnessOptions, list_variants, read_targets, scale_alpha
from ensemblelora.analysis.variant import change_config
from ensemblelora.artifacts import write_json
from ensemblelora.cli import main
from ensemblelora.comparison.pool import Pool
from ensemblelora.config import RunConfig, parse_config
from ensemblelora.errors import ConfigError, DataError, UsageError
from ensemblelora.reproduction.tables import reproduce
from tests.tiny_run import make_inputs, read_config

pytestmark = pytest.mark.slow

CONFIG = parse_config({"data": {"tasks": ["rte"]}, "adapter": {"r": 16, "lora_alpha": 32}})
TINY = [
    "parts=[rank, ensemble, width]",
    "tasks=[family0_task0]",
    "targets=[family0_task0:family0_task1]",
    "ranks=[4]",
    "scalings=[fixed, rslora]",
    "ensemble_sizes=[1, 2]",
    "total_rank=4",
    "reductions=[8]",
    "width_quantization=none",
    "n_examples=2",
    "n_eigenvalues=0",
]


def make_config(home: Path, *tasks: str) -> RunConfig:
    recipe = home / "recipe.yaml" if (home / "recipe.yaml").exists() else make_inputs(home)
    cards = [str(home / "tasks" / f"{task}.yaml") for task in tasks]
    return read_config(recipe, training={"num_train_epochs": 1}, data={"tasks": cards})


def analyze(name: str, config: RunConfig, options: list[str]) -> dict[str, Any]:
    analysis = find_analysis(name)
    home = Path(config.out).with_name("analysis")
    return carry_out(analysis, make_request(analysis, config, read_options(analysis, options), n_seeds=1, home=home))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sharpness")
    analyze("sharpness", make_config(home, "family0_task0", "family0_task1"), TINY)
    return home


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("similarity")
    config = make_config(home, "family0_task0", "family0_task1", "family1_task0")
    analyze("similarity", config, ["base_methods=[lora]", "sizes=[2, 3]", "n_subsets=2"])
    return home


def test_ranks_agree_where_the_rules_meet_and_members_share_the_total_rank() -> None:
    variants = list_variants(SharpnessOptions(), CONFIG)
    ranks = [v.changes["adapter"] for v in variants if v.part == "rank" and v.size == 16]
    assert ranks == [{"method": "lora", "r": 16, "lora_alpha": 32.0}] * 3
    by_rule = {
        v.scaling: v.changes["adapter"]["lora_alpha"] / 64 for v in variants if v.part == "rank" and v.size == 64
    }
    assert by_rule == {"fixed": 0.5, "proportional": 2.0, "rslora": 1.0}
    members = [v for v in variants if v.part == "ensemble"]
    assert [(v.n_members, v.changes["adapter"]["r"]) for v in members] == [(1, 256), (2, 128), (4, 64), (8, 32)]
    assert {v.changes["adapter"]["lora_alpha"] / v.changes["adapter"]["r"] for v in members} == {2.0}
    widths = [change_config(CONFIG, v.changes) for v in variants if v.part == "width"]
    assert {(c.adapter.method, c.model.quantization) for c in widths} == {("bottleneck", "nf4")}
    bases = [change_config(CONFIG, v.changes).model.quantization for v in variants if v.part == "quantization"]
    assert bases == ["none", "nf4"]
    assert scale_alpha(CONFIG, 16, "rslora") == 32.0


def test_wrong_options_are_refused_in_words() -> None:
    with pytest.raises(UsageError, match="total_rank 256: can't be divided among 3 members"):
        list_variants(SharpnessOptions(ensemble_sizes=(3,)), CONFIG)
    with pytest.raises(ConfigError, match=r"n_probes.*50"):
        read_options(find_analysis("sharpness"), ["n_probes=10"])
    for pair in ("rte", "rte:rte", "rte:wic", "cb:rte"):
        with pytest.raises(UsageError, match="expected SOURCE:TARGET"):
            read_targets([pair], ["rte"], ["rte", "cb"])


def test_tasks_that_can_not_be_measured_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, "family0_task0", "written")
    with pytest.raises(DataError, match="written: free text"):
        analyze("sharpness", config, ["parts=[rank]", "ranks=[4]"])
    with pytest.raises(UsageError, match="tasks nothing: expected some of family0_task0, written"):
        analyze("sharpness", config, ["parts=[rank]", "ranks=[4]", "tasks=[nothing]"])


def test_every_adapter_is_measured_on_the_same_rows(measured: Path) -> None:
    points = read_result(measured / "analysis", "sharpness")["points"]
    assert [(p["scope"], p["size"]) for p in points] == [
        ("rank, fixed", 4.0), ("rank, rslora", 4.0), ("ensemble", 1.0), ("ensemble", 2.0), ("width", 4.0)
    ]  # fmt: skip
    assert all(p["gap"] == pytest.approx(p["test_nll"] - p["train_nll"]) for p in points)
    assert {(p["n_train"], p["n_test"]) for p in points} == {(12, 12)}  # of sixteen training rows, as many
    assert all(set(p["targets"]) == {"family0_task1"} for p in points)
    # Where the rules for alpha agree, and for one member of the whole rank, it is the same adapter.
    fixed, rslora, one, two, width = points
    assert fixed["members"] == rslora["members"] == one["members"]
    assert all(name.startswith("end-") for p in points for name in p["members"])  # not a checkpoint on the way
    assert fixed["sharpness"] == one["sharpness"]
    found = two["sharpness"]["adapter"]
    assert (len(two["members"]), found["n_members"], found["rescale"]) == (2, 2, 2.0)
    assert found["n_coordinates"] == one["sharpness"]["adapter"]["n_coordinates"]  # the same total rank
    assert (set(two["sharpness"]), set(width["sharpness"])) == ({"adapter", "weights"}, {"adapter"})


def test_results_hold_changes_correlations_and_what_they_cost(measured: Path) -> None:
    result = read_result(measured / "analysis", "sharpness")
    assert list(dict.fromkeys((c["scope"], c["reference"]) for c in result["changes"])) == [
        ("rank, fixed", "rank 4, fixed"), ("rank, rslora", "rank 4, rslora"), ("ensemble", "1 x rank 4"),
        ("ensemble", "2 x rank 2"), ("width", "1/8 of the width"),
    ]  # fmt: skip
    own = next(c for c in result["changes"] if c["label"] == c["reference"])
    assert own["gap_change"]["value"] == 0
    assert {r["scope"] for r in result["correlations"]} == {"rank, fixed", "rank, rslora", "ensemble", "width", "all"}
    assert {r["n_points"] for r in result["correlations"] if r["scope"] == "all"} == {3}  # each adapter once
    assert {r["scope"] for r in result["out_of_domain"]} == {"family0_task0:family0_task1"}
    assert len(result["limits"]) == 3
    costs = result["costs"]
    assert costs["training"]["n"] == len({name for p in result["points"] for name in p["members"]}) == 4
    assert costs["measuring"]["flops"] > costs["training"]["flops"] > 0


def test_what_was_measured_is_found_again(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_result(measured / "analysis", "sharpness")
    monkeypatch.setattr(Pool, "_train", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr("ensemblelora.analysis.sharpness_study.measure_sharpness", lambda *a, **k: pytest.fail("again"))
    again = analyze("sharpness", make_config(measured, "family0_task0", "family0_task1"), TINY)
    names = ("points", "changes", "correlations", "costs")
    assert {name: again[name] for name in names} == {name: before[name] for name in names}


def test_pages_are_written(measured: Path, compared: Path) -> None:
    for home, name in ((measured, "sharpness"), (compared, "similarity")):
        analysis, result = find_analysis(name), read_result(home / "analysis", name)
        page = write_page(home / "analysis", analysis, result)
        text = page.with_suffix(".md").read_text(encoding="utf-8")
        assert analysis.headline(result) in text.replace("\n", " ")
        assert "What it cost" in text
        assert page.stat().st_size > 10_000
    assert (
        "Does it say anything of data that was not trained on?" in (measured / "analysis" / "sharpness.md").read_text()
    )


def test_forecasts_count_what_is_carried_out(measured: Path) -> None:
    analysis, config = find_analysis("sharpness"), make_config(measured, "family0_task0", "family0_task1")
    request = make_request(analysis, config, read_options(analysis, TINY), n_seeds=1, home=measured / "analysis")
    rows = request.open_pool().rows
    work = analysis.forecast(request, rows)
    request.close()
    result = read_result(measured / "analysis", "sharpness")
    assert sum(one.fine_tunings for one in work.values()) == result["costs"]["training"]["n"]
    assert sum(one.gradient_rows for one in work.values()) == (1 + 2) * 3 * 2 * 52 + 3 * 52
    similarity = find_analysis("similarity")
    other = make_request(similarity, config, read_options(similarity, ["sizes=[2]"]), n_seeds=2, home=measured / "x")
    assert {name: one.fine_tunings for name, one in similarity.forecast(other, rows).items()} == {
        "lora": 2 * 3, "bottleneck": 2 * 3,
    }  # fmt: skip


def test_similarity_compares_every_subset_with_its_tasks(compared: Path) -> None:
    result = read_result(compared / "analysis", "similarity")
    # One pair of opposed tasks has theta0 itself for its best checkpoint, and is left out.
    assert {(r["kind"], r["size"]): r["n"] for r in result["by_size"]} == {
        ("apart", 1): 3, ("together", 2): 1, ("together", 3): 1, ("averaged", 2): 2, ("averaged", 3): 1,
    }  # fmt: skip
    assert all(0 <= cell["overlap"] <= 1 + 1e-6 and -1 <= cell["cosine"] <= 1 + 1e-6 for cell in result["cells"])
    # An average of two has half of each, beside what they have in common.
    averaged = [cell for cell in result["cells"] if (cell["kind"], cell["size"]) == ("averaged", 2)]
    apart = {tuple(cell["subset"]): cell["cosine"] for cell in result["cells"] if cell["kind"] == "apart"}
    assert all(cell["cosine"] > apart[tuple(cell["subset"])] for cell in averaged)
    assert {t["field"] for t in result["trends"]} == set(similarity_study.FIELDS)


def test_an_adapter_that_ended_where_it_began_is_left_out(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(compared, "family0_task0", "family0_task1", "family1_task0")
    monkeypatch.setattr(similarity_study, "_has_moved", lambda *states: False)
    analysis = find_analysis("similarity")
    options = read_options(analysis, ["base_methods=[lora]", "sizes=[2]", "n_subsets=1"])
    request = make_request(analysis, config, options, n_seeds=1, home=compared / "analysis")
    request.measure = lambda what, inputs, compute: compute(None)  # as if nothing had been measured
    found = analysis.run(request)
    request.close()
    assert (found["cells"], found["by_size"], found["trends"]) == ([], [], [])


def make_point(part: str, label: str, size: float, task: str, gap: float, trace: float, **more: Any) -> Point:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 40)
    losses = RowLosses(noise.tolist(), list(range(40)), (noise[::-1] + gap).tolist(), list(range(40)))
    fields = {name: trace for name in ("greatest", "mean", "greatest_ggn", "largest_eigenvalue")}
    adapter = {**fields, "greatest_rescaled": trace * size, "first_greatest": trace / size, "greatest_se": 0.01 * trace,
               "mean_se": 0.01 * trace}  # fmt: skip
    return Point(part, label, size, more.get("scaling", ""), task, 0, (label,), losses, 0.5, {"adapter": adapter}, {})


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A result as the paper has it, but for the rank of the smallest gap."""
    points = [
        make_point("rank", f"rank {r}", r, task, gap, gap * 10, scaling="fixed")
        for task in ("rte", "copa") for r, gap in ((4, 0.3), (16, 0.6), (64, 0.7), (256, 0.9))
    ]  # fmt: skip
    points += [
        make_point("ensemble", f"{k} members", k, task, 0.9 / k**0.8, 9 / k)
        for task in ("rte", "copa") for k in (1, 2, 4, 8)
    ]  # fmt: skip
    points += [make_point("quantization", n, b, "rte", g, 10 * g) for n, b, g in (("LoRA", 16, 0.6), ("QLoRA", 4, 0.7))]
    points += [make_point("width", f"1/{w}", w, "rte", 0.1 * w, 10 * w) for w in (1, 2, 4, 8)]
    made = summarise(points, n_bootstrap=500, confidence=0.95, seed=0)
    options = SharpnessOptions().model_dump(mode="json")
    head = {"analysis": "sharpness", "config": CONFIG.model_dump(mode="json"), "options": options, "seeds": [0]}
    write_json(tmp_path / "sharpness" / "result.json", {**head, **made, "limits": []})
    return tmp_path


def test_figures_6_and_9_say_where_ours_and_the_papers_agree(told: Path) -> None:
    rows = {str(row["claim"]): row for row in reproduce("figure6", [told]).rows}
    smallest = rows["6a, rank, fixed: rank of the smallest gap"]
    assert (smallest["ours"], smallest["paper"], smallest["verdict"]) == (4.0, 16.0, "disagrees")
    assert rows["6a, rank, fixed: correlation of gap and largest trace"]["verdict"] == "agrees"
    two = rows["6b: gap of two adapters, over one's"]
    assert (two["paper"], two["verdict"]) == (-0.44, "agrees")
    assert two["ours"] == pytest.approx(2**-0.8 - 1, abs=0.02)
    assert rows["6b: gap of two adapters less one's, nats"]["ours"] == pytest.approx(0.9 * (2**-0.8 - 1), abs=0.01)
    assert rows["6b: largest trace of two adapters, all members, over one's"]["ours"] == pytest.approx(-0.5)
    assert rows["6b: largest trace of two adapters, first member alone, over one's"]["ours"] == pytest.approx(-0.75)
    assert rows["6b: largest trace of two adapters, its GGN part, exact, over one's"]["low"] is None
    assert rows["6b: largest trace of two adapters, times k, over one's"]["ours"] == pytest.approx(0, abs=1e-9)
    assert rows["6b: gap of 8 adapters less that of two"]["verdict"] == "agrees"
    assert rows["6c: gap of QLoRA, over LoRA's"]["verdict"] == "disagrees"
    nine = {str(row["claim"]): row["verdict"] for row in reproduce("figure9", [told]).rows}
    assert set(nine.values()) == {"agrees"}
    assert len(nine) == 3


def test_a_reference_without_a_gap_leaves_the_relative_change_open(told: Path) -> None:
    points = [make_point("ensemble", f"{k} members", k, "rte", 0.001 * k, 4.0) for k in (1, 2)]
    made = summarise(points, n_bootstrap=500, confidence=0.95, seed=0)
    write_json(told / "sharpness" / "result.json", {**read_result(told, "sharpness"), **made})
    rows = {str(row["claim"]): row for row in reproduce("figure6", [told]).rows}
    assert rows["6b: gap of two adapters, over one's"]["verdict"] == "undecided"
    assert rows["6b: gap of two adapters less one's, nats"]["ours"] == pytest.approx(0.001)


def test_figures_are_shown_on_the_command_line(
    measured: Path, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for figure, home in (("figure6", measured), ("figure9", measured), ("figure12", compared)):
        assert main(["reproduce", figure, str(home / "analysis")]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{figure}: ") and "verdict" in out and "The paper: " in out
    with pytest.raises(UsageError, match="no result of analysis similarity"):
        reproduce("figure12", [measured / "analysis"])


def test_a_folder_without_the_part_is_refused(told: Path) -> None:
    result = read_result(told, "sharpness")
    none = {**result, "points": [], "changes": [], "correlations": []}
    write_json(told / "sharpness" / "result.json", none)
    with pytest.raises(UsageError, match="figure 6 needs one of the parts"):
        reproduce("figure6", [told])
    with pytest.raises(UsageError, match=r"no bottleneck adapters of several widths in it.*--with parts=\[width\]"):
        reproduce("figure9", [told])


def test_seeds_are_averaged_and_their_spread_is_told() -> None:
    points = [make_point("ensemble", f"{k} members", k, "rte", 1.0 / k, 4.0) for k in (1, 2)]
    more = [replace(p, seed=1, losses=replace(p.losses, test=[x + 0.2 for x in p.losses.test])) for p in points]
    made = summarise([*points, *more], n_bootstrap=200, confidence=0.95, seed=0)
    change = next(c for c in made["changes"] if c["label"] == "2 members" and c["reference"] == "1 members")
    assert change["gap"] == pytest.approx(0.6, abs=1e-6)
    assert change["gap_seed_sd"] == pytest.approx(0.2 / 2**0.5)
