"""Faults injected by wrapping the real queue and the real embedder: errors, lost answers, delays, poison."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sidecar_daemon.domain.errors import Poison

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from sidecar_daemon.domain.messages import (
        ContentHash,
        DocumentKey,
        Lane,
        Lease,
        LongDocuments,
        ModelId,
        Reading,
        Settled,
        Settlement,
        SweepWindow,
        TokenIds,
        TokenWindow,
        Vectors,
    )
    from sidecar_daemon.ports import Embedder, Queue

T = TypeVar("T")


@dataclass(slots=True)
class Gate:
    """A call that waits: ``reached`` says that it came, ``open`` lets it go on."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    open: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Fault:
    error: Exception | None = None
    gate: Gate | None = None
    after: bool = False
    """The real call is made first: its answer is lost, or late."""


class FaultyQueue:
    """The real queue, with faults planted at named calls. Faults of a call are used up in the order planted."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._faults: dict[str, deque[_Fault]] = defaultdict(deque)
        self._broken: dict[str, Exception] = {}
        self.calls: list[tuple[str, Any]] = []
        """Name and first argument of every call."""
        self.under_way = 0
        """Calls that the database has not answered yet."""

    def fail(self, name: str, error: Exception, *, times: int = 1, after: bool = False) -> None:
        """Make the next calls fail, before or after the database did its part."""
        self._faults[name].extend(_Fault(error=error, after=after) for _ in range(times))

    def hold(self, name: str, *, after: bool = False, error: Exception | None = None) -> Gate:
        """Make the next call wait at a gate, and fail behind it where an error is given."""
        gate = Gate()
        self._faults[name].append(_Fault(error=error, gate=gate, after=after))
        return gate

    def cut(self, error: Exception, *names: str) -> None:
        """Make every call of these names fail until ``mend``."""
        self._broken.update(dict.fromkeys(names, error))

    def mend(self) -> None:
        """Let all calls through again."""
        self._broken.clear()

    def count(self, name: str) -> int:
        """How often a method was called."""
        return sum(called == name for called, _ in self.calls)

    async def lease(self, lane: Lane, *, seconds: float, limit: int) -> list[Lease]:
        return await self._through("lease", lane, lambda: self._queue.lease(lane, seconds=seconds, limit=limit))

    async def read(self, keys: Collection[DocumentKey], *, claim_seconds: float | None = None) -> list[Reading]:
        return await self._through("read", list(keys), lambda: self._queue.read(keys, claim_seconds=claim_seconds))

    async def begin(self, leases: Collection[Lease]) -> None:
        await self._through("begin", list(leases), lambda: self._queue.begin(leases))

    async def settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        return await self._through("settle", list(settlements), lambda: self._queue.settle(settlements))

    async def acknowledge(self, leases: Collection[Lease]) -> int:
        return await self._through("acknowledge", list(leases), lambda: self._queue.acknowledge(leases))

    async def extend(self, leases: Collection[Lease], *, seconds: float) -> set[Lease]:
        return await self._through("extend", list(leases), lambda: self._queue.extend(leases, seconds=seconds))

    async def defer(self, delays: Mapping[Lease, float], *, code: str) -> int:
        return await self._through("defer", dict(delays), lambda: self._queue.defer(delays, code=code))

    async def release(self, leases: Collection[Lease], *, delay: float = 0.0, keep_claims: bool = False) -> int:
        return await self._through(
            "release", list(leases), lambda: self._queue.release(leases, delay=delay, keep_claims=keep_claims)
        )

    async def dead_letter(
        self, leases: Collection[Lease], *, reason: str, detail: str, content_hash: ContentHash | None
    ) -> int:
        return await self._through(
            "dead_letter",
            list(leases),
            lambda: self._queue.dead_letter(leases, reason=reason, detail=detail, content_hash=content_hash),
        )

    async def sweep(self, *, rows: int, interval: float) -> SweepWindow:
        return await self._through("sweep", rows, lambda: self._queue.sweep(rows=rows, interval=interval))

    async def _through(self, name: str, argument: object, call: Callable[[], Awaitable[T]]) -> T:
        self.calls.append((name, argument))
        if name in self._broken:
            raise self._broken[name]
        fault = self._faults[name].popleft() if self._faults[name] else _Fault()
        if not fault.after:
            await _strike(fault)
        self.under_way += 1
        try:
            answer = await call()
        finally:
            self.under_way -= 1
        if fault.after:
            await _strike(fault)
        return answer


async def _strike(fault: _Fault) -> None:
    if fault.gate is not None:
        fault.gate.reached.set()
        await fault.gate.open.wait()
    if fault.error is not None:
        raise fault.error


class FaultyEmbedder:
    """A real embedder that fails on texts with a mark, and can be made to wait inside a run."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._marks: dict[str, BaseException] = {}
        self._marked: dict[bytes, BaseException] = {}
        self._unreadable: dict[str, BaseException] = {}
        self._texts: dict[bytes, str] = {}
        self.runs: list[list[str]] = []
        """The texts of every run, failed ones included; a long text comes once a window."""
        self.entered = threading.Semaphore(0)
        """Released at the start of every run."""
        self.gate = threading.Event()
        """Runs wait here; open at first."""
        self.gate.set()

    def poison(self, mark: str, error: BaseException | None = None) -> None:
        """Fail every run that holds a window of a text with this mark."""
        self._marks[mark] = error or Poison("inference_failed", "planted")

    def unreadable(self, mark: str, error: BaseException) -> None:
        """Fail to tokenize texts with this mark."""
        self._unreadable[mark] = error

    def heal(self) -> None:
        """Embed every text again."""
        self._marks.clear()
        self._marked.clear()
        self._unreadable.clear()

    @property
    def dimensions(self) -> int:
        return self._embedder.dimensions

    def model_id(self, long_documents: LongDocuments) -> ModelId:
        return self._embedder.model_id(long_documents)

    def tokenize(self, text: str) -> list[TokenWindow]:
        for mark, error in self._unreadable.items():
            if mark in text:
                raise error
        windows = self._embedder.tokenize(text)
        for window in windows:
            self._texts[window.ids.tobytes()] = text
            self._marked |= {window.ids.tobytes(): error for mark, error in self._marks.items() if mark in text}
        return windows

    def embed(self, windows: Sequence[TokenIds]) -> Vectors:
        self.runs.append([self._texts[ids.tobytes()] for ids in windows])
        self.entered.release()
        self.gate.wait(30)
        for ids in windows:
            if ids.tobytes() in self._marked:
                raise self._marked[ids.tobytes()]
        return self._embedder.embed(windows)
