"""The list of guards names tests, mutants and faults that exist, and leaves no race and no mutant out."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.torture.faults import FAULTS
from tests.torture.mutants import PYTHON_MUTANTS, SQL_MUTANTS

REPOSITORY = Path(__file__).parents[2]
GUARDS = tomllib.loads((REPOSITORY / "tests" / "guards.toml").read_text(encoding="utf-8"))
MUTANTS = {*SQL_MUTANTS, *PYTHON_MUTANTS}


@cache
def functions_of(path: str) -> frozenset[str]:
    """Names of the test functions of a file."""
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_race_of_the_design_has_its_guard() -> None:
    assert {f"R{number}" for number in range(1, 28)} <= GUARDS.keys()


@pytest.mark.parametrize("race", GUARDS)
def test_what_a_guard_names_exists(race: str) -> None:
    guard = GUARDS[race]
    assert guard["tests"], "no test fails without this guard"
    for test in guard["tests"]:
        path, _, name = test.partition("::")
        assert name.startswith("test_")
        assert name in functions_of(path), test
    assert set(guard["mutants"]) <= MUTANTS
    assert set(guard["faults"]) <= FAULTS.keys()


def test_every_mutant_switches_off_a_guard_of_the_list() -> None:
    assert {mutant for guard in GUARDS.values() for mutant in guard["mutants"]} == MUTANTS
