"""The embedder: one onnxruntime session, shared by every thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from sidecar_daemon.adapters.onnx.pooling import normalize, pool
from sidecar_daemon.adapters.onnx.store import verify
from sidecar_daemon.adapters.onnx.tokenizer import WindowTokenizer
from sidecar_daemon.domain.errors import Fatal, Poison

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sidecar_daemon.adapters.onnx.manifest import Manifest
    from sidecar_daemon.domain.messages import LongDocuments, ModelId, TokenIds, TokenWindow, Vectors

INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


@dataclass(frozen=True, slots=True, eq=False)
class OnnxEmbedder:
    """An ``Embedder`` over an ONNX graph. Thread-safe; the GIL is free while the graph runs."""

    manifest: Manifest
    _tokenizer: WindowTokenizer
    _session: onnxruntime.InferenceSession
    _inputs: frozenset[str]
    _turns: threading.BoundedSemaphore

    @classmethod
    def load(cls, manifest: Manifest, models_dir: Path, *, threads: int) -> OnnxEmbedder:
        """Verify a pulled model and load it.

        Args:
            manifest: the model.
            models_dir: where ``models pull`` put it.
            threads: runs at once; a further caller waits for its turn, so cores and memory stay bounded.

        Raises:
            Fatal: the model is missing, damaged or outdated, or its graph has another shape than the manifest.
        """
        found = verify(manifest, models_dir)
        tokenizer = WindowTokenizer.load(found.tokenizer, max_tokens=manifest.max_tokens, prefix=manifest.prefix)
        try:
            session = onnxruntime.InferenceSession(
                str(found.graph), _session_options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # onnxruntime raises a class of its own for every status; all mean that this graph does not run here.
            raise Fatal("graph_bad", f"Model {manifest.name!r}: onnxruntime cannot load {found.graph}.") from error
        inputs = frozenset(each.name for each in session.get_inputs())
        if not {"input_ids", "attention_mask"} <= inputs <= INPUTS:
            raise Fatal(
                "graph_bad", f"Model {manifest.name!r}: graph inputs are {sorted(inputs)}; allowed: {sorted(INPUTS)}."
            )
        return cls(manifest, tokenizer, session, inputs, threading.BoundedSemaphore(threads))

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
        """Embed windows in one run, padded to the longest of them.

        Args:
            windows: token ids, each of shape ``(tokens,)``, int64.

        Returns:
            float32 of shape ``(len(windows), dimensions)``, in the order given, L2 norm 1.

        Raises:
            Poison: ``inference_failed``, or ``bad_vector`` for NaN, infinity or zero.
        """
        if not windows:
            return np.zeros((0, self.dimensions), dtype=np.float32)
        ids, mask = _padded(windows)
        vectors = self._pooled(self._run(ids, mask), mask)
        if vectors.shape != (len(windows), self.dimensions):
            raise Fatal("graph_bad", f"Model {self.manifest.name!r}: vectors of shape {vectors.shape}.")
        if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
            raise Poison("bad_vector", f"model {self.manifest.name!r} returned NaN, infinity or a zero vector")
        return vectors

    def _run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[Any]:
        feed = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self._inputs:
            feed["token_type_ids"] = np.zeros_like(ids)
        try:
            with self._turns:
                return np.asarray(self._session.run(None, feed)[0])
        except Exception as error:  # noqa: BLE001  onnxruntime has one class a status and exports none of them
            # The message may quote values, so only its kind goes on.
            kind = type(error).__name__
            raise Poison("inference_failed", f"model {self.manifest.name!r} failed on {ids.shape}: {kind}") from None

    def _pooled(self, output: NDArray[Any], mask: NDArray[np.int64]) -> Vectors:
        """Our own graphs return finished vectors; a user's graph may return token vectors."""
        if self.manifest.architecture is not None:
            return np.asarray(output, dtype=np.float32)
        vectors = pool(output, mask, self.manifest.pooling) if output.ndim == 3 else output.astype(np.float32)
        return normalize(vectors) if self.manifest.normalize else vectors


def _session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    # Two one-thread runs beat one two-thread run on two cores; the worker brings the threads.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # The arena stays on: it grows to the largest run once and is reused. Without it the process ended smaller in one
    # measurement (347-371 MB against 382-393) and much larger in another (505-544): malloc's holes are a gamble.
    options.enable_cpu_mem_arena = True
    # A memory pattern is kept for every input shape ever seen; documents have thousands of shapes.
    options.enable_mem_pattern = False
    # Only errors: warnings of the optimiser are not news to whoever reads the daemon's log.
    options.log_severity_level = 3
    return options


def _padded(windows: Sequence[TokenIds]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask, both ``(windows, longest)``. Padding is id 0; the mask says so, the id does not matter."""
    longest = max(len(window) for window in windows)
    ids = np.zeros((len(windows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window
        mask[row, : len(window)] = 1
    return ids, mask
