"""The rules of DESIGN 4 that no compiler holds. Each rule is a function, shown to hold here and to fail on a plant."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "sidecar_daemon"

WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
VAGUE = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "models"}
SQL_SHAPE = re.compile(
    r"""(?P<verb>
        select\s+(\*|\$\d|\d|[\w."]+\s*\(|.+\bfrom\b) | insert\s+into\b | update\s+\S+\s+set\b | delete\s+from\b |
        merge\s+into\b | with\s+(recursive\s+)?[\w"]+\s*(\([^)]*\)\s*)?as\s*\( | copy\s+[\w.("]+.*\b(from|to)\b |
        (create|alter|drop|truncate|comment\s+on|lock|vacuum|analyze|reindex)\s+(or\s+replace\s+)?
          (table|schema|index|unique|extension|function|trigger|view|role|database|type|sequence|only)\b |
        truncate\s+[\w."]+\s*;?\s*$ | (grant|revoke)\s.+\s(to|from)\b |
        (un)?listen\s+[\w"*]+\s*;?\s*$ | notify\s+\w+\s*(,|;|$) | set\s+(local|session)\b | (begin|commit|rollback)\s*;
    )""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
LEADING_SQL_COMMENTS = re.compile(r"\A(\s|--[^\n]*\n|/\*.*?\*/)*", re.DOTALL)
NOT_OURS = re.compile(r'\b(from|join)\s+(?!sidecar\.)[\w"({]|\b(?!sidecar\.)\w+\.\w+\s*\(', re.IGNORECASE)
# Written so that the patterns do not find themselves.
FORBIDDEN_TEXT = r"/(root|work|farm|home|Users)/|pypi\.org|python[h]osted|debian\.org|npmjs\.org"


def trees(package: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every module of a package, by path within it."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package), ast.parse(path.read_text(encoding="utf-8"))


def environment_reads(package: Path) -> list[str]:
    """Where the environment is read outside the package ``settings``."""
    found = []
    for path, tree in trees(package):
        if path.parts[0] == "settings":
            continue
        for node in ast.walk(tree):
            names: set[str] = set()
            if isinstance(node, ast.Attribute):
                names = {node.attr}
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "pydantic_settings":
                names = {"environ"}  # its settings classes read the environment by themselves
            elif isinstance(node, ast.Import) and any(alias.name == "pydantic_settings" for alias in node.names):
                names = {"environ"}
            if names & ENVIRONMENT:
                found.append(f"{path}:{getattr(node, 'lineno', 0)}")
    return found


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every string of a module but its docstrings; the parts of an f-string count as one, holes as ``{}``."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
            parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value


def wall_clock_reads(package: Path) -> list[str]:
    """Where the host's wall clock is read: only the database says what time it is."""
    found = []
    for path, tree in trees(package):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ".".join(ast.unparse(node).split(".")[-2:]) in WALL_CLOCK:
                found.append(f"{path}:{node.lineno}")
            elif isinstance(node, ast.ImportFrom) and node.module == "time":
                found += [f"{path}:{node.lineno}" for alias in node.names if f"time.{alias.name}" in WALL_CLOCK]
    return found


def is_foreign_sql(text: str) -> bool:
    """Whether a string is an SQL statement other than a call of ``sidecar.*``. A sentence ("Select …") is not."""
    statement = LEADING_SQL_COMMENTS.sub("", text)
    match = SQL_SHAPE.match(statement)
    verb = statement.split(maxsplit=1)[0] if match else ""
    if not match or not (verb.isupper() or verb.islower()):
        return False
    called = re.search(r"\bsidecar\.\w+", statement) is not None
    return not (verb.lower() == "select" and called and not NOT_OURS.search(statement))


def foreign_sql(package: Path) -> list[str]:
    """Where SQL stands in Python outside ``adapters/postgres``."""
    return [
        f"{path}:{line}"
        for path, tree in trees(package)
        if path.parts[:2] != ("adapters", "postgres")
        for line, text in texts(tree)
        if is_foreign_sql(text)
    ]


def vague_names(*roots: Path) -> list[str]:
    """Modules and folders of modules whose name says nothing."""
    modules = [path.relative_to(root) for root in roots for path in root.rglob("*.py")]
    return sorted({str(m) for m in modules if VAGUE & {part.removesuffix(".py") for part in m.parts}})


def machine_text(repository: Path) -> list[str]:
    """Lines of tracked files that hold a path of one machine or the host of a package registry."""
    command = ["git", "grep", "-nIE", FORBIDDEN_TEXT, "--", ".", ":!*.lock"]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr
    return run.stdout.splitlines()


def header_faults(functions: Path) -> list[str]:
    """SQL files without a leading comment that names the locks taken and who may call."""
    faults = []
    for path in sorted(functions.glob("*.sql")):
        match = LEADING_SQL_COMMENTS.match(path.read_text(encoding="utf-8"))
        header = match.group().lower() if match else ""
        if not re.search(r"\block(s|ed|ing)?\b", header):
            faults.append(f"{path.name}: locks")
        if not re.search(r"\b(calls?|called|callers?|grants?|granted|execute)\b", header):
            faults.append(f"{path.name}: who may call")
    return faults


def bare_tables(functions: Path) -> list[str]:
    """Statements that name a pipeline's table by its oid: once it is dropped, that is a number and a syntax error.

    Not those of an operator's commands (attach, index), which hold what they name.
    """
    return [
        f"{path.name}: {line.strip()}"
        for path in sorted(functions.glob("*.sql"))
        if path.stem not in {"attach", "index", "internal"}
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"(?<!_table\(p\.name, )(?<!= )\bp\.(source|embeddings)\b(?!::text)", line)
    ]


def broken_layers(root: Path) -> str:
    """What import-linter says against the package in ``root``; empty when every contract holds."""
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", code, "--no-cache"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else run.stdout + run.stderr


def plant(root: Path, name: str, text: str) -> Path:
    """Write a file below ``root`` and return ``root``."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return root


def test_the_import_layers_hold() -> None:
    assert broken_layers(REPOSITORY) == ""


@pytest.mark.parametrize(
    ("module", "text", "contract"),
    [
        ("domain/planted.py", "from sidecar_daemon import ports\n", "layers of DESIGN 4"),
        ("stray.py", "", "layers of DESIGN 4"),
        ("adapters/http/planted.py", "import sidecar_daemon.adapters.postgres\n", "adapters do not import one another"),
        ("domain/planted.py", "import asyncpg\n", "the core knows no driver"),
        ("domain/planted.py", "import random\n", "the domain is pure"),
    ],
)
def test_a_broken_import_layer_is_seen(tmp_path: Path, module: str, text: str, contract: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    plant(tmp_path / PACKAGE.name, module, text)
    assert f"{contract} BROKEN" in broken_layers(tmp_path)


def test_only_settings_reads_the_environment() -> None:
    assert environment_reads(PACKAGE) == []


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.environ['A']\n",
        "import os as o\nx = o.getenv('A')\n",
        "from os import environ as e\n",
        "def f():\n    from os import getenv\n",
        "from pydantic_settings import BaseSettings\n",
        "import pydantic_settings\n",
    ],
)
def test_a_read_of_the_environment_is_seen(tmp_path: Path, text: str) -> None:
    plant(tmp_path, "settings/environment.py", text)
    assert environment_reads(tmp_path) == []
    assert len(environment_reads(plant(tmp_path, "adapters/settings.py", text))) == 1


def test_no_decision_reads_the_hosts_wall_clock() -> None:
    assert wall_clock_reads(PACKAGE) == []


@pytest.mark.parametrize(
    "text",
    ["import time\n\nnow = time.time()", "import datetime\n\nx = datetime.datetime.now()", "from time import time"],
)
def test_a_read_of_the_wall_clock_is_seen(tmp_path: Path, text: str) -> None:
    assert len(wall_clock_reads(plant(tmp_path, "worker/clock.py", text))) == 1


def test_python_only_calls_functions_of_ours() -> None:
    assert foreign_sql(PACKAGE) == []


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1",
        "select id, content\n  from source_documents",
        "-- why\n  SELECT pgmq.read('q', 1, 1)",
        "SELECT * FROM sidecar.status JOIN pg_class ON true",
        "select count(*) from sidecar.status, lateral (select 1 from pg_class) c",
        "INSERT INTO t VALUES (1)",
        "update public.source_documents set content = $1",
        "DELETE FROM t",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "CREATE OR REPLACE FUNCTION f() RETURNS int",
        "drop table t",
        "COPY t (a) FROM STDIN",
        "GRANT EXECUTE ON FUNCTION f TO r",
        "LISTEN sidecar",
        "NOTIFY sidecar, 'x'",
        "SET LOCAL statement_timeout = 0",
        "BEGIN;",
        "TRUNCATE t",
        "DELETE FROM {y}",
        "select sidecar.key(k) from {y}",
        "SELECT pgmq.send(sidecar.queue($1), $2)",
    ],
)
@pytest.mark.parametrize("template", ["x = {!r}\n", "def f(y):\n    g(f{!r}, f'{{y}}')\n"])
def test_sql_in_python_is_seen(tmp_path: Path, text: str, template: str) -> None:
    plant(tmp_path, "adapters/postgres/queue.py", template.format(text))
    assert foreign_sql(tmp_path) == []
    assert len(foreign_sql(plant(tmp_path, "app.py", template.format(text)))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM sidecar.lease($1, $2)",
        "select sidecar.pause($1)",
        "SELECT * FROM sidecar.status",
        "Select a pipeline from the list",
        "Update the settings, then set them",
        "select a pipeline",
        "insert",
        "update",
        "set by the operator",
        "copy",
        "delete in flight",
        "create the standard document table",
    ],
)
def test_a_call_of_ours_and_prose_are_let_through(tmp_path: Path, text: str) -> None:
    assert foreign_sql(plant(tmp_path, "app.py", f'"""DELETE FROM t"""\nx = {text!r}\n')) == []


def test_every_module_has_a_telling_name() -> None:
    assert vague_names(PACKAGE, REPOSITORY / "tests") == []


@pytest.mark.parametrize("name", ["utils.py", "domain/helpers.py", "manager.py", "common/thing.py", "models.py"])
def test_a_vague_name_is_seen(tmp_path: Path, name: str) -> None:
    assert vague_names(plant(tmp_path, name, "")) == [name]


def test_no_tracked_file_names_a_machine_or_a_registry() -> None:
    assert machine_text(REPOSITORY) == []


@pytest.mark.parametrize(
    "parts",
    [("", "root", "x"), ("", "home", "me", "x"), ("", "Users", "me"), ("https:", "", "pypi" + ".org", "simple")],
)
def test_a_machine_path_or_a_registry_is_seen(tmp_path: Path, parts: tuple[str, ...]) -> None:
    plant(tmp_path, "README.md", "see " + "/".join(parts))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert machine_text(tmp_path) == []
    subprocess.run(["git", "add", "README.md"], cwd=tmp_path, check=True)
    assert len(machine_text(tmp_path)) == 1


def test_every_sql_function_says_its_locks_and_callers() -> None:
    functions = REPOSITORY / "sql" / "functions"
    assert list(functions.glob("*.sql")), "no SQL function was looked at"
    assert header_faults(functions) == []


def test_statements_name_tables_by_what_raises_once_they_are_dropped(tmp_path: Path) -> None:
    assert bare_tables(REPOSITORY / "sql" / "functions") == []
    planted = plant(tmp_path, "f.sql", "EXECUTE format('SELECT FROM %s', p.source);\n$q$, p.embeddings, p.key_type)")
    assert len(bare_tables(planted)) == 2


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("-- Locks: none.\n-- Callers: sidecar_runtime.\nCREATE FUNCTION f() …", []),
        ("/* takes an advisory lock; granted to sidecar_runtime */\nCREATE …", []),
        ("-- Callers: anyone.\nCREATE FUNCTION f() …", ["f.sql: locks"]),
        ("-- Locks: none.\nCREATE FUNCTION f() …", ["f.sql: who may call"]),
        ("CREATE FUNCTION f() …\n-- locks: none; callers: anyone\n", ["f.sql: locks", "f.sql: who may call"]),
    ],
)
def test_a_header_that_leaves_something_out_is_seen(tmp_path: Path, text: str, faults: list[str]) -> None:
    assert header_faults(plant(tmp_path, "f.sql", text)) == faults
