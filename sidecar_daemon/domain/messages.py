"""The nouns of a document's path. Frozen, slotted, without behaviour beyond derived properties."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NewType

from sidecar_daemon.domain.indexing import IndexState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sidecar_daemon.domain.outcomes import Outcome, Verdict

    TokenIds = NDArray[np.int64]
    """Shape ``(tokens,)``, int64, special tokens included."""
    Vector = NDArray[np.float32]
    """Shape ``(dimensions,)``, float32, L2 norm 1."""
    Vectors = NDArray[np.float32]
    """Shape ``(n, dimensions)``, float32, every row of L2 norm 1."""

PipelineName = NewType("PipelineName", str)
MessageId = NewType("MessageId", int)
DocumentKey = NewType("DocumentKey", str)
"""The source's key as text, in the canonical form of the key's type."""
ContentHash = NewType("ContentHash", str)
"""md5 of the rendered content, 32 lower-case hex digits, computed by Postgres."""
ModelId = NewType("ModelId", str)
"""``name@sha`` of everything that changes a vector."""


class Lane(StrEnum):
    """Which of a pipeline's two queues a message lies in. Live goes first."""

    LIVE = "live"
    BULK = "bulk"


class LongDocuments(StrEnum):
    """What happens to a document longer than one window."""

    MEAN = "mean"
    """One row: the token-weighted mean of the window vectors, L2 normalised."""
    CHUNKS = "chunks"
    """One row a window."""
    TRUNCATE = "truncate"
    """One row: the first window only."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One row of ``sidecar.pipelines``."""

    name: PipelineName
    source: str
    embeddings: str
    queue: str
    model: str
    model_id: ModelId | None
    """None until the first daemon registers the id of the model that it loaded."""
    dimensions: int
    long_documents: LongDocuments
    enabled: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """A message held under a visibility timeout. Its fence is ``(msg_id, read_ct)``."""

    lane: Lane
    msg_id: MessageId
    read_ct: int
    attempt: int
    """``read_ct`` less the excused leases; 1 on a first, clean delivery."""
    key: DocumentKey | None
    """None when the message is malformed."""
    age_seconds: float
    """Time since the writer enqueued it, by the database's clock."""
    last_error: str | None = None
    """Code of the last failure that counted, or ``released``."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading one document after the lease found."""

    key: DocumentKey
    verdict: Verdict
    content: str | None
    """The rendered content; only for ``Verdict.EMBED``."""
    content_hash: ContentHash | None
    content_bytes: int


@dataclass(frozen=True, slots=True)
class Document:
    """A document to embed, with every message that was leased for it before it was read."""

    key: DocumentKey
    content: str
    content_hash: ContentHash
    leases: tuple[Lease, ...]

    @property
    def suspect(self) -> bool:
        """Whether an earlier attempt ended badly: it then travels alone."""
        return any(lease.attempt > 1 for lease in self.leases)

    @property
    def lane(self) -> Lane:
        """Live when any of its messages is."""
        return Lane.LIVE if any(lease.lane is Lane.LIVE for lease in self.leases) else Lane.BULK


@dataclass(frozen=True, slots=True, eq=False)
class TokenWindow:
    """At most ``max_tokens`` token ids of one text, special tokens included."""

    ids: TokenIds
    content_tokens: int
    """Tokens without the special ones and the prefix: the window's weight in the mean."""
    start: int
    end: int
    """``text[start:end]`` is what the window covers, in characters."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One window of one document on its way through the model."""

    document: Document
    ordinal: int
    """0-based position within the document."""
    of: int
    """How many windows the document has."""
    tokens: TokenWindow

    @property
    def length(self) -> int:
        """Token ids, special tokens included."""
        return len(self.tokens.ids)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Windows that go through the model in one run."""

    windows: tuple[Window, ...]

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(window.length for window in self.windows)

    @property
    def padded_tokens(self) -> int:
        """Windows times the longest of them: what the model computes."""
        return len(self.windows) * max(window.length for window in self.windows)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """One row of the sidecar table."""

    number: int
    text: str
    vector: Vector


@dataclass(frozen=True, slots=True, eq=False)
class Settlement:
    """What to make true for one document: exactly these chunks (none for a blank one), then acknowledge."""

    key: DocumentKey
    content_hash: ContentHash
    chunks: tuple[Chunk, ...]
    leases: tuple[Lease, ...]

    @property
    def lane(self) -> Lane:
        """Of its oldest message, which freshness is counted from: an edit beside an old backfill is not late."""
        return max(self.leases, key=lambda lease: lease.age_seconds).lane


@dataclass(frozen=True, slots=True)
class Settled:
    """What ``settle`` did for one document."""

    key: DocumentKey
    outcome: Outcome
    """``embedded``, ``blank``, ``superseded`` or ``gone``."""
    acknowledged: int
    """Messages that were still ours and are now gone from the queue."""
    freshness_seconds: float | None
    """From the enqueueing of the oldest acknowledged message to this transaction; None if none was ours."""


@dataclass(frozen=True, slots=True)
class SweepWindow:
    """What one call of ``sweep`` did."""

    state: str
    """``walked`` (more to come), ``finished`` (the walk is over), ``waiting`` (a lane is deep),
    ``resting`` (the last walk is younger than the interval) or ``busy`` (another replica walks)."""
    scanned: int
    missing: int
    outdated: int
    wrong_model: int
    surplus: int
    """Blank documents that still have vectors."""
    enqueued: int
    backfill: bool


@dataclass(frozen=True, slots=True)
class LaneDepth:
    """How full one lane is."""

    depth: int
    """Messages waiting, in flight included."""
    in_flight: int
    oldest_seconds: float
    """Age of the oldest message; 0 when empty."""


@dataclass(frozen=True, slots=True)
class PipelineObservation:
    """How one pipeline is, as of a few seconds ago."""

    pipeline: PipelineName
    enabled: bool
    live: LaneDepth
    bulk: LaneDepth
    dead: int
    documents: int | None
    """Documents that are not blank, as the last finished walk of the sweep saw them; None before one has finished."""
    wanting: int | None
    """Of these, those that had no vector of their current text and model then."""
    walking: bool
    scanned: int
    """Rows that the walk under way has seen; of the last walk when none is."""
    sweep_age_seconds: float | None
    """Since the last walk finished; None when none has."""
    index: IndexState = IndexState.NONE
    """Of its vectors."""
    backfilling: bool = False
    """A backfill walks, or its lane still holds messages."""

    @property
    def coverage(self) -> float | None:
        """Share of the documents that have a current vector, 0 to 1; None before a walk has finished.

        What the walk found wanting has a message or a dead letter, so what is still queued or dead bounds what is
        wanting still: an estimate between two walks, exact when nothing was written since and the queues are empty.
        """
        if self.documents is None or self.wanting is None:
            return None
        if self.documents == 0:
            return 1.0
        unfinished = min(self.wanting, self.live.depth + self.bulk.depth + self.dead)
        return 1.0 - min(unfinished, self.documents) / self.documents


@dataclass(frozen=True, slots=True)
class Observation:
    """What the database says about all pipelines at one moment, and about what holds its vacuum back."""

    pipelines: tuple[PipelineObservation, ...]
    oldest_transaction_seconds: float | None
    """Age of the oldest transaction of this database, whoever's; None where we may not see it."""
    oldest_xmin_age: int | None
    """Transactions begun since the oldest snapshot that vacuum must respect; None where we may not see it."""
