"""``python -m tests.bench [--quick] [--only P4] [--seed N] [--json]``."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar_daemon.settings import usable_cores
from tests.bench.arithmetic import TOLERANCE
from tests.bench.machine import described
from tests.bench.measures import MEASURES
from tests.bench.report import Report, as_text
from tests.bench.workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 5


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="How close to the machine's limit.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="within 5 minutes; small amounts, one round that counts")
    size.add_argument("--tiny", action="store_true", help="shows that everything runs; its figures mean nothing")
    parser.add_argument("--only", action="append", choices=list(MEASURES), metavar="P4", help="repeatable")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of every random choice; default {SEED}")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else to stdout")
    parser.add_argument("--peers-dir", type=Path, help="where peers are installed and models are kept")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of every contestant; default all cores")
    parser.add_argument("--memory-minutes", type=float, help="how long P12 watches after its warm-up")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="blocks whose calibration is further off are dropped"
    )
    return parser.parse_args(argv)


def cache_folder(asked: str | Path | None) -> Path:
    """Where peers and models are kept: as asked for, else in the user's cache."""
    if asked:
        return Path(asked)
    named = os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "sidecar-daemon-bench"


async def _run(place: Workplace, chosen: Sequence[str]) -> None:
    """Run the measures; what one breaks does not keep the others from running."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # type: ignore[union-attr]  # we are a task
    async with place:
        for name in chosen:
            place.say(f"{name} …")
            started = time.monotonic()
            try:
                await MEASURES[name](place)
            except Exception as error:  # noqa: BLE001  told in full; the exit status says so
                place.say(traceback.format_exc())
                place.report.broken[name] = _first(error)
            finally:
                place.report.seconds[name] = round(time.monotonic() - started, 1)
            place.say(f"{name} took {place.report.seconds[name]} s")


def _first(error: Exception) -> str:
    """One line of the error itself, not of the group that it came in."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:500]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was chosen; returns 1 where something broke, 130 where it was interrupted, else 0."""
    asked = _arguments(argv)
    profile = "quick" if asked.quick else "tiny" if asked.tiny else "full"
    chosen = [name for name in MEASURES if name in (asked.only or MEASURES)]
    report = Report(profile, asked.seed, machine=described())
    place = Workplace(
        report, cache_folder(asked.peers_dir), asked.threads, asked.tolerance, memory_minutes=asked.memory_minutes
    )
    report.machine |= {"threads": asked.threads, "runtime": place.runtime, "tolerance": asked.tolerance}
    place.say(f"profile {profile}, seed {asked.seed}, measures {', '.join(chosen)}")
    interrupted = False
    try:
        asyncio.run(_run(place, chosen))
    except (KeyboardInterrupt, asyncio.CancelledError):
        interrupted = True
        place.say("interrupted: what was measured so far follows")
    found = {**report.summary(chosen), "interrupted": interrupted}
    sys.stdout.write(json.dumps(found) + "\n" if asked.json else as_text(found))
    return 130 if interrupted else int(bool(report.broken))


if __name__ == "__main__":
    sys.exit(main())
