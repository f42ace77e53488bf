"""What the trigger costs a writer: the same COPY, and the same single inserts, with and without it.

``python -m tests.bench.enqueue [--rows N] [--rounds N] [--words N]`` starts a server of its own with room for its
working set, interleaves the two (with, without, without, with) so that drift of the machine falls on
both alike, and prints one JSON object: every COPY's seconds, and the ratio of the
two medians. ``python -m tests.bench --only P11`` measures the same, and single inserts, as one figure among others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import asyncpg

from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
from sidecar_daemon.adapters.postgres.migrate import migrate
from sidecar_daemon.adapters.postgres.pool import Database
from sidecar_daemon.settings import installed_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

LIMIT = 1.2
SERVER = {"shared_buffers": "512MB", "max_wal_size": "8GB", "autovacuum": "off"}
"""Durable, but without checkpoints and vacuums that would fall on one COPY by chance."""
VOCABULARY = 20_000


def documents(rows: int, words: int) -> list[tuple[str]]:
    """Texts of about ``words`` words out of a vocabulary as wide as a real one, the same in every run."""
    rng = random.Random(8)  # noqa: S311  texts, no secrets
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 11))) for _ in range(VOCABULARY)]
    return [(" ".join(rng.choices(vocabulary, k=max(1, round(rng.gauss(words, words / 4))))),) for _ in range(rows)]


@contextmanager
def writers_server() -> Iterator[EmbeddedServer]:
    """A server with room for the working set."""
    with (
        TemporaryDirectory(prefix="sc", dir="/tmp", ignore_cleanup_errors=True) as folder,
        EmbeddedServer(Path(folder) / "pg", settings=SERVER) as server,
    ):
        yield server


@asynccontextmanager
async def writer(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database with the standard document table, attached."""
    database = await Database.open(url)
    await migrate(database, installed_folder("sql"))
    await database.close()
    connection = await asyncpg.connect(url, command_timeout=600)
    try:
        await connection.execute("SELECT sidecar.create_source_documents()")
        await connection.execute("SELECT sidecar.attach('source_documents', ARRAY['content'])")
        yield connection
    finally:
        await connection.close()


async def _empty(connection: asyncpg.Connection, *, trigger: bool) -> None:
    """Empty table and queue, and switch the trigger."""
    await connection.execute("TRUNCATE source_documents CASCADE")
    await connection.execute("TRUNCATE pgmq.q_source_documents")
    await connection.execute(f"ALTER TABLE source_documents {'ENABLE' if trigger else 'DISABLE'} TRIGGER USER")
    await connection.execute("CHECKPOINT")


async def _check_sent(connection: asyncpg.Connection, expected: int) -> None:
    sent = await connection.fetchval("SELECT count(*) FROM pgmq.q_source_documents")
    if sent != expected:
        raise SystemExit(f"{sent} messages were sent, {expected} expected")


async def copy_once(connection: asyncpg.Connection, rows: list[tuple[str]], *, trigger: bool) -> float:
    """Seconds of one COPY into the emptied table."""
    await _empty(connection, trigger=trigger)
    started = time.perf_counter()
    await connection.copy_records_to_table("source_documents", records=rows, columns=["content"])
    seconds = time.perf_counter() - started
    await _check_sent(connection, len(rows) if trigger else 0)
    return seconds


async def insert_each(connection: asyncpg.Connection, rows: list[tuple[str]], *, trigger: bool) -> list[float]:
    """Seconds of every single-row insert into the emptied table, each committed by itself."""
    await _empty(connection, trigger=trigger)
    insert = await connection.prepare("INSERT INTO source_documents (content) VALUES ($1)")
    found = []
    for row in rows:
        started = time.perf_counter()
        await insert.fetch(*row)
        found.append(time.perf_counter() - started)
    await _check_sent(connection, len(rows) if trigger else 0)
    return found


async def measure(url: str, rows: list[tuple[str]], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of every COPY, with the trigger and without it."""
    timed: dict[bool, list[float]] = {True: [], False: []}
    async with writer(url) as connection:
        await copy_once(connection, rows, trigger=True)  # warms caches, grows files; not counted
        for _ in range(rounds):
            for trigger in (True, False, False, True):
                timed[trigger].append(await copy_once(connection, rows, trigger=trigger))
    return timed[True], timed[False]


def main() -> int:
    """Measure, print, and return 1 where the trigger costs more than it may."""
    parser = argparse.ArgumentParser(description="cost of the enqueueing trigger for one COPY")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=60)
    asked = parser.parse_args()
    with writers_server() as server:
        rows = documents(asked.rows, asked.words)
        with_trigger, without = asyncio.run(measure(server.dsn(), rows, asked.rounds))
    slow, fast = statistics.median(with_trigger), statistics.median(without)
    report = {
        "all_with": [round(seconds, 3) for seconds in with_trigger],
        "all_without": [round(seconds, 3) for seconds in without],
        "rows": asked.rows,
        "rounds": asked.rounds,
        "words": asked.words,
        "seconds_with": round(slow, 3),
        "seconds_without": round(fast, 3),
        "ratio": round(slow / fast, 3),
        "limit": LIMIT,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return int(slow / fast > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
