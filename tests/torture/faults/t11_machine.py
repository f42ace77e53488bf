"""T11: a hypothesis state machine over the real queue, with an oracle."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from tests.torture.checker import Checker
from tests.torture.machine import Machine
from tests.torture.report import FaultReport
from tests.torture.scenes.ground import MODEL_ID, Ground

if TYPE_CHECKING:
    from tests.torture.bench import Arena, Bench

STEPS = 25
"""Of one example."""


async def run(bench: Bench, examples: int) -> FaultReport:
    """``examples`` of them; a failure is shrunk to its shortest story."""
    report = FaultReport()
    async with (await bench.cluster()).arena("t11", seed=bench.seed) as arena:
        await asyncio.to_thread(_in_thread, arena, report, examples, bench.seed)
        async with arena.session() as connection:
            report.violations += await Checker(arena).database(connection)
    return report


def _in_thread(arena: Arena, report: FaultReport, examples: int, seed: int) -> None:
    """The machine is not asynchronous: it gets a thread and a loop of its own."""
    loop = asyncio.new_event_loop()
    ground = Ground(arena, report)
    loop.run_until_complete(ground.open())
    Machine.ground, Machine.loop, Machine.examples, Machine.model = ground, loop, 0, MODEL_ID
    options = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=options)
    except Exception as error:  # noqa: BLE001  whatever broke, broke in the shortest story that hypothesis found
        story = "\n".join([repr(error), *getattr(error, "__notes__", [])])
        report.claim(False, "T11", story)
    finally:
        report.injected = Machine.examples
        loop.run_until_complete(ground.close())
        loop.close()
