"""The kernels of csrc/cuda: what nvcc makes of them, and the tests of their ops on the host."""

import itertools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import emulation
import pytest
import torch

from tfkern.ops import OPS
from tfkern.ops.attention import bind

_C = pytest.importorskip("tfkern._C", reason="no native build")

# Tests of operators' schemas, of autograd, transforms, float64, threads and products of the CPU are
# left out: the CPU's kernels pass them, and those of CUDA would show nothing else.
LEFT_OUT = "compile or opcheck or vmap or share_no_memory or changes_in_place or float64 or threads"
CHOSEN = f"native and not ({LEFT_OUT} or products_of_native)"


# Sanitizers make it several times slower: a case of each kind of the quickest ops always, all else
# as slow tests.
SOME = (
    f"{CHOSEN} and (each_value or activations or long_rows or (bfloat16 and (matches or residual)))"
)


def runs(op):
    some = () if op in ("mlp", "rotary") else pytest.mark.slow
    for label, marks, *run in (
        ("plain", (), "plain", 1, CHOSEN),
        ("sanitized", some, "sanitized", 7, SOME),
        ("all sanitized", pytest.mark.slow, "sanitized", 0, CHOSEN),
    ):
        yield pytest.param(op, *run, marks=marks, id=f"{op}-{label}")


@pytest.mark.parametrize("op, flavour, order, chosen", [run for op in OPS for run in runs(op)])
def test_op_tests_pass_on_the_host(op, flavour, order, chosen):
    tests = (emulation.ROOT / "tests").glob(f"test_{op}*.py")
    result = emulation.pytest("-k", chosen, *tests, flavour=flavour, order=order)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout


def resources(text: str) -> list[tuple[str, str, int, int, int]]:
    """Architecture, kernel, registers, bytes of stack and of static shared memory, from the report
    of `cuobjdump -res-usage`. A kernel has a stack only where registers spill."""
    rows, architecture = [], ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        if found := re.match(r" Function (\w+):", line):
            mangled = found[1]
        if found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            name, arguments = re.search(
                r"\d([a-z][a-z_]*_kernel)((?:I\w+?E(?=Ev))?)", mangled
            ).groups()
            file = re.search(r"_([a-z_]+)_cu_", mangled)
            kernel = f"{file[1]}_{name}" if file else name
            rows.append((architecture, kernel + arguments, *map(int, found.groups())))
    return rows


@pytest.fixture(scope="module")
def compiled():
    if not _C.has_cuda:
        pytest.skip("built without CUDA kernels")
    triton = pytest.importorskip("triton")
    path = shutil.which("cuobjdump") or triton.knobs.nvidia.cuobjdump.path
    (library,) = Path(_C.__file__).parent.glob("_operators*.so")
    command = [path, "-res-usage", library]
    return resources(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    kernels = Counter(architecture for architecture, *_ in compiled)
    assert {f"sm_{a.removeprefix('sm_')}" for a in _C.cuda_architectures} == set(kernels)
    assert len(set(kernels.values())) == 1
    assert {re.sub(r"_kernel.*", "_kernel", row[1]) for row in compiled} == set(_C.cuda_kernels)


# Bytes of stack that are known: float32 is in three parts, which fill the registers.
SPILLS = {
    "attention_forward_kernelIfLi128EE": 8,
    "attention_forward_kernelIfLi256EE": 40,
    "attention_backward_dbias_kernelIfLi128EE": 16,
    "attention_backward_dbias_kernelIfLi256EE": 40,
    "attention_backward_dkv_kernelIfLi128EE": 8,
    "attention_backward_dkv_kernelIfLi256EE": 40,
    "attention_backward_dq_kernelIfLi64EE": 8,
    "attention_backward_dq_kernelIfLi128EE": 8,
    "attention_backward_dq_kernelIfLi256EE": 32,
    # For sm_80 alone, beside 64 registers of the row and 16384 sums in shared memory.
    "layer_norm_backward_kernelINS_4HalfELi4ELNS1_5PartsE1EE": 8,
}


def test_no_kernel_spills(compiled):
    for architecture, kernel, registers, stack, shared in compiled:
        assert stack <= SPILLS.get(kernel, 0), f"{kernel} spills for {architecture}"
        reserved = () if architecture == "sm_80" else (1024,)  # by the system
        assert shared in (0, *reserved), f"{kernel} has shared memory that launch does not know of"
        assert 0 < registers <= 255


def test_a_spill_would_be_seen():
    text = "arch = sm_80\n Function _Z14forward_kernelILb0EEv:\n  REG:255 STACK:16 SHARED:4 LOCAL:0"
    assert resources(text)[0][2:] == (255, 16, 4)


# ---- scores that leave no room for rounding, and NaN ----


def attention(q, k, v, do=None, **options):
    """o and lse of the CUDA kernels on the host, and with `do` the gradients."""
    ops, args = emulation.load(), bind(q, k, v, **options)
    o, lse = ops.attention_forward(*args)
    if do is None:
        return o, lse
    return o, lse, *ops.attention_backward(do, None, o, lse, *args, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_forms_the_scores_of_the_forward(dtype):
    """To the last bit, which is 1 in scores of 1e7: each row sees a single key, of weight 1. A sum
    of the planes of float32 in another order changes it once in a thousand rows."""
    q, k = (3e3 * torch.randn(1, 1, 6000, 160) for _ in range(2))
    q, k, v = q.to(dtype), k.to(dtype), torch.randn(1, 1, 6000, 16, dtype=dtype)
    do = torch.randn_like(v)
    o, _, _, _, dv, *_ = attention(q, k, v, do, window=(0, 0))
    assert torch.equal(o, v) and torch.equal(dv, do)


def test_weights_of_split_keys_sum_to_one():
    """They do in the backward, too, which splits none. Scores are of 1e6, half of them alike."""
    q, k, v = (
        1e3 * torch.randn(1, 4, 1, 48),
        1e3 * torch.randn(1, 2, 600, 48),
        torch.randn(1, 2, 600, 16),
    )
    k[:, :, ::2] = q[:, ::2]
    *_, dv, _, _ = attention(q, k, v, torch.ones(1, 4, 1, 16))
    torch.testing.assert_close(dv.sum(2), torch.full((1, 2, 16), 2.0))


@pytest.mark.parametrize("T, S", [(1, 600), (70, 200)], ids=["split keys", "whole rows"])
@pytest.mark.parametrize("where", ["q", "k", "v", "do", "sink"])
def test_nan_reaches_what_depends_on_it(where, T, S):
    x = {"q": torch.randn(2, 1, T, 16), "k": torch.randn(2, 1, S, 16)}
    x |= {"v": torch.randn(2, 1, S, 16), "do": torch.randn(2, 1, T, 16), "sink": torch.zeros(1)}
    x[where].view(-1)[:1] = torch.nan
    if where == "sink":
        x = {name: t[:1] for name, t in x.items()}
    o, lse, dq, dk, dv, _, dsink = attention(**x)
    assert o[0, 0, 0, 0].isnan() == (where != "do")
    assert lse[0, 0, 0, 0].isnan() == (where not in ("v", "do"))
    assert dq[0, 0, 0].isnan().all() and dk[0].isnan().all() and dsink.isnan().all()
    assert dv[0, :, :, 0].isnan().all() == (where != "v")
    assert not any(t[1:].isnan().any() for t in (o, dq, dk, dv)), "the other batch"


def test_rows_that_are_not_there_have_no_logarithm():
    q, k = torch.randn(2, 1, 5, 16), torch.randn(2, 1, 7, 16)
    lengths = {"query_lengths": torch.tensor([3, 5]), "key_lengths": torch.tensor([7, 0])}
    _, lse = attention(q, k, k, **lengths)
    there = torch.arange(5) < torch.tensor([[3], [0]])
    assert torch.equal(lse[0, :, 0] != -torch.inf, there)
    assert not lse[1, :, 0][~there].any()


@pytest.mark.parametrize("size", [16, 24, 32, 64, 192])
@pytest.mark.parametrize("D", [64, 96, 256])
def test_pages_of_any_size_give_the_bits_of_keys_in_order(D, size):
    """A tile of keys lies in one page or in several. Numbers of unused pages are out of range."""
    count = 384 // size
    q = torch.randn(2, 4, 2, D).bfloat16()
    k, v = (torch.randn(2, 2, 384, D).bfloat16() for _ in range(2))
    lengths = torch.tensor([300, 40])
    table = torch.randperm(2 * count).view(2, count)
    pages = [torch.empty(2 * count, 2, size, D, dtype=q.dtype) for _ in range(2)]
    for paged, x in zip(pages, (k, v), strict=True):
        paged[table.flatten()] = x.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
    unused = torch.arange(count) * size >= lengths[:, None]
    table[unused] = torch.arange(int(unused.sum())) * 1000 - 3000
    o, lse = attention(q, k, v, causal=True, key_lengths=lengths)
    paged = attention(q, *pages, causal=True, key_lengths=lengths, page_table=table)
    assert torch.equal(paged[0], o) and torch.equal(paged[1], lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [8, 16, 72, 160])
def test_queries_that_see_nothing_may_hold_anything(D, dtype):
    """NaN in q and do of rows that a mask hides altogether does not reach the other gradients."""
    q, do = (torch.randn(1, 2, 70, D).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, 1, 40, D).to(dtype) for _ in range(2))
    hidden = torch.zeros(70, dtype=torch.bool)
    hidden[[0, 33, 64, 69]] = True
    mask = ~hidden[:, None].expand(1, 1, 70, 40)
    clean = attention(q, k, v, do, mask=mask)
    bias = torch.zeros(1, 1, 70, 40).masked_fill(~mask, -torch.inf)
    biased = *clean[:2], *bind(q.clone(), k, v, bias=bias), True
    dbias = emulation.load().attention_backward(do.clone(), None, *biased)[3]
    q[:, :, hidden] = do[:, :, hidden] = torch.nan
    ops, args = emulation.load(), bind(q, k, v, mask=mask)
    o, lse, dq, dk, dv, *_ = clean
    found = ops.attention_backward(do, None, o, lse, *args, False)
    assert all(torch.equal(x, y) for x, y in zip(found[:3], (dq, dk, dv), strict=True))
    assert not dq[:, :, hidden].any() and torch.isfinite(dk).all() and torch.isfinite(dv).all()
    biased = o, lse, *bind(q, k, v, bias=bias), True
    assert torch.equal(ops.attention_backward(do, None, *biased)[3], dbias)


# ---- tiles, also for sizes that no test could compute ----


@pytest.fixture(scope="module")
def counting():
    torch.ops.load_library(emulation.build([emulation.HOST / "counting.cu"]))
    return torch.ops.tfkern_counting


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize(
    "lengths",
    [[5], [0], [64, 64], [0, 0, 1, 0, 63, 65, 0, 200, 64, 0], [1] * 300, [2**29 - 200, 0, 129, 70]],
    ids=lambda lengths: f"{len(lengths)} of {sum(lengths)}",
)
def test_every_tile_of_a_packed_batch_is_found_once(counting, lengths, of_keys):
    size = 64 if sum(lengths) < 10**6 else 2**25
    ends = torch.tensor([0, *lengths]).cumsum(0)
    found = counting.packed_tiles(ends, sum(lengths), size, of_keys).tolist()
    expected = [[b, i] for b, n in enumerate(lengths) for i in range(-(-n // size))]
    assert [tile for tile in found if tile != [-1, -1]] == expected


def test_tiles_of_lengths_that_are_out_of_order_stay_within(counting):
    ends = torch.tensor([70, 30, 500, 200, -7, 90])
    for document, tile in counting.packed_tiles(ends, 128, 64, False).tolist():
        assert -1 <= document < 5 and -1 <= tile < 2


@pytest.mark.parametrize("summed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_dbias_sums_every_tile_of_scores_once(counting, summed):
    scores = torch.tensor([3, 2, 130, 70])
    bias = torch.where(torch.tensor(summed), 1, scores)
    tiles, terms, parts, part_terms = counting.bias_counts(scores, bias, 64, 16).tolist()
    assert (parts - 1) * part_terms < terms <= parts * part_terms
    sizes = (3, 2, 3, 5)  # of the scores, in tiles
    found = []
    for tile, term in itertools.product(range(tiles), range(terms)):
        place = counting.bias_term(scores, bias, 64, 16, tile, term).tolist()
        owner = [0 if s else x for x, s in zip(place, summed, strict=True)]
        first = counting.bias_term(scores, bias, 64, 16, tile, 0).tolist()
        assert owner == first, "a term of another tile of dbias"
        found.append(tuple(place))
    assert sorted(found) == list(itertools.product(*map(range, sizes)))


def test_a_bias_that_is_broadcast_everywhere_is_summed_by_many_blocks(counting):
    """2^32 tiles of 2M queries and keys, more than an int can count."""
    scalar = torch.ones(4, dtype=torch.long)
    for B, H, T in ((4, 16, 4096), (1, 1, 2**21), (2, 3, 2**21), (1, 1, 2**29 - 1)):
        scores = torch.tensor([B, H, T, T])
        tiles, terms, parts, part_terms = counting.bias_counts(scores, scalar, 64, 16).tolist()
        query_tiles, key_tiles = -(-T // 64), -(-T // 16)
        assert tiles == 1 and terms == B * H * query_tiles * key_tiles
        assert 512 < parts <= 1024 and (parts - 1) * part_terms < terms <= parts * part_terms
        last = counting.bias_term(scores, scalar, 64, 16, 0, terms - 1).tolist()
        assert last == [B - 1, H - 1, query_tiles - 1, key_tiles - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1000, 1001, 10000, 20011])
def test_a_large_mean_reaches_no_element_past_the_row(N, dtype):
    """-mean rstd overflows where a thread has no element. Here xhat is 0, so that backward is
    dx = (dy - mean(dy)) rstd."""
    h = torch.full((2, N), 1e38).to(dtype)
    dy, rstd = torch.randn(2, N).to(dtype), torch.full((2,), 1e6)
    weight, mean = torch.ones(N, dtype=dtype), h[:, 0].float().contiguous()
    options = (None, 0.0, False, 1)  # seed, dropout, separate residual, axes
    dx, *_ = emulation.load().layer_norm_backward(dy, None, h, weight, weight, mean, rstd, *options)
    expected = (dy.double() - dy.double().mean(1, keepdim=True)) * 1e6
    torch.testing.assert_close(dx.double(), expected, rtol=1e-2, atol=20)


def test_rows_of_a_norm_that_an_int_cannot_count():
    """The loop that looks for enough warps ends, and finds that the row is a long one."""
    ops, x = emulation.load(), torch.empty(0, 2**31 + 8)
    options = (None, None, None, None, 0.0)  # weight, bias, residual, seed, dropout
    y, _, mean, rstd = ops.layer_norm_forward(x, *options, 1e-5, False, 1)
    dx, *_ = ops.layer_norm_backward(x, None, x, None, None, mean, rstd, None, 0.0, False, 1)
    assert y.shape == dx.shape == x.shape
