"""Makes the ``tiny`` model from a seed: random weights and a small WordPiece tokenizer, the same bytes everywhere.

The vectors mean nothing. They are real in every other way: the same files, exporter, tokenizer and session
as a trained model, in milliseconds and without a network. Bytes come from SHAKE-256 and from plain JSON, not
from a library's generator, so that the pinned hashes hold for every version of every library.
"""

from __future__ import annotations

import hashlib
import json
import string
from typing import TYPE_CHECKING

import numpy as np

from sidecar_daemon.domain.errors import Fatal

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from sidecar_daemon.adapters.onnx.manifest import Architecture, Manifest

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_seeded(manifest: Manifest, seed: str, folder: Path) -> None:
    """Write the weights and the tokenizer of a seeded model into ``folder``."""
    if manifest.architecture is None:
        raise Fatal("manifest_bad", f"Model {manifest.name!r}: a seeded model needs an architecture.")
    weights = {name: _values(seed, name, shape) for name, shape in tensor_shapes(manifest.architecture).items()}
    (folder / manifest.weights.name).write_bytes(_safetensors(weights))
    (folder / manifest.tokenizer.name).write_text(_tokenizer(manifest.architecture.vocabulary), encoding="utf-8")


def tensor_shapes(shape: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a BERT encoder by its usual name, with its shape; linear weights are ``(out, in)``."""
    hidden, inner = shape.hidden, shape.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (shape.vocabulary, hidden),
        "embeddings.position_embeddings.weight": (shape.positions, hidden),
        "embeddings.token_type_embeddings.weight": (shape.token_types, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    linear = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "attention.output.LayerNorm": (hidden,),
        "intermediate.dense": (inner, hidden),
        "output.dense": (hidden, inner),
        "output.LayerNorm": (hidden,),
    }
    for layer in range(shape.layers):
        for name, size in linear.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = size
            shapes[f"encoder.layer.{layer}.{name}.bias"] = size[:1]
    return shapes


def _values(seed: str, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Uniform values by SHAKE-256 of seed and name; layer norms lie around 1 and 0 so that signals keep their size."""
    count = int(np.prod(shape))
    raw = np.frombuffer(hashlib.shake_256(f"{seed}/{name}".encode()).digest(4 * count), dtype="<u4")
    unit = (raw >> 8).astype(np.float32) / np.float32(2**23) - np.float32(1)
    if name.endswith("LayerNorm.weight"):
        return np.asarray(1 + unit / 8, dtype=np.float32).reshape(shape)
    scale = np.float32(1 / 8) if name.endswith("bias") else np.float32(1 / 4)
    return np.asarray(unit * scale, dtype=np.float32).reshape(shape)


def _safetensors(tensors: dict[str, NDArray[np.float32]]) -> bytes:
    """The safetensors format by hand: header length, JSON header, bytes. Any version reads the same file."""
    header, offset = {}, 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(tensors[name].astype("<f4").tobytes() for name in sorted(tensors))
    return len(text).to_bytes(8, "little") + text + body


def _tokenizer(vocabulary: int) -> str:
    """A lower-casing WordPiece tokenizer: single ASCII characters, then pairs of letters until it is full."""
    plain = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*SPECIAL, *plain, *(f"##{each}" for each in plain)]
    pairs = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    pieces += [mark + pair for pair in pairs for mark in ("", "##")]
    if not len(SPECIAL) < vocabulary <= len(pieces):
        raise Fatal("manifest_bad", f"A seeded vocabulary has 6 to {len(pieces)} pieces, not {vocabulary}.")
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    cls, sep = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": number, "content": token, **special} for number, token in enumerate(SPECIAL)],
            "normalizer": {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": True,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", sep], "cls": ["[CLS]", cls]},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {
                "type": "WordPiece",
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": {piece: number for number, piece in enumerate(pieces[:vocabulary])},
            },
        },
        sort_keys=True,
    )
