"""One replica: the real daemon, its ports made of test parts. ``python -m tests.torture.replica``.

Settings of the daemon come from ``SIDECAR_*`` as always. The torture reads its own from:

    TORTURE_MODEL      ``real``: the model that the pipelines name, instead of the test embedder
    TORTURE_SEED       seeds the embedder's pauses
    TORTURE_SLOWEST    seconds that one run of the model takes at most
    TORTURE_STEADY     1: every run takes that long
    TORTURE_MUTANT     name of a guard that is switched off in this process (``mutants``)
    TORTURE_FAILPOINT  ``name:n``: kill -9 at the n-th pass of this point (``FAILPOINTS``)

None of this exists in a normal run: it all enters through ``run_daemon(settings, Parts(...))``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sidecar_daemon.app.crews import Parts
from sidecar_daemon.app.daemon import run_daemon
from sidecar_daemon.app.runtimes import load_onnx
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.settings import Settings
from tests.torture.embedder import TortureEmbedder
from tests.torture.mutants import PYTHON_MUTANTS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sidecar_daemon.adapters.onnx.manifest import Manifest
    from sidecar_daemon.ports import Embedder, Queue
    from sidecar_daemon.settings import ModelSettings

STEPS = ("lease", "read", "begin", "settle", "acknowledge", "extend", "defer", "release", "dead_letter")
"""Methods of the queue; each has a point before its call and one after its answer."""
FAILPOINTS = (*(f"{when}_{step}" for step in (*STEPS, "embed") for when in ("before", "after")),)
_PR_SET_PDEATHSIG = 1


@dataclass
class Failpoint:
    """Kills this process at the n-th pass of a named point."""

    name: str = ""
    passes: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def parse(cls, text: str) -> Failpoint:
        """``name:n``; empty for none. Raises ``Fatal`` for an unknown name."""
        name, _, passes = text.partition(":")
        if name and name not in FAILPOINTS:
            raise Fatal("bad_failpoint", f"TORTURE_FAILPOINT is {name!r}: must be one of {', '.join(FAILPOINTS)}")
        return cls(name, int(passes or 1))

    def __call__(self, name: str) -> None:
        """Pass a point."""
        if name != self.name:
            return
        with self._lock:
            self.passes -= 1
            if self.passes == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class FailpointQueue:
    """The real queue, with a point before and after each step."""

    def __init__(self, queue: Queue, around: Callable[[str], None]) -> None:
        """Wrap a queue; ``around`` is told each point by name."""
        self._queue = queue
        self._around = around

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Every method of the queue."""
        method: Callable[..., Awaitable[Any]] = getattr(self._queue, name)

        async def step(*args: Any, **kwargs: Any) -> Any:
            self._around(f"before_{name}")
            answer = await method(*args, **kwargs)
            if answer or name != "lease":  # to die after an empty lease would test nothing
                self._around(f"after_{name}")
            return answer

        return step


def main() -> int:
    """Run the daemon until it is told, or made, to stop."""
    # A replica must not outlive its rig, whatever happened to that.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if mutant := os.environ.get("TORTURE_MUTANT"):
        PYTHON_MUTANTS[mutant].apply()
    failpoint = Failpoint.parse(os.environ.get("TORTURE_FAILPOINT", ""))
    embedder = TortureEmbedder(
        seed=int(os.environ.get("TORTURE_SEED", "0")),
        slowest=float(os.environ.get("TORTURE_SLOWEST", "0.006")),
        steady=os.environ.get("TORTURE_STEADY") == "1",
        around=failpoint,
    )

    def wrap(queue: Queue) -> Queue:
        return FailpointQueue(queue, failpoint)  # type: ignore[return-value]  # every method, through __getattr__

    load: Callable[[Manifest, ModelSettings], Embedder] = lambda *_: embedder  # noqa: E731  the other one has a name
    if os.environ.get("TORTURE_MODEL") == "real":
        load = load_onnx
    try:
        return run_daemon(Settings.read(), Parts(load_embedder=load, wrap_queue=wrap))
    except Fatal as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
