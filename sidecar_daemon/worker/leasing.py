"""Stage 1: lease messages of one lane, read their documents, and hand windows to the model."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

from sidecar_daemon.domain.errors import Poison, Refused, Transient
from sidecar_daemon.domain.messages import Document, Lane, LongDocuments, Settlement, Window
from sidecar_daemon.domain.outcomes import Outcome, Verdict
from sidecar_daemon.domain.pacing import LeaseHorizon
from sidecar_daemon.worker.failing import bury, fail
from sidecar_daemon.worker.state import Job

if TYPE_CHECKING:
    from sidecar_daemon.domain.messages import DocumentKey, Lease, Reading, TokenWindow
    from sidecar_daemon.domain.pulse import Beat
    from sidecar_daemon.worker.state import WorkerState

READ_AT_ONCE = 64
"""Documents read and tokenized together: the first of a large lease reach the model while the rest are read."""
CLAIMED_AGAIN = (0.25, 1.0)
"""Seconds until a document that another replica embeds is looked at again: about as long as that takes."""


class Leaser:
    """Leases one lane while there is room, wakes on a notification, and polls adaptively without one."""

    def __init__(self, state: WorkerState, lane: Lane, beat: Beat) -> None:
        """Bind a worker's state and a lane, and what records this loop's turns."""
        self._state = state
        self._lane = lane
        self._beat = beat
        self._horizon = LeaseHorizon(most=state.limits.lease_messages)
        self._tokens = 0
        """That the lease under way brought for the model."""

    async def run(self) -> None:
        """Lease until the worker stops. Raises ``Refused`` when the pipeline may not be worked on."""
        state, limits = self._state, self._state.limits
        pause = limits.poll_min
        while await self._room() and await self._world_answers():
            state.wakes[self._lane].clear()
            wanted = self._horizon.messages(state.backlog.room_tokens(self._lane))
            wanted = max(1, min(wanted, state.backlog.room_windows(self._lane)))
            found = await self._lease_once(wanted)
            if found == wanted:  # there may be more, and once there is not, the next look shall come soon
                pause = limits.poll_min
                continue
            pause = limits.poll_min if found else min(pause * 2, limits.poll_max)
            seconds = pause * state.uniform(0.75, 1.25)  # jitter, so that replicas do not poll in step
            with suppress(TimeoutError), self._beat.asleep(seconds):
                async with asyncio.timeout(seconds):
                    await state.wakes[self._lane].wait()

    async def _room(self) -> bool:
        backlog = self._state.backlog
        with self._beat.waiting(lambda: not backlog.has_room(self._lane)):
            return await backlog.room(self._lane)

    async def _world_answers(self) -> bool:
        """Wait while the circuit is open: a lease whose document cannot be settled would burn time, and an attempt.

        And after an outage that was long enough for leases to run out, until whoever held them has had time to prolong
        them: a message that another replica leases meanwhile is a suspect, and travels alone.

        Returns:
            False once the worker stops.
        """
        stopping = asyncio.create_task(self._state.stopping.wait())
        closed = asyncio.create_task(self._state.patience.closed())
        try:
            await asyncio.wait([stopping, closed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            closed.cancel()
        return not self._state.stopping.is_set()

    async def _lease(self, messages: int) -> list[Lease]:
        """Lease at most so many messages; none when the worker stops while the database is away."""
        state, limits = self._state, self._state.limits

        async def lease() -> list[Lease]:
            if state.patience.expiring:
                await state.queue.read([])  # takes nothing: what ran out meanwhile may have a holder, who goes first
                state.patience.answers()
            with suppress(TimeoutError):
                async with asyncio.timeout(state.patience.grace):
                    await state.stopping.wait()
                    return []
            return await state.queue.lease(self._lane, seconds=limits.lease_seconds, limit=messages)

        try:
            return await state.patience(lease, until=state.stopping)
        except Refused:
            raise
        except Transient:
            return []

    async def _lease_once(self, messages: int) -> int:
        """Lease, read and hand on. Returns the number of messages leased."""
        state = self._state
        started = time.monotonic()
        leases = await self._lease(messages)
        leased = time.monotonic() - started
        state.in_flight.leases.update(leases)
        if not leases:
            return 0
        self._tokens = 0
        by_key = await self._bury_hopeless(leases)
        parts = _parts(by_key)
        for number, part in enumerate(parts):
            await self._turn(by_key[part[0]])
            if state.stopping.is_set():
                await self._release([lease for left in parts[number:] for key in left for lease in by_key[key]])
                break
            if held := self._held(part, by_key):
                await self._begin(by_key[held[0]])
                readings = await self._read(held, by_key)
                await self._sort_out(self._coalesce(readings, by_key), by_key)
        self._horizon.learn(len(leases), self._tokens)
        state.telemetry.leased(state.pipeline.name, self._lane, len(leases), len(by_key), leased)
        return len(leases)

    async def _turn(self, leases: list[Lease]) -> None:
        """A suspect waits until no other is under way, before anything of it is read."""
        if _suspect(leases):
            with self._beat.waiting(lambda: self._state.turn_taken):
                await self._state.turn(leases)

    async def _begin(self, leases: list[Lease]) -> None:
        """Before a suspect's text is read, record it: if the process dies from now on, the blame is its own."""
        if _suspect(leases):
            await self._state.patience(lambda: self._state.queue.begin(leases))

    def _held(self, keys: list[DocumentKey], by_key: dict[DocumentKey, list[Lease]]) -> list[DocumentKey]:
        """Documents that are still ours: leases may have been lost while others of theirs waited for a turn or room."""
        for key in keys:
            by_key[key] = [lease for lease in by_key[key] if lease in self._state.in_flight.leases]
        return [key for key in keys if by_key[key]]

    async def _read(self, keys: list[DocumentKey], by_key: dict[DocumentKey, list[Lease]]) -> list[Reading]:
        """Read documents; where one cannot be rendered, read each alone and dead-letter the culprit."""
        state = self._state
        self._beat.turn()
        try:
            return await state.patience(lambda: state.queue.read(keys, claim_seconds=state.limits.lease_seconds))
        except Poison as error:
            if len(keys) == 1:
                await bury(state, by_key[keys[0]], reason=error.code, detail=str(error))
                return []
        return [reading for key in keys for reading in await self._read([key], by_key)]

    async def _bury_hopeless(self, leases: list[Lease]) -> dict[DocumentKey, list[Lease]]:
        """Dead-letter foreign shapes, and what used up its attempts, before any text is read; group the rest."""
        state = self._state
        by_key: dict[DocumentKey, list[Lease]] = {}
        for lease in leases:
            self._beat.turn()
            if lease.key is None:
                await bury(state, [lease], reason="malformed", detail="the message names no document of this source")
            elif lease.attempt > state.limits.max_attempts:
                last = f"; last error: {lease.last_error}" if lease.last_error else ""
                await bury(
                    state,
                    [lease],
                    reason="attempts_exhausted",
                    detail=f"{lease.attempt - 1} attempts ended without an answer{last}",
                )
            else:
                by_key.setdefault(lease.key, []).append(lease)
        return by_key

    def _coalesce(self, readings: list[Reading], by_key: dict[DocumentKey, list[Lease]]) -> list[Reading]:
        """Let messages ride with texts on their way; those whose text is being settled come again, as if claimed.

        Nothing may be awaited between the read and this: a settlement that ends meanwhile would be embedded again.
        """
        left: list[Reading] = []
        for reading in readings:
            if reading.verdict is Verdict.EMBED:
                document = _document(reading, by_key[reading.key])
                if self._state.in_flight.join(document):
                    continue
                if self._state.in_flight.settles(document):
                    left.append(replace(reading, verdict=Verdict.CLAIMED, content=None))
                    continue
            left.append(reading)
        return left

    async def _sort_out(self, readings: list[Reading], by_key: dict[DocumentKey, list[Lease]]) -> None:
        """Send each document where its verdict says."""
        embed: list[Document] = []
        finished: list[Lease] = []
        claimed: list[Lease] = []
        outcomes: Counter[Outcome] = Counter()
        for reading in readings:
            self._beat.turn()
            leases = by_key[reading.key]
            match reading.verdict:
                case Verdict.EMBED:
                    embed.append(_document(reading, leases))
                case Verdict.UNCHANGED:
                    finished += leases
                    outcomes[Outcome.UNCHANGED] += 1
                case Verdict.GONE:
                    finished += leases
                    outcomes[Outcome.GONE] += 1
                case Verdict.BLANK:
                    await self._settle_blank(reading, leases)
                case Verdict.TOO_LARGE:
                    await bury(
                        self._state,
                        leases,
                        reason="too_large",
                        detail=f"{reading.content_bytes} bytes; SIDECAR_MAX_DOCUMENT_BYTES allows less",
                    )
                case Verdict.CLAIMED:
                    claimed += leases
                case Verdict.LATER:
                    await self._release(leases, keep_claims=True)
                case Verdict.MALFORMED:
                    await bury(self._state, leases, reason="malformed", detail="the key is no value of the key's type")
                case _:
                    assert_never(reading.verdict)
        await self._release(claimed, delay=self._state.uniform(*CLAIMED_AGAIN), keep_claims=True)
        await self._acknowledge(finished, outcomes)
        await self._hand_on(embed)

    async def _hand_on(self, documents: list[Document]) -> None:
        """Tokenize off the event loop and put the windows into the backlog."""
        state = self._state
        new = [document for document in documents if not state.in_flight.join(document)]
        if not new:
            return
        started = time.monotonic()
        tokenizing = asyncio.create_task(asyncio.to_thread(lambda: [self._tokenize(document) for document in new]))
        with self._beat.computing(tokenizing.done):
            tokenized = await tokenizing
        seconds = (time.monotonic() - started) / len(new)
        for document, parts in zip(new, tokenized, strict=True):
            if state.in_flight.join(document):  # the other lane brought it meanwhile: one settlement takes a key once
                continue
            if isinstance(parts, Poison):
                await fail(state, Job(document=document, windows=(), leases=list(document.leases)), parts)
                continue
            kept = parts[:1] if state.pipeline.long_documents is LongDocuments.TRUNCATE else parts
            windows = tuple(
                Window(document=document, ordinal=n, of=len(kept), tokens=part) for n, part in enumerate(kept)
            )
            state.telemetry.tokenized(state.pipeline.name, seconds, windows=len(parts), kept=len(windows))
            job = Job(document=document, windows=windows, leases=list(document.leases))
            self._tokens += sum(window.length for window in windows)
            state.in_flight.open(job)
            with self._beat.waiting(lambda: state.backlog.full(self._lane)):
                taken = await state.backlog.put(windows)
            if not taken:
                state.in_flight.close(job)
                await self._release(job.leases)

    def _tokenize(self, document: Document) -> list[TokenWindow] | Poison:
        """Windows of a text, or why it has none: its neighbours must not suffer."""
        try:
            return self._state.embedder.tokenize(document.content)
        except Poison as error:
            return error

    async def _settle_blank(self, reading: Reading, leases: list[Lease]) -> None:
        assert reading.content_hash is not None  # noqa: S101  the database always hashes a blank document
        blank = Settlement(key=reading.key, content_hash=reading.content_hash, chunks=(), leases=tuple(leases))
        with self._beat.waiting(self._state.settlements.full):
            await self._state.settlements.put(blank)

    async def _acknowledge(self, leases: list[Lease], outcomes: Counter[Outcome]) -> None:
        if leases:
            await self._state.patience(lambda: self._state.queue.acknowledge(leases))
            self._state.done(leases)
            self._state.count(outcomes)

    async def _release(self, leases: list[Lease], *, delay: float = 0.0, keep_claims: bool = False) -> None:
        if leases:
            await self._state.patience(lambda: self._state.queue.release(leases, delay=delay, keep_claims=keep_claims))
            self._state.done(leases)
            self._state.count(Counter({Outcome.RELEASED: len({lease.key for lease in leases})}))


def _parts(by_key: dict[DocumentKey, list[Lease]]) -> list[list[DocumentKey]]:
    """What is read and tokenized together: suspects last, for they wait for their turn, and each alone."""
    clean = [key for key, leases in by_key.items() if not _suspect(leases)]
    parts = [clean[first : first + READ_AT_ONCE] for first in range(0, len(clean), READ_AT_ONCE)]
    return [*parts, *([key] for key, leases in by_key.items() if _suspect(leases))]


def _suspect(leases: list[Lease]) -> bool:
    """Whether an earlier attempt at a document may have ended the process."""
    return any(lease.attempt > 1 for lease in leases)


def _document(reading: Reading, leases: list[Lease]) -> Document:
    assert reading.content is not None  # noqa: S101  the verdict says so
    assert reading.content_hash is not None  # noqa: S101  the verdict says so
    return Document(key=reading.key, content=reading.content, content_hash=reading.content_hash, leases=tuple(leases))
