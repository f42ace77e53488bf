"""T15: SIGTERM, again and again, under load: it ends in time, leases are visible at once, nothing is blamed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.torture.bench import CANARY, CHUNKS, SOURCE
from tests.torture.fleet import SETTINGS
from tests.torture.stage import stage
from tests.waiting import eventually

if TYPE_CHECKING:
    import asyncpg

    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport
    from tests.torture.stage import Stage

SPARE = 5.0
"""Seconds beyond the drain limit: closing the endpoints and connections, on a loaded machine."""
VISIBLE_WITHIN = 1.0
"""Seconds after the exit."""
_HELD = f"SELECT count(*) FROM pgmq.q_{CHUNKS} WHERE vt > clock_timestamp()"
_BURNED = f"""
SELECT count(*) FROM pgmq.q_{CHUNKS} WHERE read_ct > coalesce((message #>> '{{sidecar,excused}}')::int, 0)
"""


async def run(bench: Bench, times: int) -> FaultReport:
    """One replica at a time, so that what is in flight is its own; a second fleet member restarts in a storm."""
    async with stage(bench, "t15", replicas=1, rate=15, documents=150, start=False) as on:
        (replica,) = on.fleet.replicas
        exits: list[float] = []
        async with on.arena.session() as connection:
            for n in range(times):
                await _more(connection, n)
                # A long run now and then: it is under way when the signal comes, and must be finished.
                await replica.start(slowest=str(on.rng.choice([0.02, 0.2, 1.0])))
                await eventually(lambda: connection.fetchval(_HELD), 30, what="work in flight")
                await on.pause(0.0, 0.5)
                exits.append(await _stop(on, connection))
                on.report.injected += 1
        on.report.facts["slowest_exit_s"] = round(max(exits), 1)
    return on.report


async def _stop(on: Stage, connection: asyncpg.Connection) -> float:
    (replica,) = on.fleet.replicas
    limit = float(SETTINGS["DRAIN_SECONDS"]) + SPARE
    started = time.monotonic()
    try:
        status = await replica.terminate(limit)
    except TimeoutError:
        on.report.claim(False, "T15", f"no exit within {limit} s")
        await replica.kill()
        return limit
    took = time.monotonic() - started
    on.report.claim(status == 0, "T15", f"exit status {status} after SIGTERM")
    try:
        await eventually(lambda: _none(connection), VISIBLE_WITHIN, what="visible leases")
    except AssertionError:
        on.report.claim(False, "T15", f"{await connection.fetchval(_HELD)} messages still held after the exit")
    burned = await connection.fetchval(_BURNED)
    on.report.claim(burned == 0, "T15", f"{burned} messages lost an attempt to a clean stop")
    return took


async def _none(connection: asyncpg.Connection) -> bool:
    return not await connection.fetchval(_HELD)


async def _more(connection: asyncpg.Connection, n: int) -> None:
    await connection.execute(
        f"INSERT INTO {SOURCE} SELECT i, '{CANARY} storm ' || i FROM generate_series($1::bigint, $1 + 149) AS i",
        5_000_000 + n * 1000,
    )
