"""T4: ``pg_terminate_backend`` of connections of ours, working or idle, listeners included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.torture.bench import BOTH, CHUNKS, HERE
from tests.torture.stage import stage
from tests.waiting import eventually

if TYPE_CHECKING:
    import asyncpg

    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport

INSIDE_EVERY = 6
_KILL = """
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND usename LIKE 'torture_daemon%'
    ORDER BY state = 'active' DESC, random() LIMIT $1) AS victims
"""


async def run(bench: Bench, kills: int) -> FaultReport:
    """Terminate one connection after the other; now and then all of them, or one in the middle of a settlement."""
    async with stage(bench, "t4", pipelines=BOTH) as on, on.arena.session() as connection:
        await connection.execute((HERE / "failpoints.sql").read_text())
        await connection.execute(
            "SELECT audit.plant($1::regclass, $2::regclass)", f"{CHUNKS}_vectors", f"pgmq.q_{CHUNKS}"
        )
        turn = 0
        while on.report.injected < kills:
            await on.pause(0.02, 0.3)
            turn += 1
            if turn % INSIDE_EVERY == 1:
                on.report.injected += await _inside_settle(connection)
            else:
                on.report.injected += await connection.fetchval(_KILL, 100 if on.rng.random() < 0.1 else 1)
    return on.report


async def _inside_settle(connection: asyncpg.Connection) -> int:
    """Vectors are written, the commit is near. The statement fails, which an idle connection never does."""
    await connection.execute("INSERT INTO audit.armed VALUES ('upsert')")
    pid = await eventually(lambda: connection.fetchval("SELECT audit.reached()"), 30, what="a settlement under way")
    await connection.execute("DELETE FROM audit.armed")
    return int(await connection.fetchval("SELECT pg_terminate_backend($1)", pid))
