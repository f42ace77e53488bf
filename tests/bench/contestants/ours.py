"""Our model path: tokenizer, batcher and runtime of the daemon, on as many threads, without a database.

``python -m tests.bench.contestants.ours MODEL RUNTIME THREADS``; the models' folder and the budget of a batch come from
``SIDECAR_*``, as for the daemon.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from sidecar_daemon.adapters.onnx.manifest import find_manifest
from sidecar_daemon.app.model_files import known_manifests
from sidecar_daemon.app.runtimes import load_onnx
from sidecar_daemon.settings import Settings
from tests.bench.contestants.streaming import Stream, embed_all
from tests.bench.contestants.wire import model_operations, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import TokenIds, Vectors


class Ours:
    """The daemon's embedder behind the daemon's batcher."""

    def __init__(self, model: str, runtime: str, threads: int) -> None:
        """Load a pulled model."""
        settings = Settings.read(runtime=runtime, threads=str(threads))
        self._model, self._runtime, self._threads = model, runtime, threads
        self._limits = settings.worker
        self._embedder = load_onnx(find_manifest(known_manifests(settings), model), settings.model)

    def about(self) -> dict[str, Any]:
        """Versions and settings."""
        versions = {}
        for package in ("onnxruntime", "openvino", "tokenizers", "numpy"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {
            "model": self._model,
            "runtime": self._runtime,
            "threads": self._threads,
            "batch_tokens": self._limits.batch_tokens,
            "versions": versions,
        }

    def encode(self, texts: Sequence[str], batch: int | None) -> Vectors:
        """All texts through the batcher; ``batch`` is ours to choose, so it is not looked at."""
        del batch
        stream = Stream(self._embedder.tokenize, texts, self._limits.batch_tokens, self._limits.batch_windows)
        return embed_all(self._embedder, stream, self._threads)

    def encode_together(self, texts: Sequence[str]) -> Vectors:
        """All texts in one run."""
        return self._embedder.embed([self._first(text) for text in texts])

    def tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text's first window: what the model's work is counted in."""
        return [len(self._first(text)) for text in texts]

    def _first(self, text: str) -> TokenIds:
        return np.asarray(self._embedder.tokenize(text)[0].ids)


def main() -> None:
    """Load and serve."""
    model, runtime, threads = sys.argv[1:]
    ours = Ours(model, runtime, int(threads))
    serve({**model_operations(ours), "tokens": ours.tokens})


if __name__ == "__main__":
    main()
