"""Attaching tables without a daemon: calls, refusals, and what lies in the queues."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest


async def attach(connection: asyncpg.Connection, source: str = "notes", *content: str, **options: Any) -> str:
    """Attach a table to model ``tiny``; say what that changed."""
    named = {"model": "tiny", "dimensions": 32, "index": False, **options}
    arguments = "".join(f", p_{name} => ${n}" for n, name in enumerate(named, start=3))
    return str(
        await connection.fetchval(
            f"SELECT sidecar.attach($1::text::regclass, $2{arguments})",
            source,
            list(content) or ["body"],
            *named.values(),
        )
    )


async def refusal(connection: asyncpg.Connection, source: str = "notes", *content: str, **options: Any) -> str:
    """The one line with which an attachment is refused; nothing of it may be left."""
    before = await connection.fetchval("SELECT count(*) FROM pg_class")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await attach(connection, source, *content, **options)
    assert getattr(caught.value, "sqlstate", None) == "SC010"
    assert await connection.fetchval("SELECT count(*) FROM pg_class") == before
    message = str(caught.value)
    assert "\n" not in message
    return message


async def queued(connection: asyncpg.Connection, queue: str = "notes_bulk") -> list[tuple[str, str]]:
    """Document and action of every message, by document."""
    rows = await connection.fetch(
        f"SELECT message ->> 'document_id' AS key, message ->> 'action' AS action FROM pgmq.q_{queue} ORDER BY 1"
    )
    return [(row["key"], row["action"]) for row in rows]


async def sweep(connection: asyncpg.Connection, name: str = "notes") -> str:
    """Walk one window; say how that ended."""
    return str(await connection.fetchval("SELECT state FROM sidecar.sweep($1)", name))
