"""What the supervisor says of each pipeline: who works, who waits, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar_daemon import supervisor as module
from sidecar_daemon.domain.errors import Refused, Transient
from tests.rig import NAME
from tests.unit.test_supervisor import Office, at_work, execute
from tests.waiting import eventually

if TYPE_CHECKING:
    import pytest

    from tests.unit.conftest import Bench


def seen(office: Office) -> list[tuple[str, str, str | None]]:
    """Name, state and reason of each pipeline."""
    return [(each.pipeline.name, each.state, each.reason) for each in office.supervisor.staffed()]


async def test_a_pipeline_works_is_paused_and_resumed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECONCILE_SECONDS", 0.05)
    office = Office(bench)
    assert seen(office) == [], "nothing is known yet"
    async with at_work(office):
        await eventually(lambda: seen(office) == [(NAME, "working", None)])
        await execute(bench, "SELECT sidecar.set_enabled('docs', false)")
        await eventually(lambda: seen(office) == [(NAME, "paused", None)])
        await execute(bench, "SELECT sidecar.set_enabled('docs', true)")
        await eventually(lambda: seen(office) == [(NAME, "working", None)])
        await execute(bench, "SELECT sidecar.detach('docs')")
        await eventually(lambda: seen(office) == [])


async def test_an_outage_is_waited_for_and_named(bench: Bench) -> None:
    office = Office(bench)
    async with at_work(office):
        await eventually(lambda: seen(office) == [(NAME, "working", None)])
        bench.queue.cut(Transient("connection_lost", "the database is away"), "lease")
        await eventually(lambda: seen(office) == [(NAME, "waiting", "the database is away")])
        bench.queue.mend()
        await eventually(lambda: seen(office) == [(NAME, "working", None)])


async def test_a_refusal_says_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECONCILE_SECONDS", 0.05)
    office = Office(bench, refuse=Refused("wrong_model", "this replica has another model"))
    async with at_work(office):
        await eventually(lambda: seen(office) == [(NAME, "refused", "this replica has another model")])
        await execute(bench, "SELECT sidecar.set_enabled('docs', false)")
        await eventually(lambda: seen(office) == [(NAME, "paused", None)])


async def test_a_pipeline_that_is_left_to_others_is_not_ours_to_show(bench: Bench) -> None:
    office = Office(bench, only=("titles",))
    async with at_work(office):
        await eventually(lambda: bool(office.supervisor._known))
        assert seen(office) == []


async def test_a_drain_is_waited_for(bench: Bench) -> None:
    bench.embedder.gate.clear()
    await bench.rig.write(k1="in the model")
    office = Office(bench)
    async with at_work(office):
        await eventually(lambda: bench.embedder.entered.acquire(blocking=False))
        office.stop.set()
        await eventually(lambda: seen(office) == [(NAME, "waiting", "draining")])
        bench.embedder.gate.set()
