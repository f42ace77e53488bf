"""Windows to batches: near-equal lengths under a padded-token budget, oldest first, suspects alone.

There is no timer: whoever is free takes one batch out of what waits right now, so batches grow only under load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar_daemon.domain.messages import Batch, Lane

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sidecar_daemon.domain.messages import Window

MIN_EFFICIENCY = 0.94
"""Real tokens over padded tokens that every batch keeps, whatever the mix of lengths."""
# Why a floor and not "fill the budget": padding is computed and thrown away, while on a CPU a short batch costs
# little more a token than a full one (PERFORMANCE 1). A 490-token seed is better off alone than with 30-token mates.


def next_batch(pending: Sequence[Window], *, max_padded_tokens: int, max_windows: int) -> Batch:
    """Pick one batch out of the windows that wait.

    The live lane goes before the bulk lane. Within it the oldest window is always taken, so nothing starves;
    the others are those nearest to it in length, older ones first. A suspect document shares its batches with
    no other document.

    Args:
        pending: what waits, oldest first; the windows of one document share one ``Document`` object.
        max_padded_tokens: limit of windows times the longest of them. A single longer window still goes, alone.
        max_windows: limit of windows.

    Returns:
        A batch of one lane, the oldest window first. O(n log n) in ``pending``, which is left as it is,
        and one pass more for every pass that found something.

    Raises:
        ValueError: nothing waits.
    """
    if not pending:
        raise ValueError("next_batch needs at least one pending window")
    seed = _oldest(pending)
    mates = [(window.length, window) for window in pending if window is not seed]
    mates.sort(key=lambda sized: abs(sized[0] - seed.length))  # stable: among equal distances the older comes first
    taken, longest, tokens = [seed], seed.length, seed.length
    found = True
    while found:  # one that was too short or too long at its turn may fit beside those that came after it
        found, left = False, []
        for size, window in mates:
            count = len(taken) + 1
            if count > max_windows or count * longest > max_padded_tokens:
                return Batch(windows=tuple(taken))
            padded = count * max(longest, size)
            if padded > max_padded_tokens or tokens + size < MIN_EFFICIENCY * padded:
                left.append((size, window))
                continue
            if not _may_share(seed, window):
                continue
            taken.append(window)
            longest = max(longest, size)
            tokens += size
            found = True
        mates = left
    return Batch(windows=tuple(taken))


def remaining(pending: Sequence[Window], taken: Iterable[Window]) -> list[Window]:
    """What still waits, in the same order, without what was taken. O(n)."""
    gone = set(taken)  # windows compare by identity
    return [window for window in pending if window not in gone]


def _oldest(pending: Sequence[Window]) -> Window:
    """The first live window, else the first one."""
    return next((window for window in pending if window.document.lane is Lane.LIVE), pending[0])


def _may_share(seed: Window, window: Window) -> bool:
    """Whether two windows may go in one run.

    A batch is of one lane even where its budget has room: a bulk rider would lengthen the run, the settle
    transaction and the blast radius of a failure for an edit that someone waits for, and it saves nothing,
    because a fuller run costs as much a token as two shorter ones.
    """
    if window.document is seed.document:
        return True
    return not (seed.document.suspect or window.document.suspect) and window.document.lane is seed.document.lane
