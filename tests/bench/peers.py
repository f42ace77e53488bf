"""The peers' own environments: made by the benchmark alone, outside the repository, once for each list of pins."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
PINS = {"peers": HERE / "peers.txt", "peers-onnx": HERE / "peers-onnx.txt"}
_DONE = ".complete"


class PeersError(Exception):
    """An environment cannot be made here."""


async def environment(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """Make an environment unless it is there.

    Args:
        name: of a list of pins.
        folder: where environments live.
        say: told before anything is installed.

    Returns:
        Its Python.

    Raises:
        PeersError: pip cannot install the pins.
    """
    pins = PINS[name]
    key = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    place = folder / f"{name}-{key}"
    python = place / "bin" / "python"
    if (place / _DONE).exists():
        return python
    say(f"installing {pins.name} into {place} (once; some minutes)")
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    await _run(sys.executable, "-m", "venv", str(place), why=f"{place} cannot be made")
    install = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(pins))
    await _run(str(python), *install, why=f"pip cannot install {pins.name}")
    (place / _DONE).touch()
    return python


async def _run(*command: str, why: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    if process.returncode:
        # pip's lines may carry an index address with credentials: only lines that say ERROR, without addresses.
        errors = [line for line in out.decode(errors="replace").splitlines() if line.startswith("ERROR")]
        said = " ".join(word for word in " ".join(errors[-2:]).split() if "://" not in word)
        raise PeersError(f"{why} (exit status {process.returncode}): {said[:300]}")
