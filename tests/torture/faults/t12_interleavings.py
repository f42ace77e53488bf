"""T12: stepped interleavings of R1 to R9: every order, on the real functions, with real transactions left open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.torture.checker import Checker
from tests.torture.report import FaultReport
from tests.torture.scenes import SCENES
from tests.torture.scenes.ground import Ground

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.mutants import SqlMutant


async def run(bench: Bench, scenes: int) -> FaultReport:
    """All scenes, each on an arena of its own. ``injected`` counts scenes, ``orders`` the interleavings."""
    del scenes
    whole = FaultReport()
    for name in SCENES:
        report = await play(bench, name)
        whole.violations += report.violations
        whole.facts["orders"] = whole.facts.get("orders", 0) + report.facts.get("orders", 1)
        whole.injected += 1
    return whole


async def play(bench: Bench, name: str, *, mutant: SqlMutant | None = None, stride: int = 1) -> FaultReport:
    """One scene, and the checks after it; for T17 with a guard switched off, or with every n-th order only."""
    report = FaultReport()
    async with (await bench.cluster()).arena(f"t12_{name}", seed=bench.seed) as arena:
        if mutant is not None:
            async with arena.session() as connection:
                await mutant.apply(connection)
        ground = Ground(arena, report, stride=stride)
        await ground.open()
        try:
            await SCENES[name](ground)
        except AssertionError as error:
            report.claim(False, "T12", f"{name}: {error}")
        finally:
            await ground.close()
        checker = Checker(arena, poison=ground.poison, maybe=ground.maybe_dead)
        report.violations += await checker.quiesce(2)
        async with arena.session() as connection:
            report.violations += await checker.database(connection)
    return report
