"""Peak memory of one call beyond its inputs, scratch memory included.

On a GPU the caching allocator counts the bytes. On a CPU nothing counts what kernels allocate for
themselves, so the measure is the peak resident size of a fresh process: `print_peak` makes the
inputs, runs the op once at a small size to start libraries and threads, notes the resident size,
runs the op and prints how far the peak lies above that size. Linux counts resident pages per
processor and in batches, so the result is exact to a few hundred kB.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .case import Case, Variant, load, prepared

# Freed blocks go back to the system at once, so that a peak counts only blocks in use.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_STATUS = Path("/proc/self/status")
_GROUPS = Path("/sys/fs/cgroup")


def peak(case: Case, variant: Variant) -> int:
    """Bytes that the call holds at its peak beyond its inputs: outputs, scratch, saved tensors.

    Raises:
        RuntimeError: the process failed (the message is its last line), or there is no /proc.
    """
    if case.device.startswith("cuda"):
        return _cuda_peak(case, variant)
    request = {
        "op": case.op,
        "variant": variant.name,
        "case": asdict(case),
        "threads": torch.get_num_threads(),
    }
    call = (os.getpid(), __name__, "print_peak", json.dumps(request))
    child = subprocess.Popen(
        [sys.executable, "-c", f"from tfkern_program import attached; attached{call}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the parent handles interrupts at the terminal
        env=os.environ | GIVEN_BACK | {"PYTHONSAFEPATH": "1"},
    )
    try:
        out, told = child.communicate()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)  # and the compilers that it started
        child.wait()
        raise
    if child.returncode != 0:
        last = (told.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise RuntimeError(f"measuring the memory of {variant.name} failed: {last}")
    return int(out)


def footprint(case: Case, variant: Variant) -> tuple[int, int]:
    """Peak bytes of tensors: in a call or the making of its inputs; and in the call alone, without
    inputs, outputs and gradients.

    It adds up tensors without memory, so any length takes no time. Memory that kernels allocate for
    themselves is not counted.
    """
    with FakeTensorMode(), _Alive() as alive:
        try:
            inputs = case.inputs()
            made, alive.peak = alive.peak, alive.now
            results = prepared(case, variant, inputs, traced=True).run()
            whole, beside = max(made, alive.peak), alive.peak - alive.now
            del results  # kept alive until here
            return whole, beside
        except Exception as error:  # count up to where the trace failed
            overflow = "overflow" in str(error)  # more bytes than there are addresses
            return 2**63 if overflow else alive.peak, 0


class _Alive(TorchDispatchMode):
    """Adds up the bytes of the storages that operators make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, count: int) -> None:
        self.now -= count


def available(device: str) -> int:
    """Bytes that can still be allocated: what needs more is not tried."""
    if device.startswith("cuda"):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([_free(), *_left_in_containers()])


def _left_in_containers() -> Iterator[int]:
    """Bytes that the memory limits of containers leave; the system's own count ignores them."""
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # cgroups of version 1
    ):
        group = _GROUPS / folder
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            yield int((group / limit).read_text()) - int((group / used).read_text())


def _free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cuda_peak(case: Case, variant: Variant) -> int:
    inputs = case.inputs()
    prepared(case, variant, inputs).run()
    torch.cuda.synchronize(case.device)
    before = torch.cuda.memory_allocated(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    prepared(case, variant, inputs).run()
    torch.cuda.synchronize(case.device)
    return torch.cuda.max_memory_allocated(case.device) - before


def resident(field: str) -> int:
    """Bytes of a field of /proc: "VmRSS", the resident size now, or "VmHWM", its peak."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError as error:
        raise SystemExit("peak memory is measured through /proc, which is missing") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Sets the peak of this process to its present size, where the system permits that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def print_peak(text: str) -> None:
    """Prints the bytes that the requested case needs in this process."""
    request = json.loads(text)
    torch.set_num_threads(request["threads"])
    case = load(request["op"])(**request["case"])
    name = request["variant"]
    backend = name.removeprefix("tfkern ")
    backends = [backend] if backend != name else None
    variant = next(v for v in case.variants(backends) if v.name == name)
    inputs = case.inputs()
    small = case.small()
    same = next(v for v in small.variants(backends) if v.name == name)
    prepared(small, same, small.inputs()).run()
    if variant.eager is not None:
        prepared(case, variant, inputs).run()  # compiles before the count begins
    gc.collect()
    reset_peak()  # if it fails, growth below an earlier peak is missed
    baseline = resident("VmRSS")
    prepared(case, variant, inputs).run()
    print(max(0, resident("VmHWM") - baseline))
