"""Finding the operating system's tools."""

from __future__ import annotations

import shutil

PACKAGES = {
    "chromium": "chromium",
    "pgbouncer": "pgbouncer",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "systemd-analyze": "systemd",
}
"""Debian's package of each tool."""


def tool(name: str) -> str:
    """Path of a tool. Fails with how to get it when it is missing."""
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin")
    if found is None:
        raise AssertionError(f"{name} is not installed: apt-get install {PACKAGES[name]}")
    return found
