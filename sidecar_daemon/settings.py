"""Settings: read once from the environment, checked, frozen. The only module that reads the environment.

Where a setting comes from, first match wins: an argument of ``Settings.read``, the environment, ``.env`` in the
working directory, and for secrets also the file that ``SIDECAR_<NAME>_FILE`` names or systemd's credential ``<name>``.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlencode, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.log_lines import LogFormat, redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic.fields import FieldInfo

_PREFIX = "sidecar_"
_SECRETS = ("database_url", "listen_url")
_WORD = re.compile(r"([a-z_]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)+))(?=\s|$)")
"""``name=value`` of a libpq connection string; a backslash escapes, quotes hold spaces."""


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
            found = _Environment(**overrides)  # type: ignore[arg-type]  # pydantic parses and checks the text
        except ValidationError as error:
            raise Fatal("bad_setting", _complaint(error)) from None
        except OSError as error:
            raise Fatal("bad_setting", f".env cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise Fatal("bad_setting", ".env cannot be read: must be UTF-8 text") from None
        _check_order("POLL_MIN", found.poll_min, "POLL_MAX", found.poll_max)
        _check_order("BACKOFF_BASE", found.backoff_base, "BACKOFF_CAP", found.backoff_cap)
        return found.grouped()


def wanted_log_format() -> LogFormat:
    """How log lines shall look, also where another setting is wrong; ``auto`` where this one is."""
    try:
        return _LogEnvironment().log_format
    except (ValidationError, OSError, UnicodeDecodeError):
        return LogFormat.AUTO


def child_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a daemon that we start: ours, with these settings.

    Args:
        settings: by their upper-case name without prefix, such as ``DATABASE_URL``.
    """
    return {**os.environ, **{f"{_PREFIX.upper()}{name}": value for name, value in settings.items()}}


def installed_folder(name: Literal["sql", "models"]) -> Path:
    """The folder of SQL or of model manifests: inside an installed wheel, else at the top of the checkout.

    Raises:
        Fatal: ``incomplete_installation``.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise Fatal("incomplete_installation", f"the folder {name!r} is missing from {package}: install the package again")


def usable_cores(root: Path = Path("/")) -> int:
    """Whole cores this process may use: its CPU affinity, and the quota of every control group above it."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([float(affinity), *_quotas(root)])))


def _quotas(root: Path) -> list[float]:
    """Cores allowed by cgroup v2 (``cpu.max``) or v1 (``cpu.cfs_quota_us``), from this process's group upwards."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[float | None] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = base / path.lstrip("/")
        found.extend(_quota(folder) for folder in [own, *own.parents] if folder.is_relative_to(base))
    return [cores for cores in found if cores is not None]


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _postgres_url(value: SecretStr) -> SecretStr:
    """Accept a URL, or libpq's ``host=… dbname=…``, which becomes a URL."""
    text = value.get_secret_value().strip()
    if re.match(r"postgres(ql)?://", text):
        place = urlsplit(text).netloc
        hosts = place.partition("@")[2] if "@" in place else place  # as the driver splits it
        if not all(re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^:@\[\]]*)(:\d{1,5})?", host) for host in hosts.split(",")):
            raise ValueError
        return SecretStr(text)
    if not re.fullmatch(rf"(?:{_WORD.pattern}\s*)+", text):
        raise ValueError
    words = {name: re.sub(r"\\(.)", r"\1", quoted or plain) for name, quoted, plain in _WORD.findall(text)}
    return SecretStr("postgresql://?" + urlencode(words))


def _names(value: object) -> object:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


_Url = Annotated[SecretStr, AfterValidator(_postgres_url)]
_Name = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,40}$")]
_Level = Annotated[
    Literal["debug", "info", "warning", "error", "critical"],
    BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
]


def _setting(default: Any, allowed: str, *, ge: float | None = None, gt: float | None = None, le: float) -> Any:
    """A number's default, its bounds, and how a complaint words them."""
    return Field(default, description=allowed, ge=ge, gt=gt, le=le, allow_inf_nan=False)


_DAY = 86400.0
_SECONDS = "a number of seconds > 0 and <= 86400"
_POSTGRES = "a URL like postgresql://user@host:5432/name (special characters as %XX), or host=... dbname=... user=..."


class _LogEnvironment(BaseSettings):
    """What is needed to complain about the rest."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    log_format: LogFormat = LogFormat.AUTO


class _Environment(BaseSettings):
    """Every setting, flat, as it stands in the environment behind ``SIDECAR_``: the reference."""

    model_config = _LogEnvironment.model_config

    database_url: _Url | None = Field(None, description=_POSTGRES)
    listen_url: _Url | None = Field(None, description=_POSTGRES)
    pooler: Pooler = Field(Pooler.SESSION, description="session or transaction")
    pipelines: Annotated[tuple[_Name, ...], NoDecode, BeforeValidator(_names)] = Field(
        (), description="names of pipelines (a-z, 0-9, _), separated by commas; empty for all"
    )
    models_dir: Path | None = Field(None, description="a folder")
    runtime: Runtime = Field(Runtime.AUTO, description="auto, onnxruntime or openvino")
    threads: int = Field(default_factory=usable_cores, description="a whole number from 1 to 256", ge=1, le=256)
    batch_tokens: int = _setting(1024, "a whole number from 16 to 1048576", ge=16, le=1 << 20)
    batch_windows: int = _setting(64, "a whole number from 1 to 4096", ge=1, le=4096)
    lease_seconds: float = _setting(60.0, "a number of seconds from 5 to 86400", ge=5, le=_DAY)
    lease_messages: int = _setting(256, "a whole number from 1 to 10000", ge=1, le=10_000)
    max_attempts: int = _setting(5, "a whole number from 2 to 1000", ge=2, le=1000)
    """At least 2: a process that is killed costs what it held its first attempt."""
    backoff_base: float = _setting(2.0, _SECONDS, gt=0, le=_DAY)
    backoff_cap: float = _setting(900.0, _SECONDS, gt=0, le=_DAY)
    poll_min: float = _setting(0.05, _SECONDS, gt=0, le=_DAY)
    poll_max: float = _setting(5.0, _SECONDS, gt=0, le=_DAY)
    sweep_interval: float = _setting(300.0, _SECONDS, gt=0, le=_DAY)
    sweep_rows: int = _setting(5000, "a whole number from 1 to 1000000", ge=1, le=1_000_000)
    max_document_bytes: int = _setting(1 << 20, "a whole number of bytes from 1 to 268435456", ge=1, le=1 << 28)
    drain_seconds: float = _setting(30.0, _SECONDS, gt=0, le=_DAY)
    http_host: str = Field("127.0.0.1", description="an address or a host name", pattern=r"^[A-Za-z0-9.:_%-]+$")
    http_port: int = Field(8088, description="a port from 0 (any free one) to 65535", ge=0, le=65535)
    log_format: LogFormat = Field(LogFormat.AUTO, description="auto, json or console")
    log_level: _Level = Field("info", description="debug, info, warning, error or critical")
    xdg_cache_home: str | None = Field(None, validation_alias="XDG_CACHE_HOME")
    notify_socket: str | None = Field(None, validation_alias="NOTIFY_SOCKET")
    watchdog_usec: int | None = Field(
        None, validation_alias="WATCHDOG_USEC", description="a whole number of microseconds > 0", gt=0
    )
    watchdog_pid: int | None = Field(None, validation_alias="WATCHDOG_PID", description="a process id")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put each place's secret files right behind the place itself, and check that every name is one of ours."""
        del file_secret_settings  # its file names carry our prefix; a systemd credential's does not
        environment: Mapping[str, str | None] = getattr(env_settings, "env_vars", {})
        dotenv: Mapping[str, str | None] = getattr(dotenv_settings, "env_vars", {})
        _refuse_unknown([*environment.items(), *dotenv.items()], known=cls.model_fields)
        named = {f"{_PREFIX}{name}_file": f"SIDECAR_{name.upper()}_FILE" for name in _SECRETS}
        return (
            init_settings,
            env_settings,
            _Secrets(settings_cls, [(where, environment.get(key)) for key, where in named.items()]),
            dotenv_settings,
            _Secrets(settings_cls, [(where, dotenv.get(key)) for key, where in named.items()]),
            _Secrets(settings_cls, _credentials(environment.get("credentials_directory"))),
        )

    def grouped(self) -> Settings:
        """The frozen groups that the rest of the daemon sees."""
        ours = self.watchdog_pid in (None, os.getpid())
        return Settings(
            database=DatabaseSettings(self.database_url, self.listen_url, self.pooler),
            model=ModelSettings(self._models(), self.runtime, self.threads, named=self.models_dir is not None),
            worker=WorkerSettings(
                batch_tokens=self.batch_tokens,
                batch_windows=self.batch_windows,
                lease_seconds=self.lease_seconds,
                lease_messages=self.lease_messages,
                max_attempts=self.max_attempts,
                backoff_base=self.backoff_base,
                backoff_cap=self.backoff_cap,
                poll_min=self.poll_min,
                poll_max=self.poll_max,
                max_document_bytes=self.max_document_bytes,
                drain_seconds=self.drain_seconds,
            ),
            sweep=SweepSettings(self.sweep_interval, self.sweep_rows),
            http=HttpSettings(self.http_host, self.http_port),
            log=LogSettings(self.log_format, self.log_level),
            service=ServiceSettings(
                self.notify_socket, self.watchdog_usec / 1e6 if self.watchdog_usec and ours else None
            ),
            pipelines=self.pipelines,
        )

    def _models(self) -> Path:
        try:
            if self.models_dir is not None:
                return self.models_dir.expanduser()
            cache = Path(self.xdg_cache_home or "")
            return (cache if cache.is_absolute() else Path.home() / ".cache") / "sidecar-daemon" / "models"
        except RuntimeError:  # no home directory, as for a container's user without a passwd entry
            raise Fatal("bad_setting", "SIDECAR_MODELS_DIR is not set and there is no home: must be a folder") from None


class _Secrets(PydanticBaseSettingsSource):
    """Secrets that stand in files: ``(where the file's name came from, the file)``."""

    def __init__(self, settings_cls: type[BaseSettings], files: Iterable[tuple[str, str | None]]) -> None:
        super().__init__(settings_cls)
        self._files = list(files)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Required by the base class; ``__call__`` answers for all fields at once."""
        del field
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        found = {}
        for where, file in self._files:
            name = where.removeprefix("SIDECAR_").removesuffix("_FILE").lower()
            if not file:
                continue
            try:
                found[name] = Path(file).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
                raise Fatal("bad_setting", f"{where} is {file!r}: must be a readable file ({why})") from None
        return found


def _credentials(directory: str | None) -> list[tuple[str, str | None]]:
    files = [Path(directory) / name for name in _SECRETS] if directory else []
    return [(file.name, str(file)) for file in files if file.exists()]


def _refuse_unknown(found: Iterable[tuple[str, str | None]], known: Mapping[str, FieldInfo]) -> None:
    names = [f"SIDECAR_{name.upper()}" for name, declared in known.items() if declared.validation_alias is None]
    names += [f"SIDECAR_{name.upper()}_FILE" for name in _SECRETS]
    for key, value in found:
        name = key.upper()
        if not name.startswith(_PREFIX.upper()) or name in names or _service_link(name, value or ""):
            continue
        close = difflib.get_close_matches(name[len(_PREFIX) :], [ours[len(_PREFIX) :] for ours in names], n=1)
        hint = f"did you mean SIDECAR_{close[0]}?" if close else "must be one of the names in the README"
        raise Fatal("bad_setting", f"{name} is not a setting: {hint}")


def _service_link(name: str, value: str) -> bool:
    """Whether Kubernetes or Docker put this variable here for a service that is called sidecar-something."""
    return bool(re.search(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP)(_|$)", name)) or bool(
        name.endswith("_PORT") and re.match(r"(tcp|udp)://", value)
    )


def _complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0]).lower()
    declared = _Environment.model_fields[field]
    name = str(declared.validation_alias or f"SIDECAR_{field.upper()}")
    if field in _SECRETS:
        return f"{name} has a value that is not shown: must be {declared.description}"
    value = redact(repr(first["input"] if isinstance(first["input"], str) else str(first["input"])))
    return f"{name} is {value if len(value) <= 80 else value[:77] + '...'}: must be {declared.description}"


def _check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    if low > high:
        raise Fatal("bad_setting", f"SIDECAR_{low_name} is {low:g}: must be <= SIDECAR_{high_name}, which is {high:g}")
