"""The overviews of several replicas as one. Pure.

Replicas share a queue: what they count of it is the same, and the newest count holds. What each did itself adds up.
"""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from typing import TYPE_CHECKING

from sidecar_daemon.adapters.replicas import FreshnessView, HistoryView, Overview, PipelineView, SeriesView, SweepView

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_STATES = ("refused", "waiting", "working", "paused")
"""Worst first; one working replica is no comfort where another is refused."""
_CIRCUITS = ("open", "half_open", "closed")


def merged(overviews: Sequence[Overview]) -> Overview:
    """Put overviews together; a single one comes back as it is.

    Args:
        overviews: at least one.
    """
    if len(overviews) == 1:
        return overviews[0]
    newest = sorted(overviews, key=_staleness)
    names = sorted({pipeline.name for overview in overviews for pipeline in overview.pipelines})
    ups = [overview.uptime_seconds for overview in overviews if overview.uptime_seconds is not None]
    return Overview(
        version=", ".join(sorted({overview.version for overview in overviews})),
        uptime_seconds=min(ups, default=None),
        ready=all(overview.ready for overview in overviews),
        reasons=tuple(dict.fromkeys(reason for overview in overviews for reason in overview.reasons)),
        database=", ".join(sorted({overview.database for overview in overviews})),
        observed_seconds_ago=newest[0].observed_seconds_ago,
        pipelines=tuple(
            _pipeline([each for overview in newest for each in overview.pipelines if each.name == name])
            for name in names
        ),
        history=HistoryView(
            step_seconds=newest[0].history.step_seconds,
            series={
                name: _series([o.history.series[name] for o in newest if name in o.history.series]) for name in names
            },
        ),
    )


def _staleness(overview: Overview) -> float:
    return float("inf") if overview.observed_seconds_ago is None else overview.observed_seconds_ago


def _pipeline(views: Sequence[PipelineView]) -> PipelineView:
    """One pipeline as its replicas see it, the one that looked last first."""
    worst = min(views, key=lambda view: _rank(view.state, _STATES))
    rates = [view.rate for view in views if view.rate is not None]
    outcomes = Counter[str]()
    for view in views:
        outcomes.update(view.outcomes)
    return views[0].model_copy(
        update={
            "state": worst.state,
            "reason": worst.reason,
            "circuit": min((view.circuit for view in views), key=lambda circuit: _rank(circuit, _CIRCUITS)),
            "rate": sum(rates) if rates else None,
            "freshness": _freshness([view.freshness for view in views]),
            "outcomes": dict(outcomes),
            "sweep": SweepView(
                walking=any(view.sweep.walking for view in views),
                scanned=max(view.sweep.scanned for view in views),
                age_seconds=min(_known(view.sweep.age_seconds for view in views), default=None),
            ),
        }
    )


def _freshness(parts: Sequence[FreshnessView]) -> FreshnessView:
    """The middle weighted by count, which lies between the replicas' as the true one does; the worst p99, a bound."""
    weighted = [(part.p50, part.count) for part in parts if part.p50 is not None and part.count]
    count = sum(part.count for part in parts)
    return FreshnessView(
        p50=sum(p50 * n for p50, n in weighted) / sum(n for _, n in weighted) if weighted else None,
        p99=max(_known(part.p99 for part in parts), default=None),
        count=count,
    )


def _series(parts: Sequence[SeriesView]) -> SeriesView:
    """Embedded adds up from the newest step backwards; the depth is that of whoever looked last."""
    if not parts:
        return SeriesView()
    steps = zip_longest(*(reversed(part.embedded) for part in parts))
    embedded = [sum(known) if (known := list(_known(step))) else None for step in steps]
    return SeriesView(embedded=tuple(reversed(embedded)), depth=parts[0].depth)


def _known(values: Iterable[float | None]) -> Iterable[float]:
    return (value for value in values if value is not None)


def _rank(value: str, order: Sequence[str]) -> int:
    return order.index(value) if value in order else len(order)
