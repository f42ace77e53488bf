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
"""After an outage in which leases may have run out, every replica first prolongs its own, and leases only then. The
first of a replica's failing steps mostly notices the end within half of the cap; what hangs in a connection that gives
no answer notices it later, and its messages may be leased by others."""


class Patience:
    """Repeats a step while the world is to blame, and tells the outage once."""

    def __init__(
        self,
        scope: str,
        telemetry: Telemetry,
        *,
        uniform: Callable[[float, float], float],
        clock: Callable[[], float],
        expiring: float = math.inf,
    ) -> None:
        """Name what may be away (``scope``), and inject randomness and a monotonic clock in seconds.

        ``expiring``: seconds without an answer after which leases may have run out.
        """
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
        self._expiring = expiring
        self._answering = True
        """False from a failure until the next answer."""
        self._worked_at = clock()
        """When a step worked last."""
        self._calm_at = -math.inf
        """Nothing is leased before."""
        self._relief = asyncio.Event()
        self.reason: str | None = None
        """What it is waiting for, in one line; None while steps work."""

    @property
    def away(self) -> bool:
        """Whether a step is being repeated now."""
        return self._failing > 0

    @property
    def expiring(self) -> bool:
        """Whether steps fail, and have for so long that leases may have run out."""
        return self.away and self._clock() - self._worked_at >= self._expiring

    @property
    def grace(self) -> float:
        """Seconds until leases may be taken: until then their holders prolong them."""
        return max(0.0, self._calm_at - self._clock())

    async def closed(self) -> None:
        """Wait until no step is failing, and for the grace: the gate in front of all that would take more work in."""
        await self._closed.wait()
        while rest := self.grace:
            await asyncio.sleep(rest)
            await self._closed.wait()

    async def relief(self, *, within: float) -> None:
        """Wait until the database answers, and leases may have run out meanwhile; or for so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._relief.wait()
        self._relief.clear()

    def answers(self) -> None:
        """A failing step, or what it tried first, has worked: the other failing steps are repeated at once."""
        now = self._clock()
        # A failure within the grace does not end it: others may have failed as well.
        if not self._answering and (now - self._worked_at >= self._expiring or now < self._calm_at):
            self._calm_at = now + GRACE_SECONDS
            self._relief.set()
        self._answering = True
        self._answered.set()
        self._answered = asyncio.Event()

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
                    if not attempt:
                        self._worked_at = self._clock()
                    return result
        except SidecarError as error:
            answered = not isinstance(error, Transient) or isinstance(error, Refused) or error.code in raising
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
        self._answering = False
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
            self._worked_at = self._clock()
        if self._failing:
            return
        self._closed.set()
        self.reason = None
        self._telemetry.circuit(self._scope, "closed")
        if answered:
            self._telemetry.recovered(self._scope, self._clock() - self._since)


async def _first_of(*events: asyncio.Event | None, within: float) -> None:
    """Wait for the first of the events, or for so many seconds."""
    waits = [asyncio.create_task(event.wait()) for event in events if event is not None]
    try:
        await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
