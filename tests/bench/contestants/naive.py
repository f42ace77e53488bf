"""What one would write in an afternoon: read 32, embed them at once, ``executemany``, archive. No pause, no guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.bench.contestants.queue_reader import UPSERT, QueueReader, read, row_of, serve_reader
from tests.bench.server import TABLE

if TYPE_CHECKING:
    import asyncpg

BATCH = 32


class Naive(QueueReader):
    """Batches of 32 in the order of the queue, padded to the longest."""

    async def batch(self, connection: asyncpg.Connection) -> int:
        """Read, embed, write, archive."""
        messages = dict(await read(connection, BATCH))
        if not messages:
            return 0
        rows = await connection.fetch(
            f"SELECT id, content FROM {TABLE} WHERE id = ANY ($1::bigint[])", list(messages.values())
        )
        vectors = self.embed([row["content"] for row in rows])
        written = [
            row_of(row["id"], row["content"], vector, "naive") for row, vector in zip(rows, vectors, strict=True)
        ]
        await connection.executemany(UPSERT, written)
        await connection.execute("SELECT pgmq.archive($1, $2::bigint[])", TABLE, list(messages))
        return len(messages)


if __name__ == "__main__":
    serve_reader(Naive)
