"""T11's state machine: the real queue functions against an oracle that fits in a dictionary."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sidecar_daemon.adapters.postgres.queue import PostgresQueue
from sidecar_daemon.domain.errors import Refused
from sidecar_daemon.domain.messages import Chunk, Lane, ModelId, PipelineName, Settlement
from sidecar_daemon.domain.outcomes import Outcome, Verdict
from tests.torture.bench import CHUNKS, SOURCE
from tests.torture.checker import expected_rows
from tests.torture.scenes.ground import MAX_BYTES

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

    from sidecar_daemon.domain.messages import DocumentKey, Lease, Reading
    from tests.torture.scenes.ground import Ground, Session

KEYS = st.integers(0, 2)
"""Three documents an example: that they meet is what it is about."""
TEXTS = st.sampled_from(["one", "two", "three " * 40, "  ", "four " * 70])
"""Few, so that a text comes back after another one; of no, one, two and three windows."""
WORKERS = st.integers(0, 1)
_NOT_QUEUED = f"""
SELECT s.id, s.content FROM {SOURCE} AS s WHERE s.id = ANY ($1)
AND NOT EXISTS (SELECT FROM pgmq.q_chunky AS q WHERE q.message ->> 'document_id' = s.id::text)
AND NOT EXISTS (SELECT FROM pgmq.q_chunky_bulk AS q WHERE q.message ->> 'document_id' = s.id::text)
AND NOT EXISTS (SELECT FROM pgmq.q_chunky_dlq AS q WHERE q.message ->> 'document_id' = s.id::text
                AND q.message ->> 'content_hash' = md5(s.content))
"""
_ROWS = """
SELECT e.id, e.chunk_no, e.source_text, e.model FROM chunky_vectors AS e WHERE e.id = ANY ($1)
"""


class Holder:
    """One worker: what it has leased, and what it read."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.leases: dict[DocumentKey, list[Lease]] = {}
        self.readings: list[Reading] = []

    def forget(self) -> None:
        """Crash."""
        self.leases, self.readings = {}, []


class Machine(RuleBasedStateMachine):
    """Edit, delete, lease, read, expire, crash, settle, fail, sweep, replay, switch the model: in any order."""

    ground: ClassVar[Ground]
    loop: ClassVar[asyncio.AbstractEventLoop]
    examples: ClassVar[int] = 0
    numbers: ClassVar[Any] = itertools.count(1)
    model: ClassVar[ModelId]

    def __init__(self) -> None:
        super().__init__()
        number = next(Machine.numbers)
        self.keys = [number * 10 + n for n in range(3)]
        self.texts: dict[int, str] = {}
        """The oracle: what the source holds."""
        self.workers = [Holder(session) for session in self.ground.sessions[:2]]

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run one step on the machine's loop."""
        return self.loop.run_until_complete(work)

    @rule(n=KEYS, text=TEXTS)
    def edit(self, n: int, text: str) -> None:
        """Insert or edit."""
        key = self.keys[n]
        statement = f"INSERT INTO {SOURCE} VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET content = excluded.content"
        self.do(self.ground.admin.execute(statement, key, text))
        self.texts[key] = text

    @rule(n=KEYS)
    def delete(self, n: int) -> None:
        """Delete."""
        self.do(self.ground.admin.execute(f"DELETE FROM {SOURCE} WHERE id = $1", self.keys[n]))
        self.texts.pop(self.keys[n], None)

    @rule(w=WORKERS, lane=st.sampled_from(list(Lane)), seconds=st.sampled_from([0, 30]))
    def lease(self, w: int, lane: Lane, seconds: int) -> None:
        """Lease what is visible; for 0 seconds it expires at once."""
        for lease in self.do(self.workers[w].session.lease(seconds=seconds, lane=lane)):
            self.workers[w].leases.setdefault(lease.key, []).append(lease)

    @rule(w=WORKERS)
    def read(self, w: int) -> None:
        """Read what is leased: the text of now."""
        worker = self.workers[w]
        if worker.leases:
            worker.readings = self.do(worker.session.queue.read(list(worker.leases)))

    @rule(w=WORKERS)
    def settle(self, w: int) -> None:
        """Settle or acknowledge what was read; outcomes must be the oracle's."""
        worker = self.workers[w]
        for reading in worker.readings:
            leases = worker.leases.pop(reading.key, [])
            current = self.texts.get(int(reading.key))
            if reading.verdict in (Verdict.EMBED, Verdict.BLANK):
                assert reading.content_hash is not None
                text = reading.content or ""
                rows = expected_rows(text, "chunks") if reading.verdict is Verdict.EMBED else {}
                chunks = tuple(Chunk(k, t or "", v) for k, (t, v) in rows.items())
                (settled,) = self.do(
                    worker.session.queue.settle([Settlement(reading.key, reading.content_hash, chunks, tuple(leases))])
                )
                wrote = settled.outcome in (Outcome.EMBEDDED, Outcome.BLANK)
                same = current is not None and (current == text if text else not current.strip())
                assert wrote == same, f"{settled.outcome}: read {text[:9]!r}, the source holds {current!r:.20}"
                assert (settled.outcome is Outcome.GONE) == (current is None)
            elif leases:
                self.do(worker.session.queue.acknowledge(leases))
        worker.readings = []

    @rule(w=WORKERS, final=st.booleans())
    def fail(self, w: int, final: bool) -> None:
        """Defer one document, or give it up."""
        worker = self.workers[w]
        if not worker.readings:
            return
        reading = worker.readings.pop()
        leases = worker.leases.pop(reading.key, [])
        if not leases:
            return
        if final:
            step = worker.session.queue.dead_letter(leases, reason="fail", detail="", content_hash=reading.content_hash)
        else:
            step = worker.session.queue.defer(dict.fromkeys(leases, 0.0), code="fail")
        self.do(step)

    @rule(w=WORKERS)
    def crash(self, w: int) -> None:
        """Die; leases stay."""
        self.workers[w].forget()

    @rule()
    def expire(self) -> None:
        """Let time pass: every lease ends."""
        for lane in ("chunky", "chunky_bulk"):
            self.do(self.ground.admin.execute(f"UPDATE pgmq.q_{lane} SET vt = clock_timestamp()"))

    @rule()
    def sweep(self) -> None:
        """A whole walk."""
        self.do(self.ground.sessions[0].queue.sweep(rows=100_000, interval=0))

    @rule()
    def replay(self) -> None:
        """Bring back all dead letters."""
        self.do(self.ground.sessions[0].fetch_value("SELECT sidecar.replay($1)", CHUNKS))

    @precondition(lambda self: bool(self.texts))
    @rule()
    def switch_model(self) -> None:
        """Another version of the model: who has the old one is refused, with all that it holds."""
        Machine.model = ModelId(f"deterministic@{next(Machine.numbers)}")
        self.do(self.ground.admin.execute("UPDATE sidecar.pipelines SET model_id = $1", Machine.model))
        for worker in self.workers:
            try:
                self.do(worker.session.lease())
            except Refused:
                worker.forget()
            else:
                raise AssertionError("a worker with the old model may lease")
        self._hire()

    @invariant()
    def nothing_is_lost_or_orphaned(self) -> None:
        """At every moment: true, or queued, or dead for a reason; and no vector without its document."""
        stored: dict[int, dict[int, str]] = {}
        for row in self.do(self.ground.admin.fetch(_ROWS, self.keys)):
            stored.setdefault(row["id"], {})[row["chunk_no"]] = row["source_text"]
        assert stored.keys() <= self.texts.keys(), "a vector without its document"
        for row in self.do(self.ground.admin.fetch(_NOT_QUEUED, self.keys)):
            assert self.texts.get(row["id"]) == row["content"]
            wanted = {n: text for n, (text, _) in expected_rows(row["content"], "chunks").items()}
            assert stored.get(row["id"], {}) == wanted, f"document {row['id']} is neither true nor queued nor dead"

    def teardown(self) -> None:
        """Let every lease end and a worker finish; sweep; then everything is true, and of the current model."""
        self.expire()
        self._hire()
        self.replay()
        self.do(self.ground.finish())
        self.sweep()
        self.do(self.ground.finish())
        self.nothing_is_lost_or_orphaned()
        rows = self.do(self.ground.admin.fetch(_ROWS, self.keys))
        assert {row["model"] for row in rows} <= {Machine.model}, "a vector of an old model"
        assert len(rows) == sum(len(expected_rows(text, "chunks")) for text in self.texts.values())
        # Later examples would walk over these again, and embed them anew after every switch of the model.
        self.do(self.ground.admin.execute(f"DELETE FROM {SOURCE} WHERE id = ANY ($1)", self.keys))
        Machine.examples += 1

    def _hire(self) -> None:
        """Give every session the current model."""
        for session in self.ground.sessions:
            session.queue = PostgresQueue(session, PipelineName(CHUNKS), Machine.model, max_document_bytes=MAX_BYTES)  # type: ignore[arg-type]  # see Session
