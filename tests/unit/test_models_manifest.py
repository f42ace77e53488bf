"""The shipped manifests, and what a bad one says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sidecar_daemon.adapters.onnx.manifest import (
    FileSource,
    HubSource,
    IndexSource,
    Pooling,
    find_manifest,
    load_manifests,
    parse_manifest,
)
from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.messages import LongDocuments

MODELS = Path(__file__).parents[2] / "models"
TINY = (MODELS / "tiny.toml").read_text(encoding="utf-8")


def refusal(path: Path) -> str:
    with pytest.raises(Fatal) as caught:
        parse_manifest(path)
    assert caught.value.code == "manifest_bad"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_models() -> None:
    manifests = load_manifests(MODELS)
    assert list(manifests) == ["all-minilm-l6-v2", "gte-small", "tiny"]
    small = manifests["gte-small"]
    assert (small.dimensions, small.max_tokens, small.pooling, small.normalize) == (384, 512, Pooling.MEAN, True)
    assert small.sources == (HubSource("thenlper/gte-small", "17e1f347d17fe144873b1201da91788898c639cd"),)
    assert small.architecture is not None
    assert small.architecture.layers == 12
    assert [type(each) for each in manifests["all-minilm-l6-v2"].sources] == [IndexSource, HubSource]


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(Fatal, match=re.escape("Unknown model 'bert'; known: all-minilm-l6-v2, gte-small, tiny.")):
        find_manifest(load_manifests(MODELS), "bert")


def test_the_model_id_changes_with_everything_that_changes_a_vector() -> None:
    tiny = load_manifests(MODELS)["tiny"]
    other = dataclasses.replace(tiny.weights, sha256="0" * 64)
    variants = [
        tiny,
        dataclasses.replace(tiny, weights=other),
        dataclasses.replace(tiny, tokenizer=other),
        dataclasses.replace(tiny, pooling=Pooling.CLS),
        dataclasses.replace(tiny, normalize=False),
        dataclasses.replace(tiny, prefix="passage: "),
        dataclasses.replace(tiny, max_tokens=32),
    ]
    ids = {each.model_id(policy) for each in variants for policy in LongDocuments}
    assert len(ids) == len(variants) * len(LongDocuments)
    assert all(re.fullmatch(r"tiny@[0-9a-f]{12}", each) for each in ids)
    described = dataclasses.replace(tiny, description="other words", licence="other", sources=())
    assert described.model_id(LongDocuments.MEAN) == tiny.model_id(LongDocuments.MEAN)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("dimensions = 32", "dimensions = true", "dimensions is True; allowed: a whole number from 1 to 16000"),
        ("dimensions = 32", "dimensions = 16", "dimensions is 16; allowed: architecture.hidden, 32"),
        ("dimensions = 32", "", "dimensions is missing"),
        ("max_tokens = 64", "max_tokens = 65", "max_tokens is 65; allowed: at most architecture.positions, 64"),
        ("max_tokens = 64", "max_tokens = 1", "max_tokens is 1; allowed: a whole number from 4"),
        ('pooling = "mean"', 'pooling = "max"', """pooling is 'max'; allowed: "mean" or "cls\""""),
        ("normalize = true", "normalize = 1", "normalize is 1; allowed: true or false"),
        ('kind = "seed"', 'kind = "ftp"', "source[0].kind is 'ftp'"),
        ("heads = 2", "heads = 3", "architecture.heads is 3; allowed: a divisor of hidden, 32"),
        ('name = "tiny"', 'name = "huge"', "name is 'huge'; allowed: the file's own name, 'tiny'"),
        ('sha256 = "', 'sha256 = "x', "files.weights.sha256 is"),
        ("[[source]]", "[source]", "source is"),
        ("[files.weights]", "[files.other]", "files.weights is missing; allowed: a table"),
        ('licence = "MIT"', 'licence = " "', "licence is ' '"),
        ("dimensions = 32", "dimensions 32", "not valid TOML"),
    ],
)
def test_a_bad_manifest_says_what_is_wrong_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    assert old in TINY
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace(old, new, 1), encoding="utf-8")
    assert complaint in refusal(path)


def test_an_own_model_stands_in_a_second_folder_and_shadows_none(tmp_path: Path) -> None:
    text = TINY.split("[[source]]")[0].replace('name = "tiny"', 'name = "own"') + '[[source]]\nkind = "file"\n'
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    own = load_manifests(MODELS, tmp_path)["own"]
    assert own.sources == (FileSource(tmp_path),)
    assert own.architecture is None
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    with pytest.raises(Fatal, match=r"'tiny' .* has a manifest already"):
        load_manifests(MODELS, tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="No folder of model manifests at"):
        load_manifests(tmp_path / "nowhere")
