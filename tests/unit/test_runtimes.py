"""Which runtime is chosen and why; what OpenVINO is kept from; the shapes that it is given."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.graph import Precision
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from sidecar_daemon.adapters.onnx.onnxruntime_graph import OnnxruntimeGraph
from sidecar_daemon.adapters.onnx.openvino_graph import OpenvinoGraph
from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
from sidecar_daemon.app.runtimes import Machine, choose_runtime, has_bf16, load_onnx, may_compile, this_machine
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.settings import ModelSettings, Runtime
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from sidecar_daemon.adapters.onnx.graph import Graph

TINY = load_manifests(ROOT / "models")["tiny"]
ALL = Machine(installed=True, bf16=True, may_compile=True)
OLD = Machine(installed=True, bf16=False, may_compile=True)
BARE = Machine(installed=False, bf16=True, may_compile=True)
CONFINED = Machine(installed=True, bf16=True, may_compile=False)
CPUINFO = "processor\t: {}\nflags\t\t: fpu {} sse2\nbogomips\t: 1\n\n"


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pull(TINY, folder, progress=lambda _: None)
    return folder


@pytest.mark.parametrize(
    ("wanted", "machine", "chosen", "reason"),
    [
        (Runtime.AUTO, ALL, "openvino in bf16", "the processor has bf16, and the extra is installed"),
        (Runtime.AUTO, OLD, "onnxruntime in fp32", "the processor has no bf16"),
        (Runtime.AUTO, BARE, "onnxruntime in fp32", "pip install 'sidecar-daemon[openvino]'"),
        (Runtime.AUTO, CONFINED, "onnxruntime in fp32", "MemoryDenyWriteExecute=no"),
        (Runtime.ONNXRUNTIME, ALL, "onnxruntime in fp32", "SIDECAR_RUNTIME names it"),
        (Runtime.OPENVINO, ALL, "openvino in bf16", "SIDECAR_RUNTIME names it"),
        (Runtime.OPENVINO, OLD, "openvino in fp32", "the processor has no bf16"),
    ],
)
def test_what_is_chosen_and_why(wanted: Runtime, machine: Machine, chosen: str, reason: str) -> None:
    choice = choose_runtime(wanted, machine)
    assert str(choice) == chosen
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("machine", "mend"),
    [(BARE, "pip install 'sidecar-daemon[openvino]'"), (CONFINED, "MemoryDenyWriteExecute=no")],
)
def test_openvino_by_name_where_it_cannot_run_is_one_clear_line(machine: Machine, mend: str) -> None:
    with pytest.raises(Fatal) as refused:
        choose_runtime(Runtime.OPENVINO, machine)
    line = str(refused.value)
    assert refused.value.code == "bad_setting"
    assert line.startswith("SIDECAR_RUNTIME is 'openvino', but ")
    assert mend in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("flags", "found"),
    [("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True), ("avx512f avx512_vnni", False), ("avx2", False)],
)
def test_the_processor_is_read_from_its_flags(tmp_path: Path, flags: str, found: bool) -> None:
    (tmp_path / "cpuinfo").write_text("".join(CPUINFO.format(number, flags) for number in range(2)))
    assert has_bf16(tmp_path / "cpuinfo") is found


def test_a_processor_of_which_nothing_is_known_has_no_bf16(tmp_path: Path) -> None:
    assert not has_bf16(tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert not has_bf16(tmp_path / "cpuinfo")


def test_this_machine_has_the_extra_and_openvino_agrees_about_its_processor() -> None:
    import openvino

    machine = this_machine()
    assert machine.installed
    assert machine.may_compile
    able = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert able or not machine.bf16, "OpenVINO may imitate bf16 where the processor lacks it, but not the other way"


def test_an_embedder_comes_in_the_runtime_and_the_precision_that_were_chosen(models_dir: Path) -> None:
    for runtime in Runtime:
        choice = choose_runtime(runtime, this_machine())
        embedder = load_onnx(TINY, ModelSettings(models_dir, runtime, 1))
        assert type(embedder._graph) is (OpenvinoGraph if choice.runtime is Runtime.OPENVINO else OnnxruntimeGraph)
        assert embedder.precision is choice.precision


def test_openvino_reports_to_nobody_and_writes_nothing_into_the_home(models_dir: Path, tmp_path: Path) -> None:
    code = f"""
import socket, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork"):
        print(event, arguments)
sys.addaudithook(refuse)
from pathlib import Path
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from sidecar_daemon.app.runtimes import load_onnx
from sidecar_daemon.settings import ModelSettings, Runtime
settings = ModelSettings(Path({str(models_dir)!r}), Runtime.OPENVINO, 1)
embedder = load_onnx(load_manifests(Path("models"))["tiny"], settings)
print(len(embedder.embed([embedder.tokenize("one")[0].ids])))
print([name for name in sys.modules if name.startswith("openvino_telemetry.")])
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("1\n[]\n", "")
    assert list(tmp_path.iterdir()) == []


def test_the_first_runs_of_many_threads_do_not_wait_for_one_another_for_ever(models_dir: Path) -> None:
    """In a process of its own: what stands still there, does so on the first use, and holds the interpreter."""
    code = f"""
import sys, threading
from pathlib import Path
from sidecar_daemon.adapters.onnx.manifest import load_manifests
from sidecar_daemon.app.runtimes import load_onnx
from sidecar_daemon.settings import ModelSettings, Runtime
settings = ModelSettings(Path({str(models_dir)!r}), Runtime.OPENVINO, 8)
embedder = load_onnx(load_manifests(Path("models"))["tiny"], settings)
ids = [embedder.tokenize("one")[0].ids]
sys.setswitchinterval(1e-6)
together = threading.Barrier(8)
found = []
def first_run():
    together.wait()
    found.append(len(embedder.embed(ids)))
threads = [threading.Thread(target=first_run) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(found)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == f"{[1] * 8}\n"


def test_an_extra_that_is_damaged_is_one_clear_line(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sidecar_daemon.adapters.onnx.openvino_graph", None)
    with pytest.raises(Fatal, match=r"^OpenVINO is installed but cannot be imported: .*; pip install") as refused:
        load_onnx(TINY, ModelSettings(models_dir, Runtime.OPENVINO, 1))
    assert refused.value.code == "runtime_broken"


class Recorded:
    """A real graph; remembers the shapes that it was given."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.inputs, self.precision, self.padded_length = graph.inputs, graph.precision, graph.padded_length
        self.shapes: set[tuple[int, ...]] = set()

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> NDArray[Any]:
        self.shapes |= {value.shape for value in feed.values()}
        return self._graph.run(feed)


def test_openvino_is_given_few_lengths_and_hardly_more_padding(models_dir: Path) -> None:
    graphs: list[Recorded] = []

    def opened(path: Path, threads: int) -> Recorded:
        graphs.append(Recorded(OpenvinoGraph.open(path, threads, Precision.FP32)))
        return graphs[0]

    embedder = OnnxEmbedder.load(TINY, models_dir, threads=1, open_graph=opened)
    (graph,) = graphs
    lengths = [graph.padded_length(tokens) for tokens in range(1, 513)]
    assert len(set(lengths)) == 64
    assert all(0 <= length - tokens < max(4, tokens / 8) for tokens, length in enumerate(lengths, 1))
    for tokens in range(1, TINY.max_tokens + 1):
        embedder.embed([np.full(tokens, 7)])
    assert len(graph.shapes) == TINY.max_tokens / 4
    assert all(length % 4 == 0 for _, length in graph.shapes)
    assert max(graph.shapes) == (1, TINY.max_tokens), "a graph has no positions behind the last one"


class Coarse:
    """A real graph whose answers come in bf16: 8 bits of each number are left, as where a processor has it."""

    def __init__(self, path: Path, threads: int) -> None:
        self._graph = OnnxruntimeGraph.open(path, threads)
        self.inputs, self.padded_length = self._graph.inputs, self._graph.padded_length
        self.precision = Precision.BF16

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> NDArray[Any]:
        bits = self._graph.run(feed).view(np.uint32)
        return np.asarray((bits & np.uint32(0xFFFF0000)).view(np.float32))


def test_vectors_have_norm_one_in_bf16_too(models_dir: Path) -> None:
    fine = OnnxEmbedder.load(TINY, models_dir, threads=1)
    coarse = OnnxEmbedder.load(TINY, models_dir, threads=1, open_graph=Coarse)
    windows = [fine.tokenize(text)[0].ids for text in ("one", "two words", "a text of several words")]
    found, wanted = coarse.embed(windows), fine.embed(windows)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    assert float((found * wanted).sum(axis=1).min()) >= 0.9999
    assert float(np.abs(found - wanted).max()) > 1e-5, "the answers are as coarse as they should be"


def test_threads_beyond_the_cores_share_what_there_is(models_dir: Path) -> None:
    """More callers than streams, as where SIDECAR_THREADS says so."""
    from concurrent.futures import ThreadPoolExecutor

    embedder = load_onnx(TINY, ModelSettings(models_dir, Runtime.OPENVINO, 8))
    ids = [np.array([2, *range(5, 5 + number), 3]) for number in range(1, 33)]
    alone = [embedder.embed([each]) for each in ids]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda each: embedder.embed([each]), ids * 4))
    assert all(float(np.abs(one - other).max()) <= 1e-6 for one, other in zip(alone * 4, together, strict=True))


def test_an_answer_is_the_callers_own(models_dir: Path) -> None:
    """The request that it came from has gone to another caller by then."""
    graph = OpenvinoGraph.open(models_dir / "tiny" / "model.onnx", 1, Precision.FP32)
    feeds = [{"input_ids": np.full((1, 4), number), "attention_mask": np.ones((1, 4), np.int64)} for number in (7, 8)]
    first, second = (graph.run(feed) for feed in feeds)
    assert np.array_equal(first, graph.run(feeds[0]))
    assert not np.array_equal(first, second)


def test_memory_that_may_not_be_executable_is_noticed() -> None:
    assert may_compile()
