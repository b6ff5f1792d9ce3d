"""Kernels compile ahead of time on the specialisation of their launch, and the report is right."""

import json

import aot
import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

DECLARED = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
import aot

pointers = {"A": "*bf16", "B": "*bf16", "C": "*fp32"}
integers = {"K": "i32", "stride_a": "i32", "stride_b": "i32", "stride_c": "i32"}
blocks = {"M": 128, "N": 128, "BLOCK": 32}
for divisible in (*pointers, *integers), ():
    resources = aot.compile(
        aot._matmul, pointers | integers, blocks, 80, num_stages=3, divisible=divisible
    )
    print(json.dumps(dataclasses.asdict(resources)))
"""


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
def test_selftest(arch):
    plain, odd, large = (row for row in aot.report("selftest") if row["arch"] == arch)
    for row in plain, odd, large:
        assert row["kernel"] == "_matmul"
        assert row["dtypes"] == ["bf16", "fp32"]
        assert 0 < row["registers"] <= 255
        assert 0 < row["shared"] <= row["limit"]
    assert plain["stack"] == 0
    assert large["stack"] > 0, "accumulators larger than a warp's registers must spill"
    assert "cp.async" in plain["instructions"]
    assert "cp.async" not in odd["instructions"], "copies need the divisibility of addresses"
    product = "mma.sync" if arch < 90 else "wgmma" if arch < 100 else "tcgen05.mma"
    assert product in plain["instructions"]


def test_a_declared_signature_compiles_as_the_recorded_one():
    lines = aot.python("-c", DECLARED, aot.__file__.removesuffix("/aot.py")).splitlines()
    aligned, unaligned = map(json.loads, lines)
    recorded = aot.report("selftest")[0]
    assert aligned["registers"] == recorded["registers"]
    assert aligned["shared_bytes"] == recorded["shared"]
    assert aligned["instructions"] == recorded["instructions"]
    assert "cp.async" not in unaligned["instructions"]


def _kernel(
    X, Y, sixteen, one, odd, large, plain, flag, scale, absent, BLOCK: triton.language.constexpr
):
    pass


def test_launches_are_specialised_as_by_triton():
    kernel = JITFunction(_kernel, do_not_specialize=["plain"])  # triton.jit would interpret it
    grid = lambda bound: (bound["BLOCK"], 2)  # noqa: E731
    with aot.record_launches(90) as launches:
        x = torch.empty(64, dtype=torch.float16, device="cuda")
        y = x.narrow(0, 1, 63)
        major, _ = torch.cuda.get_device_capability(x.device)
        kernel[grid](x, y, 32, 1, 7, 2**40, 16, True, 0.5, None, BLOCK=4, num_warps=major - 1)
    (launch,) = launches
    assert launch.signature == {
        "X": "*fp16",
        "Y": "*fp16",
        "sixteen": "i32",
        "one": "constexpr",
        "odd": "i32",
        "large": "i64",
        "plain": "i32",
        "flag": "u1",
        "scale": "fp32",
        "absent": "constexpr",
        "BLOCK": "constexpr",
    }
    assert launch.constexprs == {(3,): 1, (9,): None, (10,): 4}
    divisible = [["tt.divisibility", 16]]
    expected = {(0,): divisible, (2,): divisible, (5,): divisible}
    assert {path: attrs for path, attrs in launch.attrs.items() if attrs} == expected
    assert launch.grid == (4, 2)
    assert launch.options["num_warps"] == 8
