"""Filling a small disk, for faults that need a full one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def fill(ballast: Path) -> None:
    """Write a file until the disk takes no more; removing it frees the disk again."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return
