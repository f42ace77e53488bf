"""Searching a pipeline by meaning. Apart from the other operations: numpy is slow to load."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sidecar_daemon.app.model_files import load_embedder
from sidecar_daemon.app.operations import operations
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.windows import combine_windows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sidecar_daemon.adapters.postgres.operations import Match, PostgresOperations
    from sidecar_daemon.domain.messages import Vector
    from sidecar_daemon.ports import Embedder
    from sidecar_daemon.settings import Settings


@dataclass(frozen=True, slots=True)
class Searcher:
    """Searches one pipeline by meaning, with the pipeline's own model."""

    pipeline: str
    embedder: Embedder
    database: PostgresOperations

    async def find(self, text: str, k: int) -> list[Match]:
        """The ``k`` nearest chunks, best first. Raises ``Fatal`` (``bad_query``) for a blank or invalid text."""
        vector = await asyncio.to_thread(embed_query, self.embedder, text)
        return await self.database.search(self.pipeline, vector, k)


@asynccontextmanager
async def searcher(settings: Settings, pipeline: str) -> AsyncIterator[Searcher]:
    """Open the database and load the model that the pipeline names.

    Raises:
        Fatal: the pipeline is unknown, or its model is not pulled; the line names the command that mends it.
    """
    async with operations(settings) as database:
        found = await database.pipeline(pipeline)
        embedder = await asyncio.to_thread(load_embedder, settings, found)
        yield Searcher(pipeline, embedder, database)


def embed_query(embedder: Embedder, text: str) -> Vector:
    """One vector for a query of any length: float32 of shape ``(dimensions,)``, L2 norm 1.

    Raises:
        Fatal: ``bad_query``, the text is blank or not valid Unicode.
    """
    if not text.strip():
        raise Fatal("bad_query", "the query is empty: give some words to search for")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Fatal("bad_query", "the query is not valid UTF-8 text")
    windows = embedder.tokenize(text)
    # One by one: a query of many windows must not claim the memory of a batch.
    vectors = np.concatenate([embedder.embed([window.ids]) for window in windows])
    return combine_windows(vectors, [window.content_tokens for window in windows])
