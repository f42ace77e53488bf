"""P7: how fresh live edits stay while a backfill runs that is far from its end."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tests.bench.folders import SHAPE
from tests.bench.freshness import described, edit, freshness
from tests.bench.server import TABLE, drained, load
from tests.waiting import eventually

if TYPE_CHECKING:
    import asyncpg

    from tests.bench.workplace import Workplace

LIVE = 20_000_000
"""Keys from here on are those that are edited."""
TOKENS = 30
EVERY_SECONDS = 0.5
LOOK_SECONDS = 0.25


async def run(place: Workplace) -> None:
    """Documents first, then attach, which starts the backfill; then edits at a steady rate."""
    corpora = await place.corpora()
    texts = corpora.named("docstrings", place.pick(300, 3_000, 100_000))
    seconds = place.pick(4, 10, 180)
    server = await place.server()
    async with server.arena() as arena, arena.session() as connection:
        live = [corpora.of_length(TOKENS, f"live/{n}") for n in range(place.pick(20, 50, 400))]
        await load(connection, texts)
        await arena.attach(SHAPE, place.models)
        async with arena.daemon(place.models, RUNTIME=place.runtime, THREADS=str(place.threads)):
            await eventually(
                lambda: connection.fetchval(f"SELECT EXISTS (SELECT FROM {TABLE}_embeddings)"), 120, "the backfill"
            )
            await load(connection, live, first=LIVE)
            found = await _edit_for(place, connection, seconds, len(live))
            done = await connection.fetchval(f"SELECT count(*) FROM {TABLE}_embeddings WHERE id < $1", LIVE)
            if place.report.profile == "tiny":
                await drained(connection, seconds=600)
    shown = described(found)
    place.say(f"  P7: {shown}; meanwhile {done} of {len(texts)} documents were backfilled")
    assert done < len(texts) or place.report.profile == "tiny", "the backfill ended before the edits did"
    place.report.figure("P7_p99_ms", shown["p99"])
    place.report.tables["freshness_backfill_ms"] = {
        **shown,
        "runtime": place.runtime,
        "model": SHAPE,
        "documents": len(texts),
        "backfilled_meanwhile": done,
        "seconds": seconds,
        "edits_a_second": 1 / EVERY_SECONDS,
    }


async def _edit_for(place: Workplace, connection: asyncpg.Connection, seconds: float, count: int) -> list[float]:
    """Edit live documents in turn; none is edited again before its vector was seen. Returns milliseconds."""
    corpora = await place.corpora()
    found: list[float] = []
    open_keys: set[int] = set()
    started = time.monotonic()
    number = 0
    while time.monotonic() < started + seconds or open_keys:
        key = LIVE + number % count
        due = time.monotonic() >= started + number * EVERY_SECONDS
        if due and time.monotonic() < started + seconds and key not in open_keys:
            await edit(connection, key, corpora.of_length(TOKENS, f"live/edit/{number}"))
            open_keys.add(key)
            number += 1
        fresh = await freshness(connection, open_keys)
        found += fresh.values()
        open_keys -= fresh.keys()
        if time.monotonic() > started + seconds + 120:
            raise TimeoutError(f"{len(open_keys)} edits have no vector two minutes after the last edit")
        await asyncio.sleep(LOOK_SECONDS)
    return found
