"""Embedders for the contract suite: every runtime. The real model is pulled once into a folder that git ignores."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.graph import Precision
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from sidecar_daemon.adapters.onnx.onnxruntime_graph import OnnxruntimeGraph
from sidecar_daemon.adapters.onnx.openvino_graph import OpenvinoGraph
from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
from sidecar_daemon.app.runtimes import this_machine
from tests.deterministic import DeterministicEmbedder

if TYPE_CHECKING:
    from sidecar_daemon.adapters.onnx.graph import OpenGraph
    from sidecar_daemon.ports import Embedder

ROOT = Path(__file__).parents[2]
RUNTIMES: dict[str, OpenGraph] = {
    "onnxruntime": OnnxruntimeGraph.open,
    "openvino-fp32": partial(OpenvinoGraph.open, precision=Precision.FP32),
}
"""Everything that this machine can compute in."""
if this_machine().bf16:
    RUNTIMES["openvino-bf16"] = partial(OpenvinoGraph.open, precision=Precision.BF16)


@cache
def onnx_embedder(name: str, runtime: str) -> OnnxEmbedder:
    manifest = load_manifests(ROOT / "models")[name]
    models_dir = ROOT / ".sidecar" / "models"
    pull(manifest, models_dir, progress=lambda _: None)
    return OnnxEmbedder.load(manifest, models_dir, threads=2, open_graph=RUNTIMES[runtime])


@pytest.fixture(scope="session", params=RUNTIMES)
def minilm(request: pytest.FixtureRequest) -> OnnxEmbedder:
    """The trained model in every runtime."""
    return onnx_embedder("all-minilm-l6-v2", request.param)


@pytest.fixture(
    scope="session",
    params=[(name, runtime) for name in ("tiny", "all-minilm-l6-v2") for runtime in RUNTIMES] + [None],
    ids=lambda parameter: "deterministic" if parameter is None else "-".join(parameter),
)
def embedder(request: pytest.FixtureRequest) -> Embedder:
    """Every embedder that there is."""
    return DeterministicEmbedder() if request.param is None else onnx_embedder(*request.param)
