"""Where core time goes: ``python -m tests.bench.profile [--seconds 60] [--json]``.

Samples every thread of a busy daemon with py-spy (``pip install py-spy``), 100 times a second, the waiting ones left
out. Shape of gte-small, float32, no index on the vectors, docstrings; PostgreSQL shares the processor, as always here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from collections import Counter
from typing import TYPE_CHECKING

from sidecar_daemon.settings import usable_cores
from tests.bench.__main__ import SEED, cache_folder
from tests.bench.arithmetic import TOLERANCE
from tests.bench.folders import SHAPE
from tests.bench.machine import described
from tests.bench.report import Report
from tests.bench.server import TABLE, load
from tests.bench.workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import asyncpg

STAGES = {
    "model": ("onnxruntime_inference_collection.py", "openvino_graph.py", "onnxruntime_graph.py"),
    "around the model: padding, pooling": ("adapters/onnx/", "worker/embedding.py"),
    "tokenizer": ("tokenize",),
    "database": ("asyncpg/", "adapters/postgres/", "worker/settling.py", "worker/leasing.py", "worker/keeping.py"),
    "telemetry and endpoints": ("telemetry/", "adapters/http", "structlog/", "prometheus_client/"),
}
"""A sample belongs to the first stage that a frame of it names, the innermost frames first."""
WAITING = ("select (", "_worker (", "wait (")
"""Innermost frames of threads that wait for work: where the kernel hides that from py-spy, they look busy."""
WARM_SECONDS = 10.0
DEEP = 2000
"""Messages below which the queue is filled up again: the daemon never waits for work."""


def stage_of(frames: Sequence[str]) -> str:
    """The stage of one sample: frames from the outermost to the innermost, as py-spy writes them."""
    for frame in reversed(frames):
        for stage, marks in STAGES.items():
            if any(mark in frame for mark in marks):
                return stage
    return "rest"


def shares(lines: Iterable[str]) -> dict[str, float]:
    """Share of the samples by stage, largest first, from lines of ``frame;frame;frame count``.

    Raises:
        ValueError: there is no sample.
    """
    counts: Counter[str] = Counter()
    for stack, count in samples(lines):
        counts[stage_of(stack)] += count
    if not counts:
        raise ValueError("py-spy has no sample")
    return {stage: count / counts.total() for stage, count in counts.most_common()}


async def profile(place: Workplace, seconds: int) -> dict[str, object]:
    """Sample one daemon at work."""
    texts = (await place.corpora()).named("docstrings", 1000)
    await place.prepare_models()
    server = await place.server()
    async with server.arena() as arena, arena.session() as connection:
        await arena.attach(SHAPE, place.models, index=False)
        async with arena.daemon(place.models, RUNTIME="onnxruntime", THREADS=str(place.threads)) as daemon:
            feeding = asyncio.create_task(_feed(connection, texts))
            try:
                await asyncio.sleep(WARM_SECONDS)
                before = await connection.fetchval(f"SELECT count(*) FROM {TABLE}_embeddings")
                lines = await _samples(daemon.pid, seconds, place.folder / "samples.txt")
                embedded = await connection.fetchval(f"SELECT count(*) FROM {TABLE}_embeddings") - before
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
    return {
        "seconds": seconds,
        "documents": embedded,
        "shares": {stage: round(share, 4) for stage, share in shares(lines).items()},
        "innermost": innermost(lines),
        "core_milliseconds_a_document": round(10 * sum(count for _, count in samples(lines)) / max(1, embedded), 2),
        "machine": place.report.machine,
    }


def innermost(lines: Iterable[str], most: int = 12) -> dict[str, int]:
    """The commonest innermost frames, by function and file, and their samples."""
    counts: Counter[str] = Counter()
    for stack, count in samples(lines):
        name, _, place = stack[-1].partition(" (")
        counts[f"{name} ({'/'.join(place.split('/')[-2:])}"] += count
    return dict(counts.most_common(most))


def samples(lines: Iterable[str]) -> Iterator[tuple[list[str], int]]:
    """Frames and count of each stack whose thread was running."""
    for line in lines:
        joined, _, count = line.strip().rpartition(" ")
        stack = joined.split(";")
        if joined and not stack[-1].startswith(WAITING):
            yield stack, int(count)


async def _samples(pid: int, seconds: int, output: Path) -> list[str]:
    spy = shutil.which("py-spy", path=f"{sys.prefix}/bin") or shutil.which("py-spy")
    if spy is None:
        raise SystemExit("profile: py-spy is missing: pip install py-spy")
    process = await asyncio.create_subprocess_exec(
        *(spy, "record", "--pid", str(pid), "--duration", str(seconds), "--rate", "100", "--format", "raw"),
        *("--threads", "--full-filenames", "--output", str(output)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    told, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(f"profile: py-spy ended with {process.returncode}: {told.decode()[-500:]}")
    return (await asyncio.to_thread(output.read_text)).splitlines()


async def _feed(connection: asyncpg.Connection, texts: Sequence[str]) -> None:
    first = 1
    while True:
        if await connection.fetchval(f"SELECT count(*) FROM pgmq.q_{TABLE}") < DEEP:
            await load(connection, texts, first=first)
            first += len(texts)
        await asyncio.sleep(0.2)


def as_text(found: Mapping[str, object]) -> str:
    """A table of the stages."""
    stages = found["shares"]
    assert isinstance(stages, dict)
    rows = [f"{stage:<36}{100 * share:6.1f} %" for stage, share in stages.items()]
    head = f"{found['documents']} documents, {found['core_milliseconds_a_document']} core-ms each"
    return "\n".join([head, *rows]) + "\n"


async def _run(place: Workplace, seconds: int) -> dict[str, object]:
    async with place:
        return await profile(place, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the profile."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.profile", description="Where core time goes.")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peers-dir", type=str, help="where models are kept")
    asked = parser.parse_args(argv)
    report = Report("full", SEED, machine=described())
    place = Workplace(report, cache_folder(asked.peers_dir), usable_cores(), TOLERANCE)
    found = asyncio.run(_run(place, asked.seconds))
    sys.stdout.write(json.dumps(found) + "\n" if asked.json else as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
