"""Settings: read once from the environment, checked, frozen. The only package that reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.log_lines import LogFormat
from sidecar_daemon.settings.cores import usable_cores
from sidecar_daemon.settings.environment import PREFIX, Environment, LogEnvironment, complaint
from sidecar_daemon.settings.groups import (
    DatabaseSettings,
    HttpSettings,
    LogSettings,
    ModelSettings,
    Pooler,
    Runtime,
    ServiceSettings,
    SweepSettings,
    WorkerSettings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DatabaseSettings",
    "HttpSettings",
    "LogSettings",
    "ModelSettings",
    "Pooler",
    "Runtime",
    "ServiceSettings",
    "Settings",
    "SweepSettings",
    "WorkerSettings",
    "child_environment",
    "installed_folder",
    "usable_cores",
    "wanted_log_format",
]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set."""

    database: DatabaseSettings
    model: ModelSettings
    worker: WorkerSettings
    sweep: SweepSettings
    http: HttpSettings
    log: LogSettings
    service: ServiceSettings
    pipelines: tuple[str, ...]
    """The pipelines to work on; empty: all."""

    @classmethod
    def read(cls, **overrides: str) -> Settings:
        """Read the environment, ``.env``, secret files and credentials.

        Args:
            overrides: settings by their lower-case name without prefix, such as ``database_url``.

        Raises:
            Fatal: ``bad_setting``, one line that names the setting, its value unless secret, and what is allowed.
        """
        try:
            found = Environment(**overrides)  # type: ignore[arg-type]  # pydantic parses and checks the text
        except ValidationError as error:
            raise Fatal("bad_setting", complaint(error)) from None
        except OSError as error:
            raise Fatal("bad_setting", f".env cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise Fatal("bad_setting", ".env cannot be read: must be UTF-8 text") from None
        _check_order("POLL_MIN", found.poll_min, "POLL_MAX", found.poll_max)
        _check_order("BACKOFF_BASE", found.backoff_base, "BACKOFF_CAP", found.backoff_cap)
        return _grouped(found)


def wanted_log_format() -> LogFormat:
    """How log lines shall look, also where another setting is wrong; ``auto`` where this one is."""
    try:
        return LogEnvironment().log_format
    except (ValidationError, OSError, UnicodeDecodeError):
        return LogFormat.AUTO


def child_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a daemon that we start: ours, with these settings.

    Args:
        settings: by their upper-case name without prefix, such as ``DATABASE_URL``.
    """
    return {**os.environ, **{f"{PREFIX.upper()}{name}": value for name, value in settings.items()}}


def installed_folder(name: Literal["sql", "models"]) -> Path:
    """The folder of SQL or of model manifests: inside an installed wheel, else at the top of the checkout.

    Raises:
        Fatal: ``incomplete_installation``.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise Fatal("incomplete_installation", f"the folder {name!r} is missing from {package}: install the package again")


def _grouped(found: Environment) -> Settings:
    """The frozen groups that the rest of the daemon sees."""
    return Settings(
        database=DatabaseSettings(found.database_url, found.listen_url, found.pooler),
        model=ModelSettings(found.models_folder(), found.runtime, found.threads, named=found.models_dir is not None),
        worker=WorkerSettings(
            batch_tokens=found.batch_tokens,
            batch_windows=found.batch_windows,
            lease_seconds=found.lease_seconds,
            lease_messages=found.lease_messages,
            max_attempts=found.max_attempts,
            backoff_base=found.backoff_base,
            backoff_cap=found.backoff_cap,
            poll_min=found.poll_min,
            poll_max=found.poll_max,
            max_document_bytes=found.max_document_bytes,
            drain_seconds=found.drain_seconds,
        ),
        sweep=SweepSettings(found.sweep_interval, found.sweep_rows),
        http=HttpSettings(found.http_host, found.http_port),
        log=LogSettings(found.log_format, found.log_level),
        service=ServiceSettings(found.notify_socket, found.watchdog_seconds()),
        pipelines=found.pipelines,
    )


def _check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    if low > high:
        raise Fatal("bad_setting", f"SIDECAR_{low_name} is {low:g}: must be <= SIDECAR_{high_name}, which is {high:g}")
