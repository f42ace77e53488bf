"""``models pull``: fetch, verify, export, lock; nothing to do when all is there."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from sidecar_daemon.adapters.onnx.export import export
from sidecar_daemon.adapters.onnx.hub import fetch_from_hub
from sidecar_daemon.adapters.onnx.index import fetch_from_index
from sidecar_daemon.adapters.onnx.manifest import FileSource, HubSource, IndexSource, SeedSource
from sidecar_daemon.adapters.onnx.progress import PullStep, Unreachable
from sidecar_daemon.adapters.onnx.seed import write_seeded
from sidecar_daemon.adapters.onnx.store import (
    GRAPH,
    TOKENIZER,
    ModelFolder,
    check_sha256,
    install,
    verify,
    write_lock,
)
from sidecar_daemon.domain.errors import Fatal, Transient

if TYPE_CHECKING:
    from sidecar_daemon.adapters.onnx.manifest import Manifest, Source
    from sidecar_daemon.adapters.onnx.progress import Progress


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull did."""

    model: str
    folder: ModelFolder
    source: str
    """``hub``, ``index``, ``seed``, ``file``, or ``present`` when there was nothing to do."""
    why: str
    """One line for people: why this source."""


def pull(manifest: Manifest, models_dir: Path, *, progress: Progress, source: str | None = None) -> Pulled:
    """Make a model ready in ``models_dir``. Safe to run at once from several processes.

    Args:
        manifest: what to pull.
        models_dir: created when it is missing.
        progress: told of every step.
        source: ``hub`` or ``index`` to take that one only; None for the manifest's order, going on to the next
            only where the network says no.

    Raises:
        Transient: no source can be reached.
        Fatal: a hash is wrong, a source refuses, the export extra is missing, or the manifest lacks the source.
    """
    candidates = [each for each in manifest.sources if source in (None, each.kind)]
    if not candidates:
        known = ", ".join(each.kind for each in manifest.sources)
        raise Fatal("source_unknown", f"Model {manifest.name!r} has no source {source!r}; it has: {known}.")
    try:
        present = verify(manifest, models_dir)
    except Fatal:
        pass  # missing, outdated or damaged: this pull mends it
    else:
        return Pulled(manifest.name, present, "present", "all files are there and verified")
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{manifest.name}-", dir=models_dir) as scratch:
            used, why = _make(manifest, candidates, Path(scratch), progress)
            install(manifest, Path(scratch) / "finished", models_dir)
    except OSError as error:
        raise Fatal("models_dir", f"Cannot write models to {models_dir}: {error.strerror or error}.") from error
    return Pulled(manifest.name, verify(manifest, models_dir), used, why)


def _make(manifest: Manifest, candidates: list[Source], scratch: Path, progress: Progress) -> tuple[str, str]:
    """Build the finished folder from the first source that can be reached. Returns its kind and why."""
    refusals: list[str] = []
    for number, candidate in enumerate(candidates):
        fetched = scratch / f"fetched-{number}"
        fetched.mkdir()
        try:
            files = _fetch(manifest, candidate, fetched, progress)
        except Unreachable as refusal:
            refusals.append(f"{candidate.kind}: {refusal}")
            continue
        for pinned in (manifest.weights, manifest.tokenizer):
            progress(PullStep(manifest.name, "verifying", pinned.name))
            check_sha256(manifest, pinned, files[pinned.name], f"source {candidate.kind!r}")
        _finish(manifest, files, scratch / "finished", progress)
        why = f"not from {'; '.join(refusals)}" if refusals else "the first source to try"
        return candidate.kind, why
    raise Transient("model_unreachable", f"Model {manifest.name!r} cannot be fetched: {'; '.join(refusals)}.")


def _fetch(manifest: Manifest, source: Source, folder: Path, progress: Progress) -> dict[str, Path]:
    """Unverified files by name."""
    if isinstance(source, HubSource):
        return fetch_from_hub(manifest, source, progress)
    if isinstance(source, IndexSource):
        return fetch_from_index(manifest, source, folder, progress)
    if isinstance(source, SeedSource):
        write_seeded(manifest, source.seed, folder)
        return {file.name: folder / file.name for file in (manifest.weights, manifest.tokenizer)}
    if isinstance(source, FileSource):
        return {file.name: source.folder / file.name for file in (manifest.weights, manifest.tokenizer)}
    assert_never(source)


def _finish(manifest: Manifest, files: dict[str, Path], finished: Path, progress: Progress) -> None:
    """Export (or copy a user's own graph), copy the tokenizer, lock."""
    finished.mkdir()
    progress(PullStep(manifest.name, "exporting", GRAPH))
    if manifest.architecture is None:
        shutil.copyfile(files[manifest.weights.name], finished / GRAPH)
    else:
        export(manifest, files[manifest.weights.name], finished / GRAPH)
    shutil.copyfile(files[manifest.tokenizer.name], finished / TOKENIZER)
    write_lock(manifest, finished)
