"""What the sweep must find, and what it must leave alone: R11, R15."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidecar_daemon.domain.messages import SweepWindow
    from tests.torture.scenes.ground import Ground


async def _sweep(ground: Ground) -> SweepWindow:
    return await ground.sessions[0].queue.sweep(rows=100_000, interval=0)


async def finds(ground: Ground) -> None:
    """Missing, outdated, of another model, blank with vectors: each as a failover would leave it behind."""
    missing, outdated, model, blank, fine = [await ground.document() for _ in range(5)]
    await ground.finish()
    ground.claim((await _sweep(ground)).enqueued == 0, "the sweep enqueued what is true")
    await ground.admin.execute(
        "SET session_replication_role = replica"
    )  # no triggers: as if acknowledged commits were lost
    await ground.admin.execute("DELETE FROM chunky_vectors WHERE id = $1", missing)
    await ground.admin.execute("UPDATE documents SET content = 'edited in silence' WHERE id = $1", outdated)
    await ground.admin.execute("UPDATE chunky_vectors SET model = 'other@1' WHERE id = $1", model)
    await ground.admin.execute("UPDATE documents SET content = '  ' WHERE id = $1", blank)
    await ground.admin.execute("SET session_replication_role = origin")
    window = await _sweep(ground)
    found = (window.missing, window.outdated, window.wrong_model, window.surplus)
    ground.claim(found == (1, 1, 1, 1), f"missing, outdated, wrong model, surplus: {found} of {fine} documents")
    await ground.finish()


async def skips(ground: Ground) -> None:
    """A dead letter of the same text is left alone, one of an older text is not; what is queued is not sent again."""
    dead = await ground.document()
    session = ground.sessions[0]
    leases = await session.lease()
    await session.queue.dead_letter(leases, reason="scene", detail="", content_hash=None)
    ground.claim((await _sweep(ground)).enqueued == 0, "the sweep enqueued a dead letter of the same text")
    await ground.admin.execute("SET session_replication_role = replica")
    await ground.admin.execute("UPDATE documents SET content = 'mended in silence' WHERE id = $1", dead)
    await ground.admin.execute("SET session_replication_role = origin")
    ground.claim((await _sweep(ground)).enqueued == 1, "the sweep left a dead letter of an older text alone")
    ground.claim((await _sweep(ground)).enqueued == 0, "the sweep sent again what is queued")
    ground.maybe_dead.add(str(dead))
    await ground.finish()
