"""Documents through the real batcher as they stream by: the model path without a database."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sidecar_daemon.domain.batching import next_batch, remaining
from sidecar_daemon.domain.messages import ContentHash, Document, DocumentKey, Window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sidecar_daemon.domain.messages import Batch, TokenWindow, Vectors
    from sidecar_daemon.ports import Embedder

WINDOW = 256
"""Documents that wait at once: what PERFORMANCE's P3 is stated for."""
REFILL = 64
"""Documents tokenized together, as the worker does."""


@dataclass
class Stream:
    """Texts in their order, of which at most ``WINDOW`` wait; only the first window of each counts."""

    tokenize: Callable[[str], list[TokenWindow]]
    texts: Sequence[str]
    batch_tokens: int
    batch_windows: int
    _next: int = 0
    _pending: list[Window] = field(default_factory=list)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> tuple[Batch, list[int]] | None:
        """One batch, and the place of each of its texts; None once all are taken. Thread-safe."""
        with self._turn:
            self._refill()
            if not self._pending:
                return None
            batch = next_batch(self._pending, max_padded_tokens=self.batch_tokens, max_windows=self.batch_windows)
            self._pending = remaining(self._pending, batch.windows)
            return batch, [int(window.document.key) for window in batch.windows]

    def batches(self) -> Iterator[Batch]:
        """All batches, for whoever does not run them."""
        while (taken := self.take()) is not None:
            yield taken[0]

    def _refill(self) -> None:
        last = min(self._next + min(REFILL, WINDOW - len(self._pending)), len(self.texts))
        for place in range(self._next, last):
            self._pending.append(_window(place, self.texts[place], self.tokenize(self.texts[place])[0]))
        self._next = last


def embed_all(embedder: Embedder, stream: Stream, threads: int) -> Vectors:
    """Run a whole stream on ``threads`` threads. Rows in the order of the texts."""
    vectors = np.zeros((len(stream.texts), embedder.dimensions), dtype=np.float32)

    def work() -> None:
        while (taken := stream.take()) is not None:
            batch, places = taken
            vectors[places] = embedder.embed([window.tokens.ids for window in batch.windows])

    with ThreadPoolExecutor(threads) as pool:
        for running in [pool.submit(work) for _ in range(threads)]:
            running.result()
    return vectors


def _window(place: int, text: str, tokens: TokenWindow) -> Window:
    document = Document(DocumentKey(str(place)), text, ContentHash(""), ())
    return Window(document=document, ordinal=0, of=1, tokens=tokens)
