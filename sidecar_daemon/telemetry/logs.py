"""Log lines: one pipeline for ours and the libraries', to one stream, without passwords or quoted documents."""

from __future__ import annotations

import logging
import sys
import traceback
from enum import StrEnum
from typing import TYPE_CHECKING, TextIO

import structlog

from sidecar_daemon.domain import log_lines
from sidecar_daemon.domain.errors import SidecarError
from sidecar_daemon.domain.log_lines import LogFormat

if TYPE_CHECKING:
    from types import TracebackType

    from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger


class _Handler(logging.StreamHandler[TextIO]):
    """Our handler on the root logger, known by its type so that configuring twice replaces it."""


def configure_logging(log_format: LogFormat, level: str, stream: TextIO) -> FilteringBoundLogger:
    """Send our log lines and those of every library through one pipeline to one stream.

    Args:
        log_format: JSON lines, console, or whichever suits the stream.
        level: ``debug``, ``info``, ``warning``, ``error`` or ``critical``; the libraries' lines start at ``warning``
            unless it is ``debug``.
        stream: where the lines go, usually stderr.

    Returns:
        The daemon's logger.
    """
    console = log_format is LogFormat.CONSOLE or (log_format is LogFormat.AUTO and stream.isatty())
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _render_exception,
    ]
    handler = _Handler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_name_library, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _redact_event,
                _renderer(console=console, colors=stream.isatty()),
            ],
            use_get_message=True,
        )
    )
    root = logging.getLogger()
    for old in [known for known in root.handlers if isinstance(known, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    number = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(number if number <= logging.DEBUG else max(number, logging.WARNING))
    ours = logging.getLogger("sidecar_daemon")
    ours.setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "asyncpg", "huggingface_hub"):  # some bring a handler of their own
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    logger: FilteringBoundLogger = structlog.get_logger("sidecar_daemon")
    return logger


def _renderer(*, console: bool, colors: bool) -> Processor:
    if console:
        return structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
    return structlog.processors.JSONRenderer(sort_keys=False, ensure_ascii=True)


def _name_library(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A library's line keeps its words in ``message``, and the library's name.

    Beside an exception only the first line stays: asyncio's next one quotes the exception's arguments.
    """
    record: logging.LogRecord = event["_record"]
    words = str(event["event"])
    message = words.partition("\n")[0] if record.exc_info else words
    return {**event, "event": "library", "library": record.name, "message": message}


def _redact_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Redact every value, and put what an eye looks for first at the front."""
    front = {key: event[key] for key in ("timestamp", "level", "event") if key in event}
    return {key: _redact_value(value) for key, value in {**front, **event}.items()}


def _redact_value(value: object) -> object:
    match value:
        case StrEnum():
            return value.value
        case str():
            return log_lines.redact(value)
        case dict():
            return {key: _redact_value(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_redact_value(item) for item in value]
        case None | bool() | int() | float():
            return value
        case _:
            return log_lines.redact(str(value))


def _render_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Turn ``exc_info`` into ``exception``: frames and types, without what a driver's message may quote."""
    found: BaseException | tuple[type, BaseException, TracebackType] | bool | None = event.pop("exc_info", None)
    if found is True:
        found = sys.exc_info()[1]
    elif isinstance(found, tuple):
        found = found[1]
    if isinstance(found, BaseException):
        event["exception"] = "\n".join(_describe(found))
    return event


def _describe(error: BaseException) -> list[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = _describe(cause) if cause else []
    lines += [f'File "{f.filename}", line {f.lineno}, in {f.name}' for f in traceback.extract_tb(error.__traceback__)]
    return [*lines, safe_message(error)]


def safe_message(error: BaseException) -> str:
    """One line about an error that is safe to log.

    A message of our own is safe by contract, one of Python's is kept short, and one of a driver or a library may
    quote a document: only its type and SQLSTATE are told.
    """
    kind = type(error)
    if isinstance(error, SidecarError):
        return f"{kind.__name__}[{error.code}]: {log_lines.redact(str(error))}"
    if kind.__module__ == "builtins":
        return f"{kind.__name__}: {log_lines.redact(str(error))[:200]}"
    sqlstate = getattr(error, "sqlstate", None)
    return f"{kind.__module__}.{kind.__name__}" + (f" (SQLSTATE {sqlstate})" if sqlstate else "")
