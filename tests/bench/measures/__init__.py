"""One module a figure. The order is that of a run: cheap ones first, the longest last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.bench.measures import (
    p01_pipeline,
    p02_flops,
    p03_padding,
    p04_peers,
    p05_seed,
    p06_idle,
    p07_backfill,
    p08_backlog,
    p09_ceiling,
    p10_deferred,
    p11_writer,
    p12_memory,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from tests.bench.workplace import Workplace

MEASURES: Mapping[str, Callable[[Workplace], Awaitable[None]]] = {
    "P3": p03_padding.run,
    "P2": p02_flops.run,
    "P1": p01_pipeline.run,
    "P6": p06_idle.run,
    "P7": p07_backfill.run,
    "P5": p05_seed.run,
    "P4": p04_peers.run,
    "P9": p09_ceiling.run,
    "P11": p11_writer.run,
    "P10": p10_deferred.run,
    "P8": p08_backlog.run,
    "P12": p12_memory.run,
}
