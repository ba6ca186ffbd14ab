"""Comparisons and selections whose fine-tunings run in other processes: the same records, whoever trained."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ensemblelora import artifacts, training
from ensemblelora.cli import main
from ensemblelora.comparison import study
from ensemblelora.comparison.record import StudyRecord
from ensemblelora.config import RunConfig, dump_config
from ensemblelora.errors import TrainingError
from ensemblelora.scheduling import Cluster, open_scheduler, read_cluster
from ensemblelora.selection import select
from tests.study_records import RATES
from tests.test_scheduling import Elsewhere
from tests.tiny_run import TASKS, make_inputs, read_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

MEASURED = ("seconds", "peak_memory_bytes", "added_memory_bytes")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Three tasks with answers of several kinds, one of them free text."""
    recipe = make_inputs(tmp_path_factory.mktemp("inputs"))
    chosen = [str(recipe.parent / "tasks" / f"{name}.yaml") for name in (TASKS[1], TASKS[3], TASKS[4])]
    quick = {"training": {"num_train_epochs": 1}, "grouping": {"n_groups": 2, "n_random_partitions": 0}}
    return read_config(recipe, data={"tasks": chosen}, **quick)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """Stands in for a cluster wherever one is named."""
    found = Elsewhere()

    @contextmanager
    def opened(cluster: Cluster | None) -> Iterator[Any]:
        from ensemblelora.scheduling import HERE

        yield HERE if cluster is None else found

    for module in (study, select):
        monkeypatch.setattr(module, "open_scheduler", opened)
    return found


def outcomes(record: StudyRecord) -> list[dict[str, Any]]:
    """All that is recorded but for what a clock or the system measured."""
    found = []
    for one in record.records:
        plain = dict(vars(one)) | {"trials": [(trial.learning_rate, trial.validation_nll) for trial in one.trials]}
        plain["costs"] = {key: value for key, value in one.costs.items() if key not in MEASURED}
        found.append(plain)
    return found


def compare(config: RunConfig, methods: list[str], n_seeds: int, rates: Any, out: Path, **how: Any) -> StudyRecord:
    made = study.compare(config, methods, n_seeds, rates, out, primary=(), **how)
    assert made.failures == {}
    return made.record


def test_a_comparison_elsewhere_is_the_one_made_here(config: RunConfig, tmp_path: Path, elsewhere: Elsewhere) -> None:
    config = config.model_copy(update={"data": config.data.model_copy(update={"tasks": config.data.tasks[:2]})})
    asked: tuple[Any, ...] = (["single"], 1, ())
    here = compare(config, *asked, tmp_path / "here")
    assert elsewhere.done == []
    there = compare(config, *asked, tmp_path / "there", cluster=Cluster("somewhere"))
    assert len(elsewhere.done) == len(set(elsewhere.done)) == 2, "one adapter a task"
    assert outcomes(there) == outcomes(here)
    for path in sorted((tmp_path / "here").glob("seed-0/*/adapters/*/adapter_model.safetensors")):
        assert path.read_bytes() == (tmp_path / "there" / path.relative_to(tmp_path / "here")).read_bytes()


@pytest.mark.slow
def test_methods_whose_trainings_follow_each_other_are_the_same_elsewhere(
    config: RunConfig, tmp_path: Path, elsewhere: Elsewhere
) -> None:
    asked: tuple[Any, ...] = (["mtl-ft", "ours"], 2, ())
    here = compare(config, *asked, tmp_path / "here")
    there = compare(config, *asked, tmp_path / "there", cluster=Cluster("somewhere"))
    assert len(elsewhere.done) >= 2 * (3 + 2) and len(elsewhere.made) == 2, "one model a seed"
    assert outcomes(there) == outcomes(here)


@pytest.mark.slow
def test_a_training_that_diverges_elsewhere_is_told_as_here(
    config: RunConfig, tmp_path: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine_tune = training.fine_tune_together

    def diverge(probe: Any, jobs: Any, settings: Any, **how: Any) -> Any:
        if settings.learning_rate > min(RATES):
            raise TrainingError("the loss is not finite")
        return fine_tune(probe, jobs, settings, **how)

    monkeypatch.setattr(training, "fine_tune_together", diverge)
    ways: list[tuple[str, dict[str, Any]]] = [("here", {}), ("there", {"cluster": Cluster("somewhere")})]
    here, there = (compare(config, ["single"], 1, RATES, tmp_path / name, **how) for name, how in ways)
    assert outcomes(there) == outcomes(here)
    assert [trial.learning_rate for trial in there.records[0].trials] == [min(RATES)]
    notes = [len(list((tmp_path / name).glob("seed-0/*/failed/*.json"))) for name in ("here", "there")]
    assert len(elsewhere.done) == len(set(elsewhere.done)) == 2 * 3, "all tasks at both rates side by side"
    assert len(elsewhere.made) == 1, "rates share the model"
    assert notes == [1, 3], "here the first ends the method at that rate; elsewhere all were under way"


@pytest.mark.slow
@pytest.mark.parametrize("linearize_at", ["base", "warmup"])
def test_a_selection_elsewhere_is_the_one_made_here(
    config: RunConfig, tmp_path: Path, elsewhere: Elsewhere, linearize_at: str
) -> None:
    found = []
    longer = config.training.model_copy(update={"num_train_epochs": 2})
    gradients = config.gradients.model_copy(update={"linearize_at": linearize_at})
    for name, cluster in (("here", None), ("there", Cluster("somewhere"))):
        changes = {"out": str(tmp_path / name), "training": longer, "gradients": gradients}
        record = select.select_sources(config.model_copy(update=changes), TASKS[1], cluster=cluster)
        kinds = [one.split()[0] for one in elsewhere.done]
        plain = record.to_dict()
        finals = [{k: v for k, v in final.items() if k != "train_seconds"} for final in plain["finals"]]
        searches = [{k: v for k, v in search.items() if k != "seconds"} for search in plain["strategies"]]
        found.append((finals, plain["test"], searches, plain["sources"]))
    assert kinds.count("features") == 3 + 1, "every task's training rows, and the target's validation rows"
    assert kinds.count("adapter") >= 2
    assert found[0] == found[1]


@pytest.fixture
def cluster() -> Iterator[None]:
    opened = open_scheduler(read_cluster("local:2", "cpus=1"))
    opened.__enter__()
    yield
    with warnings.catch_warnings():  # Ray lets go of its servers while they are still ending
        warnings.simplefilter("ignore", ResourceWarning)
        opened.__exit__(None, None, None)
        gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_real_cluster_of_two_processes_makes_the_same_comparison(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = compare(config, ["single"], 1, (), tmp_path / "here")
    artifacts.write_text(tmp_path / "recipe.yaml", dump_config(config))
    command = ["compare", str(tmp_path / "recipe.yaml"), "--methods", "single", "--seeds", "1", "--quiet"]
    with warnings.catch_warnings():  # as above
        warnings.simplefilter("ignore", ResourceWarning)
        code = main([*command, "--out", str(tmp_path / "there"), "--cluster", "local:2", "--per-job", "cpus=1"])
        gc.collect()
    assert code == 0
    capsys.readouterr()
    there = study.read_study(tmp_path / "there")
    assert outcomes(there) == outcomes(here)
