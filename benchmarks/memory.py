"""Peak memory of one call beyond its inputs, scratch memory included.

On a GPU the caching allocator counts. On a CPU nothing counts what kernels allocate for themselves,
so the measure is the peak resident size of a fresh process: `python -m tfkern.benchmarks.memory`
makes the inputs, runs the op once at a small size, so that libraries and threads are up, notes the
resident size, runs the op and prints how far the peak lies above it. Linux counts resident pages
per processor and in batches, so this is exact to a few hundred kB.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .case import Case, Variant, load, prepared

_STATUS = Path("/proc/self/status")


def peak(case: Case, variant: Variant) -> int:
    """Bytes that the call holds at its peak beyond its inputs: outputs, scratch, saved tensors.

    Raises:
        RuntimeError: the process failed, with its last line; or the system keeps no such count.
    """
    if case.device.startswith("cuda"):
        return _cuda_peak(case, variant)
    request = {
        "op": case.op,
        "variant": variant.name,
        "case": asdict(case),
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tfkern.benchmarks.memory", json.dumps(request)],
        capture_output=True,
        text=True,
        # Freed blocks go back to the system at once, so that the peak is of what is alive.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    if done.returncode != 0:
        told = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"measuring the memory of {variant.name} failed: {told[-1]}")
    return int(done.stdout)


def available(device: str) -> int:
    """Bytes that can still be allocated, for deciding what not to try."""
    if device.startswith("cuda"):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    limits = [_free()]
    try:  # a container's limit, which the system's own count does not know
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            limits.append(int(limit) - int((group / "memory.current").read_text()))
    except OSError:
        pass
    return min(limits)


def _free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _run(case: Case, variant: Variant, inputs: dict) -> None:
    step = prepared(case, variant, inputs)
    output = step.forward()
    if step.backward is not None:
        step.backward(output)


def _cuda_peak(case: Case, variant: Variant) -> int:
    inputs = case.inputs()
    _run(case, variant, inputs)
    torch.cuda.synchronize(case.device)
    before = torch.cuda.memory_allocated(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    _run(case, variant, inputs)
    torch.cuda.synchronize(case.device)
    return torch.cuda.max_memory_allocated(case.device) - before


def _resident(field: str) -> int:
    """ "VmRSS", the resident size now, or "VmHWM", its peak, in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError as error:
        raise SystemExit("peak memory is measured through /proc, which is missing") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _main(request: dict) -> int:
    torch.set_num_threads(request["threads"])
    case = load(request["op"])(**request["case"])
    name = request["variant"]
    backend = name.removeprefix("tfkern ")
    backends = [backend] if backend != name else None
    variant = next(v for v in case.variants(backends) if v.name == name)
    inputs = case.inputs()
    small = case.small()
    _run(small, next(v for v in small.variants(backends) if v.name == name), small.inputs())
    if variant.eager is not None:
        _run(case, variant, inputs)  # the compiler, in this process, must not count
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the size now
        baseline = _resident("VmHWM")
    except OSError:  # not allowed here: growth below an earlier peak goes unseen
        baseline = _resident("VmRSS")
    _run(case, variant, inputs)
    return max(0, _resident("VmHWM") - baseline)


if __name__ == "__main__":
    print(_main(json.loads(sys.argv[1])))
