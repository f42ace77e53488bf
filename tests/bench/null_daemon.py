"""The real daemon with a model that does no work: what is left is the database side."""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sidecar_daemon.app.crews import Parts
from sidecar_daemon.app.daemon import run_daemon
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.messages import ModelId, TokenWindow
from sidecar_daemon.settings import Settings
from tests.bench.server import NULL_DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import LongDocuments, TokenIds, Vectors

ROWS = 1 << 12


@dataclass(frozen=True)
class NullEmbedder:
    """An ``Embedder`` whose vector is a function of the text's checksum: different texts, different vectors."""

    rows: Vectors = field(
        default_factory=lambda: np.random.default_rng(0).standard_normal((ROWS, NULL_DIMENSIONS), dtype=np.float32)
    )

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return NULL_DIMENSIONS

    def model_id(self, long_documents: LongDocuments) -> ModelId:
        """Always the same."""
        return ModelId(f"null@{long_documents}")

    def tokenize(self, text: str) -> list[TokenWindow]:
        """One window, whatever the text; its ids are made of the text's checksum."""
        checksum = zlib.crc32(text.encode())
        ids = np.array([1, checksum % ROWS, checksum // ROWS % ROWS, 2], dtype=np.int64)
        return [TokenWindow(ids=ids, content_tokens=2, start=0, end=len(text))]

    def embed(self, windows: Sequence[TokenIds]) -> Vectors:
        """The sum of two of the rows, of L2 norm 1."""
        ids = np.stack(windows)
        vectors = self.rows[ids[:, 1]] + self.rows[ids[:, 2]] * np.float32(0.5)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def main() -> int:
    """Run the daemon until it is told to stop."""
    embedder = NullEmbedder()
    try:
        return run_daemon(Settings.read(), Parts(load_embedder=lambda *_: embedder))
    except Fatal as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
