"""T16: an hour and more of load with T1, T4 and T5 at a low rate; memory must not grow."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from tests.torture.bench import BOTH
from tests.torture.stage import stage

if TYPE_CHECKING:
    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport
    from tests.torture.stage import Stage

WARM_SECONDS = 120.0
"""Left out of the slope: caches and pools fill."""
MOST_MIB_AN_HOUR = 16.0
LONG_ENOUGH = 1800
"""Seconds in which every kind of fault comes up, whatever the seed."""
_KILL = """
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND usename LIKE 'torture_daemon%' ORDER BY random() LIMIT 2) AS victims
"""


async def run(bench: Bench, seconds: int) -> FaultReport:
    """For ``seconds``, which ``injected`` counts. Replica 1 is never killed: its memory is watched."""
    cluster = await bench.cluster("t16")
    async with stage(bench, "t16", cluster="t16", pipelines=BOTH, rate=20) as on:
        watched, *others = on.fleet.replicas
        started, samples = time.monotonic(), []
        hurt: Counter[str] = Counter()
        while time.monotonic() - started < seconds:
            await on.pause(10, 20)
            at = time.monotonic() - started
            if at > WARM_SECONDS:
                samples.append((at, watched.resources()["rss_mib"]))
            fault = on.rng.choices(("kill", "backends", "server", "none"), weights=(3, 3, 1, 3))[0]
            if fault == "kill":
                victim = on.rng.choice(others)
                await victim.kill()
                await victim.start(ready=False)
            elif fault == "backends":
                async with on.arena.session() as connection:
                    hurt["killed_backends"] += await connection.fetchval(_KILL)
            elif fault == "server":
                with on.client.excused():
                    await asyncio.to_thread(cluster.server.stop, "immediate")
                    await on.pause(0, 5)
                    await asyncio.to_thread(cluster.server.start)
            hurt[fault] += 1
        on.report.injected = seconds
        on.report.facts["hurt"] = dict(hurt)
        if seconds >= LONG_ENOUGH:
            for kind in ("kill", "server", "killed_backends"):
                on.report.claim(hurt[kind] > 0, "T16", f"{kind}: never happened")
        _judge(on, samples)
    return on.report


def _judge(on: Stage, samples: list[tuple[float, float]]) -> None:
    """A straight line through the samples: its slope is what leaks. One sample in ten minutes is kept."""
    if len(samples) < 3:
        return
    at, mib = np.array(samples, dtype=np.float64).T
    slope = float(np.polyfit(at, mib, 1)[0]) * 3600
    tens = [float(mib[np.searchsorted(at, begin)]) for begin in np.arange(at[0], at[-1], 600.0)]
    on.report.facts |= {"rss_mib": round(float(mib[-1]), 1), "slope_mib_an_hour": round(slope, 2)}
    on.report.facts["rss_mib_every_ten_minutes"] = [round(each, 1) for each in tens]
    on.report.claim(slope < MOST_MIB_AN_HOUR, "I9", f"memory grows by {slope:.1f} MiB an hour")
