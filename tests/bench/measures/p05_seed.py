"""P5: end to end, enqueue to committed: the real daemon, the naive worker, the serial port of the system replaced."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

from tests.bench.contest import Contestant
from tests.bench.folders import SHAPE
from tests.bench.rounds import Rounds
from tests.bench.server import TABLE, check_vectors, drained, load

if TYPE_CHECKING:
    import asyncpg

    from tests.bench.workplace import Workplace

COLD = "seed_port_cold"
READERS = ("naive", "seed_port", COLD)
PUBLISHED = 87.5 / 60
"""Documents a second that the system replaced published; on another machine, so only beside the ratio."""


async def run(place: Workplace) -> None:
    """Both corpora. Each contestant has a database of its own, so all can stay up; one works at a time."""
    corpora = await place.corpora()
    server = await place.server()
    table = place.report.tables["end_to_end"] = {"runtime": place.runtime, "model": SHAPE}
    async with AsyncExitStack() as stack:
        turns = {}
        for name in ("ours", *READERS):
            arena = await stack.enter_async_context(server.arena())
            await arena.attach(SHAPE, place.models)
            connection = await stack.enter_async_context(arena.session())
            reader = None
            if name == "ours":
                daemon = arena.daemon(place.models, RUNTIME=place.runtime, THREADS=str(place.threads))
                await stack.enter_async_context(daemon)
            else:
                arguments = (arena.url, str(place.models / SHAPE), str(place.threads))
                module = f"tests.bench.contestants.{name}"
                reader = await stack.enter_async_context(Contestant(name, module, arguments, folder=place.folder))
            turns[name] = partial(_block, connection, reader)
        for corpus, sizes in {"docstrings": (20, 24, 96), "500_tokens": (4, 4, 24)}.items():
            texts = corpora.named(corpus, place.pick(*sizes))
            place.say(f"  P5 {corpus}: {corpora.described(texts)}")
            rounds = Rounds(place, f"P5 {corpus}")
            await rounds.play(
                {name: partial(turn, texts) for name, turn in turns.items() if name != COLD}, place.rounds
            )
            cold = Rounds(place, f"P5 {corpus}, cold")  # no goal stands on it, and it is slow: fewer rounds and texts
            few = texts[: max(4, len(texts) // 3)]
            await cold.play({name: partial(turns[name], few) for name in ("ours", COLD)}, 2)
            ratio = rounds.ratio("ours", "seed_port")
            place.report.figure(f"P5_{corpus}", ratio["median"])
            table[corpus] = {
                "corpus": corpora.described(texts),
                "ours_over_seed_port": ratio,
                "ours_over_seed_port_cold": cold.ratio("ours", COLD),
                "ours_over_naive": rounds.ratio("ours", "naive"),
                "ours_over_published": round(rounds.rate("ours") / PUBLISHED, 1),
                "cold": cold.summary(),
                **rounds.summary(),
            }


async def _block(connection: asyncpg.Connection, reader: Contestant | None, texts: list[str]) -> dict[str, float]:
    """One COPY, timed from its commit until the queue is empty, by the same look at it for all."""
    async with asyncio.TaskGroup() as both:
        if reader is not None:
            both.create_task(reader.ask("work", documents=len(texts)))
        await load(connection, texts)
        started = time.perf_counter()
        await drained(connection, seconds=1200)
        seconds = time.perf_counter() - started
    assert await check_vectors(connection) == len(texts)
    await connection.execute(f"DELETE FROM {TABLE}")
    await connection.execute(f"VACUUM {TABLE}_embeddings")
    await connection.execute(f"VACUUM pgmq.q_{TABLE}")
    return {"amount": len(texts), "seconds": seconds}
