"""How the index on a pipeline's vectors is, and how much memory building it needs. Pure."""

from __future__ import annotations

from enum import StrEnum

_FLOAT_BYTES = 4
_ELEMENT_BYTES = 760
"""Beside the vector itself. Measured with pgvector 0.8 and its default of 16 neighbours: 715 at 32, 384 and 768
dimensions alike, by the notice that a graph no longer fits. A little more, to stay below it."""
_BUILD_BYTES = 12 << 20
"""Beside the graph: a lone build takes memory by blocks of 8 MB, parallel workers set 3 MB of what they share aside."""


class IndexState(StrEnum):
    """How the index of one pipeline is."""

    LIVE = "live"
    """It serves searches and is kept up to date by every write."""
    DEFERRED = "deferred"
    """Left to be built after the load; until then searches compare with every vector: exact, and slow."""
    BUILDING = "building"
    MISSING = "missing"
    """It was there, or was wanted, and is not."""
    INVALID = "invalid"
    """A build or a drop was interrupted: it costs every write and serves no search."""
    NONE = "none"
    """Not wanted."""


class DeferIndex(StrEnum):
    """Whether ``attach`` leaves the index to be built after the load."""

    AUTO = "auto"
    """Where the source is large."""
    ALWAYS = "always"
    NEVER = "never"


def graph_bytes(rows: int, dimensions: int) -> int:
    """Memory that building an HNSW index in memory takes: its graph, vectors included."""
    return rows * (dimensions * _FLOAT_BYTES + _ELEMENT_BYTES) + _BUILD_BYTES


def build_memory(needed: int, *, least: int, most: int) -> int:
    """Bytes of ``maintenance_work_mem`` for a build: what the graph needs, within bounds.

    Args:
        needed: see ``graph_bytes``.
        least: what the server gives by itself; never less, whatever the bound.
        most: the bound.
    """
    return max(least, min(needed, most))
