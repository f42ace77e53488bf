"""What happens to a document that cannot be embedded or stored: deferred with a backoff, or dead-lettered."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import Poison, Refused, Transient
from sidecar_daemon.domain.outcomes import Outcome
from sidecar_daemon.domain.retry import backoff

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import ContentHash, Lease
    from sidecar_daemon.worker.state import Job, WorkerState

PERMANENT = frozenset({"bad_vector"})
"""Reasons that another attempt cannot mend: the same text through the same model gives the same answer."""
CONTENDED = frozenset({"lock_timeout", "statement_timeout", "deadlock"})
"""The world's faults that one document may be the cause of: a writer holds its row, say."""
LONGEST_DETAIL = 2048
"""Bytes of a dead letter's detail."""


async def fail(state: WorkerState, job: Job, error: Poison) -> None:
    """Blame one document, tried alone: defer it, or move it to the dead letters after its last attempt.

    Nothing happens where its leases are lost.
    """
    state.in_flight.close(job)
    await state.backlog.remove(job.document)
    if not job.leases:  # lost while it ran: whoever holds them now finds out by itself
        return
    attempt = job.attempt
    if attempt >= state.limits.max_attempts or error.code in PERMANENT:
        await bury(state, job.leases, reason=error.code, detail=str(error), content_hash=job.document.content_hash)
        return
    delay = backoff(attempt, base=state.limits.backoff_base, cap=state.limits.backoff_cap, uniform=state.uniform)
    delays = dict.fromkeys(job.leases, delay)
    await state.patience(lambda: state.queue.defer(delays, code=error.code))
    state.done(job.leases)
    state.telemetry.deferred(state.pipeline.name, job.document.key, error.code, attempt=attempt, delay=delay)
    state.count(Counter({Outcome.DEFERRED: 1}))


async def bury(
    state: WorkerState,
    leases: Sequence[Lease],
    *,
    reason: str,
    detail: str,
    content_hash: ContentHash | None = None,
) -> None:
    """Move one document's messages to the dead letters. Nothing happens where the leases are lost.

    A document that a writer holds is released and comes again: nobody waits for it here.
    """
    try:
        moved = await state.patience(
            lambda: state.queue.dead_letter(leases, reason=reason, detail=storable(detail), content_hash=content_hash),
            raising=CONTENDED,
        )
    except Refused:
        raise
    except Poison as error:  # a trigger or a key of the user's own forbids it: not this process's end
        code, delays = error.code, dict.fromkeys(leases, state.limits.backoff_cap)
        await state.patience(lambda: state.queue.defer(delays, code=code))
        state.done(leases)
        attempt = max(lease.attempt for lease in leases)
        state.telemetry.deferred(
            state.pipeline.name, leases[0].key, code, attempt=attempt, delay=state.limits.backoff_cap
        )
        state.count(Counter({Outcome.DEFERRED: 1}))
        return
    except Transient:
        await state.patience(lambda: state.queue.release(leases, delay=state.limits.poll_max))
        state.done(leases)
        state.count(Counter({Outcome.RELEASED: 1}))
        return
    state.done(leases)
    if moved:
        attempts = max(lease.attempt for lease in leases)
        state.telemetry.dead_lettered(state.pipeline.name, leases[0].key, reason, attempts=attempts)
        state.count(Counter({Outcome.DEAD_LETTERED: 1}))


def storable(detail: str) -> str:
    """Make an error's text fit for a dead letter: one line of at most ``LONGEST_DETAIL`` bytes.

    A library's text may be poison itself: Postgres stores neither NUL nor half a surrogate pair.
    """
    line = " ".join("".join(character if character.isprintable() else " " for character in detail).split())
    return line.encode()[:LONGEST_DETAIL].decode(errors="ignore")
