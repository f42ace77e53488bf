"""P1: what the pipeline around the model costs. Enqueue to committed, over the same texts through the model alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.bench.folders import SHAPE
from tests.bench.rounds import Rounds
from tests.bench.server import TABLE, drained, load

if TYPE_CHECKING:
    import asyncpg

    from tests.bench.contest import Contestant
    from tests.bench.workplace import Workplace

NEAR = 64
"""Messages, half a second of work or so: from there on the end is watched closely."""
FAR = 10_000_000
"""Keys from here on are the rows that fill the index."""


async def run(place: Workplace) -> None:
    """Both precisions, one after the other."""
    for precision, runtime in place.precisions().items():
        await _one(place, precision, runtime)
    if "bf16" not in place.precisions():
        place.report.leave_out("P1_bf16", place.why_no_bf16())


async def _one(place: Workplace, precision: str, runtime: str) -> None:
    texts = (await place.corpora()).named("docstrings", place.pick(24, 60, 400))
    rounds = Rounds(place, f"P1 {precision}")
    server = await place.server()
    async with server.arena() as arena, arena.session() as connection, place.ours(SHAPE, runtime) as raw:
        await arena.attach(SHAPE, place.models)
        async with arena.daemon(place.models, RUNTIME=runtime, THREADS=str(place.threads)):
            indexed = await fill_index(connection, place.pick(200, 1_000, 10_000))
            await raw.ask("texts", name="docstrings", texts=texts)
            await rounds.play(
                {
                    "raw": lambda: raw_block(raw, "docstrings"),
                    "pipeline": lambda: pipeline_block(connection, texts),
                },
                place.rounds,
            )
    ratio = rounds.ratio("pipeline", "raw")
    place.report.figure(f"P1_{precision}", ratio["median"])
    place.report.tables[f"pipeline_{precision}"] = {
        "ratio": ratio,
        "runtime": runtime,
        "documents_a_block": len(texts),
        "rows_in_hnsw_index": indexed,
        **rounds.summary(),
    }


async def raw_block(contestant: Contestant, corpus: str) -> dict[str, float]:
    """The model alone, tokenizer included: it is part of the pipeline too."""
    found: dict[str, float] = await contestant.ask("speed", name=corpus)
    return found


async def pipeline_block(connection: asyncpg.Connection, texts: list[str]) -> dict[str, float]:
    """One COPY, timed from its commit to the commit of the last vector; then everything is as it was."""
    await load(connection, texts)
    started = time.perf_counter()
    await drained(connection, seconds=1200, near=NEAR)
    seconds = time.perf_counter() - started
    missing = await connection.fetchval(
        f"SELECT count(*) FROM {TABLE} AS d LEFT JOIN {TABLE}_embeddings AS e USING (id) "
        "WHERE d.id < $1 AND e.id IS NULL",
        FAR,
    )
    assert missing == 0, f"{missing} documents were settled without a vector"
    await connection.execute(f"DELETE FROM {TABLE} WHERE id < $1", FAR)
    for table in (TABLE, f"{TABLE}_embeddings", f"pgmq.q_{TABLE}"):
        await connection.execute(f"VACUUM {table}")
    return {"amount": len(texts), "seconds": seconds}


async def fill_index(connection: asyncpg.Connection, rows: int) -> int:
    """Give the index ``rows`` random vectors of unit length, whose documents nobody enqueues."""
    await connection.execute(f"ALTER TABLE {TABLE} DISABLE TRIGGER USER")
    await connection.execute(
        f"INSERT INTO {TABLE} SELECT $1::bigint + n, 'row ' || n FROM generate_series(1, $2::bigint) AS n", FAR, rows
    )
    await connection.execute(f"ALTER TABLE {TABLE} ENABLE TRIGGER USER")
    await connection.execute(
        f"INSERT INTO {TABLE}_embeddings (id, source_text_hash, embedding, model) "
        "SELECT d.id, md5(d.content), l2_normalize((SELECT array_agg(random() - 0.5) "
        "FROM generate_series(1, p.dimensions) WHERE d.id > 0)::vector), p.model_id "  # named, so that it is drawn anew
        f"FROM {TABLE} AS d, sidecar.pipelines AS p WHERE d.id > $1",
        FAR,
    )
    await connection.execute(f"VACUUM ANALYZE {TABLE}_embeddings")
    return rows
