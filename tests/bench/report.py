"""The goals of PERFORMANCE 2, and the JSON object of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should be."""

    value: float
    at_least: bool
    """Else at most."""
    what: str

    def met(self, figure: float) -> bool:
        """Whether a figure is good enough."""
        return figure >= self.value if self.at_least else figure <= self.value


def _least(value: float, what: str) -> Goal:
    return Goal(value, at_least=True, what=what)


def _most(value: float, what: str) -> Goal:
    return Goal(value, at_least=False, what=what)


GOALS: Mapping[str, Goal] = {
    "P1_fp32": _least(0.95, "pipeline docs/s ÷ raw model docs/s, gte-small shape, HNSW on 10,000 rows"),
    "P1_bf16": _least(0.90, "the same in bf16"),
    "P2_fp32": _least(0.75, "model flops used, real tokens only, ÷ measured peak"),
    "P2_bf16": _least(0.65, "the same in bf16"),
    "P3_docstrings": _least(0.93, "real ÷ padded tokens, streaming, window of 256 documents"),
    "P3_bimodal": _least(0.93, "the same, 80 % short and 20 % full-length documents"),
    "P4_sentence_transformers_fp32": _least(1.4, "model only, docs/s ÷ its best batch size"),
    "P4_sentence_transformers_bf16": _least(1.8, "model only, docs/s ÷ its best batch size, both in bf16"),
    "P4_fastembed_tuned": _least(1.4, "model only, docs/s ÷ its best batch size"),
    "P4_fastembed_default": _least(15.0, "model only, docs/s ÷ its default batch of 256"),
    "P5_docstrings": _least(40.0, "end to end, docs/s ÷ the serial port of the system replaced"),
    "P5_500_tokens": _least(10.0, "the same on 500-token documents"),
    "P6_p50_ms": _most(25.0, "freshness when idle, 30-token edits, median"),
    "P6_p99_ms": _most(75.0, "freshness when idle, 30-token edits, 99th percentile"),
    "P7_p99_ms": _most(1000.0, "freshness of live edits while a backfill of 100,000 documents runs, 99th percentile"),
    "P8": _least(0.95, "docs/s with a backlog of 1,000,000 ÷ docs/s with 10,000"),
    "P9": _least(5000.0, "settled docs/s, null model, 4 replicas, without HNSW"),
    "P10": _least(5.0, "backfill of 100,000 rows, index deferred ÷ index live"),
    "P11_copy_ratio": _most(1.15, "COPY of 100,000 rows, with triggers ÷ without"),
    "P11_row_us": _most(5.0, "microseconds that the trigger adds a row"),
    "P11_insert_ms": _most(0.12, "milliseconds that the trigger adds to the median single-row insert"),
    "P12_peak_mb": _most(450.0, "peak RSS of the daemon, fp32 gte-small shape, mixed shapes"),
    "P12_slope_mb_per_hour": _most(1.0, "growth of its RSS after warm-up"),
}


def measure_of(figure: str) -> str:
    """``P4`` of ``P4_fastembed_tuned``."""
    return figure.partition("_")[0]


@dataclass
class Report:
    """What a run has found so far; complete at every moment, so that an interrupted run loses nothing."""

    profile: str
    seed: int
    figures: dict[str, float | None] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a figure or a contestant is missing, by name: the machine or an extra lacks something."""
    broken: dict[str, str] = field(default_factory=dict)
    """Errors by measure; any makes the exit status 1."""
    seconds: dict[str, float] = field(default_factory=dict)

    def figure(self, name: str, value: float) -> None:
        """Record a figure that has a goal."""
        if name not in GOALS:
            raise KeyError(f"no goal is called {name}")
        self.figures[name] = round(value, 4)

    def leave_out(self, figure: str, why: str) -> None:
        """Record that a figure cannot be measured here."""
        self.figures[figure] = None
        self.left_out[figure] = why

    def summary(self, chosen: Iterable[str]) -> dict[str, Any]:
        """The JSON object. Every figure of the chosen measures is in it, null where it was not measured."""
        measures = set(chosen)
        names = [name for name in GOALS if measure_of(name) in measures]
        figures = {name: self.figures.get(name) for name in names}
        return {
            "profile": self.profile,
            "seed": self.seed,
            "figures": figures,
            "goals": {
                name: {"goal": GOALS[name].value, "at_least": GOALS[name].at_least, "what": GOALS[name].what}
                for name in names
            },
            "met": {name: None if value is None else GOALS[name].met(value) for name, value in figures.items()},
            "machine": self.machine,
            "tables": self.tables,
            "left_out": self.left_out,
            "broken": self.broken,
            "seconds": self.seconds,
        }


def merged(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One object of several runs of parts; where two have a figure, the later one counts."""
    whole: dict[str, Any] = {}
    for result in results:
        for key, value in result.items():
            if isinstance(value, dict):
                old = whole.get(key, {})
                whole[key] = {**old, **{k: v for k, v in value.items() if v is not None or k not in old}}
            else:
                whole[key] = value
    return whole


def as_text(summary: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = []
    for name, value in summary["figures"].items():
        goal = summary["goals"][name]
        shown = "-" if value is None else f"{value:,.3f}"
        verdict = {True: "met", False: "MISSED", None: "not measured"}[summary["met"][name]]
        sign = "≥" if goal["at_least"] else "≤"
        lines.append(f"{name:<32} {shown:>12}  {sign} {goal['goal']:<8g} {verdict:<13} {goal['what']}")
    lines += [f"left out: {name}: {why}" for name, why in summary["left_out"].items()]
    lines += [f"BROKEN: {name}: {why}" for name, why in summary["broken"].items()]
    return "\n".join(lines) + "\n"
