"""The runtime that the settings name, told in the log, the metrics and by ``doctor``; and its absence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from sidecar_daemon.adapters.onnx.manifest import load_manifests
from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
from sidecar_daemon.app.runtimes import choose_runtime, this_machine
from sidecar_daemon.domain.windows import combine_windows
from sidecar_daemon.settings import Runtime
from tests.command_line import Finished, ended, launch
from tests.conftest import ROOT
from tests.daemon import Daemon
from tests.rig import attach, write
from tests.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    import asyncpg


@pytest.mark.parametrize("runtime", Runtime)
async def test_a_daemon_embeds_in_the_runtime_that_it_tells(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path, runtime: Runtime
) -> None:
    await attach(connection, model="tiny", model_id=None, dimensions=32)
    texts = {number: f"text {number} " * (number % 20 + 1) for number in range(60)}
    async with Daemon(runtime_url, tiny_models, {"RUNTIME": runtime, "THREADS": "2"}) as daemon:
        await write(connection, {f"k{number}": text for number, text in texts.items()})
        await eventually(lambda: connection.fetchval("SELECT count(*) = 60 FROM docs_embeddings"))
        (told,) = (event for event in daemon.events if event["event"] == "runtime_chosen")
        metrics = (await daemon.get("/metrics")).text
    choice = choose_runtime(runtime, this_machine())
    assert (told["runtime"], told["precision"], told["reason"]) == (choice.runtime, choice.precision, choice.reason)
    assert f'sidecar_runtime_info{{precision="{choice.precision}",runtime="{choice.runtime}"}} 1.0' in metrics
    reference = OnnxEmbedder.load(load_manifests(ROOT / "models")["tiny"], tiny_models, threads=1)
    for row in await connection.fetch("SELECT id, embedding::text AS vector FROM docs_embeddings"):
        windows = reference.tokenize(texts[row["id"]])
        wanted = combine_windows(
            reference.embed([each.ids for each in windows]), [each.content_tokens for each in windows]
        )
        assert float(np.array(row["vector"].strip("[]").split(","), dtype=np.float32) @ wanted) >= 0.9999


async def without_openvino(tmp_path: Path, *arguments: str, **settings: str) -> Finished:
    """Run a command where the extra is not installed, as far as Python can tell."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['openvino'] = None\n")
    return await ended(await launch(arguments, settings, path=tmp_path))


@pytest.mark.parametrize("arguments", [("run",), ("search", "docs", "words")])
async def test_openvino_by_name_without_the_extra_is_one_clear_line(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    await attach(connection, model="tiny", model_id=None, dimensions=32)
    finished = await without_openvino(tmp_path, *arguments, DATABASE_URL=database_url, RUNTIME="openvino")
    assert finished.code == 2
    (line,) = finished.err.splitlines()
    assert "SIDECAR_RUNTIME is 'openvino'" in line
    assert "pip install 'sidecar-daemon[openvino]'" in line
    assert finished.out == ""


async def test_doctor_tells_the_runtime_and_what_it_lacks(tmp_path: Path) -> None:
    well = await ended(await launch(["doctor"], {"RUNTIME": "openvino"}))
    assert f"ok    runtime: {choose_runtime(Runtime.OPENVINO, this_machine())}: SIDECAR_RUNTIME names it" in well.out
    ill = await without_openvino(tmp_path, "doctor", RUNTIME="openvino")
    assert "fail  runtime: SIDECAR_RUNTIME is 'openvino', but the extra 'openvino' is not installed" in ill.out
    auto = await without_openvino(tmp_path, "doctor")
    assert "ok    runtime: onnxruntime in fp32: " in auto.out
