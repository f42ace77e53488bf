"""T7: every poisonous text of R19 and R25, and foreign messages, in one batch with innocent documents."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import asyncpg

from tests.torture.bench import CANARY, CHUNKS, SOURCE
from tests.torture.embedder import MAKES_NAN, MAKES_ZERO, RAISES, SHOUTS
from tests.torture.stage import stage
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport
    from tests.torture.stage import Stage

_KEY = 3_000_000
MOST_LEASES = 1
"""Of an innocent batch mate: what fails together is tried apart at once, under the same lease."""
LONGEST_DETAIL = 2048
"""Bytes that a dead letter's detail may have."""
POISON = {
    f"{CANARY} {RAISES}": "inference_failed",
    f"{CANARY} {SHOUTS}": "inference_failed",
    f"{CANARY} {MAKES_NAN}": "bad_vector",
    f"{CANARY} {MAKES_ZERO}": "bad_vector",
    "w" * 1_000_000: "too_large",
}
"""Texts that must die, and of what."""
STRANGE = (
    "\u200b\u200c\u200d",
    "\ufeff",
    "\u202e\u05d0\u05d1 \u0627\u0644\u0633\u0644\u0627\u0645 \u202c",
    "e" + "\u0301" * 500,
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 " * 50,
    "v" * 90_000,
    "\x01\x02\x1b[31m\x7f",
    "'; DROP TABLE documents; -- $1 %s {0}",
)
"""Texts that must live, however they look."""
REFUSED = ("nul \x00 inside", "half \ud800 a pair")
"""Texts that Postgres itself keeps out: no writer can plant them."""
FOREIGN = (
    "{}",
    "[]",
    '"text"',
    "7",
    '{"document_id": {"a": 1}}',
    '{"document_id": "no number"}',
    '{"document_id": null}',
)
"""Messages that name no document: dead letters of reason ``malformed``."""


async def run(bench: Bench, times: int) -> FaultReport:
    """One statement inserts all of them among innocents; a second batch brings the foreign messages."""
    async with stage(bench, "t7", replicas=1, rate=10) as on, on.arena.session() as connection:
        for n in range(times):
            innocents = await _plant(on, connection, n)
            await connection.execute(
                f"INSERT INTO pgmq.q_{CHUNKS} (vt, message) SELECT clock_timestamp(), m FROM unnest($1::jsonb[]) AS m",
                [*FOREIGN, json.dumps({"document_id": str(_KEY * 9)})],
            )
            on.report.injected += 1
            await _until_settled(on, connection, len(FOREIGN) * (n + 1))
            await _judge(on, connection, innocents)
        on.poison |= await _names_of_foreign(connection)
    return on.report


async def _plant(on: Stage, connection: asyncpg.Connection, n: int) -> list[int]:
    """Everything in one statement, poison between innocents. Returns the keys of the innocents."""
    texts: list[str] = []
    innocents: list[int] = []
    first = _KEY + n * 1000
    for text, reason in POISON.items():
        innocents += [first + len(texts) + i for i in range(3)]
        texts += [f"{CANARY} mate {n} {i} of {reason}" for i in range(3)]
        on.poison[str(first + len(texts))] = reason
        texts.append(f"{text} {n}")
    innocents += range(first + len(texts), first + len(texts) + len(STRANGE))
    texts += STRANGE
    statement = f"INSERT INTO {SOURCE} SELECT * FROM unnest($1::bigint[], $2::text[])"
    await connection.execute(statement, list(range(first, first + len(texts))), texts)
    # 100 MB, made by the server itself; nobody may ever fetch them.
    huge = first + len(texts)
    on.poison[str(huge)] = "too_large"
    await connection.execute(f"INSERT INTO {SOURCE} VALUES ($1, repeat('x', 100 * 1024 * 1024))", huge)
    for text in REFUSED:
        try:
            await connection.execute(statement, [first + 999], [text])
        except (asyncpg.PostgresError, UnicodeEncodeError):
            continue
        on.report.claim(False, "T7", "Postgres took a text that it must refuse")
    return innocents


async def _until_settled(on: Stage, connection: asyncpg.Connection, foreign: int) -> None:
    wanted = {key for key in on.poison if key.isdigit()}

    async def dead() -> bool:
        rows = await connection.fetch(
            f"SELECT message ->> 'document_id' AS key, message ->> 'reason' AS reason FROM pgmq.q_{CHUNKS}_dlq"
        )
        malformed = sum(row["reason"] == "malformed" for row in rows)
        assert malformed == foreign, f"{malformed} of {foreign} foreign messages are dead"
        missing = wanted - {row["key"] for row in rows}
        assert not missing, f"poison not dead yet: { {key: on.poison[key] for key in missing} }"
        return True

    await eventually(dead, 60, what="all poison in the dead letters")


async def _judge(on: Stage, connection: asyncpg.Connection, innocents: list[int]) -> None:
    rows = await connection.fetch(
        "SELECT key, max(read_ct) AS leases FROM audit.messages WHERE queue = $1 AND key = ANY ($2) GROUP BY 1 "
        "HAVING max(read_ct) > $3",
        *(f"q_{CHUNKS}", [str(key) for key in innocents], MOST_LEASES),
    )
    for row in rows:
        on.report.claim(False, "T7", f"innocent {row['key']} was leased {row['leases']} times for its neighbours")
    for row in await connection.fetch(f"SELECT msg_id, message ->> 'detail' AS detail FROM pgmq.q_{CHUNKS}_dlq"):
        detail = row["detail"] or ""
        clean = len(detail.encode()) <= LONGEST_DETAIL and CANARY not in detail and detail.isprintable()
        on.report.claim(
            clean, "T7", f"the detail of dead letter {row['msg_id']} is too long, quotes text or is not clean"
        )


async def _names_of_foreign(connection: asyncpg.Connection) -> dict[str, str]:
    """What the foreign messages are called in the dead letters."""
    rows = await connection.fetch(
        f"SELECT message ->> 'document_id' AS key FROM pgmq.q_{CHUNKS}_dlq WHERE message ->> 'reason' = 'malformed'"
    )
    return {row["key"]: "malformed" for row in rows}
