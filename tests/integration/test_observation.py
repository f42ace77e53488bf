"""What the gauges are made of: lanes, coverage as the sweep saw it, and what holds vacuum back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar_daemon.adapters.postgres.queue import PostgresCatalog
from sidecar_daemon.domain.messages import LaneDepth
from tests.integration.test_sweep import quietly, sweep
from tests.rig import Rig, second_session

if TYPE_CHECKING:
    from sidecar_daemon.domain.messages import Observation, PipelineObservation


async def look(rig: Rig) -> Observation:
    return await PostgresCatalog(rig.database).observe()


async def look_at_docs(rig: Rig) -> PipelineObservation:
    (seen,) = (await look(rig)).pipelines
    return seen


async def test_the_lanes_of_a_pipeline(rig: Rig) -> None:
    await rig.write(k1="a", k2="b")
    await rig.lease(limit=1)
    seen = await look_at_docs(rig)
    assert (seen.pipeline, seen.enabled, seen.live.depth, seen.live.in_flight) == ("docs", True, 2, 1)
    assert seen.live.oldest_seconds > 0
    assert (seen.bulk, seen.dead) == (LaneDepth(0, 0, 0.0), 0)
    await rig.connection.execute("SELECT sidecar.set_enabled('docs', false)")
    assert not (await look_at_docs(rig)).enabled


async def test_coverage_is_unknown_until_a_walk_has_finished(rig: Rig) -> None:
    await rig.connection.execute("UPDATE sidecar.sweeps SET started_at = NULL, finished_at = NULL")
    await quietly(rig, k1="a", k2="b", k3=" ", k4="d")
    await rig.settle(rig.settlement(2, "b"))
    await sweep(rig, rows=3)
    under_way = await look_at_docs(rig)
    assert (under_way.documents, under_way.coverage, under_way.sweep_age_seconds) == (None, None, None)
    assert (under_way.scanned, under_way.walking) == (3, True)
    await sweep(rig, rows=3)
    assert (await look_at_docs(rig)).documents == 3


async def test_a_walk_that_began_before_documents_were_counted_tells_nothing(rig: Rig) -> None:
    await quietly(rig, k1="a", k2="b", k3="c")
    await sweep(rig, rows=2)
    await rig.connection.execute("UPDATE sidecar.sweeps SET documents = NULL, wanting = NULL")
    assert (await sweep(rig, rows=2)).state == "finished"
    seen = await look_at_docs(rig)
    assert (seen.documents, seen.coverage, seen.sweep_age_seconds) == (None, None, None)


async def test_another_model_makes_the_last_count_worthless(rig: Rig) -> None:
    await quietly(rig, k1="a")
    await rig.settle(rig.settlement(1, "a"))
    await sweep(rig)
    assert (await look_at_docs(rig)).coverage == 1.0
    await rig.connection.execute(
        "SELECT sidecar.attach('docs', '{body}', p_model => 'other', p_dimensions => (SELECT dimensions FROM "
        "sidecar.pipelines WHERE name = 'docs'))"
    )
    assert (await look_at_docs(rig)).coverage is None


async def test_coverage_counts_what_is_queued_or_dead_and_forgets_what_is_embedded(rig: Rig) -> None:
    await quietly(rig, k1="a", k2="b", k3=" ", k4="d", k5="e")
    await rig.settle(rig.settlement(5, "e"))
    await rig.write(k4="edited")  # a message waits for it: wanting all the same
    assert (await sweep(rig)).enqueued == 2
    walked = await look_at_docs(rig)
    assert (walked.documents, walked.wanting, walked.walking, walked.coverage) == (4, 3, False, 0.25)
    assert walked.sweep_age_seconds is not None
    await rig.connection.execute("SELECT pgmq.purge_queue('docs_bulk'), pgmq.purge_queue('docs')")
    assert (await look_at_docs(rig)).coverage == 1.0


async def test_a_new_walk_keeps_the_figures_of_the_last_until_it_is_over(rig: Rig) -> None:
    await quietly(rig, k1="a", k2="b")
    await sweep(rig)
    await quietly(rig, k3="c", k4="d")
    await sweep(rig, rows=3)
    seen = await look_at_docs(rig)
    assert (seen.walking, seen.scanned, seen.documents) == (True, 3, 2)
    await sweep(rig, rows=3)
    assert (await look_at_docs(rig)).documents == 4


async def test_the_oldest_transaction_is_anybodys(rig: Rig) -> None:
    before = await look(rig)
    assert before.oldest_transaction_seconds == 0
    async with second_session(rig.url) as other, other.transaction(isolation="repeatable_read"):
        await other.execute("CREATE TABLE held (x integer)")
        for _ in range(3):
            await rig.connection.execute("SELECT pg_current_xact_id()")
        during = await look(rig)
    assert during.oldest_transaction_seconds is not None
    assert during.oldest_transaction_seconds > 0
    assert during.oldest_xmin_age is not None
    assert during.oldest_xmin_age >= 3
    assert (await look(rig)).oldest_transaction_seconds == 0


async def test_without_the_right_to_see_sessions_the_age_is_unknown_and_not_zero(rig: Rig) -> None:
    await rig.connection.execute("REVOKE pg_read_all_stats FROM sidecar_owner")
    try:
        seen = await look(rig)
    finally:
        await rig.connection.execute("GRANT pg_read_all_stats TO sidecar_owner")
    assert (seen.oldest_transaction_seconds, seen.oldest_xmin_age) == (None, None)
    assert [one.pipeline for one in seen.pipelines] == ["docs"]
