"""What is known about one document, as ``sidecar.explain_document`` tells it: facts without judgement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentFacts:
    """The rendered content as it is now."""

    hash: str
    bytes: int
    blank: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorFacts:
    """What the sidecar table holds."""

    chunks: int
    model: str
    text_current: bool
    """Whether it was made from the current text."""
    model_current: bool
    """Whether it was made by the pipeline's model."""
    written_at: str
    age_seconds: float

    @property
    def current(self) -> bool:
        """Whether there is nothing to do."""
        return self.text_current and self.model_current


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageFacts:
    """One message that names the document. Attempts are counted as the lease counts them."""

    lane: str
    id: int
    action: str | None
    reads: int
    """Leases so far, excused ones included."""
    attempt: int | None
    """That of the last lease; None before the first."""
    next_attempt: int
    visible: bool
    """Whether the next lease may take it."""
    held: bool
    """Whether nobody has said how its last lease ended: it runs, or it ran out."""
    until: str
    """Since when it is, or from when on it will be, visible."""
    hidden_seconds: float
    age_seconds: float
    ahead: int
    """Visible messages of its lane that go before it."""
    error: str | None
    """Code of the last failure that counted, or ``released``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterFacts:
    """Why the document was given up."""

    id: int
    reason: str
    detail: str | None
    attempts: int | None
    dead_at: str
    age_seconds: float
    resolved: bool
    """The document is gone, changed since, or embedded: nothing is left to mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerFacts:
    """Each ``on``, ``disabled``, ``replica only`` or ``missing``."""

    insert: str
    update: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFacts:
    """Where the walk over the source stands."""

    asked: bool
    """Whether somebody asked for a walk that has not begun."""
    walking: bool
    backfill: bool
    passed: bool
    """Whether the walk under way is beyond this document."""
    started_seconds: float | None
    """Since the start of the walk under way, or of the last one; None before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentFacts:
    """Everything that is known about one document of a pipeline, at one moment."""

    pipeline: str
    key: str
    source: str
    model: str
    model_id: str | None
    enabled: bool
    document: ContentFacts | None
    """None: the source has no such row."""
    vector: VectorFacts | None
    messages: tuple[MessageFacts, ...]
    dead_letter: DeadLetterFacts | None
    triggers: TriggerFacts
    sweep: SweepFacts
