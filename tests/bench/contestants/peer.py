"""Peers as themselves: fastembed, and sentence-transformers on torch and on ONNX. Imports nothing of ours but ``wire``.

``python -m tests.bench.contestants.peer KIND FOLDER THREADS`` with the Python of their own environment. KIND is
``fastembed``, ``torch-fp32``, ``torch-bf16`` or ``onnx``; FOLDER holds the model as that library wants it. Nothing is
fetched: everything lies in the folder.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.contestants.wire import model_operations, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FASTEMBED_NAME = "bench/custom"


class FastEmbed:
    """fastembed with our exported graph as a custom local model."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Register the folder as a model, as fastembed's documentation shows, and load it."""
        fastembed = importlib.import_module("fastembed")
        described = importlib.import_module("fastembed.common.model_description")
        fastembed.TextEmbedding.add_custom_model(
            model=FASTEMBED_NAME,
            pooling=described.PoolingType.DISABLED,  # pooling and norm are in the graph
            normalization=False,
            sources=described.ModelSource(hf=FASTEMBED_NAME),  # demanded, never asked: the path below is specific
            dim=384,
            model_file="model.onnx",
        )
        self._model = fastembed.TextEmbedding(FASTEMBED_NAME, threads=threads, specific_model_path=str(folder))

    def about(self) -> dict[str, Any]:
        """Versions."""
        return {"precision": "fp32", "versions": _versions("fastembed", "onnxruntime", "tokenizers")}

    def encode(self, texts: Sequence[str], batch: int | None) -> Any:
        """In batches of 256 unless told otherwise, in the order of the texts: its default."""
        numpy = importlib.import_module("numpy")
        options = {} if batch is None else {"batch_size": batch}
        return numpy.stack(list(self._model.embed(list(texts), **options)))

    def encode_together(self, texts: Sequence[str]) -> Any:
        """In one batch."""
        return self.encode(texts, len(texts))


class SentenceTransformers:
    """sentence-transformers; it sorts by length itself."""

    def __init__(self, folder: Path, threads: int, kind: str) -> None:
        """Load the folder on torch in fp32 or bf16, or on the ONNX backend."""
        torch = importlib.import_module("torch")
        torch.set_num_threads(threads)
        self._kind = kind
        library = importlib.import_module("sentence_transformers")
        if kind == "onnx":
            self._model = _onnx_model(library, folder, threads)
        else:
            options = {"dtype": torch.bfloat16} if kind == "torch-bf16" else {}
            self._model = library.SentenceTransformer(str(folder), device="cpu", model_kwargs=options)
        self._model.max_seq_length = 512

    def about(self) -> dict[str, Any]:
        """Versions."""
        names = ("sentence-transformers", "torch", "transformers", "optimum-onnx", "onnxruntime")
        return {"precision": "bf16" if self._kind == "torch-bf16" else "fp32", "versions": _versions(*names)}

    def encode(self, texts: Sequence[str], batch: int | None) -> Any:
        """In batches of 32 unless told otherwise: its default."""
        options = {} if batch is None else {"batch_size": batch}
        numpy = importlib.import_module("numpy")
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False, **options)
        return numpy.asarray(vectors, dtype="float32")

    def encode_together(self, texts: Sequence[str]) -> Any:
        """In one batch."""
        return self.encode(texts, len(texts))


def _onnx_model(library: Any, folder: Path, threads: int) -> Any:
    """The ONNX backend exports the model itself at the first load; the export is kept beside the folder."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    exported = folder.with_name(f"{folder.name}-onnx")
    if not (exported / "modules.json").exists():
        draft = folder.with_name(f"{folder.name}-onnx.draft")
        library.SentenceTransformer(str(folder), backend="onnx").save_pretrained(str(draft))
        draft.rename(exported)
    return library.SentenceTransformer(
        str(exported),
        backend="onnx",
        model_kwargs={"provider": "CPUExecutionProvider", "session_options": options},
    )


def peak(dtype: str, seconds: float, size: int = 1024) -> dict[str, float]:
    """GFLOP/s of torch's matrix product, best of all within ``seconds``: the peak that P2 divides by in bf16."""
    torch = importlib.import_module("torch")
    left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(left, right)
        best = max(best, 2 * size**3 / (time.perf_counter() - started) / 1e9)
    return {"gflops": best}


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Load and serve."""
    kind, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    peer: FastEmbed | SentenceTransformers
    peer = FastEmbed(folder, threads) if kind == "fastembed" else SentenceTransformers(folder, threads, kind)
    operations: dict[str, Callable[..., Any]] = model_operations(peer)
    serve({**operations, "peak": peak} if kind.startswith("torch") else operations)


if __name__ == "__main__":
    main()
