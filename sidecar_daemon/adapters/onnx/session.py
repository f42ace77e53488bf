"""The embedder: tokenizer, one graph in one runtime, pooling; shared by every thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sidecar_daemon.adapters.onnx.graph import Precision
from sidecar_daemon.adapters.onnx.pooling import normalize, pool
from sidecar_daemon.adapters.onnx.store import verify
from sidecar_daemon.adapters.onnx.tokenizer import WindowTokenizer
from sidecar_daemon.domain.errors import Fatal, Poison

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sidecar_daemon.adapters.onnx.graph import Graph, OpenGraph
    from sidecar_daemon.adapters.onnx.manifest import Manifest
    from sidecar_daemon.domain.messages import LongDocuments, ModelId, TokenIds, TokenWindow, Vectors

INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


@dataclass(frozen=True, slots=True, eq=False)
class OnnxEmbedder:
    """An ``Embedder`` over an ONNX graph. Thread-safe; the GIL is free while the graph runs."""

    manifest: Manifest
    _tokenizer: WindowTokenizer
    _graph: Graph
    _turns: threading.BoundedSemaphore

    @classmethod
    def load(
        cls, manifest: Manifest, models_dir: Path, *, threads: int, open_graph: OpenGraph | None = None
    ) -> OnnxEmbedder:
        """Verify a pulled model and load it.

        Args:
            manifest: the model.
            models_dir: where ``models pull`` put it.
            threads: runs at once; a further caller waits for its turn, so cores and memory stay bounded.
            open_graph: of the runtime; None: onnxruntime.

        Raises:
            Fatal: the model is missing, damaged or outdated, or its graph has another shape than the manifest.
        """
        found = verify(manifest, models_dir)
        tokenizer = WindowTokenizer.load(found.tokenizer, max_tokens=manifest.max_tokens, prefix=manifest.prefix)
        try:
            graph = (open_graph or _open_in_onnxruntime)(found.graph, threads)
        except Exception as error:
            # Every runtime has classes of its own; all mean that this graph does not run here.
            raise Fatal("graph_bad", f"Model {manifest.name!r}: the runtime cannot load {found.graph}.") from error
        if not {"input_ids", "attention_mask"} <= graph.inputs <= INPUTS:
            raise Fatal(
                "graph_bad",
                f"Model {manifest.name!r}: graph inputs are {sorted(graph.inputs)}; allowed: {sorted(INPUTS)}.",
            )
        return cls(manifest, tokenizer, graph, threading.BoundedSemaphore(threads))

    @property
    def precision(self) -> Precision:
        """What the graph runs in."""
        return self._graph.precision

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return self.manifest.dimensions

    def model_id(self, long_documents: LongDocuments) -> ModelId:
        """The id of this model under a policy for long documents."""
        return self.manifest.model_id(long_documents)

    def tokenize(self, text: str) -> list[TokenWindow]:
        """Split a text into windows of at most ``max_tokens`` ids. Raises ``Poison`` for invalid Unicode."""
        return self._tokenizer.windows(text)

    def embed(self, windows: Sequence[TokenIds]) -> Vectors:
        """Embed windows in one run, padded to the longest of them, or a little more where the runtime wants it.

        Args:
            windows: token ids, each of shape ``(tokens,)``, int64.

        Returns:
            float32 of shape ``(len(windows), dimensions)``, in the order given, L2 norm 1.

        Raises:
            Poison: ``inference_failed``, or ``bad_vector`` for NaN, infinity or zero.
        """
        if not windows:
            return np.zeros((0, self.dimensions), dtype=np.float32)
        ids, mask = _padded(windows, self._length(max(len(window) for window in windows)))
        vectors = self._pooled(self._run(ids, mask), mask)
        if vectors.shape != (len(windows), self.dimensions):
            raise Fatal("graph_bad", f"Model {self.manifest.name!r}: vectors of shape {vectors.shape}.")
        if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
            raise Poison("bad_vector", f"model {self.manifest.name!r} returned NaN, infinity or a zero vector")
        return vectors

    def _length(self, longest: int) -> int:
        """The runtime's choice; the model knows no position from ``max_tokens`` on."""
        return max(longest, min(self._graph.padded_length(longest), self.manifest.max_tokens))

    def _run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[Any]:
        feed = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self._graph.inputs:
            feed["token_type_ids"] = np.zeros_like(ids)
        try:
            with self._turns:
                return self._graph.run(feed)
        except MemoryError:
            raise  # the machine's, not the text's: the process ends, and what was under way comes back as a suspect
        except Exception as error:  # noqa: BLE001  every runtime has classes of its own
            # The message may quote values, so only its kind goes on.
            kind = type(error).__name__
            raise Poison("inference_failed", f"model {self.manifest.name!r} failed on {ids.shape}: {kind}") from None

    def _pooled(self, output: NDArray[Any], mask: NDArray[np.int64]) -> Vectors:
        """Our own graphs return finished vectors; a user's graph may return token vectors."""
        vectors = pool(output, mask, self.manifest.pooling) if output.ndim == 3 else output.astype(np.float32)
        # A norm that was taken in bf16 is 1 within 0.4 % only.
        finished = self.manifest.architecture is not None and self.precision is Precision.FP32
        return normalize(vectors) if self.manifest.normalize and not finished else vectors


def _open_in_onnxruntime(path: Path, threads: int) -> Graph:
    from sidecar_daemon.adapters.onnx.onnxruntime_graph import OnnxruntimeGraph  # noqa: PLC0415  slow to load

    return OnnxruntimeGraph.open(path, threads)


def _padded(windows: Sequence[TokenIds], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask, both ``(windows, length)``. Padding is id 0; the mask says so, the id does not matter."""
    ids = np.zeros((len(windows), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window
        mask[row, : len(window)] = 1
    return ids, mask
