"""P6: how fresh an idle daemon is: one 30-token edit at a time, at moments that nobody can foresee."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.bench.folders import SHAPE
from tests.bench.freshness import described, edit, wait_until_fresh
from tests.bench.server import drained, load

if TYPE_CHECKING:
    from tests.bench.workplace import Workplace

TOKENS = 30
DOCUMENTS = 200
PAUSE_SECONDS = (0.02, 0.2)


async def run(place: Workplace) -> None:
    """Edit, wait for the vector, pause, again."""
    corpora = await place.corpora()
    edits = place.pick(10, 60, 400)
    rng = corpora.rng("idle")
    server = await place.server()
    found = []
    async with server.arena() as arena, arena.session() as connection:
        await arena.attach(SHAPE, place.models)
        async with arena.daemon(place.models, RUNTIME=place.runtime, THREADS=str(place.threads)):
            await load(
                connection, [corpora.of_length(TOKENS, f"idle/{n}") for n in range(place.pick(10, 50, DOCUMENTS))]
            )
            await drained(connection, seconds=600)
            keys = [row["id"] for row in await connection.fetch("SELECT id FROM documents")]
            for number in range(edits):
                key = rng.choice(keys)
                await edit(connection, key, corpora.of_length(TOKENS, f"idle/edit/{number}"))
                found.append(await wait_until_fresh(connection, key))
                await asyncio.sleep(rng.uniform(*PAUSE_SECONDS))
    shown = described(found)
    place.say(f"  P6: {shown}")
    place.report.figure("P6_p50_ms", shown["p50"])
    place.report.figure("P6_p99_ms", shown["p99"])
    place.report.tables["freshness_idle_ms"] = {"runtime": place.runtime, "model": SHAPE, "tokens": TOKENS, **shown}
