"""A graph in OpenVINO: bf16 where the processor multiplies in it, float32 elsewhere.

OpenVINO compiles machine code while it runs, for every shape that it meets. Two things follow: the process needs
memory that is both writable and executable, and shapes must be few (see ``padded_length``).
"""

from __future__ import annotations

import importlib
import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sidecar_daemon.adapters.onnx.graph import Precision

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}


def _imported() -> Any:
    """The package, without what reports each import to its maker over the network and writes an id into the home.

    It is written to do without either part; the second is the model converter, which alone uses the first.
    """
    for name in ("openvino_telemetry", "openvino.tools.ovc"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # documented: None makes the import fail
    package = importlib.import_module("openvino")
    # Its bindings make their tables for numpy when first asked: one thread lets go of the GIL inside a guard for which
    # another waits with the GIL held, and the process stands still for ever. Here one thread asks, under the import's
    # own lock.
    package.Tensor(np.zeros(1, dtype=np.int64)).data.sum()
    return package


openvino = _imported()


@dataclass(frozen=True, slots=True, eq=False)
class OpenvinoGraph:
    """One compiled model, with one request and one stream of one thread for each caller."""

    inputs: frozenset[str]
    precision: Precision
    _vocabulary: int | None
    """Rows of the table that token ids look up; OpenVINO itself gives an unknown id a row of zeros."""
    _requests: deque[Any]
    """Those at rest. The last one used goes first: its buffers have grown already."""

    @classmethod
    def open(cls, path: Path, threads: int, precision: Precision) -> OpenvinoGraph:
        """Compile a graph for ``threads`` callers at once. OpenVINO raises ``RuntimeError`` where it cannot."""
        core = openvino.Core()
        model = core.read_model(str(path))
        settings = {
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            # Pinned threads of two daemons, or of a daemon and its database, would share a core while another idles.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = core.compile_model(model, "CPU", settings)
        found = compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
        return cls(
            inputs=frozenset(each.get_any_name() for each in model.inputs),
            precision=Precision.BF16 if found else Precision.FP32,
            _vocabulary=_vocabulary(model),
            _requests=deque(compiled.create_infer_request() for _ in range(threads)),
        )

    def padded_length(self, tokens: int) -> int:
        """The next length of a grid of 64 up to 512: steps of 4 to 128, of 8 to 256, of 16 beyond.

        A shape met for the first time costs 5 ms and keeps 0.5 MB a stream for its compiled code. Over 12,000 batches
        of a lognormal mix of lengths, on a model of 0.8 MB, the process grew to 1.3 GB without the grid and went on
        growing; with it, it stood at 297 MB. The grid pads by 3 % of the tokens, less than the compiling costs.
        """
        step = 4 if tokens <= 128 else 8 if tokens <= 256 else 16
        return -(-tokens // step) * step

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> NDArray[Any]:
        """The first output. Raises ``IndexError`` for a token id that the graph has no row for."""
        ids = feed["input_ids"]
        if self._vocabulary is not None and not 0 <= ids.min() <= ids.max() < self._vocabulary:
            raise IndexError
        request = self._requests.pop()
        try:
            # The output is a view of the request's own memory: copied before another caller may have the request.
            return np.array(request.infer(dict(feed), share_inputs=True, share_outputs=True)[0])
        finally:
            self._requests.append(request)


def _vocabulary(model: Any) -> int | None:
    """Rows of the smallest constant table that ``input_ids`` looks up directly; None where none is found."""
    rows = []
    ids = next((each for each in model.inputs if "input_ids" in each.get_names()), None)
    readers = [target.get_node() for target in ids.get_target_inputs()] if ids is not None else []
    for node in readers:
        if node.get_type_name() == "Convert":
            readers.extend(target.get_node() for target in node.output(0).get_target_inputs())
        elif node.get_type_name() == "Gather":
            table = node.input_value(0).get_node()
            if table.get_type_name() in {"Constant", "Convert"} and table.output(0).get_partial_shape().is_static:
                rows.append(int(table.output(0).get_shape()[0]))
    return min(rows, default=None)
