"""The timing protocol, in one place.

Variants are interleaved, A B A B, so that what disturbs the machine disturbs all of them. After a
warm-up every sample is one call: its forward, and if there is one its backward, timed apart. A
variant leaves the rotation once it has enough samples for quantiles and enough time for a slow
clock or a noisy neighbour to even out. On a CPU the clock is `time.perf_counter`; on a GPU it is
events, with the L2 cache overwritten before each sample, which also lets the host run ahead so that
launches do not count. What they cost is reported apart: `host` is the time of a call that starts
and ends with an idle GPU, `graph` that of a replay in a CUDA graph, where launches cost next to
nothing.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What one sample runs: forward, then backward on what forward returned, if not None."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Protocol:
    """How much to measure of each variant. The defaults suit a CPU."""

    warmup: int = 2
    min_samples: int = 5
    max_samples: int = 100
    min_seconds: float = 0.4
    long_seconds: float = 2.0  # after this, and three samples, slow calls have enough

    @classmethod
    def of(cls, device: str) -> "Protocol":
        if device.startswith("cuda"):
            return cls(warmup=10, min_samples=20, max_samples=200, min_seconds=0.2)
        return cls()

    def enough(self, samples: int, seconds: float) -> bool:
        if seconds >= self.long_seconds:
            return samples >= min(3, self.min_samples)
        if seconds >= self.min_seconds:
            return samples >= self.min_samples
        return samples >= self.max_samples


@dataclass
class Timing:
    """Samples of one variant in seconds: (forward, backward), with backward 0 if there is none."""

    samples: list[tuple[float, float]] = field(default_factory=list)
    host: float | None = None
    graph: float | None = None

    def seconds(self, which: str) -> list[float]:
        """The samples of a pass."""
        part = {
            "forward": lambda s: s[0],
            "backward": lambda s: s[1],
            "forward+backward": sum,
        }[which]
        return [part(s) for s in self.samples]

    def quantiles(self, which: str) -> tuple[float, float, float]:
        """The 20th, 50th and 80th percentile of a pass."""
        return _quantiles(self.seconds(which))


def ratio(one: Timing, other: Timing, which: str) -> tuple[float, float, float]:
    """Quantiles of one over other, sample by sample as they ran side by side."""
    # The faster one may have stayed in the rotation alone.
    pairs = zip(one.seconds(which), other.seconds(which), strict=False)
    return _quantiles([a / b for a, b in pairs])


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def interleaved(
    steps: Mapping[str, Step], device: str, protocol: Protocol | None = None
) -> dict[str, Timing]:
    """Times every step by the protocol above. The steps come warmed up."""
    protocol = protocol or Protocol.of(device)
    sample = _cuda_sampler(device) if device.startswith("cuda") else _cpu_sample
    timings = {name: Timing() for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    waiting = dict(steps)
    with _no_garbage_collection():
        while waiting:
            for name, step in list(waiting.items()):
                seconds = sample(step)
                timings[name].samples.append(seconds)
                spent[name] += sum(seconds)
                if protocol.enough(len(timings[name].samples), spent[name]):
                    del waiting[name]
    if device.startswith("cuda"):
        for name, step in steps.items():
            timings[name].host = _host_time(step)
            timings[name].graph = _graph_time(step)
    return timings


def warm_up(step: Step, protocol: Protocol) -> None:
    """Runs the step before it is timed; whatever it raises, it raises here."""
    for _ in range(protocol.warmup):
        if sum(_cpu_sample(step)) > protocol.min_seconds:  # one call as long as this is enough
            return


def product_ceiling(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large matrix product, the best that this machine does in this dtype now."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)
    return 2 * n**3 / _fastest(Step(lambda: torch.mm(a, b, out=out)), device)


def copy_ceiling(device: str) -> float:
    """Bytes/s, read and written, of a copy that no cache holds."""
    source = torch.ones(2**30 // 4 if device.startswith("cuda") else 2**28 // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(Step(lambda: target.copy_(source)), device)


def _fastest(step: Step, device: str) -> float:
    protocol = Protocol.of(device)
    warm_up(step, protocol)
    return interleaved({"": step}, device, protocol)[""].quantiles("forward")[0]


def _cpu_sample(step: Step) -> tuple[float, float]:
    start = time.perf_counter()
    output = step.forward()
    middle = time.perf_counter()
    if step.backward is None:
        return middle - start, 0.0
    step.backward(output)
    return middle - start, time.perf_counter() - middle


def _cuda_sampler(device: str) -> Callable[[Step], tuple[float, float]]:
    # Twice the L2 cache of the largest parts, so that no sample finds its inputs there.
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def sample(step: Step) -> tuple[float, float]:
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        flush.zero_()
        start.record()
        output = step.forward()
        middle.record()
        if step.backward is not None:
            step.backward(output)
        end.record()
        torch.cuda.synchronize(device)
        forward = start.elapsed_time(middle) / 1e3
        return forward, middle.elapsed_time(end) / 1e3 if step.backward is not None else 0.0

    return sample


def _host_time(step: Step, samples: int = 20) -> float:
    def sample() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = step.forward()
        if step.backward is not None:
            step.backward(output)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return statistics.median(sample() for _ in range(samples))


def _graph_time(step: Step, replays: int = 20) -> float | None:
    """Seconds of a replay; None if the step cannot be captured, as some cannot."""

    def run() -> Tensor | None:
        output = step.forward()
        return output if step.backward is None else step.backward(output)

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / replays


@contextmanager
def _no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
