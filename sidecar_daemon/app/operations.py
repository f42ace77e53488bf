"""What an operator may do: open the database from the settings, call it, close it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sidecar_daemon.adapters.postgres.migrate import check_version, migrate
from sidecar_daemon.adapters.postgres.operations import STANDARD_TABLE, Attachment, PostgresOperations
from sidecar_daemon.adapters.postgres.pool import Database, Limits
from sidecar_daemon.app.model_files import manifest_of
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.explanation import ExplainLimits, explain
from sidecar_daemon.domain.indexing import DeferIndex
from sidecar_daemon.domain.messages import LongDocuments
from sidecar_daemon.settings import Pooler, installed_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from sidecar_daemon.adapters.postgres.migrate import MigrationReport
    from sidecar_daemon.adapters.postgres.operations import Attached, SweepProgress
    from sidecar_daemon.domain.explanation import Explanation
    from sidecar_daemon.domain.tracing import DocumentFacts
    from sidecar_daemon.settings import Settings

T = TypeVar("T")

_PATIENT = Limits(max_size=2, statement=3600.0, retry=0.0)
"""An operator waits for a long count, and wants to hear of an outage at once."""
_NEVER_AGAIN = 86400.0
"""Seconds for which a walk that another replica just finished counts as ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """The arguments of ``attach``; None: the default."""

    table: str | None
    """None: the standard document table."""
    columns: tuple[str, ...] = ()
    model: str = "gte-small"
    long_documents: LongDocuments = LongDocuments.MEAN
    name: str | None = None
    key: str | None = None
    embeddings: str | None = None
    queue: str | None = None
    store_text: bool = True
    index: bool = True
    defer_index: DeferIndex = DeferIndex.AUTO


@asynccontextmanager
async def opened_database(settings: Settings) -> AsyncIterator[Database]:
    """The settings' database, for an operator."""
    database = await Database.open(
        settings.database.require_url(),
        pooler_mode=settings.database.pooler is Pooler.TRANSACTION,
        application_name="sidecar_daemon operator",
        limits=_PATIENT,
    )
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def operations(settings: Settings) -> AsyncIterator[PostgresOperations]:
    """The operator's calls, on a database whose schema this release knows.

    Raises:
        Fatal: the schema is missing, too old or too new.
        Transient: the database cannot be reached.
    """
    async with checked_database(settings) as database:
        yield PostgresOperations(database)


@asynccontextmanager
async def checked_database(settings: Settings) -> AsyncIterator[Database]:
    """The settings' database, whose schema this release knows. Raises as ``operations`` does."""
    async with opened_database(settings) as database:
        await check_version(database, installed_folder("sql"))
        yield database


async def migrate_database(settings: Settings) -> MigrationReport:
    """Bring the database up to date; see ``adapters.postgres.migrate.migrate``."""
    async with opened_database(settings) as database:
        return await migrate(database, installed_folder("sql"))


async def attach(settings: Settings, request: AttachRequest) -> Attached:
    """Attach a table, or create and attach the standard one.

    Raises:
        Fatal: one line that says what is wrong with the model, the table or a name.
    """
    manifest = manifest_of(settings, request.model)
    standard = request.table is None
    wanted = Attachment(
        source=request.table or STANDARD_TABLE,
        content=request.columns or (("content",) if standard else ()),
        model=manifest.name,
        model_id=manifest.model_id(request.long_documents),
        dimensions=manifest.dimensions,
        long_documents=request.long_documents,
        name=request.name,
        key=request.key,
        embeddings=request.embeddings or ("document_embeddings" if standard else None),
        embeddings_key="document_id" if standard else None,
        queue=request.queue or ("embedding_queue" if standard else None),
        store_text=request.store_text,
        index=request.index,
        defer_index=request.defer_index,
    )
    async with operations(settings) as database:
        if standard:
            await database.create_source_documents()
        return await database.attach(wanted)


async def sweep(
    settings: Settings, pipeline: str, *, tell: Callable[[str, SweepProgress], None], watch: bool = True
) -> SweepProgress:
    """Walk a source now, from the start, together with the replicas that run.

    Args:
        settings: name the database and the size of a window.
        pipeline: its name.
        tell: told after every step the state (see ``domain.messages.SweepWindow``) and the totals.
        watch: to the end; otherwise one window is walked here, and the rest is left to the replicas.
    """
    async with operations(settings) as database:
        await database.request_sweep(pipeline)
        while True:
            window = await database.sweep(pipeline, rows=settings.sweep.rows, interval=_NEVER_AGAIN)
            totals = await database.sweep_progress(pipeline)
            tell(window.state, totals)
            if window.state in {"finished", "resting"} or not watch:
                return totals
            if window.state != "walked":  # a lane is deep, or another replica walks
                await asyncio.sleep(settings.worker.poll_min)


async def explain_document(settings: Settings, pipeline: str, key: str) -> tuple[DocumentFacts, Explanation]:
    """What is known about one document, and what that means under these settings.

    Raises:
        Fatal: the key is no value of the key's type, or not valid text.
        Refused: the pipeline is unknown.
    """
    if any("\ud800" <= character <= "\udfff" for character in key) or "\0" in key:
        raise Fatal("bad_key", "the key is not valid UTF-8 text")
    limits = ExplainLimits(
        max_attempts=settings.worker.max_attempts,
        max_document_bytes=settings.worker.max_document_bytes,
        sweep_interval=settings.sweep.interval,
    )
    async with operations(settings) as database:
        facts = await database.explain(pipeline, key)
    return facts, explain(facts, limits)


async def replay_dead_letters(settings: Settings, pipeline: str, ids: Sequence[int] | None) -> int:
    """Move dead letters back to the live lane. Raises ``Fatal`` when an id is unknown; None: all."""
    async with operations(settings) as database:
        await _check_ids(database, pipeline, ids)
        return await database.replay(pipeline, ids)


async def purge_dead_letters(settings: Settings, pipeline: str, ids: Sequence[int] | None) -> int:
    """Delete dead letters. Raises ``Fatal`` when an id is unknown; None: all."""
    async with operations(settings) as database:
        await _check_ids(database, pipeline, ids)
        return await database.purge(pipeline, ids)


async def _check_ids(database: PostgresOperations, pipeline: str, ids: Sequence[int] | None) -> None:
    """All or nothing: a mistyped id must not be passed over in silence."""
    known = {letter.id for letter in await database.dead_letters(pipeline)}
    unknown = [str(number) for number in ids or () if number not in known]
    if unknown:
        raise Fatal("unknown_dead_letter", f"pipeline {pipeline} has no dead letter {', '.join(unknown)}")


async def ask(settings: Settings, question: Callable[[PostgresOperations], Awaitable[T]]) -> T:
    """Open the database, ask one thing, close it."""
    async with operations(settings) as database:
        return await question(database)
