"""The faults by name: what each does, how often in each profile, and beside whom it may run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.torture.faults import t01_kill, t04_backends

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport


@dataclass(frozen=True)
class Fault:
    """One row of the table of RELIABILITY 4."""

    run: Callable[[Bench, int], Awaitable[FaultReport]]
    ci: int
    """How often it is injected in the ci profile; 0: not at all."""
    full: int
    alone: bool = False
    """It measures rates or times, or loads the machine so that others would be measured wrong: nothing beside it."""


FAULTS = {
    "T1": Fault(t01_kill.run, ci=30, full=1000),
    "T4": Fault(t04_backends.run, ci=30, full=1000),
}
