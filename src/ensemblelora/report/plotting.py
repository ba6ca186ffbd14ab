"""What all figures share: a plotly specification without colours of its own, and names made safe for labels.

A colour is the name of one of the page's CSS variables; the page puts in the value of the light or the dark theme.
Names of tasks are untrusted, and plotly reads a subset of HTML in labels, so every name goes through here.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import plotly.graph_objects as go

__all__ = ["LEGEND_ABOVE", "N_GROUP_COLOURS", "SYMBOLS", "complete", "or_none", "safe", "short_label", "short_labels"]

N_GROUP_COLOURS = 6
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "hexagon")
LEGEND_ABOVE = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
_MAX_LABEL_LENGTH = 22


def complete(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a layout with what all figures share, check it against plotly's schema, and return plain values."""
    axis = {"gridcolor": "var(--line)", "zerolinecolor": "var(--line-strong)", "automargin": True, "fixedrange": True}
    shared = {
        "template": "none",
        "font": {"color": "var(--ink)", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8, "pad": 4},
        "hoverlabel": {
            "align": "left",
            "bgcolor": "var(--surface)",
            "bordercolor": "var(--line-strong)",
            "font": {"color": "var(--ink)"},
        },
        "dragmode": False,
    }
    more = [name for name in layout if name.startswith(("xaxis", "yaxis"))]
    axes = {name: {**axis, **layout.get(name, {})} for name in dict.fromkeys(("xaxis", "yaxis", *more))}
    figure = go.Figure(data=list(traces), layout={**shared, **layout, **axes})
    spec: dict[str, Any] = json.loads(figure.to_json())
    del spec["layout"]["template"]
    return spec


def short_label(name: str) -> str:
    """Escape a name for plotly's labels and shorten it in the middle: names that begin alike differ at their ends."""
    plain = " ".join(name.split())
    if len(plain) > _MAX_LABEL_LENGTH:
        n_tail = (_MAX_LABEL_LENGTH - 1) // 2
        plain = f"{plain[: _MAX_LABEL_LENGTH - 1 - n_tail]}…{plain[-n_tail:]}"
    return html.escape(plain, quote=False)


def short_labels(names: Sequence[str]) -> list[str]:
    """Escape and shorten the names of one chart: words that all of them begin with tell none from another.

    Example:
        >>> short_labels(["demo_sst2", "demo_piqa"]), short_labels(["sst2", "piqa"]), short_labels(["demo_sst2"])
        (['sst2', 'piqa'], ['sst2', 'piqa'], ['demo_sst2'])
    """
    alike = takewhile(lambda signs: len(set(signs)) == 1, zip(*names, strict=False)) if len(names) > 1 else ()
    common = "".join(signs[0] for signs in alike)
    n_dropped = max((common.rfind(mark) for mark in "_-/ "), default=-1) + 1
    return [short_label(name[n_dropped:] or name) for name in names]


def safe(name: str) -> str:
    """Escape a name for plotly's labels."""
    return html.escape(name, quote=False)


def or_none(value: float) -> float | None:
    """Return a plain number; none for NaN, which JSON does not have."""
    return float(value) if math.isfinite(value) else None
