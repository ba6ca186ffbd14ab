"""A card's fields against lm-evaluation-harness's semantics, one row at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblelora.data.rendering import as_row, compile_card, explode_row, normalize_text, read_columns
from ensemblelora.data.task import Example
from ensemblelora.errors import DataError
from tests.toys import make_card

ROW = {"text": "It rains. ", "label": 1, "name": "yes", "ends": ["one", "two"], "nested": {"a": {"b": "deep"}}}


def render(row: dict[str, Any] | None = None, **keys: Any) -> Example:
    row = row or ROW
    return compile_card(make_card(**keys), list(row)).example(row, "train:0")


def test_columns_and_templates() -> None:
    assert render() == Example("train:0", "It rains. ", (" no", " yes"), 1, "train:0")
    assert render(doc_to_text="{{text.strip()}}\nQ:\n").context == "It rains.\nQ:\n"
    assert render(doc_to_text="{{nested.a.b|upper}}").context == "DEEP"
    assert render(doc_to_text="{{text|regex_replace('[a-z]+', 'x')}}").context == "Ix x. "
    assert render(description="Be brief. ").context == "Be brief. It rains. "


@pytest.mark.parametrize(
    ("target", "label"),
    [("label", 1), ("{{label}}", 1), ("{{ label - 1 }}", 0), ("name", 1), ("{{name}}", 1), ("{{'no'}}", 0), (1, 1)],
)
def test_targets_are_indices_or_choices(target: Any, label: int) -> None:
    assert render(doc_to_target=target).label == label


def test_a_column_of_digits_names_choices_and_a_template_of_digits_counts() -> None:
    row = {"text": "x", "answer": "1"}
    keys = {"doc_to_choice": ["2", "1", "0"]}
    assert render(row, doc_to_target="answer", **keys).label == 1
    assert render(row, doc_to_target="{{answer}}", **keys).label == 1
    assert render({**row, "answer": "0"}, doc_to_target="answer", **keys).label == 2
    assert render({**row, "answer": "0"}, doc_to_target="{{answer}}", **keys).label == 0


@pytest.mark.parametrize(
    "choice", ["ends", "{{ends}}", "{{ [ends[0], 'two'] }}", ["one", "two"], {"x": "one", "y": "two"}]
)
def test_choices_as_column_template_list_or_mapping(choice: Any) -> None:
    assert render(doc_to_choice=choice).choices == (" one", " two")


@given(st.lists(st.text(max_size=8), min_size=2, max_size=4))
def test_any_text_survives_as_a_choice(ends: list[str]) -> None:
    example = render({"text": "", "label": 0, "ends": ends}, doc_to_choice="{{ends}}", target_delimiter="\n")
    assert example.choices == tuple("\n" + end for end in ends)


def test_delimiters() -> None:
    free = {"doc_to_choice": None, "doc_to_target": "name"}
    assert render(target_delimiter="\n").choices == ("\nno", "\nyes")
    assert render(head="sequence_classification").choices == ("no", "yes")
    assert render(output_type="generate_until", **free).choices == (" yes",)
    assert render(output_type="loglikelihood", **free).choices == ("yes",)  # such a target brings its own


def test_groups_are_folded_and_default_to_the_row() -> None:
    assert render(group="{{text}} AGAIN").group == "it rains. again"
    assert render().group == render({**ROW, "text": " "}, group="text").group == "train:0"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"doc_to_text": "{{txt}}"}, r"doc_to_text: unknown column 'txt' \(columns: text, label, name, ends, nested\)"),
        ({"doc_to_text": "txt"}, "doc_to_text: unknown column 'txt'"),
        ({"group": "passage"}, "group: unknown column 'passage'"),
        ({"doc_to_choice": "endings"}, "doc_to_choice: unknown column 'endings'"),
        ({"doc_to_text": "{{text"}, "doc_to_text: not a valid template"),
        ({"doc_to_text": "{{nested.c.d}}"}, "doc_to_text: .*no attribute 'c'"),
        ({"doc_to_text": "{{text + 1}}"}, "doc_to_text: "),
        ({"doc_to_text": "{{text.__class__.__mro__}}"}, "doc_to_text: .*unsafe"),
        ({"doc_to_choice": "{{text}}"}, "doc_to_choice: expected a list"),
        ({"doc_to_choice": "{{ [text] }}"}, "two choices or more"),
        ({"doc_to_choice": ["a", "a"]}, "same choice twice"),
        ({"doc_to_target": "{{'maybe'}}"}, r"label 'maybe' is not one of \['no', 'yes'\]"),
        ({"doc_to_target": 2}, "label 2 is not one of"),
        ({"doc_to_target": "{{ 0 - 1 }}"}, "label '-1' is not one of"),
        ({"doc_to_target": "ends"}, "multi-label tasks are not supported"),
        ({"doc_to_target": "{{ends}}"}, "multi-label tasks are not supported"),
        ({"doc_to_target": "{{label / 4}}"}, "regression is not supported"),
    ],
)
def test_faults_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as fault:
        render(**keys)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(("value", "message"), [(0.5, "regression is not supported"), (None, "target is missing")])
def test_targets_that_are_no_class(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render({"text": "x", "label": value})


@pytest.mark.parametrize(("value", "message"), [(" ", "empty"), (["a", "b"], "pick one"), (None, "missing")])
def test_answers_that_are_no_text(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render({"text": "x", "a": value}, doc_to_choice=None, doc_to_target="a", output_type="generate_until")


def test_of_many_columns_the_nearest_come_first_and_few_in_all() -> None:
    row = {f"col_{i}": "a" for i in range(20)} | {"sentence": "b", "sentiment": 0}
    with pytest.raises(DataError) as fault:
        render(row, doc_to_text="{{sentnce}} {{col_1}}", group="{{sentnce}}", doc_to_target="sentimnt")
    assert str(fault.value) == (
        "doc_to_text and group: unknown column 'sentnce', doc_to_target: unknown column 'sentimnt' "
        "(columns: sentiment, sentence, col_0, col_1, col_2, col_3 and 16 more)"
    )
    nested = {f"col_{i}": "a" for i in range(20)} | {"nested": {"inner": 1}, "label": 0}
    with pytest.raises(DataError, match=r"'colour'.*\(columns: col_0, .*col_5 and 16 more\)"):
        render(nested, doc_to_text="{{nested.colour}}")


def test_all_unknown_columns_come_at_once() -> None:
    with pytest.raises(DataError, match=r"'txt', .*'lable', .*'grp'"):
        render(doc_to_text="{{txt}}", doc_to_target="{{lable}}", group="{{grp}}")


def test_a_column_may_be_missing_where_the_template_says_so() -> None:
    text = "{% if hint is defined %}{{hint}} {% endif %}{{text}}{{ extra|default('!') }}{{ range(2)|list|length }}"
    assert render(doc_to_text=text).context == "It rains. !2"


def test_templates_can_not_change_rows() -> None:
    with pytest.raises(DataError, match="doc_to_text"):
        render(doc_to_text="{{ ends.append('three') }}")
    assert ROW["ends"] == ["one", "two"]


def test_explode_follows_nested_lists_in_order() -> None:
    row = {"id": 1, "p": {"t": "x", "qs": [{"q": "a", "as": [{"v": 1}, {"v": 2}]}, {"q": "b", "as": [{"v": 3}]}]}}
    inner = list(explode_row(row, "p.qs.as"))
    assert [(r["p"]["t"], r["p"]["qs"]["q"], r["p"]["qs"]["as"]["v"]) for r in inner] == [
        ("x", "a", 1),
        ("x", "a", 2),
        ("x", "b", 3),
    ]
    assert row["p"]["qs"][0]["as"] == [{"v": 1}, {"v": 2}]  # the row itself is left as it was
    assert list(explode_row(row, None)) == [row]
    assert list(explode_row({"xs": []}, "xs")) == []


def test_explode_names_what_is_missing() -> None:
    with pytest.raises(DataError, match="no field 'rs'; known: qs"):
        list(explode_row({"p": {"qs": []}}, "p.rs"))


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize_text(text)
    assert normalize_text(f"  {once}\n") == once


def test_a_text_stands_for_one_column_and_a_json_object_for_several() -> None:
    one, two = make_card(doc_to_text="{{text}}"), make_card(doc_to_text="{{question}} {{passage}}")
    text = '{"question": "q", "passage": "p", "more": 1}'
    assert as_row(one, text) == {"text": text}
    assert as_row(two, f"  {text}\n") == as_row(two, read_columns([one, two], text)) == json.loads(text)
    assert read_columns([one], text) == text and read_columns([two], "{broken") == "{broken"
    assert read_columns([two], '{"question": "q"}') == '{"question": "q"}'
    assert read_columns([two], {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a text", r"made of the columns passage, question; give a JSON object with these: {\"passage\": \"...\", "),
        ('{"question": ', "not valid JSON .*; its text is made of the columns passage, question"),
        ('{"question": "q"}', "no passage in .*; its text is made of"),
        ("{}", "no passage and no question in "),
        ("[1]", "give a JSON object with these"),
        ("{" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
    ],
)
def test_texts_that_are_no_columns(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_row(make_card(doc_to_text="{{question}} {{passage}}"), text)
