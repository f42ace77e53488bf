"""P9: how much one Postgres and the daemon's database side can take: a model without work, four replicas, no index."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from tests.bench.arithmetic import spread
from tests.bench.server import TABLE, check_vectors, drained, load

if TYPE_CHECKING:
    from tests.bench.workplace import Workplace

REPLICAS = 4


async def run(place: Workplace) -> None:
    """Several blocks; the first warms up."""
    count = place.pick(500, 8_000, 40_000)
    server = await place.server()
    rates = []
    async with server.arena() as arena, arena.session() as connection, AsyncExitStack() as stack:
        await arena.attach_null(connection, index=False)
        for _ in range(REPLICAS):
            await stack.enter_async_context(arena.daemon(place.models, null=True, THREADS="1"))
        for number in range(place.rounds):
            texts = [f"document {number} {n}" for n in range(count)]
            await load(connection, texts, first=1 + number * count)
            seconds = await drained(connection, seconds=1200)
            place.say(f"  P9: {count / seconds:,.0f} documents/s")
            if number:
                rates.append(count / seconds)
            await connection.execute(f"VACUUM {TABLE}_embeddings")
        assert await check_vectors(connection) == count * place.rounds
    found = spread(rates)
    place.report.figure("P9", found.median)
    place.report.tables["ceiling"] = {
        "replicas": REPLICAS,
        "documents_a_block": count,
        "documents_a_second": found.rounded(1),
    }
