"""The daemon under its unit's system call rules: ``SANDBOX_UNIT=… python -m tests.system.sandboxed [command …]``.

What systemd loads into the kernel for SystemCallFilter=, MemoryDenyWriteExecute= and RestrictAddressFamilies= is
loaded here from the same lines, with the library that it uses; its own tool expands groups such as ``@system-service``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.system.tools import tool

_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM
_EQUAL, _MASKED_EQUAL = 4, 7
_SHM_EXEC = 0o100000
_PR_SET_NO_NEW_PRIVS = 38


class _Comparison(ctypes.Structure):
    """Of one argument of a call: libseccomp's ``struct scmp_arg_cmp``."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def directives(unit: Path, name: str) -> list[str]:
    """Values of a directive of a unit file, in order."""
    return [line.partition("=")[2] for line in unit.read_text().splitlines() if line.startswith(f"{name}=")]


def allowed_calls(unit: Path) -> set[str]:
    """Names of the calls that SystemCallFilter= allows."""
    allowed = expanded("@default")
    for value in directives(unit, "SystemCallFilter"):
        calls = set().union(*(expanded(word) for word in value.removeprefix("~").split()))
        allowed = allowed - calls if value.startswith("~") else allowed | calls
    return allowed


def expanded(word: str) -> set[str]:
    """A call by name, or all calls of a group."""
    if not word.startswith("@"):
        return {word}
    command = [tool("systemd-analyze"), "syscall-filter", word]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    words = [line.strip() for line in listed if line.strip() and not line.strip().startswith("#")]
    return set().union(*(expanded(each) for each in words))


def enter(unit: Path) -> None:
    """Put this process under the unit's rules, for good."""
    conditions: dict[str, list[list[_Comparison]]] = {}
    families = " ".join(directives(unit, "RestrictAddressFamilies")).split()
    conditions["socket"] = [[_Comparison(0, _EQUAL, getattr(socket, family), 0)] for family in families]
    if directives(unit, "MemoryDenyWriteExecute") == ["yes"]:
        both = mmap.PROT_WRITE | mmap.PROT_EXEC
        conditions["mmap"] = [[_masked(2, both, part)] for part in (0, mmap.PROT_WRITE, mmap.PROT_EXEC)]
        conditions["mprotect"] = conditions["pkey_mprotect"] = [[_masked(2, mmap.PROT_EXEC, 0)]]
        conditions["shmat"] = [[_masked(2, _SHM_EXEC, 0)]]
    calls = allowed_calls(unit)
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(_REFUSE))
    for name in calls:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # of another architecture
            continue
        for condition in conditions.get(name, [[]]):
            array = (_Comparison * len(condition))(*condition)
            _checked(library.seccomp_rule_add_array(rules, _ALLOW, number, len(condition), array))
    _checked(ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(library.seccomp_load(rules))


def _masked(argument: int, mask: int, value: int) -> _Comparison:
    return _Comparison(argument, _MASKED_EQUAL, mask, value)


def _checked(status: int) -> None:
    if status < 0:
        raise OSError(-status, os.strerror(-status))


if __name__ == "__main__":
    enter(Path(os.environ["SANDBOX_UNIT"]))
    if sys.argv[1:]:
        os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606  another command under the same rules
    from sidecar_daemon.__main__ import main

    main()
