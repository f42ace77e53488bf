"""One pipeline's messages and documents: the ``Queue`` and ``Catalog`` ports on ``sidecar.*`` functions."""

from __future__ import annotations

import itertools
import uuid
from typing import TYPE_CHECKING

from pgvector import Vector

from sidecar_daemon.adapters.postgres.indexing import indexes
from sidecar_daemon.domain.indexing import IndexState
from sidecar_daemon.domain.messages import (
    ContentHash,
    DocumentKey,
    Lane,
    LaneDepth,
    Lease,
    LongDocuments,
    MessageId,
    ModelId,
    Observation,
    Pipeline,
    PipelineName,
    PipelineObservation,
    Reading,
    Settled,
    SweepWindow,
)
from sidecar_daemon.domain.outcomes import Outcome, Verdict

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import asyncpg

    from sidecar_daemon.adapters.postgres.indexing import IndexStatus
    from sidecar_daemon.adapters.postgres.pool import Database
    from sidecar_daemon.domain.messages import Settlement

READ_BUDGET_BYTES = 16 * 1024 * 1024
"""How much text one read may bring at most, beyond its first document."""


class PostgresQueue:
    """The messages and documents of one pipeline, for one model id."""

    def __init__(
        self, database: Database, pipeline: PipelineName, model_id: ModelId, *, max_document_bytes: int
    ) -> None:
        """Bind a pipeline and the id of the model whose vectors will be written."""
        self._database = database
        self._pipeline = pipeline
        self._model_id = model_id
        self._max_document_bytes = max_document_bytes
        self._claimant = uuid.uuid4().hex

    async def lease(self, lane: Lane, *, seconds: float, limit: int) -> list[Lease]:
        """See ``ports.Queue.lease``. A repeated call leases again: what an unanswered one took expires."""
        rows = await self._database.call(
            "SELECT * FROM sidecar.lease($1, $2, $3, $4, $5)",
            *(self._pipeline, self._model_id, lane.value, round(seconds), limit),
        )
        return [
            Lease(
                lane=lane,
                msg_id=MessageId(row["msg_id"]),
                read_ct=row["read_ct"],
                attempt=row["attempt"],
                key=None if row["key"] is None else DocumentKey(row["key"]),
                age_seconds=row["age_seconds"],
                last_error=row["last_error"],
            )
            for row in rows
        ]

    async def read(self, keys: Collection[DocumentKey], *, claim_seconds: float | None = None) -> list[Reading]:
        """See ``ports.Queue.read``."""
        rows = await self._database.call(
            "SELECT * FROM sidecar.read_documents($1, $2, $3, $4, $5, $6, $7)",
            *(self._pipeline, self._model_id, list(keys), self._max_document_bytes, READ_BUDGET_BYTES),
            *(None if claim_seconds is None else self._claimant, claim_seconds),
        )
        return [
            Reading(
                key=DocumentKey(row["key"]),
                verdict=Verdict(row["verdict"]),
                content=row["content"],
                content_hash=None if row["content_hash"] is None else ContentHash(row["content_hash"]),
                content_bytes=row["content_bytes"],
            )
            for row in rows
        ]

    async def begin(self, leases: Collection[Lease]) -> None:
        """See ``ports.Queue.begin``."""
        for lane, ids, read_cts, _ in _fences(leases):
            await self._database.call("SELECT sidecar.begin($1, $2, $3, $4)", self._pipeline, lane, ids, read_cts)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        """See ``ports.Queue.settle``."""
        numbered = list(enumerate(settlements, start=1))
        chunks = [(n, chunk) for n, settlement in numbered for chunk in settlement.chunks]
        leases = [(n, lease) for n, settlement in numbered for lease in settlement.leases]
        rows = await self._database.call(
            "SELECT * FROM sidecar.settle($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            self._pipeline,
            self._model_id,
            [settlement.key for settlement in settlements],
            [settlement.content_hash for settlement in settlements],
            [n for n, _ in chunks],
            [chunk.number for _, chunk in chunks],
            [chunk.text for _, chunk in chunks],
            [Vector(chunk.vector) for _, chunk in chunks],
            [n for n, _ in leases],
            [lease.lane.value for _, lease in leases],
            [lease.msg_id for _, lease in leases],
            [lease.read_ct for _, lease in leases],
            retry=False,  # a document that a writer holds must not make its batch mates wait: the worker splits it off
        )
        return [
            Settled(
                key=settlements[row["document"] - 1].key,
                outcome=Outcome(row["outcome"]),
                acknowledged=row["acknowledged"],
                freshness_seconds=row["freshness_seconds"],
            )
            for row in rows
        ]

    async def acknowledge(self, leases: Collection[Lease]) -> int:
        """See ``ports.Queue.acknowledge``."""
        return sum(
            [
                await self._database.fetch_value(
                    "SELECT sidecar.acknowledge($1, $2, $3, $4, $5, $6)",
                    *(self._pipeline, lane, ids, read_cts, keys, self._claimant),
                )
                for lane, ids, read_cts, keys in _fences(leases)
            ]
        )

    async def extend(self, leases: Collection[Lease], *, seconds: float) -> set[Lease]:
        """See ``ports.Queue.extend``."""
        held: set[tuple[str, int]] = set()
        for lane, ids, read_cts, keys in _fences(leases):
            rows = await self._database.call(
                "SELECT sidecar.extend($1, $2, $3, $4, $5, $6, $7)",
                *(self._pipeline, lane, ids, read_cts, seconds, keys, self._claimant),
            )
            held |= {(lane, row[0]) for row in rows}
        newest: dict[tuple[str, int], int] = {}
        for lease in leases:  # a message that expired may have been leased again by this very replica
            place = (lease.lane.value, lease.msg_id)
            newest[place] = max(lease.read_ct, newest.get(place, 0))
        return {
            lease
            for lease in leases
            if (place := (lease.lane.value, lease.msg_id)) in held and lease.read_ct == newest[place]
        }

    async def defer(self, delays: Mapping[Lease, float], *, code: str) -> int:
        """See ``ports.Queue.defer``."""
        return await self._show_again(delays, code=code, excuse=False)

    async def release(self, leases: Collection[Lease], *, delay: float = 0.0, keep_claims: bool = False) -> int:
        """See ``ports.Queue.release``."""
        delays = dict.fromkeys(leases, delay)
        return await self._show_again(delays, code="released", excuse=True, keep_claims=keep_claims)

    async def dead_letter(
        self, leases: Collection[Lease], *, reason: str, detail: str, content_hash: ContentHash | None
    ) -> int:
        """See ``ports.Queue.dead_letter``."""
        ordered = list(leases)
        moved: int = await self._database.fetch_value(
            "SELECT sidecar.dead_letter($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            self._pipeline,
            ordered[0].key,
            [lease.lane.value for lease in ordered],
            [lease.msg_id for lease in ordered],
            [lease.read_ct for lease in ordered],
            max(lease.attempt for lease in ordered),
            reason,
            detail,
            content_hash,
            retry=False,  # as in settle: a document that a writer holds must not make others wait
        )
        return moved

    async def sweep(self, *, rows: int, interval: float) -> SweepWindow:
        """See ``ports.Queue.sweep``."""
        (row,) = await self._database.call("SELECT * FROM sidecar.sweep($1, $2, $3)", self._pipeline, rows, interval)
        return SweepWindow(**dict(row))

    async def _show_again(
        self, delays: Mapping[Lease, float], *, code: str, excuse: bool, keep_claims: bool = False
    ) -> int:
        return sum(
            [
                await self._database.fetch_value(
                    "SELECT sidecar.defer($1, $2, $3, $4, $5, $6, $7, $8, $9)",
                    self._pipeline,
                    lane.value,
                    [lease.msg_id for lease in leases],
                    [lease.read_ct for lease in leases],
                    [delays[lease] for lease in leases],
                    code,
                    excuse,
                    [lease.key for lease in leases],
                    None if keep_claims else self._claimant,
                )
                for lane, leases in _by_lane(delays)
            ]
        )


class PostgresCatalog:
    """The pipelines of a database, how deep their queues are, and what an operator may do to them."""

    def __init__(self, database: Database) -> None:
        """Bind a database."""
        self._database = database

    async def pipelines(self) -> list[Pipeline]:
        """See ``ports.Catalog.pipelines``."""
        rows = await self._database.call("SELECT * FROM sidecar.list_pipelines()")
        return [
            Pipeline(
                name=PipelineName(row["name"]),
                source=row["source"],
                embeddings=row["embeddings"],
                queue=row["queue"],
                model=row["model"],
                model_id=None if row["model_id"] is None else ModelId(row["model_id"]),
                dimensions=row["dimensions"],
                long_documents=LongDocuments(row["long_documents"]),
                enabled=row["enabled"],
            )
            for row in rows
        ]

    async def register_model(self, pipeline: Pipeline, model_id: ModelId) -> None:
        """See ``ports.Catalog.register_model``."""
        await self._database.call("SELECT sidecar.register_model($1, $2, $3)", pipeline.name, pipeline.model, model_id)

    async def observe(self) -> Observation:
        """See ``ports.Catalog.observe``."""
        rows = await self._database.call("SELECT * FROM sidecar.observe()")
        kept = {index.pipeline: index for index in await indexes(self._database)}
        (oldest,) = await self._database.call("SELECT * FROM sidecar.oldest_transaction()")
        return Observation(
            pipelines=tuple(_observation(row, kept.get(row["pipeline"])) for row in rows),
            oldest_transaction_seconds=oldest["age_seconds"],
            oldest_xmin_age=oldest["xmin_age"],
        )


def _observation(row: asyncpg.Record, index: IndexStatus | None) -> PipelineObservation:
    return PipelineObservation(
        pipeline=PipelineName(row["pipeline"]),
        enabled=row["enabled"],
        live=LaneDepth(row["live_depth"], row["live_in_flight"], row["live_oldest_seconds"]),
        bulk=LaneDepth(row["bulk_depth"], row["bulk_in_flight"], row["bulk_oldest_seconds"]),
        dead=row["dead"],
        documents=row["documents"],
        wanting=row["wanting"],
        walking=row["walking"],
        scanned=row["scanned"],
        sweep_age_seconds=row["sweep_age_seconds"],
        index=IndexState.NONE if index is None else index.state,
        backfilling=index is not None and index.backfilling,
    )


def _by_lane(leases: Collection[Lease] | Mapping[Lease, float]) -> Iterator[tuple[Lane, list[Lease]]]:
    """Leases by lane, sorted by message so that two replicas lock rows in one order."""
    ordered = sorted(leases, key=lambda lease: (lease.lane.value, lease.msg_id))
    for lane, group in itertools.groupby(ordered, key=lambda lease: lease.lane):
        yield lane, list(group)


def _fences(leases: Collection[Lease]) -> Iterator[tuple[str, list[int], list[int], list[DocumentKey | None]]]:
    """Lane, message ids, read counts and keys of leases."""
    for lane, group in _by_lane(leases):
        yield (
            lane.value,
            [lease.msg_id for lease in group],
            [lease.read_ct for lease in group],
            [lease.key for lease in group],
        )
