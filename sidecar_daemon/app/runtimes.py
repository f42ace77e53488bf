"""Which runtime computes the vectors here, in which precision, and why."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.onnx.graph import Precision
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.settings import Runtime

if TYPE_CHECKING:
    from sidecar_daemon.adapters.onnx.graph import OpenGraph
    from sidecar_daemon.adapters.onnx.manifest import Manifest
    from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
    from sidecar_daemon.settings import ModelSettings

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Instructions that multiply bf16. OpenVINO also imitates it on any AVX-512, which is slower than float32."""
_EXTRA = "pip install 'sidecar-daemon[openvino]'"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the choice depends on."""

    installed: bool
    """Whether the extra ``openvino`` is there."""
    bf16: bool
    """Whether the processor multiplies bf16."""
    may_compile: bool
    """Whether memory may be writable and executable, as OpenVINO's own kernels need it."""


@dataclass(frozen=True, slots=True)
class RuntimeChoice:
    """What computes the vectors."""

    runtime: Runtime
    """Never ``auto``."""
    precision: Precision
    reason: str

    def __str__(self) -> str:
        """For people, such as ``openvino in bf16``."""
        return f"{self.runtime} in {self.precision}"


def choose_runtime(wanted: Runtime, machine: Machine) -> RuntimeChoice:
    """Choose. Vectors of both precisions agree within a cosine of 0.9999, so the model's id is the same.

    Raises:
        Fatal: ``bad_setting``, OpenVINO is asked for by name and cannot run here.
    """
    if wanted is Runtime.ONNXRUNTIME:
        return RuntimeChoice(wanted, Precision.FP32, "SIDECAR_RUNTIME names it")
    missing = _missing(machine)
    if wanted is Runtime.OPENVINO:
        if missing is not None:
            what, mend = missing
            raise Fatal("bad_setting", f"SIDECAR_RUNTIME is 'openvino', but {what}: {mend}, or set it to auto")
        if machine.bf16:
            return RuntimeChoice(wanted, Precision.BF16, "SIDECAR_RUNTIME names it, and the processor has bf16")
        return RuntimeChoice(wanted, Precision.FP32, "SIDECAR_RUNTIME names it; the processor has no bf16")
    if not machine.bf16:
        return RuntimeChoice(Runtime.ONNXRUNTIME, Precision.FP32, "the processor has no bf16 (AVX-512 BF16 or AMX)")
    if missing is not None:
        what, mend = missing
        return RuntimeChoice(Runtime.ONNXRUNTIME, Precision.FP32, f"the processor has bf16, but {what} ({mend})")
    return RuntimeChoice(Runtime.OPENVINO, Precision.BF16, "the processor has bf16, and the extra is installed")


def _missing(machine: Machine) -> tuple[str, str] | None:
    """What OpenVINO lacks here, and what mends it."""
    if not machine.installed:
        return "the extra 'openvino' is not installed", _EXTRA
    if not machine.may_compile:
        return "memory may not be writable and executable here", "under systemd set MemoryDenyWriteExecute=no"
    return None


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """Look at the installation, the processor and this process's rules. OpenVINO is found, not imported."""
    return Machine(installed=find_spec("openvino") is not None, bf16=has_bf16(cpuinfo), may_compile=may_compile())


def has_bf16(cpuinfo: Path) -> bool:
    """Whether the first processor's flags name bf16; False where there is no such file."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return not BF16_FLAGS.isdisjoint(flags.split())


def may_compile() -> bool:
    """Whether this process may have memory that is writable and executable at once."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError:
        return False
    return True


def load_onnx(manifest: Manifest, settings: ModelSettings) -> OnnxEmbedder:
    """Load a pulled model in the runtime that is chosen here.

    Raises:
        Fatal: the model is missing or damaged, or the runtime that the settings name cannot run here.
    """
    from sidecar_daemon.adapters.onnx.session import OnnxEmbedder  # noqa: PLC0415  its libraries are slow to load

    choice = choose_runtime(settings.runtime, this_machine())
    return OnnxEmbedder.load(manifest, settings.dir, threads=settings.threads, open_graph=_opener(choice))


def _opener(choice: RuntimeChoice) -> OpenGraph | None:
    if choice.runtime is not Runtime.OPENVINO:
        return None
    try:
        from sidecar_daemon.adapters.onnx.openvino_graph import OpenvinoGraph  # noqa: PLC0415  an extra, slow to load
    except ImportError as error:
        raise Fatal("runtime_broken", f"OpenVINO is installed but cannot be imported: {error}; {_EXTRA}") from error
    return partial(OpenvinoGraph.open, precision=choice.precision)
