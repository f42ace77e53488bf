"""What a worker knows: its limits, the messages it holds, the documents on their way, the hand-offs between stages."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sidecar_daemon.domain.errors import Poison
from sidecar_daemon.domain.messages import Chunk, Lane, LongDocuments, Settlement
from sidecar_daemon.domain.windows import combine_windows

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Collection
    from concurrent.futures import Executor

    from sidecar_daemon.domain.messages import (
        ContentHash,
        Document,
        DocumentKey,
        Lease,
        ModelId,
        Pipeline,
        Vector,
        Window,
    )
    from sidecar_daemon.domain.outcomes import Outcome
    from sidecar_daemon.domain.pacing import RunBudget
    from sidecar_daemon.domain.pulse import Pulse
    from sidecar_daemon.patience import Patience
    from sidecar_daemon.ports import Embedder, Queue
    from sidecar_daemon.telemetry import Telemetry
    from sidecar_daemon.worker.backlog import Backlog


_RUNS_AHEAD = 8
"""Full runs a thread that may wait for the model. What a replica holds, another cannot begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """How much at once, how long, how often. Durations in seconds."""

    threads: int
    batch_tokens: int
    """Padded tokens of one run at most; what a run gets is fitted to a duration below that."""
    batch_windows: int
    lease_seconds: float
    lease_messages: int
    max_attempts: int
    backoff_base: float
    backoff_cap: float
    poll_min: float
    poll_max: float
    drain_seconds: float

    @property
    def expiring_seconds(self) -> float:
        """So long without an answer, and leases run out: they were extended a third of their length before, or more.

        A sixth of it is for the calls under way, which try again by themselves.
        """
        return self.lease_seconds / 2

    @property
    def backlog_tokens(self) -> int:
        """Tokens of one lane that may wait for the model: enough to choose near-equal lengths from."""
        return _RUNS_AHEAD * self.threads * self.batch_tokens

    @property
    def backlog_windows(self) -> int:
        """Windows of one lane that may wait: as many runs, where their windows are what limits them."""
        return _RUNS_AHEAD * self.threads * self.batch_windows


@dataclass(slots=True, eq=False)
class Job:
    """One document on its way: its windows, the vectors so far, and all messages it answers."""

    document: Document
    windows: tuple[Window, ...]
    leases: list[Lease]
    vectors: dict[int, Vector] = field(default_factory=dict)
    """By the window's ordinal."""

    @property
    def complete(self) -> bool:
        """Whether every window has its vector."""
        return len(self.vectors) == len(self.windows)

    @property
    def attempt(self) -> int:
        """The highest attempt among its messages."""
        return max(lease.attempt for lease in self.leases)

    def settlement(self, policy: LongDocuments) -> Settlement:
        """What to write, under a policy for long documents. Raises ``Poison`` when windows cancel each other out."""
        return Settlement(
            key=self.document.key,
            content_hash=self.document.content_hash,
            chunks=tuple(self._chunks(policy)),
            leases=tuple(self.leases),
        )

    def _chunks(self, policy: LongDocuments) -> list[Chunk]:
        text = self.document.content
        if policy is LongDocuments.MEAN and len(self.windows) > 1:
            ordered = np.stack([self.vectors[window.ordinal] for window in self.windows])
            weights = [window.tokens.content_tokens for window in self.windows]
            mean = combine_windows(ordered, weights)
            if not mean.any():
                raise Poison("bad_vector", "the vectors of the document's windows cancel each other out")
            return [Chunk(number=0, text=text, vector=mean)]
        return [
            Chunk(
                number=window.ordinal,
                text=text[window.tokens.start : window.tokens.end],
                vector=self.vectors[window.ordinal],
            )
            for window in self.windows
        ]


class InFlight:
    """Every message that this worker holds, and the documents they brought."""

    def __init__(self) -> None:
        """Start empty."""
        self.leases: set[Lease] = set()
        self._jobs: dict[int, Job] = {}
        """By the identity of the document, which the job keeps alive."""
        self._joinable: dict[tuple[DocumentKey, ContentHash], Job] = {}
        self._settling: set[tuple[DocumentKey, ContentHash]] = set()

    @property
    def jobs(self) -> list[Job]:
        """Documents on their way to the model or to settle, oldest first."""
        return list(self._jobs.values())

    def open(self, job: Job) -> None:
        """Follow a document from here to its settlement."""
        self._jobs[id(job.document)] = job
        self._joinable[job.document.key, job.document.content_hash] = job

    def job_of(self, document: Document) -> Job | None:
        """The job of a document; None once it is closed."""
        return self._jobs.get(id(document))

    def join(self, document: Document) -> bool:
        """Let a document's messages ride with the same text already on its way; False when there is none.

        Safe because the messages were leased before this text was read, and settle writes only when the text is
        still the current one.
        """
        job = self._joinable.get((document.key, document.content_hash))
        if job is None:
            return False
        job.leases.extend(document.leases)
        return True

    def close(self, job: Job) -> None:
        """Follow a document no longer: later messages of the same text start anew."""
        self._jobs.pop(id(job.document), None)
        key = (job.document.key, job.document.content_hash)
        if self._joinable.get(key) is job:
            del self._joinable[key]

    def settling(self, job: Job) -> None:
        """Close a document whose settlement begins: its messages are counted, no more can ride with it."""
        self.close(job)
        self._settling.add((job.document.key, job.document.content_hash))

    def settles(self, document: Document) -> bool:
        """Whether this very text is being settled now."""
        return (document.key, document.content_hash) in self._settling

    def settled(self) -> None:
        """The settlement that was under way has ended, one way or another."""
        self._settling.clear()


@dataclass(slots=True, kw_only=True)
class WorkerState:
    """What the three stages share. Only the event loop touches it."""

    pipeline: Pipeline
    model_id: ModelId
    queue: Queue
    embedder: Embedder
    executor: Executor
    limits: WorkerLimits
    telemetry: Telemetry
    patience: Patience
    pulse: Pulse
    uniform: Callable[[float, float], float]
    budget: RunBudget
    backlog: Backlog
    settlements: asyncio.Queue[Job | Settlement | None]
    """Hand-off to stage 3: embedded documents, blank ones, and None after the last. Bounded."""
    in_flight: InFlight = field(default_factory=InFlight)
    wakes: dict[Lane, asyncio.Event] = field(default_factory=lambda: {lane: asyncio.Event() for lane in Lane})
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    runtime_failing: bool = False
    """Whether the model refuses whatever it is given."""
    _turn: Collection[Lease] = ()
    """The messages of the suspect whose turn it is, or was last."""
    _freed: asyncio.Event = field(default_factory=asyncio.Event)

    async def turn(self, leases: Collection[Lease]) -> None:
        """Wait until no other suspect is between the reading of its text and its settlement.

        Suspects of one crash come back together, and in the same order: were two under way at once, the neighbour of
        the culprit would be blamed with it every time.
        """
        while self.turn_taken:
            self._freed.clear()
            await self._freed.wait()
        self._turn = leases

    @property
    def turn_taken(self) -> bool:
        """Whether a suspect is under way."""
        return not self.in_flight.leases.isdisjoint(self._turn)

    def done(self, leases: Collection[Lease]) -> None:
        """Messages that are no longer held: acknowledged, made visible again, dead or lost."""
        self.in_flight.leases.difference_update(leases)
        self._freed.set()

    def count(self, outcomes: Counter[Outcome]) -> None:
        """Count documents that ended outside a settle."""
        for outcome, number in outcomes.items():
            self.telemetry.documents(self.pipeline.name, outcome, number)
