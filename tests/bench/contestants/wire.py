"""JSON lines over the standard streams: the far end. Standard library only: peers run it with a Python of their own.

A request is ``{"op": name, ...}``, its answer ``{"answer": ...}`` or ``{"error": "one line"}``. What libraries print to
standard output goes to standard error instead, so that it cannot break an answer.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class ModelContestant(Protocol):
    """Text to vectors, however it likes to."""

    def about(self) -> dict[str, Any]:
        """Versions, precision and settings."""

    def encode(self, texts: Sequence[str], batch: int | None) -> Any:
        """Vectors of all texts, an array of shape ``(texts, dimensions)``, in their order.

        Args:
            texts: what to embed.
            batch: texts a run; None for its own default.
        """

    def encode_together(self, texts: Sequence[str]) -> Any:
        """The same in one single run of the model."""


def serve(operations: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests until standard input ends. An error is answered too; the process lives on."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"answer": operations[request.pop("op")](**request)}
            except Exception as error:  # noqa: BLE001  told to whoever asked
                answer = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")[:500]}
            out.write(json.dumps(answer) + "\n")
            out.flush()


def model_operations(contestant: ModelContestant) -> dict[str, Callable[..., Any]]:
    """What every contestant of the table *model only* can be asked.

    ``about``; ``texts`` keeps a corpus by name; ``speed`` embeds one and times it; ``batches`` embeds batches of texts,
    each in one run, and answers with their vectors.
    """
    corpora: dict[str, list[str]] = {}

    def texts(name: str, texts: list[str]) -> int:
        corpora[name] = texts
        return len(texts)

    def speed(name: str, batch: int | None = None, first: int = 0, count: int | None = None) -> dict[str, float]:
        chosen = corpora[name][first : None if count is None else first + count]
        started = time.perf_counter()
        contestant.encode(chosen, batch)
        return {"seconds": time.perf_counter() - started, "amount": len(chosen)}

    def batches(batches: list[list[str]]) -> list[list[str]]:
        return [[packed(row) for row in contestant.encode_together(batch)] for batch in batches]

    return {"about": contestant.about, "texts": texts, "speed": speed, "batches": batches}


def packed(row: Any) -> str:
    """A vector as text: base64 of its float32 bytes, little-endian."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
