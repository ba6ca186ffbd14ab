"""What a selection says of its choice: what is predicted to be better, costs, clusters, and what it keeps."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ensemblelora import artifacts
from ensemblelora.accounting.meter import StageRecord
from ensemblelora.cli import main
from ensemblelora.config import RunConfig
from ensemblelora.selection.caveats import Better, find_better, list_caveats, name_choice, say_better
from ensemblelora.selection.clusters import find_typical
from ensemblelora.selection.costs import count_new
from ensemblelora.selection.page import compose_page, describe_method, list_notes, write_headline
from ensemblelora.selection.record import RECORD_FILE, SAMPLES_FILE, SelectionRecord
from ensemblelora.selection.screen import render_selection
from ensemblelora.selection.search import SearchSettings
from ensemblelora.selection.select import select_sources
from ensemblelora.selection.strategies import DEFAULT_STRATEGY, select
from tests.selection_toys import make_prospect, plant_block
from tests.test_selection import Scripted
from tests.tiny_run import make_mixed_inputs, read_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

TASKS = ("family0", "family1", "spelled", "written")
TARGET, OTHER = "family0", "family1"
SHAPE = SearchSettings()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixed_inputs(tmp_path_factory.mktemp("inputs"), TASKS, n_test=10)


@pytest.fixture(scope="module")
def searched(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, SelectionRecord]:
    """A search alone, by the default; not to be changed."""
    config = read_config(inputs, out=str(tmp_path_factory.mktemp("run") / "select"))
    return config, select_sources(config, TARGET, wants_final=False)


@pytest.fixture
def copied(searched: tuple[RunConfig, SelectionRecord], tmp_path: Path) -> RunConfig:
    shutil.copytree(searched[0].out, tmp_path / "copy")
    return searched[0].model_copy(update={"out": str(tmp_path / "copy")})


def write_page(record: SelectionRecord) -> str:
    return str(compose_page(record))


# What is predicted to be better


class Noisy(Scripted):
    """Losses by set, told in advance; every second row by 1 % more of it."""

    def row_nll(self, choices):
        rows = super().row_nll(choices)
        return rows * (1 + 0.01 * (np.arange(rows.shape[2]) % 2))


ALONE_THEY_HARM = {(): 0.7, (0,): 0.8, (1,): 0.75, (0, 1): 0.33}


def test_a_better_prediction_is_named_with_its_gain_its_reason_and_the_next_step():
    prospect = Noisy(ALONE_THEY_HARM, 2)
    first, other = (select(prospect, name, SHAPE) for name in ("forward", "backward"))
    assert (first.sources, other.sources) == ((), (0, 1))
    better = find_better(prospect, first, [other])
    assert (better.strategy, better.sources) == ("backward", (0, 1))
    assert better.gain == pytest.approx(0.37 * 1.005) and 0 < better.gain_se < 0.01
    (told,) = list_caveats(prospect, "mine", ["a", "b"], first, better)
    assert told.startswith("It adds one source at a time and stops at the first step that does not pay (here: ")
    assert say_better(better, ["a", "b"]).startswith("backward chooses all 2, whose predicted loss is 0.37")
    assert "no further step is predicted to gain anything (the best one -0.05" in told
    assert f"Backward, which begins with all sources, found the lowest of {other.n_asked} sets' predictions" in told
    assert told.endswith("is partly luck: compare both on test rows with --strategy forward,backward.")


class Scattered(Scripted):
    """With the source, rows win and lose a nat in turn."""

    def row_nll(self, choices):
        rows, signs = super().row_nll(choices), 1 - 2.0 * (np.arange(len(self.validation_groups)) % 2)
        return rows + np.array([len(choice) for choice in choices])[None, :, None] * signs


def test_what_is_worse_or_within_an_error_is_not_named():
    prospect = Noisy(ALONE_THEY_HARM, 2)
    whole, none = (select(prospect, name, SHAPE) for name in ("backward", "forward"))
    assert find_better(prospect, whole, [none]) is None
    assert find_better(prospect, none, []) is None
    scattered = Scattered({(): 0.7, (0,): 0.65}, 1)
    gain = scattered.compare([(0,)], over=())
    assert 0 < gain.values[0] < gain.errors[0], "else this test says nothing"
    assert find_better(scattered, none, [replace(whole, sources=(0,))]) is None


def test_the_lowest_of_many_predictions_has_to_be_clearer():
    """A gain of three errors tells of one other set, and may be the luck of a thousand."""

    class Mild(Scripted):
        def row_nll(self, choices):
            rows = super().row_nll(choices)
            return rows + np.array([len(choice) for choice in choices])[None, :, None] * self.wobble

        @property
        def wobble(self):
            return np.resize([0.7, -0.7], len(self.validation_groups))

    prospect = Mild({(): 0.7, (0,): 0.4}, 1)
    none = select(prospect, "forward", SHAPE)
    gain = prospect.compare([(0,)], over=())
    n_errors = gain.values[0] / gain.errors[0]
    assert 2 < n_errors < 3.5, "else this test says nothing"
    whole = replace(none, strategy="backward", sources=(0,), n_asked=1)
    assert find_better(prospect, replace(none, sources=()), [whole]) is not None
    assert find_better(prospect, replace(none, sources=()), [replace(whole, n_asked=1000)]) is None


def test_a_choice_is_named_by_what_is_left_out_where_that_is_shorter():
    names = [f"s{j}" for j in range(9)]
    assert name_choice(tuple(range(9)), names) == "all 9" and name_choice((), names) == ""
    assert name_choice((0, 1, 2, 3, 5, 6, 7, 8), names) == "all but s4"
    assert name_choice((0, 1), names) == "s0 and s1"
    assert name_choice((0,), ["a"]) == "a"


def test_what_too_few_rows_can_tell_is_said_with_its_size():
    prospect = Scattered({(): 0.7, (0,): 0.69}, 1)
    whole = select(prospect, "backward", SHAPE)
    told = list(list_caveats(prospect, "mine", ["a"], whole, None))
    what = "the choice" if whole.sources else "all sources"
    n_rows = len(np.unique(prospect.validation_groups))
    assert any(line.startswith(f"{n_rows} validation rows of mine can't tell a gain below some ") for line in told)
    assert any(line.endswith(f"from chance; that of {what} over no source is smaller.") for line in told)


def test_few_validation_rows_are_named_as_a_plan_names_them():
    first = select(make_prospect((0.0,)), "forward", SHAPE)
    few = make_prospect((0.0,), n_validation=8)
    (told,) = list_caveats(few, "mine", ["a"], first, None)
    assert told.startswith("Few validation rows, repeated texts counted once, of mine (8): predictions and their stan")
    assert list(list_caveats(make_prospect((0.0,), n_validation=60), "mine", ["a"], first, None)) == []


def test_headline_screen_and_page_name_what_is_better(searched):
    _, record = searched
    assert record.strategies[0].strategy == DEFAULT_STRATEGY == "backward"
    assert [one.strategy for one in record.rivals] == ["forward"], "what begins at the other end is searched beside it"
    assert any(told.startswith("Few validation rows") for told in record.warnings)
    worse = with_better(record)
    assert "But forward chooses none, whose predicted loss is 0.3700 ± 0.0300 nats lower still" in write_headline(worse)
    assert write_headline(worse).endswith("to be checked, see the warning.")
    assert "an apt warning" in write_page(worse)
    lines = [part.plain for part in render_selection(worse) if hasattr(part, "plain")]
    assert "warning: an apt warning" in lines
    assert worse.to_dict()["better"]["sources"] == [] and worse.to_dict()["rivals"][0]["strategy"] == "forward"


def with_better(record: SelectionRecord) -> SelectionRecord:
    return replace(record, better=Better("forward", (), 0.37, 0.03), warnings=("an apt warning",))


# What is said of rows and costs


def test_test_rows_are_said_to_be_read_where_they_were(searched):
    _, record = searched
    assert not any("test rows" in note for note in list_notes(record))


def test_no_source_is_called_what_it_is(searched):
    _, record = searched
    assert describe_method(record, "none") == "the target's rows alone"
    alone = replace(record, includes_target=False, n_clusters=2)
    assert describe_method(alone, "none") == "the base model, nothing trained"
    assert describe_method(alone, "all") == "all clusters"


def test_what_an_earlier_command_made_is_not_charged_to_this_one(searched, copied):
    _, record = searched
    costs = record.costs
    assert (costs.new_warmup_flops, costs.new_feature_flops) == (costs.warmup_flops, costs.feature_flops)
    assert not any("taken over" in note for note in list_notes(record))
    other = select_sources(copied, OTHER, wants_final=False)
    assert other.costs.warmup_flops == costs.warmup_flops and other.costs.new_warmup_flops == 0
    assert 0 < other.costs.new_feature_flops < other.costs.feature_flops / 4, "its validation rows alone"
    assert other.costs.seconds < costs.seconds
    (told,) = [note for note in list_notes(other) if note.startswith("choosing took")]
    assert told.startswith("choosing took features ") and "in this folder: warm-up (" in told


def test_new_costs_are_of_the_parts_that_were_not_there():
    one, two = (StageRecord("features", wall_seconds=k, flops=10 * k) for k in (1, 2))
    before = replace(one, parts={"a": one})
    assert count_new(None, before) == (10, 1)
    assert count_new(before, before) == (0, 0.0) == count_new(None, None)
    assert count_new(before, replace(one.joined(two), parts={"a": one, "b": two})) == (20, 2)
    assert count_new(one, two) == (20, 2), "of what has no parts, all is new"


# What is kept


def test_another_target_and_other_options_leave_what_was_chosen(copied):
    home = Path(copied.out) / "selection"
    before = {name: (home / TARGET / name).read_bytes() for name in (RECORD_FILE, "selection.md", "oracle.json")}
    select_sources(copied, OTHER, wants_final=False)
    assert all((home / TARGET / name).read_bytes() == content for name, content in before.items())
    same = select_sources(copied, TARGET, wants_final=False)
    assert same.set_aside is None and not (home / TARGET / "earlier").exists()
    other = select_sources(copied, TARGET, ["forward"], n_clusters=2, wants_samples=True, wants_final=False)
    assert other.set_aside == home / TARGET / "earlier" / "1"
    kept = {path.name: path for path in other.set_aside.iterdir()}
    assert kept.keys() == before.keys() and kept["oracle.json"].read_bytes() == before["oracle.json"]
    assert artifacts.read_json(kept[RECORD_FILE])["strategies"][0]["strategy"] == "backward"
    assert any(str(other.set_aside) in note for note in list_notes(other))


def test_rows_valued_for_another_question_do_not_stay(copied):
    folder = Path(copied.out) / "selection" / TARGET
    (folder / RECORD_FILE).unlink()
    (folder / SAMPLES_FILE).write_text("left by a selection that was broken off\n", encoding="utf-8")
    select_sources(copied, TARGET, wants_final=False)
    assert not (folder / SAMPLES_FILE).exists() and not (folder / "earlier").exists()
    valued = select_sources(copied, TARGET, wants_samples=True, wants_final=False)
    assert any(SAMPLES_FILE in note and "counted from 0" in note for note in list_notes(valued))
    plain = select_sources(copied, TARGET, wants_final=False)
    assert not (folder / SAMPLES_FILE).exists() and (plain.set_aside / SAMPLES_FILE).exists()


# What is in a cluster


def test_typical_rows_are_those_nearest_to_the_mean_direction():
    block = plant_block("source", np.ones(2), n=4)
    rows = np.array([[0.0, 5.0], [1.0, 0.1], [9.0, 0.0], [-1.0, 0.2]], np.float32)
    block = replace(block, features=rows[:, None])
    mean = np.mean([row / np.linalg.norm(row) for row in rows], axis=0)
    slow = sorted(range(4), key=lambda e: -(rows[e] @ mean) / np.linalg.norm(rows[e]))
    assert find_typical(block, 2) == slow[:2] and len(find_typical(block, 9)) == 4


def test_clusters_are_shown_with_their_rows_and_examples(copied, inputs):
    record = select_sources(copied, TARGET, n_clusters=2, wants_final=False)
    sources = {source.name: source for source in record.sources}
    files = (path for path in (inputs.parent / "tasks").iterdir() if "family1" in path.name and "train" in path.name)
    texts = next(files).read_text(encoding="utf-8")
    for example in sources["family1/0"].examples:
        words = example.removesuffix(" ...").split()[1:4]
        assert words and " ".join(words) in texts, "a row of the dataset, as it is"
    assert all(1 <= len(source.examples) <= 2 for source in record.sources)
    page = write_page(record)
    assert "6 clusters" in page and "What is in each cluster" in page and sources["spelled/1"].examples[0] in page
    table = next(part for part in render_selection(record) if "a typical row begins" in _heads(part))
    assert list(table.columns[0].cells) == list(sources)
    assert list(table.columns[1].cells) == [str(source.n_rows) for source in sources.values()]
    chosen = record.name_sources(record.strategies[0].sources)
    assert list(table.columns[2].cells) == ["yes" if name in chosen else "no" for name in sources]
    long = replace(record, sources=tuple(replace(source, examples=("many words " * 40,)) for source in record.sources))
    shown = io.StringIO()
    Console(file=shown, width=80).print(*render_selection(long))
    assert all(
        any(line.startswith(f"{name} ") and "many words" in line for line in shown.getvalue().splitlines())
        for name in sources
    ), "a long text leaves the other columns their place"
    whole = select_sources(copied, TARGET, wants_final=False)
    assert "What is in each cluster" not in write_page(whole)


def _heads(part) -> list[str]:
    return [str(column.header) for column in getattr(part, "columns", [])]


# What the command says


def test_a_dry_run_is_in_plain_words(inputs, tmp_path, capsys):
    command = ["select", str(inputs), "--target", TARGET, "--out", str(tmp_path / "dry"), "--dry-run"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "a short training on all tasks (warm-up)" in shown.out and "fine-tunings at the end, at most 5" in shown.out
    assert "the searches between features and fine-tunings take seconds" in shown.out
    assert shown.err.startswith("loading libraries, data and model")
    assert main([*command, "--search-only", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "fine-tunings at the end" not in shown and "nothing is fine-tuned on what they choose" in shown


def test_messages_call_adapters_and_stages_by_words(inputs, tmp_path, capsys):
    changes = ["--set", "training.learning_rate=0.5", "--out", str(tmp_path / "steep")]
    assert main(["select", str(inputs), "--target", TARGET, "--strategy", "forward", *changes]) == 0
    shown = capsys.readouterr()
    assert "an adapter of family0" in shown.err and "fine-tuning on what was chosen: " in shown.err
    assert "pool-" not in shown.err and "pool-" not in shown.out
    assert "the test rows were read once, at the end" in " ".join(shown.out.split())


def test_a_slip_in_a_strategy_is_told_before_anything_is_loaded(inputs, capsys):
    assert main(["select", str(inputs), "--target", TARGET, "--strategy", "forward,,shaply"]) == 2
    told = capsys.readouterr().err
    assert "unknown strategy '', 'shaply': expected all, or some of forward" in told and "loading" not in told
