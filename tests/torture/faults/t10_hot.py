"""T10: two hundred edits a second on ten documents."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tests.torture.client import Client, Ended
from tests.torture.stage import stage

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport

RATE, WRITERS = 200, 4
LEAST_RATE = 60
"""Edits a second that must succeed, on a machine that is busy with other faults: fewer are not hot."""


async def run(bench: Bench, seconds: int) -> FaultReport:
    """For ``seconds``. ``injected`` counts them; ``edits_per_second`` says what the machine managed."""
    async with stage(bench, "t10", rate=0, documents=10) as on:
        writers = [Client(on.arena, rate=RATE / WRITERS, documents=10, mix={"edit": 1}) for _ in range(WRITERS)]
        for number, writer in enumerate(writers):
            writer.distinguish(number)
            writer.starved = on.client.starved
        stop, started = asyncio.Event(), time.monotonic()
        async with asyncio.TaskGroup() as group:
            for writer in writers:
                group.create_task(writer.run(stop))
            await asyncio.sleep(seconds)
            stop.set()
        rate = sum(writer.ended[Ended.OK] for writer in writers) / (time.monotonic() - started)
        on.report.injected = seconds
        on.report.facts["edits_per_second"] = round(rate)
        on.report.claim(rate >= LEAST_RATE, "T10", f"{rate:.0f} edits a second, at least {LEAST_RATE} are wanted")
        for writer in writers:
            on.client.take_over(writer)
            await writer.close()
    return on.report
