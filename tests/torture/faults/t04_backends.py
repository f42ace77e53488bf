"""T4: ``pg_terminate_backend`` of connections of ours, working or idle, listeners included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.torture.bench import BOTH
from tests.torture.stage import stage

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport

_KILL = """
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND usename LIKE 'torture_daemon%'
    ORDER BY state = 'active' DESC, random() LIMIT $1) AS victims
"""


async def run(bench: Bench, kills: int) -> FaultReport:
    """Terminate one connection after the other, now and then all of them, busy ones first."""
    async with stage(bench, "t4", pipelines=BOTH) as on, on.arena.session() as connection:
        while on.report.injected < kills:
            await on.pause(0.02, 0.3)
            many = 100 if on.rng.random() < 0.1 else 1
            on.report.injected += await connection.fetchval(_KILL, many)
    return on.report
