"""The standard document table, as an application would use it: the demo's writer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from sidecar_daemon.adapters.postgres.pool import Database

_OURS = """
SELECT id, content FROM public.source_documents WHERE metadata ? 'object'
"""
_CHANGE = """
UPDATE public.source_documents AS d SET content = n.content, updated_at = pg_catalog.now()
FROM unnest($1::uuid[], $2::text[]) AS n (id, content) WHERE d.id = n.id
"""
_INSERT = "INSERT INTO public.source_documents (id, content, metadata) VALUES ($1, $2, $3)"
_REMOVE = "DELETE FROM public.source_documents WHERE id = ANY ($1::uuid[])"
_FRESHNESS = """
SELECT 1000 * extract(epoch FROM pg_catalog.pg_xact_commit_timestamp(e.xmin)
    - pg_catalog.pg_xact_commit_timestamp(d.xmin))::float8
FROM public.source_documents AS d JOIN public.document_embeddings AS e ON e.document_id = d.id AND e.chunk_no = 0
WHERE d.id = $1 AND e.source_text_hash = pg_catalog.md5(d.content)
"""
_VECTORS = "SELECT pg_catalog.count(*) FROM public.document_embeddings WHERE document_id = $1"
_OBJECTS = """
SELECT id, metadata ->> 'object' AS object FROM public.source_documents WHERE id = ANY ($1::uuid[])
"""


@dataclass(frozen=True, slots=True)
class StandardDocument:
    """One row of ``public.source_documents``."""

    id: UUID
    content: str
    object: str
    """Goes into the metadata."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load wrote."""

    copied: int
    changed: int
    removed: int


class DocumentTable:
    """Writes documents and looks at their vectors. Needs ``track_commit_timestamp`` for ``freshness``."""

    def __init__(self, database: Database) -> None:
        """Bind a database where ``attach --create`` was run."""
        self._database = database

    async def load(self, documents: Sequence[StandardDocument]) -> Loaded:
        """Make the table hold exactly these documents, beside rows of anyone else: new ones by one COPY."""
        async with self._database.transaction() as connection:
            present = {row["id"]: row["content"] for row in await connection.fetch(_OURS)}
            wanted = {document.id: document for document in documents}
            new = [document for key, document in wanted.items() if key not in present]
            changed = [d for key, d in wanted.items() if key in present and present[key] != d.content]
            gone = [key for key in present if key not in wanted]
            if new:
                await connection.copy_records_to_table(
                    "source_documents",
                    schema_name="public",
                    columns=("id", "content", "metadata"),
                    records=[(d.id, d.content, json.dumps({"object": d.object})) for d in new],
                )
            if changed:
                await connection.execute(_CHANGE, [d.id for d in changed], [d.content for d in changed])
            if gone:
                await connection.execute(_REMOVE, gone)
        return Loaded(len(new), len(changed), len(gone))

    async def edit(self, key: UUID, content: str) -> None:
        """Give a document another text."""
        await self._database.call(_CHANGE, [key], [content])

    async def insert(self, document: StandardDocument) -> None:
        """Insert one document."""
        await self._database.call(
            _INSERT, document.id, document.content, json.dumps({"object": document.object}), retry=False
        )

    async def remove(self, key: UUID) -> None:
        """Delete a document."""
        await self._database.call(_REMOVE, [key])

    async def vectors(self, key: UUID) -> int:
        """How many vectors a document has."""
        return int(await self._database.fetch_value(_VECTORS, key))

    async def freshness(self, key: UUID) -> float | None:
        """Milliseconds from the commit of a document's text to the commit of its vector, both by the database's clock.

        None while the vector is not there or is of an older text.
        """
        found = await self._database.fetch_value(_FRESHNESS, key)
        return None if found is None else float(found)

    async def objects(self, keys: Collection[UUID]) -> dict[UUID, str]:
        """The names in the metadata of documents, by key."""
        return {row["id"]: row["object"] for row in await self._database.call(_OBJECTS, list(keys))}
