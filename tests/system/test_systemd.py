"""The units, held against systemd's own tools, and the daemon under the rules that they put into the kernel."""

from __future__ import annotations

import difflib
import errno
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT
from tests.daemon import Daemon
from tests.rig import attach, write
from tests.system.tools import tool
from tests.waiting import eventually

if TYPE_CHECKING:
    import asyncpg

UNITS = ROOT / "systemd"
PLAIN, TEMPLATE = UNITS / "sidecar-daemon.service", UNITS / "sidecar-daemon@.service"
PYTHON = "/opt/sidecar-daemon/bin/python"
MOST_EXPOSED = 15
"""Tenths of systemd's exposure level."""
REFUSALS = f"""
import mmap, os, socket
for attempt in (
    lambda: os.nice(1),
    lambda: os.chroot("/tmp"),
    lambda: os.chown("/tmp", 0, 0),
    lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    lambda: mmap.mmap(-1, 4096, prot={mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC}),
):
    try:
        attempt()
        print(0)
    except OSError as error:
        print(error.errno)
"""
"""What the rules must refuse. The first four need no privilege, or the tests have it."""


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [tool("systemd-analyze"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def exposure(unit: Path) -> subprocess.CompletedProcess[str]:
    return analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", unit)


@pytest.fixture(params=[PLAIN, TEMPLATE], ids=["unit", "template"])
def unit(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def changed(unit: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of a unit with another text in it."""
    text = unit.read_text()
    assert old in text
    copy = folder / unit.name
    copy.write_text(text.replace(old, new))
    return copy


def test_a_unit_is_understood(unit: Path, tmp_path: Path) -> None:
    installed = changed(unit, tmp_path, PYTHON, sys.executable)
    run = analyze("verify", installed)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")
    installed.write_text(installed.read_text() + "\n[Service]\nWatchdogSeconds=60\n")
    assert "WatchdogSeconds" in analyze("verify", installed).stderr


def test_a_unit_is_hardly_exposed(unit: Path, tmp_path: Path) -> None:
    run = exposure(unit)
    assert run.returncode == 0, run.stdout
    level = re.search(r"Overall exposure level for \S+ ([\d.]+)", run.stdout)
    assert level is not None
    assert float(level[1]) <= MOST_EXPOSED / 10
    assert exposure(changed(unit, tmp_path, "\nSystemCallFilter=", "\n#")).returncode != 0


def test_the_template_is_the_unit_but_for_what_an_instance_has_of_its_own() -> None:
    plain, template = (
        [line for line in path.read_text().splitlines() if not line.startswith("#")] for path in (PLAIN, TEMPLATE)
    )
    differ = [line for line in difflib.ndiff(plain, template) if line[0] in "+-" and line[1:].strip()]
    assert sorted(differ) == [
        "+ Description=sidecar-daemon %i: keeps embeddings in Postgres true and fresh",
        "+ EnvironmentFile=/etc/sidecar-daemon/%i.environment",
        "+ RuntimeDirectory=sidecar-daemon-%i",
        "+ WorkingDirectory=%t/sidecar-daemon-%i",
        "- Description=sidecar-daemon: keeps embeddings in Postgres true and fresh",
        "- RuntimeDirectory=sidecar-daemon",
        "- WorkingDirectory=%t/sidecar-daemon",
    ]


def test_the_rules_of_a_unit_refuse(unit: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.system.sandboxed", sys.executable, "-c", REFUSALS],
        env={**os.environ, "SANDBOX_UNIT": str(unit)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout.split(), run.stderr) == ([str(errno.EPERM)] * 5, "")


@pytest.mark.parametrize("memory", ["yes", "no"])
def test_openvino_runs_under_the_rules_of_a_unit_that_lets_it_compile(
    unit: Path, tiny_models: Path, tmp_path: Path, memory: str
) -> None:
    """With the unit as it is, it is refused by name; with the drop-in that the unit names, it runs."""
    line = "MemoryDenyWriteExecute=yes"
    sandbox = changed(unit, tmp_path, line, line.replace("yes", memory))
    code = f"""
from pathlib import Path
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from sidecar_daemon.app.runtimes import load_onnx
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.settings import ModelSettings, Runtime
manifest = load_manifests(Path("models"))["tiny"]
for runtime in ("auto", "openvino"):
    try:
        embedder = load_onnx(manifest, ModelSettings(Path({str(tiny_models)!r}), Runtime(runtime), 2))
        print(runtime, embedder.embed([embedder.tokenize("one")[0].ids]).shape)
    except Fatal as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-m", "tests.system.sandboxed", sys.executable, "-c", code],
        env={**os.environ, "SANDBOX_UNIT": str(sandbox)},
        capture_output=True,
        text=True,
        check=False,
    )
    by_name = (
        "openvino (1, 32)"
        if memory == "no"
        else "SIDECAR_RUNTIME is 'openvino', but memory may not be writable and executable here: "
        "under systemd set MemoryDenyWriteExecute=no, or set it to auto"
    )
    assert (run.stdout.splitlines(), run.stderr) == (["auto (1, 32)", by_name], "")


async def test_the_daemon_works_under_the_rules_of_its_unit(
    connection: asyncpg.Connection, runtime_url: str, tiny_models: Path, unit: Path
) -> None:
    """Loads a real model with onnxruntime, serves its endpoints, embeds, listens and drains."""
    await attach(connection, model="tiny", model_id=None, dimensions=32)
    daemon = Daemon(
        runtime_url,
        tiny_models,
        {"THREADS": "2"},
        module="tests.system.sandboxed",
        variables={"SANDBOX_UNIT": str(unit)},
    )
    async with daemon:
        await write(connection, {f"k{n}": f"text {n} " * n for n in range(1, 100)})
        await eventually(lambda: connection.fetchval("SELECT count(*) = 99 FROM docs_embeddings"))
        assert (await daemon.get("/metrics")).status_code == 200
        assert await daemon.terminate() == 0
    assert not [event for event in daemon.events if event["level"] not in ("info", "debug")], daemon.log
