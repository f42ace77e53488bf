"""Every order of the steps of two workers and a writer on one document: R1, R2, R4, R6, R7, R8, R9, R17."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import SidecarError
from sidecar_daemon.domain.outcomes import Verdict
from tests.torture.bench import SOURCE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    import asyncpg

    from sidecar_daemon.domain.messages import Lease, Reading
    from tests.torture.scenes.ground import Ground, Session

_WAITS = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1"


def orders(steps: Mapping[str, int]) -> Iterator[str]:
    """Every merge of the actors' steps, ``{"A": 2, "W": 1}`` to ``AAW``, ``AWA``, ``WAA``."""
    if not any(steps.values()):
        yield ""
    for actor, left in steps.items():
        if left:
            for rest in orders({**steps, actor: left - 1}):
                yield actor + rest


@dataclass
class Actor:
    """One session's steps, run in order, each when the order says so."""

    name: str
    connection: asyncpg.Connection
    steps: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    turn: asyncio.Queue[Callable[[], Awaitable[None]] | None] = field(default_factory=asyncio.Queue)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Take steps until None. A refused step (a lock timeout, a document that is gone) ends its transaction."""
        while (step := await self.turn.get()) is not None:
            try:
                await step()
            except SidecarError:
                await self.connection.execute("ROLLBACK")
            finally:
                if self.turn.empty():
                    self.idle.set()

    async def advance(self, watcher: asyncpg.Connection) -> None:
        """Start the next step; return once it is over, or waits for a lock that another actor holds."""
        self.idle.clear()
        self.turn.put_nowait(self.steps.pop(0))
        while not self.idle.is_set():
            try:
                async with asyncio.timeout(0.01):
                    await self.idle.wait()
            except TimeoutError:
                if await watcher.fetchval(_WAITS, self.connection.get_server_pid()):
                    return


@dataclass
class Worker:
    """A worker of one document: leases, reads, settles in a transaction that it may end as it likes."""

    ground: Ground
    session: Session
    key: int
    clock: list[str]
    """Names of workers in the order of their leases: the last one holds the messages."""
    name: str
    leases: list[Lease] = field(default_factory=list)
    reading: Reading | None = None

    async def lease(self) -> None:
        """Lease for no time at all, so that the other may lease as well; then read."""
        self.leases = [lease for lease in await self.session.lease() if lease.key == str(self.key)]
        if self.leases:
            self.clock.append(self.name)
            (self.reading,) = await self.session.queue.read([lease.key for lease in self.leases if lease.key][:1])

    async def settle(self) -> None:
        """In an open transaction."""
        await self.session.connection.execute("BEGIN")
        reading = self.reading
        if reading is None:
            return
        before = list(self.clock)
        if reading.verdict is Verdict.EMBED and reading.content and reading.content_hash:
            settled = await self.session.settle(reading.key, reading.content, reading.content_hash, self.leases)
            count = settled.acknowledged
        elif reading.verdict is Verdict.CLAIMED:
            count = await self.session.queue.release(self.leases)
        else:
            count = await self.session.queue.acknowledge(self.leases)
        self._fenced(before, count, "acknowledged")

    async def dead_letter(self) -> None:
        """In an open transaction, as after a last attempt."""
        await self.session.connection.execute("BEGIN")
        if not self.leases:
            return
        before = list(self.clock)
        moved = await self.session.queue.dead_letter(self.leases, reason="scene", detail="", content_hash=None)
        self._fenced(before, moved, "dead-lettered")

    async def give_up(self) -> None:
        """Extend, defer and release, one after the other."""
        await self.session.connection.execute("BEGIN")
        before = list(self.clock)
        if self.leases:
            self._fenced(before, len(await self.session.queue.extend(self.leases, seconds=0)), "extended")
            self._fenced(
                before, await self.session.queue.defer(dict.fromkeys(self.leases, 0.0), code="scene"), "deferred"
            )
            self._fenced(before, await self.session.queue.release(self.leases), "released")

    async def commit(self) -> None:
        """End the transaction."""
        await self.session.connection.execute("COMMIT")

    async def roll_back(self) -> None:
        """Crash: the server ends the transaction for us."""
        await self.session.connection.execute("ROLLBACK")

    def _fenced(self, before: list[str], count: int, what: str) -> None:
        lost = before[-1:] != [self.name]
        if lost and count:
            self.ground.claim(
                False, f"document {self.key}: {self.name} {what} {count} messages that it had lost ({before})"
            )


async def _play(
    ground: Ground,
    order: str,
    key: int,
    a: Sequence[str],
    b: Sequence[str],
    *,
    writes: Callable[[asyncpg.Connection], Awaitable[None]],
) -> None:
    """Run one order to its end, then let a third worker finish."""
    clock: list[str] = []
    writer = ground.writer
    actors = {"W": Actor("W", writer)}

    async def begin_write() -> None:
        await writer.execute("BEGIN")
        await writes(writer)

    async def commit_write() -> None:
        await writer.execute("COMMIT")

    actors["W"].steps += [begin_write, commit_write]
    for name, steps, session in (("A", a, ground.sessions[0]), ("B", b, ground.sessions[1])):
        worker = Worker(ground, session, key, clock, name)
        actors[name] = Actor(name, session.connection, [getattr(worker, step) for step in steps])
    tasks = [asyncio.create_task(actor.run()) for actor in actors.values()]
    try:
        async with asyncio.timeout(20):
            for name in order:
                await actors[name].advance(ground.admin)
            for actor in actors.values():
                actor.turn.put_nowait(None)
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await ground.finish()


async def _all_orders(
    ground: Ground,
    a: Sequence[str],
    b: Sequence[str],
    statement: str,
    *,
    may_die: bool = False,
) -> None:
    """``statement`` is the writer's, with the document's key as ``$1``."""

    async def once(order: str) -> None:
        key = await ground.document(words=80)  # three windows; the edit makes it one (R17)
        if may_die:
            ground.maybe_dead.add(str(key))
        await _play(ground, order, key, a, b, writes=partial(_execute, statement=statement, values=(key,)))
        ground.report.facts["orders"] = ground.report.facts.get("orders", 0) + 1

    for number, order in enumerate(orders({"A": len(a), "B": len(b), "W": 2})):
        if number % ground.stride:
            continue
        if a != b or order.index("A") < order.index("B"):  # two of a kind: who is called A does not matter
            await once(order)


async def _execute(writer: asyncpg.Connection, *, statement: str, values: Sequence[object]) -> None:
    await writer.execute(statement, *values)


_EDIT = f"UPDATE {SOURCE} SET content = 'edited ' || id WHERE id = $1"
_SETTLES = ("lease", "settle", "commit")


async def edit(ground: Ground) -> None:
    """R1, R2, R7, R17: two workers settle while a writer shortens the document."""
    await _all_orders(ground, _SETTLES, _SETTLES, _EDIT)


async def there_and_back(ground: Ground) -> None:
    """R1: two workers settle an edit while a writer takes it back: the text that it returns to still has its vector."""
    for number, order in enumerate(orders({"A": 3, "B": 3, "W": 2})):
        if number % ground.stride or order.index("A") > order.index("B"):  # who is called A does not matter
            continue
        key = await ground.document(words=80)
        await ground.finish()
        before = await ground.writer.fetchval(f"SELECT content FROM {SOURCE} WHERE id = $1", key)
        await ground.writer.execute(_EDIT, key)
        back = partial(_execute, statement=f"UPDATE {SOURCE} SET content = $2 WHERE id = $1", values=(key, before))
        await _play(ground, order, key, _SETTLES, _SETTLES, writes=back)
        ground.report.facts["orders"] = ground.report.facts.get("orders", 0) + 1


async def delete(ground: Ground) -> None:
    """R4: ... while a writer deletes it."""
    await _all_orders(ground, _SETTLES, _SETTLES, f"DELETE FROM {SOURCE} WHERE id = $1")


async def crash(ground: Ground) -> None:
    """R8, R10: one of the two dies between write and commit."""
    await _all_orders(ground, ("lease", "settle", "roll_back"), _SETTLES, _EDIT)


async def dead_letter(ground: Ground) -> None:
    """R7, R9: one of the two gives the document up for dead while the other settles it."""
    await _all_orders(ground, ("lease", "dead_letter", "commit"), _SETTLES, _EDIT, may_die=True)


async def lost_lease(ground: Ground) -> None:
    """R6, R7: one of the two extends, defers and releases what the other may have leased since."""
    await _all_orders(ground, ("lease", "give_up", "commit"), _SETTLES, _EDIT)
