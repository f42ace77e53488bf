"""Settings: where they come from, what is refused, and in which words."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import asyncpg
import pytest

from sidecar_daemon.domain.errors import Fatal
from sidecar_daemon.domain.log_lines import LogFormat
from sidecar_daemon.settings import Pooler, Settings, installed_folder, usable_cores

URL = "postgresql://someone:s3cret@db.example:5433/app"


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("SIDECAR_"):
            monkeypatch.delenv(name)
    for name in ("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def refusal() -> str:
    with pytest.raises(Fatal) as refused:
        Settings.read()
    assert refused.value.code == "bad_setting"
    line = str(refused.value)
    assert "\n" not in line
    assert "s3cret" not in line
    return line


def test_defaults_are_those_of_the_design() -> None:
    settings = Settings.read()
    worker = settings.worker
    assert settings.database.url is None
    assert settings.database.pooler is Pooler.SESSION
    assert (worker.batch_tokens, worker.batch_windows, worker.lease_messages) == (1024, 64, 256)
    assert (worker.lease_seconds, worker.drain_seconds, worker.max_attempts) == (60, 30, 5)
    assert (worker.backoff_base, worker.backoff_cap) == (2, 900)
    assert (worker.poll_min, worker.poll_max) == (0.05, 5)
    assert worker.max_document_bytes == 1_048_576
    assert (settings.sweep.interval, settings.sweep.rows, settings.sweep.duty) == (300, 5000, 0.02)
    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8088)
    assert (settings.log.format, settings.log.level) == (LogFormat.AUTO, "info")
    assert settings.pipelines == ()
    assert settings.model.threads == usable_cores()
    assert settings.model.dir == Path.home() / ".cache/sidecar-daemon/models"


def test_every_place_a_secret_may_stand_in_and_which_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def url() -> str:
        return Settings.read().database.require_url()

    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "database_url").write_text("postgresql://credential\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert url() == "postgresql://credential"
    (tmp_path / "from_dotenv").write_text("postgresql://dotenv-file")
    (tmp_path / ".env").write_text("SIDECAR_DATABASE_URL_FILE=from_dotenv\n")
    assert url() == "postgresql://dotenv-file"
    (tmp_path / ".env").write_text("SIDECAR_DATABASE_URL=postgresql://dotenv\n")
    assert url() == "postgresql://dotenv"
    (tmp_path / "secret").write_text("postgresql://file\n")
    monkeypatch.setenv("SIDECAR_DATABASE_URL_FILE", str(tmp_path / "secret"))
    assert url() == "postgresql://file"
    monkeypatch.setenv("SIDECAR_DATABASE_URL", "postgresql://environment")
    assert url() == "postgresql://environment"
    assert Settings.read(database_url="postgresql://argument").database.require_url() == "postgresql://argument"


def test_a_missing_database_url_is_said_only_by_who_needs_it() -> None:
    database = Settings.read().database
    with pytest.raises(Fatal, match=r"^SIDECAR_DATABASE_URL is not set: must be a URL like postgresql://"):
        database.require_url()


@pytest.mark.parametrize(
    "url",
    ["postgres://a.example:1,b.example:2/app?x=1", "postgresql://me@[::1]:5432/app", "postgresql:///app", URL],
)
def test_urls_of_every_kind_pass_unchanged(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SIDECAR_DATABASE_URL", url)
    assert Settings.read().database.require_url() == url


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECAR_DATABASE_URL", URL)
    assert "s3cret" not in repr(Settings.read())


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("POLL_MIN", "abc", "SIDECAR_POLL_MIN is 'abc': must be a number of seconds > 0"),
        ("POLL_MIN", "0", "SIDECAR_POLL_MIN is '0': must be a number of seconds > 0"),
        ("POLL_MAX", "nan", "SIDECAR_POLL_MAX is 'nan': must be a number of seconds > 0"),
        ("POLL_MAX", "inf", "SIDECAR_POLL_MAX is 'inf': must be a number of seconds > 0"),
        ("POLL_MIN", "6", "SIDECAR_POLL_MIN is 6: must be <= SIDECAR_POLL_MAX, which is 5"),
        ("BACKOFF_BASE", "901", "SIDECAR_BACKOFF_BASE is 901: must be <= SIDECAR_BACKOFF_CAP, which is 900"),
        ("LEASE_SECONDS", "4.9", "SIDECAR_LEASE_SECONDS is '4.9': must be a number of seconds from 5 to 86400"),
        ("THREADS", "0", "SIDECAR_THREADS is '0': must be a whole number from 1 to 256"),
        ("BATCH_TOKENS", "1.5", "SIDECAR_BATCH_TOKENS is '1.5': must be a whole number from 16"),
        ("MAX_ATTEMPTS", "many", "SIDECAR_MAX_ATTEMPTS is 'many': must be a whole number from 2 to 1000"),
        ("MAX_ATTEMPTS", "1", "SIDECAR_MAX_ATTEMPTS is '1': must be a whole number from 2 to 1000"),
        ("HTTP_PORT", "65536", "SIDECAR_HTTP_PORT is '65536': must be a port from 0 (any free one) to 65535"),
        ("HTTP_HOST", "http://x", "SIDECAR_HTTP_HOST is 'http://x': must be an address or a host name"),
        ("HTTP_HOST", URL, "SIDECAR_HTTP_HOST is 'postgresql://someone:***@db.example:5433/app': must be"),
        ("LOG_FORMAT", "xml", "SIDECAR_LOG_FORMAT is 'xml': must be auto, json or console"),
        ("LOG_LEVEL", "loud", "SIDECAR_LOG_LEVEL is 'loud': must be debug, info, warning, error or critical"),
        ("POOLER", "odd", "SIDECAR_POOLER is 'odd': must be session or transaction"),
        ("RUNTIME", "torch", "SIDECAR_RUNTIME is 'torch': must be auto, onnxruntime or openvino"),
        ("PIPELINES", "docs,Not-One", "SIDECAR_PIPELINES is 'Not-One': must be names of pipelines"),
        (
            "DATABASE_URL",
            "mysql://someone:s3cret@x",
            "SIDECAR_DATABASE_URL has a value that is not shown: must be a URL",
        ),
        ("DATABASE_URL", "s3cret", "SIDECAR_DATABASE_URL has a value that is not shown: must be a URL"),
        ("DATABASE_URL", "host=x password='s3cret", "SIDECAR_DATABASE_URL has a value that is not shown"),
        ("DATABASE_URL", "postgresql://me:s3cret/1@db/app", "SIDECAR_DATABASE_URL has a value that is not shown"),
        ("DATABASE_URL", "postgresql://me:s3cret@1@db/app", "SIDECAR_DATABASE_URL has a value that is not shown"),
        ("DATABASE_URL", "postgresql://me:s3cret@db:port/app", "SIDECAR_DATABASE_URL has a value that is not shown"),
        ("LISTEN_URL", "s3cret", "SIDECAR_LISTEN_URL has a value that is not shown: must be a URL"),
        ("DATABASE_URL_FILE", "/not/there", "SIDECAR_DATABASE_URL_FILE is '/not/there': must be a readable file"),
        ("POL_MIN", "1", "SIDECAR_POL_MIN is not a setting: did you mean SIDECAR_POLL_MIN?"),
        ("THREADS_FILE", "x", "SIDECAR_THREADS_FILE is not a setting"),
        ("NOTIFY_SOCKET", "x", "SIDECAR_NOTIFY_SOCKET is not a setting"),
        ("QQQQ", "1", "SIDECAR_QQQQ is not a setting: must be one of the names in the README"),
        ("LOG_LEVEL", "x" * 500, "SIDECAR_LOG_LEVEL is 'xxx"),
    ],
)
def test_a_bad_value_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str, line: str) -> None:
    monkeypatch.setenv(f"SIDECAR_{name}", value)
    found = refusal()
    assert found.startswith(line)
    assert len(found) < 200


def test_typos_in_dotenv_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SIDECAR_HTTP_POTR=1\nOTHER_TOOL=x\n")
    assert refusal() == "SIDECAR_HTTP_POTR is not a setting: did you mean SIDECAR_HTTP_PORT?"


def test_a_dotenv_that_is_not_text_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    assert refusal() == ".env cannot be read: must be UTF-8 text"


def test_variables_that_an_orchestrator_adds_for_a_service_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SIDECAR_SERVICE_HOST": "10.0.0.1",
        "SIDECAR_DAEMON_SERVICE_PORT_HTTP": "8088",
        "SIDECAR_PORT": "tcp://10.0.0.1:8088",
        "SIDECAR_PORT_8088_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    Settings.read()
    monkeypatch.setenv("SIDECAR_PORT", "8088")
    assert refusal().startswith("SIDECAR_PORT is not a setting")


def test_empty_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "LISTEN_URL", "POLL_MIN", "PIPELINES", "DATABASE_URL_FILE", "MODELS_DIR"):
        monkeypatch.setenv(f"SIDECAR_{name}", "")
    assert Settings.read().database.url is None


def test_pipelines_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECAR_PIPELINES", " docs, titles,")
    assert Settings.read().pipelines == ("docs", "titles")


def test_libpq_words_become_a_url_that_the_driver_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "SIDECAR_DATABASE_URL", r"host=db.example port = 5433 user=me password='it\'s 1&2=3%' dbname=app"
    )
    url = Settings.read().database.require_url()
    parse = asyncpg.connect_utils._parse_connect_dsn_and_args  # type: ignore[attr-defined]  # not in the stubs
    others = set(inspect.signature(parse).parameters) - {"dsn"}
    addresses, parameters = parse(
        dsn=url,
        **dict.fromkeys(others),
    )
    assert addresses == [("db.example", 5433)]
    assert (parameters.user, parameters.password, parameters.database) == ("me", "it's 1&2=3%", "app")


def test_listen_needs_a_direct_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECAR_DATABASE_URL", URL)
    assert Settings.read().database.notify_url() == URL
    monkeypatch.setenv("SIDECAR_POOLER", "transaction")
    assert Settings.read().database.notify_url() is None
    monkeypatch.setenv("SIDECAR_LISTEN_URL", "postgres://direct/app")
    assert Settings.read().database.notify_url() == "postgres://direct/app"


def test_models_lie_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Settings.read().model.dir == tmp_path / "sidecar-daemon/models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert Settings.read().model.dir == Path.home() / ".cache/sidecar-daemon/models"
    monkeypatch.setenv("SIDECAR_MODELS_DIR", "~/here")
    assert Settings.read().model.dir == Path.home() / "here"


def test_what_systemd_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "@s")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    service = Settings.read().service
    assert (service.notify_socket, service.watchdog_seconds) == ("@s", 30)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert Settings.read().service.watchdog_seconds is None
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    assert refusal() == "WATCHDOG_USEC is 'soon': must be a whole number of microseconds > 0"


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000"}, 1),
        ("0::/a", {"a/cpu.max": "199999 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("4:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/x/y\n0::/z", {"cpu/x/cpu.cfs_quota_us": "150000", "cpu/x/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/x", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("5:memory:/x", {"x/cpu.max": "100000 100000"}, None),
    ],
)
def test_cores_follow_the_quota_of_every_group_above(
    tmp_path: Path, group: str, files: dict[str, str], cores: int | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    assert usable_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))


def test_cores_without_control_groups(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_folders_stand_in_the_package_or_at_the_top_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "somewhere" / "sidecar_daemon"
    package.mkdir(parents=True)
    monkeypatch.setattr("sidecar_daemon.settings.__file__", str(package / "settings" / "__init__.py"))
    with pytest.raises(Fatal, match="the folder 'sql' is missing"):
        installed_folder("sql")
    (package.parent / "sql").mkdir()
    assert installed_folder("sql") == package.parent / "sql"
    (package / "sql").mkdir()
    assert installed_folder("sql") == package / "sql"
