"""Who is blamed for an unclean end: R13 and R14, releases and replays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar_daemon.domain.messages import Lane

if TYPE_CHECKING:
    from sidecar_daemon.domain.messages import Lease
    from tests.torture.scenes.ground import Ground

CRASHES = 8


async def _lease_of(ground: Ground, key: int) -> Lease:
    (lease,) = [lease for lease in await ground.sessions[0].lease() if lease.key == str(key)]
    return lease


async def neighbours_are_excused(ground: Ground) -> None:
    """R14: what merely waited beside a crash becomes a suspect once and is never blamed again."""
    key = await ground.document()
    attempts = [(await _lease_of(ground, key)).attempt for _ in range(CRASHES)]  # every lease ends uncleanly at once
    ground.claim(max(attempts) == 2, f"attempts of an innocent over {CRASHES} crashes: {attempts}")
    await ground.finish()


async def culprit_is_blamed(ground: Ground) -> None:
    """R13: a suspect whose run had begun burns an attempt with every unclean end."""
    key = await ground.document()
    attempts = []
    for _ in range(CRASHES):
        lease = await _lease_of(ground, key)
        attempts.append(lease.attempt)
        if lease.attempt > 1:
            await ground.sessions[0].queue.begin([lease])
    ground.claim(attempts == list(range(1, CRASHES + 1)), f"attempts of a culprit over {CRASHES} crashes: {attempts}")
    await ground.finish()


async def release_is_excused(ground: Ground) -> None:
    """A release burns no attempt and shows the message at once; a deferral burns one and hides it."""
    key = await ground.document()
    queue = ground.sessions[0].queue
    for _ in range(CRASHES):
        lease = await _lease_of(ground, key)
        ground.claim(lease.attempt == 1, f"attempt {lease.attempt} after releases only")
        await queue.release([lease])
    lease = await _lease_of(ground, key)
    await queue.defer({lease: 0.0}, code="scene")
    lease = await _lease_of(ground, key)
    ground.claim(lease.attempt == 2, f"attempt {lease.attempt} after one deferral")
    ground.claim(lease.last_error == "scene", f"last error {lease.last_error}")
    await queue.defer({lease: 60.0}, code="scene")
    ground.claim(not await queue.lease(Lane.LIVE, seconds=0, limit=10), "a deferred message is visible before its time")
    await ground.admin.execute("UPDATE pgmq.q_chunky SET vt = clock_timestamp()")  # its time has come
    await ground.finish()


async def dead_letter_of_an_edit(ground: Ground) -> None:
    """A document that was embedded, then edited into poison: its old vectors go with the dead letter."""
    key = await ground.document()
    await ground.finish()
    await ground.write(key, 7, "poisonous")
    lease = await _lease_of(ground, key)
    assert lease.key is not None
    (reading,) = await ground.sessions[0].queue.read([lease.key])
    await ground.sessions[0].queue.dead_letter([lease], reason="scene", detail="", content_hash=reading.content_hash)
    ground.poison[str(key)] = "scene"


async def replay_is_clean(ground: Ground) -> None:
    """A replayed dead letter starts with a clean count, and is answered by the current text."""
    key = await ground.document()
    session = ground.sessions[0]
    for _ in range(4):
        lease = await _lease_of(ground, key)
        await session.queue.release([lease])
    lease = await _lease_of(ground, key)
    await session.queue.dead_letter([lease], reason="scene", detail="", content_hash=None)
    await session.fetch_value("SELECT sidecar.replay($1)", "chunky")
    attempts = []
    for _ in range(3):  # crashes of its own run: each must count, whatever was excused before the replay
        lease = await _lease_of(ground, key)
        attempts.append(lease.attempt)
        await session.queue.begin([lease])
    ground.claim(attempts == [1, 2, 3], f"attempts after a replay: {attempts}")
    await ground.finish()
