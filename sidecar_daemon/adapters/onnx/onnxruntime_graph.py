"""A graph in onnxruntime: float32 on every processor, kernels compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from sidecar_daemon.adapters.onnx.graph import Precision

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class OnnxruntimeGraph:
    """One session, shared by every thread."""

    inputs: frozenset[str]
    precision: Precision
    _session: onnxruntime.InferenceSession

    @classmethod
    def open(cls, path: Path, threads: int) -> OnnxruntimeGraph:
        """Load a graph. Any number of threads may run it. onnxruntime raises a class of its own for every status."""
        del threads
        session = onnxruntime.InferenceSession(str(path), _session_options(), providers=["CPUExecutionProvider"])
        return cls(frozenset(each.name for each in session.get_inputs()), Precision.FP32, session)

    def padded_length(self, tokens: int) -> int:
        """The longest window's own length: any shape costs the same here."""
        return tokens

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> NDArray[Any]:
        """The first output."""
        return np.asarray(self._session.run(None, dict(feed))[0])


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
