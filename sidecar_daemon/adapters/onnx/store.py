"""Model folders on disk: ``<models_dir>/<name>/`` with ``model.onnx``, ``tokenizer.json`` and ``lock.json``.

The lock says which inputs the graph was made from, by which exporter, and what every file must hash to. A
folder appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import Fatal

if TYPE_CHECKING:
    from pathlib import Path

    from sidecar_daemon.adapters.onnx.manifest import Manifest, PinnedFile

GRAPH = "model.onnx"
TOKENIZER = "tokenizer.json"
LOCK = "lock.json"
EXPORTER = 2
"""Raise it when the graph of ``export.py`` changes: folders of an older exporter are then exported anew."""

_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A complete, verified model on disk."""

    folder: Path
    graph: Path
    tokenizer: Path


def verify(manifest: Manifest, models_dir: Path) -> ModelFolder:
    """Check every byte of a pulled model against its lock and the lock against the manifest.

    Raises:
        Fatal: ``model_missing``, ``model_outdated`` or ``model_corrupt``; the line says which command mends it.
    """
    folder = models_dir / manifest.name
    mend = f"run: sidecar-daemon models pull {manifest.name}"
    try:
        lock = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        inputs, exporter, outputs = lock["inputs"], lock["exporter"], dict(lock["outputs"])
        hashes = {name: outputs[name] for name in (GRAPH, TOKENIZER)}
    except _NO_FILE as error:
        raise Fatal("model_missing", f"Model {manifest.name!r} is not in {models_dir}; {mend}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Fatal("model_corrupt", f"Model {manifest.name!r}: {folder / LOCK} is not readable; {mend}.") from error
    if inputs != _inputs(manifest) or exporter != _recipe(manifest):
        raise Fatal("model_outdated", f"Model {manifest.name!r} in {folder} was made for another manifest; {mend}.")
    for name, wanted in hashes.items():
        if not _intact(folder / name, wanted):
            raise Fatal("model_corrupt", f"Model {manifest.name!r}: {folder / name} is damaged or missing; {mend}.")
    return ModelFolder(folder=folder, graph=folder / GRAPH, tokenizer=folder / TOKENIZER)


def write_lock(manifest: Manifest, folder: Path) -> None:
    """Record what ``folder`` was made from and what its files hash to."""
    lock = {
        "model": manifest.name,
        "inputs": _inputs(manifest),
        "exporter": _recipe(manifest),
        "outputs": {name: sha256_of(folder / name) for name in (GRAPH, TOKENIZER)},
    }
    (folder / LOCK).write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def install(manifest: Manifest, finished: Path, models_dir: Path) -> None:
    """Move a finished folder to its place by rename. Where another pull was faster, its result stays.

    Args:
        manifest: of the model.
        finished: complete with its lock, on the same file system as ``models_dir``.
        models_dir: where models live.
    """
    target, aside = models_dir / manifest.name, finished.with_name("replaced")
    while True:
        try:
            finished.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return
        try:
            verify(manifest, models_dir)
        except Fatal:
            # What stands there is damaged or of an older manifest. Running daemons keep their open files.
            try:
                target.rename(aside)
            except FileNotFoundError:
                continue  # another pull moved it away first
            shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink()
        else:
            return


def check_sha256(manifest: Manifest, pinned: PinnedFile, path: Path, origin: str) -> None:
    """Compare a file with its pin before anything parses it. Raises ``Fatal`` naming both hashes."""
    found = sha256_of(path) if path.is_file() else "missing"
    if found != pinned.sha256:
        raise Fatal(
            "sha256_mismatch",
            f"Model {manifest.name!r}: {pinned.name} from {origin} has sha256 {found}; pinned is {pinned.sha256}.",
        )


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _intact(path: Path, wanted: str) -> bool:
    """Whether a file is there with this hash. Not asked apart: another pull may move the folder away in between."""
    try:
        return sha256_of(path) == wanted
    except _NO_FILE:
        return False


def _inputs(manifest: Manifest) -> dict[str, str]:
    """Everything that the graph and tokenizer on disk were made from, pooling and norm of the graph included."""
    shape = manifest.architecture
    return {
        "weights": manifest.weights.sha256,
        "tokenizer": manifest.tokenizer.sha256,
        "architecture": "own" if shape is None else repr(shape),
        "pooling": str(manifest.pooling),
        "normalize": str(manifest.normalize),
    }


def _recipe(manifest: Manifest) -> int:
    """The exporter's version; 0 for a user's own graph, which is copied."""
    return 0 if manifest.architecture is None else EXPORTER
