"""A run folder becomes one HTML page and one Markdown page.

Input: the folder's JSON, YAML and NPZ files (see :mod:`ensemblelora.report.records`). Output: ``report.html``, one
file that needs no network, and ``report.md``, the same without figures. The same folder gives the same bytes.
Cost: linear in the number of pairs of tasks; the page is 2 MB, nearly all of it plotly.js, which comes deflated and
is unpacked by the browser, and with 500 tasks under 7 MB. No torch.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import zlib
from pathlib import Path

from jinja2 import PackageLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ensemblelora.artifacts import REPORT_HTML_FILE, REPORT_MARKDOWN_FILE, write_text
from ensemblelora.report.closing_sections import write_costs, write_reproduction, write_warnings
from ensemblelora.report.document import Document, Tiles
from ensemblelora.report.glossary import find_words, link_words
from ensemblelora.report.headline import write_headline, write_tiles
from ensemblelora.report.helping import write_helping
from ensemblelora.report.pareto_section import write_pareto
from ensemblelora.report.plan_sections import write_affinity, write_curve, write_plan
from ensemblelora.report.power_section import write_power
from ensemblelora.report.reading import leave_out_repeats, load_record
from ensemblelora.report.records import RunRecord
from ensemblelora.report.result_sections import (
    write_boosting,
    write_linearity,
    write_prediction_check,
    write_weights,
)
from ensemblelora.report.score_sections import write_scores
from ensemblelora.report.story import write_asked, write_steps
from ensemblelora.report.wording import count

__all__ = ["compose_document", "render_html", "render_markdown", "write_report"]

_PACKAGE = "ensemblelora.report"
_SECTIONS = (
    write_asked,
    write_plan,
    write_affinity,
    write_helping,
    write_curve,
    write_prediction_check,
    write_scores,
    write_pareto,
    write_weights,
    write_boosting,
    write_costs,
    write_linearity,
    write_warnings,
    write_power,
    write_reproduction,
)
# An underscore inside a word is no emphasis in Markdown, and task names are full of them.
_MARKDOWN_SPECIAL = re.compile(r"([\\`*{}\[\]<>|#~])|(?<![A-Za-z0-9])(_)|(_)(?![A-Za-z0-9])")


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``report.md`` into a run folder, as far as the run has come.

    Args:
        folder: A run folder with at least a plan.

    Returns:
        The path of ``report.html``.

    Raises:
        UsageError: If there is no plan yet.
        StoreError: If a file of the run is damaged or does not fit the others.
        OutputError: If the reports can't be written.
    """
    document = compose_document(load_record(folder))
    write_text(folder / REPORT_MARKDOWN_FILE, render_markdown(document))
    write_text(folder / REPORT_HTML_FILE, render_html(document))
    return folder / REPORT_HTML_FILE


def compose_document(run: RunRecord) -> Document:
    """Turn what a run holds into the report's text, tables and figures."""
    run = leave_out_repeats(run)
    sections = [section for write in _SECTIONS if (section := write(run)) is not None]
    model, created = run.environment.model.name, run.environment.created
    version = run.environment.package_version
    facts = (
        f"run {run.name}",
        count(run.plan.n_tasks, "task"),
        *(fact for fact in (model, version and f"ensemblelora {version}", created) if fact),
    )
    opening = (write_steps(run), Tiles(write_tiles(run)))
    return Document(f"{run.name}: ensemblelora report", facts, write_headline(run), opening, sections)


def render_html(document: Document) -> str:
    """Render one self-contained page.

    Its content security policy allows the page's own two scripts by their hashes and nothing from elsewhere, so a
    script smuggled in through a task's name would not run even if it were not escaped. One of the two is plotly.js as
    the browser unpacks it.
    """
    environment, words = _environment(), find_words(document)
    environment.filters["linked"] = link_words(words)
    script, style = (environment.get_template(name).render() for name in ("report.js", "report.css"))
    plotly, plotly_hash = _pack_plotly()
    return environment.get_template("report.html.j2").render(
        document=document,
        words=words,
        figure_specs={figure.name: figure.spec for figure in document.figures},
        plotly=Markup(plotly),
        script=Markup(script),
        style=Markup(style),
        script_hashes=[plotly_hash, _hash_source(script)],
    )


def render_markdown(document: Document) -> str:
    """Render the report without figures, in GitHub's Markdown; every figure is replaced by its sentence."""
    environment = _environment(finalize=_escape_markdown)
    environment.filters["fence"] = _fence
    text = environment.get_template("report.md.j2").render(document=document, words=find_words(document))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(finalize: object = None) -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )


def _escape_markdown(value: object) -> Markup:
    """Escape one value for a Markdown table cell or paragraph; runs of white space become one space."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"[ \t\r\n\f\v]+", " ", str(value)).replace("&", "&amp;")
    return Markup(_MARKDOWN_SPECIAL.sub(lambda match: f"\\{match.group()}", text))


def _fence(text: str, language: str) -> Markup:
    """Return a Markdown code block, fenced by more backticks than the text has in a row."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text}\n{fence}")


@functools.cache
def _pack_plotly() -> tuple[str, str]:
    """Return plotly.js deflated and in base64, and the hash of what it unpacks to."""
    source = get_plotlyjs()
    return base64.b64encode(zlib.compress(source.encode(), 9)).decode(), _hash_source(source)


def _hash_source(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
