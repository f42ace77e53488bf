"""Every command: parse, call app, print. An error is one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import typer

from sidecar_daemon.cli import checks, daemon, dead_letters, indexing, model_files, pipelines, sweeping, top
from sidecar_daemon.cli.output import FAILED, USAGE, complain, exit_code, forgive_encodings
from sidecar_daemon.domain.errors import SidecarError

if TYPE_CHECKING:
    from collections.abc import Sequence

OK = 0
INTERRUPTED = 128 + signal.SIGINT

_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What the parser raises for bad usage; only its subclass has a public name."""

app = typer.Typer(
    name="sidecar-daemon",
    help="Keeps embeddings true and fresh inside Postgres. Without a command: run the daemon.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
daemon.register(app)
pipelines.register(app)
sweeping.register(app)
indexing.register(app)
dead_letters.register(app)
model_files.register(app)
checks.register(app)
top.register(app)


def run_command_line(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        0, 1 when it failed, 2 for bad usage and bad settings, 130 after Ctrl-C.
    """
    forgive_encodings()
    try:
        answer = app(list(arguments), prog_name="sidecar-daemon", standalone_mode=False)
        sys.stdout.flush()
    except SidecarError as error:
        complain(str(error))
        return exit_code(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has seen enough; the interpreter must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except _USAGE_ERROR as error:
        complain(f"{_said(error)} (see --help)")
        return USAGE
    return answer if isinstance(answer, int) else OK


def _said(error: BaseException) -> str:
    said = getattr(error, "format_message", error.__str__)()
    return " ".join(str(said).split()).rstrip(".")
