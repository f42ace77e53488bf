"""The README is true: its commands are run here as they stand, its table of settings is the program's."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from typing import TYPE_CHECKING

import asyncpg
import pytest

from sidecar_daemon.settings.environment import Environment
from tests.conftest import ROOT
from tests.daemon import free_port
from tests.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.long

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = ROOT / ".sidecar" / "models"


def commands(section: str) -> list[str]:
    """The commands between ``<!-- commands:section -->`` and its end."""
    found = re.search(rf"<!-- commands:{section} -->(.*?)<!-- /commands -->", README, re.DOTALL)
    assert found, f"README has no commands:{section}"
    lines = [line.removeprefix("$ ") for line in found[1].splitlines() if line.startswith("$ ")]
    assert lines
    return lines


def shell_environment(folder: Path, database_url: str) -> dict[str, str]:
    """A shell with nothing of ours but the command on its path, made from this very interpreter."""
    command = folder / "sidecar-daemon"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sidecar_daemon "$@"\n')
    command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SIDECAR_")}
    return kept | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SIDECAR_DATABASE_URL": database_url,
        "SIDECAR_MODELS_DIR": str(MODELS),
        "SIDECAR_HTTP_PORT": str(free_port()),
        "SIDECAR_POLL_MAX": "0.5",
    }


async def run(command: str, environment: dict[str, str]) -> str:
    process = await asyncio.create_subprocess_shell(
        command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, f"{command} ended with {process.returncode}: {output.decode()}"
    return output.decode()


async def test_attach_your_own_table_in_five_lines(tmp_path: Path, empty_url: str) -> None:
    table = await asyncpg.connect(empty_url)
    await table.execute("CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text)")
    await table.execute(
        "INSERT INTO articles VALUES (1, 'Parcels', 'Send the parcel back within thirty days for a refund.'), "
        "(2, 'Opening hours', 'The shop is open from nine to five.')"
    )
    environment = shell_environment(tmp_path, empty_url)
    export, *steps, start = commands("attach")
    assert export.startswith("export SIDECAR_DATABASE_URL=postgresql://")
    for step in steps:
        await run(step, environment)
    daemon = await asyncio.create_subprocess_shell(
        f"exec {start}", env=environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:

        async def embedded() -> bool:
            return bool(await table.fetchval("SELECT count(*) FROM articles_embeddings") == 2)

        await eventually(embedded, 60)
        search, status = commands("search")
        assert "Parcels" in (await run(search, environment)).splitlines()[1]
        assert "articles" in await run(status, environment)
        for command in commands("index"):
            assert "live" in await run(command, environment)
        await run("sidecar-daemon dead-letters list articles", environment)
        await run("sidecar-daemon doctor", environment)
    finally:
        daemon.terminate()
        assert await daemon.wait() == 0
        await table.close()


def test_the_table_of_settings_is_the_program() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*?) \| (.+?) \|$", README, re.MULTILINE)
    documented = {name: (default, allowed) for name, default, allowed, _ in rows}
    declared = {}
    for name, field in Environment.model_fields.items():
        if field.validation_alias is None:
            default = "" if field.default_factory or field.default in (None, ()) else field.default
            shown = f"{default:g}" if isinstance(default, float) else str(getattr(default, "value", default))
            declared[name.upper()] = (shown, field.description)
    assert documented == declared


def test_what_the_readme_names_exists() -> None:
    for path in re.findall(r"`((?:sidecar_daemon|sql|tests|systemd|models)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^\$ |`)make ([a-z]+)", README, re.MULTILINE):
        assert target in targets
