"""What runs an ONNX graph: one interface, one module a runtime, imported only where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Precision(StrEnum):
    """What a runtime multiplies in. Sums are float32 either way."""

    FP32 = "fp32"
    BF16 = "bf16"


class Graph(Protocol):
    """A loaded graph. Thread-safe for as many callers at once as it was opened for; the GIL is free while it runs."""

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the inputs."""

    @property
    def precision(self) -> Precision:
        """What it really runs in."""

    def padded_length(self, tokens: int) -> int:
        """The length that windows of at most ``tokens`` ids are best padded to."""

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> NDArray[Any]:
        """The first output. Raises whatever the runtime raises."""


OpenGraph = Callable[[Path, int], Graph]
"""Opens a graph for a number of callers at once. Raises whatever the runtime raises where it cannot run the graph."""
