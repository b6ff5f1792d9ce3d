"""The timing protocol, in one place.

Variants are interleaved, A B A B, so that a disturbance of the machine affects all of them. After a
warm-up every sample is one call: its forward, and its backward if it has one, timed separately. A
variant leaves the rotation once it has enough samples for quantiles and enough time for a slow
clock or a noisy neighbour to even out. On a CPU the clock is `time.perf_counter`. On a GPU it is
events: the L2 cache is overwritten before each sample, and the GPU is held busy for a millisecond
while the host runs ahead, so that launches do not count. Launches are reported by two more times:
`host` is the time of a call that starts and ends with an idle GPU, `graph` the time to replay a
CUDA graph of the call.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Step:
    """What one sample runs: forward, then, if not None, backward on what forward returned."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None

    def run(self) -> Any:
        """Runs the step once, and returns all that it makes."""
        output = self.forward()
        return output, None if self.backward is None else self.backward(output)


@dataclass(frozen=True)
class Protocol:
    """How much to measure of each variant. The defaults suit a CPU."""

    warmup: int = 2
    min_samples: int = 5
    max_samples: int = 100
    min_seconds: float = 0.4
    long_seconds: float = 2.0  # after this time 3 samples are enough

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
    """Samples of one variant: seconds of (forward, backward), with 0 for no backward."""

    samples: list[tuple[float, float]] = field(default_factory=list)
    # Seconds by pass (forward, forward+backward); empty on a CPU.
    host: dict[str, float] = field(default_factory=dict)
    graph: dict[str, float] = field(default_factory=dict)
    failure: str | None = None  # the error raised while it was timed
    uncaptured: str | None = None  # why no graph was captured

    def seconds(self, pass_: str) -> list[float]:
        """The seconds of all samples for a pass. Raises RuntimeError if the step failed."""
        if self.failure is not None:
            raise RuntimeError(self.failure)
        part = {
            "forward": lambda s: s[0],
            "backward": lambda s: s[1],
            "forward+backward": sum,
        }[pass_]
        return [part(s) for s in self.samples]

    def quantiles(self, pass_: str) -> tuple[float, float, float]:
        """The 20th, 50th and 80th percentile of the seconds of a pass."""
        return _quantiles(self.seconds(pass_))


def ratio(one: Timing, other: Timing, pass_: str) -> tuple[float, float, float]:
    """Quantiles of one / other, by pairs of samples that ran side by side."""
    # The faster one may have more samples: it stays in the rotation longer.
    pairs = zip(one.seconds(pass_), other.seconds(pass_), strict=False)
    return _quantiles([a / b for a, b in pairs])


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def interleaved(
    steps: Mapping[str, Step],
    device: str,
    protocol: Protocol | None = None,
    *,
    graphs: bool = True,
) -> dict[str, Timing]:
    """Times every step by the protocol of this module. The steps must be warm.

    A step that raises leaves the rotation, and has its failure instead of a time. Without `graphs`
    no CUDA graph is captured. After a failed capture no other is tried: it may leave torch's
    allocator in a state that only a new process gets rid of.
    """
    protocol = protocol or Protocol.of(device)
    cuda = device.startswith("cuda")
    sample = _cuda_sampler(device) if cuda else _cpu_sample
    timings = {name: Timing() for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    waiting = dict(steps)
    with _no_garbage_collection():
        while waiting:
            for name, step in list(waiting.items()):
                timing = timings[name]
                try:
                    seconds = sample(step)
                    timing.samples.append(seconds)
                    spent[name] += sum(seconds)
                    if protocol.enough(len(timing.samples), spent[name]):
                        if cuda:
                            timing.host = _host_times(step, device)
                        del waiting[name]
                except Exception as error:
                    timing.failure = reason(error)
                    del waiting[name]
                    synchronize(device)
    if cuda and graphs:
        gc.collect()  # remains of earlier calls belong to another stream
        for name, step in steps.items():
            if timings[name].failure is None:
                _add_graph_times(timings[name], step, device, sample)
            if timings[name].uncaptured is not None:
                break
    return timings


def warm_up(step: Step, protocol: Protocol, device: str = "cpu") -> float:
    """Runs the step before it is timed. Errors of the step are raised here.

    Returns the seconds of the last call.
    """
    seconds = 0.0
    for _ in range(protocol.warmup):
        start = time.perf_counter()
        _cpu_sample(step)
        synchronize(device)  # errors of kernels arrive only now
        seconds = time.perf_counter() - start
        if seconds > protocol.min_seconds:  # one long call is enough
            break
    return seconds


def synchronize(device: str) -> None:
    """Waits for a GPU. Raises if an earlier failure has ruined the context of this process."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def reason(error: BaseException) -> str:
    """An exception as one short line."""
    ours = isinstance(error, NotImplementedError)  # its message is a sentence
    text = " ".join((str(error) if ours else f"{type(error).__name__}: {error}").split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def product_ceiling(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large matrix product: the highest rate of this machine now, in this dtype."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)
    return 2 * n**3 / _fastest(Step(lambda: torch.mm(a, b, out=out)), device)


def copy_ceiling(device: str) -> float:
    """Bytes/s, read and written, of a copy that fits into no cache."""
    source = torch.ones(2**30 // 4 if device.startswith("cuda") else 2**28 // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(Step(lambda: target.copy_(source)), device)


def _fastest(step: Step, device: str) -> float:
    protocol = Protocol.of(device)
    warm_up(step, protocol, device)
    timings = interleaved({"": step}, device, protocol, graphs=False)
    return timings[""].quantiles("forward")[0]


def _cpu_sample(step: Step) -> tuple[float, float]:
    start = time.perf_counter()
    output = step.forward()
    middle = time.perf_counter()
    if step.backward is None:
        return middle - start, 0.0
    step.backward(output)
    return middle - start, time.perf_counter() - middle


# About 1 ms on any GPU: longer than it takes to launch steps so short that launches dominate.
_SPIN_CYCLES = 2_000_000


def _cuda_sampler(device: str) -> Callable[[Step], tuple[float, float]]:
    # Several times the largest L2 cache, so that no sample finds its inputs in the cache.
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def sample(step: Step) -> tuple[float, float]:
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        flush.zero_()
        torch.cuda._sleep(_SPIN_CYCLES)
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


def _calls(step: Step) -> dict[str, Callable[[], Any]]:
    """By pass, the call for host and graph times. A backward cannot be called alone."""
    both = {} if step.backward is None else {"forward+backward": step.run}
    return {"forward": step.forward} | both


def _host_times(step: Step, device: str) -> dict[str, float]:
    """By pass, seconds by the host's clock of a call that starts and ends with an idle GPU."""
    times = {}
    for pass_, call in _calls(step).items():
        samples: list[float] = []
        while not samples or (len(samples) < 20 and sum(samples) < 0.05):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            torch.cuda.synchronize(device)
            samples.append(time.perf_counter() - start)
        times[pass_] = statistics.median(samples)
    return times


def _add_graph_times(
    timing: Timing, step: Step, device: str, sample: Callable[[Step], tuple[float, float]]
) -> None:
    """Adds the seconds of a replay for each pass, with a cold cache, or why there are none.

    Calls of more than 10 ms get none: capturing takes as much memory again, and for them the cost
    of launches is negligible.
    """
    side = torch.cuda.Stream(device)
    current = torch.cuda.current_stream(device)
    for pass_, call in _calls(step).items():
        if timing.quantiles(pass_)[1] > 0.01:
            continue
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(current):  # restored also if torch.cuda.graph fails
                side.wait_stream(current)
                with torch.cuda.stream(side):  # libraries allocate per stream
                    call()
                torch.cuda.synchronize(device)
                with torch.cuda.graph(graph, stream=side):
                    call()
        except RuntimeError as error:
            timing.uncaptured = reason(error)
            torch.cuda.synchronize(device)
            return
        replay = Step(graph.replay)
        sample(replay)
        times = [sample(replay)[0] for _ in range(10)]
        timing.graph[pass_] = statistics.median(times)
        graph.reset()


@contextmanager
def _no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
