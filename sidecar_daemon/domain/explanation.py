"""From the facts about one document to its state, and to what would happen next, in plain sentences. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, assert_never

from sidecar_daemon.domain.wording import counted, span

if TYPE_CHECKING:
    from sidecar_daemon.domain.tracing import DeadLetterFacts, DocumentFacts, MessageFacts


_AROUND = (
    "The triggers are on: it was written before attach, while they were off, or past them "
    "(into a partition, by a restore, by a session in replica mode)."
)


class DocumentState(StrEnum):
    """How one document is. Exactly one holds."""

    EMBEDDED = "embedded"
    """Its vector is of the current text and model, whatever else names it."""
    WAITING = "waiting"
    """A message is visible, or will be by itself: it was released, or sent with a delay."""
    IN_FLIGHT = "in_flight"
    """A replica holds a message under a lease."""
    DEFERRED = "deferred"
    """An attempt failed; its message is hidden until the backoff ends."""
    DEAD_LETTERED = "dead_lettered"
    """Given up, and the text is still the same."""
    NEVER_ENQUEUED = "never_enqueued"
    """No vector, no message, no dead letter of this text."""
    STALE = "stale"
    """A vector of an older text or of another model, and no message that would mend it."""
    BLANK = "blank"
    """Nothing to embed."""
    UNKNOWN = "unknown"
    """The source has no such row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainLimits:
    """The settings that decide what happens next, as this process has them."""

    max_attempts: int
    max_document_bytes: int
    sweep_interval: float
    """Seconds from the start of one routine walk to the next."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A state, one line that says it, and sentences about what would happen next."""

    state: DocumentState
    summary: str
    next: tuple[str, ...]


def explain(facts: DocumentFacts, limits: ExplainLimits) -> Explanation:
    """Say how a document is and what would happen to it next."""
    return _Story(facts, limits).told()


def telling_message(facts: DocumentFacts) -> MessageFacts | None:
    """The message that decides: one in flight, else the next to be leased, else the first that comes back."""
    if not facts.messages:
        return None
    return min(facts.messages, key=lambda m: (_rank(m), m.lane != "live", m.hidden_seconds, m.id))


def _rank(message: MessageFacts) -> int:
    return [DocumentState.IN_FLIGHT, DocumentState.WAITING, DocumentState.DEFERRED].index(message_state(message))


def message_state(message: MessageFacts) -> DocumentState:
    """Waiting, in flight or deferred."""
    if message.visible or not message.reads or (not message.held and message.error in {None, "released"}):
        return DocumentState.WAITING
    return DocumentState.IN_FLIGHT if message.held else DocumentState.DEFERRED


def state_of(facts: DocumentFacts) -> DocumentState:
    """The one state of a document."""
    if facts.document is None:
        return DocumentState.UNKNOWN
    if facts.document.blank:
        return DocumentState.BLANK
    if facts.vector is not None and facts.vector.current:
        return DocumentState.EMBEDDED
    message = telling_message(facts)
    if message is not None:
        return message_state(message)
    if facts.dead_letter is not None and not facts.dead_letter.resolved:
        return DocumentState.DEAD_LETTERED
    return DocumentState.NEVER_ENQUEUED if facts.vector is None else DocumentState.STALE


@dataclass(frozen=True, slots=True)
class _Story:
    """The sentences about one document."""

    facts: DocumentFacts
    limits: ExplainLimits

    def told(self) -> Explanation:
        state = state_of(self.facts)
        message = telling_message(self.facts)
        match state:
            case DocumentState.WAITING | DocumentState.IN_FLIGHT | DocumentState.DEFERRED:
                assert message is not None  # noqa: S101  these states come from a message
                summary, then = self._of_message(state, message)
            case DocumentState.EMBEDDED:
                summary, then = self._embedded()
            case DocumentState.DEAD_LETTERED:
                assert self.facts.dead_letter is not None  # noqa: S101  this state comes from one
                summary, then = self._dead(self.facts.dead_letter)
            case DocumentState.NEVER_ENQUEUED | DocumentState.STALE:
                summary, then = self._overlooked(state)
            case DocumentState.BLANK:
                summary, then = self._blank()
            case DocumentState.UNKNOWN:
                summary, then = self._unknown()
            case _:
                assert_never(state)
        return Explanation(state, summary, tuple(then))

    def _of_message(self, state: DocumentState, message: MessageFacts) -> tuple[str, list[str]]:
        most = self.limits.max_attempts
        if state is DocumentState.IN_FLIGHT:
            summary = (
                f"in flight: leased from the {message.lane} lane, attempt {message.attempt} of {most}, "
                f"the lease runs for another {span(message.hidden_seconds)}"
            )
            return summary, self._while_in_flight(message)
        if state is DocumentState.DEFERRED:
            summary = (
                f"deferred until {message.until}, for another {span(message.hidden_seconds)}, "
                f"after {message.error}, attempt {message.attempt} of {most}"
            )
            then = self._at_the_next_lease(message, f"At {message.until} a worker leases it")
            return summary, [*self._paused(), then]
        place = f"{counted(message.ahead, 'visible message')} before it" if message.ahead else "first in its lane"
        if not message.visible:
            place = f"visible in {span(message.hidden_seconds)}"
        summary = f"waiting in the {message.lane} lane for {span(message.age_seconds)}, {place}"
        if message.held:
            summary += f"; attempt {message.attempt} of {most} ended without an answer"
        turn = ", live messages first," if message.lane == "bulk" else " as soon as one is free"
        return summary, [*self._paused(), self._at_the_next_lease(message, f"A worker leases it{turn}")]

    def _while_in_flight(self, message: MessageFacts) -> list[str]:
        lines = ["The replica that holds it writes the vector, and prolongs the lease while it works."]
        if message.attempt is not None and message.attempt >= self.limits.max_attempts:
            lines.append("This is the last attempt: a failure makes it a dead letter.")
        again = self._at_the_next_lease(message, "another replica leases it")
        lines.append(f"If that replica is gone, the message is visible again at {message.until}: {again}")
        return [*self._paused(), *lines]

    def _at_the_next_lease(self, message: MessageFacts, beginning: str) -> str:
        most, size = self.limits.max_attempts, self.facts.document
        if message.next_attempt > most:
            ended = counted(message.next_attempt - 1, "attempt")
            return f"{beginning} and makes it a dead letter, attempts_exhausted: {ended} ended without an answer."
        if size is not None and size.bytes > self.limits.max_document_bytes:
            return f"{beginning} and makes it a dead letter, {self._too_large(size.bytes)}"
        last = ", the last" if message.next_attempt == most else ""
        return f"{beginning} and embeds it, attempt {message.next_attempt} of {most}{last}."

    def _too_large(self, size: int) -> str:
        allowed = self.limits.max_document_bytes
        return f"too_large: it has {size:,} bytes, SIDECAR_MAX_DOCUMENT_BYTES allows {allowed:,}."

    def _embedded(self) -> tuple[str, list[str]]:
        vector = self.facts.vector
        assert vector is not None  # noqa: S101  this state comes from one
        summary = (
            f"embedded: {counted(vector.chunks, 'vector')} of the current text by {vector.model}, "
            f"written {span(vector.age_seconds)} ago"
        )
        then = ["Nothing, until the text changes."]
        if self.facts.messages:
            many = counted(len(self.facts.messages), "message")
            then.append(f"{many} of it left: a worker finds the text unchanged and acknowledges.")
        return summary, [*then, *self._triggers()]

    def _dead(self, letter: DeadLetterFacts) -> tuple[str, list[str]]:
        name = self.facts.pipeline
        tried = "" if letter.attempts is None else f" after {counted(letter.attempts, 'attempt')}"
        summary = f"dead-lettered {span(letter.age_seconds)} ago{tried}: {letter.reason}"
        return summary, [
            "Nothing by itself: sweeps leave it alone while its text stays as it is.",
            f"An edit of the text tries again, and so does: sidecar-daemon dead-letters replay {name} {letter.id}",
            *self._triggers(),
        ]

    def _overlooked(self, state: DocumentState) -> tuple[str, list[str]]:
        vector = self.facts.vector
        if state is DocumentState.STALE and vector is not None:
            older = "an older text" if not vector.text_current else f"another model, {vector.model}"
            summary = f"stale: its vector is of {older}, and no message waits"
        else:
            summary = "never enqueued: no vector, no message, no dead letter of its text"
        then = [*(self._triggers() or [_AROUND]), *self._sweep()]
        size = self.facts.document
        if size is not None and size.bytes > self.limits.max_document_bytes:
            then.append(f"It will end as a dead letter, {self._too_large(size.bytes)}")
        return summary, then

    def _blank(self) -> tuple[str, list[str]]:
        if self.facts.vector is None:
            return "blank: nothing to embed, and no vector is kept", ["Nothing, until there is text."]
        summary = "blank: nothing to embed, but a vector of older text is left"
        if self.facts.messages:
            return summary, [*self._paused(), "Its message removes the vector when a worker leases it."]
        return summary, [*self._triggers(), *self._sweep()]

    def _unknown(self) -> tuple[str, list[str]]:
        facts = self.facts
        then = []
        if facts.messages:
            many = counted(len(facts.messages), "message")
            then.append(f"{many} of it left: a worker finds the row gone and acknowledges.")
        if facts.dead_letter is not None:
            forget = f"sidecar-daemon dead-letters purge {facts.pipeline} {facts.dead_letter.id}"
            then.append(f"Its dead letter is resolved; to forget it: {forget}")
        return f"unknown: table {facts.source} has no row with this key", then or [
            "Nothing: a row that is inserted is enqueued by its trigger.",
            *self._triggers(),
        ]

    def _paused(self) -> list[str]:
        if self.facts.enabled:
            return []
        name = self.facts.pipeline
        return [f"Pipeline {name} is paused: nothing new is leased until sidecar-daemon resume {name}"]

    def _triggers(self) -> list[str]:
        facts, lines = self.facts, []
        for event, state in (("insert", facts.triggers.insert), ("update", facts.triggers.update)):
            if state == "on":
                continue
            trigger = f"sidecar_{facts.pipeline}_{event}"
            mend = (
                f"sidecar-daemon detach {facts.pipeline}, then attach again"
                if state == "missing"
                else f"as the owner run: ALTER TABLE {facts.source} ENABLE TRIGGER {trigger}"
            )
            lines.append(f"The {event} trigger is {state}, so an {event} enqueues nothing; {mend}")
        return lines

    def _sweep(self) -> list[str]:
        sweep, name = self.facts.sweep, self.facts.pipeline
        if not self.facts.enabled:
            return [f"Pipeline {name} is paused: sweeps rest, too, until sidecar-daemon resume {name}"]
        if sweep.asked or sweep.started_seconds is None:
            return ["A sweep was asked for: a running daemon begins it at once, and it enqueues this document."]
        if sweep.walking and not sweep.passed:
            return ["The sweep under way has yet to reach this key, and will enqueue it."]
        beyond = "The sweep under way is beyond this key; the" if sweep.walking else "The"
        left = self.limits.sweep_interval - sweep.started_seconds
        when = f"starts in about {span(left)}" if left > 0 else "is due now"
        return [f"{beyond} next one {when} and enqueues it; at once: sidecar-daemon sweep {name}"]
