"""How much at once: pure policies that learn from what was seen. A lease brings seconds of work, a run lasts a moment.

Both limits of the settings are counts that say nothing about time: 256 titles are a second of work and 256 books an
hour, and 1,024 tokens are a moment for one model and half a second for another. These turn counts into time.
"""

from __future__ import annotations

import math

TARGET_RUN_SECONDS = 0.25
"""What one run of the model should last: an edit that comes in meanwhile waits for the rest of it."""
MIN_RUN_TOKENS = 64
"""A budget never falls below this, however slow the model: two titles may always share a run."""
_FASTEST = 1e12
"""Tokens a second that are believed: a clock may show next to no time at all."""
_WEIGHT = 0.2
"""Of the newest measurement in the moving averages: five or so are remembered."""


class LeaseHorizon:
    """How many messages to lease, so that they bring about as much work as there is room for.

    What a message brings is learnt: tokens of what it named, nothing where there was nothing to embed.
    """

    def __init__(self, *, most: int, tokens_a_message: float = 256.0) -> None:
        """At most ``most`` messages a lease; the first lease guesses ``tokens_a_message``."""
        self._most = most
        self._tokens_a_message = tokens_a_message

    def messages(self, room: int) -> int:
        """How many messages fill ``room`` tokens: at least one, at most the limit."""
        return max(1, min(self._most, math.ceil(room / max(self._tokens_a_message, 1.0))))

    def learn(self, messages: int, tokens: int) -> None:
        """``messages`` leased messages brought ``tokens`` tokens for the model."""
        if messages > 0:
            # A lease of many messages says more than one of a single message.
            weight = 1 - (1 - _WEIGHT) ** math.sqrt(messages)
            self._tokens_a_message += weight * (tokens / messages - self._tokens_a_message)


class RunBudget:
    """The padded tokens of one run, fitted to a target duration from the runs that were measured.

    Seconds are taken as proportional to padded tokens. On a CPU that holds well enough (PERFORMANCE 1: one document
    a run is as fast as a full budget), and where a run has a fixed cost the fit errs towards short runs.
    """

    def __init__(self, *, most: int, target_seconds: float = TARGET_RUN_SECONDS) -> None:
        """At most ``most`` tokens, which is also the first budget."""
        self._most = most
        self._target_seconds = target_seconds
        self._tokens_a_second: float | None = None

    @property
    def tokens(self) -> int:
        """The budget now."""
        if self._tokens_a_second is None:
            return self._most
        fitted = int(self._tokens_a_second * self._target_seconds)
        return min(self._most, max(MIN_RUN_TOKENS, fitted))

    def learn(self, padded_tokens: int, seconds: float) -> None:
        """One run of ``padded_tokens`` took ``seconds`` on one thread."""
        if padded_tokens <= 0 or seconds <= 0:
            return
        speed = min(padded_tokens / seconds, _FASTEST)
        if self._tokens_a_second is None:
            self._tokens_a_second = speed
        else:
            # A short run says little: its fixed cost is most of it.
            weight = _WEIGHT * min(1.0, padded_tokens / self.tokens)
            self._tokens_a_second += weight * (speed - self._tokens_a_second)
