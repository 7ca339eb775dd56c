"""The charts of the cards: Vega-Lite specifications as plain dictionaries, drawn by the page itself without a network.

Numbers that JSON does not have (a diverged loss is NaN) are left out of every chart: one of them would keep the whole
page from being read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matvlm.artifacts import Measurement, ProfileResult
from matvlm.plots import COLOURS, length, length_field, series

Row = Mapping[str, Any]
Spec = dict[str, Any]

NARROW = 320
"""Pixels of a chart that shares a row with another."""

CURVE_POINTS = 400
"""A curve with twice as many points is thinned to half of them."""

_LOOK: Spec = {
    "view": {"stroke": None},
    "font": "Roboto, Helvetica Neue, Arial, sans-serif",
    "axis": {
        "gridColor": "#ececec",
        "domainColor": "#999",
        "tickColor": "#999",
        "labelFontSize": 12,
        "titleFontSize": 12,
    },
    "axisX": {"grid": False},
    "legend": {"orient": "top", "title": None, "labelFontSize": 12, "symbolType": "stroke", "symbolStrokeWidth": 3},
    "background": "transparent",
    "title": {"anchor": "start", "fontSize": 14, "fontWeight": 600, "offset": 12},
}


class Curves:
    """Lines over optimiser updates that grow while they are watched, thinned so that a page stays small.

    ``spec`` is the chart; the points in it are added to in place, so a component that holds it needs no update.
    """

    def __init__(self, title: str, *, log: bool = False, single: bool = False, number_format: str = "~g"):
        """``log``: a logarithmic axis while all values are positive. ``single``: one series, in a narrow chart."""
        self._points: list[dict[str, Any]] = []
        self._seen: dict[str, int] = {}
        self._every = 1
        self._y: Spec = {
            "field": "value",
            "type": "quantitative",
            "title": None,
            "axis": {"format": number_format, "tickCount": 5},
            "scale": {"type": "log" if log else "linear", "nice": False},
        }
        self.spec = _chart(title, self._points, 150 if single else 260)
        if single:
            self.spec["width"] = NARROW
        self.spec["mark"] = {"type": "line", "strokeWidth": 1.8, "interpolate": "linear", "tooltip": True}
        self.spec["encoding"] = {
            "x": {"field": "update", "type": "quantitative", "title": "optimiser update", "axis": {"tickMinStep": 1}},
            "y": self._y,
            "color": {"field": "series", "type": "nominal", "scale": {"range": list(COLOURS)}, "sort": None},
        }
        if single:
            self.spec["encoding"]["color"]["legend"] = None

    def add(self, update: int, values: Mapping[str, float]) -> None:
        """One more point of each of the series in ``values``; not finite ones are skipped."""
        for name, value in values.items():
            seen = self._seen.get(name, 0)
            self._seen[name] = seen + 1
            if seen % self._every == 0 and math.isfinite(value):
                self._points.append({"update": update, "series": name, "value": float(f"{value:.5g}")})
                if value <= 0:
                    self._y["scale"]["type"] = "linear"
        if len(self._points) >= 2 * CURVE_POINTS * len(self._seen):
            self._thin()

    def _thin(self) -> None:
        by_series = {name: [p for p in self._points if p["series"] == name] for name in self._seen}
        self._points[:] = [point for points in by_series.values() for point in points[::2]]
        self._every *= 2


def accuracy_bars(rows: Sequence[Row]) -> Spec:
    """Accuracies in percent as labelled bars, in the order given. Rows have ``label`` and ``accuracy`` in [0, 1]."""
    data = [{"model": row["label"], "percent": 100 * row["accuracy"]} for row in _finite(rows, "accuracy")]
    spec = _chart("Accuracy", data, {"step": 34})
    model = {"field": "model", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 260}}
    percent = {
        "field": "percent",
        "type": "quantitative",
        "title": "correct answers [%]",
        "scale": {"domain": [0, 107]},
    }
    percent["axis"] = {"values": [0, 20, 40, 60, 80, 100]}
    spec["encoding"] = {"y": model, "x": percent}
    colour = {"field": "model", "type": "nominal", "sort": None, "legend": None, "scale": {"range": list(COLOURS)}}
    spec["layer"] = [
        {"mark": {"type": "bar", "height": 22, "tooltip": True}, "encoding": {"color": colour}},
        {
            "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 12},
            "encoding": {"text": {"field": "percent", "format": ".1f"}},
        },
    ]
    return spec


def over_length(result: ProfileResult, title: str, unit: str, value: Callable[[Measurement], float]) -> Spec:
    """A line per series over the length: models by colour, stacks by dashes; points without memory are missing."""
    data = [
        {"line": name, "model": point.label, "stack": point.stack, "length": length(result, point)}
        | {"value": value(point.measured)}
        for name, points in series(result).items()
        for point in points
        if point.measured
    ]
    spec = _chart(title, _finite(data, "value"), 240)
    spec["width"] = NARROW
    spec["mark"] = {"type": "line", "point": {"size": 45, "filled": True}, "strokeWidth": 2, "tooltip": True}
    spec["encoding"] = {
        "x": {
            "field": "length",
            "type": "quantitative",
            "title": "prompt [tokens]" if length_field(result) == "prompt" else "generated [tokens]",
            "scale": {"type": "log", "base": 2, "nice": False, "padding": 18},
            "axis": {"values": sorted({row["length"] for row in data}), "format": "d"},
        },
        "y": {"field": "value", "type": "quantitative", "title": unit, "axis": {"tickCount": 5, "format": "~s"}},
        "color": {"field": "model", "type": "nominal", "sort": None, "scale": {"range": list(COLOURS)}},
        "strokeDash": {"field": "stack", "type": "nominal", "sort": None},
        "detail": {"field": "line", "type": "nominal"},
    }
    return spec


def _chart(title: str, data: list[Any], height: int | Spec) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": title,
        "data": {"values": data},
        "height": height,
        "config": _LOOK,
    }


def _finite(rows: Sequence[Row], field: str) -> list[Row]:
    return [row for row in rows if math.isfinite(row[field])]
