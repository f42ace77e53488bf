"""Alerts and dashboard name what the daemon exports and what a person can run; tests/system runs them."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import typer
import yaml
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from sidecar_daemon.cli import app
from sidecar_daemon.telemetry.metrics import Metrics
from tests.monitoring import DEPLOY, RULE_TESTS, Rule, dashboard, metric_names, queries, rules

ALERTS = [rule for rule in rules() if rule.alert]
COMMAND = re.compile(r"`sidecar-daemon ([a-z-]+)(?: ([a-z-]+))?[^`]*`")


def exported() -> set[str]:
    """Names of every metric that a daemon may export, counters with their suffix."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    Metrics(registry)
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in (*registry.collect(), *ProcessCollector(registry=None).collect())
    }


def commands() -> set[tuple[str, ...]]:
    """Every command of ours; of a group, its subcommands."""
    root = typer.main.get_command(app)
    found: set[tuple[str, ...]] = set()
    for name, command in getattr(root, "commands", {}).items():
        subcommands = {(name, sub) for sub in getattr(command, "commands", {})}
        alone = not subcommands or getattr(command, "invoke_without_command", False)
        found |= subcommands | ({(name,)} if alone else set())
    return found


def test_rules_and_dashboard_name_only_metrics_that_the_daemon_exports() -> None:
    recorded = {rule.name for rule in rules() if not rule.alert}
    named = {
        (where, name)
        for where, expr in (*((rule.name, rule.expr) for rule in rules()), *queries(dashboard()))
        for name in metric_names(expr)
    }
    assert len(named) > 50
    known = exported() | recorded
    assert sorted((where, name) for where, name in named if name not in known) == []


def test_the_scaler_asks_for_metrics_that_the_daemon_exports() -> None:
    scaled = yaml.safe_load((DEPLOY / "kubernetes" / "scaledobject.yaml").read_text())
    expressions = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    assert expressions
    for expr in expressions:
        assert metric_names(expr)
        assert metric_names(expr) <= exported()


def test_a_metric_that_nobody_exports_is_noticed() -> None:
    assert metric_names('sum(rate(sidecar_gone_bucket{le="1"}[5m])) / job:sidecar_up:max') == {
        "sidecar_gone",
        "job:sidecar_up:max",
    }
    assert "sidecar_gone" not in exported()
    assert {"sidecar_up", "sidecar_documents_total", "process_resident_memory_bytes"} <= exported()


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule.name)
def test_an_alert_says_how_bad_it_is_what_it_means_and_which_command_of_ours_helps(alert: Rule) -> None:
    assert alert.severity in {"critical", "warning"}
    assert set(alert.annotations) == {"summary", "description", "runbook"}
    assert all(text.strip() for text in alert.annotations.values())
    named = [tuple(word for word in match.groups() if word) for match in COMMAND.finditer(alert.annotations["runbook"])]
    assert named
    known = commands()
    assert [words for words in named if words not in known and words[:1] not in known] == []
    assert ("dead-letters", "list") in known


def test_what_is_urgent_names_no_command_that_first_reads_every_source() -> None:
    urgent = [alert for alert in ALERTS if alert.severity == "critical" or "Burn" in alert.name]
    assert [alert.name for alert in urgent if "sidecar-daemon status" in alert.annotations["runbook"]] == []
    assert any("`sidecar-daemon top --once`" in alert.annotations["runbook"] for alert in urgent)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule.name)
def test_an_alert_is_tested_to_fire_and_to_stay_quiet(alert: Rule) -> None:
    cases = [
        case
        for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert.name
    ]
    assert any(case["exp_alerts"] for case in cases)
    assert any(not case["exp_alerts"] for case in cases)


def test_a_stalled_sweep_is_excused_from_the_very_depth_on_at_which_it_pauses() -> None:
    (alert,) = [rule for rule in ALERTS if rule.name == "SidecarSweepStalled"]
    pauses = re.search(r"p_depth integer DEFAULT (\d+)", (DEPLOY.parent / "sql/functions/sweep.sql").read_text())
    assert pauses is not None
    assert f"sidecar_queue_depth:max) >= {pauses[1]}\n" in alert.expr


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dashboard()["panels"]
    return found


def test_the_dashboard_asks_the_data_source_that_is_chosen_and_only_the_variables_that_it_has() -> None:
    board = dashboard()
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert variables == {"datasource", "job", "pipeline"}
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == chosen, panel["title"]
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references), panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == chosen, panel["title"]
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert used <= variables | {"__rate_interval", "__range"}, panel["title"]
            assert "job" in used, panel["title"]


def test_the_dashboard_has_its_rows_and_no_panel_lies_on_another() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 39
    assert "id" not in board, "an id belongs to one server"
    rows = [panel["title"] for panel in panels() if panel["type"] == "row"]
    assert rows == ["Overview", "Queue", "Batches", "Failures", "Sweep", "Process"]
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels())
        for x, y in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
    ]
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < 24 for x, _ in cells)
