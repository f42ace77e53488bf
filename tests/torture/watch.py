"""Looks at the database and the replicas while a fault lasts: I8 (short transactions) and I9 (nothing piles up)."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import asyncpg

from tests.torture.report import Violation

if TYPE_CHECKING:
    from datetime import datetime

    from tests.torture.bench import Arena
    from tests.torture.fleet import Replica

LONGEST_TRANSACTION = 2.0
"""Seconds, beyond what this watch itself came too late to its own turns: on a machine that is busy with other things
a transaction waits for the processor like everybody."""
EVERY = 0.2
"""Seconds between two looks."""
LATELY = 50
"""Looks whose delays count."""
LEAST_SHARE = 0.1
"""Of the looks that fit into the time: with fewer, that nothing was seen means nothing."""
_AWAY = {"08", "53", "57"}
"""Classes of what a server says that is stopped, starts, or is full."""
MOST_CONNECTIONS = 10
"""Of one replica: its pool of eight, its listener, and one that is on its way out."""
MOST_DESCRIPTORS = 128
MOST_THREADS = 64
_LOOK = """
SELECT pid, xact_start, usename, state, wait_event_type = 'Client' AS starved, left(query, 80) AS query,
       extract(epoch FROM clock_timestamp() - xact_start)::float AS seconds
FROM pg_stat_activity WHERE datname = current_database() AND usename LIKE 'torture_daemon%' AND xact_start IS NOT NULL
AND state <> 'idle'  -- an idle backend that takes notifications in is the server's own transaction
"""
_CONNECTIONS = """
SELECT usename, count(*) FROM pg_stat_activity
WHERE datname = current_database() AND usename LIKE 'torture_daemon%' GROUP BY 1 HAVING count(*) > $1
"""


class Watch:
    """Samples one arena until stopped."""

    def __init__(self, arena: Arena, *, stalled: bool = False) -> None:
        """Bind an arena.

        Args:
            arena: looked at five times a second.
            stalled: the fault itself keeps replicas or the wire from answering: a backend that waits for
                its client then waits for what the torture holds back, and does not count.
        """
        self._arena = arena
        self._stalled = stalled
        self._overlong: dict[tuple[int, datetime], Violation] = {}
        """By backend and start of the transaction, as it was last seen: one violation a transaction, at its longest."""
        self._late: deque[float] = deque(maxlen=LATELY)
        self.longest = 0.0
        """Seconds of the longest transaction of ours that was seen, at the age that it had then."""
        self.looks = 0
        """That were answered."""
        self.wanted = 0
        """That were tried or would have fitted into the time."""
        self.seen = 0
        """Transactions of ours, each as often as it was seen."""
        self._due = math.inf

    def late(self) -> float:
        """Seconds by which this process lately came too late to a look, the one under way included."""
        return max(0.0, time.monotonic() - self._due, *self._late)

    @property
    def violations(self) -> list[Violation]:
        """One a transaction that lasted too long."""
        return list(self._overlong.values())

    async def run(self, stop: asyncio.Event) -> None:
        """Sample until told to stop; a server that is away is nothing to see."""
        connection: asyncpg.Connection | None = None
        started = time.monotonic()
        while not stop.is_set():
            began = time.monotonic()
            self._due = began + EVERY
            self.wanted = int((began - started) / EVERY)
            try:
                connection = connection or await self._arena.connect()
                for row in await connection.fetch(_LOOK, timeout=5):
                    self._judge(row)
                self.looks += 1
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                if isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "")[:2] not in _AWAY:
                    raise  # the look itself is wrong
                if connection is not None:
                    connection.terminate()
                connection = None
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY):
                    await stop.wait()
            self._late.append(time.monotonic() - began - EVERY)
        if connection is not None:
            await connection.close()

    def _judge(self, row: asyncpg.Record) -> None:
        if self._stalled and row["starved"]:
            return
        self.seen += 1
        self.longest = max(self.longest, row["seconds"])
        if row["seconds"] > LONGEST_TRANSACTION + self.late():
            message = f"{row['usename']} is {row['state']} for {row['seconds']:.1f} s in: {row['query']}"
            self._overlong[row["pid"], row["xact_start"]] = Violation("I8", message)


async def piled_up(arena: Arena, replicas: list[Replica]) -> list[Violation]:
    """I9 at the end of a fault: connections, descriptors and threads are as few as at the start."""
    async with arena.session() as connection:
        rows = await connection.fetch(_CONNECTIONS, MOST_CONNECTIONS)
    found = [Violation("I9", f"{row['usename']} has {row['count']} connections") for row in rows]
    for replica in replicas:
        if replica.alive:
            has = replica.resources()
            if has["descriptors"] > MOST_DESCRIPTORS or has["threads"] > MOST_THREADS:
                found.append(Violation("I9", f"replica {replica.slot} holds {has}"))
    return found
