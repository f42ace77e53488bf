"""``python -m tests.torture --profile ci|full --only T5 --seed N --json``."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import traceback
from typing import TYPE_CHECKING

from tests.torture.bench import Bench
from tests.torture.faults import FAULTS, Fault
from tests.torture.report import FaultReport, Violation, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

AT_ONCE = 3
"""Faults that run beside one another: each has a database and replicas of its own, and most of each is waiting."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--profile", choices=["ci", "full"], default="ci")
    parser.add_argument("--only", action="append", choices=list(FAULTS), metavar="T5", help="run this one; repeatable")
    parser.add_argument("--without", action="append", choices=list(FAULTS), metavar="T14", help="leave this one out")
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    parser.add_argument("--json", action="store_true", help="print the JSON object and nothing else to stdout")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help=f"faults side by side; default {AT_ONCE}")
    return parser.parse_args(argv)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


async def _one(bench: Bench, name: str, fault: Fault, amount: int) -> FaultReport:
    """Run one fault; an error of the torture itself is a violation too: what was not shown is not proved."""
    started = time.monotonic()
    try:
        report = await fault.run(bench, amount)
    except Exception as error:  # noqa: BLE001  told in full, and the run fails
        report = FaultReport(
            violations=[Violation("torture", f"{error!r}", history=tuple(traceback.format_exc().splitlines()))]
        )
    report.claim(report.injected >= amount, "injected", f"{report.injected} injected, {amount} wanted")
    report.facts["seconds"] = round(time.monotonic() - started, 1)
    _say(f"{name}: {report.injected} injected, {len(report.violations)} violations, {report.facts['seconds']} s")
    for violation in report.violations:
        _say(f"{name} VIOLATION seed {bench.seed} {violation}")
    return report


async def _run(
    chosen: dict[str, Fault], profile: str, seed: int, at_once: int, reports: dict[str, FaultReport]
) -> None:
    """Run the faults; each report is there as soon as its fault is over."""
    places = asyncio.Semaphore(at_once)
    async with Bench(seed=seed) as bench:

        async def go(name: str, fault: Fault) -> None:
            async with places:
                reports[name] = await _one(bench, name, fault, getattr(fault, profile))

        together = [(name, fault) for name, fault in chosen.items() if not fault.alone]
        together.sort(key=lambda entry: not entry[1].first)
        await asyncio.gather(*[go(name, fault) for name, fault in together])
        for name, fault in chosen.items():
            if fault.alone:
                await go(name, fault)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen faults; returns the exit status."""
    arguments = _arguments(argv)
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    chosen = {
        name: fault
        for name, fault in FAULTS.items()
        if (name in arguments.only if arguments.only else getattr(fault, arguments.profile) > 0)
        and name not in (arguments.without or [])
    }
    _say(f"profile {arguments.profile}, seed {seed}, faults {', '.join(chosen)}")
    started = time.monotonic()
    reports: dict[str, FaultReport] = {}
    broken_off = False
    try:
        asyncio.run(_run(chosen, arguments.profile, seed, arguments.at_once, reports))
    except KeyboardInterrupt:
        broken_off = True
        _say(f"broken off; not over: {', '.join(name for name in chosen if name not in reports)}")
    found = summary(arguments.profile, seed, {name: reports[name] for name in chosen if name in reports})
    _say(f"{time.monotonic() - started:.0f} s in all")
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
    return 1 if broken_off or any(report.violations for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
