"""What a fault found, and the JSON that sums up a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class Kind(StrEnum):
    """What the JSON counts by name; everything else is ``other``."""

    LOST = "lost"
    STALE = "stale"
    ORPHAN = "orphans"
    DUPLICATE = "duplicates"
    INNOCENT = "innocents_dead_lettered"
    OTHER = "other"


@dataclass(frozen=True)
class Violation:
    """One broken promise."""

    check: str
    """``I1`` to ``I10``, or the fault's own claim."""
    message: str
    kind: Kind = Kind.OTHER
    key: str | None = None
    history: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Everything, for a person."""
        lines = [f"{self.check}: {self.message}", *(f"    {line}" for line in self.history)]
        return "\n".join(lines)


@dataclass
class FaultReport:
    """What one fault did and found."""

    injected: int = 0
    violations: list[Violation] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Figures worth keeping: seconds to recover, embeddings a version."""

    def claim(self, holds: bool, check: str, message: str, kind: Kind = Kind.OTHER) -> None:
        """Record a violation unless ``holds``."""
        if not holds:
            self.violations.append(Violation(check, message, kind))

    def worst(self, fact: str, seconds: float) -> None:
        """Keep the longest of all rounds, to a tenth of a second."""
        self.facts[fact] = max(self.facts.get(fact, 0.0), round(seconds, 1))


def summary(profile: str, seed: int, reports: Mapping[str, FaultReport]) -> dict[str, Any]:
    """The JSON object of a run."""
    kinds = Counter(violation.kind for report in reports.values() for violation in report.violations)
    mutants = reports["T17"].facts if "T17" in reports else {}
    return {
        "profile": profile,
        "seed": seed,
        "faults": {
            name: {
                "injected": report.injected,
                "violations": len(report.violations),
                **{key: value for key, value in report.facts.items() if key not in {"total", "killed"}},
            }
            for name, report in reports.items()
        },
        **{kind.value: kinds[kind] for kind in Kind if kind is not Kind.OTHER},
        "mutants": {"total": mutants.get("total", 0), "killed": mutants.get("killed", 0)},
    }
