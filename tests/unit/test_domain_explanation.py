"""From facts to one state and plain sentences, as a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecar_daemon.domain.explanation import DocumentState, ExplainLimits, explain
from sidecar_daemon.domain.tracing import (
    ContentFacts,
    DeadLetterFacts,
    DocumentFacts,
    MessageFacts,
    SweepFacts,
    TriggerFacts,
    VectorFacts,
)
from sidecar_daemon.domain.wording import counted, span

LIMITS = ExplainLimits(max_attempts=5, max_document_bytes=1000, sweep_interval=300)
UNTIL = "2025-03-01 03:00:00+00"
TEXT = ContentFacts(hash="9a0364b9e99bb480dd25e1f0284c8555", bytes=7, blank=False)
BLANK = replace(TEXT, blank=True)
HUGE = replace(TEXT, bytes=1001)
VECTOR = VectorFacts(
    chunks=1, model="tiny@1", text_current=True, model_current=True, written_at=UNTIL, age_seconds=180.0
)
OLDER = replace(VECTOR, text_current=False)
OTHER_MODEL = replace(VECTOR, model_current=False, model="small@2")
FRESH = MessageFacts(
    lane="live",
    id=7,
    action="insert",
    reads=0,
    attempt=None,
    next_attempt=1,
    visible=True,
    held=False,
    until=UNTIL,
    hidden_seconds=0.0,
    age_seconds=12.0,
    ahead=3,
    error=None,
)
LEASED = replace(FRESH, reads=1, attempt=1, next_attempt=2, visible=False, held=True, hidden_seconds=48.0)
EXPIRED = replace(LEASED, visible=True, hidden_seconds=0.0)
DEFERRED = replace(LEASED, held=False, error="inference_failed")
RELEASED = replace(LEASED, held=False, error="released", next_attempt=1)
DELAYED = replace(FRESH, visible=False, hidden_seconds=48.0)
DEAD = DeadLetterFacts(
    id=9, reason="bad_vector", detail="why", attempts=5, dead_at=UNTIL, age_seconds=7200.0, resolved=False
)
ON = TriggerFacts(insert="on", update="on")
RESTING = SweepFacts(asked=False, walking=False, backfill=False, passed=False, started_seconds=100.0)


def facts(**known: Any) -> DocumentFacts:
    """A document that nothing is known of, but this."""
    plain = DocumentFacts(
        pipeline="notes",
        key="42",
        source="public.notes",
        model="tiny",
        model_id=None,
        enabled=True,
        document=TEXT,
        vector=None,
        messages=(),
        dead_letter=None,
        triggers=ON,
        sweep=RESTING,
    )
    return replace(plain, **known)


PAUSED = "paused: nothing new is leased until sidecar-daemon resume notes"
STATES: dict[str, tuple[dict[str, Any], DocumentState, str, list[str]]] = {
    "embedded": (
        {"vector": VECTOR},
        DocumentState.EMBEDDED,
        "embedded: 1 vector of the current text by tiny@1, written 3 min ago",
        ["Nothing, until the text changes."],
    ),
    "embedded, a message is left": (
        {"vector": replace(VECTOR, chunks=3), "messages": (LEASED, FRESH)},
        DocumentState.EMBEDDED,
        "embedded: 3 vectors",
        ["Nothing, until", "2 messages of it left: a worker finds the text unchanged"],
    ),
    "embedded, but the next edit is missed": (
        {"vector": VECTOR, "triggers": TriggerFacts(insert="on", update="disabled")},
        DocumentState.EMBEDDED,
        "embedded",
        ["Nothing, until", "ALTER TABLE public.notes ENABLE TRIGGER sidecar_notes_update"],
    ),
    "embedded, beside an older dead letter": (
        {"vector": VECTOR, "dead_letter": replace(DEAD, resolved=True)},
        DocumentState.EMBEDDED,
        "embedded",
        ["Nothing, until"],
    ),
    "waiting": (
        {"messages": (FRESH,)},
        DocumentState.WAITING,
        "waiting in the live lane for 12 s, 3 visible messages before it",
        ["A worker leases it as soon as one is free and embeds it, attempt 1 of 5."],
    ),
    "waiting, first in the bulk lane": (
        {"messages": (replace(FRESH, lane="bulk", ahead=0),)},
        DocumentState.WAITING,
        "waiting in the bulk lane for 12 s, first in its lane",
        ["leases it, live messages first, and embeds it"],
    ),
    "waiting, older text": (
        {"messages": (FRESH,), "vector": OLDER},
        DocumentState.WAITING,
        "waiting",
        ["attempt 1 of 5."],
    ),
    "waiting, paused": (
        {"messages": (FRESH,), "enabled": False},
        DocumentState.WAITING,
        "waiting",
        [PAUSED, "A worker leases it"],
    ),
    "waiting, its lease ran out": (
        {"messages": (EXPIRED,)},
        DocumentState.WAITING,
        "attempt 1 of 5 ended without an answer",
        ["attempt 2 of 5."],
    ),
    "waiting for its last attempt": (
        {"messages": (replace(EXPIRED, attempt=4, next_attempt=5),)},
        DocumentState.WAITING,
        "attempt 4 of 5 ended",
        ["attempt 5 of 5, the last."],
    ),
    "waiting to be given up": (
        {"messages": (replace(EXPIRED, attempt=5, next_attempt=6),)},
        DocumentState.WAITING,
        "attempt 5 of 5 ended",
        ["makes it a dead letter, attempts_exhausted: 5 attempts ended without an answer."],
    ),
    "waiting, too large": (
        {"messages": (FRESH,), "document": HUGE},
        DocumentState.WAITING,
        "waiting",
        ["dead letter, too_large: it has 1,001 bytes, SIDECAR_MAX_DOCUMENT_BYTES allows 1,000."],
    ),
    "released": (
        {"messages": (RELEASED,)},
        DocumentState.WAITING,
        "waiting in the live lane for 12 s, visible in 48 s",
        ["embeds it, attempt 1 of 5."],
    ),
    "sent with a delay": (
        {"messages": (DELAYED,)},
        DocumentState.WAITING,
        "waiting in the live lane for 12 s, visible in 48 s",
        ["embeds it, attempt 1 of 5."],
    ),
    "in flight": (
        {"messages": (FRESH, LEASED)},
        DocumentState.IN_FLIGHT,
        "in flight: leased from the live lane, attempt 1 of 5, the lease runs for another 48 s",
        ["The replica that holds it writes", f"visible again at {UNTIL}: another replica leases it and embeds it"],
    ),
    "in flight for the last time": (
        {"messages": (replace(LEASED, attempt=5, next_attempt=6),)},
        DocumentState.IN_FLIGHT,
        "attempt 5 of 5",
        ["The replica", "This is the last attempt", "makes it a dead letter, attempts_exhausted"],
    ),
    "in flight, paused": (
        {"messages": (LEASED,), "enabled": False},
        DocumentState.IN_FLIGHT,
        "in flight",
        [PAUSED, "The replica that holds it writes", "If that replica is gone"],
    ),
    "deferred": (
        {"messages": (replace(DEFERRED, attempt=2, next_attempt=3),)},
        DocumentState.DEFERRED,
        f"deferred until {UNTIL}, for another 48 s, after inference_failed, attempt 2 of 5",
        [f"At {UNTIL} a worker leases it and embeds it, attempt 3 of 5."],
    ),
    "deferred and edited since": (
        {"messages": (DEFERRED, FRESH)},
        DocumentState.WAITING,
        "waiting",
        ["attempt 1 of 5."],
    ),
    "dead-lettered": (
        {"dead_letter": DEAD},
        DocumentState.DEAD_LETTERED,
        "dead-lettered 2 h ago after 5 attempts: bad_vector",
        ["Nothing by itself", "sidecar-daemon dead-letters replay notes 9"],
    ),
    "dead-lettered and replayed": (
        {"dead_letter": DEAD, "messages": (FRESH,)},
        DocumentState.WAITING,
        "waiting",
        ["attempt 1 of 5."],
    ),
    "never enqueued, trigger off": (
        {"triggers": TriggerFacts(insert="disabled", update="missing")},
        DocumentState.NEVER_ENQUEUED,
        "never enqueued: no vector, no message",
        [
            "The insert trigger is disabled, so an insert enqueues nothing; as the owner run: ALTER TABLE public.notes",
            "The update trigger is missing, so an update enqueues nothing; sidecar-daemon detach notes, then attach",
            "The next one starts in about 3 min and enqueues it; at once: sidecar-daemon sweep notes",
        ],
    ),
    "never enqueued, written around it": (
        {"sweep": replace(RESTING, started_seconds=301.0)},
        DocumentState.NEVER_ENQUEUED,
        "never enqueued",
        ["The triggers are on: it was written before attach", "The next one is due now"],
    ),
    "never enqueued, the walk comes": (
        {"sweep": replace(RESTING, walking=True)},
        DocumentState.NEVER_ENQUEUED,
        "never enqueued",
        ["The triggers are on", "has yet to reach this key"],
    ),
    "never enqueued, the walk has passed": (
        {"sweep": replace(RESTING, walking=True, passed=True)},
        DocumentState.NEVER_ENQUEUED,
        "never enqueued",
        ["The triggers are on", "is beyond this key; the next one starts in about 3 min"],
    ),
    "never enqueued, a walk was asked for": (
        {"sweep": replace(RESTING, asked=True, started_seconds=None)},
        DocumentState.NEVER_ENQUEUED,
        "never enqueued",
        ["The triggers are on", "A sweep was asked for"],
    ),
    "never enqueued, paused": (
        {"enabled": False},
        DocumentState.NEVER_ENQUEUED,
        "never enqueued",
        ["The triggers are on", "paused: sweeps rest, too, until sidecar-daemon resume notes"],
    ),
    "never enqueued, too large": (
        {"document": HUGE},
        DocumentState.NEVER_ENQUEUED,
        "never enqueued",
        ["The triggers are on", "The next one", "It will end as a dead letter, too_large: it has 1,001 bytes"],
    ),
    "its dead letter is of an older text": (
        {"dead_letter": replace(DEAD, resolved=True)},
        DocumentState.NEVER_ENQUEUED,
        "never enqueued",
        ["The triggers are on", "The next one"],
    ),
    "stale": (
        {"vector": OLDER},
        DocumentState.STALE,
        "stale: its vector is of an older text, and no message waits",
        ["The triggers are on", "The next one"],
    ),
    "of another model": (
        {"vector": OTHER_MODEL},
        DocumentState.STALE,
        "stale: its vector is of another model, small@2",
        ["The triggers are on", "The next one"],
    ),
    "blank": ({"document": BLANK}, DocumentState.BLANK, "blank: nothing to embed, and no vector", ["Nothing, until"]),
    "blank, a vector is left": (
        {"document": BLANK, "vector": OLDER},
        DocumentState.BLANK,
        "blank: nothing to embed, but a vector of older text is left",
        ["The next one"],
    ),
    "blank, its message waits": (
        {"document": BLANK, "vector": OLDER, "messages": (FRESH,), "enabled": False},
        DocumentState.BLANK,
        "blank",
        [PAUSED, "Its message removes the vector"],
    ),
    "unknown": (
        {"document": None},
        DocumentState.UNKNOWN,
        "unknown: table public.notes has no row with this key",
        ["Nothing: a row that is inserted is enqueued by its trigger."],
    ),
    "deleted in flight": (
        {"document": None, "messages": (LEASED,), "dead_letter": replace(DEAD, resolved=True)},
        DocumentState.UNKNOWN,
        "unknown",
        ["1 message of it left: a worker finds the row gone", "sidecar-daemon dead-letters purge notes 9"],
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_facts_become_a_state_and_sentences(case: str) -> None:
    known, state, summary, then = STATES[case]
    told = explain(facts(**known), LIMITS)
    assert told.state is state
    assert summary in told.summary
    assert len(told.next) == len(then), told.next
    for sentence, words in zip(told.next, then, strict=True):
        assert words in sentence


def test_every_state_is_in_the_table() -> None:
    assert {state for _, state, _, _ in STATES.values()} == set(DocumentState)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((-1.0, "0 ms"), (0.0, "0 ms"), (0.027, "27 ms"), (0.9996, "1.0 s"), (3.24, "3.2 s"), (9.96, "10 s")),
        *((99.4, "99 s"), (99.6, "2 min"), (5969.0, "99 min"), (5971.0, "2 h"), (172799.0, "48 h"), (172800.0, "2 d")),
    ],
)
def test_a_duration_is_worded_in_its_unit(seconds: float, said: str) -> None:
    assert span(seconds) == said


def test_a_count_is_worded_with_its_noun() -> None:
    assert (counted(1, "lease"), counted(0, "lease"), counted(1200, "lease")) == ("1 lease", "0 leases", "1,200 leases")
