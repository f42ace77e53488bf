"""T10: two hundred edits a second on ten documents."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tests.torture.client import Client
from tests.torture.stage import stage

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport

RATE, WRITERS = 200, 4


async def run(bench: Bench, seconds: int) -> FaultReport:
    """For ``seconds``. ``injected`` counts them; ``edits_per_second`` says what the machine managed."""
    async with stage(bench, "t10", rate=0, documents=10) as on:
        writers = [Client(on.arena, rate=RATE / WRITERS, documents=10, mix={"edit": 1}) for _ in range(WRITERS)]
        for number, writer in enumerate(writers):
            writer.distinguish(number)
        stop, started = asyncio.Event(), time.monotonic()
        async with asyncio.TaskGroup() as group:
            for writer in writers:
                group.create_task(writer.run(stop))
            await asyncio.sleep(seconds)
            stop.set()
        edits = sum(writer.ended.total() for writer in writers)
        on.report.injected = seconds
        on.report.facts["edits_per_second"] = round(edits / (time.monotonic() - started))
        for writer in writers:
            for key, operations in writer.log.items():
                on.client.log[key] = sorted([*on.client.log[key], *operations], key=lambda operation: operation.at)
            await writer.close()
    return on.report
