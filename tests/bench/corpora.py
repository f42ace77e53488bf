"""The texts that are measured, out of the standard library's docstrings; the same in every run with one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from sidecar_daemon.demo.corpus import standard_library
from tests.bench.arithmetic import histogram, quantile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

LIMIT = 512
"""Tokens of a text at most, special ones included: beyond it peers cut and we open another window."""
SPECIAL = 2
EDGES = (8, 16, 32, 64, 128, 256, 384, 511, 512)
SHORT_SHARE = 0.8


@dataclass(frozen=True)
class Corpora:
    """Named lists of texts, all of at most ``LIMIT`` tokens."""

    tokenizer: Tokenizer
    seed: int

    @classmethod
    def load(cls, tokenizer: Path, seed: int) -> Corpora:
        """Read a ``tokenizer.json``."""
        found = Tokenizer.from_file(str(tokenizer))
        found.no_truncation()
        found.no_padding()
        return cls(found, seed)

    @cached_property
    def raw(self) -> list[str]:
        """Every docstring, in a seeded order, whatever its length."""
        found = [document.text for document in standard_library()]
        self.rng("docstrings").shuffle(found)
        return found

    def rng(self, purpose: str) -> random.Random:
        """A stream of its own for each purpose."""
        return random.Random(f"{self.seed}/{purpose}")  # noqa: S311  texts, no secrets

    def named(self, name: str, count: int) -> list[str]:
        """``count`` texts of a corpus by name.

        Raises:
            KeyError: no corpus has that name.
        """
        makers: dict[str, Callable[[int], list[str]]] = {
            "docstrings": self.docstrings,
            "titles": self.titles,
            "500_tokens": lambda n: [self.of_length(500, f"long/{place}") for place in range(n)],
            "bimodal": self.bimodal,
            "constant_128": lambda n: [self.of_length(128, f"constant/{place}") for place in range(n)],
        }
        return makers[name](count)

    def docstrings(self, count: int) -> list[str]:
        """Docstrings as they are, cut at the limit; they begin anew, with a number, where there are not enough."""
        texts = self.raw
        rounds = range(-(-count // len(texts)))
        found = [f"{number}: {text}" if number else text for number in rounds for text in texts]
        return [self.cut(text, LIMIT) for text in found[:count]]

    def titles(self, count: int) -> list[str]:
        """The beginnings of docstrings: about 12 tokens."""
        rng = self.rng("titles")
        texts = self.raw
        return [self.cut(texts[place % len(texts)], rng.randint(9, 15)) for place in range(count)]

    def bimodal(self, count: int) -> list[str]:
        """80 % of 20 to 60 tokens, 20 % of the full 512, shuffled."""
        rng = self.rng("bimodal")
        short = round(SHORT_SHARE * count)
        lengths = [*(rng.randint(20, 60) for _ in range(short)), *([LIMIT] * (count - short))]
        rng.shuffle(lengths)
        return [self.of_length(length, f"bimodal/{place}") for place, length in enumerate(lengths)]

    def of_length(self, tokens: int, purpose: str) -> str:
        """A text of so many tokens, special ones included, rarely one less: docstrings one after the other, cut."""
        rng = self.rng(purpose)
        text = ""
        while self.length(text) < tokens:
            text = f"{text} {rng.choice(self.raw)}".strip()
        return self.cut(text, tokens)

    def cut(self, text: str, tokens: int) -> str:
        """The text's beginning of at most so many tokens, special ones included."""
        room = tokens - SPECIAL
        while True:
            offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
            if len(offsets) <= room:
                return text
            text = text[: offsets[room - 1][1]]  # a torn word may fall into more pieces: look again

    def length(self, text: str) -> int:
        """Tokens of a text, special ones included."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids) + SPECIAL

    def described(self, texts: Sequence[str]) -> dict[str, object]:
        """Counts and the histogram of lengths."""
        lengths = [self.length(text) for text in texts]
        return {
            "texts": len(texts),
            "tokens": sum(lengths),
            "mean": round(sum(lengths) / len(lengths), 1),
            "p50": quantile(lengths, 0.5),
            "p99": quantile(lengths, 0.99),
            "histogram": histogram(lengths, EDGES),
        }
