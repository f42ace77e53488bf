"""What the core needs from outside, named after what it does with it.

Two implementations exist of each: ``Queue`` is Postgres, and Postgres wrapped with faults in the tests;
``Embedder`` is ONNX, and the deterministic test embedder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from sidecar_daemon.domain.messages import (
        ContentHash,
        DocumentKey,
        Lane,
        Lease,
        LongDocuments,
        ModelId,
        Observation,
        Pipeline,
        Reading,
        Settled,
        Settlement,
        SweepWindow,
        TokenIds,
        TokenWindow,
        Vectors,
    )


class Embedder(Protocol):
    """Text to vectors. Thread-safe: several threads call it at once. Never called on the event loop."""

    @property
    def dimensions(self) -> int:
        """Length of a vector."""

    def model_id(self, long_documents: LongDocuments) -> ModelId:
        """The id of this model under a policy for long documents."""

    def tokenize(self, text: str) -> list[TokenWindow]:
        """Split a text into windows of at most ``max_tokens`` ids, in order. Never empty, also for ``""``."""

    def embed(self, windows: Sequence[TokenIds]) -> Vectors:
        """Embed windows in one run.

        Args:
            windows: token ids, each of shape ``(tokens,)``, int64; lengths may differ.

        Returns:
            float32 of shape ``(len(windows), dimensions)``, rows in the order given, L2 norm 1. The rows do
            not depend on one another: a window alone gives the same vector as in any batch.

        Raises:
            Poison: the model cannot run on these windows.
        """


class Queue(Protocol):
    """One pipeline's messages and documents. Every negative step is fenced by ``(msg_id, read_ct)``.

    Every method raises ``Transient`` for the world's faults; ``settle`` may raise ``Poison``.
    """

    async def lease(self, lane: Lane, *, seconds: float, limit: int) -> list[Lease]:
        """Lease up to ``limit`` visible messages, oldest first. Committed on its own. Raises ``Refused``."""

    async def read(self, keys: Collection[DocumentKey], *, claim_seconds: float | None = None) -> list[Reading]:
        """Read the documents now: newer than every lease committed before. One reading a distinct key.

        Args:
            keys: canonical, distinct.
            claim_seconds: claim what is to be embedded for this long, unless ``extend`` prolongs it; what another
                replica has claimed comes as ``Verdict.CLAIMED``. None claims nothing and sees nobody's claims. A claim
                ends with the messages of its document, however they end; losing one costs a second run of the model.
        """

    async def begin(self, leases: Collection[Lease]) -> None:
        """Record that a suspect begins, before its text is read: an unclean end of its lease is then its own fault."""

    async def settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        """In one transaction: lock keys, check hashes, write chunks, acknowledge. One result a settlement."""

    async def acknowledge(self, leases: Collection[Lease]) -> int:
        """Remove messages that need no vector. Returns how many were still ours."""

    async def extend(self, leases: Collection[Lease], *, seconds: float) -> set[Lease]:
        """Hold the leases for ``seconds`` from now. Returns those that are still ours."""

    async def defer(self, delays: Mapping[Lease, float], *, code: str) -> int:
        """Make each message visible again after its delay in seconds; the attempt counts."""

    async def release(self, leases: Collection[Lease], *, delay: float = 0.0, keep_claims: bool = False) -> int:
        """Make messages visible after ``delay`` seconds, by default at once; the attempt is excused.

        ``keep_claims``: these messages had no part in the claims on their documents, which others of ours may have.
        """

    async def dead_letter(
        self, leases: Collection[Lease], *, reason: str, detail: str, content_hash: ContentHash | None
    ) -> int:
        """Move one document's messages to the dead-letter queue as one dead letter; the rest are removed."""

    async def sweep(self, *, rows: int, interval: float) -> SweepWindow:
        """Walk one window of the source. A walk starts at most every ``interval`` seconds, backfills at once."""


class Catalog(Protocol):
    """The pipelines that exist, and how they are. Every method raises ``Transient``."""

    async def pipelines(self) -> list[Pipeline]:
        """All pipelines, by name."""

    async def observe(self) -> Observation:
        """How full every pipeline's queues are, what the sweep saw, and what holds vacuum back."""

    async def register_model(self, pipeline: Pipeline, model_id: ModelId) -> None:
        """Write the id where the pipeline has none. Raises ``Refused`` where it has another."""
