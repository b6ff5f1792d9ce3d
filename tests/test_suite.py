"""The fixed cases on a GPU: what they count, write, leave out and survive; no time is asserted."""

import csv
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import planted
import pytest
import torch
import torch.nn.functional as F

from tfkern.benchmarks import (
    attention,
    cross_entropy,
    environment,
    layer_norm,
    linear_cross_entropy,
    measure,
    memory,
    mlp,
    report,
    rotary,
    suite,
    timing,
)
from tfkern.benchmarks.case import BACKWARD, BOTH, FORWARD, Variant
from tfkern.benchmarks.measure import MEASURED, disagreement
from tfkern.benchmarks.suite import Point
from tfkern.benchmarks.worker import Lost, Worker, _serve
from tfkern.cli import main

_QUICK = timing.Protocol(warmup=1, min_samples=2, max_samples=2, min_seconds=0)
_FACTS = {"device": "NVIDIA H100", "instructions": "", "torch": "2.11", "tfkern": "0.1"}
_FACTS |= {"commit": "abc", "date": "now", "command": "x"}
# The dtype is float64, where the limits leave nothing to the luck of few numbers.
_SMALL = {"dtype": "float64", "backward": True}


class Inline:
    """A worker in this process."""

    def ask(self, function, *arguments):
        return function(*arguments, lambda doing: None)

    def stop(self):
        pass


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the parts that take seconds, and makes facts that do not change."""
    monkeypatch.setattr(timing, "product_ceiling", lambda dtype, device: 1e11)
    monkeypatch.setattr(timing, "copy_ceiling", lambda device: 1e10)
    monkeypatch.setattr(memory, "peak", lambda case, variant: 1000 * case.length)
    facts = dict(_FACTS)
    monkeypatch.setattr(environment, "facts", lambda device: dict(facts))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small sizes; threads that wait for a busy machine cost most
    yield facts
    torch.set_num_threads(threads)


def _doubled(length, *chosen):
    return Point(f"length {length}", planted.Doubled(length=length, chosen=chosen or ("right",)))


def _run(cases, path, **options):
    return suite.run(cases, path, **{"protocol": _QUICK, "worker": Inline()} | options)


def _status(rows):
    return {(r["case"], r["variant"]): r["status"] for r in rows if r["op"] != "probe"}


def test_the_cases_are_those_of_the_field():
    found = {}
    for point in suite.points():
        found.setdefault(type(point.case), []).append(point.case)
    swept = found[attention.OpCase]
    assert {c.batch * c.length for c in swept} == {16384}
    assert {c.heads * c.head_dim for c in swept} == {2048}
    lengths = {512, 1024, 2048, 4096, 8192, 16384}
    every = {(n, d, m) for n in lengths for d in (64, 128, 256) for m in (False, True)}
    assert len(swept) == 36 and {(c.length, c.head_dim, c.causal) for c in swept} == every
    norms = {(c.length, c.hidden, c.residual) for c in found[layer_norm.OpCase]}
    widths = {(16384, 2**n, r) for n in range(10, 16) for r in (False, True)}
    assert norms == widths | {(4096, 1024, False), (4096, 1024, True)}
    assert {(c.hidden, c.hidden * c.expansion) for c in found[mlp.OpCase]} == {(4096, 16384)}
    turns = {(c.batch * c.length, c.heads, c.key_heads, c.head_dim) for c in found[rotary.OpCase]}
    assert turns == {(16384, 16, 16, 128), (16384, 16, 4, 128)}
    losses = {(c.length, c.vocabulary) for c in found[cross_entropy.OpCase]}
    assert losses == {(8192, 32000), (8192, 131072)}
    heads = {(c.length, c.hidden, c.vocabulary) for c in found[linear_cross_entropy.OpCase]}
    assert heads == {(8192, 4096, 131072)}
    decodes = found[attention.Decode]
    assert {(c.batch, c.length, c.queries, c.heads * c.head_dim) for c in decodes} == {
        (32, 8192, 1, 2048)
    }
    assert {c.key_heads for c in decodes} == {16, 4}
    names = [(p.case.op, p.name) for p in suite.points()]
    assert len(set(names)) == len(names)
    for point in suite.points("cuda:1"):
        assert point.case.device == "cuda:1" and point.case.dtype == "bfloat16"
        assert point.case.backward != isinstance(point.case, attention.Decode)


def test_work_of_the_cases_in_closed_form():
    for point in suite.points():
        c = point.case
        if isinstance(c, attention.Decode):
            forward = 2 * 32 * c.key_heads * 8192 * 128 * 2  # bytes of keys and values
        elif isinstance(c, attention.OpCase):
            forward = 4 * c.batch * c.heads * c.length**2 * c.head_dim // (2 if c.causal else 1)
            assert forward == 4 * 16384 * 2048 * c.length // (2 if c.causal else 1)
            assert c.work(BACKWARD) == 2.5 * forward and c.work(BOTH) == 3.5 * forward
        elif isinstance(c, mlp.OpCase):
            forward = 2 * (2 * 16384 * 4096 * 16384)
            assert c.work(BACKWARD) == 2 * forward
        elif isinstance(c, linear_cross_entropy.OpCase):
            forward = 2 * 8192 * 4096 * 131072
            assert c.work(BACKWARD) == 2 * forward and c.work(BOTH) == 3 * forward
        elif isinstance(c, cross_entropy.OpCase):
            forward = 8192 * c.vocabulary * 2
            assert c.work(BACKWARD) == 2 * forward and c.work(BOTH) == 3 * forward
        elif isinstance(c, rotary.OpCase):
            forward = 2 * 16384 * (c.heads + c.key_heads) * 128 * 2
            assert c.work(BACKWARD) == forward and c.work(BOTH) == 2 * forward
        else:
            tensor = c.length * c.hidden * 2
            forward = (4 if c.residual else 2) * tensor
            assert c.work(BACKWARD) == (4 if c.residual else 3) * tensor
        assert c.work(FORWARD) == forward, point.name


def test_variants_of_the_cases():
    names = {}
    for point in suite.points():
        variants = {v.name: v for v in point.variants()}
        names.setdefault(type(point.case), list(variants))
        if "flex" in variants and point.case.backward:
            compiled = variants["flex"].unavailable is None
            assert compiled == (point.case.length in suite.FLEX_LENGTHS)
    ours = ["tfkern triton", "tfkern native"]
    torchs = ["plain", "sdpa flash", "sdpa efficient", "sdpa cudnn", "flex"]
    assert set(names[attention.OpCase]) == {*torchs, *ours} == set(names[attention.Decode])
    assert set(names[layer_norm.OpCase]) == {"torch", "torch.compile", "liger", *ours}
    assert set(names[rotary.OpCase]) == set(names[layer_norm.OpCase])
    assert set(names[mlp.OpCase]) == {"torch", "torch.compile", *ours}


def test_cases_of_a_kind_differ_in_length_and_batch_only():
    kinds = {p.kind for p in suite.points() if isinstance(p.case, attention.OpCase)}
    assert len(kinds) == 6 + 2


@pytest.mark.parametrize(
    "case",
    [
        attention.OpCase(length=40, batch=3, heads=4, head_dim=16, causal=True, backward=True),
        attention.Decode(length=40, batch=3, heads=8, key_heads=4, head_dim=16),
        attention.Decode(length=40, batch=3, heads=8, key_heads=1, head_dim=16),
        layer_norm.OpCase(length=192, hidden=48, residual=True, backward=True),
        mlp.OpCase(length=192, hidden=48, backward=True),
        cross_entropy.OpCase(length=192, vocabulary=300, backward=True),
        linear_cross_entropy.OpCase(length=192, hidden=48, vocabulary=300, backward=True),
    ],
    ids=lambda case: type(case).__module__.rpartition(".")[2],
)
def test_an_excerpt_repeated_makes_the_whole(case):
    """The variants agree with float64 at the whole size, and one that mixes rows does not."""
    part = {n: x.shape for n, x in case.excerpt().inputs().items()}
    whole = {n: x.shape for n, x in case.inputs().items()}
    assert all(n % m == 0 for k in part for m, n in zip(part[k], whole[k], strict=True))
    assert part != whole
    variants = [v for v in case.variants() if v.eager is None]
    assert len(variants) >= 2
    for variant in variants:
        torch.manual_seed(0)
        assert disagreement(case.excerpt(), variant, case) is None, variant.name
    # Swaps the last two rows or heads of the first argument: the first rows stay as they are only
    # in the excerpt, where it is told by the shape that it is not to.
    dim = 1 if whole[next(iter(whole))][1] > 1 else 0

    def mixing(**inputs):
        name = next(iter(inputs))
        if inputs[name].shape == whole[name]:
            inputs[name] = inputs[name].roll(1, dim)
        return case.reference(**inputs)

    planted_one = Variant("mixing", mixing)
    assert disagreement(case.excerpt(), planted_one) is None
    assert disagreement(case.excerpt(), planted_one, case) is not None


def test_rows(quick, tmp_path):
    path = tmp_path / "gpu.csv"
    cases = [
        Point("a", attention.OpCase(length=16, heads=2, head_dim=8, causal=True, **_SMALL)),
        Point("d", attention.Decode(length=16, heads=2, head_dim=8, dtype="float64")),
        Point("n", layer_norm.OpCase(length=64, hidden=32, **_SMALL)),
    ]
    told = []
    results = _run(cases, path, progress=told.append)
    assert told == ["the best product and copy", "attention a", "attention d", "layer_norm n"]
    assert not results.wrong and not results.skipped
    rows = report.read(path)
    assert len(rows) == len(results.rows)
    probes = [r for r in rows if r["op"] == "probe"]
    assert [(r["rate"], r["unit"]) for r in probes] == [("0.1", "TFLOP/s"), ("10.0", "GB/s")]
    for point in cases:
        own = [r for r in rows if r["case"] == point.name]
        variants = [v.name for v in point.variants()]
        expected = [(w, v) for w in point.case.passes for v in variants]
        assert [(r["pass"], r["variant"]) for r in own] == expected
    measured = [r for r in rows if r["status"] == MEASURED and r["op"] != "probe"]
    assert {r["variant"] for r in measured} >= {"plain", "sdpa flash", "torch"}
    for row in measured:
        case = next(p.case for p in cases if p.name == row["case"])
        assert row["unit"] == case.unit and int(row["samples"]) == 2
        p20, p50, p80 = (float(row[f"p{q}_ms"]) for q in (20, 50, 80))
        assert p20 <= p50 <= p80
        scale = 1e12 if case.unit == "TFLOP/s" else 1e9
        rate = case.work(row["pass"]) / (p50 / 1e3) / scale
        assert float(row["rate"]) == pytest.approx(rate, rel=2e-3)
        ceiling = {"TFLOP/s": 0.1, "GB/s": 10.0}[case.unit]
        assert float(row["ceiling"]) == ceiling
        assert float(row["fraction_of_ceiling"]) == pytest.approx(rate / ceiling, rel=2e-3)
        last = row["pass"] == case.passes[-1]
        assert row["peak_bytes"] == (str(1000 * case.length) if last else "")
        assert row["against"] in {"plain", "sdpa flash", "torch", "torch.compile"}
        assert float(row["ratio_p50"]) == 1.0 or row["against"] != row["variant"]
    for row in rows:
        assert {k: row[k] for k in _FACTS} == _FACTS
        if row["variant"] == "tfkern triton":
            assert "CUDA devices" in row["status"] and row["p50_ms"] == row["ratio_p50"] == ""


def test_a_ratio_is_to_the_fastest_of_torch():
    seconds = {"plain": 4.0, "sdpa flash": 2.0, "liger": 0.1, "tfkern native": 1.0}
    timings = {name: timing.Timing([(s, s)] * 3) for name, s in seconds.items() if name != "plain"}
    point = Point("a", attention.OpCase(length=16, backward=False))
    variants = [Variant(name, planted.right) for name in seconds]
    found = measure.Timed(timings, {"plain": "failed in the end"})
    rows = suite._rows(point, variants, found, 1e11)
    assert [r["against"] for r in rows] == [None, "sdpa flash", "sdpa flash", "sdpa flash"]
    assert [r["ratio_p50"] for r in rows] == [None, 1.0, 20.0, 2.0]


def test_what_fails_costs_its_row_only(quick, tmp_path):
    path = tmp_path / "gpu.csv"
    chosen = ("right", "refuses", "has_no_kernel", "wrong", "leaks", "slower")
    results = _run([_doubled(8, *chosen), _doubled(16)], path)
    status = _status(report.read(path))
    assert status["length 8", "right"] == status["length 8", "slower"] == MEASURED
    assert status["length 8", "refuses"] == "ValueError: not this size"
    why = "RuntimeError: No available kernel.; Flash is off; Flash wants a GPU"
    assert status["length 8", "has_no_kernel"] == why
    assert status["length 8", "wrong"].startswith("wrong: output is off by ")
    assert status["length 8", "leaks"].startswith("wrong: output is off by ")
    assert status["length 8", "absent"] == "is not here"
    assert status["length 16", "right"] == MEASURED
    assert sorted(results.wrong) == [f"{v}, doubled length 8," for v in ("leaks", "wrong")]
    told = report.suite_failures(results.rows)
    assert "refuses: ValueError: not this size (doubled length 8)" in told
    assert "absent: is not here (doubled length 8 and 1 more)" in told
    assert len(told) == 5


def test_what_fails_while_it_is_timed_costs_its_row_only(quick, monkeypatch, tmp_path):
    calls = []

    def fragile(x):
        calls.append(x)
        if len(calls) > 2:  # after the comparison and the warm-up
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    monkeypatch.setitem(planted.VARIANTS, "slower", fragile)
    _run([_doubled(8, "right", "slower")], tmp_path / "gpu.csv")
    rows = report.read(tmp_path / "gpu.csv")
    status = _status(rows)
    assert status["length 8", "slower"] == "OutOfMemoryError: CUDA out of memory"
    assert status["length 8", "right"] == MEASURED
    right = [r for r in rows if r["variant"] == "right"]
    assert all(int(r["samples"]) == 2 for r in right) and len(calls) == 3


def test_what_does_not_fit_is_not_run(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    case = attention.OpCase(length=64, heads=2, head_dim=8)
    _run([Point("a", case)], tmp_path / "gpu.csv")
    status = _status(report.read(tmp_path / "gpu.csv"))
    assert status["a", "plain"] == "would need 65.5 kB"
    assert status["a", "sdpa flash"] == MEASURED


def test_what_takes_too_long_is_not_timed(quick, monkeypatch, tmp_path):
    seconds = iter([2.5, 0.1])
    monkeypatch.setattr(timing, "warm_up", lambda *_: next(seconds))
    _run([_doubled(8, "slower", "right")], tmp_path / "gpu.csv")
    status = _status(report.read(tmp_path / "gpu.csv"))
    assert status["length 8", "slower"] == "takes 2.5 s a call"
    assert status["length 8", "right"] == MEASURED


def test_no_case_is_begun_after_the_budget(quick, monkeypatch, tmp_path):
    path = tmp_path / "gpu.csv"
    clock = iter([0.0, 5.0, 11.0, 12.0])  # the start, then before each case
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    results = _run([_doubled(8), _doubled(16), _doubled(32)], path, budget=10)
    assert results.skipped == ["doubled length 16", "doubled length 32"]
    assert {r["case"] for r in report.read(path) if r["op"] == "doubled"} == {"length 8"}


def test_a_kill_loses_the_running_case_only(quick, tmp_path):
    path = tmp_path / "gpu.csv"

    def progress(doing):
        if doing == "doubled length 16":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run([_doubled(8), _doubled(16)], path, progress=progress)
    assert {r["case"] for r in report.read(path) if r["op"] == "doubled"} == {"length 8"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_case_replaces_its_rows_and_keeps_the_others(quick, monkeypatch, tmp_path):
    path = tmp_path / "gpu.csv"
    every = [_doubled(8), _doubled(16), _doubled(32)]
    monkeypatch.setattr(suite, "points", lambda: every[:2])
    _run(every, path)
    quick["date"] = "later"
    _run([_doubled(16, "right", "slower")], path)
    rows = report.read(path)
    dates = {(r["case"], r["date"]) for r in rows if r["op"] == "doubled"}
    assert dates == {("length 8", "now"), ("length 16", "later")}  # 32 is no longer in the suite
    assert [r["date"] for r in rows[:2]] == ["later", "later"] and rows[0]["op"] == "probe"
    own = [r["variant"] for r in rows if r["case"] == "length 16" and r["pass"] == BOTH]
    assert own == ["right", "slower", "absent"]


@pytest.mark.parametrize(
    "change, again",
    [
        ({}, False),
        ({"date": "later", "command": "y"}, False),
        ({"commit": "def"}, True),
        ({"torch": "2.12"}, True),
        ({"device": "NVIDIA H200"}, True),
    ],
)
def test_resumed_is_what_is_missing(quick, tmp_path, change, again):
    path = tmp_path / "gpu.csv"
    _run([_doubled(8)], path)
    quick |= change
    told = []
    _run([_doubled(8), _doubled(16)], path, resume=True, progress=told.append)
    assert ("doubled length 8" in told) == again
    assert "doubled length 16" in told
    assert {r["case"] for r in report.read(path)} >= {"length 8", "length 16"}


@pytest.mark.parametrize("commit", ["", "abc+changes"])
def test_unknown_code_is_never_resumed(quick, tmp_path, commit):
    quick["commit"] = commit
    for _ in range(2):
        told = []
        _run([_doubled(8)], tmp_path / "gpu.csv", resume=True, progress=told.append)
        assert "doubled length 8" in told


@pytest.fixture
def worker():
    worker = Worker("cpu")
    yield worker
    worker.stop()


def test_a_worker_survives_what_its_process_does_not(worker):
    assert worker.ask(planted.answer, 21) == 42
    with pytest.raises(Lost, match="illegal memory access") as lost:
        worker.ask(planted.raises)
    assert lost.value.doing == "computing"
    with pytest.raises(Lost, match="ended with status 3") as lost:
        worker.ask(planted.exits)
    assert lost.value.doing == "leaving"
    assert worker.ask(planted.answer, 4) == 8
    worker.patience = 0.5
    with pytest.raises(Lost, match="no sign of life") as lost:
        worker.ask(planted.hang)
    assert lost.value.doing == "sleeping"


@pytest.mark.parametrize("device, index", [("cuda", 0), ("cuda:1", 1)])
def test_a_worker_has_the_device_that_it_is_told(monkeypatch, device, index):
    """torch refuses a device without an index here, as `_get_device_index` does."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    _serve(theirs, device)
    assert [torch.cuda._utils._get_device_index(d) for d in chosen] == [index]


def test_a_variant_that_ends_the_process_is_left_out_of_its_kind(quick, tmp_path):
    path = tmp_path / "gpu.csv"
    worker = Worker("cpu")
    chosen = ("right", "dies", "slower")
    _run([_doubled(8, *chosen), _doubled(16, *chosen)], path, worker=worker)
    assert worker._process is None
    status = _status(report.read(path))
    why = "at length 8: the process ended with status 3"
    assert status["length 8", "dies"] == status["length 16", "dies"] == why
    assert status["length 8", "right"] == status["length 8", "slower"] == MEASURED
    assert status["length 16", "right"] == MEASURED


class Ruined(Inline):
    """Loses its process to what `blame` says, as often as it says."""

    def __init__(self, *blame):
        self.blame, self.stopped, self.graphs = list(blame), 0, []

    def ask(self, function, *arguments):
        if function is suite.case_rows:
            self.graphs.append(arguments[-1])
            if self.blame:
                raise Lost(self.blame.pop(0), "no sign of life for 90 s")
        return super().ask(function, *arguments)

    def stop(self):
        self.stopped += 1


def test_a_case_that_is_lost_without_a_culprit_has_rows_that_say_so(quick, tmp_path):
    worker = Ruined("right", "timing")
    chosen = ("right", "slower")
    _run([_doubled(8, *chosen), _doubled(16, *chosen)], tmp_path / "gpu.csv", worker=worker)
    status = _status(report.read(tmp_path / "gpu.csv"))
    assert status["length 8", "slower"] == "timing: no sign of life for 90 s"
    assert status["length 16", "right"] == "at length 8: no sign of life for 90 s"
    assert status["length 16", "slower"] == MEASURED


def test_a_process_is_replaced_after_a_failed_capture_and_soon_none_is_tried(
    quick, monkeypatch, tmp_path
):
    timed = timing.interleaved

    def failing(*arguments, graphs, **options):
        timings = timed(*arguments, graphs=graphs, **options)
        if graphs:
            timings["right"].uncaptured = "RuntimeError: operation not permitted"
        return timings

    monkeypatch.setattr(timing, "interleaved", failing)
    worker = Ruined()
    _run([_doubled(2**n) for n in range(5)], tmp_path / "gpu.csv", worker=worker)
    assert worker.graphs == [True, True, True, False, False]
    assert worker.stopped == 3 + 1
    rows = [r for r in report.read(tmp_path / "gpu.csv") if r["variant"] == "right"]
    assert {r["graph_failure"] for r in rows if r["case"] == "length 1"} == {
        "RuntimeError: operation not permitted"
    }
    assert {r["graph_failure"] for r in rows if r["case"] == "length 16"} == {""}


def test_memory_that_torch_keeps_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert memory.available("cuda") == 1300


@pytest.mark.parametrize(
    "case",
    [
        attention.OpCase(length=200, heads=2, head_dim=16),
        attention.OpCase(length=200, heads=2, head_dim=16, causal=True),
        attention.OpCase(length=200, heads=2, head_dim=16, window=17),
        attention.OpCase(length=200, heads=2, head_dim=16, causal=True, window=17),
        attention.Decode(length=200, batch=2, heads=8, key_heads=2, head_dim=16),
    ],
    ids=["full", "causal", "window", "causal window", "decode"],
)
def test_flex_computes_the_case(case):
    """FlexAttention runs uncompiled here: compiling takes long, and is PyTorch's business."""
    call = case._flex().eager
    inputs = case.inputs()
    torch.testing.assert_close(call(**inputs), case.reference(**inputs))
    assert "flex" in [v.name for v in replace(case, device="cuda").variants()]


def test_liger(monkeypatch, tmp_path):
    case = layer_norm.OpCase(length=8, hidden=16, residual=True, device="cuda")
    missing = next(v for v in case.variants() if v.name == "liger")
    assert missing.unavailable == "liger-kernel is not installed"
    package = tmp_path / "liger_kernel" / "ops"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "layer_norm.py").write_text(
        "import torch.nn.functional as F\n"
        "class LigerLayerNormFunction:\n"
        "    apply = staticmethod(lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    here = next(v for v in case.variants() if v.name == "liger")
    assert here.unavailable is None
    inputs = replace(case, device="cpu").inputs()
    h = inputs["x"] + inputs["residual"]
    y = F.layer_norm(h, (16,), inputs["weight"], inputs["bias"])
    for ours, theirs in zip(here.call(**inputs), (y, h), strict=True):
        torch.testing.assert_close(ours, theirs)


def _attentions():
    sizes = {"heads": 2, **_SMALL}
    return [
        Point(f"{n} {d} {m}", attention.OpCase(length=n, head_dim=d, causal=m, **sizes))
        for n in (16, 32) for d in (8, 16) for m in (False, True)
    ]  # fmt: skip


def test_charts(quick, monkeypatch, tmp_path):
    path = tmp_path / "gpu.csv"
    cases = [*_attentions()]
    cases += [
        Point(f"{n} {r}", layer_norm.OpCase(length=64, hidden=n, residual=r, **_SMALL))
        for n in (16, 32) for r in (False, True)
    ]  # fmt: skip
    every = layer_norm.OpCase.variants
    without = lambda *a: [v for v in every(*a) if v.name != "torch.compile"]  # noqa: E731
    monkeypatch.setattr(layer_norm.OpCase, "variants", without)
    _run(cases, path)
    known = {(p.case.op, p.name): p.case for p in cases}
    drawn = report.suite_charts(path, known)
    stems = ["gpu-attention-forward", "gpu-attention-backward", "gpu-layer_norm"]
    assert [p.name for p in drawn] == [f"{stem}.png" for stem in stems]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)

    taken = {}
    monkeypatch.setattr(report, "rate_chart", lambda panels, *a: taken.setdefault(a[-1], panels))
    report.suite_charts(path, known)
    panels = taken[tmp_path / "gpu-attention-backward.png"]
    masks = [f"D={d}, {m}" for m in ("full", "causal") for d in (8, 16)]
    assert [p.title for p in panels] == masks
    with path.open() as file:
        rows = {(r["case"], r["pass"], r["variant"]): r for r in csv.DictReader(file)}
    for variant, line in panels[3].lines.items():
        assert dict(line) == {
            n: float(rows[f"{n} 16 True", BACKWARD, variant]["rate"]) for n in (16, 32)
        }
    assert {"plain", "sdpa flash"} <= set(panels[3].lines) and panels[3].ceiling == 0.1
    norms = taken[tmp_path / "gpu-layer_norm.png"]
    assert [p.title for p in norms] == [
        f"{a}layer norm, {w}" for a in ("", "addition and ") for w in (FORWARD, BACKWARD)
    ]
    assert sorted(x for x, _ in norms[0].lines["torch"]) == [16, 32]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (
            ["nope"],
            "unknown op 'nope': expected one of attention, cross_entropy, layer_norm, mlp, rotary",
        ),
        (["--device", "cpu"], "the suite's cases are for a GPU, got device 'cpu'"),
        (["--device", "cuda:99"], "cuda:99 is not available"),
        (["--budget", "-1"], "--budget"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(capsys, arguments, told):
    assert main(["bench", "suite", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and told in output.err and not output.out


def test_the_command(quick, monkeypatch, capsys, tmp_path):
    cases = [*_attentions(), Point("m", mlp.OpCase(length=64, hidden=16, backward=True))]
    monkeypatch.setattr(suite, "points", lambda device="cuda": cases)
    monkeypatch.setattr(suite, "Worker", lambda device: Inline())
    monkeypatch.setattr("tfkern.cli.suite.check_device", lambda name: "cpu")
    monkeypatch.setattr(environment, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "suite", "attention"]) == 0
    printed = capsys.readouterr().out
    stem = "nvidia-h100-80gb-hbm3"
    files = [f"{stem}.csv", f"{stem}-attention-forward.png", f"{stem}-attention-backward.png"]
    assert {p.name for p in (tmp_path / "benchmarks" / "results").iterdir()} == set(files)
    assert all(name in printed for name in files)
    rows = report.read(tmp_path / "benchmarks" / "results" / files[0])
    assert {r["op"] for r in rows} == {"probe", "attention"}
    assert (
        "16 8 True" in printed and "sdpa flash" in printed and "tfkern triton: runs on" in printed
    )
    assert main(["bench", "suite", "--budget", "0"]) == 0
    assert "no time was left for mlp m" in capsys.readouterr().err


def test_tables():
    facts = {"op": "layer_norm", "status": MEASURED, "pass": FORWARD}
    rows = [
        {**facts, "case": "small", "variant": v, "p50_ms": ms, "host_ms": 0.5, "rate": 123.4}
        | {"peak_bytes": 2e6}
        for v, ms in (("torch", 0.1), ("tfkern native", 0.3))
    ]
    rows += [{**rows[0], "case": "large", "p50_ms": 3.0, "host_ms": 7.0, "peak_bytes": None}]
    rows += [{**rows[0], "variant": "liger", "rate": None, "host_ms": None, "peak_bytes": None}]
    rates, host, peaks = report.suite_tables([{"op": "probe"}, *rows])

    def cells(table):
        return [list(column.cells) for column in table.columns]

    head = [["small", "large"], [FORWARD, FORWARD]]
    assert cells(rates) == [*head, ["123", "123"], ["123", "-"]]
    assert cells(host) == [["small"], [FORWARD], ["0.5"], ["0.5"]]
    assert cells(peaks) == [["small"], [FORWARD], ["2"], ["2"]]


def test_commit_of_a_copy_without_a_repository(monkeypatch, tmp_path):
    copy = SimpleNamespace(__file__=str(tmp_path / "tfkern" / "__init__.py"))
    monkeypatch.setattr(environment, "tfkern", copy)
    monkeypatch.delenv("TFKERN_COMMIT", raising=False)
    assert environment.commit() == ""
    monkeypatch.setenv("TFKERN_COMMIT", "0123456789ab")
    assert environment.commit() == "0123456789ab"
