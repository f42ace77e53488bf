"""EXPLAIN guards: on a filled table the hot functions reach every big table through an index, and call nothing a row.

``auto_explain`` tells the plans of the statements inside the real functions, not of copies of them.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import asyncpg
import numpy as np
import pytest
from pgvector import Vector
from pgvector.asyncpg import register_vector

from tests.conftest import admin, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer

ROWS = 20_000
BATCH = 64
DIMENSIONS = 8
EXPLAIN = """
LOAD 'auto_explain';
SET auto_explain.log_min_duration = 0;
SET auto_explain.log_nested_statements = on;
SET auto_explain.log_format = json;
SET auto_explain.log_level = notice;
SET auto_explain.log_analyze = on;
SET auto_explain.log_timing = off;
"""
TABLES = ("docs", "docs_embeddings", "pgmq.q_docs", "pgmq.q_docs_bulk", "pgmq.q_docs_dlq", "sidecar.claims")
OUTDATED = f"""
UPDATE pg_class SET reltuples = 2 WHERE oid = ANY (ARRAY{list(TABLES)}::regclass[]);
DELETE FROM pg_statistic WHERE starelid = ANY (ARRAY{list(TABLES)}::regclass[]);
"""
"""As after a VACUUM ANALYZE at a moment when nearly all was worked off: two rows on all these pages."""
LEASE = "SELECT msg_id, read_ct, key FROM sidecar.lease('docs', 'm@1', 'live', 60, $1)"
BIG = frozenset({"docs", "docs_embeddings", "q_docs"})
FAR = 10_000
"""A key and a message in the middle: a walk from either end would meet many others first."""
ME, CLAIMED = "me", 19_000
"""Whose claims stand on the documents from here on, more than any call may look at."""


@dataclass
class Plans:
    """What the statements inside one call did."""

    connection: asyncpg.Connection
    statements: list[dict[str, Any]] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)

    async def of(self, call: str, *arguments: object) -> list[asyncpg.Record]:
        """Run a call and keep its plans. Returns its rows."""
        self.statements.clear()
        self.nodes.clear()
        rows = await self.connection.fetch(call, *arguments)
        await asyncio.sleep(0)  # the listeners' turn
        assert self.statements, "auto_explain tells nothing"
        for statement in self.statements:
            self._collect(statement["Plan"])
        return list(rows)

    def scanned(self) -> set[str]:
        """Big tables that were read from end to end."""
        return {node["Relation Name"] for node in self.nodes if node["Node Type"] == "Seq Scan"} & BIG

    def touched(self) -> dict[str, int]:
        """Rows of our tables that a node looked at, kept or not, in all its loops: the worst node of each relation."""
        worst: dict[str, int] = {}
        for node in self.nodes:
            name = node.get("Relation Name") or node.get("Index Name")
            if name is None or node["Node Type"] == "ModifyTable" or not name.startswith(("docs", "q_docs", "claims")):
                continue
            dropped = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
            worst[name] = max(worst.get(name, 0), round((node["Actual Rows"] + dropped) * node["Actual Loops"]))
        return worst

    def indexes(self) -> set[str]:
        """Indexes that were used."""
        return {node["Index Name"] for node in self.nodes if "Index Name" in node}

    def hear(self, _: object, message: Any) -> None:
        """Take a notice that holds a plan."""
        _, found, plan = str(message.message).partition("plan:")
        if found:
            self.statements.append(json.loads(plan))

    def _collect(self, node: dict[str, Any]) -> None:
        if node["Actual Loops"]:  # it was run, rather than planned only
            self.nodes.append(node)
        for child in node.get("Plans", []):
            self._collect(child)


async def fill(url: str) -> None:
    """A table with a vector beside every row, a deep live lane, many claims, and an index."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            f"""
            CREATE TABLE docs (id bigint PRIMARY KEY, body text);
            SELECT sidecar.attach('docs', '{{body}}', p_model => 'm', p_model_id => 'm@1', p_dimensions => {DIMENSIONS},
                p_defer_index => 'always');
            INSERT INTO docs SELECT n, rpad('body ' || n, 100, '.') FROM generate_series(1, {ROWS}) AS n;
            INSERT INTO docs_embeddings (id, source_text, source_text_hash, embedding, model)
            SELECT d.id, d.body, md5(d.body),
                (SELECT array_agg(sin(d.id * g)) FROM generate_series(1, {DIMENSIONS}) AS g)::vector, 'm@1'
            FROM docs AS d;
            CREATE INDEX by_cosine ON docs_embeddings USING hnsw (embedding vector_cosine_ops);
            INSERT INTO sidecar.claims
            SELECT 'docs', d.id::text, md5(d.body), 'm@1', '{ME}', now() + interval '1 hour' FROM docs AS d
            WHERE d.id <= {CLAIMED};
            """
        )
        for table in TABLES:
            await connection.execute(f"VACUUM ANALYZE {table}")
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def filled(cluster: EmbeddedServer, template: str) -> Iterator[str]:
    """URL of a filled database; every test rolls back what it does to it."""
    admin(cluster.dsn(), f"CREATE DATABASE plans TEMPLATE {template}")
    in_thread(fill(cluster.dsn("plans")))
    yield cluster.dsn("plans")
    admin(cluster.dsn(), "DROP DATABASE plans WITH (FORCE)")


@asynccontextmanager
async def watched(url: str) -> AsyncIterator[Plans]:
    """A session whose statements tell their plans; rolled back at the end."""
    connection = await asyncpg.connect(url)
    plans = Plans(connection)
    try:
        await register_vector(connection)
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(EXPLAIN)
        connection.add_log_listener(plans.hear)
        yield plans
        await transaction.rollback()
    finally:
        connection.remove_log_listener(plans.hear)
        await connection.close()


@pytest.fixture
async def plans(filled: str) -> AsyncIterator[Plans]:
    async with watched(filled) as watching:
        yield watching


async def lease(plans: Plans) -> None:
    assert len(await plans.of(LEASE, BATCH)) == BATCH


async def extend(plans: Plans) -> None:
    leases = await plans.of(LEASE, BATCH)
    ids, reads = [each["msg_id"] for each in leases], [each["read_ct"] for each in leases]
    assert len(await plans.of("SELECT sidecar.extend('docs', 'live', $1, $2, 60)", ids, reads)) == BATCH


async def defer(plans: Plans) -> None:
    leases = await plans.of(LEASE, BATCH)
    ids, reads = [each["msg_id"] for each in leases], [each["read_ct"] for each in leases]
    call = "SELECT sidecar.defer('docs', 'live', $1, $2, $3, 'later', false)"
    assert (await plans.of(call, ids, reads, [5.0] * BATCH))[0][0] == BATCH


async def acknowledge(plans: Plans) -> None:
    leases = await plans.of(LEASE, BATCH)
    ids, reads = [each["msg_id"] for each in leases], [each["read_ct"] for each in leases]
    assert (await plans.of("SELECT sidecar.acknowledge('docs', 'live', $1, $2)", ids, reads))[0][0] == BATCH


async def read_documents(plans: Plans) -> None:
    keys = [str(key) for key in range(FAR, FAR + BATCH)]
    await plans.connection.execute(
        f"UPDATE docs_embeddings SET source_text_hash = 'old' WHERE id BETWEEN {FAR} AND {FAR + 40}"
    )
    call = "SELECT verdict FROM sidecar.read_documents('docs', 'm@1', $1, 10000, 1000000, 'me', 60)"
    assert {row["verdict"] for row in await plans.of(call, keys)} == {"embed", "unchanged"}


async def settle(plans: Plans) -> None:
    leases = await plans.of(LEASE, BATCH)
    keys = [each["key"] for each in leases]
    hashes = "SELECT array_agg(md5(body) ORDER BY id) FROM docs WHERE id = ANY ($1::text[]::bigint[])"
    numbers = list(range(1, BATCH + 1))
    vectors = [Vector(np.cos(np.arange(1, DIMENSIONS + 1) * number)) for number in numbers]
    settled = await plans.of(
        "SELECT outcome, acknowledged FROM sidecar.settle('docs', 'm@1', $1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        *(keys, await plans.connection.fetchval(hashes, keys), numbers, [0] * BATCH, ["text"] * BATCH, vectors),
        *(numbers, ["live"] * BATCH, [each["msg_id"] for each in leases], [each["read_ct"] for each in leases]),
    )
    assert {tuple(row) for row in settled} == {("embedded", 1)}


async def settle_claimed(plans: Plans) -> None:
    """Settle documents that this worker has claimed, as it does."""
    await settle(plans)
    assert await plans.connection.fetchval("SELECT count(*) FROM sidecar.claims") == CLAIMED - BATCH


async def keep_claims(plans: Plans) -> None:
    await _with_claims(plans, "SELECT sidecar.extend('docs', 'live', $1, $2, 60, $3, $4)", rows=BATCH)
    assert await plans.connection.fetchval("SELECT count(*) FROM sidecar.claims") == CLAIMED


async def free_claims(plans: Plans) -> None:
    await _with_claims(plans, "SELECT sidecar.acknowledge('docs', 'live', $1, $2, $3, $4)", rows=1)
    assert await plans.connection.fetchval("SELECT count(*) FROM sidecar.claims") == CLAIMED - BATCH


async def begin(plans: Plans) -> None:
    leases = await plans.of(LEASE, BATCH)
    ids, reads = [each["msg_id"] for each in leases], [each["read_ct"] for each in leases]
    assert (await plans.of("SELECT sidecar.begin('docs', 'live', $1, $2)", ids, reads))[0][0] == BATCH


async def dead_letter(plans: Plans) -> None:
    (one,) = await plans.of(LEASE, 1)
    fence = "'{live}', ARRAY[$2::bigint], ARRAY[$3::integer]"
    call = f"SELECT sidecar.dead_letter('docs', $1, {fence}, 5, 'poison', 'told', NULL)"
    assert (await plans.of(call, one["key"], one["msg_id"], one["read_ct"]))[0][0] == 1


async def _with_claims(plans: Plans, call: str, *, rows: int) -> None:
    leases = await plans.of(LEASE, BATCH)
    ids, reads = [each["msg_id"] for each in leases], [each["read_ct"] for each in leases]
    assert len(await plans.of(call, ids, reads, [each["key"] for each in leases], ME)) == rows


async def sweep(plans: Plans) -> None:
    """A window in the middle of the table, a part of it missing and outdated, some of that queued already."""
    await plans.connection.execute(
        """
        DELETE FROM pgmq.q_docs WHERE msg_id > 500;
        DELETE FROM docs_embeddings WHERE id BETWEEN 10100 AND 10200;
        UPDATE docs_embeddings SET source_text_hash = 'old' WHERE id BETWEEN 10300 AND 10400;
        UPDATE sidecar.sweeps SET started_at = now(), finished_at = NULL, position = '10000';
        """
    )
    (window,) = await plans.of("SELECT * FROM sidecar.sweep('docs', 1000)")
    assert (window["scanned"], window["missing"], window["outdated"], window["enqueued"]) == (1000, 101, 101, 202)


async def search(plans: Plans) -> None:
    query = Vector(np.sin(np.arange(1, DIMENSIONS + 1) * 7))
    await plans.connection.execute("SET hnsw.ef_search = 400")  # the graph is drawn by lot, its misses are not ours
    found = await plans.of("SELECT similarity FROM sidecar.search('docs', $1, 10)", query)
    assert (len(found), found[0]["similarity"] > 0.999) == (10, True)


CALLS: dict[Callable[[Plans], Awaitable[None]], set[str]] = {
    lease: {"q_docs_pkey"},
    extend: {"q_docs_pkey"},
    defer: {"q_docs_pkey"},
    acknowledge: {"q_docs_pkey"},
    read_documents: {"docs_pkey", "docs_embeddings_pkey"},
    settle: {"docs_pkey", "docs_embeddings_pkey", "q_docs_pkey"},
    sweep: {"docs_pkey", "docs_embeddings_pkey"},
    search: {"by_cosine", "docs_pkey"},
}
LOST = {
    "q_docs_pkey": "ALTER TABLE pgmq.q_docs DROP CONSTRAINT q_docs_pkey",
    "docs_pkey": "ALTER TABLE docs DROP CONSTRAINT docs_pkey CASCADE",
    "docs_embeddings_pkey": "ALTER TABLE docs_embeddings DROP CONSTRAINT docs_embeddings_pkey",
    "by_cosine": "DROP INDEX by_cosine",
}


LOSSES = [(call, index) for call, used in CALLS.items() for index in sorted(used)]
LOSSES.remove((settle, "docs_embeddings_pkey"))  # without this one it does not run at all


def named(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("call", CALLS, ids=named)
async def test_a_hot_function_reads_no_big_table_from_end_to_end(
    plans: Plans, call: Callable[[Plans], Awaitable[None]]
) -> None:
    await call(plans)
    assert plans.scanned() - ({"q_docs"} if call is sweep else set()) == set()  # its lanes are bounded, and hashed once
    assert CALLS[call] <= plans.indexes()


@pytest.mark.parametrize(
    "call",
    [lease, extend, begin, defer, acknowledge, keep_claims, free_claims, read_documents, settle_claimed, dead_letter],
    ids=named,
)
async def test_what_a_hot_function_touches_is_bounded_by_its_batch_whatever_the_planner_believes(
    plans: Plans, call: Callable[[Plans], Awaitable[None]]
) -> None:
    await plans.connection.execute(f"DELETE FROM pgmq.q_docs WHERE msg_id < {FAR}")
    await plans.connection.execute(OUTDATED)
    await call(plans)
    most = max(plans.touched().values())
    assert most <= 2 * BATCH, plans.touched()


@pytest.mark.parametrize(("call", "index"), LOSSES, ids=named)
async def test_a_lost_index_is_seen(plans: Plans, call: Callable[[Plans], Awaitable[None]], index: str) -> None:
    await plans.connection.execute(LOST[index])
    await call(plans)
    assert index not in plans.indexes()
    assert plans.scanned()


@pytest.mark.parametrize("call", [lease, extend, read_documents, sweep], ids=named)
async def test_no_function_of_ours_is_run_a_row(plans: Plans, call: Callable[[Plans], Awaitable[None]]) -> None:
    """Those on content and messages are put in line; one that cannot be costs microseconds a row."""
    await call(plans)
    assert len(plans.statements) < 20, [statement["Query Text"][:60] for statement in plans.statements]
