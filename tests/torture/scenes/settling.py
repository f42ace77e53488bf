"""What settle must withstand while it runs, what the trigger must send, and who may work at all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sidecar_daemon.adapters.postgres.queue import PostgresQueue
from sidecar_daemon.domain.errors import Refused, SidecarError
from sidecar_daemon.domain.messages import Chunk, Lane, ModelId, PipelineName, Settlement
from tests.torture.bench import CHUNKS, HERE
from tests.torture.embedder import REFERENCE
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.torture.scenes.ground import Ground, Session

ROUNDS, CROWD = 3, 9
_LOCK = "(hashtextextended('chunky' || chr(31) || $1::text, 8088))"
_BLOCKED = "SELECT bool_and(cardinality(pg_blocking_pids(pid)) > 0) FROM unnest($1::integer[]) AS pid"
_SETTLE = "SELECT oid::regprocedure::text FROM pg_proc WHERE oid::regproc::text = 'sidecar.settle'"
_LONG = 30
"""Seconds to wait for a state that always comes; far above what a busy machine needs."""


async def _wait_long(ground: Ground) -> None:
    """In this arena settlements wait for locks as long as the scene needs: a busy machine is not an order of steps."""
    settle = await ground.admin.fetchval(_SETTLE)
    await ground.admin.execute(f"ALTER FUNCTION {settle} SET lock_timeout = '{2 * _LONG}s'")


async def _over_or_blocked(ground: Ground, doing: dict[Session, asyncio.Task[Any]]) -> None:
    """Return once each of these sessions is done with what it does, or waits for a lock."""

    async def they_are() -> bool:
        pids = [session.connection.get_server_pid() for session, task in doing.items() if not task.done()]
        return not pids or bool(await ground.writer.fetchval(_BLOCKED, pids))

    await eventually(they_are, _LONG, what="each session done, or at a lock")


async def edit_inside_settle(ground: Ground) -> None:
    """R1 at its narrowest: the edit commits, and is settled by B, between A's hash check and A's write."""
    a, b, _ = ground.sessions
    await ground.admin.execute((HERE / "failpoints.sql").read_text())
    await ground.admin.execute(
        "SELECT audit.plant($1::regclass, $2::regclass)", f"{CHUNKS}_vectors", f"pgmq.q_{CHUNKS}"
    )
    await _wait_long(ground)
    key = await ground.document()
    leases = await a.lease(seconds=30)
    (reading,) = await a.queue.read([lease.key for lease in leases if lease.key])
    assert reading.content is not None
    assert reading.content_hash is not None
    await ground.admin.execute("INSERT INTO audit.armed VALUES ('lock')")
    settling = asyncio.create_task(a.settle(reading.key, reading.content, reading.content_hash, leases))
    await eventually(lambda: ground.admin.fetchval("SELECT audit.reached()"), _LONG, what="A between check and write")
    await ground.admin.execute("DELETE FROM audit.armed")
    await ground.write(key, 9, "second")
    other = asyncio.create_task(ground.finish(b))
    await _over_or_blocked(ground, {b: other})  # with the guard it waits for A's lock
    await ground.admin.execute("SELECT audit.go_on()")
    await asyncio.gather(settling, other)
    await ground.finish()


async def opposite_orders(ground: Ground) -> None:
    """Two workers settle the same documents, one in the opposite order: nobody waits for ever, nobody fails.

    The one in the middle is held until both wait: without a common order each then has what the other needs.
    """
    a, b, _ = ground.sessions
    await _wait_long(ground)
    for _ in range(ROUNDS):
        keys = [await ground.document() for _ in range(CROWD)]
        rows = await ground.admin.fetch("SELECT id, md5(content) AS hash FROM documents WHERE id = ANY ($1)", keys)
        hashes: dict[int, str] = {row["id"]: row["hash"] for row in rows}

        async def all_of(session: Session, ordered: list[int], hashes: dict[int, str] = hashes) -> None:
            vector = REFERENCE.embed([REFERENCE.tokenize("any")[0].ids])[0]
            chunks = (Chunk(0, "any", vector),)
            await session.queue.settle([Settlement(str(k), hashes[k], chunks, ()) for k in ordered])  # type: ignore[arg-type]  # plain texts for ids

        middle = str(keys[CROWD // 2])
        await ground.admin.execute(f"SELECT pg_advisory_lock{_LOCK}", middle)
        both = {a: asyncio.create_task(all_of(a, keys)), b: asyncio.create_task(all_of(b, keys[::-1]))}
        await _over_or_blocked(ground, both)
        await ground.admin.execute(f"SELECT pg_advisory_unlock{_LOCK}", middle)
        for result in await asyncio.gather(*both.values(), return_exceptions=True):
            ground.claim(not isinstance(result, SidecarError), f"a settlement failed: {result!r}")
        # What was written here is no function of the text: away with it, the messages are still there.
        await ground.admin.execute("DELETE FROM chunky_vectors WHERE id = ANY ($1)", keys)
    await ground.finish()


async def always_sends(ground: Ground) -> None:
    """R3: an edit sends its own message although one is pending; an edit that changes nothing sends none."""
    key = await ground.document()
    await ground.write(key, 5, "second")
    count = "SELECT count(*) FROM pgmq.q_chunky WHERE message ->> 'document_id' = $1"
    ground.claim(await ground.admin.fetchval(count, str(key)) == 2, "the edit of a pending document sent no message")
    await ground.write(key, 5, "second")
    ground.claim(await ground.admin.fetchval(count, str(key)) == 2, "an edit that changed nothing sent a message")
    await ground.finish()


async def other_model(ground: Ground) -> None:
    """R16: a replica with another model neither leases nor settles."""
    session = ground.sessions[0]
    key = await ground.document()
    stranger = PostgresQueue(session, PipelineName(CHUNKS), ModelId("other@1"), max_document_bytes=1000)  # type: ignore[arg-type]  # see Session
    for what, step in (
        ("leased", lambda: stranger.lease(Lane.LIVE, seconds=0, limit=10)),
        ("settled", lambda: stranger.settle([Settlement(str(key), "0" * 32, (), ())])),  # type: ignore[arg-type]  # plain texts for ids
    ):
        try:
            await step()
        except Refused:
            continue
        ground.claim(False, f"a replica with another model {what}")
    await ground.finish()
