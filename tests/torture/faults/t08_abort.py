"""T8: a text that kills the process, in a batch with innocent ones. It ends in the dead letters, alone."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from tests.torture.bench import CANARY, CHUNKS, SOURCE
from tests.torture.embedder import ABORTS
from tests.torture.fleet import MAX_ATTEMPTS
from tests.torture.stage import stage
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport

_KEY = 2_000_000


async def run(bench: Bench, times: int) -> FaultReport:
    """Plant a killer among twenty innocents; count how many processes die of it."""
    async with stage(bench, "t8", replicas=2, rate=15, documents=30) as on, on.arena.session() as connection:
        deaths: list[int] = []
        for n in range(times):
            key = _KEY + n * 100
            on.poison[str(key)] = "attempts_exhausted"
            texts = [f"{CANARY} mate {i} of killer {n}" for i in range(20)]
            texts[10] = f"{CANARY} {ABORTS} {n}"
            keys = [key + i - 10 for i in range(20)]
            await connection.execute(
                f"INSERT INTO {SOURCE} SELECT * FROM unnest($1::bigint[], $2::text[])", keys, texts
            )
            before = sum(replica.starts for replica in on.fleet.replicas)

            async def buried(key: int = key) -> bool:
                await on.fleet_restarts()
                question = f"SELECT count(*) FROM pgmq.q_{CHUNKS}_dlq WHERE message ->> 'document_id' = $1"
                return bool(await connection.fetchval(question, str(key)))

            await eventually(buried, 20.0 * MAX_ATTEMPTS, what=f"the dead letter of killer {n}")
            deaths.append(sum(replica.starts for replica in on.fleet.replicas) - before)
            attempts = await connection.fetchval(
                f"SELECT (message ->> 'attempts')::int FROM pgmq.q_{CHUNKS}_dlq WHERE message ->> 'document_id' = $1",
                str(key),
            )
            # The lease that found the attempts used up is counted too; it started no run.
            on.report.claim(attempts <= MAX_ATTEMPTS + 1, "T8", f"killer {n} is dead after {attempts} attempts")
            on.report.claim(deaths[-1] > 0, "T8", f"killer {n} killed nobody")
            on.report.claim(deaths[-1] <= MAX_ATTEMPTS, "T8", f"killer {n} killed {deaths[-1]} processes")
            on.report.injected += 1
        on.report.facts["deaths"] = max(deaths)
        for replica in on.fleet.replicas:
            # These ends were wanted, and their count is claimed above; any other way to end was not.
            replica.ended = [(pid, status) for pid, status in replica.ended if status != -signal.SIGSEGV]
    return on.report
