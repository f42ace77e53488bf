"""What can be set, in frozen groups: each room of the daemon is handed its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from sidecar_daemon.domain.errors import Fatal

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import SecretStr

    from sidecar_daemon.domain.log_lines import LogFormat


class Pooler(StrEnum):
    """What stands between us and Postgres: nothing (or a session pooler), or a pooler in transaction mode."""

    SESSION = "session"
    TRANSACTION = "transaction"


class Runtime(StrEnum):
    """What runs the model."""

    AUTO = "auto"
    """OpenVINO where it is installed and the processor multiplies bf16, else onnxruntime."""
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    """Needs the extra of this name."""


@dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """How to reach Postgres."""

    url: SecretStr | None
    """A ``postgresql://`` URL; None when it is not set."""
    listen_url: SecretStr | None
    """A direct URL for LISTEN; None: ``url`` unless the pooler is in transaction mode, where polling does."""
    pooler: Pooler

    def require_url(self) -> str:
        """The URL with its password. Raises ``Fatal`` when it is not set."""
        if self.url is None:
            raise Fatal(
                "bad_setting",
                "SIDECAR_DATABASE_URL is not set: must be a URL like postgresql://user@host:5432/name, in the "
                "environment, in .env, or in a file named by SIDECAR_DATABASE_URL_FILE",
            )
        return self.url.get_secret_value()

    def notify_url(self) -> str | None:
        """The URL to LISTEN on; None when only polling is possible."""
        if self.listen_url is not None:
            return self.listen_url.get_secret_value()
        return self.require_url() if self.pooler is Pooler.SESSION else None


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Where models lie and what runs them."""

    dir: Path
    runtime: Runtime
    threads: int
    named: bool = False
    """Whether ``SIDECAR_MODELS_DIR`` names the folder, rather than our default."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Leases, batches, retries and the drain. Durations in seconds."""

    batch_tokens: int
    batch_windows: int
    lease_seconds: float
    lease_messages: int
    max_attempts: int
    backoff_base: float
    backoff_cap: float
    poll_min: float
    poll_max: float
    max_document_bytes: int
    drain_seconds: float


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """The walk over the source."""

    interval: float
    """Seconds from the start of one routine walk to the next."""
    rows: int
    duty: float = 0.02
    """Share of one core that a routine walk may use."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Where the endpoints listen. Port 0: any free one."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How log lines look, and from which level on."""

    format: LogFormat
    level: str


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What systemd told this process."""

    notify_socket: str | None
    watchdog_seconds: float | None
