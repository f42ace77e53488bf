"""T1: kill -9 of one of three replicas every 0.5 to 2 seconds. Whoever supervises starts it again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.torture.bench import BOTH
from tests.torture.stage import stage

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport

_INDEXES = """
SELECT count(*) FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_am AS a ON a.oid = c.relam
WHERE a.amname = 'hnsw' AND i.indisvalid
"""


async def run(bench: Bench, kills: int, *, real_model: bool = False) -> FaultReport:
    """Kill replicas at random; the two others go on while one starts again."""
    async with stage(bench, "t1", pipelines=BOTH, real_model=real_model, index=True) as on:
        returning: set[asyncio.Task[object]] = set()
        while on.report.injected < kills:
            await on.pause(0.5, 2.0)
            alive = [replica for replica in on.fleet.replicas if replica.alive]
            if not alive:
                await asyncio.wait(returning, return_when=asyncio.FIRST_COMPLETED)
                continue
            victim = on.rng.choice(alive)
            await victim.kill()
            on.report.injected += 1
            task: asyncio.Task[object] = asyncio.create_task(victim.start(ready=False))
            returning.add(task)
            task.add_done_callback(returning.discard)
        await asyncio.gather(*returning)
        async with on.arena.session() as connection:
            on.report.facts["hnsw_indexes"] = await connection.fetchval(_INDEXES)
        on.report.claim(on.report.facts["hnsw_indexes"] == len(BOTH), "T1", "the vectors have no index")
    return on.report


async def run_with_real_model(bench: Bench, kills: int) -> FaultReport:
    """The same with the real ONNX model in the replicas."""
    return await run(bench, kills, real_model=True)
