"""What settle must withstand while it runs, what the trigger must send, and who may work at all."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.postgres.queue import PostgresQueue
from sidecar_daemon.domain.errors import Refused, SidecarError
from sidecar_daemon.domain.messages import Chunk, Lane, ModelId, PipelineName, Settlement
from tests.torture.bench import CHUNKS, HERE
from tests.torture.embedder import REFERENCE
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.torture.scenes.ground import Ground, Session

_REACHED = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = 4711 AND objid = 0 AND granted"
ROUNDS, CROWD = 3, 9
_LOCK = "(hashtextextended('chunky' || chr(31) || $1::text, 8088))"
_WAITING = "SELECT count(*) >= 2 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


async def edit_inside_settle(ground: Ground) -> None:
    """R1 at its narrowest: the edit commits, and is settled by B, between A's hash check and A's write."""
    a, b, _ = ground.sessions
    await ground.admin.execute((HERE / "failpoints.sql").read_text())
    await ground.admin.execute(
        "SELECT audit.plant($1::regclass, $2::regclass)", f"{CHUNKS}_vectors", f"pgmq.q_{CHUNKS}"
    )
    key = await ground.document()
    leases = await a.lease(seconds=30)
    (reading,) = await a.queue.read([lease.key for lease in leases if lease.key])
    assert reading.content is not None
    assert reading.content_hash is not None
    await ground.admin.execute("UPDATE audit.armed SET point = point")
    await ground.admin.execute("INSERT INTO audit.armed VALUES ('lock')")
    settling = asyncio.create_task(a.settle(reading.key, reading.content, reading.content_hash, leases))
    await eventually(lambda: ground.admin.fetchval(_REACHED), 10, what="A between check and write")
    await ground.admin.execute("DELETE FROM audit.armed")
    await ground.write(key, 9, "second")
    other = asyncio.create_task(ground.finish(b))
    await asyncio.wait([other], timeout=0.3)  # either B is done, or it waits for A's lock, as it should
    await ground.admin.execute("SELECT audit.go_on()")
    await asyncio.gather(settling, other, return_exceptions=True)
    await ground.finish()


async def opposite_orders(ground: Ground) -> None:
    """Two workers settle the same documents, one in the opposite order: nobody waits for ever, nobody fails.

    The one in the middle is held until both wait: without a common order each then has what the other needs.
    """
    a, b, _ = ground.sessions
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
        both = asyncio.gather(all_of(a, keys), all_of(b, keys[::-1]), return_exceptions=True)
        with suppress(AssertionError):  # the one that waited first may give up before the other begins to wait
            await eventually(lambda: ground.writer.fetchval(_WAITING), 0.4)
        await ground.admin.execute(f"SELECT pg_advisory_unlock{_LOCK}", middle)
        results = await both
        for result in results:
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
