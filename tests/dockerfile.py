"""Reads a Dockerfile: stages, and in each the instructions in order."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, its continued lines joined: ``RUN``, and what to run."""

    word: str
    value: str

    @property
    def exec_form(self) -> list[str]:
        """The words of ``["a", "b"]``; fails for anything else."""
        words = json.loads(self.value)
        assert isinstance(words, list)
        return [str(word) for word in words]

    @property
    def assignments(self) -> dict[str, str]:
        """``NAME=value`` pairs of an ENV, or an ARG with its default (empty without one)."""
        pairs = re.findall(r'(\w+)(?:=("[^"]*"|\S*))?', self.value)
        return {name: value.strip('"') for name, value in pairs}


@dataclass(frozen=True, slots=True)
class Stage:
    """From one FROM to the next."""

    name: str | None
    base: str
    instructions: tuple[Instruction, ...]

    def all(self, word: str) -> list[Instruction]:
        """The instructions of one kind."""
        return [each for each in self.instructions if each.word == word]

    def only(self, word: str) -> Instruction:
        """The one instruction of a kind."""
        (found,) = self.all(word)
        return found


def read(path: Path) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM with their defaults, and the stages."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [Instruction(*line.split(None, 1)) for line in text.splitlines() if line.strip()]
    starts = [n for n, each in enumerate(found) if each.word == "FROM"]
    arguments = {name: value for each in found[: starts[0]] for name, value in each.assignments.items()}
    stages = []
    for start, end in zip(starts, [*starts[1:], len(found)], strict=True):
        base, _, name = found[start].value.partition(" AS ")
        for argument, value in arguments.items():
            base = base.replace(f"${{{argument}}}", value)
        stages.append(Stage(name or None, base, tuple(found[start + 1 : end])))
    return arguments, stages
