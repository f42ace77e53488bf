"""The demo's chapters once the database stands: load, embed, search, edit, delete."""

from __future__ import annotations

import asyncio
import platform
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from sidecar_daemon.adapters.postgres.queue import PostgresCatalog
from sidecar_daemon.adapters.postgres.source_documents import DocumentTable, StandardDocument
from sidecar_daemon.app.operations import opened_database, operations
from sidecar_daemon.app.searching import searcher
from sidecar_daemon.demo.corpus import Docstring, standard_library
from sidecar_daemon.domain.errors import Fatal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sidecar_daemon.adapters.postgres.operations import PipelineStatus
    from sidecar_daemon.app.searching import Searcher
    from sidecar_daemon.demo.process import DaemonProcess
    from sidecar_daemon.demo.screen import Screen
    from sidecar_daemon.settings import Settings

T = TypeVar("T")

PIPELINE = "source_documents"
QUESTIONS = {
    "pick a random element from a list": "random.Random.choice",
    "split a string like a shell does": "shlex.split",
    "is this a leap year": "calendar.isleap",
    "find words that are spelled similarly": "difflib.get_close_matches",
    "open a web page in the browser": "webbrowser.open",
}
"""What is asked, and the object that obviously answers it."""
_EDITED = "calendar.isleap"
_DELETED = "webbrowser.open"
_ADDITION = "Bake sourdough bread in a wood-fired oven."
_READY_SECONDS = 120.0
_STALLED_SECONDS = 180.0
_VECTOR_SECONDS = 60.0


class Story:
    """Tells the chapters one by one and reports what was measured."""

    def __init__(self, settings: Settings, daemon: DaemonProcess, shown: Screen, *, limit: int | None) -> None:
        """Take the settings of the demo's database, the daemon that works on it, and how many documents to load."""
        self._settings = settings
        self._daemon = daemon
        self._shown = shown
        self._limit = limit

    async def tell(self) -> dict[str, Any]:
        """Tell all; return the report that ``--json`` prints."""
        async with AsyncExitStack() as stack:
            self._database = await stack.enter_async_context(opened_database(self._settings))
            self._table = DocumentTable(self._database)
            await self._poll(_READY_SECONDS, "the daemon to be ready", self._ready)
            corpus = await self._load()
            status, seconds, embedded = await self._embed()
            finder = await stack.enter_async_context(searcher(self._settings, PIPELINE))
            searches = await self._search(finder)
            by_name = {document.object: document for document in corpus}
            freshness = await self._edit(by_name.get(_EDITED, corpus[0]), finder)
            gone = await self._delete(by_name.get(_DELETED, corpus[-1]))
        return {
            "model": status.model,
            "documents": status.documents,
            "embedded": status.embedded,
            "seconds": round(seconds, 3),
            "documents_per_second": round(embedded / seconds, 1) if embedded else 0.0,
            "freshness_ms": round(freshness, 1),
            "searches": searches,
            "deleted_vector_gone": gone,
        }

    async def _load(self) -> list[StandardDocument]:
        self._shown.heading("3. Documents")
        docstrings = (await asyncio.to_thread(standard_library, tuple(QUESTIONS.values())))[: self._limit]
        if not docstrings:
            raise Fatal("no_documents", "this Python has no sources of its standard library: run the demo with another")
        corpus = [_row(docstring) for docstring in docstrings]
        began = time.monotonic()
        loaded = await self._table.load(corpus)
        self._shown.line(
            f"{len(corpus):,} docstrings of Python {platform.python_version()}'s standard library: {loaded.copied:,} "
            f"new ones by one COPY, {loaded.changed:,} changed, {loaded.removed:,} removed "
            f"({time.monotonic() - began:.1f} s)"
        )
        return corpus

    async def _embed(self) -> tuple[PipelineStatus, float, int]:
        """Wait until the daemon has embedded everything; the status, the seconds, and how many documents that took."""
        self._shown.heading("4. The daemon embeds them")
        began, moved, left, first = time.monotonic(), time.monotonic(), -1, None
        while True:
            self._daemon.check()
            waiting = await self._waiting()
            now = time.monotonic()
            first = waiting if first is None else max(first, waiting)
            if waiting != left:
                moved, left = now, waiting
            if waiting == 0:
                break
            if now - moved > _STALLED_SECONDS:
                raise Fatal(
                    "stalled", f"{waiting} messages wait and nothing moves; the daemon's log: {self._daemon.log}"
                )
            self._shown.progress(_progress(first, waiting, now - began))
            await asyncio.sleep(0.25)
        seconds = time.monotonic() - began
        status = await self._status()
        if status.embedded < status.documents:
            raise Fatal(
                "not_embedded",
                f"{status.documents - status.embedded} of {status.documents} documents have no current vector, "
                f"{status.dead} dead letters; the daemon's log: {self._daemon.log}",
            )
        self._shown.line(
            f"{status.embedded:,} of {status.documents:,} documents embedded"
            + (f": {first:,} now, in {seconds:.1f} s ({first / seconds:.0f}/s)" if first else ", nothing to do")
        )
        return status, seconds, first

    async def _search(self, finder: Searcher) -> list[dict[str, Any]]:
        self._shown.heading("5. Search by meaning")
        found = []
        for question in QUESTIONS:
            matches = await finder.find(question, 3)
            names = await self._table.objects([UUID(match.key) for match in matches])
            self._shown.line(f'"{question}"')
            results = []
            for match in matches:
                name, text = names[UUID(match.key)], " ".join(match.source_text.split())
                self._shown.line(f"   {match.similarity:.2f}  {name:<34} {text[:70]}")
                results.append({"object": name, "similarity": round(match.similarity, 4), "text": text[:120]})
            found.append({"query": question, "results": results})
        return found

    async def _edit(self, document: StandardDocument, finder: Searcher) -> float:
        """Edit one document, wait for its vector, put it back; milliseconds from commit to commit."""
        self._shown.heading("6. Fresh and true")
        await self._table.edit(document.id, f"{document.content}\n\n{_ADDITION}")
        freshness = await self._fresh(document)
        self._shown.line(
            f"edited {document.object}: its new vector was committed {freshness:.0f} ms after the edit was"
        )
        self._shown.line("   (commit to commit, by the database's clock: pg_xact_commit_timestamp of both rows)")
        (match,) = await finder.find(_ADDITION, 1)
        names = await self._table.objects([UUID(match.key)])
        self._shown.line(f'   "{_ADDITION}" now finds {names[UUID(match.key)]}')
        await self._table.edit(document.id, document.content)
        await self._fresh(document)
        return freshness

    async def _delete(self, document: StandardDocument) -> bool:
        """Delete one document, look for its vector, put it back."""
        before = await self._table.vectors(document.id)
        await self._table.remove(document.id)
        after = await self._table.vectors(document.id)
        self._shown.line(f"deleted {document.object}: {before} vector before, {after} after, in the same transaction")
        await self._table.insert(document)
        await self._fresh(document)
        self._shown.line("both documents are put back as they were, and embedded again")
        return before > 0 and after == 0

    async def _fresh(self, document: StandardDocument) -> float:
        async def measured() -> float | None:
            return await self._table.freshness(document.id)

        return await self._poll(_VECTOR_SECONDS, f"the vector of {document.object}", measured)

    async def _ready(self) -> bool | None:
        return await asyncio.to_thread(self._daemon.is_ready) or None

    async def _waiting(self) -> int:
        seen = await PostgresCatalog(self._database).observe()
        return sum(one.live.depth + one.bulk.depth for one in seen.pipelines if one.pipeline == PIPELINE)

    async def _status(self) -> PipelineStatus:
        async with operations(self._settings) as database:
            return next(status for status in await database.status() if status.name == PIPELINE)

    async def _poll(self, seconds: float, what: str, ask: Callable[[], Awaitable[T | None]]) -> T:
        """Ask until there is an answer other than None; the daemon must live meanwhile."""
        deadline = time.monotonic() + seconds
        while True:
            self._daemon.check()
            answer = await ask()
            if answer is not None:
                return answer
            if time.monotonic() > deadline:
                raise Fatal("timeout", f"waited {seconds:.0f} s for {what}; the daemon's log: {self._daemon.log}")
            await asyncio.sleep(0.01)


def _row(docstring: Docstring) -> StandardDocument:
    return StandardDocument(docstring.key, docstring.text, docstring.name)


def _progress(total: int, waiting: int, seconds: float) -> str:
    finished = total - waiting
    rate = finished / seconds if seconds > 0 else 0.0
    eta = f"{waiting / rate:.0f} s left" if rate > 0 else "starting"
    return f"  {finished:,} of {total:,} embedded · {rate:.0f} documents/s · {waiting:,} in the queue · {eta}"
