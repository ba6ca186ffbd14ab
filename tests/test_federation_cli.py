"""What users of a federation type and read: recipes, commands, forecasts, pages, and the paper's extension."""

from __future__ import annotations

import importlib.util
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemblelora import artifacts
from ensemblelora.cli import main
from ensemblelora.config import dump_config
from ensemblelora.config_federation import FederationConfig
from ensemblelora.errors import ConfigError, MissingExtraError
from ensemblelora.federation.engines import check_engine, settle_paths
from ensemblelora.federation.forecast import forecast_federation
from ensemblelora.federation.record import METHOD_TITLES, title_of
from ensemblelora.recipe import describe_config, read_federation
from ensemblelora.reproduction import paper
from ensemblelora.reproduction.tables import reproduce
from tests.federation_tiny import copy_finished, finished, make_config, write_clients

ROOT = Path(__file__).resolve().parent.parent


def write_recipe(config: FederationConfig, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_shipped_recipe_is_read_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENSEMBLELORA_DATA", raising=False)
    (path,) = (ROOT / "recipes").glob("federated-*.yaml")
    config = read_federation(path)
    assert config.clients.source == "${ENSEMBLELORA_DATA}/shakespeare" == settle_paths(config).clients.source
    assert config.groups.n_groups == (10, 20, 30) and config.boosting.n_rounds == (1, 5, 10)
    text = path.read_text(encoding="utf-8")
    assert f"ensemblelora federate recipes/{path.name}" in text
    assert path.name in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for key in ("test_fraction", "learning_rate", "num_train_epochs", "n_subsets", "subset_size", "proj_dim"):
        first = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
        assert "paper" in first.lower(), f"{key}: what the paper has"


def test_a_folder_of_texts_is_a_recipe(tmp_path: Path) -> None:
    config = read_federation(write_clients(tmp_path / "letters"), ("seed=3",))
    assert (config.clients.source, config.out, config.seed) == (str(tmp_path / "letters"), "runs/letters", 3)


def test_the_listing_of_keys_is_a_recipe_of_the_defaults() -> None:
    listing = describe_config(FederationConfig)
    config = FederationConfig.model_validate(yaml.safe_load(listing))
    assert config == FederationConfig.model_validate({"clients": {"source": config.clients.source}})
    assert "# Groups" not in listing and "n_groups: [10]" in listing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("groups.n_groups=[0]",), "groups.n_groups"),
        (("groups.size=3",), "groups.size"),
        (("engine.kind=cloud",), "engine.kind"),
        (("adapter.method=dora",), "training.aggregation exact: products B A are LoRA's, and adapter.method is dora"),
        (("evaluation.random_groups=7",), "evaluation.random_groups 7: expected one of groups.n_groups, [10]"),
        (("evaluation.baselines=[mtl-ft]",), "mtl-ft begins at the global adapter; name global, too"),
        (("boosting.n_rounds=[0]",), "n_rounds [0]: expected numbers from 1 on"),
        (("privacy.noise_multiplier=1",), "noise is measured in units of clip_norm; set that, too"),
    ],
)
def test_a_fault_in_a_config_is_one_line(
    tmp_path: Path, changes: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_clients(tmp_path / "texts")
    with pytest.raises(ConfigError) as told:
        read_federation(texts, changes)
    assert message in str(told.value) and "\n" not in str(told.value)
    options = [part for change in changes for part in ("--set", change)]
    code, out, err = run_cli(capsys, "federate", texts, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1


def test_a_missing_place_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_cli(capsys, "federate", "nowhere.yaml")
    assert (code, out) == (2, "") and "nowhere.yaml: no such file or folder; give a YAML recipe" in err


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    missing = "ray"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find("json"))
    config = make_config(tmp_path, engine={"kind": "simulation"})
    with pytest.raises(
        MissingExtraError, match=r"package ray is not installed; .*ensemblelora\[federated\].*kind: proc"
    ):
        check_engine(config)
    check_engine(make_config(tmp_path, engine={"kind": "deployment"}))
    missing = "flwr"
    with pytest.raises(MissingExtraError, match="package flwr is not installed"):
        check_engine(make_config(tmp_path, engine={"kind": "deployment"}))
    check_engine(make_config(tmp_path))


def test_federate_tells_the_outcome_as_json_and_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = copy_finished(tmp_path)
    recipe = write_recipe(config, tmp_path)
    code, out, _ = run_cli(capsys, "federate", recipe, "--json", "--quiet")
    told = json.loads(out)
    assert code == 0 and told["folder"] == config.out
    assert told["methods"]["ours"]["nll"] == pytest.approx(finished()[1].methods["ours"].nll, rel=1e-14), "15 digits"
    code, out, _ = run_cli(capsys, "federate", config.out, "--quiet")
    assert code == 0 and "one adapter for all (FedAvg)" in out and "against one adapter for all" in out.splitlines()[0]
    assert out.splitlines()[-1] == str(Path(config.out) / "report.html")


def test_an_interrupted_federation_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_finished(tmp_path)
    from ensemblelora.federation import engines

    def stop(config: FederationConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "run_federation", stop)
    code, _, err = run_cli(capsys, "federate", config.out)
    assert code == 130 and f"continue with: ensemblelora federate {config.out}\n" in err
    other = write_recipe(make_config(tmp_path, out=str(tmp_path / "other")), tmp_path)
    code, _, err = run_cli(capsys, "federate", other)
    assert code == 130 and "nothing was begun" in err


def test_a_forecast_counts_what_will_be_counted_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path)
    code, out, _ = run_cli(capsys, "federate", write_recipe(config, tmp_path), "--dry-run", "--json", "--quiet")
    forecast = json.loads(out)
    assert code == 0 and not (tmp_path / "run").exists()
    record = read_costs(finished()[0] / "run")
    for stage in ("global", "groups-2", "groups-3", "random", "local", "mtl-ft"):
        assert forecast[stage]["flops"] == record[stage]["flops"], stage
    # What lies below the adapters is run a lot at a time when it is kept, padded otherwise than in the forecast.
    assert forecast["features"]["flops"] == pytest.approx(record["features"]["flops"], rel=0.05)
    for stage in ("validate", "evaluate"):
        assert forecast[stage]["flops"] == pytest.approx(record[stage]["flops"], rel=0.5), stage
    for stage in ("boost-2", "boost-3"):
        assert 0.3 * record[stage]["flops"] < forecast[stage]["flops"] < 5 * record[stage]["flops"], stage
    total = forecast.pop("total")
    assert total["flops"] == sum(stage["flops"] for stage in forecast.values()) and total["seconds"] > 0
    traffic = finished()[1].traffic
    for stage in ("features", "global", "groups-2", "random"):
        assert forecast[stage]["up_bytes"] == pytest.approx(traffic[stage]["up_bytes"], abs=200 * 6), stage


def read_costs(run: Path) -> dict[str, Any]:
    return {stage["stage"]: stage for stage in artifacts.read_json(run / "costs.json")["stages"]}


def test_a_forecast_without_baselines_and_of_moments(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        evaluation={"baselines": []},
        boosting={"n_rounds": []},
        features={"send": "moments"},
        groups={"n_groups": [2]},
    )
    assert set(forecast_federation(config)) == {"features", "groups-2", "validate", "evaluate", "total"}


def test_assign_tells_the_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished()[0] / "run"
    newcomer = write_clients(tmp_path, 8) / "client7.txt"
    code, out, _ = run_cli(capsys, "assign", run, newcomer, "--json", "--quiet")
    told = json.loads(out)
    assert code == 0 and told["client"] == "client7"
    assert told["group"] == min(range(len(told["groups"])), key=lambda g: told["groups"][g]["nll"])
    assert told["measured"] == {}
    code, out, _ = run_cli(capsys, "assign", run, newcomer, "--measure", "--quiet")
    assert code == 0 and f"group {told['group']}" in out and "last rows" in out
    assert out.splitlines()[-1].startswith(str(run / "adapters"))
    code, out, err = run_cli(capsys, "assign", tmp_path, newcomer)
    assert (code, out) == (2, "") and err.count("\n") == 1


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for key, value in attrs if key == "src" or (tag == "link" and key == "href")]


def test_the_page_needs_no_network_and_names_every_method() -> None:
    folder, outcome = finished()
    text = (folder / "run" / "report.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert all(link.startswith("data:") for link in links.loaded)
    markdown = (folder / "run" / "report.md").read_text(encoding="utf-8")
    for name in outcome.methods:
        assert title_of(name) in text and title_of(name) in markdown
    assert set(METHOD_TITLES) <= set(outcome.methods)
    for told in ("Test loss", "Numbers of groups and boosters", "What was sent", "What leaves a client", "Epsilon"):
        assert told in markdown
    for told in ("Who gains", "Loss against cost", "The groups that serve", "Predicted before training"):
        assert told in markdown
    assert "nan" not in markdown.lower().split() and "None" not in markdown


def test_the_papers_extension_stands_beside_ours() -> None:
    folder, outcome = finished()
    made = reproduce("extension", [folder / "run"])
    cells = {f"{row['row']} {row['column']}": row for row in made.rows}
    assert len(cells) == len(paper.FEDERATED) == 4
    ours, shared, tuned = (outcome.methods[name] for name in ("ours", "global", "mtl-ft"))
    assert cells["loss ours over global"]["ours"] == pytest.approx(ours.nll / shared.nll)
    assert cells["flops ours over mtl-ft"]["ours"] == pytest.approx(ours.cost.flops / tuned.cost.flops)
    assert cells["memory ours over mtl-ft"]["ours"] == pytest.approx(ours.cost.adapter_bytes / tuned.cost.adapter_bytes)
    assert [row["paper"] for row in made.rows] == list(paper.FEDERATED.values())
    assert "6 clients" in made.notes[0] and any("500 speaking roles" in note for note in made.notes)
    sizes = reproduce("extension-sizes", [folder / "run"])
    assert {row["row"] for row in sizes.rows} == {title_of(name) for name in outcome.methods}
