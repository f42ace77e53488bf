"""The guards of the system, each switched off once: a suite that does not notice is blind (T17).

A guard in SQL is switched off by a textual patch of its function in the torture's own database; a guard in Python by
replacing what holds it inside the replica, through ``TORTURE_MUTANT``. A patch that no longer fits is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncpg


@dataclass(frozen=True)
class SqlMutant:
    """One guard of one SQL function."""

    function: str
    """Name in schema ``sidecar``."""
    guard: str
    """Text of the function that is the guard."""
    instead: str
    killer: str
    """The scene of T12 that must fail."""
    stride: int = 7
    """Every n-th order of the scene is enough to show it."""
    sign: str = "T12"
    """What the violation that shows it must say: a scene that fails of something else has not noticed."""

    async def apply(self, connection: asyncpg.Connection) -> None:
        """Switch the guard off. Raises ``LookupError`` when it is not where it was."""
        for function, definition in await connection.fetch(
            "SELECT p.oid::regprocedure::text, pg_get_functiondef(p.oid) FROM pg_proc AS p "
            "WHERE p.pronamespace = 'sidecar'::regnamespace AND p.proname = $1",
            self.function,
        ):
            if self.guard not in definition:
                raise LookupError(f"the guard {self.guard!r} is not in {function}")
            await connection.execute(definition.replace(self.guard, self.instead))


_FENCED = "q.read_ct = f.read_ct"
_ANY = "q.read_ct >= f.read_ct"

SQL_MUTANTS: dict[str, SqlMutant] = {
    "settle_without_hash_check": SqlMutant(
        "settle", "<> d.hash THEN", "<> d.hash AND false THEN", "edit", stride=1, sign="I1"
    ),
    "settle_without_lock": SqlMutant(
        "settle", "PERFORM sidecar._lock_documents(p_pipeline, p_keys);", "", "edit_inside_settle", sign="I1"
    ),
    "unchanged_whatever_is_settled": SqlMutant(
        "read_documents", "IF 'unchanged' = ANY (v_verdicts)", "IF false", "there_and_back", stride=1, sign="I1"
    ),
    "settle_without_fence": SqlMutant("settle", _FENCED, _ANY, "edit"),
    "settle_keeps_surplus_chunks": SqlMutant("settle", "e.chunk_no >= k.chunks", "false", "edit", sign="I1"),
    "settle_without_model_check": SqlMutant("settle", "p.model_id IS DISTINCT FROM p_model_id", "false", "other_model"),
    "lease_without_model_check": SqlMutant(
        "_workable", "p.model_id IS DISTINCT FROM p_model_id", "false", "other_model"
    ),
    "locks_in_any_order": SqlMutant(
        "_lock_documents",
        "SELECT DISTINCT sidecar._document_lock(p_pipeline, k) AS l FROM unnest(p_keys) AS k ORDER BY l",
        "SELECT sidecar._document_lock(p_pipeline, k) AS l FROM unnest(p_keys) AS k",
        "opposite_orders",
    ),
    "acknowledge_without_fence": SqlMutant("acknowledge", _FENCED, _ANY, "delete"),
    "dead_letter_without_fence": SqlMutant("dead_letter", _FENCED, _ANY, "dead_letter"),
    "dead_letter_keeps_stale_vectors": SqlMutant(
        "dead_letter", "v_count > 0 AND p_key IS NOT NULL", "false", "dead_letter_of_an_edit", sign="I1"
    ),
    "extend_without_fence": SqlMutant("extend", _FENCED, _ANY, "lost_lease"),
    "defer_without_fence": SqlMutant("defer", _FENCED, _ANY, "lost_lease"),
    "release_not_excused": SqlMutant("defer", "+ $5::integer", "+ 0", "release_is_excused"),
    "neighbours_not_excused": SqlMutant("lease", "u.innocent::integer", "0", "neighbours_are_excused"),
    "culprit_not_announced": SqlMutant("begin", "''accounted'', q.read_ct", "''accounted'', 0", "culprit_is_blamed"),
    "enqueue_deduplicates": SqlMutant(
        "enqueue_chunky",
        "WHERE NOT EXISTS (",
        "WHERE NOT EXISTS (SELECT FROM pgmq.q_chunky AS q WHERE q.message ->> 'document_id' = n.id::text) "
        "AND NOT EXISTS (",
        "edit",
        sign="I1",
    ),
    "replay_keeps_the_count": SqlMutant("replay", "- ''sidecar''", "- ''nothing''", "replay_is_clean"),
    "nobody_claims": SqlMutant("read_documents", "IF p_claimant IS NOT NULL AND", "IF false AND", "one_embeds"),
    "release_frees_anothers_claim": SqlMutant(
        "_free_claims", "c.claimant = p_claimant OR", "c.claimant <> p_claimant OR", "one_embeds"
    ),
    "settlement_keeps_its_claim": SqlMutant(
        "settle", "PERFORM sidecar._answer_claims(p_pipeline, p_keys, p_hashes);", "", "one_embeds"
    ),
    "claim_outlives_its_text": SqlMutant("_claim", "OR c.hash <> excluded.hash", "", "claims_end"),
    "claim_never_expires": SqlMutant("_claim", "OR c.expires_at <= clock_timestamp()", "", "claims_end"),
    "sweep_overlooks_missing": SqlMutant("sweep", "IS NULL THEN 'missing'", "IS NULL THEN 'fine'", "sweep_finds"),
    "sweep_overlooks_outdated": SqlMutant("sweep", "THEN 'outdated'", "THEN 'fine'", "sweep_finds"),
    "sweep_overlooks_other_models": SqlMutant("sweep", "THEN 'wrong_model'", "THEN 'fine'", "sweep_finds"),
    "sweep_repeats_dead_letters": SqlMutant(
        "sweep", "d.message ->> 'content_hash' = j.hash", "d.message ->> 'content_hash' = '-'", "sweep_skips"
    ),
    "sweep_repeats_what_is_queued": SqlMutant(
        "sweep", "q.message ->> 'document_id' = j.key", "q.message ->> 'document_id' = '-'", "sweep_skips"
    ),
}


@dataclass(frozen=True)
class PythonMutant:
    """One guard of the daemon's own code."""

    apply: Callable[[], None]
    """Replaces it, in a replica."""
    killer: str
    """The fault that must fail."""
    sign: str
    """What one of its violations must say (a regular expression): see ``SqlMutant``."""


def _suspects_share() -> None:
    """Suspects are read with everybody else, take no turns and are announced by nobody."""
    from sidecar_daemon.domain import batching
    from sidecar_daemon.worker import leasing

    leasing._suspect = lambda leases: leases is None
    batching._may_share = lambda seed, window: window is not seed


def _batch_is_blamed() -> None:
    """A failing batch blames all of its documents instead of trying each alone."""
    from sidecar_daemon.domain.errors import Poison
    from sidecar_daemon.worker import embedding
    from sidecar_daemon.worker.failing import fail

    async def blames_all(self: Any, batch: Any) -> None:
        jobs = self._jobs(batch)
        try:
            vectors = await self._infer(batch)
        except Poison as error:
            for job in jobs:
                await fail(self._state, job, error)
        else:
            await self._collect(batch, vectors)

    embedding.EmbeddingLoop._embed = blames_all  # type: ignore[method-assign]  # that is what a mutant does


def _detail_as_it_is() -> None:
    from sidecar_daemon.worker import failing

    failing.storable = lambda detail: detail


def _lost_connection_is_a_bug() -> None:
    from sidecar_daemon.domain import retry

    retry._WORLD_CLASSES -= {"08", "57"}  # a backend that is ended tells either, as the race falls


def _drain_forgets() -> None:
    from sidecar_daemon.worker import Worker

    async def nothing(self: Any, leases: Any, *, documents: int) -> None:
        del documents
        self._state.done(leases)

    Worker._release = nothing  # type: ignore[method-assign]  # that is what a mutant does


def _password_is_told() -> None:
    from sidecar_daemon.adapters.postgres import pool
    from sidecar_daemon.domain import log_lines

    pool.place_of = lambda dsn: dsn
    log_lines.redact = lambda text: text


PYTHON_MUTANTS: dict[str, PythonMutant] = {
    "suspects_share_batches": PythonMutant(_suspects_share, "T8", r"killer 0|I6 "),
    "whole_batch_is_blamed": PythonMutant(_batch_is_blamed, "T7", r"T7 innocent|I6 "),
    "detail_is_not_sanitised": PythonMutant(_detail_as_it_is, "T7", r"all poison in the dead letters|the detail of"),
    "lost_connection_is_a_bug": PythonMutant(
        _lost_connection_is_a_bug, "T4", r"a settlement under way|ended by itself|ended while starting"
    ),
    "drain_forgets_to_release": PythonMutant(_drain_forgets, "T15", r"still held after the exit|lost an attempt"),
    "password_in_the_log": PythonMutant(_password_is_told, "T4", r"I10 "),
}
