"""How a leased message or document ends: closed sets, matched exhaustively with ``assert_never``."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What reading a leased document found, before any model runs."""

    EMBED = "embed"
    UNCHANGED = "unchanged"
    GONE = "gone"
    BLANK = "blank"
    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    LATER = "later"
    """The byte budget of one read was used up before this document: release it and read it next time."""
    CLAIMED = "claimed"
    """Another replica embeds this very text now: look again a little later, when it has settled or given up."""


class Outcome(StrEnum):
    """How one document left the worker."""

    EMBEDDED = "embedded"
    UNCHANGED = "unchanged"
    SUPERSEDED = "superseded"
    GONE = "gone"
    BLANK = "blank"
    DEFERRED = "deferred"
    DEAD_LETTERED = "dead_lettered"
    RELEASED = "released"
