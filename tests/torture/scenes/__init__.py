"""Short scripted interleavings on the real SQL functions, stepped from this process: T12, and what kills mutants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.torture.scenes import blame, claiming, interleaved, settling, sweeping

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.torture.scenes.ground import Ground

SCENES: dict[str, Callable[[Ground], Awaitable[None]]] = {
    "edit": interleaved.edit,
    "there_and_back": interleaved.there_and_back,
    "delete": interleaved.delete,
    "crash": interleaved.crash,
    "dead_letter": interleaved.dead_letter,
    "dead_letter_of_an_edit": blame.dead_letter_of_an_edit,
    "lost_lease": interleaved.lost_lease,
    "edit_inside_settle": settling.edit_inside_settle,
    "opposite_orders": settling.opposite_orders,
    "always_sends": settling.always_sends,
    "other_model": settling.other_model,
    "neighbours_are_excused": blame.neighbours_are_excused,
    "culprit_is_blamed": blame.culprit_is_blamed,
    "release_is_excused": blame.release_is_excused,
    "replay_is_clean": blame.replay_is_clean,
    "one_embeds": claiming.one_embeds,
    "claims_end": claiming.claims_end,
    "sweep_finds": sweeping.finds,
    "sweep_skips": sweeping.skips,
}
"""By name. Each raises ``AssertionError``, or leaves something for the checker."""
