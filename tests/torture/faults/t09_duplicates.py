"""T9: a hundred messages for each of two hundred documents: each version is embedded once, by one replica."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.torture.bench import CANARY, CHUNKS, SOURCE
from tests.torture.stage import stage
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport
    from tests.torture.stage import Stage

DOCUMENTS, DUPLICATES = 200, 100
MOST = 1.05
"""Embeddings a document version."""
_EMBEDDED = re.compile(r"^sidecar_batch_documents_sum\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
_SHUFFLED = f"""
INSERT INTO pgmq.q_{CHUNKS} (vt, message)
SELECT clock_timestamp(), jsonb_build_object('document_id', id::text, 'action', 'update')
FROM {SOURCE} CROSS JOIN generate_series(1, {DUPLICATES - 1}) AS n WHERE id <= {DOCUMENTS}
ORDER BY md5(id::text || n || $1)
"""


async def run(bench: Bench, replicas: int) -> FaultReport:
    """``replicas`` of them. One statement writes all documents and their duplicates, shuffled."""
    async with stage(bench, "t9", replicas=replicas, rate=0, documents=DOCUMENTS, start=False) as on:
        # One window a document, so that runs of the model can be counted as embeddings of versions.
        async with on.arena.session() as connection:
            await connection.execute(f"UPDATE {SOURCE} SET content = '{CANARY} first ' || id")
            await on.fleet.start()
            await eventually(lambda: _empty(on), 60, what="the first documents")
            before = await _embedded(on)
            async with connection.transaction():
                await connection.execute(f"UPDATE {SOURCE} SET content = '{CANARY} second ' || id")
                await connection.execute(_SHUFFLED, str(on.arena.seed))
            await eventually(lambda: _empty(on), 120, what="all duplicates")
        share = (await _embedded(on) - before) / DOCUMENTS
        on.report.injected = replicas
        on.report.facts |= {"embeddings_per_version": round(share, 3), "messages": DOCUMENTS * DUPLICATES}
        on.report.claim(1.0 <= share <= MOST, "T9", f"{share:.3f} embeddings a version; at most {MOST} are allowed")
    return on.report


async def _embedded(on: Stage) -> float:
    """Documents that went through the model so far, in all replicas."""
    texts = [await replica.metrics() for replica in on.fleet.replicas]
    return sum(float(number) for text in texts for number in _EMBEDDED.findall(text))


async def _empty(on: Stage) -> bool:
    async with on.arena.session() as connection:
        return not await connection.fetchval(f"SELECT EXISTS (SELECT FROM pgmq.q_{CHUNKS})")
