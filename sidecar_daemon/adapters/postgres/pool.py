"""One database: a pool of connections, one statement a call, retried for seconds while the world is to blame."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
from pgvector.asyncpg import register_vector
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from sidecar_daemon.adapters.postgres.errors import STALE_CONNECTIONS, translated
from sidecar_daemon.domain.errors import Fatal, Refused, SidecarError, Transient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tenacity import RetryCallState

    RetryHook = Callable[[Transient, int, float], None]
    """Told before each wait: the error, the number of the failed attempt, the seconds until the next one."""

_VECTOR_SCHEMA = """
SELECT n.nspname FROM pg_catalog.pg_extension e
JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'
"""

_ISOLATION: Final = "read_committed"
"""Whatever the role or the database defaults to: a function that waits for a lock must see what came meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long and how much. All times in seconds."""

    max_size: int = 8
    """Connections at most; they are opened when needed and closed when idle for minutes."""
    statement: float = 30.0
    """The server cancels a statement after this."""
    lock: float = 5.0
    """The server gives up waiting for a lock after this."""
    idle_in_transaction: float = 10.0
    connect: float = 5.0
    retry: float = 5.0
    """A call is retried until this has passed since its first attempt."""


def place_of(dsn: str) -> str:
    """Describe where a connection URL leads, as ``user@host:port/database``, without the password.

    Raises:
        Fatal: it is not a PostgreSQL URL.
    """
    try:
        url = urlsplit(dsn)
    except ValueError:
        url = urlsplit("")
    ports = [host.rpartition("]")[2].partition(":")[2] for host in url.netloc.rpartition("@")[2].split(",")]
    if url.scheme not in {"postgres", "postgresql"} or not all(port.isdigit() for port in ports if port):
        raise Fatal("bad_database_url", "the database URL must look like postgresql://user:password@host:5432/database")
    login, _, hosts = url.netloc.rpartition("@")
    query = parse_qs(url.query)
    user = unquote(login.partition(":")[0]) or query.get("user", [""])[0]
    host = unquote(hosts) or query.get("host", [""])[0] or "localhost"
    database = unquote(url.path.lstrip("/")) or query.get("dbname", query.get("database", [""]))[0]
    return f"{user}@{host}/{database}" if user else f"{host}/{database}"


class Database:
    """A database that may be down: nothing is connected before the first call, and every call may heal it."""

    def __init__(
        self,
        dsn: str,
        *,
        pooler_mode: bool = False,
        application_name: str = "sidecar_daemon",
        limits: Limits | None = None,
        on_retry: RetryHook | None = None,
    ) -> None:
        """Connect nothing; ``open`` does the rest.

        Args:
            dsn: ``postgresql://`` URL.
            pooler_mode: a pooler in transaction mode stands in between: keep no state in the session.
            application_name: shown in ``pg_stat_activity``.
            limits: times and sizes.
            on_retry: told before each wait between two tries of a call.

        Raises:
            Fatal: the URL is not a PostgreSQL URL.
        """
        self.place = place_of(dsn)
        self.limits = limits or Limits()
        self._dsn = dsn
        self._pooler_mode = pooler_mode
        self._application_name = application_name
        self._on_retry = on_retry
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._without_vector = False

    @classmethod
    async def open(
        cls,
        dsn: str,
        *,
        pooler_mode: bool = False,
        application_name: str = "sidecar_daemon",
        limits: Limits | None = None,
        on_retry: RetryHook | None = None,
    ) -> Self:
        """Make a database ready for calls. Succeeds while the server is down.

        Raises:
            Fatal: the URL is not one that the driver understands.
        """
        database = cls(
            dsn, pooler_mode=pooler_mode, application_name=application_name, limits=limits, on_retry=on_retry
        )
        with translated(database.place):
            database._pool = await asyncpg.create_pool(dsn, **database._pool_options())
        return database

    async def close(self) -> None:
        """Close every connection, kindly for a second and then at once."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        try:
            with translated(self.place):
                async with asyncio.timeout(1.0):
                    await pool.close()
        except Transient:
            pool.terminate()

    async def check(self) -> None:
        """Ask the server one question, without retry.

        Raises:
            SidecarError: one clear line that says why the database cannot be used.
        """
        await self.call("SELECT 1", retry=False)

    async def call(self, function_sql: str, *args: object, retry: bool = True) -> list[asyncpg.Record]:
        """Run one statement in a transaction of its own.

        Args:
            function_sql: a call of a ``sidecar.*`` function with ``$n`` for arguments.
            args: the arguments, in order.
            retry: try again for ``limits.retry`` seconds while the world is to blame. The statement must bear
                being run twice: a commit whose answer was lost is repeated.

        Raises:
            Transient: the world's fault, still there after the last try.
            Poison: the arguments' fault.
            Fatal: ours.
        """
        if not retry:
            return await self._call_once(function_sql, args)
        tries = AsyncRetrying(
            retry=retry_if_exception(_worth_retrying),
            wait=wait_random_exponential(multiplier=0.05, max=2.0),
            stop=stop_after_delay(self.limits.retry),
            before_sleep=self._before_sleep,
            reraise=True,
        )
        return await tries(self._call_once, function_sql, args)

    async def fetch_value(self, function_sql: str, *args: object, retry: bool = True) -> Any:
        """Run one statement as ``call`` does; return the first column of its first row, None without a row."""
        rows = await self.call(function_sql, *args, retry=retry)
        return rows[0][0] if rows else None

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[asyncpg.Connection]:
        """Lend a connection inside one transaction: committed at the end, rolled back on an error.

        Raises:
            SidecarError: for any error of the driver in the block.
        """
        async with self._connection() as connection, connection.transaction(isolation=_ISOLATION):
            yield connection

    async def expire(self) -> None:
        """Replace every connection before its next use."""
        if self._pool is not None:
            await self._pool.expire_connections()

    async def _call_once(self, function_sql: str, args: tuple[object, ...]) -> list[asyncpg.Record]:
        async with self._connection() as connection:
            if not self._pooler_mode:
                return await connection.fetch(function_sql, *args)
            # Without a named statement the driver parses and runs in two steps; a transaction pooler may send
            # the two to two servers, unless a transaction holds them together.
            async with connection.transaction(isolation=_ISOLATION):
                return await connection.fetch(function_sql, *args)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        if self._pool is None:
            raise Fatal("driver_misuse", "the database is not open")
        if self._without_vector:
            self._without_vector = False
            await self._pool.expire_connections()
        pool = self._pool
        try:
            with translated(self.place):
                async with pool.acquire(timeout=self.limits.connect + self.limits.statement) as connection:
                    yield connection  # type: ignore[misc]  # the stubs tell the pool's proxy apart from the connection
        except SidecarError as error:
            if error.code in STALE_CONNECTIONS:
                await pool.expire_connections()
            raise

    def _before_sleep(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if self._on_retry is not None and isinstance(error, Transient):
            self._on_retry(error, state.attempt_number, state.upcoming_sleep)

    def _pool_options(self) -> dict[str, Any]:
        limits = self.limits
        options: dict[str, Any] = {
            "min_size": 0,
            "max_size": limits.max_size,
            "timeout": limits.connect,
            "command_timeout": limits.statement + limits.connect,
            "init": self._prepare_connection,
            "server_settings": {"application_name": self._application_name},
            # No session state is ever set after the start, so nothing has to be reset: one round trip less.
            "reset": _nothing_to_reset,
        }
        if self._pooler_mode:
            options["statement_cache_size"] = 0
        else:
            options["server_settings"] |= {
                "statement_timeout": _milliseconds(limits.statement),
                "lock_timeout": _milliseconds(limits.lock),
                "idle_in_transaction_session_timeout": _milliseconds(limits.idle_in_transaction),
                "jit": "off",
                "default_transaction_isolation": _ISOLATION.replace("_", " "),
            }
        return options

    async def _prepare_connection(self, connection: asyncpg.Connection) -> None:
        async with connection.transaction(readonly=True):
            schema = await connection.fetchval(_VECTOR_SCHEMA)
            if schema is None:
                self._without_vector = True
            else:
                await register_vector(connection, schema=schema)


def _worth_retrying(error: BaseException) -> bool:
    return isinstance(error, Transient) and not isinstance(error, Refused)


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


async def _nothing_to_reset(_: asyncpg.Connection) -> None:
    """Stand in for the driver's reset of a session."""
