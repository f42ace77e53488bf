"""Dockerfiles and the compose file: linted, pinned, confined, free of secrets. Their steps are run in tests/system."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar_daemon.settings.environment import Environment
from tests.conftest import ROOT
from tests.dockerfile import Stage, read
from tests.monitoring import DEPLOY, SCRAPE

DOCKERFILES = [ROOT / "Dockerfile", DEPLOY / "postgres" / "Dockerfile"]
PINNED = re.compile(r"[\w./-]+:[\w.-]*\d[\w.-]*$")
"""A tag with a version in it."""
SECRET = re.compile(r"password|secret|token|database_url$|://[^/]*@", re.IGNORECASE)


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    """Lint one Dockerfile with the linter of this environment."""
    linter = Path(sys.executable).with_name("hadolint")
    return subprocess.run([linter, path], capture_output=True, text=True, check=False)


def final() -> Stage:
    """The stage that becomes the daemon's image."""
    return read(ROOT / "Dockerfile")[1][-1]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_linter_finds_nothing(path: Path) -> None:
    done = hadolint(path)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_linter_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nCMD python\n")
    done = hadolint(tmp_path / "Dockerfile")
    assert done.returncode != 0
    assert {"DL3007", "DL3025"} <= set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_base_is_pinned_by_a_version(path: Path) -> None:
    arguments, stages = read(path)
    named = {stage.name for stage in stages}
    bases = [stage.base for stage in stages if stage.base not in named]
    assert bases
    assert [base for base in [*bases, *arguments.values()] if not PINNED.match(base)] == []


def test_the_image_runs_as_nobody_special_and_says_how_it_is() -> None:
    stage = final()
    assert stage.only("USER").value == "10001:10001"
    assert stage.only("CMD").exec_form == ["python", "-m", "sidecar_daemon"]
    assert stage.only("STOPSIGNAL").value == "SIGTERM"
    options, _, command = stage.only("HEALTHCHECK").value.partition("CMD ")
    assert "/livez" in command, "the database's outage is no reason to restart"
    said = {word.partition("=")[0] for word in options.split()}
    assert said == {"--interval", "--timeout", "--start-period", "--retries"}
    port = str(Environment.model_fields["http_port"].default)
    assert stage.only("EXPOSE").value == stage.only("ENV").assignments["SIDECAR_HTTP_PORT"] == port


def test_the_image_carries_no_secret_and_nothing_to_build_with() -> None:
    _, stages = read(ROOT / "Dockerfile")
    assert len(stages) == 3
    variables = [f"{name}={value}" for stage in stages for each in stage.instructions if each.word in {"ARG", "ENV"}
                 for name, value in each.assignments.items()]  # fmt: skip
    assert variables
    assert [variable for variable in variables if SECRET.search(variable)] == []
    copied = [each.value.split() for each in final().all("COPY")]
    assert all(words[0].startswith("--from=") for words in copied), "what the image holds comes out of earlier stages"
    settings = {f"SIDECAR_{name.upper()}" for name in Environment.model_fields}
    set_here = {name for name in final().only("ENV").assignments if name.startswith("SIDECAR_")}
    assert set_here
    assert set_here <= settings


def test_what_is_copied_is_let_through_and_nothing_else_is() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    let_through = {line[1:] for line in patterns if line.startswith("!")}
    build = read(ROOT / "Dockerfile")[1][0]
    copied = {source for each in build.all("COPY") for source in each.value.split()[:-1]}
    assert copied == let_through
    assert all((ROOT / name).exists() for name in let_through)


def compose() -> dict[str, Any]:
    """The compose file."""
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return found


def test_compose_waits_for_what_is_healthy_and_watches_everything_that_stays() -> None:
    services = compose()["services"]
    assert set(services) == {"postgres", "setup", "daemon", "prometheus"}
    assert services["setup"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services["daemon"]["depends_on"] == {"setup": {"condition": "service_completed_successfully"}}
    assert services["setup"]["restart"] == "no"
    for name in ("postgres", "prometheus"):
        assert services[name]["healthcheck"]["test"][0] == "CMD", name
    assert "healthcheck" not in services["daemon"], "the image has one"
    grace = int(services["daemon"]["stop_grace_period"].removesuffix("s"))
    assert grace > Environment.model_fields["drain_seconds"].default


def test_compose_takes_secrets_from_files_and_confines_what_it_runs() -> None:
    found = compose()
    text = (DEPLOY / "compose.yaml").read_text()
    assert not re.search(r"PASSWORD: |DATABASE_URL: ", text)
    assert all(set(secret) == {"file"} for secret in found["secrets"].values())
    ignored = (ROOT / ".gitignore").read_text().split("\n")
    for secret in found["secrets"].values():
        assert f"deploy/{Path(secret['file']).parent}/" in ignored
    for name, service in found["services"].items():
        for variable, value in service.get("environment", {}).items():
            if variable.endswith("_FILE"):
                assert Path(value).name in service["secrets"], f"{name} reads {value}, which it is not given"
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network"
        if name != "postgres":
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name


def test_compose_names_what_is_there() -> None:
    found = compose()
    for name, service in found["services"].items():
        assert "build" in service or PINNED.match(service["image"]), name
        if "build" in service:
            assert (DEPLOY / service["build"] / "Dockerfile").is_file(), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in found["volumes"], volume
    (job,) = yaml.safe_load(SCRAPE.read_text())["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    assert set(discovery["names"]) <= found["services"].keys()
    assert discovery["port"] == Environment.model_fields["http_port"].default
    configuration = next(word for word in found["services"]["prometheus"]["command"] if "--config.file" in word)
    mounted = dict(volume.split(":")[:2][::-1] for volume in found["services"]["prometheus"]["volumes"])
    folder, _, file = configuration.partition("=")[2].rpartition("/")
    assert (DEPLOY / mounted[folder] / file).is_file()
