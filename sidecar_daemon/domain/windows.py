"""From the vectors of a long document's windows to one vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import Vector, Vectors


def combine_windows(vectors: Vectors, weights: Sequence[int]) -> Vector:
    """The mean of window vectors weighted by their content tokens, L2 normalised.

    Args:
        vectors: float32 of shape ``(windows, dimensions)``, at least one row.
        weights: content tokens of each window; where all are 0 (an empty text), windows count alike.

    Returns:
        float32 of shape ``(dimensions,)``, L2 norm 1. A mean of exactly 0 stays 0: the caller refuses it.

    Raises:
        ValueError: no window, weights of another length, or a negative weight.
    """
    if len(vectors) == 0 or len(vectors) != len(weights) or min(weights) < 0:
        raise ValueError(f"{len(vectors)} windows need as many weights of 0 or more, not {list(weights)}")
    if len(vectors) == 1:
        return np.asarray(vectors[0], dtype=np.float32)
    # In double precision: a thousand windows must not drift from the reference.
    shares = np.asarray(weights, dtype=np.float64)
    if not shares.any():
        shares = np.ones_like(shares)
    mean = shares @ vectors.astype(np.float64) / shares.sum()
    norm = float(np.linalg.norm(mean))
    return np.asarray(mean / norm if norm > 0 else mean, dtype=np.float32)
