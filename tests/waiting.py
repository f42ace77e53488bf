"""Awaiting a state with a deadline, instead of sleeping for luck."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


_PAUSE = 0.02


@overload
async def eventually(check: Callable[[], Awaitable[T]], timeout: float = 30.0, what: str = "") -> T: ...  # noqa: ASYNC109  see below


@overload
async def eventually(check: Callable[[], T], timeout: float = 30.0, what: str = "") -> T: ...  # noqa: ASYNC109  see below


async def eventually(check: Callable[[], Any], timeout: float = 30.0, what: str = "") -> Any:  # noqa: ASYNC109  a deadline for polling, not for one await
    """Call ``check`` until what it returns is true; return that.

    Args:
        check: a function or coroutine function; an ``AssertionError`` in it counts as not yet.
        timeout: seconds.
        what: said when the deadline passes.

    Raises:
        AssertionError: the deadline passed; the message holds the last value.
    """
    deadline = time.monotonic() + timeout
    last: object = None
    while True:
        try:
            value = check()
            if inspect.isawaitable(value):
                value = await value
        except AssertionError as error:
            last = error
        else:
            if value:
                return value
            last = value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what or 'the awaited state'} did not come in {timeout} s; last value: {last!r}")
        await asyncio.sleep(_PAUSE)
