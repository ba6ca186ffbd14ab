"""What all figures share: a plotly specification without colours of its own, and names made safe for labels.

A colour is the name of one of the page's CSS variables; the page puts in the value of the light or the dark theme.
Names of tasks are untrusted, and plotly reads a subset of HTML in labels, so every name goes through here.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

__all__ = ["LEGEND_ABOVE", "N_GROUP_COLOURS", "SYMBOLS", "complete", "or_none", "safe", "short_label"]

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
    """Escape a name for plotly's labels and shorten it."""
    plain = " ".join(name.split())
    short = plain if len(plain) <= _MAX_LABEL_LENGTH else plain[: _MAX_LABEL_LENGTH - 1] + "…"
    return html.escape(short, quote=False)


def safe(name: str) -> str:
    """Escape a name for plotly's labels."""
    return html.escape(name, quote=False)


def or_none(value: float) -> float | None:
    """Return a plain number; none for NaN, which JSON does not have."""
    return float(value) if math.isfinite(value) else None
