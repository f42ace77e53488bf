"""Facts about one document, as ``sidecar.explain_document`` tells them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sidecar_daemon.domain.tracing import (
    ContentFacts,
    DeadLetterFacts,
    DocumentFacts,
    MessageFacts,
    SweepFacts,
    TriggerFacts,
    VectorFacts,
)

if TYPE_CHECKING:
    from sidecar_daemon.adapters.postgres.pool import Database


async def document_facts(database: Database, pipeline: str, key: str) -> DocumentFacts:
    """What the database knows about one document.

    Args:
        database: any that has our schema.
        pipeline: its name.
        key: in any spelling that the key's type reads.

    Raises:
        Refused: the pipeline does not exist.
        Fatal: ``rejected``, the key is no value of the key's type.
    """
    (row,) = await database.call("SELECT * FROM sidecar.explain_document($1, $2)", pipeline, key)
    found: dict[str, Any] = {
        name: json.loads(row[name]) if row[name] is not None else None
        for name in ("document", "vector", "messages", "dead_letter", "triggers", "sweep")
    }
    return DocumentFacts(
        pipeline=pipeline,
        key=row["key"],
        source=row["source"],
        model=row["model"],
        model_id=row["model_id"],
        enabled=row["enabled"],
        document=found["document"] and ContentFacts(**found["document"]),
        vector=found["vector"] and VectorFacts(**found["vector"]),
        messages=tuple(MessageFacts(**each) for each in found["messages"]),
        dead_letter=found["dead_letter"] and DeadLetterFacts(**found["dead_letter"]),
        triggers=TriggerFacts(**found["triggers"]),
        sweep=SweepFacts(**found["sweep"]),
    )
