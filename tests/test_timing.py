"""The timing protocol: on a GPU with a stub of torch.cuda, whose clock only calls advance."""

import contextlib
import statistics
from dataclasses import replace

import pytest
import torch

from tfkern.benchmarks import attention, measure, timing
from tfkern.benchmarks.case import BOTH, FORWARD, Variant

_QUICK = timing.Protocol(warmup=1, min_samples=2, max_samples=2, min_seconds=0)


def test_variants_are_interleaved_until_each_has_enough():
    calls = []
    steps = {name: timing.Step(lambda name=name: calls.append(name)) for name in "ab"}
    protocol = timing.Protocol(warmup=0, min_samples=3, max_samples=3, min_seconds=0)
    timings = timing.interleaved(steps, "cpu", protocol)
    assert "".join(calls) == "ababab"
    assert [len(t.samples) for t in timings.values()] == [3, 3]


def test_quantiles():
    samples = [(float(i), 2.0 * i) for i in range(11)]
    assert timing.Timing(samples).quantiles("forward") == (2, 5, 8)
    assert timing.Timing(samples).quantiles("forward+backward") == (6, 15, 24)


def test_a_ratio_is_of_pairs():
    one = timing.Timing([(1.0, 9.0), (4.0, 9.0), (30.0, 9.0)])
    other = timing.Timing([(2.0, 3.0), (4.0, 9.0), (10.0, 1.0), (1e-6, 1e-6)])  # went on alone
    assert timing.ratio(one, other, "forward") == pytest.approx((0.7, 1, 2.2))  # 0.5, 1, 3
    assert timing.ratio(one, other, "backward")[1] == 3
    assert timing.ratio(one, other, "forward+backward")[1] == 2


class Cuda:
    """torch.cuda as far as timing needs it, with a clock that only calls advance."""

    def __init__(self, monkeypatch):
        self.now, self.captured, self.stream, self.log = 0.0, None, "current", []
        self.broken: Exception | None = None
        cuda, empty = self, torch.empty

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                cuda.now += self.seconds

            def reset(self):
                cuda.log.append("reset")

        class Stream:
            def __init__(self, device):
                assert device == "cuda:0"

            def wait_stream(self, other):
                assert other == "current"

        @contextlib.contextmanager
        def stream(chosen):
            before, cuda.stream = cuda.stream, chosen
            try:
                yield
            finally:
                cuda.stream = before

        @contextlib.contextmanager
        def capture(graph, stream):
            start, before = cuda.now, cuda.stream
            cuda.stream = stream
            yield
            if cuda.broken is not None:
                raise cuda.broken  # like capture_end(), before the stream is restored
            graph.seconds, cuda.now, cuda.stream = cuda.now - start, start, before

        fakes = {
            "Event": Event, "CUDAGraph": Graph, "Stream": Stream, "stream": stream,
            "graph": capture, "current_stream": lambda device: "current",
            "synchronize": lambda device: cuda.log.append(f"synchronize {device}"),
            "_sleep": lambda cycles: cuda.advance(0.001),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(1))
        monkeypatch.setattr(timing.time, "perf_counter", lambda: cuda.now)

    def advance(self, seconds):
        self.now += seconds

    def step(self, forward, backward=None):
        run = None if backward is None else lambda output: self.advance(backward)
        return timing.Step(lambda: self.advance(forward), run)


def test_times_of_a_gpu(monkeypatch):
    cuda = Cuda(monkeypatch)
    steps = {"both": cuda.step(0.002, 0.003), "forward": cuda.step(0.004), "long": cuda.step(0.02)}
    timings = timing.interleaved(steps, "cuda:0", _QUICK)
    assert timings["both"].samples == [pytest.approx((0.002, 0.003))] * 2
    assert timings["forward"].samples == [pytest.approx((0.004, 0.0))] * 2
    halves = {FORWARD: pytest.approx(0.002), BOTH: pytest.approx(0.005)}
    assert timings["both"].host == timings["both"].graph == halves
    assert timings["forward"].graph == {FORWARD: pytest.approx(0.004)}
    assert timings["long"].host == {FORWARD: pytest.approx(0.02)}
    assert timings["long"].graph == {}  # launches are nothing beside it
    assert cuda.stream == "current" and cuda.log.count("reset") == 3
    assert all(t.failure is None and t.uncaptured is None for t in timings.values())
    case, variant = attention.OpCase(length=64, backward=True), Variant("both", attention.plain)
    found = measure.Timed({"both": timings["both"]})
    (row,) = measure.rows({}, case, [variant], found, 1e12, passes=[BOTH])
    assert row["host_ms"] == row["graph_ms"] == pytest.approx(5)


def test_no_graph_is_captured_after_one_that_failed(monkeypatch):
    cuda = Cuda(monkeypatch)
    cuda.broken = RuntimeError("operation failed due to a previous error during capture")
    timings = timing.interleaved({n: cuda.step(0.001) for n in "ab"}, "cuda:0", _QUICK)
    assert "previous error" in timings["a"].uncaptured and timings["b"].uncaptured is None
    assert timings["a"].graph == timings["b"].graph == {}
    assert timings["a"].host and timings["b"].host and timings["a"].failure is None
    assert cuda.stream == "current"
    assert (
        timing.interleaved({"a": cuda.step(0.001)}, "cuda:0", _QUICK, graphs=False)["a"].graph == {}
    )


def test_a_warm_up_waits_for_the_gpu(monkeypatch):
    cuda = Cuda(monkeypatch)
    protocol = replace(_QUICK, warmup=3, min_seconds=0.01)
    assert timing.warm_up(cuda.step(0.001), protocol, "cuda:0") == pytest.approx(0.001)
    assert cuda.log == ["synchronize cuda:0"] * 3
    assert timing.warm_up(cuda.step(0.02, 0.03), protocol, "cuda:0") == pytest.approx(0.05)
    assert cuda.log == ["synchronize cuda:0"] * 4


def test_a_lost_context_ends_the_timing(monkeypatch):
    """A failure of one step is its own, unless every later call would fail as well."""
    cuda = Cuda(monkeypatch)

    def fails():
        raise RuntimeError("CUDA error")

    timings = timing.interleaved({"a": timing.Step(fails), "b": cuda.step(1)}, "cuda:0", _QUICK)
    assert timings["a"].failure == "RuntimeError: CUDA error" and len(timings["b"].samples) == 2

    def lost(device):
        raise RuntimeError("the context is lost")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="the context is lost"):
        timing.interleaved({"a": timing.Step(fails)}, "cuda:0", _QUICK)


def test_host_times_are_medians(monkeypatch):
    cuda = Cuda(monkeypatch)
    lengths = iter([0.025, 0.005, 0.015, 0.01, 0.5])
    taken = []

    def forward():
        taken.append(next(lengths))
        cuda.advance(taken[-1])

    times = timing._host_times(timing.Step(forward), "cuda:0")
    assert times == {FORWARD: pytest.approx(statistics.median(taken))}
    assert taken == [0.025, 0.005, 0.015, 0.01]  # until they add up to enough
