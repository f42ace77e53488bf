"""The README's table of events is complete, and names no event that is never logged."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEAKERS = {
    "telemetry/__init__.py": "the one that tells",
    "telemetry/logs.py": "what libraries say",
    "app/daemon.py": "an end before there is anybody to tell",
    "adapters/postgres/listener.py": "an adapter, which knows no telemetry",
}
"""Who has a logger of its own; all others tell the telemetry."""
METHODS = {"event", "info", "warning", "error", "critical", "debug"}


def events_of(text: str) -> set[str]:
    """Names of the events that a module logs: the first argument of a call of a logger."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        speaks = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
        if speaks or (isinstance(node.func, ast.Name) and node.func.id == "log"):
            found.add(str(node.args[0].value))
    return found


def modules() -> dict[str, str]:
    """Text of every module of the daemon, by its path."""
    root = ROOT / "sidecar_daemon"
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}


def logged() -> set[str]:
    """Every event of the daemon, whoever tells it; ``library`` is what the words of others are called."""
    return {event for text in modules().values() for event in events_of(text)} | {"library"}


def documented() -> dict[str, str]:
    """Event to row of the README's table."""
    table = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- table:events -->")[2].partition("<!-- /")[0]
    )
    return {found[1]: row for row in table.splitlines() if (found := re.match(r"\| `(\w+)` \|", row))}


def test_the_table_of_events_is_complete() -> None:
    assert documented().keys() == logged()


def test_a_new_event_is_seen() -> None:
    assert events_of('self._log.info("one", a=1)\nlog("two")\nself._telemetry.event("three")\nprint("four")') == {
        "one",
        "two",
        "three",
    }


def test_nobody_else_has_a_logger() -> None:
    speaks = re.compile(r"get_logger|getLogger|_log(ger)?\.(debug|info|warning|error|critical)\(")
    assert {name for name, text in modules().items() if speaks.search(text)} <= SPEAKERS.keys()
