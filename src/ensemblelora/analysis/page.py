"""An analysis' result becomes one HTML page that needs no network, and one in Markdown.

In: the plain values of ``result.json``. Out: ``NAME.html`` and ``NAME.md`` beside the analysis' folder.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ensemblelora.analysis.bases import name_base_method
from ensemblelora.analysis.registry import Analysis
from ensemblelora.artifacts import write_text
from ensemblelora.config import dump_config, parse_config
from ensemblelora.report.build import render_html, render_markdown
from ensemblelora.report.document import Cell, Column, Document, Fold, Row, Section, Table, Text, Tile, Tiles
from ensemblelora.report.wording import count, format_bytes, format_flops, format_seconds

__all__ = ["compose_analysis", "write_page"]

_PARTS = {"training": "Fine-tuning", "measuring": "Measuring", "total": "Together"}


def write_page(home: Path | str, analysis: Analysis, result: Mapping[str, Any]) -> Path:
    """Write both pages.

    Args:
        home: Shared by analyses of one config.
        analysis: Whose.
        result: Of ``result.json``.

    Returns:
        The path of the HTML page.

    Raises:
        OutputError: If a file can't be written.
    """
    document = compose_analysis(Path(home).name, analysis, result)
    page = Path(home) / f"{analysis.name}.html"
    write_text(page.with_suffix(".md"), render_markdown(document))
    write_text(page, render_html(document))
    return page


def compose_analysis(name: str, analysis: Analysis, result: Mapping[str, Any]) -> Document:
    """Turn a result into the page's text, tables and figures.

    Args:
        name: Of the folder.
        analysis: Whose result it is.
        result: Of ``result.json``.
    """
    config, environment = parse_config(result["config"]), result["environment"]
    facts = (
        f"analysis {analysis.name} of {name}",
        count(len(config.data.tasks), "task"),
        config.model.name,
        f"{name_base_method(config)}, {count(config.training.num_train_epochs, 'epoch')}",
        count(len(result["seeds"]), "seed"),
        f"ensemblelora {environment['package_version']}",
        environment["finished"],
    )
    costs = result["costs"]["total"]
    tiles = (
        Tile("Measured time", format_seconds(costs["seconds"]), "whether it was spent now or before"),
        Tile("Compute", format_flops(costs["flops"]), count(result["costs"]["training"]["n"], "fine-tuning")),
    )
    sections = [*analysis.write(result), _write_costs(result), _write_again(name, analysis, result)]
    return Document(
        f"{analysis.name} of {name}: ensemblelora analysis", facts, analysis.headline(result), (Tiles(tiles),), sections
    )


def _write_costs(result: Mapping[str, Any]) -> Section:
    rows = tuple(
        Row(
            (
                Cell(title),
                Cell(f"{spent['n']:,}"),
                Cell(format_flops(spent["flops"])),
                Cell(format_seconds(spent["seconds"])),
                Cell(format_bytes(spent["peak_memory_bytes"])),
            ),
            is_summary=name == "total",
        )
        for name, title in _PARTS.items()
        for spent in [result["costs"][name]]
    )
    columns = (Column("What", is_number=False), *map(Column, ("Number", "FLOPs", "Time", "Peak memory")))
    note = (
        "Everything the result rests on, also what was found from before. FLOPs by formula; full fine-tunings are "
        "among the measurements."
    )
    return Section("costs", "What it cost", [Table("Costs", columns, rows, note)])


def _write_again(name: str, analysis: Analysis, result: Mapping[str, Any]) -> Section:
    """How to make it again."""
    options = [
        f"--with {shlex.quote(f'{key}={_write_inline(value)}')}"
        for key, value in result["options"].items()
        if value is not None
    ]
    command = " ".join(
        ["ensemblelora", "analyze", analysis.name, "CONFIG", "--seeds", str(len(result["seeds"])), *options]
    )
    facts = [(key, str(value)) for key, value in result["environment"].items()]
    columns = (Column("What", is_number=False), Column("Used here", is_number=False))
    table = Table("Environment", columns, tuple(Row((Cell(key), Cell(value))) for key, value in facts))
    config = Fold(dump_config(parse_config(result["config"])).strip(), summary="CONFIG", language="yaml")
    told = Text(f"The same command goes on with what is in {name}, and finds what is finished there.", is_quiet=True)
    return Section("again", "Make it again", [Fold(command, language="sh"), told, table, config])


def _write_inline(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("...\n").strip()
