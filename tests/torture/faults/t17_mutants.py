"""T17: every guard switched off once; the scene or fault that is named must then fail."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.torture.faults import t04_backends, t07_poison, t08_abort, t12_interleavings, t15_terminate
from tests.torture.mutants import PYTHON_MUTANTS, SQL_MUTANTS
from tests.torture.report import FaultReport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.torture.bench import Bench

_FAULTS: dict[str, Callable[[Bench], Awaitable[FaultReport]]] = {
    "T4": lambda bench: t04_backends.run(bench, 8),
    "T7": lambda bench: t07_poison.run(bench, 1),
    "T8": lambda bench: t08_abort.run(bench, 1),
    "T15": lambda bench: t15_terminate.run(bench, 3),
}
"""Smaller amounts than alone: a mutant must be seen at once."""
AT_ONCE = 4
"""Mutants side by side, each with a database and replicas of its own."""


async def run(bench: Bench, least: int) -> FaultReport:
    """All mutants. ``killers`` says for each what noticed, and what it said."""
    del least
    report = FaultReport(facts={"total": 0, "killed": 0, "killers": {}})
    places = asyncio.Semaphore(AT_ONCE)

    async def go(name: str) -> None:
        async with places:
            if name in SQL_MUTANTS:
                killer = SQL_MUTANTS[name].killer
                _note(report, name, killer, await t12_interleavings.play(bench, killer, mutant=SQL_MUTANTS[name]))
            else:
                killer = PYTHON_MUTANTS[name].killer
                _note(report, name, killer, await _run_mutated(bench.mutated(name), killer))

    await asyncio.gather(*[go(name) for name in (*PYTHON_MUTANTS, *SQL_MUTANTS)])  # the slow ones first
    return report


async def _run_mutated(bench: Bench, killer: str) -> FaultReport:
    try:
        return await _FAULTS[killer](bench)
    except Exception as error:  # noqa: BLE001  a mutant may end in any way: a fault that cannot even finish has noticed
        found = FaultReport()
        found.claim(False, killer, repr(error).splitlines()[0])
        return found


def _note(report: FaultReport, name: str, killer: str, found: FaultReport) -> None:
    report.injected += 1
    report.facts["total"] += 1
    if found.violations:
        report.facts["killed"] += 1
        first = found.violations[0]
        report.facts["killers"][name] = f"{killer}: {first.check} {first.message}"[:160]
    else:
        report.claim(False, "T17", f"mutant {name} lives: {killer} saw nothing")
