"""T13: what an operator can break: the disk, a grant, the schema, timeouts, locks, read-only, too many connections.

One replica keeps sessions, the other does as behind a pooler in transaction mode.
During each an operator sees within ten seconds that something is wrong and what: readiness, one log line, a metric.
Within thirty seconds of the mend work goes on, and nothing was blamed.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.disk import fill
from tests.torture.bench import CANARY, CHUNKS, SOURCE
from tests.torture.stage import stage
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    import asyncpg

    from tests.torture.bench import Bench
    from tests.torture.fleet import Replica
    from tests.torture.report import FaultReport
    from tests.torture.stage import Stage

SEEN_WITHIN, BACK_WITHIN = 10.0, 30.0
MOST_LINES = 4
"""Log lines of one outage in one replica: one a cause, and the same outage may show itself in several ways."""
_OUTAGE = re.compile(r'^sidecar_circuit_state\{[^}]*state="(open|half_open)"[^}]*\} 1(\.0)?$', re.MULTILINE)
MODES = ("transaction", "session")
_VECTORS = f"{CHUNKS}_vectors"
_SWEEP_DISK_MB = 24
_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename LIKE 'torture_daemon%' AND datname = $1"


async def run(bench: Bench, times: int) -> FaultReport:
    """Each kind ``times`` times. ``injected`` counts rounds over all kinds."""
    async with (
        disk(bench) as mount,
        stage(bench, "t13", replicas=2, rate=20, start=False) as on,
    ):
        # Half of the fleet holds sessions and listens, half does as behind a pooler: every fault meets both.
        for replica, mode in zip(on.fleet.replicas, MODES, strict=True):
            replica.settings = {**replica.settings, "POOLER": mode}
        await on.fleet.start()
        async with on.arena.session() as connection:
            await _use_disk(connection, mount)
            kinds: dict[str, Callable[[], AbstractAsyncContextManager[None]]] = {
                "disk_full": lambda: _disk_full(connection, mount),
                "read_only": lambda: _read_only(on, connection),
                "revoked_grant": lambda: _between(
                    connection,
                    "REVOKE EXECUTE ON FUNCTION sidecar.lease FROM sidecar_runtime",
                    "GRANT EXECUTE ON FUNCTION sidecar.lease TO sidecar_runtime",
                ),
                "renamed_schema": lambda: _between(
                    connection,
                    "ALTER SCHEMA sidecar RENAME TO sidecar_away",
                    "ALTER SCHEMA sidecar_away RENAME TO sidecar",
                ),
                "statement_timeout": lambda: _slow(on, connection),
                "held_locks": lambda: _held_locks(on),
                "too_many_connections": lambda: _too_many_connections(on, connection),
            }
            for _ in range(times):
                for kind, breaking in kinds.items():
                    await _once(on, connection, kind, breaking)
                on.report.injected += 1
        on.report.facts |= {"kinds": len(kinds), "pooler_modes": list(MODES)}
        await _leave_disk(on)
    return on.report


async def _once(
    on: Stage,
    connection: asyncpg.Connection,
    kind: str,
    breaking: Callable[[], AbstractAsyncContextManager[None]],
) -> None:
    hurt = on.fleet.replicas
    if kind == "statement_timeout":  # who keeps a session brings a limit of its own, which wins over the role's
        hurt = [replica for replica in hurt if replica.settings["POOLER"] == "transaction"]
    lines = [_faults_told(replica) for replica in hurt]
    async with breaking():
        started = time.monotonic()
        try:
            await eventually(lambda: _seen(hurt), SEEN_WITHIN, what="an operator's view")
        except AssertionError as error:
            on.report.claim(False, "T13", f"{kind}: not seen within {SEEN_WITHIN} s: {error}")
        on.report.worst(f"{kind}_seen_s", time.monotonic() - started)
        await on.pause(1.0, 3.0)
        for replica, before in zip(hurt, lines, strict=True):
            told = _faults_told(replica) - before
            on.report.claim(1 <= told <= MOST_LINES, "T13", f"{kind}: {told} log lines, 1 to {MOST_LINES} wanted")
    mended = time.monotonic()
    try:
        await eventually(lambda: _working(on, connection, mended), BACK_WITHIN, what="work after the mend")
    except AssertionError as error:
        on.report.claim(False, "T13", f"{kind}: {error}")
    on.report.worst(f"{kind}_back_s", time.monotonic() - mended)


async def _seen(hurt: list[Replica]) -> bool:
    """Every replica that is hurt says that it is not ready and why, has told it in its log, and shows a metric."""
    for replica in hurt:
        status, body = await replica.readiness()
        assert status == 503, f"replica {replica.slot} says {status} {body}"
        assert '"reasons":[]' not in body.replace(" ", ""), "no reason is given"
        assert _OUTAGE.search(await replica.metrics()), f"replica {replica.slot} shows no outage in its metrics"
    return True


async def _working(on: Stage, connection: asyncpg.Connection, mended: float) -> bool:
    for replica in on.fleet.replicas:
        status, body = await replica.readiness()
        assert status == 200, f"replica {replica.slot} says {status} {body}"
    seconds = time.monotonic() - mended
    return bool(
        await connection.fetchval(
            "SELECT count(*) FROM audit.writes WHERE at > clock_timestamp() - make_interval(secs => $1)", seconds
        )
    )


def _faults_told(replica: Replica) -> int:
    return len(replica.events("fault")) + len(replica.events("pipeline_refused"))


@asynccontextmanager
async def disk(bench: Bench) -> AsyncIterator[Path]:
    """A disk that can be filled: a small tmpfs, which needs root. Raises ``RuntimeError`` where mounting is refused."""
    folder = bench.folder / "disk"
    folder.mkdir()
    done = subprocess.run(  # noqa: ASYNC221  takes milliseconds
        ["mount", "-t", "tmpfs", "-o", f"size={_SWEEP_DISK_MB}m", "torture", str(folder)],
        check=False,
        capture_output=True,
    )
    if done.returncode != 0:
        raise RuntimeError(
            "T13 fills a disk and therefore mounts a tmpfs: run it as root, or leave it out: --without T13"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: ASYNC221  takes milliseconds


async def _use_disk(connection: asyncpg.Connection, mount: Path) -> None:
    """Put the vectors on the small disk."""
    place = mount / "space"
    place.mkdir()
    owner = await connection.fetchval("SELECT current_setting('data_directory')")
    subprocess.run(["chown", "-R", f"--reference={owner}", str(mount)], check=True)  # noqa: ASYNC221  takes milliseconds
    await connection.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
    await connection.execute(f"ALTER TABLE {_VECTORS} SET TABLESPACE small")


async def _leave_disk(on: Stage) -> None:
    async with on.arena.session() as connection:
        await connection.execute(f"ALTER TABLE {_VECTORS} SET TABLESPACE pg_default")
        await connection.execute("DROP TABLESPACE small")


@asynccontextmanager
async def _disk_full(connection: asyncpg.Connection, mount: Path) -> AsyncIterator[None]:
    ballast = mount / "ballast"
    await connection.execute(f"VACUUM FULL {_VECTORS}")  # else what fits into old pages would still be written
    await asyncio.to_thread(fill, ballast)
    try:
        yield
    finally:
        ballast.unlink()


@asynccontextmanager
async def _between(connection: asyncpg.Connection, before: str, after: str) -> AsyncIterator[None]:
    await connection.execute(before)
    try:
        yield
    finally:
        await connection.execute(after)


@asynccontextmanager
async def _read_only(on: Stage, connection: asyncpg.Connection) -> AsyncIterator[None]:
    """As after a demotion: sessions of ours cannot write; the connections go with it."""
    for slot in range(1, len(on.fleet.replicas) + 1):
        await connection.execute(
            f"ALTER ROLE torture_daemon_{slot} IN DATABASE {on.arena.name} SET default_transaction_read_only = on"
        )
    await connection.execute(_END, on.arena.name)
    try:
        yield
    finally:
        for slot in range(1, len(on.fleet.replicas) + 1):
            await connection.execute(
                f"ALTER ROLE torture_daemon_{slot} IN DATABASE {on.arena.name} RESET default_transaction_read_only"
            )
        await connection.execute(_END, on.arena.name)


@asynccontextmanager
async def _slow(on: Stage, connection: asyncpg.Connection) -> AsyncIterator[None]:
    """``statement_timeout`` of 50 ms, and a table that takes longer for every write."""
    slots = range(1, len(on.fleet.replicas) + 1)
    for slot in slots:
        await connection.execute(
            f"ALTER ROLE torture_daemon_{slot} IN DATABASE {on.arena.name} SET statement_timeout = '50ms'"
        )
    await connection.execute(
        "CREATE OR REPLACE FUNCTION audit.crawl() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(0.2); RETURN NULL; END $$"
    )
    await connection.execute(
        f"CREATE TRIGGER crawl AFTER INSERT OR UPDATE ON {_VECTORS} FOR EACH STATEMENT EXECUTE FUNCTION audit.crawl()"
    )
    await connection.execute(_END, on.arena.name)
    # More than who listens can take before who polls comes by: the limit is to meet a settlement of the latter.
    await connection.execute(
        f"INSERT INTO {SOURCE} SELECT i, '{CANARY} slow ' || i FROM generate_series(7000001, 7000600) AS i "
        "ON CONFLICT (id) DO UPDATE SET content = documents.content || ' again'"
    )
    try:
        yield
    finally:
        await connection.execute(f"DROP TRIGGER crawl ON {_VECTORS}")
        for slot in slots:
            await connection.execute(
                f"ALTER ROLE torture_daemon_{slot} IN DATABASE {on.arena.name} RESET statement_timeout"
            )
        await connection.execute(_END, on.arena.name)


@asynccontextmanager
async def _held_locks(on: Stage) -> AsyncIterator[None]:
    """Somebody locks the table of vectors, as a careless ALTER TABLE does."""
    # A deleted document takes its vectors with it: the writer waits for the same lock, as for any ALTER TABLE.
    with on.client.excused():
        async with on.arena.session() as holder, holder.transaction():
            await holder.execute(f"LOCK TABLE {_VECTORS} IN ACCESS EXCLUSIVE MODE")
            await holder.fetchval(f"SELECT count(*) FROM {SOURCE}")
            yield


@asynccontextmanager
async def _too_many_connections(on: Stage, connection: asyncpg.Connection) -> AsyncIterator[None]:
    """The database takes no further connection of ours (53300), and those that were open are gone."""
    await connection.execute(f"ALTER DATABASE {on.arena.name} CONNECTION LIMIT 0")
    await connection.execute(_END, on.arena.name)
    try:
        yield
    finally:
        await connection.execute(f"ALTER DATABASE {on.arena.name} CONNECTION LIMIT -1")
