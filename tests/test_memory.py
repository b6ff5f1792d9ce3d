"""Memory that a process keeps."""

import platform
import subprocess
import sys

import pytest

import tfkern

CODE = """
import resource, torch, tfkern
torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(20_000_000)  # 80 MB, which malloc maps by itself whatever it has learnt
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert tfkern.keep_memory()
print(before, min(faults() for _ in range(5)))  # the heap may grow some times
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_tensors_use_the_pages_of_freed_ones():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, after = map(int, result.stdout.split())
    pages = 80_000_000 // 4096
    assert before > pages / 512 * 5 - 1  # of 4 KiB, or 2 MiB where Linux gives these
    assert after < pages / 512


def test_other_libraries_say_no(monkeypatch):
    class Nothing:
        def __init__(self, name):
            pass

    monkeypatch.setattr("ctypes.CDLL", Nothing)
    assert not tfkern.keep_memory()
