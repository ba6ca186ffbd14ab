"""Configs: YAML in and out, every fault at once, overrides, and defaults that are documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ensemblelora.config import DataConfig, RunConfig, TrainingConfig, dump_config, load_config, parse_config
from ensemblelora.errors import ConfigError
from ensemblelora.recipe import describe_config, override, read_request

MINIMAL = {"data": {"tasks": ["a", "b"]}}


def write_recipe(folder: Path, values: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


# Control characters and line separators are no names; PyYAML loses a lone U+0085 by itself.
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1)
configs = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {"tasks": st.lists(names, min_size=1, max_size=3)},
            optional={"max_train_examples": st.none() | st.integers(1), "validation_fraction": st.floats(0.01, 0.99)},
        )
    },
    optional={
        "seed": st.integers(0),
        "compat": st.sampled_from(["none", "paper"]),
        "out": names,
        "model": st.fixed_dictionaries({}, optional={"name": names, "revision": st.none() | names}),
        "adapter": st.fixed_dictionaries({}, optional={"target_modules": st.just("auto") | st.lists(names)}),
        "estimation": st.fixed_dictionaries({}, optional={"l2_penalty": st.just("auto") | st.floats(1e-9, 1e9)}),
        "training": st.fixed_dictionaries({}, optional={"learning_rate": st.floats(1e-300, 1e3)}),
    },
)


@settings(max_examples=50)
@given(configs)
def test_what_is_written_reads_back_equal(values):
    config = parse_config(values)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_written_config_states_every_value(tmp_path):
    written = yaml.safe_load(dump_config(parse_config(MINIMAL)))
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, BaseModel):
            assert set(written[name]) == set(type(field.default).model_fields)


def test_a_preset_gives_its_values_where_keys_are_left_out():
    plain, paper = parse_config(MINIMAL), parse_config({**MINIMAL, "compat": "paper"})
    assert plain == parse_config({**MINIMAL, "compat": "none"})
    assert (plain.training.learning_rate, plain.boosting.line_search) == (5e-4, True)
    assert (paper.training.learning_rate, paper.boosting.line_search) == (2e-5, False)
    assert paper.grouping.n_restarts == plain.grouping.n_restarts, "the paper is silent"
    assert paper.data.tasks == plain.data.tasks


@pytest.mark.parametrize("rate", [1e-3, 5e-4])
def test_a_stated_key_wins_over_the_preset_even_if_it_is_our_default(tmp_path, rate):
    stated = {**MINIMAL, "compat": "paper", "training": {"learning_rate": rate}}
    for config in (parse_config(stated), load_config(write_recipe(tmp_path, stated), ("adapter.r=32",))):
        assert (config.training.learning_rate, config.training.num_train_epochs) == (rate, 10)
    assert config.adapter.r == 32
    training = TrainingConfig(learning_rate=rate)
    made = RunConfig(compat="paper", data=DataConfig(tasks=("a", "b")), training=training)
    assert made == parse_config(stated)


def test_a_preset_can_be_set_from_the_command_line(tmp_path):
    assert load_config(write_recipe(tmp_path, MINIMAL), ("compat=paper",)) == parse_config(
        {**MINIMAL, "compat": "paper"}
    )


def test_a_written_config_is_not_changed_by_reading_it_again(tmp_path):
    stated = {**MINIMAL, "compat": "paper", "training": {"num_train_epochs": 1}}
    written = dump_config(parse_config(stated))
    assert yaml.safe_load(written)["adapter"]["r"] == 4
    assert dump_config(parse_config(yaml.safe_load(written))) == written
    ours = yaml.safe_load(dump_config(parse_config(MINIMAL)))
    assert parse_config(ours | {"compat": "paper"}).training == parse_config(MINIMAL).training


@pytest.mark.parametrize("training", [None, "fast", ["learning_rate"]])
def test_a_section_that_is_none_is_refused_with_a_preset_as_without(training):
    faults = []
    for compat in ("none", "paper"):
        with pytest.raises(ConfigError) as caught:
            parse_config({**MINIMAL, "compat": compat, "training": training})
        faults.append(str(caught.value))
    assert faults[0] == faults[1] and faults[0].startswith("config: training: got")


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="compat: got 'reference': input should be 'none' or 'paper'"):
        parse_config({**MINIMAL, "compat": "reference"})


def test_the_list_of_the_papers_values_is_what_the_preset_gives():
    page = (Path(__file__).parents[1] / "docs" / "decisions" / "0006-compat-presets.md").read_text(encoding="utf-8")
    listed = {key: yaml.safe_load(value) for key, value in re.findall(r"^\| `([\w.]+)` \| (\S+) \| \S", page, re.M)}
    plain, paper = (
        yaml.safe_load(dump_config(parse_config({**MINIMAL, "compat": compat}))) for compat in ("none", "paper")
    )
    values = {f"{stage}.{key}": value for stage, keys in paper.items() if isinstance(keys, dict)
              for key, value in keys.items()}  # fmt: skip
    assert listed == {key: values[key] for key in listed}
    changed = {f"{stage}.{key}" for stage, keys in paper.items() if isinstance(keys, dict)
               for key, value in keys.items() if value != plain[stage][key]}  # fmt: skip
    assert changed <= set(listed) and len(changed) > 10


def test_config_is_immutable():
    config = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.training.learning_rate = 1.0


def test_every_fault_is_reported_at_once(tmp_path):
    path = write_recipe(
        tmp_path,
        {"data": {}, "sed": 1, "training": {"learning_rate": -1, "epochs": 3}, "adapter": {"r": "many"}},
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    for part in (str(path), "data.tasks: missing", "sed: unknown key", "training.learning_rate: got -1",
                 "training.epochs: unknown key", "adapter.r: got 'many'"):  # fmt: skip
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "stage", [name for name, field in RunConfig.model_fields.items() if name not in ("out", "seed", "compat")]
)
def test_unknown_key_is_refused_in_every_stage(stage):
    with pytest.raises(ConfigError, match=rf"{stage}\.mispelt: unknown key"):
        parse_config({**MINIMAL, stage: {**MINIMAL.get(stage, {}), "mispelt": 1}})


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.epochs=3", "--set training.epochs: unknown key; did you mean training.num_train_epochs? "),
        ("trainnig.num_train_epochs=3", "--set trainnig: unknown key; did you mean training? "),
        ("num_train_epochs=3", "--set num_train_epochs: unknown key; did you mean training.num_train_epochs? "),
        (
            "adapter.learning_rate=1",
            "--set adapter.learning_rate: unknown key; did you mean training.learning_rate",
        ),
        ("adapter.zzz=1", "--set adapter.zzz: unknown key; `ensemblelora config` lists"),
        ("adapter.r=many", "--set adapter.r: got 'many': "),
        ("data.tasks=[1]", "--set data.tasks.0: got 1: "),
    ],
)
def test_what_was_set_is_blamed_on_the_setting_and_the_rest_on_the_file(tmp_path, override, told):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    good, bad = write_recipe(tmp_path / "good", MINIMAL), write_recipe(tmp_path / "bad", MINIMAL | {"sed": 1})
    with pytest.raises(ConfigError) as caught:
        load_config(good, (override,))
    assert str(caught.value).startswith(told) and str(good) not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(bad, (override,))
    assert str(caught.value).startswith(f"{bad}: sed: unknown key; did you mean seed? ") and told in str(caught.value)


LAYERS = "expected top_half, top_third, a list of one or more layer numbers, or null"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("adapter.layers_to_transform", "top_quarter", f"got 'top_quarter': {LAYERS}"),
        ("adapter.layers_to_transform", 29, f"got 29: {LAYERS}"),
        ("adapter.layers_to_transform", [], f"got []: {LAYERS}"),
        ("adapter.layers_to_transform", [1, "x", -3], f"got [1, 'x', -3]: {LAYERS}"),
        ("adapter.target_modules", ["q", 3], "got ['q', 3]: expected auto, or a list of texts"),
        ("grouping.n_groups", 2.5, "got 2.5: expected auto, or a whole number"),
        ("estimation.l2_penalty", -1, "got -1: expected auto, or a number from 0 on"),
        ("evaluation.max_tokens_per_batch", 0, "got 0: expected auto, or a whole number from 1 on"),
    ],
)
def test_a_key_of_several_kinds_has_one_fault_that_names_them_all(key, value, told):
    section, name = key.split(".")
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, section: {name: value}, "seed": -1})
    assert str(caught.value).startswith("config: seed: got -1: ")
    assert str(caught.value).partition("; ")[2] == f"{key}: {told}"


@pytest.mark.parametrize("layers", ["top_half", None, [0], (3, 1)])
def test_layers_are_named_or_listed_or_all(layers):
    found = parse_config({**MINIMAL, "adapter": {"layers_to_transform": layers}}).adapter.layers_to_transform
    assert found == (tuple(layers) if isinstance(layers, list) else layers)


def test_a_fault_speaks_of_lists_as_yaml_does():
    with pytest.raises(ConfigError, match=r"training\.report_to: got 'all': input should be a valid list$"):
        parse_config({**MINIMAL, "training": {"report_to": "all"}})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value):
    with pytest.raises(ConfigError, match=r"training\.learning_rate"):
        parse_config({**MINIMAL, "training": {"learning_rate": value}})


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"- a\n- b\n", "expected a mapping"), (b"a: [", "not valid YAML"), (b"\xff\xfe\xff", "cannot be read"),
     (b"", "expected a mapping"), (b"!!python/object/apply:os.system [ls]", "not valid YAML")],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, expected):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_overrides_reach_nested_keys_and_the_last_wins(tmp_path):
    path = write_recipe(tmp_path, {**MINIMAL, "training": {"learning_rate": 0.1}})
    changes = ("training.learning_rate=0.2", "training.num_train_epochs=7", "seed=4", "training.learning_rate=0.3")
    config = load_config(path, (*changes, "data.tasks=[c]", "adapter.layers_to_transform=[1, 2]"))
    assert (config.training.learning_rate, config.training.num_train_epochs, config.seed) == (0.3, 7, 4)
    assert (config.data.tasks, config.adapter.layers_to_transform) == (("c",), (1, 2))


@pytest.mark.parametrize(
    "change", ["seed", "=3", "seed.x=1", "seed=[", "training.nothing=1", "training.learning_rate=no"]
)
def test_a_wrong_override_is_refused(tmp_path, change):
    with pytest.raises(ConfigError):
        load_config(write_recipe(tmp_path, {**MINIMAL, "seed": 1}), (change,))


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_quoted_override_stays_the_text_it_was(text):
    key, _, value = override("model.name", text).partition("=")
    assert (key, yaml.safe_load(value)) == ("model.name", text)


def test_described_defaults_are_the_defaults(tmp_path):
    text = describe_config()
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    described = load_config(tmp_path / "recipe.yaml")
    assert described == parse_config({"data": {"tasks": list(described.data.tasks)}})
    values = yaml.safe_load(text)
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, BaseModel):
            assert set(values[name]) == set(type(field.default).model_fields)


def test_a_recipe_gets_a_run_folder_of_its_own_name(tmp_path):
    path = write_recipe(tmp_path, MINIMAL)
    assert read_request(path).out == str(Path("runs") / "recipe")
    assert read_request(path, ("out=elsewhere",)).out == "elsewhere"
    assert read_request(write_recipe(tmp_path, {**MINIMAL, "out": "mine"})).out == "mine"


def test_a_folder_of_files_is_a_request(tmp_path):
    folder = tmp_path / "my tasks"
    folder.mkdir()
    config = read_request(folder, ("training.num_train_epochs=1",))
    assert config == parse_config(
        {"data": {"tasks": [str(folder)]}, "out": str(Path("runs") / "my tasks"), "training": {"num_train_epochs": 1}}
    )


def test_a_run_folder_stands_for_its_run_even_when_moved(tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    (run / "run.json").write_text("{}", encoding="utf-8")
    (run / "config.yaml").write_text(yaml.safe_dump({**MINIMAL, "out": "where it was", "seed": 5}), encoding="utf-8")
    for source in (run, run / "config.yaml"):
        config = read_request(source)
        assert (config.out, config.seed) == (str(run), 5)
    assert read_request(run, ("out=copy",)).out == "copy"


def test_a_missing_request_says_what_can_be_given(tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder; give a YAML recipe, a run folder, or a folder"):
        read_request(tmp_path / "nothing")
