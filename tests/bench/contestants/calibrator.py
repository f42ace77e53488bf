"""A matrix product whose speed says how much of the machine is there right now. Threads by ``OPENBLAS_NUM_THREADS``."""

from __future__ import annotations

import statistics
import time

import numpy as np

from tests.bench.contestants.wire import serve

SIZE = 1024


def product(seconds: float) -> dict[str, float]:
    """GFLOP/s of fp32 products of ``SIZE`` squared within ``seconds``: the median, and the best."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((SIZE, SIZE), dtype=np.float32) for _ in range(2))
    result = left @ right  # the first one wakes the threads
    found: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not found:
        started = time.perf_counter()
        np.matmul(left, right, out=result)
        found.append(2 * SIZE**3 / (time.perf_counter() - started) / 1e9)
    return {"median": statistics.median(found), "best": max(found)}


if __name__ == "__main__":
    serve({"product": product})
