"""The faults by name: what each does, how often in each profile, and beside whom it may run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.torture.faults import (
    t01_kill,
    t02_failpoints,
    t03_stop,
    t04_backends,
    t05_server,
    t06_wire,
    t07_poison,
    t08_abort,
    t09_duplicates,
    t10_hot,
    t11_machine,
    t12_interleavings,
    t13_world,
    t14_pooler,
    t15_terminate,
    t16_soak,
    t17_mutants,
)
from tests.torture.mutants import PYTHON_MUTANTS, SQL_MUTANTS
from tests.torture.scenes import SCENES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.torture.bench import Bench
    from tests.torture.report import FaultReport

MUTANTS = len(SQL_MUTANTS) + len(PYTHON_MUTANTS)


@dataclass(frozen=True)
class Fault:
    """One row of the table of RELIABILITY 4."""

    run: Callable[[Bench, int], Awaitable[FaultReport]]
    ci: int
    """How often it is injected in the ci profile; 0: not at all."""
    full: int
    first: bool = False
    """It takes longest: what is shorter finds its place beside it."""
    alone: bool = False
    """It measures rates or times, or loads the machine so that others would be measured wrong: nothing beside it."""


FAULTS = {
    "T1": Fault(t01_kill.run, ci=30, full=1000, first=True),
    "T1-ONNX": Fault(t01_kill.run_with_real_model, ci=3, full=100),
    "T2": Fault(t02_failpoints.run, ci=1, full=50, first=True),
    "T3": Fault(t03_stop.run, ci=3, full=200),
    "T4": Fault(t04_backends.run, ci=30, full=1000),
    "T5": Fault(t05_server.run, ci=3, full=100, alone=True),
    "T6": Fault(t06_wire.run, ci=3, full=50),
    "T7": Fault(t07_poison.run, ci=1, full=1),
    "T8": Fault(t08_abort.run, ci=1, full=50),
    "T9": Fault(t09_duplicates.run, ci=5, full=10),
    "T10": Fault(t10_hot.run, ci=20, full=600),
    "T11": Fault(t11_machine.run, ci=200, full=10_000),
    "T12": Fault(t12_interleavings.run, ci=len(SCENES), full=len(SCENES), first=True),
    "T13": Fault(t13_world.run, ci=1, full=10),
    "T14": Fault(t14_pooler.run, ci=1, full=50),
    "T15": Fault(t15_terminate.run, ci=10, full=300),
    "T16": Fault(t16_soak.run, ci=0, full=3600, alone=True),
    "T17": Fault(t17_mutants.run, ci=MUTANTS, full=MUTANTS, alone=True),
}
