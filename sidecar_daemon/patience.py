"""Wait out the world's faults: the circuit breaker of one pipeline, or of the catalog.

A step that fails by the world's fault opens the circuit: nothing new is leased. The step itself, repeated with full
jitter, is the half-open probe; when it works, the other failing steps are repeated at once, the circuit closes, and
no message was blamed.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from sidecar_daemon.domain.errors import Refused, SidecarError, Transient
from sidecar_daemon.domain.retry import full_jitter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from sidecar_daemon.telemetry import Telemetry

_Result = TypeVar("_Result")

BASE_SECONDS = 0.25
CAP_SECONDS = 5.0
GRACE_SECONDS = 2.5
"""After an outage in which leases may have run out, every replica first prolongs its own, and leases only then. Each
of its failing steps notices the end within the cap, so that the first of them mostly does within half of it."""


class Patience:
    """Repeats a step while the world is to blame, and tells the outage once."""

    def __init__(
        self, scope: str, telemetry: Telemetry, *, uniform: Callable[[float, float], float], clock: Callable[[], float]
    ) -> None:
        """Name what may be away (``scope``), and inject randomness and a monotonic clock in seconds."""
        self._scope = scope
        self._telemetry = telemetry
        self._uniform = uniform
        self._clock = clock
        self._failing = 0
        """Steps that are being repeated now; the circuit is closed when there is none."""
        self._since = 0.0
        self._closed = asyncio.Event()
        self._closed.set()
        self._told = False
        self._answered = asyncio.Event()
        """Set, and replaced, when a failing step worked."""
        self._relief = asyncio.Event()
        self._answering_since: float | None = 0.0
        """By the clock; None from a failure until the next answer."""
        self._lasted = 0.0
        """Seconds of the last outage."""
        self.reason: str | None = None
        """What it is waiting for, in one line; None while steps work."""

    @property
    def away(self) -> bool:
        """Whether a step is being repeated now."""
        return self._failing > 0

    @property
    def outage(self) -> float:
        """Seconds since the first of the failing steps failed; 0 while none does."""
        return self._clock() - self._since if self._failing else 0.0

    async def closed(self, *, expiring: float = math.inf) -> None:
        """Wait until no step is failing: the gate in front of everything that would take more work in.

        Args:
            expiring: seconds of an outage after which leases may have run out; then others get a moment
                (``GRACE_SECONDS``) to prolong theirs, that nobody takes a lease whose holder lives.
        """
        await self._closed.wait()
        while self._lasted >= expiring and (rest := self._grace_left()) > 0:
            await asyncio.sleep(rest)
            await self._closed.wait()

    async def relief(self, *, within: float) -> None:
        """Wait until the database answers after a failure, also one since the last call, or for so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._relief.wait()
        self._relief.clear()

    def answers(self) -> None:
        """A failing step, or what it tried first, has worked: the other failing steps are repeated at once."""
        if self._answering_since is None:
            self._answering_since = self._clock()
        self._relief.set()
        self._answered.set()
        self._answered = asyncio.Event()

    def _grace_left(self) -> float:
        since = self._clock() if self._answering_since is None else self._answering_since
        return since + GRACE_SECONDS - self._clock()

    async def __call__(
        self,
        step: Callable[[], Awaitable[_Result]],
        *,
        raising: Collection[str] = (),
        until: asyncio.Event | None = None,
    ) -> _Result:
        """Run a step until it works.

        Args:
            step: one call of the database; it bears being repeated.
            raising: codes of the world's faults that the caller deals with.
            until: once set, the step is not repeated any more.

        Raises:
            SidecarError: ``Refused``, ``Poison``, ``Fatal``, and an error named in ``raising``, at once; any other
                ``Transient`` only after ``until`` was set.
        """
        attempt = 0
        answered = False
        try:
            while True:
                try:
                    result = await step()
                except Transient as error:
                    if isinstance(error, Refused) or error.code in raising or (until is not None and until.is_set()):
                        raise
                    attempt += 1
                    await self._wait(attempt, error, until)
                else:
                    answered = True
                    return result
        except SidecarError as error:
            answered = not isinstance(error, Transient) or isinstance(error, Refused)
            raise
        finally:
            if attempt:
                self._close(answered=answered)

    def troubled(self, error: Transient, *, waiting: float) -> None:
        """Tell an outage that the caller itself deals with, until ``relieved``."""
        if self.reason is None:
            self._since = self._clock()
        self._told = True
        self.reason = str(error)
        self._telemetry.fault(self._scope, error, waiting=waiting)
        self._telemetry.circuit(self._scope, "half_open")

    def relieved(self) -> None:
        """What was told with ``troubled`` is over; without effect otherwise."""
        if self._told and not self._failing:
            self._told = False
            self.reason = None
            self._telemetry.circuit(self._scope, "closed")
            self._telemetry.recovered(self._scope, self._clock() - self._since)

    async def _wait(self, attempt: int, error: Transient, until: asyncio.Event | None) -> None:
        """Open the circuit, wait with full jitter, and leave it half open for the next try."""
        if attempt == 1:
            self._since = self._since if self._failing else self._clock()
            self._failing += 1
            self._closed.clear()
        self._answering_since = None
        self.reason = str(error)
        delay = full_jitter(attempt, base=BASE_SECONDS, cap=CAP_SECONDS, uniform=self._uniform)
        self._telemetry.fault(self._scope, error, waiting=delay)
        self._telemetry.circuit(self._scope, "open")
        await _first_of(self._answered, until, within=delay)
        self._telemetry.circuit(self._scope, "half_open")

    def _close(self, *, answered: bool) -> None:
        """One step is through. The last one closes the circuit; the outage is over when the database answered."""
        self._failing -= 1
        if answered:
            self.answers()
        if self._failing:
            return
        self._lasted = self._clock() - self._since
        self._closed.set()
        self.reason = None
        self._telemetry.circuit(self._scope, "closed")
        if answered:
            self._telemetry.recovered(self._scope, self._lasted)


async def _first_of(*events: asyncio.Event | None, within: float) -> None:
    """Wait for the first of the events, or for so many seconds."""
    waits = [asyncio.create_task(event.wait()) for event in events if event is not None]
    try:
        await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
