"""The pages in a real browser, opened as files: every chart drawn, nothing complained of, the keyboard reaching all.

A tiny run, a comparison, a federation, an analysis and two runs side by side; light and dark, desktop, phone and print.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from ensemblelora.analysis.page import write_page as write_analysis
from ensemblelora.analysis.registry import ANALYSES
from ensemblelora.comparison.page import write_page as write_comparison
from ensemblelora.contrast.page import write_contrast
from ensemblelora.federation.page import write_page as write_federation
from ensemblelora.report import write_report
from tests.federation_tiny import finished as finished_federation
from tests.report_runs import make_run
from tests.snippets import ROOT
from tests.study_records import make_study
from tests.test_report_parts import make_large_run
from tests.tiny_run import finished_run

pytestmark = pytest.mark.slow

KINDS = ("run", "drawn", "large", "comparison", "federation", "contrast", "analysis")
_BROWSER = "/usr/bin/chromium"
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
_PATIENCE = 240_000  # ms; a page unpacks 5 MB of script, and the machine may be busy
_LIGHT_INK = "rgb(29, 33, 39)"
_STOPS = "a[href], summary, [tabindex='0']"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=_BROWSER, args=_ARGUMENTS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = shutil.copytree(finished_run() / "run", folder / "run")
    federation = shutil.copytree(finished_federation()[0] / "run", folder / "federation")
    drawn = make_run(folder / "drawn")
    recorded = json.loads((ROOT / "benchmarks" / "results" / "analysis-transfer.json").read_text(encoding="utf-8"))
    return {
        "run": write_report(run),
        "drawn": write_report(drawn),
        "large": write_report(make_large_run(folder / "large")),
        "comparison": write_comparison(make_study(folder / "comparison")).path,
        "federation": write_federation(federation),
        "contrast": write_contrast(drawn, make_run(folder / "other"))[0],
        "analysis": write_analysis(folder, ANALYSES["transfer"], recorded["outcome"]),
    }


class Visit:
    """One page in one kind of window, and whatever it complained of or asked for."""

    def __init__(self, browser: Browser, path: Path, *, width: int = 1200, scheme: str = "light") -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        context.set_default_timeout(_PATIENCE)
        self.page: Page = context.new_page()
        self.faults: list[str] = []
        self.fetched: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.fetched.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn='true']", state="attached")

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture
def visit(browser) -> Iterator[type[Visit]]:
    """Open pages that are closed at the end."""
    opened: list[Visit] = []

    def open_page(path: Path, **window: object) -> Visit:
        opened.append(Visit(browser, path, **window))
        return opened[-1]

    yield open_page
    for one in opened:
        one.close()


def list_violations(page: Page) -> list[str]:
    """What axe-core calls serious or critical, one line each."""
    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:120]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def open_folds(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_draws_every_chart_and_complains_of_nothing(kind, pages, visit):
    seen = visit(pages[kind])
    charts = seen.page.locator(".canvas")
    assert charts.count() >= 1
    drawn = charts.evaluate_all(
        """(charts) => charts.map((chart) => {
            const marks = chart.querySelectorAll(".main-svg .trace, .main-svg .heatmaplayer image, .main-svg .hm");
            const box = chart.querySelector(".main-svg").getBoundingClientRect();
            return marks.length > 0 && box.width > 100 && box.height > 100;
        })"""
    )
    assert all(drawn), [name for name, is_drawn in zip(charts.all(), drawn, strict=True) if not is_drawn]
    assert seen.faults == []
    assert [url for url in seen.fetched if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "large"])
def test_axe_finds_nothing_serious(kind, scheme, pages, visit):
    page = visit(pages[kind], scheme=scheme).page
    open_folds(page)
    assert list_violations(page) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_phone_shows_all_of_it_without_sideways_scrolling(kind, pages, visit):
    page = visit(pages[kind], width=380).page
    open_folds(page)
    wide = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((part) => !part.closest(".scroll, pre, .canvas"))
            .filter((part) => part.getBoundingClientRect().right > 381).map((part) => part.outerHTML.slice(0, 120))"""
    )
    assert wide == [] and page.evaluate("document.documentElement.scrollWidth") <= 380


@pytest.mark.parametrize("kind", ["drawn", "comparison"])
def test_the_keyboard_reaches_every_link_fold_table_and_chart(kind, pages, visit):
    page = visit(pages[kind]).page
    stops = page.locator(_STOPS).evaluate_all("(all) => all.filter((one) => one.checkVisibility()).length")
    reached = set()
    for _ in range(stops):
        page.keyboard.press("Tab")
        place = f'[...document.querySelectorAll("{_STOPS}")].indexOf(document.activeElement)'
        reached.add(page.evaluate(place))
        is_shown = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        assert page.evaluate(is_shown), "what has the focus shows it"
    assert len(reached - {-1}) == stops


@pytest.mark.parametrize("name", ["affinity-grouped", "curve", "tasks", "accuracy"])
def test_arrow_keys_tell_what_hovering_tells(name, pages, visit):
    page = visit(pages["drawn"]).page
    page.locator(f"#figure-{name}").focus()
    told, labels = page.locator("#told"), page.locator(f"#figure-{name} .hoverlayer .hovertext")
    before = ""
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
        expect(told).not_to_have_text(before, timeout=_PATIENCE)
        expect(labels).to_have_count(1)
        before = told.text_content()
    page.keyboard.press("Escape")
    expect(labels).to_have_count(0, timeout=_PATIENCE)


def test_a_browser_that_can_not_unpack_says_so_and_tells_what_there_is_to_see(pages, browser):
    context = browser.new_context(offline=True)
    context.add_init_script("delete globalThis.DecompressionStream")
    page = context.new_page()
    page.goto(pages["drawn"].as_uri())
    page.wait_for_selector("html[data-drawn='false']", state="attached")
    told = page.locator("#figure-curve").text_content()
    assert "can't unpack the picture" in told and "Predicted loss saved against one adapter" in told
    assert page.locator(".canvas").count() == 0 and page.locator("table").count() > 10
    context.close()


def test_a_change_of_theme_paints_charts_anew(pages, visit):
    page = visit(pages["drawn"]).page
    tick = page.locator("#figure-curve .xtick text").first
    expect(tick).to_have_css("fill", _LIGHT_INK)
    page.emulate_media(color_scheme="dark")
    expect(tick).not_to_have_css("fill", _LIGHT_INK, timeout=_PATIENCE)


def test_paper_is_light_and_has_every_chart_within_its_width(pages, visit, tmp_path):
    seen = visit(pages["drawn"], scheme="dark")
    path = tmp_path / "report.pdf"
    seen.page.pdf(path=path, format="A4", print_background=True)
    assert path.stat().st_size > 50_000 and seen.faults == []
    seen.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    widths = seen.page.locator(".canvas .main-svg").evaluate_all("(all) => all.map((one) => one.clientWidth)")
    assert max(widths) <= 688, "182 mm between the margins"
    expect(seen.page.locator("#figure-curve .xtick text").first).to_have_css("fill", _LIGHT_INK)
    config = seen.page.locator("#reproduce details")
    assert config.get_attribute("open") is not None, "how to make it again stands on paper"
    seen.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert config.get_attribute("open") is None
    expect(seen.page.locator("#figure-curve .main-svg").first).to_have_js_property(
        "clientWidth", 832, timeout=_PATIENCE
    )
    seen.page.emulate_media(media="print")
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not seen.page.locator("nav").is_visible()
