"""The documentation as a site: every page has a place, it builds strictly, and it needs no other machine."""

from __future__ import annotations

import functools
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from tests.snippets import DOCS, ROOT

WRITTEN = re.compile(r"[\w./-]+\.md")


def read_nav() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return WRITTEN.findall(text.split("\nnav:\n")[1])


def test_every_page_has_a_place_and_every_place_a_page():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    decisions = {page for page in pages if re.match(r"decisions/\d", page)}
    nav = read_nav()
    assert len(nav) == len(set(nav)) and set(nav) == pages - decisions
    index = (DOCS / "decisions" / "README.md").read_text(encoding="utf-8")
    assert {page for page in decisions if f"({Path(page).name})" not in index} == set()


def test_the_site_asks_no_other_machine_by_its_settings():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["strict"] is True and settings["theme"]["font"] is False
    assert {"site_url", "repo_url", "extra_javascript"} & settings.keys() == set()
    assert all((DOCS / path).exists() for path in settings["extra_css"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere_and_the_search_knows_every_page(site):
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert len(pages) == len(list(DOCS.rglob("*.md")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]*src=\"([^\"]+)\"|<link[^>]*rel=\"(?:stylesheet|preconnect|icon)\"[^>]*href=\"([^\"]+)\"",
            text,
        )
        assert [one or other for one, other in loaded if "//" in (one or other)] == [], page.name
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert {entry["location"].partition("#")[0] for entry in index["docs"]} == {
        page.relative_to(site).as_posix() for page in pages
    }


@pytest.mark.slow
def test_pages_open_in_a_browser_light_and_dark_and_can_be_searched(site):
    from playwright.sync_api import sync_playwright

    handler = functools.partial(QuietHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=options)
            for scheme in ("light", "dark"):
                page = browser.new_page(color_scheme=scheme)
                asked, faults = [], []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.on(
                    "console", lambda line, faults=faults: faults.append(line.text) if line.type == "error" else None
                )
                page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
                page.goto(f"{home}concepts.html", wait_until="networkidle")
                assert page.evaluate("[...document.images].map(i => i.naturalWidth > 0)") == [True] * 4
                shown = page.evaluate("document.body.dataset.mdColorScheme")
                assert shown == {"light": "default", "dark": "slate"}[scheme]
                # Typed key by key: the search listens to keys, and a value set at once is only seen by luck.
                page.locator("[data-md-component=search-query]").first.press_sequentially("booster")
                page.locator(".md-search-result__link").first.wait_for()
                assert faults == [] and {url for url in asked if not url.startswith((home, "data:", "blob:"))} == set()
            browser.close()
    finally:
        server.shutdown()
        server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, *_: object) -> None:
        pass
