"""T17: every guard switched off once; the scene or fault that is named must then fail, and fails only then."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from tests.torture.faults import t04_backends, t07_poison, t08_abort, t15_terminate
from tests.torture.faults import t12_interleavings as t12
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


Run = tuple[str, int]
"""A killer by name, and the stride of a scene (0 for a fault): what a mutant and its control have in common."""


async def run(bench: Bench, least: int) -> FaultReport:
    """All mutants, and each killer once without any. ``killers`` says for each what noticed, and what it said."""
    del least
    report = FaultReport(facts={"total": 0, "killed": 0, "controls": 0, "killers": {}})
    places = asyncio.Semaphore(AT_ONCE)
    controls: dict[Run, FaultReport] = {}
    found: dict[str, FaultReport] = {}

    async def control(of: Run) -> None:
        async with places:
            controls[of] = await _whole(bench, of)

    async def mutant(name: str) -> None:
        async with places:
            found[name] = await _mutated(bench, name)

    slow = [*map(mutant, PYTHON_MUTANTS), *(control(of) for of in {_run_of(name): 0 for name in PYTHON_MUTANTS})]
    quick = [*map(mutant, SQL_MUTANTS), *(control(of) for of in {_run_of(name): 0 for name in SQL_MUTANTS})]
    await asyncio.gather(*slow, *quick)
    for name, its in found.items():
        _note(report, name, its, controls[_run_of(name)])
    report.facts["controls"] = len(controls)
    return report


def _run_of(name: str) -> Run:
    if name in SQL_MUTANTS:
        return SQL_MUTANTS[name].killer, SQL_MUTANTS[name].stride
    return PYTHON_MUTANTS[name].killer, 0


async def _whole(bench: Bench, of: Run) -> FaultReport:
    """The same run with every guard in place."""
    killer, stride = of
    return await _safely(killer, _FAULTS[killer](bench) if not stride else t12.play(bench, killer, stride=stride))


async def _mutated(bench: Bench, name: str) -> FaultReport:
    killer, stride = _run_of(name)
    if name in SQL_MUTANTS:  # a patch that does not fit is an error, and no kill
        return await t12.play(bench, killer, mutant=SQL_MUTANTS[name], stride=stride)
    return await _safely(killer, _FAULTS[killer](bench.mutated(name)))


async def _safely(killer: str, playing: Awaitable[FaultReport]) -> FaultReport:
    try:
        return await playing
    except Exception as error:  # noqa: BLE001  a mutant may end in any way: a fault that cannot even finish has noticed
        found = FaultReport()
        found.claim(False, killer, repr(error).splitlines()[0])
        return found


def _note(report: FaultReport, name: str, found: FaultReport, control: FaultReport) -> None:
    """Killed is what its killer noticed by the sign that is expected, where the killer alone notices nothing."""
    killer, _ = _run_of(name)
    sign = SQL_MUTANTS[name].sign if name in SQL_MUTANTS else PYTHON_MUTANTS[name].sign
    report.injected += 1
    report.facts["total"] += 1
    told = [f"{violation.check} {violation.message}" for violation in found.violations]
    signs = [line for line in told if re.search(sign, line)]
    if control.violations:
        first = control.violations[0]
        message = f"{killer} fails without mutant {name} as well, which is no kill: {first.check} {first.message}"
        report.claim(False, "T17", message[:400])
    elif signs:
        report.facts["killed"] += 1
        report.facts["killers"][name] = f"{killer}: {signs[0]}"[:160]
    else:
        saw = f"nothing of {sign!r}, but {told[0][:200]}" if told else "nothing"
        report.claim(False, "T17", f"mutant {name} lives: {killer} saw {saw}")
