"""An embedder whose vector is a pure function of the token ids: a stale vector is then detectable, to the bit."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sidecar_daemon.domain.errors import Poison
from sidecar_daemon.domain.messages import LongDocuments, ModelId, TokenWindow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import TokenIds, Vectors

CLS, SEP = 1, 2


@dataclass(frozen=True, slots=True)
class DeterministicEmbedder:
    """An ``Embedder`` without a model. Frozen and without state, so any number of threads may share it.

    A token is a run of word characters or one other visible character; its id is 62 bits of its sha256, so two
    different texts have different ids, short of a collision.
    """

    dimensions: int = 16
    max_tokens: int = 64

    def model_id(self, long_documents: LongDocuments) -> ModelId:
        """Changes with every setting that changes a vector."""
        facts = json.dumps([self.dimensions, self.max_tokens, long_documents])
        return ModelId(f"deterministic@{hashlib.sha256(facts.encode()).hexdigest()[:12]}")

    def tokenize(self, text: str) -> list[TokenWindow]:
        """Windows of at most ``max_tokens`` ids that join to the whole text."""
        tokens = list(re.finditer(r"\w+|[^\w\s]", text))
        room = self.max_tokens - 2
        parts = [tokens[first : first + room] for first in range(0, len(tokens), room)] or [[]]
        starts = [0, *(part[0].start() for part in parts[1:]), len(text)]
        return [
            TokenWindow(
                ids=np.array([CLS, *(_token_id(token.group()) for token in part), SEP], dtype=np.int64),
                content_tokens=len(part),
                start=starts[number],
                end=starts[number + 1],
            )
            for number, part in enumerate(parts)
        ]

    def embed(self, windows: Sequence[TokenIds]) -> Vectors:
        """One row a window, seeded by the sha256 of its ids; float32 ``(len(windows), dimensions)``, L2 norm 1."""
        rows = [self._row(window) for window in windows]
        return np.array(rows, dtype=np.float32).reshape(len(rows), self.dimensions)

    def _row(self, window: TokenIds) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        if len(window) == 0:
            raise Poison("inference_failed", "a window without tokens")
        digest = hashlib.sha256(np.asarray(window, dtype="<i8").tobytes()).digest()
        row = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(self.dimensions)
        return np.asarray(row / np.linalg.norm(row))


def _token_id(token: str) -> int:
    try:
        raw = token.encode()
    except UnicodeEncodeError as error:
        raise Poison("not_unicode", f"the text cannot be encoded as UTF-8 ({type(error).__name__})") from None
    return 3 + (int.from_bytes(hashlib.sha256(raw).digest()[:8], "little") >> 2)
