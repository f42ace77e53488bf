"""T3: SIGSTOP until the leases of what it holds have expired, then SIGCONT: it believes that it holds them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from tests.torture.fleet import LEASE_SECONDS
from tests.torture.stage import stage

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport


async def run(bench: Bench, stops: int) -> FaultReport:
    """Stop two of three replicas at a time, with work in flight."""
    async with stage(bench, "t3", rate=40, stalled=True, start=False) as on:
        await on.fleet.start(slowest="0.15")
        while on.report.injected < stops:
            await on.pause(0.5, 1.5)
            victims = on.rng.sample(on.fleet.replicas, k=2)
            for victim in victims:
                await victim.send(signal.SIGSTOP)
            await on.pause(LEASE_SECONDS + 0.5, LEASE_SECONDS + 3)
            for victim in victims:
                await victim.send(signal.SIGCONT)
            on.report.injected += len(victims)
    return on.report
