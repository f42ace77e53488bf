"""``python -m sidecar_daemon`` and the script ``sidecar-daemon``."""

from __future__ import annotations

import sys

from sidecar_daemon.cli import run_command_line


def main() -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
