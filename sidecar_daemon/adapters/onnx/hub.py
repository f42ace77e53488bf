"""Model files from the Hugging Face hub, through its own library: mirrors, cache and offline mode are its business."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import tqdm

from sidecar_daemon.adapters.onnx.manifest import HubSource
from sidecar_daemon.adapters.onnx.progress import PullStep, Unreachable
from sidecar_daemon.adapters.onnx.store import sha256_of
from sidecar_daemon.domain.errors import Fatal

if TYPE_CHECKING:
    from sidecar_daemon.adapters.onnx.manifest import Manifest, PinnedFile
    from sidecar_daemon.adapters.onnx.progress import Progress


def fetch_from_hub(manifest: Manifest, source: HubSource, progress: Progress) -> dict[str, Path]:
    """Fetch the weights and the tokenizer at the pinned commit into the hub library's cache.

    A dropped connection resumes where it broke; files that are already in the cache are not fetched again.

    Returns:
        Paths by file name, not yet verified.

    Raises:
        Unreachable: the hub does not answer, or offline mode is on and the cache lacks a file.
        Fatal: the hub answers and refuses.
    """
    return {file.name: _fetch(manifest, source, file, progress) for file in (manifest.weights, manifest.tokenizer)}


def hub_answers(manifest: Manifest, timeout: float) -> bool:
    """Whether the hub (or its mirror) would serve this model now.

    Args:
        manifest: a model; one without a hub source never answers.
        timeout: seconds for one request; there is no second try.
    """
    for source in manifest.sources:
        if isinstance(source, HubSource):
            url = huggingface_hub.hf_hub_url(source.repository, manifest.weights.name, revision=source.revision)
            try:
                found = huggingface_hub.get_hf_file_metadata(url, timeout=timeout)
            except Exception:  # noqa: BLE001  a probe: whatever goes wrong, the answer is no
                return False
            return found.commit_hash == source.revision
    return False


def _fetch(manifest: Manifest, source: HubSource, file: PinnedFile, progress: Progress) -> Path:
    cached = huggingface_hub.try_to_load_from_cache(source.repository, file.name, revision=source.revision)
    if isinstance(cached, str):
        progress(PullStep(manifest.name, "verifying", file.name))
        if sha256_of(Path(cached)) == file.sha256:
            return Path(cached)
    # What lies in the cache and is not what the manifest pins broke on this disk: it is fetched anew.
    broken = isinstance(cached, str)
    try:
        if not constants.is_offline_mode():
            # The library asks a silent hub for half a minute; one refused question is enough to try elsewhere.
            url = huggingface_hub.hf_hub_url(source.repository, file.name, revision=source.revision)
            huggingface_hub.get_hf_file_metadata(url)
        return Path(
            huggingface_hub.hf_hub_download(
                source.repository,
                file.name,
                revision=source.revision,
                force_download=broken,
                tqdm_class=_bar(manifest, file, progress),
            )
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status in {408, 429}:
            raise Unreachable(f"the hub answers with status {status}") from error
        raise Fatal(
            "hub_refused",
            f"The hub refuses {file.name} of {source.repository} at {source.revision[:12]} with status {status}.",
        ) from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT}:
            raise Fatal("hub_cache", f"The hub library's cache cannot be written: {error.strerror}.") from error
        raise _unreachable(error) from error
    except Exception as error:
        # The library's HTTP client, and so its network errors, change from version to version.
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> Unreachable:
    if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
        return Unreachable("the hub library is in offline mode and its cache lacks the file")
    return Unreachable(f"the hub does not answer ({type(error).__name__})")


def _bar(manifest: Manifest, file: PinnedFile, progress: Progress) -> Any:
    """A silent bar that passes on what the library tells its bars."""

    class Reporter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._bytes, self._all = int(options.get("initial") or 0), options.get("total")
            options["disable"] = True
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]  # the library does not type its bar

        def update(self, n: float | None = 1) -> None:
            self._bytes += int(n or 0)
            progress(PullStep(manifest.name, "downloading", file.name, self._bytes, self._all))

    return Reporter
