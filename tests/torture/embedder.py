"""The test embedder of a replica: a vector that is a function of the text, a few milliseconds, and poisoned words."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from sidecar_daemon.app.runtimes import load_onnx
from sidecar_daemon.domain.errors import Poison
from sidecar_daemon.settings import ModelSettings, Runtime, installed_folder
from tests.deterministic import DeterministicEmbedder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sidecar_daemon.domain.messages import LongDocuments, ModelId, TokenIds, TokenWindow, Vectors
    from sidecar_daemon.ports import Embedder

DIMENSIONS = 16
MAX_TOKENS = 32
MODEL = "tiny"
"""The manifest that the pipelines name; its files are loaded by T1-ONNX only."""

RAISES, ABORTS, MAKES_NAN, MAKES_ZERO = "poisonraises", "poisonaborts", "poisonnan", "poisonzero"
"""Words that make a text poison: the model refuses it, dies of it, answers NaN, answers zero."""
SHOUTS = "poisonshouts"
"""The model refuses it with an error whose own text is poison: NUL, half a surrogate pair, a megabyte."""

REFERENCE = DeterministicEmbedder(dimensions=DIMENSIONS, max_tokens=MAX_TOKENS)


def pulled(models: Path) -> Embedder:
    """The real model ``MODEL``, its files made in ``models`` where they are missing."""
    manifest = load_manifests(installed_folder("models"))[MODEL]
    pull(manifest, models, progress=lambda _: None)
    return load_onnx(manifest, ModelSettings(models, Runtime.ONNXRUNTIME, 1))


def _id_of(word: str) -> int:
    return int(REFERENCE.tokenize(word)[0].ids[1])


_RAISES, _ABORTS, _NAN, _ZERO, _SHOUTS = (_id_of(w) for w in (RAISES, ABORTS, MAKES_NAN, MAKES_ZERO, SHOUTS))


@dataclass(frozen=True)
class TortureEmbedder:
    """``REFERENCE`` with a cost and with poisoned words. Thread-safe."""

    seed: int = 0
    slowest: float = 0.006
    """Seconds that one run takes at most; at least a third of it."""
    steady: bool = False
    """Every run takes the longest: rates can then be compared."""
    around: Callable[[str], None] = field(default=lambda _: None)
    """Called with ``before_embed`` and ``after_embed``: the failpoints."""

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return REFERENCE.dimensions

    def model_id(self, long_documents: LongDocuments) -> ModelId:
        """Of the reference."""
        return REFERENCE.model_id(long_documents)

    def tokenize(self, text: str) -> list[TokenWindow]:
        """As the reference does."""
        return REFERENCE.tokenize(text)

    def embed(self, windows: Sequence[TokenIds]) -> Vectors:
        """The reference's vectors, after a seeded pause. Raises ``Poison`` or dies where a word says so."""
        self.around("before_embed")
        time.sleep(self._pause(windows))
        seen = {int(token) for window in windows for token in window}
        if _ABORTS in seen:
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)  # the signal ends the process, whichever thread it reaches
        if _RAISES in seen:
            raise Poison("inference_failed", "the model cannot run on these windows")
        if _SHOUTS in seen:
            raise Poison("inference_failed", "\x00\ud800\n\x1b[31m" + "shout " * 200_000)
        if seen & {_NAN, _ZERO}:  # as the port demands of an embedder whose model answers so
            raise Poison("bad_vector", "the model returned NaN, infinity or a zero vector")
        vectors = REFERENCE.embed(windows)
        self.around("after_embed")
        return vectors

    def _pause(self, windows: Sequence[TokenIds]) -> float:
        if self.steady:
            return self.slowest
        digest = hashlib.sha256(self.seed.to_bytes(8, "little") + b"".join(window.tobytes() for window in windows))
        return self.slowest * (1 + 2 * digest.digest()[0] / 255) / 3
