"""The last quarter of an hour, in memory: what the status page draws. Bounded, pure, with an injected clock.

A ring of steps a pipeline. Freshness is kept as a log histogram a step, not as samples: its quantiles are the nearest
rank's bucket, at most ``QUANTILE_ERROR`` away from the true value whatever the number of documents.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sidecar_daemon.domain.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sidecar_daemon.domain.messages import Observation, PipelineName, PipelineObservation

Circuit = Literal["closed", "half_open", "open"]
_BROKEN: dict[str, Circuit] = {"open": "open", "half_open": "half_open"}
STEP_SECONDS = 5
STEPS = 180
"""Fifteen minutes."""
RATE_STEPS = 12
"""The minute over which a rate is taken."""
CARRIED_STEPS = 2
"""A queue is looked at about once a step: one without a look shows the last depth, an outage shows a gap."""

SHORTEST, LONGEST = 0.0005, 7 * 86400.0
"""Seconds that freshness is told apart in; what lies beyond counts as the nearer of the two."""
_PER_OCTAVE = 8
QUANTILE_ERROR = 2 ** (1 / (2 * _PER_OCTAVE)) - 1
"""Largest relative error of a quantile between the bounds: 4.4 %."""
_LAST_BUCKET = int(math.log2(LONGEST / SHORTEST) * _PER_OCTAVE)


@dataclass(frozen=True, slots=True)
class Freshness:
    """Quantiles in seconds; None without a document."""

    p50: float | None
    p99: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Series:
    """One value a step, oldest first, at most ``STEPS``; the last step is under way."""

    embedded: list[int]
    depth: list[int | None]
    """Messages in both lanes; None while the database was away."""
    freshness_p50: list[float | None]
    freshness_p99: list[float | None]


@dataclass(slots=True)
class _Step:
    number: int | None = None
    """Steps since the clock's zero: tells a step from the one that had its slot of the ring before."""
    embedded: int = 0
    depth: int | None = None
    freshness: Counter[int] = field(default_factory=Counter)
    drawn: tuple[float | None, float | None] | None = None
    """Its median and p99, once they were asked for: a step that is over does not change any more."""

    def waited(self, seconds: float) -> None:
        """One document waited this long."""
        self.freshness[_bucket(seconds)] += 1
        self.drawn = None

    def quantiles(self) -> tuple[float | None, float | None]:
        """Median and p99 of its documents."""
        if self.drawn is None:
            self.drawn = _quantiles(self.freshness)
        return self.drawn


_EMPTY = _Step()


@dataclass(slots=True)
class _Past:
    ring: list[_Step] = field(default_factory=lambda: [_Step() for _ in range(STEPS)])
    outcomes: Counter[Outcome] = field(default_factory=Counter)

    def put(self, number: int) -> _Step:
        """The slot of a step, emptied when it held an older one."""
        slot = number % STEPS
        if self.ring[slot].number != number:
            self.ring[slot] = _Step(number)
        return self.ring[slot]

    def get(self, number: int) -> _Step:
        """What is known of a step."""
        step = self.ring[number % STEPS]
        return step if step.number == number else _EMPTY


class Recent:
    """What happened lately, by pipeline. Memory is bounded by the number of pipelines, whatever happens."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin now, by a clock of seconds that never goes back."""
        self._clock = clock
        self._started = clock()
        self._pasts: dict[PipelineName, _Past] = {}
        self._circuits: dict[str, Circuit] = {}
        self._snapshot: dict[PipelineName, PipelineObservation] = {}
        self._observed: float | None = None

    # What is told

    def documents(self, pipeline: PipelineName, outcome: Outcome, count: int) -> None:
        """Documents that left the worker."""
        past = self._past(pipeline)
        past.outcomes[outcome] += count
        if outcome is Outcome.EMBEDDED:
            past.put(self._now()).embedded += count

    def freshness(self, pipeline: PipelineName, seconds: float) -> None:
        """How long one document waited for its vector."""
        self._past(pipeline).put(self._now()).waited(seconds)

    def observed(self, snapshot: Observation) -> None:
        """How all pipelines are. One that is not among them is forgotten."""
        self._observed = self._clock()
        self._snapshot = {seen.pipeline: seen for seen in snapshot.pipelines}
        for name in self._pasts.keys() - self._snapshot.keys():
            del self._pasts[name]
        for name, seen in self._snapshot.items():
            self._past(name).put(self._now()).depth = seen.live.depth + seen.bulk.depth

    def circuit(self, scope: str, state: str) -> None:
        """The state of a breaker; its scope is a pipeline, or ``database``."""
        if state in _BROKEN:
            self._circuits[scope] = _BROKEN[state]
        else:
            self._circuits.pop(scope, None)

    # What is asked

    def observed_seconds_ago(self) -> float | None:
        """Age of the newest observation; None before the first."""
        return None if self._observed is None else self._clock() - self._observed

    def observation(self, pipeline: PipelineName) -> PipelineObservation | None:
        """How a pipeline was at the newest look."""
        return self._snapshot.get(pipeline)

    def circuit_of(self, scope: str) -> Circuit:
        """The state of a breaker."""
        return self._circuits.get(scope, "closed")

    def outcomes(self, pipeline: PipelineName) -> Mapping[Outcome, int]:
        """Documents by outcome since the start."""
        return dict(self._pasts.get(pipeline, _NOTHING).outcomes)

    def rate(self, pipeline: PipelineName) -> float:
        """Documents embedded a second, over the last minute or since the start."""
        past, now = self._pasts.get(pipeline, _NOTHING), self._now()
        first = now - RATE_STEPS + 1
        seconds = self._clock() - max(float(first * STEP_SECONDS), self._started)
        embedded = sum(past.get(number).embedded for number in range(first, now + 1))
        return embedded / max(seconds, float(STEP_SECONDS))

    def quantiles(self, pipeline: PipelineName) -> Freshness:
        """Freshness over all steps that are kept."""
        past, total = self._pasts.get(pipeline, _NOTHING), Counter[int]()
        for number in self._kept():
            for bucket, count in past.get(number).freshness.items():
                total[bucket] += count
        return Freshness(*_quantiles(total), total.total())

    def series(self, pipeline: PipelineName) -> Series:
        """What to draw: as many steps as the daemon has lived, at most ``STEPS``."""
        past = self._pasts.get(pipeline, _NOTHING)
        steps = [past.get(number) for number in self._kept()]
        return Series(
            embedded=[step.embedded for step in steps],
            depth=list(_carried([step.depth for step in steps])),
            freshness_p50=[step.quantiles()[0] for step in steps],
            freshness_p99=[step.quantiles()[1] for step in steps],
        )

    def _now(self) -> int:
        return int(self._clock() // STEP_SECONDS)

    def _kept(self) -> range:
        now = self._now()
        return range(max(now - STEPS + 1, int(self._started // STEP_SECONDS)), now + 1)

    def _past(self, pipeline: PipelineName) -> _Past:
        if pipeline not in self._pasts:
            self._pasts[pipeline] = _Past()
        return self._pasts[pipeline]


_NOTHING = _Past()
"""Of a pipeline that nothing was told about; only read."""


def _bucket(seconds: float) -> int:
    """The bucket of a duration. Not a number counts as the shortest: telemetry never raises."""
    if not seconds > SHORTEST:
        return 0
    return min(int(math.log2(min(seconds, LONGEST) / SHORTEST) * _PER_OCTAVE), _LAST_BUCKET)


def _quantiles(buckets: Mapping[int, int]) -> tuple[float | None, float | None]:
    """Median and p99: the middle, on a log scale, of the bucket that holds the nearest rank."""
    ordered, count = sorted(buckets.items()), sum(buckets.values())
    return _at_rank(ordered, math.ceil(0.5 * count)), _at_rank(ordered, math.ceil(0.99 * count))


def _at_rank(ordered: Sequence[tuple[int, int]], rank: int) -> float | None:
    for bucket, count in ordered:
        rank -= count
        if rank <= 0:
            return float(SHORTEST * 2 ** ((bucket + 0.5) / _PER_OCTAVE))
    return None


def _carried(depths: Sequence[int | None]) -> Iterator[int | None]:
    last: int | None = None
    age = 0
    for depth in depths:
        age = 0 if depth is not None else age + 1
        last = depth if depth is not None else last if age <= CARRIED_STEPS else None
        yield last
