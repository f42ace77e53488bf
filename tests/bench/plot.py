"""Draws one SVG from the JSON of one or more runs: ``python -m tests.bench.plot RESULT.json ... --output bench.svg``.

Above, the model only: documents a second of every contestant on the docstrings. Below, every figure against its goal,
on a scale of how many times better than the goal it is. No library: an SVG is text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from tests.bench.report import merged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH, LEFT, RIGHT, ROW, TITLE = 860, 270, 150, 24, 44
OURS, THEIRS, MET, MISSED, INK, QUIET = "#1f6f8b", "#b8c4cc", "#2e7d4f", "#c0392b", "#1c2833", "#7f8c8d"
FARTHEST = 4.0
"""Powers of two from the goal at which the scale ends; farther figures stand at its end, with their number."""


def bars(rates: Mapping[str, float], top: float) -> tuple[list[str], float]:
    """Horizontal bars, the fastest first. Returns the elements and where they end."""
    parts = [_text(20, top + 18, "model only, docstrings: documents a second", size=15)]
    top += TITLE
    most = max(rates.values())
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        width = (WIDTH - LEFT - RIGHT) * rate / most
        colour = OURS if name.startswith("ours") else THEIRS
        parts.append(_text(LEFT - 10, top + 15, name, anchor="end"))
        parts.append(f'<rect x="{LEFT}" y="{top + 3:.0f}" width="{width:.1f}" height="{ROW - 7}" fill="{colour}"/>')
        parts.append(_text(LEFT + width + 8, top + 15, f"{rate:,.0f}" if rate >= 10 else f"{rate:,.1f}"))
        top += ROW
    return parts, top + ROW


def against_goals(result: Mapping[str, Any], top: float) -> tuple[list[str], float]:
    """One row a measured figure: right of the line is better than the goal. Returns the elements and where they end."""
    measured = {name: value for name, value in result["figures"].items() if value is not None}
    middle, reach = (LEFT + WIDTH - RIGHT) / 2, (WIDTH - RIGHT - LEFT) / 2
    parts = [_text(20, top + 18, "every figure against its goal (the line); each step right is twice as good", size=15)]
    top += TITLE
    bottom = top + ROW * len(measured)
    for power in range(-4, 5):
        x = middle + reach * power / FARTHEST
        colour, wide = (INK, 1.5) if power == 0 else ("#e5e8ea", 1)
        parts.append(_line((x, top), (x, bottom), colour, wide))
    for name, value in measured.items():
        goal = result["goals"][name]
        place = middle + reach * max(-1.0, min(1.0, _steps(value, goal) / FARTHEST))
        colour = MET if result["met"][name] else MISSED
        sign = "≥" if goal["at_least"] else "≤"
        parts.append(_text(LEFT - 10, top + 16, name, anchor="end"))
        parts.append(_line((middle, top + 12), (place, top + 12), colour, 2))
        parts.append(f'<circle cx="{place:.1f}" cy="{top + 12:.0f}" r="5" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 14, top + 16, f"{_number(value)}  ({sign} {_number(goal['goal'])})"))
        top += ROW
    return parts, top + ROW


def _steps(value: float, goal: Mapping[str, Any]) -> float:
    """Powers of two by which a figure is better than its goal; a figure of no cost at all is best."""
    if value <= 0:
        return -FARTHEST if goal["at_least"] else FARTHEST
    steps = math.log2(value / goal["goal"])
    return steps if goal["at_least"] else -steps


def drawn(result: Mapping[str, Any]) -> str:
    """The whole picture."""
    parts, top = [], 10.0
    docstrings = result["tables"].get("model_only", {}).get("corpora", {}).get("docstrings", {})
    rates = {name: rate["median"] for name, rate in docstrings.get("rates", {}).items()}
    default = docstrings.get("fastembed_default", {}).get("rates", {}).get("fastembed_default")
    if default is not None:
        rates["fastembed_default"] = default["median"]
    if rates:
        more, top = bars(rates, top)
        parts += more
    more, top = against_goals(result, top)
    parts += more
    machine = result.get("machine", {})
    cpu = machine.get("cpu", {})
    foot = f"{machine.get('threads', '?')} threads of {cpu.get('name', '?')}; profile {result['profile']}"
    parts.append(_text(20, top, f"{foot}, seed {result['seed']}", colour=QUIET))
    height = top + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def parsed(picture: str) -> ET.Element:
    """The picture as XML. Raises ``ParseError`` where it is not well-formed."""
    return ET.fromstring(picture)  # noqa: S314  our own text


def main(argv: Sequence[str] | None = None) -> int:
    """Read results in the order given, later ones win; write the picture."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.plot", description="A picture of benchmark results.")
    parser.add_argument("results", nargs="*", type=Path, help="JSON of runs; default: all committed ones, by name")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench.svg")
    asked = parser.parse_args(argv)
    found = asked.results or sorted(RESULTS.glob("*.json"))
    if not found:
        sys.stderr.write(f"there is no JSON in {RESULTS}: name one\n")
        return 1
    result = merged(json.loads(path.read_text(encoding="utf-8")) for path in found)
    picture = drawn(result)
    parsed(picture)
    asked.output.write_text(picture, encoding="utf-8")
    return 0


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _line(start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> str:
    place = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, colour: str = INK) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {place}>{escape(words)}</text>"


if __name__ == "__main__":
    sys.exit(main())
