"""What all measures share: sizes, corpora, pulled models, the calibration, a server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from sidecar_daemon.adapters.onnx.store import TOKENIZER
from tests.bench.contest import Contestant, ContestantError
from tests.bench.corpora import Corpora
from tests.bench.folders import SHAPE, TRAINED, write_peer_folders, write_shape
from tests.bench.machine import NO_BF16, has_bf16, second_runtime
from tests.bench.peers import environment
from tests.bench.server import Server
from tests.command_line import sidecar

if TYPE_CHECKING:
    from tests.bench.report import Report

T = TypeVar("T")

CALIBRATION_SECONDS = 0.25
STILL_SECONDS = 0.05
"""After a calibration: its idle threads spin on for a moment, which must not fall into the block."""
PROFILES = ("tiny", "quick", "full")
"""``tiny`` shows that everything runs; its figures mean nothing."""


@dataclass
class Workplace:
    """Everything of one run. Leave it through ``async with``; servers and processes end with it."""

    report: Report
    cache: Path
    """Peers' environments and models: kept from run to run, outside the repository."""
    threads: int
    tolerance: float
    memory_minutes: float | None = None
    """How long P12 watches after its warm-up; None: as the profile says."""
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _started: float = field(default_factory=time.monotonic)
    _calibrator: Contestant | None = None
    _corpora: Corpora | None = None
    _server: Server | None = None

    async def __aenter__(self) -> Self:
        folder = tempfile.TemporaryDirectory(prefix="sb", dir="/tmp", ignore_cleanup_errors=True)
        self.folder = Path(self.stack.enter_context(folder))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()

    def say(self, line: str) -> None:
        """Progress, to standard error, with the seconds since the start."""
        sys.stderr.write(f"{time.monotonic() - self._started:6.0f} s  {line}\n")
        sys.stderr.flush()

    def pick(self, tiny: T, quick: T, full: T) -> T:
        """The amount of the profile."""
        return {"tiny": tiny, "quick": quick, "full": full}[self.report.profile]

    @property
    def rounds(self) -> int:
        """Rounds of a comparison, the first of which does not count."""
        return self.pick(2, 2, 6)

    @property
    def models(self) -> Path:
        """Folder of pulled models, as ``SIDECAR_MODELS_DIR``."""
        return self.cache / "models"

    @property
    def runtime(self) -> str:
        """The runtime of measures that do not name one: what ``SIDECAR_RUNTIME`` says."""
        return os.environ.get("SIDECAR_RUNTIME", "auto")

    def precisions(self) -> dict[str, str]:
        """The runtime to measure by precision: fp32 always, bf16 where the processor and the extra are there.

        fp32 is onnxruntime's, unless ``SIDECAR_RUNTIME`` asks for the second runtime on a processor without bf16.
        """
        precision, _ = second_runtime()
        asked = self.runtime == "openvino" and precision == "fp32"
        found = {"fp32": "openvino" if asked else "onnxruntime"}
        return found | {"bf16": "openvino"} if precision == "bf16" else found

    def why_no_bf16(self) -> str:
        """Why ``precisions`` has no bf16."""
        return second_runtime()[1] if has_bf16() else NO_BF16

    async def calibrate(self, seconds: float = CALIBRATION_SECONDS) -> dict[str, float]:
        """GFLOP/s of a matrix product on as many threads as we use, right now: ``median`` and ``best``."""
        if self._calibrator is None:
            self._calibrator = await self.stack.enter_async_context(
                Contestant(
                    "calibrator",
                    "tests.bench.contestants.calibrator",
                    environment={"OPENBLAS_NUM_THREADS": str(self.threads)},
                    folder=self.folder,
                )
            )
        found: dict[str, float] = await self._calibrator.ask("product", seconds=seconds)
        await asyncio.sleep(STILL_SECONDS)
        return found

    async def prepare_models(self) -> None:
        """Pull the trained model with the public command, and make the random one. No-ops when they are there."""
        pulled = await sidecar("models", "pull", TRAINED, "--json", MODELS_DIR=str(self.models))
        if pulled.code:
            raise ContestantError(pulled.err.strip())
        write_shape(self.models)

    async def corpora(self) -> Corpora:
        """The texts."""
        if self._corpora is None:
            await self.prepare_models()
            self._corpora = Corpora.load(self.models / TRAINED / TOKENIZER, self.report.seed)
        return self._corpora

    async def server(self) -> Server:
        """The database server, started when first needed."""
        if self._server is None:
            self._server = await self.stack.enter_async_context(Server(self.folder / "server"))
            self.report.machine["postgres"] = await self._server.described()
        return self._server

    def ours(self, model: str = SHAPE, runtime: str = "onnxruntime") -> Contestant:
        """Our model path as a contestant."""
        return Contestant(
            f"ours-{model}-{runtime}",
            "tests.bench.contestants.ours",
            (model, runtime, str(self.threads)),
            environment={"SIDECAR_MODELS_DIR": str(self.models)},
            folder=self.folder,
        )

    async def peer(self, kind: str) -> Contestant:
        """A peer as a contestant: ``fastembed``, ``torch-fp32``, ``torch-bf16`` or ``onnx``."""
        python = await environment("peers-onnx" if kind == "onnx" else "peers", self.cache, self.say)
        sentence, fast = write_peer_folders(self.models, self.cache / "folders")
        return Contestant(
            f"peer-{kind}",
            "tests.bench.contestants.peer",
            (kind, str(fast if kind == "fastembed" else sentence), str(self.threads)),
            python=python,
            environment={"OMP_NUM_THREADS": str(self.threads)},
            folder=self.folder,
        )
