"""The environment as it stands: every setting's name, default and bounds, and one line for what is wrong.

Where a setting comes from, first match wins: an argument, the environment, ``.env`` in the working directory, and for
secrets also the file that ``SIDECAR_<NAME>_FILE`` names or systemd's credential ``<name>``.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlencode, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.log_lines import LogFormat, redact
from sidecar_daemon.settings.cores import usable_cores
from sidecar_daemon.settings.groups import Pooler, Runtime

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic.fields import FieldInfo

PREFIX = "sidecar_"
_SECRETS = ("database_url", "listen_url")
_WORD = re.compile(r"([a-z_]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)+))(?=\s|$)")
"""``name=value`` of a libpq connection string; a backslash escapes, quotes hold spaces."""


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


class LogEnvironment(BaseSettings):
    """What is needed to complain about the rest."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    log_format: LogFormat = LogFormat.AUTO


class Environment(BaseSettings):
    """Every setting, flat, as it stands in the environment behind ``SIDECAR_``: the reference."""

    model_config = LogEnvironment.model_config

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
        named = {f"{PREFIX}{name}_file": f"SIDECAR_{name.upper()}_FILE" for name in _SECRETS}
        return (
            init_settings,
            env_settings,
            _Secrets(settings_cls, [(where, environment.get(key)) for key, where in named.items()]),
            dotenv_settings,
            _Secrets(settings_cls, [(where, dotenv.get(key)) for key, where in named.items()]),
            _Secrets(settings_cls, _credentials(environment.get("credentials_directory"))),
        )

    def watchdog_seconds(self) -> float | None:
        """How long systemd lets this process be silent; None where it does not watch, or watches another."""
        ours = self.watchdog_pid in (None, os.getpid())
        return self.watchdog_usec / 1e6 if self.watchdog_usec and ours else None

    def models_folder(self) -> Path:
        """Where models lie. Raises ``Fatal`` where nothing says so."""
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
        if not name.startswith(PREFIX.upper()) or name in names or _service_link(name, value or ""):
            continue
        close = difflib.get_close_matches(name[len(PREFIX) :], [ours[len(PREFIX) :] for ours in names], n=1)
        hint = f"did you mean SIDECAR_{close[0]}?" if close else "must be one of the names in the README"
        raise Fatal("bad_setting", f"{name} is not a setting: {hint}")


def _service_link(name: str, value: str) -> bool:
    """Whether Kubernetes or Docker put this variable here for a service that is called sidecar-something."""
    return bool(re.search(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP)(_|$)", name)) or bool(
        name.endswith("_PORT") and re.match(r"(tcp|udp)://", value)
    )


def complaint(error: ValidationError) -> str:
    """One line that names the setting, its value unless secret, and what is allowed."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0]).lower()
    declared = Environment.model_fields[field]
    name = str(declared.validation_alias or f"SIDECAR_{field.upper()}")
    if field in _SECRETS:
        return f"{name} has a value that is not shown: must be {declared.description}"
    value = redact(repr(first["input"] if isinstance(first["input"], str) else str(first["input"])))
    return f"{name} is {value if len(value) <= 80 else value[:77] + '...'}: must be {declared.description}"
