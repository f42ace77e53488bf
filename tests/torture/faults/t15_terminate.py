"""T15: SIGTERM under load, to one after the other (a rolling restart) and to all at once (a storm).

Each ends in time, leases are visible at once, nothing is blamed, and those that stay go on.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tests.torture.bench import CANARY, CHUNKS, SOURCE
from tests.torture.fleet import SETTINGS
from tests.torture.stage import stage
from tests.waiting import eventually

if TYPE_CHECKING:
    import asyncpg

    from tests.torture.bench import Bench
    from tests.torture.fleet import Replica
    from tests.torture.report import FaultReport
    from tests.torture.stage import Stage

SPARE = 5.0
"""Seconds beyond the drain limit: closing the endpoints and connections, on a loaded machine."""
VISIBLE_WITHIN = 1.0
"""Seconds after the last exit of a storm: while others work, nobody can tell whose leases are held."""
GOES_ON_WITHIN = 10.0
"""Seconds, on a loaded machine, until one of the two that stay has written something."""
BACKLOG = 450
"""Documents before each pass over the fleet: work for all of it."""
_HELD = f"SELECT count(*) FROM pgmq.q_{CHUNKS} WHERE vt > clock_timestamp()"
_BURNED = f"""
SELECT count(*) FROM pgmq.q_{CHUNKS}
WHERE vt <= clock_timestamp() AND read_ct > coalesce((message #>> '{{sidecar,excused}}')::int, 0)
"""
"""Nobody holds them, and an attempt is missing."""
_WRITTEN = "SELECT count(*) FROM audit.writes WHERE op <> 'DELETE'"
_GOES_ON = f"SELECT ({_WRITTEN}) > $1 OR NOT EXISTS (SELECT FROM pgmq.q_{CHUNKS})"


async def run(bench: Bench, times: int) -> FaultReport:
    """Storms and rolling restarts of three replicas in turns. ``injected`` counts signals."""
    async with (
        stage(bench, "t15", rate=15, documents=150, start=False) as on,
        on.arena.session() as connection,
    ):
        turn = 0
        while on.report.injected < times:
            await _more(connection, turn)
            await asyncio.gather(*[_start(on, replica) for replica in on.fleet.replicas if not replica.alive])
            await eventually(lambda: connection.fetchval(_HELD), 30, what="work in flight")
            await on.pause(0.0, 0.5)
            await (_storm if turn % 2 == 0 else _rolling)(on, connection)
            turn += 1
    return on.report


async def _start(on: Stage, replica: Replica) -> None:
    # A long run now and then: it is under way when the signal comes, and must be finished.
    await replica.start(slowest=str(on.rng.choice([0.02, 0.2, 1.0])))


async def _storm(on: Stage, connection: asyncpg.Connection) -> None:
    """All at once: afterwards nobody is left who could hold a lease."""
    await asyncio.gather(*[_stop(on, replica) for replica in on.fleet.replicas])
    try:
        await eventually(lambda: _none(connection), VISIBLE_WITHIN, what="visible leases")
    except AssertionError:
        on.report.claim(False, "T15", f"{await connection.fetchval(_HELD)} messages still held after the exit")
    await _nothing_burned(on, connection)
    _count(on, "storms")


async def _rolling(on: Stage, connection: asyncpg.Connection) -> None:
    """One after the other, the next when the last is ready again: the two that stay do the work."""
    for replica in on.fleet.replicas:
        await _stop(on, replica)
        await _nothing_burned(on, connection)
        await _others_go_on(on, connection)
        await _start(on, replica)
    await _nothing_burned(on, connection)
    _count(on, "rolling")


async def _others_go_on(on: Stage, connection: asyncpg.Connection) -> None:
    before = await connection.fetchval(_WRITTEN)
    try:
        await eventually(lambda: connection.fetchval(_GOES_ON, before), GOES_ON_WITHIN, what="work of the others")
    except AssertionError as error:
        on.report.claim(False, "T15", str(error))


async def _stop(on: Stage, replica: Replica) -> None:
    limit = float(SETTINGS["DRAIN_SECONDS"]) + SPARE
    started = time.monotonic()
    try:
        status = await replica.terminate(limit)
    except TimeoutError:
        on.report.claim(False, "T15", f"no exit within {limit} s")
        await replica.kill()
    else:
        on.report.claim(status == 0, "T15", f"exit status {status} after SIGTERM")
    on.report.worst("slowest_exit_s", time.monotonic() - started)
    on.report.injected += 1


async def _nothing_burned(on: Stage, connection: asyncpg.Connection) -> None:
    burned = await connection.fetchval(_BURNED)
    on.report.claim(burned == 0, "T15", f"{burned} messages lost an attempt to a clean stop")


def _count(on: Stage, fact: str) -> None:
    on.report.facts[fact] = on.report.facts.get(fact, 0) + 1


async def _none(connection: asyncpg.Connection) -> bool:
    return not await connection.fetchval(_HELD)


async def _more(connection: asyncpg.Connection, turn: int) -> None:
    await connection.execute(
        f"INSERT INTO {SOURCE} SELECT i, '{CANARY} storm ' || i FROM generate_series($1::bigint, $1 + $2 - 1) AS i",
        *(5_000_000 + turn * 1000, BACKLOG),
    )
