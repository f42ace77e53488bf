"""The built wheel is whole: installed into an empty environment, away from the repository, it migrates by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import asyncpg
import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]
MANIFESTS = sorted(path.name for path in (REPOSITORY / "models").glob("*.toml"))
STATEMENTS = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "sql").rglob("*.sql"))


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command as a stranger would, without this session's Python path and settings; return its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SIDECAR_", "COV"))}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the working tree with the build backend that the environment has."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out, cwd=REPOSITORY)
    (built,) = out.glob("*.whl")
    return built


def lend(wanted: list[Requirement], site: Path, lent: set[str]) -> None:
    """Link into another environment what these requirements are installed as here, and what those require.

    Nothing else gets there: a requirement that is not declared is missing there, as it is at a stranger's.
    """
    for requirement in wanted:
        installed = metadata.distribution(requirement.name)
        assert installed.version in requirement.specifier
        key = f"{requirement.name} {sorted(requirement.extras)}"
        if key in lent:
            continue
        lent.add(key)
        for file in installed.files or ():
            link = site / file
            if ".." not in file.parts and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.locate())
        lend(needs(installed.requires or [], requirement.extras), site, lent)


def needs(declared: list[str], extras: set[str]) -> list[Requirement]:
    """What a distribution requires here, with these extras of it."""
    found = [Requirement(line) for line in declared]
    return [
        each
        for each in found
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in (*extras, ""))
    ]


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a new environment that holds nothing but the wheel and what it asks for."""
    home = tmp_path_factory.mktemp("stranger") / "venv"
    assert not home.is_relative_to(REPOSITORY)
    venv.create(home)
    python = home / "bin" / "python"
    options = ("-qq", "--disable-pip-version-check", "--no-input", "--no-index", "--no-deps", "--no-compile")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    (ours,) = metadata.distributions(name="sidecar-daemon", path=[str(site)])
    assert set(ours.metadata.get_all("Provides-Extra") or ()) >= {"embedded"}
    lend(needs(ours.requires or [], {"embedded"}), site, set())
    return home / "bin"


def test_the_wheel_carries_every_statement_and_every_manifest_and_nothing_foreign(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert STATEMENTS
    assert [name for name in STATEMENTS if f"sidecar_daemon/{name}" not in names] == []
    assert MANIFESTS
    assert [name for name in MANIFESTS if f"sidecar_daemon/models/{name}" not in names] == []
    page = [f"sidecar_daemon/adapters/http/page/{name}" for name in ("index.html", "style.css", "script.js")]
    assert [name for name in page if name not in names] == []
    foreign = [name for name in names if not name.startswith(("sidecar_daemon/", "sidecar_daemon-"))]
    assert foreign == []
    assert [name for name in names if name.endswith((".onnx", ".safetensors"))] == []


def test_the_installed_package_is_the_one_that_runs(bin_folder: Path, tmp_path: Path) -> None:
    where = run(bin_folder / "python", "-c", "import sidecar_daemon as s; print(s.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(bin_folder.parent)


def test_the_installed_wheel_lists_its_models(bin_folder: Path, tmp_path: Path) -> None:
    listed = json.loads(run(bin_folder / "python", "-m", "sidecar_daemon", "models", "list", "--json", cwd=tmp_path))
    assert sorted(f"{model['name']}.toml" for model in listed) == MANIFESTS


async def test_the_installed_wheel_migrates_a_fresh_database_twice(
    bin_folder: Path, tmp_path: Path, empty_url: str
) -> None:
    for _ in range(2):
        run(bin_folder / "sidecar-daemon", "migrate", cwd=tmp_path, SIDECAR_DATABASE_URL=empty_url)
    connection = await asyncpg.connect(empty_url)
    try:
        assert await connection.fetchval("SELECT to_regclass('sidecar.pipelines') IS NOT NULL")
        assert await connection.fetchval("SELECT count(*) FROM sidecar.status") == 0
    finally:
        await connection.close()
