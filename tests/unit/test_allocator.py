"""The allocator's limits, looked at in processes of their own: they hold for a whole process."""

from __future__ import annotations

import json
import subprocess
import sys

HEAPS = 2
_LOOK = """
import ctypes, json, threading
from sidecar_daemon.adapters.allocator import MAPPED_BYTES, give_memory_back

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

done = give_memory_back({heaps}) if {call} else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.mallinfo2.restype = Info
for _ in range(2):
    before = libc.mallinfo2().hblks
    block = libc.malloc(2 * MAPPED_BYTES)
    mapped = libc.mallinfo2().hblks - before
    libc.free(block)
barrier = threading.Barrier(8)

def work():
    libc.malloc(1000)
    barrier.wait()

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps([done, mapped]), flush=True)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def looked(*, call: bool) -> tuple[bool | None, int, int]:
    """What the call answered; whether a large block is mapped once one was freed; heaps of eight threads."""
    code = _LOOK.format(call=call, heaps=HEAPS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer, _, rest = done.stdout.partition("\n")
    called, mapped = json.loads(answer)
    return called, mapped, rest.count("<heap nr=")


def test_left_alone_the_allocator_keeps_what_is_freed() -> None:
    _, mapped, heaps = looked(call=False)
    assert mapped == 0
    assert heaps > HEAPS


def test_large_blocks_are_given_back_and_threads_share_few_heaps() -> None:
    assert looked(call=True) == (True, 1, HEAPS)
