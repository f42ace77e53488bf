"""Embedders for the contract suite. The real model is pulled once into a folder that git ignores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
from tests.deterministic import DeterministicEmbedder

if TYPE_CHECKING:
    from sidecar_daemon.ports import Embedder

ROOT = Path(__file__).parents[2]


def onnx_embedder(name: str) -> OnnxEmbedder:
    manifest = load_manifests(ROOT / "models")[name]
    models_dir = ROOT / ".sidecar" / "models"
    pull(manifest, models_dir, progress=lambda _: None)
    return OnnxEmbedder.load(manifest, models_dir, threads=2)


@pytest.fixture(scope="session")
def minilm() -> OnnxEmbedder:
    return onnx_embedder("all-minilm-l6-v2")


@pytest.fixture(scope="session", params=["tiny", "all-minilm-l6-v2", "deterministic"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    if request.param == "deterministic":
        return DeterministicEmbedder()
    if request.param == "tiny":
        return onnx_embedder("tiny")
    real: OnnxEmbedder = request.getfixturevalue("minilm")
    return real
