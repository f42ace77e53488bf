"""T5: ``pg_ctl stop -m immediate``, down for 0 to 20 seconds, start; and all backends of ours killed at once.

Measures what a peer comparison found at 0 % for four of eight queue clients: whether work goes on by itself, and how
soon. The model's seeded pause is the bottleneck here, so that rates before and after can be compared.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tests.torture.bench import CANARY, CHUNKS, SOURCE
from tests.torture.stage import stage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.torture.bench import Bench, Cluster
    from tests.torture.report import FaultReport
    from tests.torture.stage import Stage

WINDOW = 4.0
"""Seconds over which a rate is taken."""
GOAL, WITHIN = 0.95, 15.0
"""Of the rate before, within seconds of the server accepting connections."""
BACKLOG = 1600
"""Documents before each crash: half a minute of work, more than a measurement lasts. With less the work ran out before
a slow recovery was over, and an empty queue was taken for a rate that did not come back."""
_FIRST = 10_000_000
_WRITTEN = "SELECT count(*) FROM audit.writes WHERE op <> 'DELETE'"
_KILL_ALL = """
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename LIKE 'torture_daemon%'
"""


async def run(bench: Bench, stops: int) -> FaultReport:
    """Crash the server under a backlog, ``stops`` times; after the last one kill the backends only."""
    cluster = await bench.cluster("t5")
    async with stage(
        bench, "t5", cluster="t5", rate=10, settings={"BATCH_WINDOWS": "2", "LEASE_MESSAGES": "32"}, start=False
    ) as on:
        await on.fleet.start(slowest="0.1", steady="1")
        pids = [replica.pid for replica in on.fleet.replicas]
        recoveries: list[float] = []
        while on.report.injected < stops:
            down = on.rng.uniform(0, 20) if on.report.injected else 0.0
            recoveries.append(await _measured(on, lambda down=down: _crash(on, cluster, down)))  # type: ignore[misc]  # mypy infers no type for a lambda's default
            on.report.injected += 1
        backends = await _measured(on, lambda: _kill_backends(on))
        on.report.facts |= {"recovery_s": round(max(recoveries), 1), "recovery_after_backends_s": round(backends, 1)}
        same = [replica.pid for replica in on.fleet.replicas if replica.alive]
        on.report.facts["restarts"] = len(set(pids) - set(same))
        on.report.claim(on.report.facts["restarts"] == 0, "T5", "a replica did not live through it")
    return on.report


async def _measured(on: Stage, hurt: Callable[[], Awaitable[None]]) -> float:
    """Seconds from the end of ``hurt`` until the rate is back."""
    await _backlog(on, BACKLOG)
    await asyncio.sleep(1)
    before = await _rate(on, WINDOW)
    on.report.facts["rates_before"] = [*on.report.facts.get("rates_before", []), round(before)]
    on.report.claim(before > 0, "T5", "nothing was written before the fault: there is no rate to come back to")
    await hurt()
    accepted = time.monotonic()
    samples: list[tuple[float, int]] = []
    best = 0.0
    async with on.arena.session() as connection:
        while time.monotonic() - accepted < WITHIN + WINDOW + 1:
            samples.append((time.monotonic(), await connection.fetchval(_WRITTEN)))
            if len(samples) > 1:
                on.report.worst("recovery_resolution_s", samples[-1][0] - samples[-2][0])
            past = [(at, count) for at, count in samples if at <= samples[-1][0] - WINDOW]
            if past:
                rate = (samples[-1][1] - past[-1][1]) / (samples[-1][0] - past[-1][0])
                best = max(best, rate)
                if rate >= GOAL * before:
                    # The rate was back when the window began, not when it ended; 0.0 says that the first window
                    # after the fault had it, which an outage of up to a twentieth of the window would not change.
                    return max(0.0, past[-1][0] - accepted)
            await asyncio.sleep(0.2)
    message = f"rate {best:.0f}/s at best after {WITHIN} s, it was {before:.0f}/s"
    on.report.claim(False, "T5", message)
    return WITHIN + 1


async def _backlog(on: Stage, documents: int) -> None:
    """Enough work that the rate is the model's, and no more than can be done before the next crash."""
    first = _FIRST + on.report.injected * 100_000
    async with on.arena.session() as connection:
        waiting = await connection.fetchval(f"SELECT count(*) FROM pgmq.q_{CHUNKS}")
        await connection.execute(
            f"INSERT INTO {SOURCE} SELECT n, '{CANARY} backlog ' || n "
            "FROM generate_series($1::bigint, $2::bigint) AS n "
            "ON CONFLICT (id) DO UPDATE SET content = excluded.content || ' again ' || clock_timestamp()",
            *(first, first + max(0, documents - waiting) - 1),
        )


async def _rate(on: Stage, seconds: float) -> float:
    async with on.arena.session() as connection:
        first, started = await connection.fetchval(_WRITTEN), time.monotonic()
        await asyncio.sleep(seconds)
        return float(await connection.fetchval(_WRITTEN) - first) / (time.monotonic() - started)


async def _crash(on: Stage, cluster: Cluster, down: float) -> None:
    with on.client.excused():
        await asyncio.to_thread(cluster.server.stop, "immediate")
        await asyncio.sleep(down)
        await asyncio.to_thread(cluster.server.start)


async def _kill_backends(on: Stage) -> None:
    async with on.arena.session() as connection:
        killed = await connection.fetchval(_KILL_ALL)
    on.report.facts["killed_backends"] = killed
    on.report.claim(killed >= len(on.fleet.replicas), "T5", f"only {killed} backends were killed")
