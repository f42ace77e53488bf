"""T6: a bad wire between replicas and server: delay, one byte a write, RST, truncation, black hole, lost answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from tests.torture.fleet import LEASE_SECONDS
from tests.torture.proxy import Hurt, Proxy
from tests.torture.stage import stage

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport
    from tests.torture.stage import Stage

KINDS = (Hurt.LOSE_COMMIT, Hurt.RESET, Hurt.TRUNCATE, Hurt.DELAY, Hurt.DRIBBLE, Hurt.BLACK_HOLE)
LONG_HOLE = (LEASE_SECONDS + 1.0, LEASE_SECONDS + 3.0)
"""Seconds of the last black hole of each run: leases end meanwhile."""
LONGEST_HOLE = (42.0, 46.0)
"""Seconds of every tenth: commands give up meanwhile, which they do after 35 s."""
LOST_COMMITS_A_ROUND = 4
"""The full profile wants 200 lost answers and 50 of each of the others."""


async def run(bench: Bench, rounds: int) -> FaultReport:
    """Each kind ``rounds`` times, the lost answer more often. ``injected`` counts the rounds, ``kinds`` each kind."""
    home = await bench.cluster()
    async with (
        Proxy(home.port, bench.rng("wire")) as proxy,
        stage(bench, "t6", replicas=2, rate=40, url_port=proxy.port, stalled=True) as on,
    ):
        kinds: Counter[str] = Counter()
        for number in range(1, rounds + 1):
            hole = LONG_HOLE if number == rounds else LONGEST_HOLE if number % 10 == 0 else (1.0, 4.0)
            for kind in KINDS:
                times = LOST_COMMITS_A_ROUND if kind is Hurt.LOSE_COMMIT else 1
                for _ in range(times):
                    await _once(on, proxy, kind, hole)
                    kinds[kind.value] += 1
            on.report.injected += 1
        on.report.facts["kinds"] = dict(kinds)
    return on.report


async def _once(on: Stage, proxy: Proxy, kind: Hurt, hole: tuple[float, float]) -> None:
    proxy.hurt(kind)
    match kind:
        case Hurt.BLACK_HOLE:
            on.report.worst("longest_hole_s", await on.pause(*hole))
            if on.rng.random() < 0.5:
                proxy.cut()
        case Hurt.DELAY | Hurt.DRIBBLE:
            await proxy.until_hurt(20)
            await on.pause(0.5, 1.5)
        case _:
            await proxy.until_hurt(20)
    proxy.heal()
    await asyncio.sleep(0.1)
