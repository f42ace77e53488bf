"""P11: what the trigger costs the writer, on a server of its own without checkpoints that fall by chance."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING

from tests.bench.arithmetic import spread
from tests.bench.enqueue import SERVER, copy_once, documents, insert_each, writer, writers_server
from tests.bench.rounds import Rounds

if TYPE_CHECKING:
    import asyncpg

    from tests.bench.workplace import Workplace

WORDS = 60


async def run(place: Workplace) -> None:
    """COPY, then single inserts, both with the trigger and without it."""
    rows = documents(place.pick(500, 10_000, 100_000), WORDS)
    rounds = Rounds(place, "P11 COPY")
    with writers_server() as server:
        async with writer(server.dsn()) as connection:
            turns = {name: partial(_copy, connection, rows, name == "with") for name in ("with", "without")}
            await rounds.play(turns, place.rounds)
            added = await _inserts(place, connection, rows[: place.pick(20, 200, 1000)])
    ratio = rounds.ratio("without", "with")
    row_us = 1e6 * (1 / rounds.rate("with") - 1 / rounds.rate("without"))
    place.report.figure("P11_copy_ratio", ratio["median"])
    place.report.figure("P11_row_us", row_us)
    place.report.figure("P11_insert_ms", added["added_ms"]["median"])
    place.report.tables["writer"] = {
        "rows": len(rows),
        "words": WORDS,
        "copy_ratio": ratio,
        "inserts": added,
        "server": SERVER,
        **rounds.summary(),
    }


async def _copy(connection: asyncpg.Connection, rows: list[tuple[str]], trigger: bool) -> dict[str, float]:
    return {"amount": len(rows), "seconds": await copy_once(connection, rows, trigger=trigger)}


async def _inserts(
    place: Workplace, connection: asyncpg.Connection, rows: list[tuple[str]]
) -> dict[str, dict[str, float]]:
    """Milliseconds that the trigger adds to the median insert, once a round; the first warms up."""
    added, medians = [], {True: [0.0], False: [0.0]}
    for number in range(place.rounds):
        found: dict[bool, list[float]] = {True: [], False: []}
        for trigger in (True, False, False, True):
            found[trigger] += await insert_each(connection, rows, trigger=trigger)
        if number:
            for trigger, seconds in found.items():
                medians[trigger].append(1000 * statistics.median(seconds))
            added.append(medians[True][-1] - medians[False][-1])
    place.say(f"  P11: the trigger adds {statistics.median(added):.3f} ms to a single insert")
    return {
        "added_ms": spread(added).rounded(4),
        "with_ms": spread(medians[True][1:]).rounded(4),
        "without_ms": spread(medians[False][1:]).rounded(4),
    }
