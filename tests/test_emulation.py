"""The emulation of CUDA on the host reports what is wrong, and follows the manual."""

import ctypes

import emulation
import pytest
import torch

pytestmark = pytest.mark.xdist_group("emulation")
FAULTS = (
    "none", "no_sync", "shared_store", "global_store", "unwritten", "some_sync", "half_warp",
    "no_wait", "early_copy",
)  # fmt: skip


@pytest.fixture(scope="module")
def library():
    path = emulation.build([emulation.HOST / "planted.cu"])
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


@pytest.fixture(params=emulation.ORDERS)
def order(library, request):
    library.cuda_host_set_order(request.param)
    yield request.param
    library.cuda_host_set_order(0)


def reverse(x, fault):
    return torch.ops.tfkern_planted.reverse(x, FAULTS.index(fault))


X = torch.randn(192)
EXPECTED = X.view(-1, 64).flip(1).flatten()


def test_a_kernel_without_fault(order):
    assert torch.equal(reverse(X, "none"), EXPECTED)


def test_a_missing_sync_is_seen(order):
    assert not torch.equal(reverse(X, "no_sync"), EXPECTED)
    assert reverse(X, "no_sync").isnan().any(), "shared memory is NaN at first"


def test_a_copy_over_what_others_still_read_is_seen(order):
    assert reverse(X, "early_copy").isnan().any()


def test_an_unwritten_element_is_seen(order):
    wrong = reverse(X, "unwritten") != EXPECTED
    assert wrong.nonzero().flatten().tolist() == [63, 127, 191]


@pytest.mark.parametrize(
    "fault, report",
    [
        ("shared_store", "block 0, .*: a store outside of shared memory"),
        ("some_sync", "threads wait at __syncthreads"),
        ("no_wait", "a thread ends before a copy"),
        ("half_warp", "wait .* in a warp for others that never come"),
    ],
)
def test_what_a_launch_reports(order, fault, report):
    with pytest.raises(RuntimeError, match=report):
        reverse(X, fault)
    assert torch.equal(reverse(X, "none"), EXPECTED), "the next launch is not disturbed"


@pytest.mark.parametrize("fault", ["none", "shared_store", "global_store"])
def test_address_sanitizer_sees_the_access(fault):
    path = emulation.build([emulation.HOST / "planted.cu"], "sanitized")
    code = (
        f"import torch; torch.ops.load_library({str(path)!r});"
        f"torch.ops.tfkern_planted.reverse(torch.ones(192), {FAULTS.index(fault)}); print('done')"
    )
    result = emulation.python("-c", code, flavour="sanitized")
    if fault == "none":
        assert result.stdout == "done\n", result.stderr
    else:
        assert "done" not in result.stdout
        assert "AddressSanitizer" in result.stderr and "reverse_kernel" in result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fragments_are_laid_out_as_a_product_needs(order, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.ops.tfkern_planted.product(a, b)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_shuffle(order):
    x, lanes = torch.randperm(32), torch.arange(32)
    expected = torch.stack([x[lanes ^ 3], x[lanes // 4]])
    assert torch.equal(torch.ops.tfkern_planted.shuffle(x), expected)


@pytest.mark.parametrize("given", [[], [0], [63], [5, 40]], ids=str)
def test_votes(order, given):
    x = torch.zeros(64, dtype=torch.long)
    x[given] = 1
    of_warps = x.view(2, 32).any(1, keepdim=True).expand(2, 32).flatten()
    expected = torch.stack([of_warps, x.any().expand(64), torch.zeros(64, dtype=torch.bool)])
    assert torch.equal(torch.ops.tfkern_planted.vote(x), expected.long())
