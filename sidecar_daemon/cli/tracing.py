"""How the trace of one document is shown: lines for people, a document of JSON for programs. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sidecar_daemon.cli.output import printable
from sidecar_daemon.domain.explanation import DocumentState, message_state
from sidecar_daemon.domain.wording import counted, span

if TYPE_CHECKING:
    from sidecar_daemon.domain.explanation import Explanation
    from sidecar_daemon.domain.tracing import DocumentFacts, MessageFacts

_MESSAGES_SHOWN = 5


def explanation_document(facts: DocumentFacts, explanation: Explanation) -> dict[str, Any]:
    """The state, what would happen next, and every fact behind it."""
    return {
        "pipeline": facts.pipeline,
        "key": facts.key,
        "state": str(explanation.state),
        "summary": explanation.summary,
        "next": list(explanation.next),
        **{name: value for name, value in asdict(facts).items() if name not in {"pipeline", "key"}},
    }


def explanation_lines(facts: DocumentFacts, explanation: Explanation) -> list[str]:
    """The state first, then where everything of the document is, then what would happen next."""
    known = {
        "document": _document(facts),
        "vector": _vector(facts),
        "messages": _messages(facts),
        "dead letter": _dead_letter(facts),
        "triggers": f"insert {facts.triggers.insert}, update {facts.triggers.update}",
        "pipeline": f"{facts.pipeline}, model {facts.model_id or facts.model}{'' if facts.enabled else ', paused'}",
    }
    lines = [f"{printable(facts.key)}: {explanation.summary}"]
    for name, found in known.items():
        for number, text in enumerate(found if isinstance(found, list) else [found]):
            lines.append(f"  {name if number == 0 else '':<12} {printable(text)}")
    return [*lines, "next:", *(f"  {printable(sentence)}" for sentence in explanation.next)]


def _document(facts: DocumentFacts) -> str:
    found = facts.document
    if found is None:
        return f"none in {facts.source}"
    return f"in {facts.source}, {found.bytes:,} bytes{', blank' if found.blank else ''}, md5 {found.hash}"


def _vector(facts: DocumentFacts) -> str:
    vector = facts.vector
    if vector is None:
        return "none"
    text = "the current text" if vector.text_current else "an older text"
    model = vector.model if vector.model_current else f"{vector.model}, another model"
    return f"{vector.chunks:,} of {text} by {model}, written {vector.written_at} ({span(vector.age_seconds)} ago)"


def _messages(facts: DocumentFacts) -> list[str]:
    shown = [_message(message) for message in facts.messages[:_MESSAGES_SHOWN]]
    more = len(facts.messages) - len(shown)
    return [*shown, *([f"and {more:,} more"] if more else [])] or ["none"]


def _message(message: MessageFacts) -> str:
    state = message_state(message)
    if state is DocumentState.WAITING:
        where = f"visible, {message.ahead:,} before it" if message.visible else f"visible at {message.until}"
    elif state is DocumentState.IN_FLIGHT:
        where = f"in flight, attempt {message.attempt}, lease until {message.until}"
    else:
        where = f"deferred until {message.until} after {message.error}, attempt {message.attempt}"
    sent = f"{message.action or 'sent'} {span(message.age_seconds)} ago"
    return f"{message.lane} {message.id}: {where}; {sent}, {counted(message.reads, 'lease')}"


def _dead_letter(facts: DocumentFacts) -> list[str]:
    letter = facts.dead_letter
    if letter is None:
        return ["none"]
    tried = "" if letter.attempts is None else f" after {counted(letter.attempts, 'attempt')}"
    resolved = "resolved" if letter.resolved else "not resolved"
    lines = [f"{letter.id}: {letter.reason}{tried}, {letter.dead_at} ({span(letter.age_seconds)} ago), {resolved}"]
    return [*lines, letter.detail] if letter.detail else lines
