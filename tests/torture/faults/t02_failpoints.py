"""T2: death at every point of a document's path, one after the other, under load."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from typing import TYPE_CHECKING

from tests.torture.bench import CANARY, CHUNKS, HERE, SOURCE
from tests.torture.embedder import RAISES
from tests.torture.replica import STEPS
from tests.torture.stage import stage
from tests.waiting import eventually

if TYPE_CHECKING:
    import asyncpg

    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport
    from tests.torture.stage import Stage

IN_PROCESS = tuple(f"{when}_{step}" for step in (*STEPS, "embed") for when in ("before", "after"))
"""The replica kills itself there; after_settle is after the commit."""
IN_SQL = ("lock", "upsert", "ack", "commit")
"""The backend stops there, then replica and backend are killed."""
POINTS = (*IN_PROCESS, *IN_SQL)
_FIRST_POISON = 1_000_000
PATIENT = {"MAX_ATTEMPTS": str(len(POINTS) + 1), "BACKOFF_CAP": "0.2"}
"""Who dies again and again while the oldest suspect runs makes that suspect look like the culprit, as it must: here
the innocent get more attempts than there are deaths in a row."""


async def run(bench: Bench, times: int) -> FaultReport:
    """Die ``times`` times at each point. ``injected`` counts rounds over all points."""
    async with (
        stage(bench, "t2", replicas=1, documents=40, start=False, settings=PATIENT) as on,
        on.arena.session() as connection,
    ):
        await connection.execute((HERE / "failpoints.sql").read_text())
        await connection.execute(
            "SELECT audit.plant($1::regclass, $2::regclass)", f"{CHUNKS}_vectors", f"pgmq.q_{CHUNKS}"
        )
        died: Counter[str] = Counter()
        for _ in range(times):
            for point in POINTS:
                if point in IN_SQL:
                    await _die_in_sql(on, connection, point)
                else:
                    await _die_in_process(on, connection, point)
                died[point] += 1
            on.report.injected += 1
            if on.report.injected < times:
                await _recover(on, connection)
        on.report.facts["points"] = len(died)
        on.report.facts["kills"] = sum(died.values())
    return on.report


async def _die_in_process(on: Stage, connection: asyncpg.Connection, point: str) -> None:
    """Start a replica that dies at a point, and give it a reason to get there."""
    (replica,) = on.fleet.replicas
    step = point.partition("_")[2]
    slow = "0.4" if step in {"extend", "release"} else "0.02"
    if step in {"defer", "dead_letter"}:
        await _plant_poison(on, connection)
    passes = 1 if step not in {"lease", "read", "embed", "settle"} else on.rng.randint(1, 4)
    await replica.start(ready=False, failpoint=f"{point}:{passes}", slowest=slow)
    ended = asyncio.create_task(replica.wait(60))
    if step == "acknowledge":  # needs a document that is gone, or written already, when its message comes
        while not ended.done():
            await connection.execute(f"UPDATE {SOURCE} SET content = content || ' x' WHERE id = 1")
            await connection.execute(f"WITH d AS (DELETE FROM {SOURCE} WHERE id = 1 RETURNING *) SELECT FROM d")
            await connection.execute(f"INSERT INTO {SOURCE} VALUES (1, '{CANARY} again') ON CONFLICT DO NOTHING")
            await asyncio.sleep(0.05)
    elif step == "release":  # what another lease has claimed is released as well: it may die of that already

        async def underway() -> bool:
            return ended.done() or ((await replica.readiness())[0] == 200 and await _in_flight(connection) > 0)

        await eventually(underway, 60, what="work in flight")
        await replica.send(signal.SIGTERM)
    status = await ended
    on.report.claim(status == -signal.SIGKILL, "T2", f"replica ended with {status} instead of dying at {point}")


async def _recover(on: Stage, connection: asyncpg.Connection) -> None:
    """Let a whole replica finish what the deaths of one round left behind."""
    (replica,) = on.fleet.replicas
    oldest = await connection.fetchval(f"SELECT max(msg_id) FROM pgmq.q_{CHUNKS}") or 0
    await replica.start()
    question = f"SELECT NOT EXISTS (SELECT FROM pgmq.q_{CHUNKS} WHERE msg_id <= $1)"
    await eventually(lambda: connection.fetchval(question, oldest), 60, what="recovery between two rounds")
    await replica.kill()


async def _die_in_sql(on: Stage, connection: asyncpg.Connection, point: str) -> None:
    """Stop a backend inside settle, kill its replica, then the backend, which rolls back."""
    (replica,) = on.fleet.replicas
    await connection.execute("INSERT INTO audit.armed VALUES ($1)", point)
    await replica.start(ready=False)
    pid = await eventually(lambda: connection.fetchval("SELECT audit.reached()"), 60, what=f"a settlement at {point}")
    await replica.kill()
    await connection.execute("DELETE FROM audit.armed")
    await connection.execute("SELECT pg_terminate_backend($1)", pid)


async def _plant_poison(on: Stage, connection: asyncpg.Connection) -> None:
    key = _FIRST_POISON + len(on.poison)
    on.poison[str(key)] = ""  # who dies of it while burying it uses up its attempts: any reason will do
    await connection.execute(f"INSERT INTO {SOURCE} VALUES ($1, $2)", key, f"{CANARY} {RAISES} number {key}")


async def _in_flight(connection: asyncpg.Connection) -> int:
    return int(await connection.fetchval(f"SELECT count(*) FROM pgmq.q_{CHUNKS} WHERE vt > clock_timestamp()"))
