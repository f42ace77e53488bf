"""Rules and dashboard against a real Prometheus that scrapes a real daemon with something to tell."""

from __future__ import annotations

import asyncio
import math
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.daemon import Daemon
from tests.monitoring import RULE_TESTS, RULES, SCRAPE, dashboard, queries, rules, selectors
from tests.system.prometheus import Prometheus, prometheus
from tests.system.tools import tool
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import asyncpg

pytestmark = pytest.mark.long

SETTINGS = {
    "THREADS": "1",
    "SWEEP_INTERVAL": "1",
    "MAX_DOCUMENT_BYTES": "65536",
    "MAX_ATTEMPTS": "3",
    "BACKOFF_BASE": "0.2",
    "BACKOFF_CAP": "0.5",
    "POLL_MAX": "0.5",
}
RATE_INTERVAL = "20s"
"""What ``$__rate_interval`` stands for: long enough for two scrapes on a slow machine."""
REFUSING = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.id = 13 THEN RAISE EXCEPTION 'thirteen'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON docs_embeddings FOR EACH ROW EXECUTE FUNCTION refuse();
"""


def promtool(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool to its end."""
    command = [tool("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=300)


def test_rules_and_configuration_are_valid() -> None:
    for kind, file in (("rules", RULES), ("config", SCRAPE)):
        done = promtool("check", kind, file)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_do_what_their_tests_say() -> None:
    done = promtool("test", "rules", RULE_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("broken", ["absent(vector(1))", "vector(1)"], ids=["never fires", "always fires"])
def test_the_rules_tests_notice_every_alert_that_is_broken(broken: str, tmp_path: Path) -> None:
    document = yaml.safe_load(RULES.read_text())
    for group in document["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = broken
    (tmp_path / RULES.name).write_text(yaml.safe_dump(document))
    shutil.copy(RULE_TESTS, tmp_path)
    assert promtool("check", "rules", tmp_path / RULES.name).returncode == 0
    complaints = promtool("test", "rules", tmp_path / RULE_TESTS.name).stderr
    assert [rule.name for rule in rules() if rule.alert and f"alertname: {rule.name}," not in complaints] == []


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon at work, and the Prometheus that watches it."""

    daemon: Daemon
    prometheus: Prometheus
    connection: asyncpg.Connection

    async def sql(self, *statements: str) -> None:
        """Run statements as the database's owner."""
        for statement in statements:
            await self.connection.execute(statement)

    async def sees(self, expr: str, wanted: Callable[[float], bool] = lambda value: value > 0) -> None:
        """Wait until Prometheus has such a value in every series of an expression, and one at least."""

        async def check() -> bool:
            values = [float(series["value"][1]) for series in await self.prometheus.query(expr)]
            return (bool(values) and all(wanted(value) for value in values)) or await later()

        await self.daemon.wait_for(check, timeout=90, what=expr)


async def later() -> bool:
    """Not yet: wait until Prometheus, which scrapes once a second, may have seen something new."""
    await asyncio.sleep(0.5)
    return False


async def live_through_everything(scene: Scene) -> None:
    """Documents that are embedded, cut, deferred and dead-lettered, an outage of the queue, a sweep that finds some."""
    long = " ".join(f"word{n}" for n in range(400))
    await scene.sql(
        "INSERT INTO docs SELECT n, 'document number ' || n FROM generate_series(1, 60) AS n",
        f"INSERT INTO notes VALUES (1, 'short'), (2, '{long}')",
        "INSERT INTO docs VALUES (101, repeat('x', 70000))",  # larger than MAX_DOCUMENT_BYTES
    )
    await scene.sees('sidecar_documents_total{pipeline="docs",outcome="embedded"}', lambda value: value >= 59)
    await scene.sees('sidecar_documents_total{pipeline="docs",outcome="dead_lettered"}', lambda value: value >= 2)
    await scene.sees('sidecar_deferrals_total{pipeline="docs"}')
    await scene.sees('sidecar_documents_truncated_total{pipeline="notes"}')
    await scene.sql(
        "ALTER TABLE docs DISABLE TRIGGER USER",
        "INSERT INTO docs SELECT n, 'the sweep finds number ' || n FROM generate_series(201, 220) AS n",
        "ALTER TABLE docs ENABLE TRIGGER USER",
    )
    await scene.sees('sidecar_sweep_found_total{pipeline="docs",kind="missing"}')
    await scene.sql("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA sidecar FROM sidecar_runtime")
    await scene.sees('max(sidecar_circuit_state{state="open"})')
    await scene.sql("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA sidecar TO sidecar_runtime")
    await scene.sees('min(sidecar_circuit_state{state="closed"})')


async def keep_editing(scene: Scene) -> None:
    """Edit both tables for ever, so that every rate has something to count."""
    while True:
        await scene.sql("UPDATE docs SET body = body || '.' WHERE id <= 20", "UPDATE notes SET body = body || ' more'")
        await asyncio.sleep(0.5)


def substituted(expr: str) -> str:
    """An expression of the dashboard as Grafana sends it with every variable on All."""
    for name, value in (("__rate_interval", RATE_INTERVAL), ("__range", "5m"), ("job", ".+"), ("pipeline", ".+")):
        expr = expr.replace(f"${name}", value)
    assert "$" not in expr
    return expr


async def values_of(server: Prometheus, expr: str, start: float) -> list[float]:
    """Every finite value of an expression since a moment, a Unix time."""
    found = await server.ask("query_range", query=expr, start=str(start), end=str(time.time()), step="1s")
    numbers = (float(value) for series in found["result"] for _, value in series["values"])
    return [number for number in numbers if math.isfinite(number)]


async def test_every_query_and_every_rule_finds_data(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path
) -> None:
    await connection.execute("CREATE TABLE docs (id bigint PRIMARY KEY, body text)")
    await connection.execute("CREATE TABLE notes (id bigint PRIMARY KEY, body text)")
    attach = (
        "SELECT sidecar.attach($1::text::regclass, '{body}', p_model => 'tiny', p_dimensions => 32, "
        "p_long_documents => $2)"
    )
    await connection.execute(attach, "docs", "mean")
    await connection.execute(attach, "notes", "truncate")
    await connection.execute(REFUSING)
    daemon = Daemon(runtime_url, tiny_models, SETTINGS)
    async with prometheus([f"127.0.0.1:{daemon.port}"]) as server:
        start = time.time()
        async with daemon:
            scene = Scene(daemon, server, connection)
            await live_through_everything(scene)
            editing = asyncio.create_task(keep_editing(scene))
            try:
                await assert_clean_metrics(daemon)
                await assert_all_find_data(scene, start)
            finally:
                editing.cancel()


async def assert_clean_metrics(daemon: Daemon) -> None:
    """What Prometheus' own linter says of the metrics: nothing."""
    text = (await daemon.get("/metrics")).text
    done = await asyncio.to_thread(promtool, "check", "metrics", stdin=text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def assert_all_find_data(scene: Scene, start: float) -> None:
    """Every query of the dashboard, every recording and every selector of a rule."""
    asked: list[tuple[str, str]] = [(title, substituted(expr)) for title, expr in queries(dashboard())]
    asked += [(rule.name, rule.name) for rule in rules() if not rule.alert]
    asked += [(rule.name, selector) for rule in rules() for selector in selectors(rule.expr)]

    async def none_is_silent() -> bool:
        asked[:] = [(where, expr) for where, expr in asked if not await values_of(scene.prometheus, expr, start)]
        assert not asked or await later(), "\n".join(f"{where}: {expr}" for where, expr in asked)
        return True

    await eventually(none_is_silent, 120, "data for every query")
