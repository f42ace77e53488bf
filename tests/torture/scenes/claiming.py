"""Who embeds which text, and until when: R5 and R7 between replicas. A lost claim costs a second run, never truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar_daemon.domain.messages import DocumentKey
from sidecar_daemon.domain.outcomes import Verdict

if TYPE_CHECKING:
    from sidecar_daemon.domain.messages import Reading
    from tests.torture.scenes.ground import Ground, Session

_CLAIMED = "SELECT count(*) FROM sidecar.claims WHERE key = $1"


async def _read(session: Session, key: int) -> Reading:
    (reading,) = await session.queue.read([DocumentKey(str(key))], claim_seconds=60)
    return reading


async def one_embeds(ground: Ground) -> None:
    """What A has claimed B leaves to it, whatever B does with its own messages; A's settlement ends the claim."""
    a, b, c = ground.sessions
    key = await ground.document()
    await ground.write(key, 5, "second")
    leases = await a.lease(seconds=30)
    reading = await _read(a, key)
    ground.claim(reading.verdict is Verdict.EMBED, f"A got {reading.verdict} for a text that nobody has claimed")
    ground.claim((await _read(b, key)).verdict is Verdict.CLAIMED, "B got a text that A has claimed")
    await b.queue.release(leases[1:])
    ground.claim((await _read(c, key)).verdict is Verdict.CLAIMED, "C got a text that A has claimed")
    assert reading.content is not None
    assert reading.content_hash is not None
    await a.settle(reading.key, reading.content, reading.content_hash, leases[:1])
    ground.claim(await ground.admin.fetchval(_CLAIMED, str(key)) == 0, "the claim outlived its settlement")
    ground.claim((await _read(b, key)).verdict is Verdict.UNCHANGED, "B got a text that is embedded")
    await ground.finish()


async def claims_end(ground: Ground) -> None:
    """A claim on an older text, or of a replica that has crashed, holds nobody up."""
    a, b, c = ground.sessions
    key = await ground.document()
    await _read(a, key)
    await ground.write(key, 5, "second")
    ground.claim((await _read(b, key)).verdict is Verdict.EMBED, "A's claim on the older text holds B up")
    await ground.admin.execute("UPDATE sidecar.claims SET expires_at = clock_timestamp()")
    ground.claim((await _read(c, key)).verdict is Verdict.EMBED, "the claim of a crashed replica holds C up")
    await ground.finish()
