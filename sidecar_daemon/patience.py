"""Wait out the world's faults: one database step is repeated until it works, and no message is blamed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from sidecar_daemon.domain.errors import Refused, Transient
from sidecar_daemon.domain.retry import full_jitter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from sidecar_daemon.telemetry import Telemetry

_Result = TypeVar("_Result")

BASE_SECONDS = 0.25
CAP_SECONDS = 5.0


class Patience:
    """Repeats a step while the world is to blame, with full jitter, and tells the outage once."""

    def __init__(
        self, scope: str, telemetry: Telemetry, *, uniform: Callable[[float, float], float], clock: Callable[[], float]
    ) -> None:
        """Name what may be away (``scope``), and inject randomness and a monotonic clock in seconds."""
        self._scope = scope
        self._telemetry = telemetry
        self._uniform = uniform
        self._clock = clock
        self._since: float | None = None
        self.reason: str | None = None
        """What it is waiting for, in one line; None while steps work."""

    async def __call__(self, step: Callable[[], Awaitable[_Result]], *, raising: Collection[str] = ()) -> _Result:
        """Run a step until it works.

        Raises:
            SidecarError: ``Refused``, ``Poison``, ``Fatal``, and any error whose code is in ``raising``, at once.
        """
        attempt = 0
        while True:
            try:
                result = await step()
            except Refused:
                raise
            except Transient as error:
                if error.code in raising:
                    raise
                attempt += 1
                self._since = self._clock() if self._since is None else self._since
                delay = full_jitter(attempt, base=BASE_SECONDS, cap=CAP_SECONDS, uniform=self._uniform)
                self.reason = str(error)
                self._telemetry.fault(self._scope, error, waiting=delay)
                await asyncio.sleep(delay)
            else:
                if self._since is not None:
                    self._telemetry.recovered(self._scope, self._clock() - self._since)
                    self._since = self.reason = None
                return result
