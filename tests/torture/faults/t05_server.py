"""T5: ``pg_ctl stop -m immediate``, down for 0 to 20 seconds, start; and all backends of ours killed at once.

Measures what a peer comparison found at 0 % for four of eight queue clients: whether work goes on by itself, and how
soon. The model's seeded pause is the bottleneck here, so that rates before and after can be compared.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import asyncpg

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
_KILL_ALL = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename LIKE 'torture_daemon%'"


async def run(bench: Bench, stops: int) -> FaultReport:
    """Crash the server under a backlog, ``stops`` times; after the last one kill the backends only."""
    cluster = await bench.cluster("t5")
    async with stage(
        bench, "t5", cluster="t5", rate=10, settings={"BATCH_WINDOWS": "2", "LEASE_MESSAGES": "32"}, start=False
    ) as on:
        await on.fleet.start(slowest="0.1", steady="1")
        recoveries: list[float] = []
        while on.report.injected < stops:
            down = on.rng.uniform(0, 20) if on.report.injected else 0.0
            recoveries.append(await _measured(on, lambda down=down: _crash(cluster, down)))  # type: ignore[misc]  # mypy infers no type for a lambda's default
            on.report.injected += 1
        backends = await _measured(on, lambda: _kill_backends(on))
        on.report.facts |= {"recovery_s": round(max(recoveries), 1), "recovery_after_backends_s": round(backends, 1)}
        on.report.facts["restarts"] = sum(replica.starts for replica in on.fleet.replicas) - len(on.fleet.replicas)
        on.report.claim(on.report.facts["restarts"] == 0, "T5", "a replica had to be started again")
    return on.report


async def _measured(on: Stage, hurt: Callable[[], Awaitable[None]]) -> float:
    """Seconds from the end of ``hurt`` until the rate is back."""
    await _backlog(on, BACKLOG)
    await asyncio.sleep(1)
    before = await _rate(on, WINDOW)
    await hurt()
    accepted = time.monotonic()
    samples: list[tuple[float, int]] = []
    best = 0.0
    async with on.arena.session() as connection:
        while time.monotonic() - accepted < WITHIN + WINDOW + 1:
            samples.append((time.monotonic(), await connection.fetchval(_WRITTEN)))
            past = [(at, count) for at, count in samples if at <= samples[-1][0] - WINDOW]
            if past:
                rate = (samples[-1][1] - past[-1][1]) / (samples[-1][0] - past[-1][0])
                best = max(best, rate)
                if rate >= GOAL * before:
                    # The rate was back when the window began, not when it ended.
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


async def _crash(cluster: Cluster, down: float) -> None:
    await asyncio.to_thread(cluster.server.stop, "immediate")
    await asyncio.sleep(down)
    await asyncio.to_thread(cluster.server.start)


async def _kill_backends(on: Stage) -> None:
    connection = await asyncpg.connect(on.arena.admin_url)
    await connection.fetchval(_KILL_ALL)
    await connection.close()
