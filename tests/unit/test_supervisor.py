"""The supervisor on a real catalog: who is staffed, who is dismissed, what ends the daemon."""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from sidecar_daemon import supervisor as module
from sidecar_daemon.domain.errors import Fatal, Refused, Transient
from sidecar_daemon.domain.messages import Lane, PipelineName
from sidecar_daemon.domain.pulse import Pulse
from sidecar_daemon.supervisor import Crew, Supervisor
from sidecar_daemon.sweeper import Sweeper, SweepLimits
from tests.rig import MODEL, NAME, PLAIN
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from sidecar_daemon.domain.messages import Observation, Pipeline
    from sidecar_daemon.domain.pulse import Beat
    from tests.unit.conftest import Bench


@dataclass
class Office:
    """A supervisor over a bench, which hires real crews."""

    bench: Bench
    only: Collection[str] = ()
    refuse: Exception | None = None
    """Raised instead of hiring."""
    limits: dict[str, float] = field(default_factory=dict)
    hired: list[PipelineName] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    supervisor: Supervisor = field(init=False)
    pulse: Pulse = field(default_factory=lambda: Pulse(time.monotonic))

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(
            self.bench.rig.catalog,
            hire=self.hire,
            only=self.only,
            telemetry=self.bench.told.telemetry,
            patience=self.bench.told.patience(),
            pulse=self.pulse,
        )

    async def hire(self, pipeline: Pipeline, beat: Beat) -> Crew:
        """Wire a crew as the composition root does."""
        del beat  # no model to load
        if self.refuse is not None:
            raise self.refuse
        model_id = PLAIN.model_id(pipeline.long_documents)
        await self.bench.rig.catalog.register_model(pipeline, model_id)
        self.hired.append(pipeline.name)
        told = self.bench.told
        sweeper = Sweeper(
            pipeline.name,
            queue=self.bench.queue,
            limits=SweepLimits(interval=3600, rows=100, duty=0.5),
            telemetry=told.telemetry,
            patience=told.patience(pipeline.name),
            uniform=lambda low, high: (low + high) / 2,
            pulse=self.pulse,
        )
        return Crew(model_id=model_id, worker=self.bench.worker_of(pipeline, **self.limits), sweeper=sweeper)

    def notify(self, kind: str) -> None:
        """What the listener would tell."""
        self.supervisor.notified(f"{kind}:docs")

    def stopped(self, reason: str) -> bool:
        """Whether a crew was dismissed for a reason."""
        return reason in [line["reason"] for line in self.bench.told.events("pipeline_stopped")]

    async def started(self, count: int = 1) -> None:
        """Wait for the crew to be at work."""
        await eventually(lambda: len(self.bench.told.events("pipeline_started")) == count, what="a crew")


@asynccontextmanager
async def at_work(office: Office) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(office.supervisor.run(office.stop))
    try:
        yield task
    finally:
        office.stop.set()
        await task


async def execute(bench: Bench, statement: str) -> None:
    await bench.rig.connection.execute(statement)


async def test_it_staffs_what_is_there_and_drains_at_the_end(bench: Bench) -> None:
    office = Office(bench)
    assert office.supervisor.not_ready() == ["starting"]
    await bench.rig.write(k1="text")
    async with at_work(office):
        await office.started()
        await eventually(bench.settled)
        await eventually(lambda: office.supervisor.not_ready() == [])
        await eventually(
            lambda: (
                bench.told.registry.get_sample_value("sidecar_queue_depth", {"pipeline": NAME, "lane": "live"})
                is not None
            )
        )
    assert office.supervisor.not_ready() == ["draining"]
    assert office.stopped("draining")
    await bench.rig.assert_true()


async def test_a_notification_wakes_whom_it_names(bench: Bench) -> None:
    office = Office(bench, limits={"poll_min": 600.0, "poll_max": 600.0})
    async with at_work(office):
        await office.started()
        await eventually(lambda: bench.queue.count("lease") == 2 and bench.queue.count("sweep") == 1)
        for kind, name, argument in (("live", "lease", Lane.LIVE), ("bulk", "lease", Lane.BULK)):
            bench.queue.calls.clear()
            office.notify(kind)
            await eventually(functools.partial(called, bench, name, argument))
        bench.queue.calls.clear()
        office.notify("sweep")
        await eventually(lambda: bench.queue.count("sweep") == 1)
        assert bench.queue.count("lease") == 0
        office.supervisor.look_everywhere()
        await eventually(lambda: bench.queue.count("sweep") == 2 and bench.queue.count("lease") == 2)


def called(bench: Bench, name: str, argument: object) -> bool:
    return (name, argument) in bench.queue.calls


async def test_a_pause_dismisses_and_a_resume_hires_again(bench: Bench) -> None:
    office = Office(bench)
    async with at_work(office):
        await office.started()
        await execute(bench, "SELECT sidecar.set_enabled('docs', false)")
        office.notify("catalog")
        await eventually(lambda: bench.told.events("pipeline_stopped"))
        assert office.supervisor.not_ready() == []
        await bench.rig.write(k1="text")
        await execute(bench, "SELECT sidecar.set_enabled('docs', true)")
        office.notify("catalog")
        await office.started(2)
        await eventually(bench.settled)


async def test_a_pause_that_the_crew_meets_first_is_quiet(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal comes from the lease, the notification was lost; the next look finds it paused."""
    monkeypatch.setattr(module, "RECONCILE_SECONDS", 0.05)
    office = Office(bench)
    async with at_work(office) as task:
        await office.started()
        await execute(bench, "SELECT sidecar.set_enabled('docs', false)")
        await eventually(lambda: bench.told.events("pipeline_stopped"))
        await execute(bench, "SELECT sidecar.set_enabled('docs', true)")
        await office.started(2)
        assert not task.done()


@pytest.mark.parametrize("keep", ["false", "true"])
async def test_a_detached_pipeline_is_left(bench: Bench, keep: str) -> None:
    office = Office(bench)
    async with at_work(office) as task:
        await office.started()
        bench.told.telemetry.circuit(NAME, "closed")
        assert {"sidecar_up", "sidecar_circuit_state"} <= series_of(bench, NAME)
        await execute(bench, f"SELECT sidecar.detach('docs', {keep})")
        office.notify("catalog")
        await eventually(lambda: bench.told.events("pipeline_stopped"))
        await eventually(lambda: not {"sidecar_up", "sidecar_circuit_state"} & series_of(bench, NAME))
        assert not task.done()


def series_of(bench: Bench, pipeline: str) -> set[str]:
    """Names of the metrics that speak of a pipeline."""
    samples = (sample for family in bench.told.registry.collect() for sample in family.samples)
    return {
        sample.name for sample in samples if pipeline in {sample.labels.get("pipeline"), sample.labels.get("scope")}
    }


async def test_a_change_replaces_the_crew(bench: Bench) -> None:
    office = Office(bench, limits={"poll_min": 600.0, "poll_max": 600.0})
    async with at_work(office):
        await office.started()
        await eventually(lambda: bench.queue.count("lease") == 2 and bench.queue.count("sweep") == 1)
        await eventually(lambda: bench.queue.under_way == 0)  # else the crew may meet the change before the supervisor
        await execute(bench, "ALTER TABLE docs ADD title text")
        await execute(
            bench,
            "SELECT sidecar.attach('docs', ARRAY['body'], p_model => 'deterministic', p_dimensions => 16, "
            "p_long_documents => 'chunks')",
        )
        office.notify("catalog")
        await office.started(2)
        assert office.stopped("changed")
    assert office.hired == [NAME, NAME]


async def test_a_registered_model_id_replaces_nobody(bench: Bench) -> None:
    await execute(bench, "UPDATE sidecar.pipelines SET model_id = NULL")
    office = Office(bench)
    async with at_work(office):
        await office.started()
        assert (await bench.rig.pipeline()).model_id == MODEL
        calls = len(bench.queue.calls)
        office.notify("catalog")
        await eventually(lambda: len(bench.queue.calls) > calls + 4)
    assert office.hired == [NAME]


async def test_a_missing_model_at_the_start_is_refused_and_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECONCILE_SECONDS", 0.05)
    office = Office(bench, refuse=Fatal("model_missing", "run models pull"))
    async with at_work(office) as task:
        await eventually(lambda: office.supervisor.not_ready() == ["docs: run models pull"])
        (staffed,) = office.supervisor.staffed()
        assert (staffed.state, staffed.reason) == ("refused", "run models pull")
        assert not task.done()
        office.refuse = None
        await office.started()
        await eventually(lambda: office.supervisor.not_ready() == [])
    assert len(bench.told.events("pipeline_refused")) == 1


async def test_a_missing_model_later_is_said_and_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECONCILE_SECONDS", 0.05)
    await execute(bench, "SELECT sidecar.set_enabled('docs', false)")
    office = Office(bench, refuse=Fatal("model_missing", "run models pull"))
    async with at_work(office):
        await eventually(lambda: office.supervisor.not_ready() == [])
        await execute(bench, "SELECT sidecar.set_enabled('docs', true)")
        await eventually(lambda: office.supervisor.not_ready() == ["docs: run models pull"])
        office.refuse = None
        await office.started()
        await eventually(lambda: office.supervisor.not_ready() == [])
    assert len(bench.told.events("pipeline_refused")) == 1


async def test_another_model_is_refused_but_not_fatal(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """R16: this replica waits until it is the right one."""
    monkeypatch.setattr(module, "RECONCILE_SECONDS", 0.05)
    await execute(bench, "UPDATE sidecar.pipelines SET model_id = 'other@2'")
    office = Office(bench)
    async with at_work(office):
        await eventually(lambda: any("needs model other@2" in reason for reason in office.supervisor.not_ready()))
        assert bench.queue.count("lease") == 0
        await bench.rig.connection.execute("UPDATE sidecar.pipelines SET model_id = $1", MODEL)
        await office.started()


async def test_a_refusal_is_forgotten_with_its_pipeline(bench: Bench) -> None:
    office = Office(bench, refuse=Refused("model_mismatch", "planted"))
    async with at_work(office):
        await eventually(lambda: office.supervisor.not_ready() == ["docs: planted"])
        assert "sidecar_up" in series_of(bench, NAME)
        await execute(bench, "SELECT sidecar.detach('docs')")
        office.notify("catalog")
        await eventually(lambda: office.supervisor.not_ready() == [])
        await eventually(lambda: "sidecar_up" not in series_of(bench, NAME))


async def test_only_the_named_pipelines_are_staffed(bench: Bench) -> None:
    office = Office(bench, only=["absent"])
    async with at_work(office):
        await eventually(lambda: office.supervisor.not_ready() == ["absent: no such pipeline; known: docs"])
    assert office.hired == []


async def test_without_any_pipeline_it_says_none(bench: Bench) -> None:
    await execute(bench, "SELECT sidecar.detach('docs')")
    office = Office(bench, only=["absent"])
    async with at_work(office):
        await eventually(lambda: office.supervisor.not_ready() == ["absent: no such pipeline; known: none"])


class Bug(Exception):  # noqa: N818  it is one
    """What nobody named."""


@pytest.mark.parametrize("place", ["lease", "sweep", "model"])
async def test_a_bug_in_a_crew_ends_it(bench: Bench, place: str) -> None:
    if place == "model":
        bench.embedder.poison("text", Bug("planted"))
        await bench.rig.write(k1="text")
    else:
        bench.queue.fail(place, Bug("planted"))
    office = Office(bench)
    with pytest.raises(Bug, match="planted"):
        await asyncio.wait_for(office.supervisor.run(office.stop), 30)


async def test_an_outage_of_the_catalog_is_a_reason_and_no_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECONCILE_SECONDS", 0.05)
    monkeypatch.setattr(module, "OBSERVE_SECONDS", 0.05)
    office = Office(bench)
    away = Transient("connection_lost", "the database is away")
    real = office.supervisor._catalog.pipelines

    class Away(type(office.supervisor._catalog)):  # type: ignore[misc]  # the real catalog with a switch
        broken = True

        async def pipelines(self) -> list[Pipeline]:
            if self.broken:
                raise away
            return await real()

        async def observe(self) -> Observation:
            raise away

    catalog = Away(bench.rig.database)
    office.supervisor._catalog = catalog
    async with at_work(office):
        await eventually(lambda: office.supervisor.not_ready() == ["the database is away"])
        catalog.broken = False
        await office.started()
        await eventually(lambda: office.supervisor.not_ready() == [])
        bench.queue.cut(away, "lease")
        await eventually(lambda: office.supervisor.not_ready() == ["docs: the database is away"])
        bench.queue.mend()
        await eventually(lambda: office.supervisor.not_ready() == [])


async def test_gauges_that_cannot_be_taken_are_told_once_and_again_when_they_can(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OBSERVE_SECONDS", 0.02)
    office = Office(bench)
    looks: list[None] = []

    class Blind(type(office.supervisor._catalog)):  # type: ignore[misc]  # the real catalog with a switch
        failures = 1

        async def observe(self) -> Observation:
            looks.append(None)
            if len(looks) <= self.failures:
                raise Transient("permission_denied", "permission denied for function observe")
            return await super().observe()  # type: ignore[no-any-return]  # a class that is made here

    office.supervisor._catalog = catalog = Blind(bench.rig.database)
    async with at_work(office):
        await eventually(lambda: len(looks) > 3)
        assert bench.told.events("fault") == bench.told.events("recovered") == []
        catalog.failures = len(looks) + 5
        await eventually(lambda: bench.told.events("recovered"))
        assert office.supervisor.not_ready() == []
    (fault,), (recovered,) = bench.told.events("fault"), bench.told.events("recovered")
    assert (fault["scope"], fault["code"]) == ("observation", "permission_denied")
    assert (recovered["scope"], recovered["failed_tries"]) == ("observation", 4)


async def test_a_stop_during_a_dismissal_lets_the_crew_drain(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchers are cancelled; the crew that they were dismissing must still settle or release what it holds."""
    bench.embedder.gate.clear()
    await bench.rig.write(k1="in the model")
    office = Office(bench, limits={"poll_min": 600.0, "poll_max": 600.0})
    async with at_work(office) as task:
        await eventually(lambda: bench.embedder.entered.acquire(blocking=False))
        await eventually(lambda: bench.queue.count("sweep") == 1 and bench.queue.under_way == 0)
        stops: list[None] = []
        (post,) = office.supervisor._posts.values()
        stop = post.crew.worker.stop

        def counted() -> None:
            stops.append(None)
            stop()

        monkeypatch.setattr(post.crew.worker, "stop", counted)
        await execute(bench, "SELECT sidecar.set_enabled('docs', false)")
        office.notify("sweep")
        await eventually(lambda: len(stops) == 2, what="the sweeper's refusal to end the crew")
        office.notify("catalog")
        await eventually(lambda: len(stops) == 3, what="the dismissal")
        office.stop.set()
        await eventually(lambda: office.supervisor.not_ready() == ["draining"])
        assert not task.done()
        bench.embedder.gate.set()
    assert sorted(await bench.rig.embedded()) == [1]
    assert await bench.rig.depth() == 0
