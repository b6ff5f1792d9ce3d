"""The benchmark suite: what it counts, what it refuses, what it writes. No test asserts a time."""

import csv
import json
import multiprocessing
import os
import random
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tfkern
from tfkern.benchmarks import (
    against,
    attention,
    environment,
    measure,
    memory,
    patched,
    report,
    sweep,
    timing,
    train,
)
from tfkern.benchmarks.case import BACKWARD, BOTH, FORWARD, Variant, load, prepared
from tfkern.models import Transformer, TransformerConfig
from tfkern.models.blocks import Block
from tfkern.ops import flops

_QUICK = timing.Protocol(warmup=1, min_samples=2, max_samples=2, min_seconds=0)


needs_native = pytest.mark.skipif(
    tfkern.backends("attention")["native"] is not None, reason="no native kernel here"
)


@pytest.fixture
def quick(monkeypatch):
    """A sweep without the parts that take seconds: the ceiling and fresh processes."""
    monkeypatch.setattr(timing, "product_ceiling", lambda dtype, device: 1e11)
    monkeypatch.setattr(timing, "copy_ceiling", lambda device: 1e10)
    monkeypatch.setattr(memory, "peak", lambda case, variant: 1000 * case.length)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small sizes; threads that wait for a busy machine cost most
    yield
    torch.set_num_threads(threads)


def _case(**options):
    return load("attention")(**{"length": 16, "heads": 2, "head_dim": 8} | options)


def _variant(case, name):
    return next(v for v in case.variants() if v.name == name)


def _names(case):
    return [v.name for v in case.variants() if v.unavailable is None]


@pytest.mark.parametrize("name", _names(_case()))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_counted_flops_are_quadratic(name, causal, backward):
    lengths = [4096, 8192, 16384, 32768, 65536]
    case = _case(causal=causal, backward=backward)
    counts = [measure.count_flops(c := case.at(n), _variant(c, name)) for n in lengths]
    assert report.slope(lengths, counts) == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("name", ["plain", "sdpa flash", "sdpa math"])
def test_counted_flops_equal_the_closed_form(name):
    case = _case(length=4096, batch=3)
    closed = 4 * 3 * 2 * 4096**2 * 8
    assert measure.count_flops(case, _variant(case, name)) == closed == case.work("forward")


@pytest.mark.parametrize("name", [n for n in _names(_case()) if n.startswith("tfkern")])
@pytest.mark.parametrize("causal", [False, True])
def test_counted_flops_of_a_window_are_linear(name, causal):
    if name == "tfkern reference":
        pytest.skip("computes everything")
    lengths = [4096, 8192, 16384, 32768, 65536]
    case = _case(causal=causal, window=256, backward=True)
    counts = [measure.count_flops(c := case.at(n), _variant(c, name)) for n in lengths]
    assert report.slope(lengths, counts) == pytest.approx(1, abs=0.02)


def test_torch_computes_all_of_a_window():
    case = _case(length=1024, causal=True, window=64)
    counted = measure.count_flops(case, _variant(case, "sdpa flash"))
    assert counted == 4 * 2 * 1024**2 * 8


@pytest.mark.parametrize("T, S", [(1, 1), (5, 9), (64, 64), (100, 100), (130, 70), (0, 4)])
@pytest.mark.parametrize("band", [(None, None), (None, 0), (9, 0), (20, 33), (3, None)], ids=str)
def test_tile_flops_counts_tiles_with_a_visible_pair(T, S, band):
    rows, cols = torch.arange(T)[:, None] + S - T, torch.arange(S)[None, :]
    left, right = (S + T if limit is None else limit for limit in band)
    visible = (cols >= rows - left) & (cols <= rows + right)
    pairs = 0
    for t in range(0, T, 16):
        for s in range(0, S, 32):
            tile = visible[t : t + 16, s : s + 32]
            pairs += tile.numel() if tile.any() else 0
    shapes = (2, 3, T, 8), (2, 3, S, 8), (2, 3, S, 4)
    counted = flops.tile_flops(*shapes, band=band, tile=(16, 32), products=(1, 1))
    assert counted == 2 * 2 * 3 * pairs * (8 + 4)
    assert torch.equal(attention.visible(T, S, band), visible)


def test_work_by_convention():
    case = _case(length=1024, backward=True)
    forward = case.work("forward")
    assert forward == 4 * 2 * 1024**2 * 8
    assert case.work("backward") == 2.5 * forward
    assert case.work("forward+backward") == 3.5 * forward
    assert _case(length=1024, causal=True).work("forward") == forward / 2
    norm = load("layer_norm")(length=10, hidden=32, backward=True)
    assert norm.work("forward") == 2 * 10 * 32 * 4
    assert norm.work("backward") == 3 * 10 * 32 * 4


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_variant_is_not_timed(quick, monkeypatch, backward):
    right = attention.OpCase.variants

    def planted(case, backends=None):
        def wrong(q, k, v):
            assert case.length <= 197, "timed"
            return 1.001 * attention.plain(q, k, v, band=case.band)

        return [*right(case, backends), Variant("planted", wrong)]

    monkeypatch.setattr(attention.OpCase, "variants", planted)
    results = sweep.run(_case(backward=backward), [256], protocol=_QUICK)
    assert list(results.wrong) == ["planted"]
    assert results.wrong["planted"].startswith("output is off by ")
    assert "plain" in {r["variant"] for r in results.rows}
    assert "planted" not in {r["variant"] for r in results.rows}


def test_a_wrong_gradient_is_noticed(quick, monkeypatch):
    def wrong(q, k, v):
        return attention.plain(q, k, v.detach() + 0.5 * (v - v.detach()), band=(None, None))

    monkeypatch.setattr(attention.OpCase, "variants", lambda *_: [Variant("planted", wrong)])
    assert "dv" in sweep.run(_case(backward=True), [16], protocol=_QUICK).wrong["planted"]
    assert not sweep.run(_case(), [16], protocol=_QUICK).wrong


def test_what_refuses_is_left_out_and_said(quick, monkeypatch):
    def refuses(q, k, v):
        raise RuntimeError("No available kernel. Aborting execution.")

    def plain(q, k, v):
        return attention.plain(q, k, v, band=(None, None))

    planted = [Variant("plain", plain), Variant("refuses", refuses)]
    monkeypatch.setattr(attention.OpCase, "variants", lambda *_: planted)
    results = sweep.run(_case(), [16], protocol=_QUICK)
    assert [r["variant"] for r in results.rows] == ["plain"] and not results.wrong
    assert results.notes == [
        "refuses left out: RuntimeError: No available kernel. Aborting execution."
    ]


def test_what_cannot_be_traced_has_no_flops(quick, monkeypatch):
    def fails(case, variant):
        raise TypeError("fake tensors")

    monkeypatch.setattr(measure, "count_flops", fails)
    results = sweep.run(_case(), [16], ["reference"], protocol=_QUICK)
    assert {r["counted_flops"] for r in results.rows} == {None}
    assert {r["status"] for r in results.rows} == {measure.MEASURED}
    assert "FLOPs of plain are not counted: TypeError: fake tensors" in results.notes


def test_what_does_not_fit_is_predicted_and_not_run(quick, monkeypatch):
    need = 2 * 2 * 1024**2 * 4
    monkeypatch.setattr(memory, "available", lambda device: need)
    results = sweep.run(_case(), [512, 1024], protocol=_QUICK)
    rows = {(r["variant"], r["length"]): r for r in results.rows}
    assert rows["plain", 512]["status"] == measure.MEASURED
    assert rows["plain", 1024]["status"] == "would need 16.8 MB"
    assert rows["plain", 1024]["predicted_bytes"] == need
    assert rows["plain", 1024]["p50_ms"] is None
    assert rows["sdpa flash", 1024]["status"] == measure.MEASURED


def test_what_takes_too_long_is_predicted(quick):
    results = sweep.run(_case(), [16, 1000000], protocol=_QUICK, max_seconds=1e-3)
    status = {r["status"] for r in results.rows if r["length"] == 1000000}
    assert all(s.startswith("would ") for s in status)


@pytest.mark.parametrize("backward", [False, True])
def test_files(quick, tmp_path, backward):
    results = sweep.run(_case(backward=backward), [16, 32], protocol=_QUICK)
    paths = report.write(results, tmp_path)
    assert [p.name for p in paths] == ["attention.csv", "attention.json", "attention.png"]
    with paths[0].open() as file:
        rows = list(csv.DictReader(file))
    columns = {
        *("op", "variant", "pass", "length", "dtype", "batch", "heads", "head_dim", "causal"),
        *("status", "p20_ms", "p50_ms", "p80_ms", "rate", "unit", "fraction_of_ceiling"),
        *("counted_flops", "peak_bytes", "predicted_bytes"),
        *("device", "instructions", "threads", "driver", "torch", "triton", "tfkern"),
        *("commit", "date", "command"),
    }
    assert columns <= set(rows[0])
    passes = ["forward", "backward", "forward+backward"] if backward else ["forward"]
    assert len(rows) == 2 * len(_names(_case())) * len(passes)
    assert list(dict.fromkeys(r["pass"] for r in rows)) == passes
    assert all(r["torch"] == torch.__version__ and r["device"] and r["date"] for r in rows)
    content = json.loads(paths[1].read_text())
    assert len(content["rows"]) == len(rows)
    assert content["slopes"]["plain"]["counted_flops"] == pytest.approx(2, abs=1e-6)
    assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("op", ["layer_norm", "mlp", "linear_cross_entropy", "block", "model"])
def test_other_ops(quick, monkeypatch, tmp_path, op):
    kind = load(op)
    every = kind.variants
    monkeypatch.setattr(  # compiling takes a while, and is PyTorch's business
        kind, "variants", lambda *a: [v for v in every(*a) if v.name != "torch.compile"]
    )
    results = sweep.run(kind(length=16, hidden=48, backward=True), [16, 32], protocol=_QUICK)
    assert not results.wrong
    assert {r["status"] for r in results.rows} == {measure.MEASURED}
    assert len(report.write(results, tmp_path)) == 3


def test_rows_are_kept_as_they_come(quick, monkeypatch, tmp_path):
    """A sweep that is stopped leaves those that it has, and never half of one."""

    def stops(q, k, v):
        if q.shape[2] > 197:
            raise KeyboardInterrupt
        return attention.plain(q, k, v, band=(None, None))

    monkeypatch.setattr(attention.OpCase, "variants", lambda *_: [Variant("stops", stops)])
    kept = []

    def keep(results):
        report.write_rows(results.rows, tmp_path)
        kept.append(len(report.read(tmp_path / "attention.csv")))

    with pytest.raises(KeyboardInterrupt):
        sweep.run(_case(), [8, 16, 256], protocol=_QUICK, keep=keep)
    assert kept == [1, 2]
    assert [r["length"] for r in report.read(tmp_path / "attention.csv")] == ["8", "16"]
    assert os.listdir(tmp_path) == ["attention.csv"]


def _rewrite(folder):
    facts = {"op": "attention", "device": "x" * 1000, "status": "y" * 3000}
    for count in range(1, 10_000):
        report.write_rows([facts | {"length": i} for i in range(1 + count % 50)], folder)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_kill_leaves_a_whole_file(tmp_path):
    draw = random.Random(0)
    for _ in range(40):
        process = multiprocessing.get_context("fork").Process(target=_rewrite, args=(tmp_path,))
        process.start()
        while not (tmp_path / "attention.csv").exists():
            time.sleep(0.001)
        time.sleep(0.03 * draw.random())
        process.kill()
        process.join()
        rows = report.read(tmp_path / "attention.csv")
        assert [r["length"] for r in rows] == [str(i) for i in range(len(rows))] and rows
        assert all(r["status"] == "y" * 3000 for r in rows)


@pytest.mark.parametrize("draw", ["write", "chart"])
def test_a_file_that_cannot_be_written_stays(quick, monkeypatch, tmp_path, draw):
    import matplotlib.figure

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    results = sweep.run(_case(), [16], ["reference"], protocol=_QUICK)
    before = {p: p.read_bytes() for p in report.write(results, tmp_path)}
    if draw == "write":
        monkeypatch.setattr(csv.DictWriter, "writerows", full)
    else:
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(results, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "content, told",
    [
        (b"a,b\n1,2\n3\n", "line 3: expected 2 fields, as in line 1"),
        (b"a,b\n1,2,3\n", "line 2: expected 2 fields"),
        (b"a,b\n1,2\n\xff,2\n", "line 3: it is no text"),
        (b'a,b\n1,"2\n3,4\n', "line 3: unexpected end of data"),
        (b"a,b\n1,2\x00\n3\n", "line 3: expected 2"),
        (b"a,b\n1," + b"2" * 200_000 + b"\n", "line 2: field larger than field limit"),
    ],
)
def test_the_bad_line_of_a_file_is_named(tmp_path, content, told):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match="x.csv, " + told) as found:
        report.read(tmp_path / "x.csv")
    assert "\n" not in str(found.value)


def test_a_footprint_is_what_is_alive_at_once():
    """Footprints equal a closed form, and lie near what a process was measured to need."""
    case = _case(length=4096, head_dim=64)
    tensor = 2 * 4096 * 64 * 4

    def of(call, case=case):
        return tuple(n / tensor for n in memory.footprint(case, Variant("", call)))

    # An input is drawn, and then scaled: another tensor for a while.
    assert of(lambda q, k, v: q) == (4, 0)
    assert of(lambda q, k, v: q + k) == (4, 0)
    assert of(lambda q, k, v: (q + k).mul_(v).view(-1)) == (4, 0)
    # The first sum is gone when the third tensor is made.
    assert of(lambda q, k, v: ((q + k) * v).exp()) == (5, 1)
    assert of(lambda q, k, v: (q + k, q + v)) == (5, 0)
    plain = _variant(case, "plain")
    assert memory.footprint(case, plain)[1] == pytest.approx(plain.scratch, rel=0.05)
    trained = replace(case, backward=True)
    # Inputs, output, its gradient, three gradients, and the logarithm of the sums.
    flash = memory.footprint(trained, _variant(trained, "sdpa flash"))[0]
    assert flash == pytest.approx(8 * tensor, rel=0.02)


def test_a_footprint_of_any_size():
    case = _case(length=2**24, batch=2**20, heads=2**16)
    assert memory.footprint(case, _variant(case, "plain"))[0] >= 2**63
    case = load("mlp")(length=1, hidden=2**20)
    assert memory.footprint(case, _variant(case, "torch"))[0] > 2 * 4 * 4 * 2**40


def test_a_case_of_which_no_variant_fits_is_refused(monkeypatch):
    case = _case(length=4096, head_dim=64)
    need = 4 * 2 * 4096 * 64 * 4  # q, k, v and the output
    monkeypatch.setattr(memory, "available", lambda device: need + 2 * 2 * 4096 * 4)
    sweep.check_memory(case)
    monkeypatch.setattr(memory, "available", lambda device: need - 1)
    told = "attention does not fit: at length 4096 it needs at least 8.4. MB, and 8.39 MB of memory"
    with pytest.raises(ValueError, match=told):
        sweep.check_memory(case)


def test_what_the_comparison_needs_is_counted(monkeypatch):
    case = load("mlp")(length=1, hidden=1024)
    weights = 2 * 4 * 1024**2
    monkeypatch.setattr(memory, "available", lambda device: 1.6 * weights * 4)
    with pytest.raises(ValueError, match="in the comparison with float64 it needs at least 101 MB"):
        sweep.check_memory(case, ["reference"])


def test_no_call_is_faster_than_the_machine(quick):
    """The first length has no measured time to go by; a bound of its time keeps it from running."""
    results = sweep.run(_case(), [2**20], ["reference"], protocol=_QUICK, max_seconds=1)
    status = {r["variant"]: r["status"] for r in results.rows}
    # 4 H T^2 D FLOPs at 1e11 a second
    assert status["sdpa flash"] == f"would take {4 * 2 * 2**40 * 8 / 1e11 / 60:.0f} min a call"
    assert report.sweep_table(results.rows).row_count == len(status)


def test_a_chart_of_nothing(quick, tmp_path):
    results = sweep.run(_case(), [2**20], ["reference"], protocol=_QUICK, max_seconds=0)
    assert report.write(results, tmp_path)[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("error", [MemoryError("bad alloc"), RuntimeError("[/enforce] no memory")])
def test_what_runs_out_of_memory_costs_its_row_only(quick, monkeypatch, capsys, error):
    from rich.console import Console

    def greedy(q, k, v):
        if q.shape[2] == 256:  # not in the comparison
            raise error
        return attention.plain(q, k, v, band=(None, None))

    def plain(q, k, v):
        return attention.plain(q, k, v, band=(None, None))

    both = [Variant("greedy", greedy), Variant("plain", plain)]
    monkeypatch.setattr(attention.OpCase, "variants", lambda *_: both)
    results = sweep.run(_case(), [16, 256], protocol=_QUICK)
    status = {(r["variant"], r["length"]): r["status"] for r in results.rows}
    told = f"{type(error).__name__}: {error}"
    assert status.pop(("greedy", 256)) == told and set(status.values()) == {measure.MEASURED}
    report.show_sweep(results, Console(width=120))
    assert f"greedy at 256: {told}" in capsys.readouterr().out

    def inputs(case):
        raise error

    monkeypatch.setattr(attention.OpCase, "inputs", inputs)
    found = measure.timed(_case(), both, _QUICK)
    assert found.timings == {} and found.failures == {"greedy": told, "plain": told}


@pytest.mark.parametrize("T", [1, 1000, 2**20])
def test_visible_pairs_of_any_length(T):
    assert flops.visible_pairs(T, T, (None, None)) == T * T
    assert flops.visible_pairs(T, T, (None, 0)) == T * (T + 1) // 2
    w = min(3, T - 1)
    assert flops.visible_pairs(T, T, (3, 0)) == w * (w + 1) // 2 + (T - w) * (w + 1)


def test_what_a_container_leaves_is_available(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_free", lambda: 10**9)
    assert memory.available("cpu") == 10**9
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("300\n")
    assert memory.available("cpu") == 700
    (tmp_path / "memory.max").write_text("600\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert memory.available("cpu") == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available("cpu") == 700


def _tiny(op):
    """Comparisons of the op with each pass that it has, of sizes that cost nothing."""
    sizes = {
        # Outputs have many numbers, since the largest error of a few is luck.
        "attention": [{"heads": 8, "head_dim": 64}, {"heads": 8, "head_dim": 64, "causal": True}],
        "layer_norm": [{"hidden": 48}, {"hidden": 48, "residual": True}],
        "mlp": [{"hidden": 48}],
        "rotary": [{"heads": 4, "key_heads": 2}, {"interleaved": True}],
        "block": [{"hidden": 48}],
        "cross_entropy": [{"vocabulary": 99}],
        "linear_cross_entropy": [{"hidden": 48, "vocabulary": 99}],
    }[op]
    return tuple(
        against.Comparison("tiny", load(op)(length=64, **size), pass_, (3.0, 4.0))
        for pass_ in (FORWARD, BACKWARD, BOTH)
        for size in sizes
    )


@pytest.mark.parametrize("dtype, products", [("float32", 3), ("bfloat16", 4)])
def test_flops_of_a_head_with_its_loss(dtype, products):
    """Gradients that are formed with the loss, and logits that backward computes again."""
    sizes = {"length": 24, "hidden": 16, "vocabulary": 40}
    case = load("linear_cross_entropy")(**sizes, dtype=dtype, backward=True)
    counted = {v.name: measure.count_flops(case, v) for v in case.variants(["reference"])}
    product = 2 * 24 * 16 * 40
    assert counted["tfkern reference"] == products * product
    assert counted["torch"] == 3 * product == case.work(BOTH)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("op", ["mlp", "block"])
def test_flops_whoever_multiplies(monkeypatch, op, ours, dtype):
    """They are torch's, whether products are the native backend's own or torch's."""
    native = pytest.importorskip("tfkern.native.linear")
    most = {getattr(torch, dtype): native._ALL} if ours else {}
    for name, value in (("_MOST_ROWS", most), ("_LEAST_TRAINED", {}), ("_LEAST_TERMS", {})):
        monkeypatch.setattr(native, name, value)
    for backward in (False, True):
        case = load(op)(length=64, hidden=48, dtype=dtype, backward=backward)
        variants = {v.name: v for v in case.variants(["native"])}
        if op == "mlp":
            counted = measure.count_flops(case, variants["tfkern native"])
            assert counted == case.work(BOTH if backward else FORWARD)
        eager = [v for v in variants.values() if "compile" not in v.name]
        products = [_without_attention(case, v) for v in eager]
        assert len(set(products)) == 1 and products[0] > 0


def _without_attention(case, variant):
    """The FLOPs of all but attention, whose kernels visit tiles of different sizes, and which in
    plain operators is products of batches."""
    formulas = case.flop_formulas()
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        prepared(case, variant, case.inputs(), traced=True).run()
    counts = counter.get_flop_counts()["Global"]
    left_out = ("attention", "bmm")
    return sum(n for name, n in counts.items() if not any(x in str(name) for x in left_out))


@needs_native
@pytest.mark.parametrize("op", list(against.COMPARISONS))
def test_against_torch(quick, monkeypatch, tmp_path, op):
    comparisons = _tiny(op)
    monkeypatch.setitem(against.COMPARISONS, op, comparisons)
    results = against.run(op, protocol=_QUICK)
    assert not results.wrong
    assert len(results.rows) == len(comparisons) * len(against.dtypes(op))
    for row in results.rows:
        assert row["op"] == op and row["against"] == "torch" and row["pairs"] == 2
        assert row["variant"] == "tfkern native" and row["status"] == measure.MEASURED
        assert row["p50_ms"] > 0 and row["against_ms"] > 0
        assert row["ratio_p20"] <= row["ratio_p50"] <= row["ratio_p80"]
        assert row["fraction_of_ceiling"] == pytest.approx(row["rate"] / row["ceiling"], rel=1e-2)
    rows = report.read(against.write(results.rows, tmp_path))
    assert [r["pass"] for r in rows] == [r["pass"] for r in results.rows]
    assert all(r["torch"] == torch.__version__ and r["torch_instructions"] for r in rows)
    assert report.pairs_table(results.rows).row_count == len(rows)


def test_every_fixed_case_can_be_made():
    """Each is made in every dtype, and one small enough for float64; none is run."""
    for op, comparisons in against.COMPARISONS.items():
        assert len({(c.name, c.pass_, c.compiled) for c in comparisons}) == len(comparisons)
        for comparison in comparisons:
            for dtype in against.dtypes(op):
                case = comparison.at(dtype)
                assert case.op == op and case.backward == (comparison.pass_ != FORWARD)
                assert case.work(comparison.pass_) > case.small().work(comparison.pass_) > 0


def test_decode_has_one_query():
    case = attention.Decode(length=8, batch=3, heads=2, head_dim=4, dtype="bfloat16")
    assert [x.shape[2] for x in case.inputs().values()] == [1, 8, 8]
    assert case.work(FORWARD) == sum(x.nbytes for n, x in case.inputs().items() if n != "q")


@needs_native
@pytest.mark.parametrize("side", ["torch", "tfkern native"])
def test_against_a_wrong_side_is_not_timed(quick, monkeypatch, side):
    good, bad = _tiny("attention")[:2]

    def planted(comparison, case):
        return [
            replace(v, call=lambda q, k, v: v) if comparison is bad and v.name == side else v
            for v in variants(comparison, case)
        ]

    variants = against.Comparison.variants
    monkeypatch.setattr(against.Comparison, "variants", planted)
    monkeypatch.setitem(against.COMPARISONS, "attention", (good, bad))
    results = against.run("attention", protocol=_QUICK)
    assert [r["dtype"] for r in results.rows] == list(against.dtypes("attention"))
    assert len(results.wrong) == 3 and all(name.startswith(side) for name in results.wrong)


TINY_MODELS = {
    "gpt2": {"vocab_size": 50, "n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 64},
    "llama": {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
    },
    "bert": {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
    },
}


@pytest.fixture
def tiny_models(quick, monkeypatch):
    pytest.importorskip("transformers")
    for name, sizes in TINY_MODELS.items():
        kind, _ = patched.MODELS[name]
        monkeypatch.setitem(patched.MODELS, name, (kind, sizes))
        calls = [replace(c, length=min(c.length, 7), cached=min(c.cached, 5))
                 for c in patched.CALLS[name]]  # fmt: skip
        monkeypatch.setitem(patched.CALLS, name, calls)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_patched_models(tiny_models, tmp_path, name):
    results = patched.run((name,), protocol=_QUICK)
    assert not results.wrong
    cases = [(d, c.name) for d in ("float32", "bfloat16") for c in patched.CALLS[name]]
    assert [(r["dtype"], r["case"], r["against"]) for r in results.rows] == [
        (*case, other) for case in cases for other in ("eager", "sdpa")
    ]
    for row in results.rows:
        assert row["op"] == name and row["variant"] == "tfkern" and row["pairs"] == 2
        assert row["pass"] == (BOTH if "train" in row["case"] else FORWARD)
        assert row["p50_ms"] > 0 and row["against_ms"] > 0
        assert row["ratio_p20"] <= row["ratio_p50"] <= row["ratio_p80"]
    rows = report.read(patched.write(results.rows, tmp_path))
    assert [r["case"] for r in rows] == [r["case"] for r in results.rows]
    assert report.models_table(results.rows).row_count == len(rows)


_GPT = train.Case("characters", 32, 2, 2, 41, 2, 9)


@pytest.fixture
def no_memory(monkeypatch):
    """Memory is measured in other processes, which take seconds each."""
    monkeypatch.setattr(train, "peak", lambda name, case, precision: len(name))


def test_training_steps(quick, no_memory, tmp_path):
    pytest.importorskip("transformers")
    results = train.run((_GPT,), others=("torch", "transformers"), protocol=_QUICK)
    assert not results.wrong
    assert [(r["dtype"], r["against"]) for r in results.rows] == [
        (precision, other)
        for precision in ("float32", "bfloat16")
        for other in ("torch", "transformers")
    ]
    for row in results.rows:
        assert row["op"] == "train" and row["variant"] == "tfkern" and row["pairs"] == 2
        assert row["peak_bytes"] == 6 and row["against_peak_bytes"] == len(row["against"])
        assert row["p50_ms"] > 0 and row["ratio_p20"] <= row["ratio_p50"] <= row["ratio_p80"]
    rows = report.read(train.write(results.rows, tmp_path))
    assert [r["against"] for r in rows] == [r["against"] for r in results.rows]


def test_a_step_of_another_model_is_not_timed(quick, no_memory, monkeypatch):
    plain = train.plain

    def planted(model, case):
        made = plain(model, case)
        made.norm.weight.data *= 9
        return made

    monkeypatch.setattr(train, "plain", planted)
    results = train.run((_GPT,), others=("torch",), protocol=_QUICK)
    assert not results.rows and set(results.wrong) == {
        "characters float32",
        "characters bfloat16",
    }


@pytest.mark.slow
def test_peak_memory_of_a_step_has_its_weights_twice_with_their_moments():
    case = train.Case("", 256, 4, 4, 2000, 2, 32)
    weights = 4 * sum(p.numel() for p in Transformer(case.config()).parameters())
    assert 3 * weights < train.peak("tfkern", case, "float32") < 8 * weights


@pytest.mark.parametrize("part", ["output", "gradients"])
def test_a_wrong_patch_is_not_timed(tiny_models, monkeypatch, part):
    def hook(module, args, y):
        if part == "output":
            return y * torch.arange(-50.0, 46.0, 4.0, dtype=y.dtype)
        if y.requires_grad:
            y.register_hook(lambda gradient: 0 * gradient)

    def planted(model):
        model.transformer.h[0].mlp.register_forward_hook(hook)

    monkeypatch.setattr(patched.hf, "patch", planted)
    results = patched.run(("gpt2",), protocol=_QUICK)
    wrong = {name for name in results.wrong if part == "output" or "train" in name}
    assert set(results.wrong) == wrong and len(wrong) == (8 if part == "output" else 2)
    assert len(results.rows) == 2 * (8 - len(wrong))


def test_targets_hold_without_amx(monkeypatch):
    comparison = _tiny("mlp")[0]
    found = {}
    for instructions in ("avx512", "avx512+amx"):
        monkeypatch.setattr(environment, "torch_instructions", lambda i=instructions: i)
        found[instructions] = [comparison.target(d) for d in against.dtypes("mlp")]
    assert found == {"avx512": [3.0, 4.0, None], "avx512+amx": [3.0, None, None]}


def test_an_op_replaces_its_rows_and_keeps_the_others(tmp_path):
    def rows(op, *ratios, **more):
        facts = {"device": "AMD EPYC 7763", "torch_instructions": "avx2"}
        return [{"op": op, "ratio_p50": ratio, **more, **facts} for ratio in ratios]

    against.write(rows("mlp", 1.0, 2.0, former="column"), tmp_path)
    against.write(rows("layer_norm", 3.0), tmp_path)
    path = against.write(rows("mlp", 4.0), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] == ["cpu-amd-epyc-7763-avx2.csv"]
    assert [(r["op"], r["ratio_p50"]) for r in report.read(path)] == [
        ("layer_norm", "3.0"),
        ("mlp", "4.0"),
    ]


@pytest.mark.parametrize(
    "device, instructions, name",
    [
        (
            "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz",
            "avx512+amx",
            "cpu-intel-xeon-platinum-8480-cpu-2-00ghz-avx512-amx.csv",
        ),
        (
            "AMD Ryzen 7 PRO 7840U w/ Radeon 780M Graphics",
            "avx2",
            "cpu-amd-ryzen-7-pro-7840u-w-radeon-780m-graphics-avx2.csv",
        ),
        ("Intel(R) Core(TM) i7", "default", "cpu-intel-core-i7-default.csv"),
    ],
)
def test_file_of_a_processor(device, instructions, name):
    assert report.file_name("cpu", device, instructions) == name


def test_processors_of_one_name_differ_by_their_family(monkeypatch):
    core = "processor\t: {}\ncpu family\t: {}\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n"
    text = core.format(0, 25) + core.format(1, 26)
    monkeypatch.setattr(environment.Path, "read_text", lambda path: text)
    assert environment.device_name("cpu") == "AMD EPYC, family 25 model 17"
    monkeypatch.setattr(environment.Path, "read_text", lambda path: "Processor : ARMv8\n")
    assert environment.device_name("cpu") == (
        environment.platform.processor() or environment.platform.machine()
    )


@pytest.mark.parametrize(
    "supported, has_mkl, onednn, mkl, amx",
    [
        (True, True, None, None, True),
        (True, True, "DEFAULT", "AVX512_E3", True),
        (True, True, "AVX512_CORE_AMX", "AVX512_E3", True),
        (True, True, "avx512_core_fp16", None, True),
        (True, True, "avx512_core_fp16", "AVX512_E4", True),
        (True, True, "avx512_core_fp16", "AVX512_E3", False),
        (True, True, "AVX512_CORE_BF16", "SSE4_2", False),
        (True, False, "AVX512_CORE_BF16", None, False),
        (False, True, None, None, False),
    ],
)
def test_whether_torch_may_use_amx(monkeypatch, supported, has_mkl, onednn, mkl, amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supported)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    for name, value in (("ONEDNN_MAX_CPU_ISA", onednn), ("MKL_ENABLE_INSTRUCTIONS", mkl)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert environment.torch_instructions().endswith("+amx") == amx


def test_block_is_that_of_the_transformer():
    """Both of PyTorch's ways, and ours with parameters as inputs, next to the module itself."""
    case = load("block")(length=19, batch=2, hidden=48, dtype="float64")
    inputs = case.inputs()
    config = TransformerConfig(vocab_size=1, dim=48, layers=1, heads=12, max_length=1)
    module = Block(config).double()
    for name, parameter in module.named_parameters():  # not as they are before training
        parameter.data = inputs[name].data.normal_()
    x, h = module(inputs["x"], None)
    for call in (case.reference, case.fused, case.in_tfkern):
        torch.testing.assert_close(call(**inputs), x + h)


def test_slope():
    assert report.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert report.slope([1, 2], [0, 5]) is None


def _memory_slope(name, lengths, heads=2, **options):
    peaks = []
    for length in lengths:
        case = _case(length=length, heads=heads, head_dim=64, **options)
        peaks.append(memory.peak(case, _variant(case, name)))
    return report.slope(lengths, peaks)


def test_peak_memory_of_plain_attention_is_quadratic():
    assert 1.9 < _memory_slope("plain", [1024, 4096]) < 2.1


@pytest.mark.parametrize("op", ["block", "model"])
def test_peak_memory_of_a_default_backend(op):
    case = load(op)(length=512, hidden=48)
    assert memory.peak(case, _variant(case, "tfkern")) > 0


@needs_native
def test_peak_memory_of_native_attention_is_linear():
    # The lengths make the output large beside the 0.3 MB to which the system counts.
    assert _memory_slope("tfkern native", [2048, 8192], heads=8) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_growth_of_peak_memory(causal, backward):
    lengths = [1024, 2048, 4096, 8192]
    options = {"causal": causal, "backward": backward}
    assert 1.9 < _memory_slope("plain", lengths, heads=4, **options) < 2.1
    assert _memory_slope("sdpa flash", lengths, heads=8, **options) < 1.1
    if tfkern.backends("attention")["native"] is None:
        assert _memory_slope("tfkern native", lengths, heads=8, **options) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "sdpa math", "tfkern reference"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_predicted_memory_is_near_the_measured(name, causal, backward):
    case = _case(length=4096, head_dim=64, causal=causal, backward=backward)
    variant = _variant(case, name)
    assert variant.scratch == pytest.approx(memory.peak(case, variant), rel=0.2)
