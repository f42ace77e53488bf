"""The allocator's heaps, counted in processes of their own: the limit holds for a whole process."""

from __future__ import annotations

import subprocess
import sys

HEAPS = 2
_COUNT = """
import ctypes, threading
from sidecar_daemon.adapters.allocator import keep_few_heaps
done = keep_few_heaps(2) if {call} else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
barrier = threading.Barrier(8)
def work():
    libc.malloc(1000)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(done, flush=True)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def heaps(*, call: bool) -> tuple[str, int]:
    """What the call answered, and how many heaps a process has after eight threads have allocated at once."""
    code = _COUNT.format(call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer, _, rest = done.stdout.partition("\n")
    return answer, rest.count("<heap nr=")


def test_threads_share_few_heaps() -> None:
    assert heaps(call=False)[1] > HEAPS
    assert heaps(call=True) == ("True", HEAPS)
