"""Real documents that every machine has: the docstrings of the running Python's standard library."""

from __future__ import annotations

import ast
import sys
import sysconfig
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_FEWEST_WORDS = 4
_NO_LIBRARY = frozenset({"test", "tests", "idlelib", "lib2to3", "__pycache__", "idle_test", "site-packages"})
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "docstrings.sidecar-daemon")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Docstring:
    """One document of the demo."""

    name: str
    """Qualified, ``json.dumps``."""
    text: str

    @property
    def key(self) -> uuid.UUID:
        """The same on every machine and in every run."""
        return uuid.uuid5(_NAMESPACE, self.name)


def standard_library(first: Collection[str] = ()) -> list[Docstring]:
    """Read the sources, without importing anything. Deterministic, one document a qualified name.

    Args:
        first: qualified names that stand at the beginning; the others follow in an order that mixes the modules, so
            that any number of documents from the start is a fair sample.
    """
    found: dict[str, Docstring] = {}
    for module, path in _sources(Path(sysconfig.get_path("stdlib"))):
        for document in _docstrings(module, path):
            found.setdefault(document.name, document)
    return sorted(found.values(), key=lambda document: (document.name not in first, document.key.bytes))


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted names and files of the standard library's modules, private and test ones left out."""
    for name in sorted(sys.stdlib_module_names):
        for path in (root / f"{name}.py", *sorted((root / name).rglob("*.py"))):
            parts = path.relative_to(root).with_suffix("").parts
            if path.is_file() and not _hidden(parts):
                yield ".".join(parts).removesuffix(".__init__"), path


def _hidden(parts: tuple[str, ...]) -> bool:
    return any(part in _NO_LIBRARY or (part.startswith("_") and part != "__init__") for part in parts)


def _docstrings(module: str, path: Path) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold escapes that newer parsers complain about
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # a file that is no Python of this version is no document either
    yield from _within(module, tree)


def _within(name: str, node: _Documented) -> Iterator[Docstring]:
    text = (ast.get_docstring(node) or "").strip()
    if len(text.split()) >= _FEWEST_WORDS and "\x00" not in text:
        yield Docstring(name, text)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from _within(f"{name}.{child.name}", child)
