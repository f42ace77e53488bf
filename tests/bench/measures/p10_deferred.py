"""P10: what it saves to build the vector index after a backfill instead of keeping it up to date. Null model.

By the commands that an operator has for it: ``index defer`` and ``index build``, as functions.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sidecar_daemon.app.indexing import IndexBuild, build_index, defer_index
from sidecar_daemon.settings import Settings
from tests.bench.server import TABLE, check_vectors, drained
from tests.waiting import eventually

if TYPE_CHECKING:
    import asyncpg

    from tests.bench.workplace import Workplace

HOW = IndexBuild(most_memory=512 * 2**20, workers=2, wait=True)
BACKFILL_SECONDS = 3600


async def run(place: Workplace) -> None:
    """One backfill each way: the live one alone takes minutes at full size, so there are no rounds."""
    rows = place.pick(300, 2_000, 100_000)
    seconds = {deferred: await _backfill(place, rows, deferred=deferred) for deferred in (True, False)}
    place.report.figure("P10", seconds[False]["all"] / seconds[True]["all"])
    place.report.tables["deferred_index"] = {
        "rows": rows,
        "rounds": 1,
        "seconds_live": seconds[False],
        "seconds_deferred": seconds[True],
        "build_settings": {"maintenance_work_mem": "at most 512 MB", "workers": HOW.workers},
    }


async def _backfill(place: Workplace, rows: int, *, deferred: bool) -> dict[str, float]:
    """Attach a table of documents and wait for all vectors, and for the index; the seconds that took."""
    server = await place.server()
    async with server.arena() as arena, arena.session() as connection:
        await connection.execute(
            f"INSERT INTO {TABLE} SELECT n, 'document ' || n FROM generate_series(1, $1::bigint) AS n", rows
        )
        await connection.execute(f"ANALYZE {TABLE}")
        async with arena.daemon(place.models, null=True, THREADS=str(place.threads)):
            calibration = await place.calibrate()
            await arena.attach_null(connection, index=True)
            started = time.perf_counter()
            settings = Settings.read(database_url=arena.url)
            if deferred:
                await defer_index(settings, TABLE, tell=lambda _: None)
            await _finished(connection, rows)
            loaded = time.perf_counter() - started
            if deferred:
                await build_index(settings, TABLE, HOW, tell=lambda _: None)
            whole = time.perf_counter() - started
        await check_vectors(connection)
        name = await connection.fetchval(
            "SELECT indexname FROM pg_indexes WHERE tablename = $1 AND indexdef LIKE '%hnsw%'", f"{TABLE}_embeddings"
        )
        assert name is not None, "there is no vector index after the backfill"
    place.say(f"  P10: {rows:,} rows with the index {'deferred' if deferred else 'live'}: {whole:.1f} s")
    return {"load": round(loaded, 2), "all": round(whole, 2), "calibration": round(calibration["median"], 1)}


async def _finished(connection: asyncpg.Connection, rows: int) -> None:
    """Until the walk has seen every row and both lanes are empty."""
    await eventually(
        lambda: connection.fetchval(
            "SELECT finished_at IS NOT NULL AND scanned >= $1 FROM sidecar.sweeps WHERE pipeline = $2", rows, TABLE
        ),
        BACKFILL_SECONDS,
        "the end of the walk",
    )
    await drained(connection, seconds=BACKFILL_SECONDS)
