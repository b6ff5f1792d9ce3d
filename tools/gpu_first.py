"""The first ten minutes on a GPU: `make gpu-first`.

Each part has a time limit and runs whatever became of the others; a line at the end says how each
ended, and the status is 1 if one failed. What is measured goes to benchmarks/results/<gpu>.csv,
which `tfkern bench suite` writes after every case. The most important come first, since a GPU may
be taken away at any time:

    python tools/gpu_first.py [PART ...]
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPS = ("attention", "cross_entropy", "layer_norm", "mlp", "rotary")
TESTS = [f"tests/test_{op}.py" for op in OPS]
# A product, a copy, and one call of each kernel of the ops: fails at once where nothing can work.
HEALTH = """
import torch
import tfkern
from tfkern.benchmarks import environment, measure
print(environment.facts("cuda"))
for unit in ("TFLOP/s", "GB/s"):
    print(unit, measure.highest_rate(unit, "cuda", "bfloat16"))
q = torch.randn(2, 8, 512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
for backend in ("triton", "native"):
    tfkern.attention(q, q, q, causal=True, backend=backend).sum().backward()
    torch.cuda.synchronize()
    print(backend, "ran")
"""
# 300 runs on two streams at once, forward and backward, must give the same bits.
REPEATS = """
import torch
import tfkern
q, k, v, do = (
    torch.randn(2, 8, 4224, 128, device="cuda", dtype=torch.bfloat16, requires_grad=n < 3)
    for n in range(4)
)
for backend in ("triton", "native"):
    def run():
        o = tfkern.attention(q, k, v, causal=True, backend=backend)
        return o, *torch.autograd.grad(o, (q, k, v), do)
    first = run()
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for n in range(300):
        with torch.cuda.stream(streams[n % 2]):
            again = run()
        torch.cuda.synchronize()
        assert all(map(torch.equal, first, again)), f"{backend}: run {n} differs"
"""


@dataclass(frozen=True)
class Part:
    name: str
    seconds: int  # its time limit
    command: list[str]


def parts() -> list[Part]:
    python = [sys.executable]
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    suite = [*python, "-m", "tfkern_program", "bench", "suite"]
    found = [
        Part("health", 60, [*python, "-c", HEALTH]),
        Part("tests", 120, [*python, "-m", "pytest", "-q", *side_by_side, "-k", CHOSEN, *TESTS]),
        Part("repeats", 45, [*python, "-c", REPEATS]),
        Part("benchmarks", 260, [*suite, "--budget", "200"]),
    ]
    if sanitizer := shutil.which("compute-sanitizer", path=_SEARCHED):
        for tool in ("memcheck", "racecheck"):
            # Without a cache every allocation of torch has bounds of its own.
            plain = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
            checked = [*plain, sanitizer, "--tool", tool, "--error-exitcode", "1", *python]
            few = [*checked, "-m", "pytest", "-q", "-k", SANITIZED, *TESTS]
            found.append(Part(tool, 60, few))
    if profiler := shutil.which("ncu", path=_SEARCHED):
        case = "import torch, tfkern; q = torch.randn(2, 16, 8192, 128, device='cuda', "
        case += "dtype=torch.bfloat16); [tfkern.attention(q, q, q, backend=b) "
        case += "for b in ('triton', 'native')]"
        found.append(Part("profile", 60, [profiler, "--set", "full", *python, "-c", case]))
    return found


CHOSEN = "(native or triton) and (matches or activations or long_rows or residual)"
SANITIZED = "(native or triton) and bfloat16 and test_matches_torch"
_SEARCHED = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))


def run(part: Part) -> str:
    """How the part ended. After its time, it and all processes that it started are stopped."""
    process = subprocess.Popen(part.command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(part.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {part.seconds} s"
    return "passed" if status == 0 else f"failed with status {status}"


def main(chosen: list[str], every: list[Part]) -> int:
    ended = {}
    for part in every:
        if chosen and part.name not in chosen:
            continue
        print(f"---- {part.name}, at most {part.seconds} s", flush=True)
        start = time.monotonic()
        try:
            ended[part.name] = run(part)
        except OSError as error:
            ended[part.name] = f"could not start: {error}"
        ended[part.name] += f" ({time.monotonic() - start:.0f} s)"
    for name, how in ended.items():
        print(f"{name}: {how}", flush=True)
    return int(not all(how.startswith("passed") for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], parts()))
