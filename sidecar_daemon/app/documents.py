"""The JSON documents that the command line and the endpoints share."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.adapters.postgres.operations import PipelineStatus


def status_document(pipelines: Sequence[PipelineStatus]) -> dict[str, Any]:
    """``{"pipelines": [{"name", …, "queue": {"live": {…}, "bulk": {…}, "dead": n}, "documents", …}]}``."""
    return {
        "pipelines": [
            {
                "name": pipeline.name,
                "source": pipeline.source,
                "embeddings": pipeline.embeddings,
                "model": pipeline.model,
                "enabled": pipeline.enabled,
                "queue": {"live": asdict(pipeline.live), "bulk": asdict(pipeline.bulk), "dead": pipeline.dead},
                "documents": pipeline.documents,
                "embedded": pipeline.embedded,
                "stale": pipeline.stale,
                "missing": pipeline.missing,
                "coverage": pipeline.coverage,
                "index": pipeline.index.value,
            }
            for pipeline in pipelines
        ]
    }
