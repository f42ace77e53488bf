"""A serial port of the system that this daemon replaced: ours, written after the description of how it worked.

What is described, and kept: one model session in the process; a batch of messages is read; its documents are embedded
one at a time, each in a run of its own; each is upserted and its message archived, two statements that commit by
themselves; after every batch there is a pause of 100 ms, also when more is waiting.

What is not described, and chosen in its favour: batches of 10 messages; the session uses all the threads that ours has;
the graph is ours, with pooling and norm inside; connections stay open and statements stay prepared; an empty queue is
looked at again after 10 ms instead of a pause.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.bench.contestants.queue_reader import UPSERT, QueueReader, read, row_of, serve_reader
from tests.bench.server import TABLE

if TYPE_CHECKING:
    import asyncpg

BATCH = 10
PAUSE_SECONDS = 0.1


class SeedPort(QueueReader):
    """One document at a time."""

    async def batch(self, connection: asyncpg.Connection) -> int:
        """Read, embed and write one by one, pause."""
        messages = await read(connection, BATCH)
        for message, key in messages:
            text = await connection.fetchval(f"SELECT content FROM {TABLE} WHERE id = $1", key)
            vector = self.embed([text])[0]
            await connection.execute(UPSERT, *row_of(key, text, vector, "seed-port"))
            await connection.execute("SELECT pgmq.archive($1, $2::bigint)", TABLE, message)
        if messages:
            await asyncio.sleep(PAUSE_SECONDS)
        return len(messages)


if __name__ == "__main__":
    serve_reader(SeedPort)
