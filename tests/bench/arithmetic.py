"""What is made of measured blocks: which are dropped, ratios within rounds, spreads, quantiles, slopes. Pure."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TOLERANCE = 0.05
"""A block whose calibration is further off the median of all than this was not measured on the same machine."""


@dataclass(frozen=True, slots=True)
class Block:
    """One contestant's turn."""

    contestant: str
    round: int
    """From 0; the first warms up and does not count."""
    amount: float
    """What was done, in documents or rows."""
    seconds: float
    calibration: float
    """GFLOP/s of a matrix product right before it."""

    @property
    def rate(self) -> float:
        """Amount a second."""
        return self.amount / self.seconds


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and how far it can be trusted."""

    median: float
    low: float
    high: float
    iqr: float
    count: int

    def rounded(self, digits: int = 3) -> dict[str, float]:
        """As the JSON shows it."""
        return {name: round(value, digits) for name, value in asdict(self).items()}


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which ``share`` of the values lie, interpolated between neighbours.

    Raises:
        ValueError: there are no values, or the share is not between 0 and 1.
    """
    ordered = sorted(values)
    if not ordered or not 0 <= share <= 1:
        raise ValueError(f"a quantile of {len(ordered)} values at {share}")
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Iterable[float]) -> Spread:
    """Median, extremes and distance between the quartiles. Raises ``ValueError`` without values."""
    ordered = sorted(values)
    return Spread(
        quantile(ordered, 0.5),
        ordered[0],
        ordered[-1],
        quantile(ordered, 0.75) - quantile(ordered, 0.25),
        len(ordered),
    )


def palindrome(names: Sequence[str]) -> list[str]:
    """A B C → A B C C B A: a drift of the machine falls on all of them alike."""
    return [*names, *reversed(names)]


def kept(blocks: Sequence[Block], tolerance: float = TOLERANCE) -> list[Block]:
    """The blocks after the first round whose calibration is within ``tolerance`` of the median of them all."""
    counted = [block for block in blocks if block.round > 0]
    if not counted:
        return []
    middle = statistics.median(block.calibration for block in counted)
    return [block for block in counted if abs(block.calibration / middle - 1) <= tolerance]


def dropped(blocks: Sequence[Block], tolerance: float = TOLERANCE) -> int:
    """How many blocks after the first round do not count."""
    return sum(block.round > 0 for block in blocks) - len(kept(blocks, tolerance))


def ratios(blocks: Sequence[Block], ours: str, theirs: str) -> list[float]:
    """Rate of one contestant over another's, once for each round in which both have a block that counts.

    A round's rate is all that was done in it by all the time that took, so both its blocks weigh alike.
    """
    found = []
    for number in sorted({block.round for block in blocks}):
        rates = [
            _rate([b for b in blocks if b.round == number and b.contestant == contestant])
            for contestant in (ours, theirs)
        ]
        if None not in rates:
            found.append(float(rates[0] or 0) / float(rates[1] or 1))
    return found


def _rate(blocks: Sequence[Block]) -> float | None:
    seconds = sum(block.seconds for block in blocks)
    return sum(block.amount for block in blocks) / seconds if seconds else None


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of ``(x, y)``. Raises ``ValueError`` with fewer than two different x."""
    if len({x for x, _ in points}) < 2:
        raise ValueError("a slope needs two different moments")
    return float(statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope)


def histogram(values: Iterable[int], edges: Sequence[int]) -> dict[str, int]:
    """How many values lie at or below each edge and above the one before, and how many above the last."""
    found = dict.fromkeys([*(f"<={edge}" for edge in edges), f">{edges[-1]}"], 0)
    for value in values:
        found[next((f"<={edge}" for edge in edges if value <= edge), f">{edges[-1]}")] += 1
    return found
