"""P8: whether a backlog of a million messages slows the daemon down. Null model, without an index on the vectors."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests.bench.server import TABLE, check_vectors, drained, sizes

if TYPE_CHECKING:
    import asyncpg

    from tests.bench.workplace import Workplace

LOOK_SECONDS = 5.0
POLL_SECONDS = 0.1
"""Between two looks at whether the queue is empty: through a bloated queue such a look is not free."""


async def run(place: Workplace) -> None:
    """The small backlog twice, the large one, the small one twice: the better of before and after is what counts."""
    small, large = place.pick(500, 4_000, 10_000), place.pick(2_000, 24_000, 1_000_000)
    server = await place.server()
    found: dict[str, Any] = {"small": small, "large": large}
    async with server.arena() as arena, arena.session() as connection, arena.session() as watching:
        await arena.attach_null(connection, index=False)
        async with arena.daemon(place.models, null=True, THREADS=str(place.threads)):
            await _drain(connection, 0, max(200, small // 5))  # warms up: connections, plans, the file of the table
            rates, first = [], max(200, small // 5)
            for count in (small, small, large, small, small):
                await place.calibrate()
                series: list[dict[str, Any]] = []
                before = await sizes(watching)
                watch = asyncio.create_task(_watch(watching, series)) if count == large else None
                seconds = await _drain(connection, first, count)
                if watch is not None:
                    watch.cancel()
                    with suppress(asyncio.CancelledError):
                        await watch
                    found |= {"before": before, "during": series, "after": await sizes(watching)}
                first += count
                rates.append(count / seconds)
                place.say(f"  P8: {count:,} messages at {rates[-1]:,.0f}/s")
            assert await check_vectors(connection) == first
    before_it, after_it = sum(rates[:2]) / 2, sum(rates[3:]) / 2
    place.report.figure("P8", rates[2] / max(before_it, after_it))
    place.report.tables["backlog"] = {
        **found,
        "documents_a_second_small_before": [round(rate) for rate in rates[:2]],
        "documents_a_second_small_after": [round(rate) for rate in rates[3:]],
        "documents_a_second_large": round(rates[2]),
    }


async def _drain(connection: asyncpg.Connection, first: int, count: int) -> float:
    """Insert documents in one transaction; seconds from its commit until the last message is settled."""
    await connection.execute(
        f"INSERT INTO {TABLE} SELECT n, 'document ' || n FROM generate_series($1::bigint, $2::bigint) AS n",
        *(first + 1, first + count),
    )
    return await drained(connection, seconds=3600, every=POLL_SECONDS if count > 100_000 else 0.02)


async def _watch(connection: asyncpg.Connection, series: list[dict[str, Any]]) -> None:
    """Sizes and dead tuples while the large backlog is worked off."""
    started = time.monotonic()
    while True:
        series.append({"seconds": round(time.monotonic() - started, 1), **(await sizes(connection))})
        await asyncio.sleep(LOOK_SECONDS)
