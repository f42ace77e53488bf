"""The rules and the dashboard in ``deploy/``, as data: their expressions, and the metrics that these name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yaml"
RULE_TESTS = DEPLOY / "prometheus" / "alerts_test.yaml"
SCRAPE = DEPLOY / "prometheus" / "prometheus.yaml"
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"

_SELECTOR = re.compile(r"\b(?P<name>(?:sidecar|process|python)_[a-z0-9_]+|[a-z_]+:sidecar_[a-z0-9_:]+)(\{[^}]*\})?")
_SERIES = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: an alert, or a recorded series."""

    name: str
    expr: str
    alert: bool
    severity: str
    annotations: dict[str, str]


def rules(path: Path = RULES) -> list[Rule]:
    """Every rule of the file, in order."""
    found = []
    for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            severity = rule.get("labels", {}).get("severity", "")
            name = rule.get("alert") or rule["record"]
            found.append(Rule(name, rule["expr"], "alert" in rule, severity, rule.get("annotations", {})))
    return found


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    parsed: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return parsed


def queries(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title of the panel and expression of each query of a dashboard, annotations included."""
    for annotation in board["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def selectors(expr: str) -> list[str]:
    """Metrics that a PromQL expression selects, with their matchers: ``sidecar_up{pipeline="docs"}``."""
    return [match[0] for match in _SELECTOR.finditer(expr)]


def metric_names(expr: str) -> set[str]:
    """Metrics that a PromQL expression names, as the exporter calls them; a histogram's series by its own name."""
    return {_SERIES.sub("", match["name"]) for match in _SELECTOR.finditer(expr)}
