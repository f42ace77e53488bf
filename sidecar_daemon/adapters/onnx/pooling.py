"""Pooling in plain numpy, for a user's own ONNX graph that returns token vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sidecar_daemon.adapters.onnx.manifest import Pooling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sidecar_daemon.domain.messages import Vectors


def pool(states: NDArray[Any], mask: NDArray[np.int64], pooling: Pooling) -> Vectors:
    """Token vectors to one vector a row.

    Args:
        states: ``(batch, tokens, dimensions)``, any float type.
        mask: ``(batch, tokens)``, 1 for real tokens and 0 for padding.
        pooling: the first token, or the mean over the real ones.

    Returns:
        float32 of shape ``(batch, dimensions)``, not normalised. Padding never counts, whatever lies there.
    """
    if pooling is Pooling.CLS:
        return np.asarray(states[:, 0], dtype=np.float32)
    # Not a product with the mask: 0 times the NaN that some graphs leave in padding is NaN.
    real = np.where(mask[:, :, None] == 1, states, 0).astype(np.float32)
    counts = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return np.asarray(real.sum(axis=1) / counts, dtype=np.float32)


def normalize(vectors: Vectors) -> Vectors:
    """Each row over its L2 norm; a zero row stays zero. float32 ``(batch, dimensions)`` in and out."""
    # Infinity over infinity is NaN without a warning: the session refuses both.
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(norms > 0, norms, 1), dtype=np.float32)
