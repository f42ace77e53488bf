"""Models on this machine: what is known, what is pulled, and an embedder for a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.onnx.manifest import find_manifest, load_manifests
from sidecar_daemon.adapters.onnx.store import verify
from sidecar_daemon.app.runtimes import load_onnx
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.messages import LongDocuments
from sidecar_daemon.settings import installed_folder

if TYPE_CHECKING:
    from sidecar_daemon.adapters.onnx.fetch import Pulled
    from sidecar_daemon.adapters.onnx.manifest import Manifest
    from sidecar_daemon.adapters.onnx.progress import Progress
    from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
    from sidecar_daemon.domain.messages import Pipeline
    from sidecar_daemon.settings import Settings


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One known model and how its files on this machine are."""

    name: str
    model_id: str
    """Its id with the default policy for long documents."""
    description: str
    licence: str
    dimensions: int
    max_tokens: int
    sources: tuple[str, ...]
    state: str
    """``pulled``, or the reason why it cannot be used: ``model_missing``, ``model_corrupt``, ``model_outdated``."""
    detail: str
    """The folder, or one line that says what to do."""


def known_manifests(settings: Settings) -> dict[str, Manifest]:
    """The manifests that ship with us, and the user's own in the models folder, by name."""
    own = settings.model.dir
    return load_manifests(installed_folder("models"), own if own.is_dir() else None)


def manifest_of(settings: Settings, name: str) -> Manifest:
    """One manifest. Raises ``Fatal`` that lists the known names."""
    return find_manifest(known_manifests(settings), name)


def list_model_files(settings: Settings) -> list[ModelFile]:
    """Every known model, with every byte of the pulled ones checked."""
    return [model_file(settings, manifest) for manifest in known_manifests(settings).values()]


def model_file(settings: Settings, manifest: Manifest) -> ModelFile:
    """One model, with every byte of its files checked."""
    try:
        state, detail = "pulled", str(verify(manifest, settings.model.dir).folder)
    except Fatal as error:
        state, detail = error.code, str(error)
    return ModelFile(
        name=manifest.name,
        model_id=manifest.model_id(LongDocuments.MEAN),
        description=manifest.description,
        licence=manifest.licence,
        dimensions=manifest.dimensions,
        max_tokens=manifest.max_tokens,
        sources=tuple(source.kind for source in manifest.sources),
        state=state,
        detail=detail,
    )


def pull_model(settings: Settings, name: str, *, progress: Progress, source: str | None = None) -> Pulled:
    """Make a model ready on this machine; see ``adapters.onnx.fetch.pull``."""
    from sidecar_daemon.adapters.onnx.fetch import pull  # noqa: PLC0415  the hub library is slow to load

    return pull(manifest_of(settings, name), settings.model.dir, progress=progress, source=source)


def hub_serves(settings: Settings, name: str, *, seconds: float) -> bool:
    """Whether the hub would serve this model within some seconds."""
    from sidecar_daemon.adapters.onnx.hub import hub_answers  # noqa: PLC0415  the hub library is slow to load

    return hub_answers(manifest_of(settings, name), seconds)


def load_embedder(settings: Settings, pipeline: Pipeline) -> OnnxEmbedder:
    """The embedder that a pipeline names.

    Raises:
        Fatal: the model is unknown, not pulled or damaged, or the pipeline has vectors of another id.
    """
    manifest = manifest_of(settings, pipeline.model)
    check_model_id(pipeline, manifest)
    return load_onnx(manifest, settings.model)


def check_model_id(pipeline: Pipeline, manifest: Manifest) -> None:
    """Refuse a pipeline whose vectors another version of the model made. Raises ``Fatal``."""
    ours = manifest.model_id(pipeline.long_documents)
    if pipeline.model_id not in (None, ours):
        raise Fatal(
            "model_mismatch",
            f"pipeline {pipeline.name} needs model {pipeline.model_id}, this installation has {ours}: "
            "attach again to switch the pipeline, or upgrade this installation",
        )
