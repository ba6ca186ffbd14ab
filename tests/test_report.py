from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from plotly.offline import get_plotlyjs

import ensemblelora
from ensemblelora.artifacts import read_json, save_arrays, write_json
from ensemblelora.errors import OutputError, StoreError, UsageError
from ensemblelora.grouping import compute_objective
from ensemblelora.report import write_report
from ensemblelora.report.build import compose_document, render_html, render_markdown
from ensemblelora.report.document import Cell, Column, Document, Row, Section, Table, Text
from ensemblelora.report.headline import write_headline
from ensemblelora.report.heatmaps import remove_levels
from ensemblelora.report.hierarchy import build_tree
from ensemblelora.report.power_section import estimate_detectable_difference
from ensemblelora.report.reading import load_record
from ensemblelora.report.result_sections import compute_rank_correlation
from ensemblelora.report.wording import (
    format_bytes,
    format_flops,
    format_interval,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    format_signed,
    group_letter,
)
from tests.report_runs import (
    ACCURACY,
    GROUPS,
    TASKS,
    make_affinity,
    make_planned_run,
    make_results,
    make_run,
    make_tasks,
    write_free_text,
)

EVIL = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '"><b onclick="alert(3)">',
    "a|b | c",
    "[click](javascript:alert(4))",
    "`tick` **bold** _it_",
    "{{ 7 * 7 }}{% raw %}",
    "</script><script>alert(5)</script>",
    "<a href='https://evil.example'>x</a>",
    "new\nline # heading & more",
)
SECTIONS = (
    "asked", "plan", "affinity", "helping", "curve", "prediction", "results", "pareto", "weights", "boosting", "costs",
    "linearity", "warnings", "power", "reproduce",
)  # fmt: skip


class Page(HTMLParser):
    """What a browser would see of a page: its elements, the text of each kind, and every attribute."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes what was not open"

    def handle_data(self, data):
        for tag in dict.fromkeys(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", self.texts["main"][0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("finished"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(finished) -> Page:
    return Page((finished / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> Document:
    return compose_document(load_record(make_run(tmp_path_factory.mktemp("evil"), EVIL)))


def all_tables(document: Document) -> list[Table]:
    return [block for section in document.sections for block in section.blocks if isinstance(block, Table)]


def find_table(document: Document, caption: str) -> Table:
    return next(table for table in all_tables(document) if table.caption.startswith(caption))


def edit(folder: Path, name: str, **changes) -> Path:
    write_json(folder / name, {**read_json(folder / name), **changes})
    return folder


class TestFinishedRun:
    def test_writes_both_pages_and_returns_the_html(self, tmp_path):
        assert write_report(make_run(tmp_path)) == tmp_path / "report.html"
        assert (tmp_path / "report.md").stat().st_size > 5000

    def test_sections_stand_in_reading_order_in_both_pages(self, page, finished):
        assert [section["id"] for section in page.all("section")] == list(SECTIONS)
        markdown = (finished / "report.md").read_text(encoding="utf-8")
        assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == page.texts["h2"]
        assert len(page.all("h1")) == 1

    def test_says_what_was_gained_and_how_sure_that_is(self, page):
        assert page.texts["h1"] == [
            "Training 10 tasks in 3 groups with 1 booster raised mean test accuracy by 2.3 points against one adapter "
            "for all (95% interval 0.4 to 4.2)."
        ]

    def test_same_run_gives_same_bytes(self, finished, tmp_path):
        folder = tmp_path / finished.name
        write_report(make_run(folder))
        for name in ("report.html", "report.md"):
            assert (folder / name).read_bytes() == (finished / name).read_bytes()

    def test_every_task_and_every_number_of_the_score_table_is_on_both_pages(self, page, finished):
        markdown = (finished / "report.md").read_text(encoding="utf-8")
        for method, values in ACCURACY.items():
            for task, value in zip(TASKS, values, strict=True):
                assert task in page.text
                assert f"{100 * value:.1f}" in page.text, (method, task)
                assert f"{100 * value:.1f}" in markdown, (method, task)

    def test_groups_are_shown_with_their_tasks(self, page, finished):
        cards = compose_document(load_record(finished)).sections[1].blocks[1].cards
        assert [card.tasks for card in cards] == [tuple(TASKS[task] for task in group) for group in GROUPS]
        assert [card.letter for card in cards] == ["A", "B", "C"]
        for card in cards:
            assert f"{card.letter} group {card.letter}, {card.remark} {''.join(card.tasks)}" in page.text

    def test_the_command_runs_this_config_again(self, page):
        assert "ensemblelora run runs/demo/config.yaml" in page.texts["code"][0]
        assert yaml.safe_load(page.texts["code"][1])["data"]["tasks"] == list(TASKS)

    def test_a_folder_with_a_space_is_quoted_in_the_command(self, finished, tmp_path):
        make_run(tmp_path)
        config = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "out": "my runs/a"}), encoding="utf-8")
        assert "run 'my runs/a/config.yaml'" in render_markdown(compose_document(load_record(tmp_path)))


class TestSelfContained:
    def test_nothing_is_fetched(self, page, finished):
        for tag, attributes in page.elements:
            assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form")
            assert "src" not in attributes
            assert attributes.get("href", "#").startswith("#")
        style = page.texts["style"][0]
        assert "@import" not in style and "url(" not in style

    def test_plotly_is_there_once(self, finished):
        source = (finished / "report.html").read_text(encoding="utf-8")
        assert unpack_plotly(Page(source)) == get_plotlyjs() and "plotly.js v" not in source
        assert len(source) < 2_200_000

    def test_only_the_pages_own_scripts_may_run(self, page):
        policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
        scripts = [
            text for text, attributes in zip(page.texts["script"], page.all("script"), strict=True) if not attributes
        ]
        allowed = [unpack_plotly(page), *scripts]
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in allowed]
        assert policy.startswith("default-src 'none'")
        assert policy.split("script-src ")[1] == " ".join(f"'sha256-{digest}'" for digest in digests)

    def test_figures_are_small(self, page):
        specs = next(text for text, item in zip(page.texts["script"], page.all("script"), strict=True) if item)
        assert len(specs) < 60_000

    def test_importing_and_writing_needs_no_torch(self, finished):
        code = (
            "import sys, pathlib; from ensemblelora.report import write_report; "
            f"write_report(pathlib.Path({str(finished)!r})); "
            "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(ensemblelora.__file__).parents[1])}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.strip() == "[]"


def unpack_plotly(page: Page) -> str:
    """What the browser makes of the packed script, which it does not run as it stands."""
    (packed,) = [
        text
        for text, item in zip(page.texts["script"], page.all("script"), strict=True)
        if item == {"type": "text/plain", "id": "plotly"}
    ]
    return zlib.decompress(base64.b64decode(packed, validate=True)).decode()


class TestAccessibility:
    def test_ids_are_unique_and_links_lead_somewhere(self, page):
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(set(ids)) == len(ids)
        assert {link["href"].removeprefix("#") for link in page.all("a")} <= set(ids)
        assert {item["aria-labelledby"] for item in page.all("section")} <= set(ids)

    def test_every_figure_says_in_a_sentence_what_it_shows(self, page, finished):
        drawn = [item for item in page.all("div") if item.get("role") == "img"]
        specs = json.loads(next(t for t, item in zip(page.texts["script"], page.all("script"), strict=True) if item))
        assert {item["id"] for item in drawn} == {f"figure-{name}" for name in specs}
        assert len(drawn) == 12
        assert all(item["tabindex"] == "0" for item in drawn), "the keyboard reaches every figure"
        for item in drawn:
            assert len(item["aria-label"]) > 40 and item["aria-label"].endswith(".")

    def test_tables_have_captions_and_scopes(self, page):
        assert len(page.texts["caption"]) == len(page.all("table")) >= 10
        assert {item.get("scope") for item in page.all("th")} == {"row", "col"}
        assert len([item for item in page.all("th") if item["scope"] == "row"]) == len(page.all("tr")) - len(
            page.all("table")
        )

    def test_page_has_language_viewport_and_both_themes(self, page):
        assert page.all("html")[0]["lang"] == "en"
        assert any(item.get("name") == "viewport" for item in page.all("meta"))
        style = page.texts["style"][0]
        assert "prefers-color-scheme: dark" in style and "@media print" in style and "max-width" in style

    def test_both_themes_define_every_colour_that_is_used(self, page):
        style = page.texts["style"][0]
        themes = theme_colours(style)
        assert set(themes["light"]) == set(themes["dark"])
        specs = next(text for text, item in zip(page.texts["script"], page.all("script"), strict=True) if item)
        used = set(re.findall(r"var\(--([a-z0-9-]+)\)", style + specs)) - {"colour"}
        assert used <= set(themes["light"])
        assert {name for name in used if name.startswith("group-")} >= {f"group-{g}" for g in range(6)}


def theme_colours(style: str) -> dict[str, dict[str, str]]:
    light, dark = re.search(r":root \{(.*?)\}", style, re.S), re.search(r":not\(\.printing\) \{(.*?)\}", style, re.S)
    return {
        name: dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", found.group(1)))
        for name, found in (("light", light), ("dark", dark))
    }


def linear_rgb(colour: str) -> np.ndarray:
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """WCAG 2.1 contrast ratio."""
    low, high = sorted(float(linear_rgb(c) @ [0.2126, 0.7152, 0.0722]) for c in (first, second))
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira and Fernandes (2009), full severity: what is left of a colour to the colour-blind.
SIGHTS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson's perceptual space, in which distances are about what the eye tells apart."""
    lms = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]) @ rgb
    mix = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.array(mix) @ np.cbrt(np.clip(lms, 0, None))


class TestPalette:
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_groups_can_be_told_apart_by_everyone(self, page, theme):
        colours = theme_colours(page.texts["style"][0])[theme]
        groups = [linear_rgb(colours[f"group-{group}"]) for group in range(6)]
        for sight, matrix in SIGHTS.items():
            seen = [oklab(np.clip(np.array(matrix) @ rgb, 0, 1)) for rgb in groups]
            distances = [np.linalg.norm(seen[i] - seen[j]) for i in range(6) for j in range(i)]
            assert min(distances) > 0.12, sight  # Okabe and Ito's eight reach 0.08

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_text_and_marks_stand_out(self, page, theme):
        colours = theme_colours(page.texts["style"][0])[theme]
        for text in ("ink", "ink-soft", "accent"):
            assert contrast(colours[text], colours["page"]) >= 4.5
        for name, colour in colours.items():
            if name.startswith(("group-", "method-")):
                assert contrast(colour, colours["surface"]) >= 3, name


class TestUntrustedNames:
    def test_no_name_becomes_markup(self, evil):
        page = Page(render_html(evil))
        ours = (
            "html head meta title style body main header section nav script p span h1 h2 ul li a dl div dt dd table "
            "caption thead tbody tr th td small strong figure figcaption noscript details summary pre code ol footer"
        )
        assert len(page.all("script")) == 3
        assert {tag for tag, _ in page.elements} <= set(ours.split())
        assert not [name for _, item in page.elements for name in item if name.startswith("on")]
        for name in EVIL:
            assert " ".join(name.split()) in page.text

    def test_templates_in_names_are_not_run(self, evil):
        assert "49" not in Page(render_html(evil)).texts["h1"][0]
        assert "{{ 7 * 7 }}" in Page(render_html(evil)).text

    def test_labels_of_figures_hold_no_markup(self, evil):
        for figure in evil.figures:
            for text in strings_of(figure.spec):
                assert not re.search(r"<(?!/?b>|br>|extra>|/extra>)", text), (figure.name, text)

    def test_figures_cannot_close_their_script(self, evil):
        source = render_html(evil)
        specs = source.split('id="figures">')[1].split("</script>")[0]
        assert json.loads(specs).keys() == {figure.name for figure in evil.figures}

    def test_markdown_stays_text(self, evil):
        html = MarkdownIt("commonmark", {"html": True}).enable("table").render(render_markdown(evil))
        page = Page(html.replace("<hr />", ""))
        allowed = {
            "h1",
            "h2",
            "p",
            "ul",
            "li",
            "strong",
            "em",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "pre",
            "code",
        }
        assert {tag for tag, _ in page.elements} <= allowed
        text = re.sub(r"\s+", " ", "".join(page.texts["td"]))
        for name in EVIL:
            assert " ".join(name.split()) in text

    def test_markdown_tables_keep_their_columns(self, evil):
        html = MarkdownIt("commonmark").enable("table").render(render_markdown(evil))
        tables = [table for table in all_tables(evil)]
        found = re.findall(r"<table>(.*?)</table>", html, re.S)
        assert len(found) == len(tables)
        for source, table in zip(found, tables, strict=True):
            rows = re.findall(r"<tr>(.*?)</tr>", source, re.S)
            assert len(rows) == len(table.rows) + 1
            assert {len(re.findall(r"<t[hd]\b", row)) for row in rows} == {len(table.columns)}

    def test_a_config_with_a_fence_stays_in_its_block(self, tmp_path):
        make_run(tmp_path)
        with (tmp_path / "config.yaml").open("a", encoding="utf-8") as stream:
            stream.write('note: "\n\n  ```\n\n  # broken out\n\n  "\n')
        html = MarkdownIt("commonmark").render(render_markdown(compose_document(load_record(tmp_path))))
        assert "<h1>broken out" not in html


def strings_of(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in strings_of(item)]


class TestUnfinishedRuns:
    def test_a_plan_alone_is_reported_as_a_plan(self, tmp_path):
        page = Page(write_report(make_planned_run(tmp_path)).read_text(encoding="utf-8"))
        names = [section["id"] for section in page.all("section")]
        assert names == ["asked", "plan", "affinity", "helping", "curve", "warnings", "power", "reproduce"]
        assert "mean validation loss predicted 0.028 ± 0.006 (1 SE) better" in page.texts["h1"][0]
        assert "Nothing is trained or tested yet" in page.text

    def test_the_least_that_can_be_reported(self, tmp_path):
        write_json(tmp_path / "plan.json", {"task_names": ["a"], "groups": [[0]]})
        page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
        assert page.texts["h1"] == ["One adapter for a: there is nothing to group."]

    @pytest.mark.parametrize("missing", ["affinity.npz", "ensemble.json", "costs.json", "results.json", "config.yaml"])
    def test_each_file_may_be_missing(self, tmp_path, missing):
        (make_run(tmp_path) / missing).unlink()
        assert "The plan" in Page(write_report(tmp_path).read_text(encoding="utf-8")).texts["h2"]

    def test_unknown_keys_are_passed_over(self, tmp_path):
        edit(make_run(tmp_path), "results.json", novelty={"x": 1})
        write_report(tmp_path)

    def test_numbers_that_do_not_exist_are_dashes(self, tmp_path):
        results = make_results()
        for method in results["methods"].values():
            method["per_task"]["cb"].update(macro_f1=None, macro_f1_low=None, macro_f1_high=float("nan"))
        (make_run(tmp_path) / "results.json").write_text(json.dumps(results), encoding="utf-8")
        table = find_table(compose_document(load_record(tmp_path)), "Macro-F1")
        row = next(row for row in table.rows if row.cells[0].text == "cb")
        assert {cell.text for cell in row.cells[1:]} == {"\u2013"}
        assert not any(cell.is_best for cell in row.cells)

    def test_free_text_tasks_alone_have_no_accuracy(self, tmp_path):
        results = make_results()
        for method in results["methods"].values():
            for score in method["per_task"].values():
                none = {f"{metric}{end}": None for metric in ("accuracy", "macro_f1") for end in ("", "_low", "_high")}
                score.update(kind="sequence", majority=None, is_above_chance=None, **none)
        results["differences"] = [item for item in results["differences"] if item["metric"] == "nll"]
        document = compose_document(load_record(edit(make_run(tmp_path), "results.json", **results)))
        assert "lowered mean test loss by 0.021 against one adapter for all" in document.headline
        assert [table.caption for table in all_tables(document) if table.caption.startswith("Accuracy")] == []

    def test_many_tasks_keep_the_page_readable_and_small(self, tmp_path):
        n = 150
        groups = [list(range(0, n, 2)), list(range(1, n, 2))]
        write_json(tmp_path / "plan.json", {"task_names": [f"role-{i}" for i in range(n)], "groups": groups})
        matrix = np.add.outer(np.arange(n), np.arange(n)) / n
        save_arrays(tmp_path / "affinity.npz", {"matrix": matrix, "counts": np.zeros((n, n))})
        document = compose_document(load_record(tmp_path))
        maps = [figure for figure in document.figures if figure.name.startswith("affinity")]
        assert maps and all(not figure.spec["layout"]["xaxis"]["showticklabels"] for figure in maps)
        assert len(json.dumps([figure.spec for figure in document.figures])) < 300_000


def make_small_run(folder: Path, n: int) -> Path:
    """A plan of the first tasks alone."""
    make_planned_run(folder)
    plan = read_json(folder / "plan.json")
    for way in plan["predicted"].values():
        way |= {name: way[name][:n] for name in ("nll", "nll_se", "accuracy", "accuracy_se")}
    curve = [point for point in plan["curve"] if point["n_groups"] <= n]
    plan |= {"task_names": list(TASKS[:n]), "groups": [list(range(n))], "curve": curve, "n_validation": [9] * n}
    write_json(folder / "plan.json", plan)
    save_arrays(folder / "affinity.npz", {name: values[:n, :n] for name, values in make_affinity().items()})
    tasks = make_tasks()["tasks"][:n]
    write_json(folder / "tasks.json", {"tasks": tasks, "overlaps": []})
    return folder


class TestFewTasks:
    def test_one_task_has_no_partners_and_no_number_of_groups(self, tmp_path):
        document = compose_document(load_record(make_small_run(tmp_path, 1)))
        assert not {"affinity", "helping", "curve"} & {section.name for section in document.sections}
        table = find_table(document, "Predicted performance on 9 validation rows")
        assert [row.cells[0].text for row in table.rows] == ["The plan", "Base model"]

    def test_two_tasks_have_nothing_to_compare_their_pair_with(self, tmp_path):
        document = compose_document(load_record(make_small_run(tmp_path, 2)))
        (section,) = (section for section in document.sections if section.name == "affinity")
        assert section.blocks[0].text.startswith("Two tasks are one pair") and len(section.blocks) == 1
        assert "training sets of 2 tasks" in render_markdown(document)

    def test_three_tasks_are_told_apart(self, tmp_path):
        document = compose_document(load_record(make_small_run(tmp_path, 3)))
        z = np.array(document.figures[0].spec["data"][0]["z"], dtype=float)
        assert np.nanstd(z) > 1e-3
        text = render_markdown(document)
        assert "training sets of 2 tasks (affinity.subset_size asks for 3; a set leaves a task out)" in text
        assert "its mean over all its training sets" in text and "27 validation rows, 9 a task" in text


class TestWhatIsTold:
    def test_a_step_of_boosting_is_told_from_the_share_of_it_that_is_added(self, finished):
        table = find_table(compose_document(load_record(finished)), "Boosting rounds")
        assert [row.cells[4].text for row in table.rows] == ["2 \u00d7 0.3", "0.33 \u00d7 0.3"]
        assert "by line search" in table.note and "boosting.boosting_rate" in table.note

    def test_rows_that_were_cut_are_listed(self, tmp_path):
        make_run(tmp_path)
        tasks = make_tasks()
        tasks["tasks"][3] |= {"n_truncated": {"train": 30, "validation": 3, "test": 3}, "fitting_length": 1412}
        write_json(tmp_path / "tasks.json", tasks)
        table = find_table(compose_document(load_record(tmp_path)), "Tasks and their rows")
        cells = {row.cells[0].text: row.cells[-1] for row in table.rows}
        assert table.columns[-1].label == "Rows cut" and "data.max_length" in table.note
        assert (cells["mrpc"].text, cells["mrpc"].detail) == ("9.9%", "1,412 tokens")
        assert (cells["rte"].text, cells["rte"].detail) == ("0.0%", "")

    def test_nothing_cut_has_no_column(self, finished):
        table = find_table(compose_document(load_record(finished)), "Tasks and their rows")
        assert table.columns[-1].label == "Test rows" and "cut" not in table.note

    def test_every_word_is_explained_once_and_linked_from_where_it_first_stands(self, page, finished):
        words = {item["id"] for item in page.all("div") if item.get("id", "").startswith("word-")}
        assert {"word-adapter", "word-affinity", "word-boosting", "word-ensemble"} <= words
        assert not {"word-tag", "word-mtl-ft", "word-qlora"} & words, "what the page does not say is not explained"
        links = [link["href"][1:] for link in page.all("a") if link["href"].startswith("#word-")]
        assert len(set(links)) == len(links) and set(links) <= words and len(links) > 5
        markdown = (finished / "report.md").read_text(encoding="utf-8")
        assert len(re.findall(r"^- \*\*.*\*\*: ", markdown.split("## Words")[1], re.MULTILINE)) == len(words)

    def test_rivals_of_a_comparison_are_explained_too(self):
        table = Table("Methods", (Column("Method"),), (Row((Cell("MTL-FT"),)), Row((Cell("TAG <b>"),))))
        source = render_html(Document("x", (), "QLoRA", sections=[Section("a", "A", [table, Text("TAG, MTL-FT")])]))
        for place, text in (("word-mtl-ft", "MTL-FT"), ("word-tag", "TAG")):
            assert source.count(f'<a href="#{place}">{text}</a>') == source.count(f'id="{place}"') == 1
        assert 'id="word-qlora"' in source and "word-lora" not in source and "&lt;b&gt;" in source


class TestHeadline:
    @pytest.mark.parametrize(
        ("low", "high", "value", "expected"),
        [
            (0.004, 0.042, 0.023, "raised mean test accuracy by 2.3 points against one adapter for all (95% interval"),
            (
                -0.042,
                -0.004,
                -0.023,
                "made mean test accuracy worse by 2.3 points against one adapter for all (95% interval 0.4 to 4.2)",
            ),
            (-0.01, 0.03, 0.011, "made no difference that this run can show against one adapter for all: +1.1 points"),
        ],
    )
    def test_claims_no_more_than_the_interval(self, tmp_path, low, high, value, expected):
        item = {"a": "ensemble", "b": "shared", "metric": "accuracy", "difference": value, "low": low, "high": high}
        edit(make_run(tmp_path), "results.json", differences=[item])
        assert expected in write_headline(load_record(tmp_path))

    def test_a_loss_that_is_shown_to_differ_comes_before_an_accuracy_that_is_not(self, tmp_path):
        pair = {"a": "ensemble", "b": "shared"}
        accuracy = pair | {"metric": "accuracy", "difference": 0.011, "low": -0.01, "high": 0.03}
        loss = pair | {"metric": "nll", "difference": -0.189, "low": -0.288, "high": -0.08}
        edit(make_run(tmp_path), "results.json", differences=[accuracy, loss])
        headline = write_headline(load_record(tmp_path))
        told = "lowered mean test loss by 0.189 against one adapter for all (95% interval"
        assert told in headline and "in mean test accuracy it made no difference that this run can show: +1" in headline
        edit(tmp_path, "results.json", differences=[accuracy, loss | {"high": 0.01}])
        assert "loss" not in write_headline(load_record(tmp_path))

    def test_the_order_in_which_two_methods_are_compared_does_not_matter(self, tmp_path):
        item = {
            "a": "shared",
            "b": "ensemble",
            "metric": "accuracy",
            "difference": -0.023,
            "low": -0.042,
            "high": -0.004,
        }
        forward = write_headline(load_record(make_run(tmp_path)))
        edit(tmp_path, "results.json", differences=[item])
        assert write_headline(load_record(tmp_path)) == forward

    def test_one_adapter_is_measured_against_the_base_model(self, tmp_path):
        make_run(tmp_path)
        edit(tmp_path, "plan.json", groups=[list(range(10))], decision="one adapter")
        edit(tmp_path, "ensemble.json", weights=[[1.0]] * 10, members=[], boosting=[])
        headline = write_headline(load_record(tmp_path))
        assert headline.startswith(
            "The plan is one adapter for all 10 tasks. It raised mean test accuracy by 12.7 points against the base"
        )

    @pytest.mark.parametrize(("n_boosters", "said"), [(0, ""), (1, " with 1 booster"), (2, " with 2 boosters")])
    def test_boosters_are_named_since_they_are_measured_too(self, tmp_path, n_boosters, said):
        make_run(tmp_path)
        edit(tmp_path, "plan.json", groups=[list(range(10))], decision="one adapter")
        members = [{"name": "group-0", "group": 0, "kind": "group", "rate": 1.0}]
        members += [{"name": f"b{i}", "group": 0, "kind": "booster", "rate": 0.3} for i in range(n_boosters)]
        edit(tmp_path, "ensemble.json", weights=[[1.0]] * 10, members=members, boosting=[])
        headline = write_headline(load_record(tmp_path))
        who = f"{said.strip().capitalize()} it" if said else "It"
        opening = f"The plan is one adapter for all 10 tasks. {who}"
        assert headline.startswith(f"{opening} raised mean test accuracy by 12.7 points against the base model (95%")
        assert ("Against the same adapter without boosters: +2.3 points (95% interval" in headline) == bool(said)
        edit(tmp_path, "results.json", differences=[])
        assert write_headline(load_record(tmp_path)).startswith(f"{opening}: mean test accuracy 62.0% against 49.3%")
        page = write_report(tmp_path).with_suffix(".md").read_text(encoding="utf-8")
        assert "The frame shows 1 group." in page and not re.search(r"\b1 groups", page)

    @pytest.mark.parametrize(
        ("n_tasks", "groups", "curve", "expected"),
        [
            (1, [[0]], [], "One adapter for t0: there is nothing to group."),
            (3, [[0, 1, 2]], [], "One adapter for all 3 tasks: that is the plan."),
            (3, [[0, 1, 2]], [2], "One adapter for all 3 tasks: no grouping is predicted to be clearly better."),
            (3, [[0], [1], [2]], [3], "One adapter for each of 3 tasks: mean validation loss predicted 0.040 better"),
            (3, [[0, 1], [2]], [2], "Training 3 tasks in 2 groups: mean validation loss predicted 0.040 better than"),
            (3, [[0, 1], [2]], [], "Training 3 tasks in 2 groups: that is the plan."),
        ],
    )
    def test_names_each_kind_of_plan(self, tmp_path, n_tasks, groups, curve, expected):
        points = [{"n_groups": n_groups, "gain": 0.04} for n_groups in curve]
        names = [f"t{task}" for task in range(n_tasks)]
        write_json(tmp_path / "plan.json", {"task_names": names, "groups": groups, "curve": points})
        assert write_headline(load_record(tmp_path)).startswith(expected)
        write_report(tmp_path)

    def test_tile_and_table_say_who_is_in_how_many_groups_and_what_differs(self, tmp_path):
        page = Page(write_report(make_run(tmp_path)).read_text(encoding="utf-8"))
        sizes = [len(group) for group in json.loads((tmp_path / "plan.json").read_text())["groups"]]
        assert f"10 tasks: {' + '.join(map(str, sizes))}" in page.text
        assert "Differences in the mean over tasks" in page.text
        assert page.text.count("Ensemble less one adapter for all") == 1, "a line a pair, all metrics in it"

    def test_without_an_interval_only_the_means_are_told(self, tmp_path):
        edit(make_run(tmp_path), "results.json", differences=[])
        assert write_headline(load_record(tmp_path)) == (
            "Training 10 tasks in 3 groups with 1 booster: mean test accuracy 62.0% against 59.7% for one adapter for "
            "all."
        )


class TestScores:
    def test_best_is_marked_where_it_means_something(self, finished):
        table = find_table(compose_document(load_record(finished)), "Accuracy")
        results = make_results()["methods"]
        for row in [row for row in table.rows if not row.is_summary]:
            scores = [results[method]["per_task"][row.cells[0].text] for method in ("base", "shared", "ensemble")]
            is_doubtful = not any(score["is_above_chance"] for score in scores)
            best = max(score["accuracy"] for score in scores)
            expected = [score["accuracy"] == best and not is_doubtful for score in scores]
            assert [cell.is_best for cell in row.cells[1:4]] == expected
            is_at_chance = is_doubtful and all(score["accuracy"] <= score["majority"] for score in scores)
            assert row.cells[0].tag == ("at chance" if is_at_chance else "too few rows" if is_doubtful else "")

    def test_five_rows_are_too_few_to_be_at_chance(self, tmp_path):
        make_run(tmp_path)
        results = make_results()
        few = {"n_examples": 5, "n_groups": 5, "majority": 0.6, "is_above_chance": False}
        for accuracy, method in zip((0.6, 0.8, 1.0), results["methods"].values(), strict=True):
            for name, score in method["per_task"].items():
                none = {"majority": 1.0} if name == "copa" else {}
                score.update(few | {"accuracy": accuracy} | none)
        edit(tmp_path, "results.json", **results)
        document = compose_document(load_record(tmp_path))
        text = render_markdown(document)
        assert "boolq (5 of about 14 needed)" in text and "copa (all have one answer)" in text
        assert "no method is above" not in text and "second mean" not in text
        table = find_table(document, "Accuracy")
        assert {row.cells[0].tag for row in table.rows[:-1]} == {"too few rows"}
        assert [row.cells[0].text for row in table.rows if row.is_summary] == ["Mean of 10"]

    def test_a_difference_that_is_the_same_in_every_draw_has_no_interval(self, tmp_path):
        same = [{**item, "low": 0.2, "high": 0.2, "difference": 0.2} for item in make_results()["differences"]]
        edit(make_run(tmp_path), "results.json", differences=same)
        page = render_markdown(compose_document(load_record(tmp_path)))
        assert "20.0 to 20.0" not in page and page.startswith("# Training 10 tasks in 3 groups with 1 booster: mean")
        assert "*better*" not in page and "*worse*" not in page

    def test_means_are_over_the_same_tasks_for_every_method(self, finished):
        table = find_table(compose_document(load_record(finished)), "Accuracy")
        able = [row.cells[0].text for row in table.rows if not row.is_summary and not row.cells[0].tag]
        overall, above = [row for row in table.rows if row.is_summary]
        assert above.cells[0].text == f"Mean of {len(able)} unmarked"
        for cells, names in ((overall.cells, TASKS), (above.cells, able)):
            for cell, method in zip(cells[1:4], ("base", "shared", "ensemble"), strict=True):
                mean = np.mean([ACCURACY[method][TASKS.index(name)] for name in names])
                assert cell.text == f"{100 * mean:.1f}"

    def test_a_mean_that_leaves_free_text_out_says_over_how_many_tasks_it_goes(self, tmp_path):
        write_free_text(make_run(tmp_path), "copa")
        document = compose_document(load_record(tmp_path))
        labels = {
            metric: [row.cells[0].detail for row in find_table(document, metric).rows if row.is_summary]
            for metric in ("Accuracy", "Macro-F1", "Loss")
        }
        assert labels["Macro-F1"][0] == "over 9 of 10 tasks"
        assert not any(labels["Accuracy"] + labels["Loss"]), "exact matches are an accuracy"
        columns = find_table(document, "Predicted performance").columns
        assert columns[2].label == "Mean accuracy over 9 of 10 tasks"

    def test_a_method_alone_is_the_best_of_nothing(self, tmp_path):
        methods = {"ensemble": make_results()["methods"]["ensemble"]}
        edit(make_run(tmp_path), "results.json", methods=methods, differences=[])
        tables = [
            t for t in all_tables(compose_document(load_record(tmp_path))) if t.caption.startswith(("Acc", "Loss"))
        ]
        assert not any(cell.is_best for table in tables for row in table.rows for cell in row.cells)

    def test_differences_are_marked_exactly_where_the_interval_leaves_out_zero(self, finished):
        table = find_table(compose_document(load_record(finished)), "Ensemble minus")
        results = {(i["task"], i["metric"]): i for i in make_results()["differences"] if i["b"] == "shared"}
        marks = set()
        for row in table.rows:
            for cell, metric, sign in zip(row.cells[1:], ("accuracy", "nll"), (1, -1), strict=True):
                item = results[row.cells[0].text, metric]
                is_clear = not item["low"] <= 0 <= item["high"]
                expected = ("better" if sign * item["difference"] > 0 else "worse") if is_clear else ""
                assert cell.tag == expected
                marks.add(expected)
        assert marks == {"", "better"}

    def test_order_of_tasks_changes_the_order_of_rows_only(self, tmp_path):
        plan = read_json(make_run(tmp_path / "a") / "plan.json")
        order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
        make_run(tmp_path / "b")
        groups = [sorted(order.index(task) for task in group) for group in plan["groups"]]
        names = [plan["task_names"][task] for task in order]
        ensemble = read_json(tmp_path / "b" / "ensemble.json")
        edit(tmp_path / "b", "plan.json", task_names=names, groups=groups, predicted={})
        edit(tmp_path / "b", "ensemble.json", weights=[ensemble["weights"][task] for task in order])
        rows = []
        for name in ("a", "b"):
            table = find_table(compose_document(load_record(tmp_path / name)), "Accuracy")
            rows.append({row.cells[0].text: row for row in table.rows})
        assert rows[0] == rows[1]


class TestFaults:
    def test_no_plan_is_the_users_to_mend(self, tmp_path):
        with pytest.raises(UsageError, match=r"no plan\.json to report; plan first with `ensemblelora plan`"):
            write_report(tmp_path)

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("plan.json", {"groups": [["x"]]}, r"plan\.json: groups\.0\.0: got 'x': input should be a valid integer"),
            ("plan.json", {"groups": [[0, 1], [1]]}, r"groups \[\[0, 1\], \[1\]\] don't hold each of 10 tasks once"),
            ("plan.json", {"groups": [list(range(10)), []]}, "don't hold each of 10 tasks once"),
            ("plan.json", {"task_names": ["a"] * 10}, "are not distinct"),
            ("plan.json", {"warnings": "careful"}, "warnings: got 'careful'"),
            ("plan.json", {"predicted": {"plan": {"nll": [1.0]}}}, "not one per task for 10 tasks"),
            ("plan.json", {"curve": [{"n_groups": 2.5}]}, r"curve\.0\.n_groups: got 2\.5"),
            ("ensemble.json", {"weights": [[1.0, 0.0, 0.0]]}, r"weights are not of shape \(10, 3\)"),
            ("ensemble.json", {"weights": [["1", 0.0, 0.0]]}, r"weights\.0\.0: got '1'"),
            ("ensemble.json", {"members": [{"name": "x", "group": 7}]}, "names group 7, the plan has 3"),
            ("results.json", {"methods": {"base": {"per_task": {"cb": {"nll": "low"}}}}}, "nll: got 'low'"),
            ("results.json", {"methods": []}, r"methods: got \[\]"),
            ("costs.json", {"stages": [{"stage": 3}]}, r"stages\.0\.stage: got 3"),
            ("costs.json", {"stages": [{"stage": "a", "flops": True}]}, r"stages\.0\.flops: got True"),
        ],
    )
    def test_wrong_types_are_named_with_file_and_key(self, tmp_path, name, changes, message):
        edit(make_run(tmp_path), name, **changes)
        with pytest.raises(StoreError, match=message) as caught:
            write_report(tmp_path)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "report.html").exists()

    @pytest.mark.parametrize("text", ["{", "", "[1, 2]", '{"task_names": '])
    def test_a_broken_file_is_named(self, tmp_path, text):
        (make_run(tmp_path) / "plan.json").write_text(text, encoding="utf-8")
        with pytest.raises(StoreError, match=r"plan\.json: .*delete the file and run again"):
            write_report(tmp_path)

    @pytest.mark.parametrize("text", ["- a list", "a: [", "evaluation: {confidence: high}"])
    def test_a_broken_config_is_named(self, tmp_path, text):
        (make_run(tmp_path) / "config.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(StoreError, match=r"config\.yaml: "):
            write_report(tmp_path)

    @pytest.mark.parametrize(
        "arrays",
        [{"counts": np.zeros((10, 10))}, {"matrix": np.zeros((3, 3))}, {"matrix": np.full((10, 10), "x")}],
    )
    def test_an_affinity_that_does_not_fit_is_refused(self, tmp_path, arrays):
        save_arrays(make_run(tmp_path) / "affinity.npz", arrays)
        with pytest.raises(StoreError, match=r"affinity\.npz: expected numbers of shape \(10, 10\) under 'matrix'"):
            write_report(tmp_path)

    def test_a_place_that_cannot_be_written_is_said(self, tmp_path):
        (make_run(tmp_path) / "report.html").mkdir()
        with pytest.raises(OutputError, match=r"report\.html"):
            write_report(tmp_path)


def remove_levels_slowly(matrix: np.ndarray) -> np.ndarray:
    """Twin of ``remove_levels``: one row of a least-squares problem per pair, written out."""
    n = len(matrix)
    pairs = [(i, j) for i in range(n) for j in range(n) if i < j and np.isfinite(matrix[i, j] + matrix[j, i])]
    values = [(matrix[i, j] + matrix[j, i]) / 2 for i, j in pairs]
    design = [[float(task in pair) for task in range(n)] for pair in pairs]
    levels = np.linalg.lstsq(np.array(design), np.array(values), rcond=None)[0]
    result = np.full((n, n), np.nan)
    for (i, j), value in zip(pairs, values, strict=True):
        result[i, j] = result[j, i] = value - levels[i] - levels[j]
    return result


class TestLevels:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(3, 9), st.integers(0, 2**32 - 1), st.booleans())
    def test_equals_the_slow_twin_and_ignores_levels(self, n, seed, has_gaps):
        generator = np.random.default_rng(seed)
        matrix = generator.normal(size=(n, n))
        if has_gaps:
            matrix[0, 1] = np.nan
        levels = generator.normal(size=n)
        found = remove_levels(matrix)
        if n > 3:
            np.testing.assert_allclose(found, remove_levels_slowly(matrix), atol=1e-8)
        np.testing.assert_allclose(remove_levels(matrix + levels[:, None] + levels[None, :]), found, atol=1e-8)
        np.testing.assert_allclose(remove_levels(matrix + levels[:, None]), found, atol=1e-8)
        order = generator.permutation(n)
        np.testing.assert_allclose(remove_levels(matrix[np.ix_(order, order)]), found[np.ix_(order, order)], atol=1e-8)

    def test_of_three_tasks_a_pair_is_worth_what_joining_it_adds_to_the_objective(self):
        matrix = np.random.default_rng(0).normal(size=(3, 3))
        matrix += matrix.T
        found, apart = remove_levels(matrix), compute_objective(matrix, ((0,), (1,), (2,)))
        for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
            assert found[i, j] == pytest.approx(compute_objective(matrix, ((i, j), (k,))) - apart)
        assert np.allclose(remove_levels_slowly(matrix)[np.triu_indices(3, 1)], 0), "levels fit three pairs exactly"

    @pytest.mark.parametrize("n", [1, 2])
    def test_few_tasks_have_no_levels_to_remove(self, n):
        found = remove_levels(np.arange(n * n, dtype=float).reshape(n, n))
        assert np.isnan(np.diag(found)).all()
        if n == 2:
            assert found[0, 1] == found[1, 0] == 1.5


class TestFigures:
    def test_heat_map_is_the_affinity_in_group_order(self, finished):
        record = load_record(finished)
        figures = {figure.name: figure for figure in compose_document(record).figures}
        z = np.array(figures["affinity-grouped"].spec["data"][0]["z"], dtype=float)
        order = [task for group in GROUPS for task in group]
        np.testing.assert_allclose(z, remove_levels(record.affinity.matrix)[np.ix_(order, order)], atol=1e-5)
        frames = figures["affinity-grouped"].spec["layout"]["shapes"]
        assert [frame["x1"] - frame["x0"] for frame in frames] == [len(group) for group in GROUPS]
        tree = build_tree(remove_levels(record.affinity.matrix))
        z = np.array(figures["affinity-tree"].spec["data"][0]["z"], dtype=float)
        np.testing.assert_allclose(z, remove_levels(record.affinity.matrix)[np.ix_(tree.order, tree.order)], atol=1e-5)

    def test_curve_shows_gain_and_error_of_every_count(self, finished):
        record = load_record(finished)
        figure = next(figure for figure in compose_document(record).figures if figure.name == "curve")
        inside, outside = figure.spec["data"]
        assert inside["x"] + outside["x"] == [point.n_groups for point in record.plan.curve]
        assert inside["error_y"]["array"] + outside["error_y"]["array"] == [p.gain_se for p in record.plan.curve]
        assert figure.spec["layout"]["annotations"][0]["x"] == 3

    def test_scores_are_drawn_with_their_intervals(self, finished):
        figure = next(figure for figure in compose_document(load_record(finished)).figures if figure.name == "accuracy")
        ensemble = figure.spec["data"][2]
        for task, x, up, down in zip(
            ensemble["text"],
            ensemble["x"],
            ensemble["error_x"]["array"],
            ensemble["error_x"]["arrayminus"],
            strict=True,
        ):
            score = make_results()["methods"]["ensemble"]["per_task"][task]
            assert (x, x + up, x - down) == pytest.approx(
                (score["accuracy"], score["accuracy_high"], score["accuracy_low"]), abs=1e-4
            )

    def test_weights_stand_where_the_ensemble_has_them(self, finished):
        figure = next(figure for figure in compose_document(load_record(finished)).figures if figure.name == "weights")
        weights = np.array(read_json(finished / "ensemble.json")["weights"])
        order = [task for group in GROUPS for task in group]
        np.testing.assert_allclose(figure.spec["data"][0]["z"], weights[order], atol=1e-5)


class TestStatistics:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
    def test_rank_correlation_equals_scipys(self, pairs):
        first, second = zip(*pairs, strict=True)
        found = compute_rank_correlation(first, second)
        if len(set(first)) == 1 or len(set(second)) == 1:
            assert found is None
        else:
            assert found == pytest.approx(scipy.stats.spearmanr(first, second).statistic)

    @pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
    def test_detectable_difference_is_found_with_the_power_it_names(self, confidence):
        error = 0.017
        difference = estimate_detectable_difference(error, confidence=confidence, power=0.8)
        threshold = scipy.stats.norm.ppf((1 + confidence) / 2)
        assert scipy.stats.norm.sf(threshold - difference / error) == pytest.approx(0.8)

    def test_fewer_rows_show_less(self, finished):
        table = find_table(compose_document(load_record(finished)), "What one task's")
        visible = {row.cells[0].text: float(row.cells[3].text.split()[0]) for row in table.rows}
        assert visible["cb"] > visible["copa"] > visible["rte"] > visible["boolq"]

    def test_what_is_visible_is_never_less_than_a_few_rows(self, tmp_path):
        run = make_run(tmp_path / "run")
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        for found in results["differences"]:
            if found["task"] == "copa" and found["metric"] == "accuracy":
                found.update(difference=0.0, low=0.0, high=0.0)  # the two answered every row alike
        write_json(run / "results.json", results)
        table = find_table(compose_document(load_record(run)), "What one task's")
        shown = {row.cells[0].text: row.cells for row in table.rows}["copa"]
        rows, points = int(shown[1].text), float(shown[3].text.split()[0])
        assert 2 < points / (100 / rows) < 4, "in rows"


class TestWording:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (format_number(-0.0004), "0.000"),
            (format_number(-0.5, 1), "\u22120.5"),
            (format_signed(0.0004), "0.000"),
            (format_signed(0.5, 1), "+0.5"),
            (format_percent(0.6183), "61.8%"),
            (format_interval(-0.01, 0.034, scale=100, digits=1), "\u22121.0 to 3.4"),
            (format_interval(None, 1.0), ""),
            (format_flops(0), "0\u00a0FLOPs"),
            (format_flops(999), "999\u00a0FLOPs"),
            (format_flops(1000), "1.0\u00a0kFLOPs"),
            (format_flops(3.14e14), "314\u00a0TFLOPs"),
            (format_flops(2e24), "2,000\u00a0ZFLOPs"),
            (format_bytes(1_900_000), "1.9\u00a0MB"),
            (format_seconds(0.04), "0.0\u00a0s"),
            (format_seconds(59.7), "1\u00a0min"),
            (format_seconds(3599.8), "1\u00a0h"),
            (format_seconds(9000), "2\u00a0h 30\u00a0min"),
            (format_ratio(10.0), "10"),
            (group_letter(701), "ZZ"),
            (group_letter(702), "AAA"),
        ],
    )
    def test_numbers_are_written_as_people_write_them(self, text, expected):
        assert text == expected
