"""T14: PgBouncer in transaction mode in front: load through it, with kills of replicas, of backends and of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.torture.bench import BOTH
from tests.torture.pgbouncer import PgBouncer
from tests.torture.stage import stage

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport

_KILL = """
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND usename LIKE 'torture_daemon%'
"""


async def run(bench: Bench, rounds: int) -> FaultReport:
    """Rounds of quiet load, a kill -9, the loss of all backends, and a restart of PgBouncer."""
    home = await bench.cluster()
    async with (
        PgBouncer(bench.folder / "pgbouncer", home.port) as pooler,
        stage(bench, "t14", replicas=2, pipelines=BOTH, url_port=pooler.port, settings={"POOLER": "transaction"}) as on,
        on.arena.session() as connection,
    ):
        for _ in range(rounds):
            await on.pause(1.0, 2.0)
            victim = on.rng.choice(on.fleet.replicas)
            await victim.kill()
            await victim.start()
            await on.pause(0.5, 1.5)
            killed = await connection.fetchval(_KILL)
            on.report.claim(killed > 0, "T14", "no backend was there to be killed")
            on.report.facts["killed_backends"] = on.report.facts.get("killed_backends", 0) + killed
            await on.pause(0.5, 1.5)
            await pooler.kill()
            await on.pause(0.2, 1.0)
            await pooler.start()
            await on.pause(0.5, 1.5)
            on.report.injected += 1
        await connection.close()
    return on.report
