"""Exporter, tokenizer, pooling and session on the tiny model."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import FixedLength

from sidecar_daemon.adapters.onnx import export as export_module
from sidecar_daemon.adapters.onnx.fetch import pull
from sidecar_daemon.adapters.onnx.graph import Precision
from sidecar_daemon.adapters.onnx.manifest import FileSource, Manifest, PinnedFile, Pooling, load_manifests
from sidecar_daemon.adapters.onnx.onnxruntime_graph import OnnxruntimeGraph
from sidecar_daemon.adapters.onnx.openvino_graph import OpenvinoGraph
from sidecar_daemon.adapters.onnx.pooling import normalize, pool
from sidecar_daemon.adapters.onnx.session import OnnxEmbedder
from sidecar_daemon.adapters.onnx.store import sha256_of
from sidecar_daemon.adapters.onnx.tokenizer import WindowTokenizer
from sidecar_daemon.domain.errors import Fatal, Poison

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sidecar_daemon.adapters.onnx.graph import Graph, OpenGraph

TINY = load_manifests(Path(__file__).parents[2] / "models")["tiny"]


def quiet(_: object) -> None:
    """Show no progress."""


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pull(TINY, folder, progress=quiet)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sidecar_daemon.adapters.onnx.seed import write_seeded

    folder = tmp_path_factory.mktemp("weights")
    write_seeded(TINY, "tiny-1", folder)
    return folder / "model.safetensors"


def erf(values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.vectorize(math.erf)(values))


def reference(tensors: dict[str, NDArray[Any]], ids: list[int], manifest: Manifest) -> NDArray[Any]:
    """A BERT encoder in double precision, one window at a time, written from the formulas."""
    shape = manifest.architecture
    assert shape is not None
    get = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(name: str, x: NDArray[Any]) -> NDArray[Any]:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + shape.layer_norm_epsilon)
        return np.asarray(scaled * get[f"{name}.weight"] + get[f"{name}.bias"])

    def linear(name: str, x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(x @ get[f"{name}.weight"].T + get[f"{name}.bias"])

    embeddings = get["embeddings.word_embeddings.weight"][ids] + get["embeddings.token_type_embeddings.weight"][0]
    states = norm("embeddings.LayerNorm", embeddings + get["embeddings.position_embeddings.weight"][: len(ids)])
    for layer in range(shape.layers):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            linear(f"{name}.attention.self.{part}", states).reshape(len(ids), shape.heads, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        joined = mixed.swapaxes(0, 1).reshape(len(ids), -1)
        states = norm(f"{name}.attention.output.LayerNorm", linear(f"{name}.attention.output.dense", joined) + states)
        inner = linear(f"{name}.intermediate.dense", states)
        gelu = inner / 2 * (1 + erf(inner / math.sqrt(2)))
        states = norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", gelu) + states)
    pooled = states[0] if manifest.pooling is Pooling.CLS else states.mean(0)
    return np.asarray(pooled / np.linalg.norm(pooled) if manifest.normalize else pooled)


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("norm", [True, False])
def test_the_graph_computes_what_the_formulas_say(weights: Path, tmp_path: Path, pooling: Pooling, norm: bool) -> None:
    import onnxruntime
    from safetensors.numpy import load_file

    manifest = dataclasses.replace(TINY, pooling=pooling, normalize=norm)
    export_module.export(manifest, weights, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    windows = [[2, 7, 900, 3], [2, 3], [2, *range(5, 66), 3]]
    mask = np.array([[1] * len(each) + [0] * (63 - len(each)) for each in windows])
    # Padding of another id than 0 must not matter either.
    ids = np.array([each + [11] * (63 - len(each)) for each in windows])
    found = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    for window, row in zip(windows, found, strict=True):
        assert float(np.abs(row - reference(load_file(weights), window, manifest)).max()) <= 1e-5


def test_half_precision_weights_with_a_prefix_are_widened(weights: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    halves = {f"bert.{name}": value.astype(np.float16) for name, value in load_file(weights).items()}
    save_file({**halves, "pooler.dense.bias": np.zeros(3, np.float16)}, tmp_path / "half.safetensors")
    export_module.export(TINY, tmp_path / "half.safetensors", tmp_path / "model.onnx")
    import onnx

    kinds = {each.data_type for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_weights_of_another_shape_are_refused(weights: Path, tmp_path: Path) -> None:
    assert TINY.architecture is not None
    wider = dataclasses.replace(TINY, architecture=dataclasses.replace(TINY.architecture, vocabulary=1025))
    with pytest.raises(Fatal, match=r"word_embeddings.weight is \(1024, 32\); the manifest says \(1025, 32\)"):
        export_module.export(wider, weights, tmp_path / "model.onnx")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(Fatal, match=r"noise\.safetensors is not a readable safetensors file"):
        export_module.export(TINY, tmp_path / "noise.safetensors", tmp_path / "model.onnx")


def test_a_missing_export_extra_says_how_to_get_it() -> None:
    with pytest.raises(Fatal, match=r"pip install 'sidecar-daemon\[export\]'"):
        export_module.optional("sidecar_daemon_no_such_part")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=400))
@settings(deadline=None)
def test_windows_keep_every_token_once_within_the_limit(tiny_dir: Path, text: str) -> None:
    tokenizer = WindowTokenizer.load(tiny_dir / "tiny" / "tokenizer.json", max_tokens=12, prefix="ab ")
    windows = tokenizer.windows(text)
    fixed = len(tokenizer.before) + len(tokenizer.after)
    assert all(len(each.ids) <= 12 for each in windows)
    assert all(each.content_tokens == len(each.ids) - fixed for each in windows)
    assert "".join(text[each.start : each.end] for each in windows) == text
    content = [int(one) for each in windows for one in each.ids[len(tokenizer.before) : -len(tokenizer.after)]]
    assert content == tokenizer.tokenizer.encode(text, add_special_tokens=False).ids


def test_a_window_never_begins_inside_a_word_that_fits(tiny_dir: Path) -> None:
    tokenizer = WindowTokenizer.load(tiny_dir / "tiny" / "tokenizer.json", max_tokens=12, prefix="")
    text = "abcdef " * 9
    parts = [text[each.start : each.end] for each in tokenizer.windows(text)]
    assert len(parts) > 1
    assert all(part.startswith("abcdef") for part in parts)


def test_a_prefix_opens_every_window_and_must_leave_room(tiny_dir: Path) -> None:
    path = tiny_dir / "tiny" / "tokenizer.json"
    plain = WindowTokenizer.load(path, max_tokens=12, prefix="")
    prefixed = WindowTokenizer.load(path, max_tokens=12, prefix="query: ")
    prefix = plain.windows("query: ")[0].ids[1:-1]
    windows = prefixed.windows("abc " * 20)
    assert len(windows) > 1
    assert all(np.array_equal(each.ids[1 : 1 + len(prefix)], prefix) for each in windows)
    with pytest.raises(Fatal, match="leave no room"):
        WindowTokenizer.load(path, max_tokens=len(prefix) + 2, prefix="query: ")


def test_a_tokenizer_with_truncation_and_padding_has_them_switched_off(tiny_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    cut = Tokenizer.from_file(str(tiny_dir / "tiny" / "tokenizer.json"))
    cut.enable_truncation(5)
    cut.enable_padding(length=8)
    cut.save(str(tmp_path / "tokenizer.json"))
    tokenizer = WindowTokenizer.load(tmp_path / "tokenizer.json", max_tokens=12, prefix="")
    assert [each.content_tokens for each in tokenizer.windows("a b c d e f g")] == [7]


def test_pooling_ignores_padding_whatever_lies_there() -> None:
    states = np.array([[[1, 2], [3, 4], [np.nan, np.inf]], [[5, 6], [7, 8], [9, 10]]], dtype=np.float16)
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    assert pool(states, mask, Pooling.MEAN).tolist() == [[2, 3], [7, 8]]
    assert pool(states, mask, Pooling.CLS).tolist() == [[1, 2], [5, 6]]
    assert normalize(np.array([[3, 4], [0, 0]], dtype=np.float32)).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [0, 0],
    ]


def own_model(folder: Path, tiny_dir: Path, factor: float, name: str = "last_hidden_state") -> Manifest:
    """A user's graph: every token's vector is its id and its type id plus 1, times a factor."""
    import onnx
    from onnx import TensorProto, helper

    inputs = ("input_ids", "attention_mask", "token_type_ids")
    nodes = [
        helper.make_node("Add", ["token_type_ids", "one"], ["typed"]),
        helper.make_node("Unsqueeze", ["input_ids", "two"], ["left"]),
        helper.make_node("Unsqueeze", ["typed", "two"], ["right"]),
        helper.make_node("Concat", ["left", "right"], ["both"], axis=2),
        helper.make_node("Cast", ["both"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "factor"], [name]),
    ]
    constants = [
        helper.make_tensor("one", TensorProto.INT64, [], [1]),
        helper.make_tensor("two", TensorProto.INT64, [1], [2]),
        helper.make_tensor("factor", TensorProto.FLOAT, [], [factor]),
    ]
    graph = helper.make_graph(
        nodes,
        "own",
        [helper.make_tensor_value_info(each, TensorProto.INT64, ["b", "t"]) for each in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "t", 2])],
        initializer=constants,
    )
    onnx.save_model(
        helper.make_model_gen_version(graph, opset_imports=[helper.make_opsetid("", 17)]), str(folder / "own.onnx")
    )
    (folder / "tok.json").write_bytes((tiny_dir / "tiny" / "tokenizer.json").read_bytes())
    return dataclasses.replace(
        TINY,
        name="own",
        dimensions=2,
        architecture=None,
        weights=PinnedFile("own.onnx", sha256_of(folder / "own.onnx")),
        tokenizer=PinnedFile("tok.json", sha256_of(folder / "tok.json")),
        sources=(FileSource(folder),),
    )


RUNTIMES = pytest.mark.parametrize(
    "runtime",
    [OnnxruntimeGraph.open, partial(OpenvinoGraph.open, precision=Precision.FP32)],
    ids=["onnxruntime", "openvino"],
)


@RUNTIMES
def test_an_own_graph_that_returns_token_vectors_is_pooled_as_its_manifest_says(
    tmp_path: Path, tiny_dir: Path, runtime: OpenGraph
) -> None:
    manifest = own_model(tmp_path, tiny_dir, 1)
    assert pull(manifest, tmp_path / "models", progress=quiet).source == "file"
    embedder = OnnxEmbedder.load(manifest, tmp_path / "models", threads=1, open_graph=runtime)
    rows = embedder.embed([np.array([1, 2, 3]), np.array([9])])
    expected = np.array([[2, 1], [9, 1]]) / np.linalg.norm([[2, 1], [9, 1]], axis=1, keepdims=True)
    assert rows == pytest.approx(expected, abs=1e-6)
    with pytest.raises(Poison):
        embedder.embed([np.zeros(0, dtype=np.int64)])


@RUNTIMES
@pytest.mark.parametrize("factor", [0, math.nan, math.inf])
def test_a_vector_that_is_no_direction_is_refused(
    tmp_path: Path, tiny_dir: Path, factor: float, runtime: OpenGraph
) -> None:
    manifest = own_model(tmp_path, tiny_dir, factor)
    pull(manifest, tmp_path / "models", progress=quiet)
    embedder = OnnxEmbedder.load(manifest, tmp_path / "models", threads=1, open_graph=runtime)
    with pytest.raises(Poison) as caught:
        embedder.embed([np.array([2, 3])])
    assert caught.value.code == "bad_vector"


def test_a_machine_without_memory_is_not_the_fault_of_a_text(tiny_dir: Path) -> None:
    embedder = OnnxEmbedder.load(TINY, tiny_dir, threads=1)

    class Exhausted:
        """The real graph, on a machine that has no room for its answer."""

        def __getattr__(self, name: str) -> object:
            return getattr(embedder._graph, name)

        def run(self, _: object) -> object:
            raise MemoryError

    starved = dataclasses.replace(embedder, _graph=cast("Graph", Exhausted()))
    with pytest.raises(MemoryError):
        starved.embed([np.array([2, 3])])


def library(*, panics: bool) -> Tokenizer:
    """A real tokenizer that refuses every text but ``a``, or panics at it."""
    made = Tokenizer(WordLevel({"a": 0}, unk_token="a" if panics else "[UNK]"))
    if panics:
        made.pre_tokenizer = FixedLength(0)
    return made


@pytest.mark.parametrize(("panics", "kind"), [(False, "Exception"), (True, "PanicException")])
def test_a_text_that_the_tokenizer_breaks_on_is_the_messages_fault(*, panics: bool, kind: str) -> None:
    """A panic is no ``Exception``: it would end the process, with every text that it holds."""
    windows = WindowTokenizer(library(panics=panics), before=(), after=(), room=8)
    for _ in range(2):
        with pytest.raises(Poison, match=rf"\({kind}\)$") as caught:
            windows.windows("secret")
        assert caught.value.code == "tokenizer_failed"
        assert "secret" not in str(caught.value)
        assert caught.value.__suppress_context__


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_what_the_tokenizer_did_not_raise_for_its_own_part_is_not_the_fault_of_a_text(error: BaseException) -> None:
    class Interrupted:
        """A tokenizer at a bad moment."""

        def encode(self, *_: object, **__: object) -> object:
            raise error

    with pytest.raises(type(error)):
        WindowTokenizer(cast("Tokenizer", Interrupted()), before=(), after=(), room=8).windows("text")


@RUNTIMES
def test_a_run_that_fails_says_only_its_kind(tiny_dir: Path, runtime: OpenGraph) -> None:
    embedder = OnnxEmbedder.load(TINY, tiny_dir, threads=1, open_graph=runtime)
    with pytest.raises(Poison) as caught:
        embedder.embed([np.array([2, 123_456, 3])])
    assert caught.value.code == "inference_failed"
    assert "123456" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert embedder.embed([np.array([2, 123, 3])]).shape == (1, 32), "and the next run is as ever"


@RUNTIMES
def test_a_graph_that_the_runtime_cannot_load_is_one_clear_line(
    tmp_path: Path, tiny_dir: Path, runtime: OpenGraph
) -> None:
    (tmp_path / "own.onnx").write_bytes(b"no graph at all")
    (tmp_path / "tok.json").write_bytes((tiny_dir / "tiny" / "tokenizer.json").read_bytes())
    manifest = dataclasses.replace(
        TINY,
        name="own",
        architecture=None,
        weights=PinnedFile("own.onnx", sha256_of(tmp_path / "own.onnx")),
        tokenizer=PinnedFile("tok.json", sha256_of(tmp_path / "tok.json")),
        sources=(FileSource(tmp_path),),
    )
    pull(manifest, tmp_path / "models", progress=quiet)
    with pytest.raises(Fatal, match=r"^Model 'own': the runtime cannot load .*model\.onnx\.$") as caught:
        OnnxEmbedder.load(manifest, tmp_path / "models", threads=1, open_graph=runtime)
    assert caught.value.code == "graph_bad"
