"""The end state against the promises: I1 to I7 from the database, I9 and I10 from the replicas (I8: ``watch``)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from sidecar_daemon.domain.windows import combine_windows
from tests.torture.bench import CANARY, PASSWORD, SOURCE
from tests.torture.embedder import REFERENCE
from tests.torture.report import Kind, Violation
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import asyncpg

    from sidecar_daemon.ports import Embedder
    from tests.torture.bench import Arena
    from tests.torture.client import Client
    from tests.torture.fleet import Replica

QUIESCE_SECONDS = 90.0
MOST_HISTORIES = 20
"""Violations that are told with their history; where everything is broken, more of them help nobody."""
TOLERANCE = 1e-5
"""Of a vector's components: a real model's rows differ by less than this between one batch and another."""
LARGEST = 1_000_000
"""Bytes of a document beyond which the checker does not fetch it: it must be dead."""
Rows = dict[int, tuple[str | None, "np.ndarray[Any, np.dtype[np.float32]]"]]
"""By chunk number: the text and the vector, float32 of shape ``(dimensions,)``."""


def expected_rows(text: str, policy: str, embedder: Embedder = REFERENCE) -> Rows:
    """What the sidecar table must hold for a text: computed here anew, from the text alone."""
    if not text.replace("\ufeff", "").strip():  # nothing but white space, which a byte order mark is as well
        return {}
    windows = embedder.tokenize(text)
    vectors = embedder.embed([window.ids for window in windows])
    if policy == "mean":
        return {0: (text, combine_windows(vectors, [window.content_tokens for window in windows]))}
    kept = windows[:1] if policy == "truncate" else windows
    return {n: (text[w.start : w.end], vectors[n]) for n, w in enumerate(kept)}


class Checker:
    """Checks one arena after its fault."""

    def __init__(
        self,
        arena: Arena,
        client: Client | None = None,
        *,
        poison: Mapping[str, str] | None = None,
        maybe: Collection[str] = (),
    ) -> None:
        """Bind an arena.

        Args:
            arena: to check.
            client: whose log goes into histories.
            poison: the planted dead letters, key to reason (empty: any reason).
            maybe: keys that may be dead or not.
        """
        self._maybe = frozenset(maybe)
        self._arena = arena
        self._client = client
        self._poison = dict(poison or {})

    async def quiesce(self, seconds: float = QUIESCE_SECONDS) -> list[Violation]:
        """Wait until the lanes are empty (I4), for as long as they get emptier at least every ``seconds``."""
        async with self._arena.session() as connection:
            before = None
            while (depth := await self._depths(connection)) and (before is None or depth < before):
                before = depth
                with suppress(AssertionError):
                    await eventually(lambda: self._empty(connection), seconds, what="empty queues")
            return await self._leftovers(connection, seconds) if depth else []

    async def _empty(self, connection: asyncpg.Connection) -> bool:
        return await self._depths(connection) == 0

    async def _depths(self, connection: asyncpg.Connection) -> int:
        return sum([await self._depth(connection, name) for name in self._arena.pipelines])

    async def everything(self) -> list[Violation]:
        """Quiesce, check, sweep, check again."""
        found = await self.quiesce()
        async with self._arena.session() as connection:
            found += await self.database(connection)
            for name in self._arena.pipelines:
                await connection.execute("SELECT sidecar.request_sweep($1, true)", name)

            async def swept() -> bool:
                question = "SELECT bool_and(finished_at IS NOT NULL) FROM sidecar.sweeps"
                return bool(await connection.fetchval(question))

            try:
                await eventually(swept, 30.0, what="the end of the sweep")
            except AssertionError as error:
                found.append(Violation("I4", str(error)))
            healed = await connection.fetch("SELECT * FROM sidecar.sweeps WHERE enqueued > 0")
        found += [Violation("I1", f"the sweep had to heal: {dict(row)}", Kind.LOST) for row in healed]
        if healed:
            found += await self.quiesce()
            async with self._arena.session() as connection:
                found += await self.database(connection)
        return found

    async def database(self, connection: asyncpg.Connection) -> list[Violation]:
        """I1, I2, I3, I5, I6 and I7, with the history of each document concerned."""
        found: list[Violation] = []
        for name, policy in self._arena.pipelines.items():
            found += await self._truth(connection, name, policy)
            found += await self._messages(connection, name)
            found += await self._regressions(connection, name)
        told = [await self._with_history(connection, violation) for violation in found[:MOST_HISTORIES]]
        return told + found[MOST_HISTORIES:]

    async def _truth(self, connection: asyncpg.Connection, name: str, policy: str) -> list[Violation]:
        found: list[Violation] = []
        rows = await connection.fetch(
            f"SELECT id::text AS key, CASE WHEN octet_length(content) <= $1 THEN content END AS content FROM {SOURCE}",
            LARGEST,
        )
        source = {row["key"]: row["content"] for row in rows}
        dead = await connection.fetch(
            "SELECT d.*, md5(s.content) AS current FROM sidecar.list_dead_letters($1) AS d "
            f"LEFT JOIN {SOURCE} AS s ON s.id::text = d.document_id",
            name,
        )
        excused = {row["document_id"] for row in dead if row["content_hash"] == row["current"]}
        stored: dict[str, Rows] = {}
        for row in await connection.fetch(
            f"SELECT id::text, chunk_no, source_text, embedding::real[] AS vector, count(*) AS rows "
            f"FROM {name}_vectors GROUP BY 1, 2, 3, 4"
        ):
            key, chunk = row["id"], row["chunk_no"]
            if row["rows"] > 1 or chunk in stored.get(key, {}):
                found.append(Violation("I3", f"{name}: two rows for {key}/{chunk}", Kind.DUPLICATE, key))
            stored.setdefault(key, {})[chunk] = (row["source_text"], np.array(row["vector"], dtype=np.float32))
        found += [
            Violation("I2", f"{name}: vectors without document {key}", Kind.ORPHAN, key)
            for key in stored.keys() - source.keys()
        ]
        for key, text in source.items():
            vectors = stored.get(key, {})
            if key in excused and not vectors:
                continue  # a dead letter says why; where there are vectors nevertheless, they must be true
            if text is None:
                found.append(Violation("I6", f"{name}: document {key} is too large and not dead", Kind.LOST, key))
                continue
            found += _compare(name, key, expected_rows(text, policy, self._arena.embedder), vectors)
        found += self._dead_letters(name, dead, source)
        return found

    def _dead_letters(self, name: str, dead: Iterable[asyncpg.Record], source: Collection[str]) -> list[Violation]:
        """I6: exactly the planted poison, no other."""
        found = []
        seen: dict[str, str] = {}
        for row in dead:
            key = row["document_id"]
            seen[key] = row["reason"]
            if key in self._maybe:
                continue
            if key not in self._poison:
                message = f"{name}: innocent document {key} is dead: {row['reason']}: {row['detail']}"
                found.append(Violation("I6", message, Kind.INNOCENT, key))
            elif self._poison[key] not in ("", row["reason"]):
                message = f"{name}: document {key} is dead of {row['reason']}, expected {self._poison[key]}"
                found.append(Violation("I6", message, key=key))
        found += [
            Violation("I6", f"{name}: poison {key} is not in the dead letters", Kind.LOST, key)
            for key in self._poison
            if key not in seen and key in source
        ]
        return found

    async def _messages(self, connection: asyncpg.Connection, name: str) -> list[Violation]:
        """I5: every message that was ever sent left its lane exactly once."""
        rows = await connection.fetch(
            "SELECT queue, msg_id, max(key) AS key, count(*) FILTER (WHERE op = 'INSERT') AS sent, "
            "count(*) FILTER (WHERE op = 'DELETE') AS ended FROM audit.messages WHERE queue IN ($1, $2) "
            "GROUP BY 1, 2 HAVING count(*) FILTER (WHERE op = 'INSERT') <> 1 "
            "OR count(*) FILTER (WHERE op = 'DELETE') <> 1",
            *(f"q_{name}", f"q_{name}_bulk"),
        )
        return [
            Violation(
                "I5", f"{r['queue']}/{r['msg_id']} sent {r['sent']} times, ended {r['ended']} times", key=r["key"]
            )
            for r in rows
        ]

    async def _regressions(self, connection: asyncpg.Connection, name: str) -> list[Violation]:
        """I7, stricter than asked: no write of an older version ever follows a write of a newer one.

        Not of a document whose text returned to an earlier value: its writes do so as well, and I1 tells the last one.
        """
        rows = await connection.fetch(
            "WITH v AS (SELECT key, hash, max(seq) AS version FROM audit.versions WHERE hash IS NOT NULL "
            "GROUP BY 1, 2), "
            "w AS (SELECT w.key, w.seq, v.version, lag(v.version) OVER (PARTITION BY w.key, w.chunk_no ORDER BY w.seq) "
            "AS before FROM audit.writes AS w JOIN v USING (key, hash) WHERE w.pipeline = $1 AND w.op <> 'DELETE') "
            "SELECT key, min(seq) AS seq FROM w WHERE version < before AND key NOT IN "
            "(SELECT key FROM audit.versions WHERE hash IS NOT NULL GROUP BY key, hash HAVING count(*) > 1) GROUP BY 1",
            name,
        )
        return [
            Violation("I7", f"{name}: document {r['key']} went back at write {r['seq']}", Kind.STALE, r["key"])
            for r in rows
        ]

    async def _depth(self, connection: asyncpg.Connection, name: str) -> int:
        question = f"SELECT (SELECT count(*) FROM pgmq.q_{name}) + (SELECT count(*) FROM pgmq.q_{name}_bulk)"
        return int(await connection.fetchval(question))

    async def _leftovers(self, connection: asyncpg.Connection, seconds: float) -> list[Violation]:
        question = "msg_id, read_ct, extract(epoch FROM vt - clock_timestamp())::int AS hidden, message::text"
        return [
            Violation("I4", f"{table} not empty after {seconds} s: {dict(row)}", Kind.LOST)
            for name in self._arena.pipelines
            for table in (f"q_{name}", f"q_{name}_bulk")
            for row in await connection.fetch(f"SELECT {question} FROM pgmq.{table} ORDER BY msg_id LIMIT 3")
        ]

    async def _with_history(self, connection: asyncpg.Connection, violation: Violation) -> Violation:
        key = violation.key
        if key is None or not key.isdigit():
            return violation
        asked = self._client.history(int(key)) if self._client else []
        rows = await connection.fetch(
            "SELECT at, line FROM ("
            "SELECT at, seq, format('source %s hash %s tx %s', op, hash, txid) AS line "
            "FROM audit.versions WHERE key = $1 UNION ALL "
            "SELECT at, seq, format('vector %s %s chunk %s hash %s tx %s', op, pipeline, chunk_no, hash, txid) "
            "FROM audit.writes WHERE key = $1 "
            "UNION ALL SELECT at, seq, format('message %s %s/%s read %s tx %s', op, queue, msg_id, read_ct, txid) "
            "FROM audit.messages WHERE key = $1) AS h ORDER BY at DESC, seq DESC LIMIT 60",
            key,
        )
        seen = [f"{row['at']:%H:%M:%S.%f} {row['line']}" for row in reversed(rows)]
        return Violation(
            violation.check, violation.message, violation.kind, key, (f"seed {self._arena.seed}", *asked[-20:], *seen)
        )


def _compare(name: str, key: str, wanted: Rows, rows: Rows) -> list[Violation]:
    """I1 for one document: exactly its chunks, each with the vector of its current text."""
    found = [
        Violation("I1", f"{name}: document {key} lacks chunk {n} of {len(wanted)}", Kind.LOST, key)
        for n in sorted(wanted.keys() - rows.keys())[:1]
    ]
    for n, (text, vector) in rows.items():
        if n not in wanted:
            found.append(Violation("I1", f"{name}: document {key} has surplus chunk {n}", Kind.STALE, key))
        elif wanted[n][0] != text or not np.allclose(wanted[n][1], vector, atol=TOLERANCE):
            found.append(Violation("I1", f"{name}: document {key} chunk {n} is of another text", Kind.STALE, key))
    return found


def leaks(replicas: Iterable[Replica]) -> list[Violation]:
    """I10: no document text, no password and no connection string in any log line or metric."""
    found = []
    for replica in replicas:
        for where, text in [("log", replica.log()), *(("endpoint", scraped) for scraped in replica.scraped)]:
            for secret in (CANARY, PASSWORD, "postgresql://", "postgres://"):
                if secret in text:
                    line = next(line for line in text.splitlines() if secret in line)
                    found.append(Violation("I10", f"{secret!r} in the {where} of replica {replica.slot}: {line[:300]}"))
    return found
