"""What the serial port and the naive worker share: a session of their own, a queue, a table of vectors."""

from __future__ import annotations

import asyncio
import json
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import numpy as np
import onnxruntime
from pgvector import Vector
from pgvector.asyncpg import register_vector
from tokenizers import Tokenizer

from tests.bench.contestants.wire import serve
from tests.bench.server import TABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import Vectors

LIMIT = 512
VISIBILITY_SECONDS = 300
IDLE_SECONDS = 0.01
UPSERT = f"""
INSERT INTO {TABLE}_embeddings (id, source_text, source_text_hash, embedding, model)
VALUES ($1, $2, md5($2), $3, $4)
ON CONFLICT (id, chunk_no) DO UPDATE SET source_text = excluded.source_text,
    source_text_hash = excluded.source_text_hash, embedding = excluded.embedding, model = excluded.model,
    updated_at = now()
"""


class QueueReader(ABC):
    """A worker that reads one queue. It is told how many documents to work off, and answers when they are."""

    def __init__(self, url: str, folder: Path, threads: int) -> None:
        """Load an exported model: the whole graph, pooling and norm included, on one session."""
        self.url = url
        self._graph, self._threads = folder / "model.onnx", threads
        self._session = self.open_session()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(LIMIT)
        self._tokenizer.enable_padding()
        self.runner = asyncio.Runner()
        self.connection: asyncpg.Connection | None = None

    def open_session(self) -> onnxruntime.InferenceSession:
        """Load the graph."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(self._graph), options, providers=["CPUExecutionProvider"])

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts in one run, padded to the longest of them."""
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = np.array([each.ids for each in encoded], dtype=np.int64)
        mask = np.array([each.attention_mask for each in encoded], dtype=np.int64)
        return np.asarray(self._session.run(None, {"input_ids": ids, "attention_mask": mask})[0])

    @abstractmethod
    async def batch(self, connection: asyncpg.Connection) -> int:
        """Read one batch of messages and work it off. Returns how many documents that were."""

    def work(self, documents: int) -> int:
        """Work until so many documents are done."""
        return self.runner.run(self._work(documents))

    async def _work(self, documents: int) -> int:
        if self.connection is None:
            self.connection = await asyncpg.connect(self.url, command_timeout=600)
            await register_vector(self.connection)
        done = 0
        while done < documents:
            found = await self.batch(self.connection)
            done += found
            if not found:
                await asyncio.sleep(IDLE_SECONDS)
        return done


async def read(connection: asyncpg.Connection, quantity: int) -> list[tuple[int, int]]:
    """Messages of the queue: message id and document id."""
    rows = await connection.fetch(
        "SELECT msg_id, message FROM pgmq.read($1, $2, $3)", TABLE, VISIBILITY_SECONDS, quantity
    )
    return [(row["msg_id"], int(json.loads(row["message"])["document_id"])) for row in rows]


def row_of(key: int, text: str, vector: Any, model: str) -> tuple[int, str, Vector, str]:
    """Arguments of ``UPSERT``."""
    return key, text, Vector(vector), model


def serve_reader(kind: type[QueueReader]) -> None:
    """``python -m MODULE URL FOLDER THREADS``: load and serve ``work``."""
    url, folder, threads = sys.argv[1:]
    reader = kind(url, Path(folder), int(threads))
    serve({"work": reader.work})
