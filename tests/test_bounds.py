"""The bounds of the GPU kernels: how machine code is counted, and that the table is up to date."""

import csv
import subprocess
import sys

import bounds
import pytest
import sass

# A loop over tiles that loads 16 bytes a lane, may add a bias, multiplies twice and jumps back;
# in front of it a loop without products, behind it a poll of a barrier.
CODE = """
.text.some_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R4, [R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDG.E.128 R8, [R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R30], [R2.64] ;
        /*0050*/                   BSSY B0, `(.L_x_4) ;
        /*0060*/               @P1 BRA `(.L_x_3) ;
        /*0070*/                   LDG.E R5, [R2.64+0x10] ;
        /*0080*/                   FADD R8, R8, R5 ;
.L_x_3:
        /*0090*/                   BSYNC B0 ;
.L_x_4:
        /*00a0*/                   HMMA.16816.F32.BF16 R12, R8, R10, R12 ;
        /*00b0*/                   HMMA.16816.F32.BF16 R16, R8, R10, R16 ;
        /*00c0*/                   MUFU.EX2 R20, R12 ;
        /*00d0*/                   STL [R1], R20 ;
        /*00e0*/               @P0 BRA `(.L_x_2) ;
        /*00f0*/                   EXIT ;
.L_x_5:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0110*/              @!P0 BRA `(.L_x_5) ;
.L_x_6:
        /*0120*/                   BRA `(.L_x_6) ;
"""


def test_the_hot_loop_is_the_one_with_products_without_its_options():
    (kernel,) = sass.kernels(CODE)
    hot = sass.hot(kernel, 90)
    assert hot.loop and kernel.name == "some_kernel"
    assert hot.instructions == 10  # those of the loop but the bias
    assert hot.pipes == {"lsu": 3, "control": 4, "tensor": 2, "mufu": 1}
    assert hot.flop == 2 * 2 * 16 * 8 * 16
    assert hot.bytes == 2 * 32 * 16
    assert hot.in_flight == 2 * 16
    assert hot.spills == 1 and hot.spills_elsewhere == 0
    assert hot.clocks["mufu"] == 8  # 32 lanes, 16 a clock for four schedulers
    assert hot.clocks["issue"] == 10
    assert sass.hot(kernel, 80).clocks["tensor"] == 2 * 4096 / (2048 / 4)


def test_products_of_a_warp_group_are_counted_from_their_shape():
    code = CODE.replace("HMMA.16816.F32.BF16", "HGMMA.64x128x16.F32.BF16")
    (kernel,) = sass.kernels(code)
    hot = sass.hot(kernel, 90)
    assert hot.flop == 2 * (2 * 64 * 128 * 16) / 4
    assert hot.clocks["tensor"] == 2 * (2 * 64 * 128 * 16) / 4096


def test_occupancy():
    """Worked out by hand: registers, then shared memory, then warps decide."""
    gpu = bounds.GPUS[90]
    assert bounds._occupancy(gpu, 255, 256, 0) == 1
    assert bounds._occupancy(gpu, 96, 128, 70 << 10) == 3
    assert bounds._occupancy(gpu, 16, 1024, 0) == 2


def test_no_bound_is_above_what_the_tensor_cores_and_the_memory_can():
    peaks = {"A100 SXM": 312, "H100 SXM": 989 * 1.755 / 1.83, "B200": 2250}  # TFLOP/s at the clock
    with bounds.PATH.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["gpu"] for row in rows} == set(peaks)
    for row in rows:
        limit = peaks[row["gpu"]] if row["unit"] == "TFLOP/s" else 100
        assert 0 < float(row["bound"]) <= 1.003 * limit, row
        assert row["backend"] == "native" or row["blocks per SM"] != "0", row


def check(*arches: str) -> None:
    """Compares the kernels of this tree with the table, in a process that can compile."""
    command = [sys.executable, "-P", bounds.__file__, "--check", *arches]
    done = subprocess.run(command, capture_output=True, text=True, env=bounds.environment())
    if done.returncode == bounds.MISSING:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_main_kernels_are_those_of_the_table():
    check("90")


@pytest.mark.slow
def test_all_kernels_are_those_of_the_table():
    check()


def test_an_instruction_more_would_be_seen(monkeypatch, tmp_path):
    with bounds.PATH.open(newline="") as file:
        row = next(csv.DictReader(file))
    assert bounds.changes([row]) == []
    more = row | {"instructions": str(int(row["instructions"]) + 1)}
    (line,) = bounds.changes([more])
    assert f"instructions {row['instructions']} -> {more['instructions']}" in line
    assert bounds.changes([more | {"compiler": "triton 99"}]) == []
    (line,) = bounds.changes([row | {"kernel": "new"}])
    assert "not in the file" in line
