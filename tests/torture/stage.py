"""What most faults have in common: a fleet, a client, a watch, and the checks when it is over."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.torture.checker import Checker, leaks
from tests.torture.client import LEAST_SHARE, Client, Ended
from tests.torture.fleet import Fleet
from tests.torture.report import FaultReport, Violation
from tests.torture.watch import LEAST_SHARE as LEAST_LOOKS
from tests.torture.watch import Watch, piled_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from tests.torture.bench import Arena, Bench


@dataclass
class Stage:
    """One fault's surroundings, running."""

    arena: Arena
    fleet: Fleet
    client: Client
    report: FaultReport
    poison: dict[str, str] = field(default_factory=dict)
    """Keys of planted poison; the reason that is expected, or empty for any."""
    checker_seconds: float = 90.0

    async def pause(self, least: float, most: float) -> float:
        """Wait a seeded while; the load goes on. Returns the seconds."""
        seconds = self.rng.uniform(least, most)
        await asyncio.sleep(seconds)
        return seconds

    async def fleet_restarts(self) -> None:
        """Start again what has ended, as systemd would, without waiting until it is ready."""
        for replica in self.fleet.replicas:
            if not replica.alive:
                await replica.note_end()
                await replica.start(ready=False)

    def __post_init__(self) -> None:
        self.rng = self.arena.rng("fault")


@asynccontextmanager
async def stage(
    bench: Bench,
    label: str,
    *,
    replicas: int = 3,
    rate: float = 30.0,
    documents: int = 60,
    cluster: str = "shared",
    pipelines: Mapping[str, str] | None = None,
    stalled: bool = False,
    settings: Mapping[str, str] | None = None,
    url_port: int | None = None,
    start: bool = True,
    real_model: bool = False,
    index: bool = False,
) -> AsyncIterator[Stage]:
    """Set up an arena with replicas under load; after the block quiesce, check and add what was found.

    Args:
        bench: where servers come from.
        label: names the database and the logs.
        replicas: how many; each is started again at the end of the block if it is dead by then.
        rate: operations a second of the client; 0 for no client.
        documents: that exist at first.
        cluster: name of the server; faults that stop it take one of their own.
        pipelines: policies by name.
        stalled: see ``Watch``.
        settings: of the replicas, without the prefix.
        url_port: of a proxy or pooler that the replicas connect to instead of the server.
        real_model: replicas load the real ONNX model, and vectors are compared with those of the same model here.
        index: whether the vectors have an index, as they have by default outside of this suite.
        start: whether to start the replicas, or leave that to the block.
    """
    home = await bench.cluster(cluster)
    async with (
        home.arena(
            label,
            seed=bench.seed,
            pipelines=pipelines,
            models=bench.folder / "models" if real_model else None,
            index=index,
        ) as arena,
        Fleet(arena, bench.folder / arena.name, replicas, **(settings or {})) as fleet,
    ):
        if url_port is not None:
            for replica in fleet.replicas:
                url = arena.daemon_url(replica.slot, url_port)
                replica.settings = {"DATABASE_URL": url, **replica.settings}
        client = Client(arena, rate=rate or 1.0, documents=documents)
        watch, stop, over = Watch(arena, stalled=stalled), asyncio.Event(), asyncio.Event()
        on = Stage(arena, fleet, client, FaultReport())
        await client.fill()
        fleet.mutant = bench.mutant
        if start:
            await fleet.start()
        client.starved = watch.late
        watching = asyncio.create_task(watch.run(over))
        writing = asyncio.create_task(client.run(stop)) if rate else None
        try:
            yield on
            stop.set()
            if writing is not None:
                await writing
            await fleet.ensure()
            on.report.violations += await Checker(arena, client, poison=on.poison).everything()
            on.report.violations += await piled_up(arena, fleet.replicas)
            await _claim_vectors(on)
        except Exception as error:
            for replica in fleet.replicas:
                error.add_note("\n".join([f"replica {replica.slot}:", *_tail(replica.log())]))
            raise
        finally:
            stop.set()
            over.set()
            ended, *_ = await asyncio.gather(watching, *([writing] if writing else []), return_exceptions=True)
            await client.close()
        on.report.claim(ended is None, "I8", f"the watch broke off: {ended!r}")
        await _close(on, watch)


async def _close(on: Stage, watch: Watch) -> None:
    """Ask the replicas once more what they show, search it all, and report."""
    report = on.report
    for replica in on.fleet.replicas:
        await replica.metrics()
        await replica.readiness()
        await replica.note_end()  # who broke may have drained until now
        report.violations += [
            Violation(
                "crash", f"replica {replica.slot} ended by itself with status {status}", history=_tail(replica.log())
            )
            for _, status in replica.ended
        ]
    report.violations += watch.violations + leaks(on.fleet.replicas)
    report.facts["longest_transaction_s"] = round(watch.longest, 3)
    report.facts["looks"] = {"answered": watch.looks, "transactions_seen": watch.seen}
    enough = watch.looks > watch.wanted * LEAST_LOOKS
    report.claim(enough, "I8", f"the watch looked {watch.looks} times, there was time for {watch.wanted}")
    _claim_writes(on)


def _claim_writes(on: Stage) -> None:
    """Promise 5, and that there was a load at all."""
    report, client = on.report, on.client
    report.facts["operations"] = {ended.value: count for ended, count in sorted(client.ended.items())}
    report.facts["slowest_write_s"] = round(client.slowest, 3)
    told = "; ".join(client.complaints[:3])
    report.claim(not client.complaints, "writers", f"{len(client.complaints)} writes were hurt, the first: {told}")
    report.claim(not client.shaken, "writers", "no write succeeded after the fault was mended")
    done, least = client.ended[Ended.OK], max(1, round(client.wanted * LEAST_SHARE))
    report.claim(done >= least, "writers", f"{done} operations of the client succeeded, at least {least} are wanted")


async def _claim_vectors(on: Stage) -> None:
    """A fault among replicas that write nothing proves nothing."""
    least = on.client.documents * len(on.arena.pipelines) // 2
    async with on.arena.session() as connection:
        written = await connection.fetchval("SELECT count(*) FROM audit.writes WHERE op <> 'DELETE'")
    on.report.facts["vectors_written"] = written
    on.report.claim(written >= least, "load", f"{written} vectors were written, at least {least} are wanted")


def _tail(log: str) -> tuple[str, ...]:
    return tuple(line[:400] for line in log.splitlines()[-25:])
