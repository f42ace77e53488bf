"""The application: edits, inserts and deletes, and a log of what was asked for and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import asyncpg

from tests.torture.bench import CANARY, SOURCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    from tests.torture.bench import Arena

_WORDS = ("tide", "harbour", "gull", "rope", "anchor", "salt", "keel", "fog", "lamp", "chart", "reef", "sail", "storm")
ANSWER_SECONDS = 15.0
LONGEST_WRITE = 2.0
"""Seconds that a write may take where nothing hurts the server or the writer: writers never wait for the model. As with
transactions, what this process itself came too late to its turns is allowed on top."""
LAST_TRIES = 100
LEAST_SHARE = 0.25
"""Of the operations aimed at: fewer that end well are no load, and prove nothing."""


class Ended(StrEnum):
    """How an operation ended, as far as the client knows."""

    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Operation:
    """One line of the client's log."""

    at: float
    """Seconds since the client was made."""
    kind: str
    version: int
    ended: Ended


class Client:
    """One writer. Its load is seeded; only the order of events is the world's."""

    def __init__(self, arena: Arena, *, rate: float, documents: int, mix: dict[str, float] | None = None) -> None:
        """Bind a database.

        Args:
            arena: whose source is written.
            rate: operations a second aimed at.
            documents: how many documents there are at first; inserts and deletes keep it near.
            mix: weights of ``edit``, ``insert``, ``delete``, ``many`` (one statement over several documents),
                ``blank`` (an edit to white space) and ``touch`` (an update that changes nothing).
        """
        self._arena = arena
        self._rate = rate
        self._random: Random = arena.rng("client")
        self._mix = mix or {"edit": 60, "insert": 12, "delete": 9, "many": 8, "blank": 4, "touch": 7}
        self._started = time.monotonic()
        self._connection: asyncpg.Connection | None = None
        self._version = 0
        self.documents = documents
        self.keys: list[int] = list(range(1, documents + 1))
        self._next = documents + 1
        self.log: dict[int, list[Operation]] = defaultdict(list)
        self.ended: Counter[Ended] = Counter()
        self.starved: Callable[[], float] | None = None
        """Seconds by which this process lately came too late to its turns (``Watch.late``); None: not timed."""
        self.complaints: list[str] = []
        """Writes that failed, may have failed, or waited, although nothing excused them."""
        self.slowest = 0.0
        """Seconds of the slowest write that nothing excuses."""
        self.wanted = 0.0
        """Operations aimed at so far."""
        self._hurts = 0
        self.shaken = False
        """No write has succeeded since the last hurt."""

    @contextmanager
    def excused(self) -> Iterator[None]:
        """The fault hurts the server or the writer itself: writes may fail and wait, until one succeeds afterwards."""
        self._hurts += 1
        self.shaken = True
        try:
            yield
        finally:
            self._hurts -= 1

    def take_over(self, other: Client) -> None:
        """Make what another writer did and complains of part of this one's account."""
        for key, operations in other.log.items():
            self.log[key] = sorted([*self.log[key], *operations], key=lambda operation: operation.at)
        self.ended += other.ended
        self.complaints += other.complaints
        self.slowest = max(self.slowest, other.slowest)
        self.wanted += other.wanted

    def text(self, key: int, version: int) -> str:
        """A text that no other version has, of one to four windows."""
        words = " ".join(self._random.choices(_WORDS, k=self._random.randint(3, 90)))
        return f"{CANARY} document {key} version {version} {words}"

    def distinguish(self, number: int) -> None:
        """Make this one of several writers on the same documents: its load and its versions are its own."""
        self._random = self._arena.rng(f"client {number}")
        self._version = (number + 1) * 1_000_000

    async def fill(self) -> None:
        """Insert the first documents in one statement."""
        await self._do("insert", {key: self.text(key, self._take()) for key in self.keys})

    async def run(self, stop: asyncio.Event) -> None:
        """Work until told to stop."""
        due = began = time.monotonic()
        while not stop.is_set():
            await self.once()
            self.wanted = (time.monotonic() - began) * self._rate
            due = max(due + 1 / self._rate, time.monotonic() - 1)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - time.monotonic())):
                    await stop.wait()
        for _ in range(LAST_TRIES):
            if self.shaken:  # what was hurt is mended by now: it must be seen to work
                await self.once()

    async def once(self) -> None:
        """One operation."""
        kind = self._random.choices(list(self._mix), weights=list(self._mix.values()))[0]
        if kind == "insert" and len(self.keys) < self.documents * 2:
            key, self._next = self._next, self._next + 1
            self.keys.append(key)
            await self._do("insert", {key: self.text(key, self._take())})
        elif kind == "delete" and len(self.keys) > self.documents // 2:
            key = self.keys.pop(self._random.randrange(len(self.keys)))
            await self._do("delete", {key: None})
        elif kind == "many":
            chosen = self._random.sample(self.keys, k=min(len(self.keys), self._random.randint(2, 12)))
            await self._do("edit", {key: self.text(key, self._take()) for key in chosen})
        elif kind == "touch":
            await self._do("touch", {self._random.choice(self.keys): None})
        else:
            key = self._random.choice(self.keys)
            await self._do("edit", {key: " " * 3 if kind == "blank" else self.text(key, self._take())})

    async def close(self) -> None:
        """Leave the database."""
        if self._connection is not None:
            with suppress(Exception):
                await self._connection.close(timeout=2)

    def history(self, key: int) -> list[str]:
        """What was asked for, one line an operation."""
        return [f"client {o.at:9.3f}s {o.kind} version {o.version}: {o.ended}" for o in self.log[key]]

    def _take(self) -> int:
        self._version += 1
        return self._version

    async def _do(self, kind: str, texts: dict[int, str | None]) -> None:
        keys = sorted(texts)
        statement = {
            "insert": f"INSERT INTO {SOURCE} SELECT * FROM unnest($1::bigint[], $2::text[])",
            "edit": f"UPDATE {SOURCE} SET content = n.content FROM unnest($1::bigint[], $2::text[]) AS n (id, content) "
            "WHERE documents.id = n.id",
            "delete": f"DELETE FROM {SOURCE} WHERE id = ANY ($1) AND $2::text[] IS NOT NULL",
            "touch": f"UPDATE {SOURCE} SET content = content WHERE id = ANY ($1) AND $2::text[] IS NOT NULL",
        }[kind]
        at, ended, told = time.monotonic() - self._started, Ended.FAILED, ""
        excused, began = self.shaken, time.monotonic()
        try:
            if self._connection is None or self._connection.is_closed():
                self._connection = await asyncpg.connect(
                    self._arena.admin_url, timeout=5, server_settings={"application_name": "torture_client"}
                )
            began = time.monotonic()
            ended = Ended.UNKNOWN  # from here on the statement may have been carried out, whatever we hear
            await self._connection.execute(statement, keys, [texts[key] for key in keys], timeout=ANSWER_SECONDS)
            took, ended = time.monotonic() - began, Ended.OK
        except asyncpg.PostgresError as error:
            took, told = time.monotonic() - began, repr(error)
            if error.sqlstate not in {"57P01", "57P02", "57P03"}:
                ended = Ended.FAILED
            await self._lost()
        except (OSError, asyncpg.InterfaceError, TimeoutError) as error:
            took, told = time.monotonic() - began, repr(error)
            await self._lost()
        self._judge(kind, ended, took, told, excused=excused or self.shaken)
        self.ended[ended] += 1
        for key in keys:
            self.log[key].append(Operation(at, kind, self._version, ended))

    def _judge(self, kind: str, ended: Ended, took: float, told: str, *, excused: bool) -> None:
        if ended is Ended.OK and not self._hurts:
            self.shaken = False
        if excused:
            return
        if ended is not Ended.OK:
            self.complaints.append(f"{kind} {ended} after {took:.1f} s: {told}")
        if self.starved is not None:
            self.slowest = max(self.slowest, took)
            if took > LONGEST_WRITE + self.starved():
                self.complaints.append(f"{kind} took {took:.1f} s; at most {LONGEST_WRITE} s are allowed")

    async def _lost(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
        await asyncio.sleep(0.1)  # a server that is down refuses at once
