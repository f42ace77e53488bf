"""Freshness by the database's own clock: from the commit of a writer's text to the commit of its vector."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tests.bench.arithmetic import quantile
from tests.bench.server import TABLE

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import asyncpg

_FRESH = f"""
SELECT d.id,
    1000 * extract(epoch FROM pg_xact_commit_timestamp(e.xmin) - pg_xact_commit_timestamp(d.xmin))::float8 AS ms
FROM {TABLE} AS d JOIN {TABLE}_embeddings AS e ON e.id = d.id AND e.chunk_no = 0
WHERE d.id = ANY ($1::bigint[]) AND e.source_text_hash = md5(d.content)
"""


async def edit(connection: asyncpg.Connection, key: int, text: str) -> None:
    """Give a document another text, in a transaction of its own."""
    await connection.execute(f"UPDATE {TABLE} SET content = $2 WHERE id = $1", key, text)


async def freshness(connection: asyncpg.Connection, keys: Collection[int]) -> dict[int, float]:
    """Milliseconds of those documents that have the vector of their current text. A look by key; it disturbs nobody."""
    return {row["id"]: row["ms"] for row in await connection.fetch(_FRESH, list(keys))}


async def wait_until_fresh(
    connection: asyncpg.Connection, key: int, *, seconds: float = 60.0, every: float = 0.02
) -> float:
    """Milliseconds of one document, once its vector is there. Raises ``TimeoutError``."""
    deadline = time.monotonic() + seconds
    while True:
        found = await freshness(connection, [key])
        if key in found:
            return found[key]
        if time.monotonic() > deadline:
            raise TimeoutError(f"document {key} has no current vector after {seconds:.0f} s")
        await asyncio.sleep(every)


def described(milliseconds: Sequence[float]) -> dict[str, float]:
    """Quantiles."""
    return {
        "count": len(milliseconds),
        **{f"p{round(100 * share)}": round(quantile(milliseconds, share), 2) for share in (0.1, 0.5, 0.9, 0.99)},
        "max": round(max(milliseconds), 2),
    }
