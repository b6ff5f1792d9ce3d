"""The operators of the C++ library called directly, as torch.ops lets anybody do."""

import os
import random
from collections.abc import Callable

import emulation
import pytest
import torch

from tfkern.ops.attention import bind, bind_varlen

pytest.importorskip("tfkern._C", reason="no native build")
OPS = torch.ops.tfkern
B, H, T, S, D = 2, 4, 5, 7, 16
M, N = 6, 24


def attention_forward(**changes):
    q, k, v = (torch.randn(B, h, n, D) for h, n in ((H, T), (2, S), (2, S)))
    args = bind(q, k, v, bias=torch.randn(B, 1, T, S), mask=torch.rand(T, S) < 0.8,
                alibi_slopes=torch.rand(B, H), sink=torch.rand(H), dropout_p=0.25, causal=True,
                query_lengths=torch.tensor([3, 5]), key_lengths=torch.tensor([7, 2]))  # fmt: skip
    return OPS.attention_forward, named(OPS.attention_forward, args) | changes


def attention_packed(**changes):
    q, k, v = (torch.randn(n, h, D) for n, h in ((9, H), (11, 2), (11, 2)))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 4, 9], [0, 3, 8, 11]))
    args = bind_varlen(q, k, v, cu_q, cu_k, alibi_slopes=torch.rand(3, H), window=(2, 1))
    return OPS.attention_forward, named(OPS.attention_forward, args) | changes


def attention_paged(**changes):
    k, v = torch.randn(2, 5, 2, 4, D)
    table = torch.tensor([[0, 3], [4, 1]])
    args = bind(torch.randn(B, H, T, D), k, v, page_table=table, key_lengths=torch.tensor([6, 2]))
    return OPS.attention_forward, named(OPS.attention_forward, args) | changes


def attention_backward(**changes):
    forward, args = attention_forward()
    o, lse = forward(*args.values())
    del args["page_table"]
    saved = {"do": torch.randn_like(o), "dlse": torch.randn(B, H, T)}
    saved |= {x: args.pop(x) for x in "qkv"} | {"o": o, "lse": lse}
    return OPS.attention_backward, saved | args | {"bias_grad": True} | changes


def layer_norm_forward(**changes):
    args = (torch.randn(M, N), torch.rand(N), torch.rand(N), torch.randn(M, N), torch.tensor(3),
            0.25, 1e-5, False, 1)  # fmt: skip
    return OPS.layer_norm_forward, named(OPS.layer_norm_forward, args) | changes


def layer_norm_backward(**changes):
    forward, args = layer_norm_forward()
    _, h, mean, rstd = forward(*args.values())
    args = (torch.randn(M, N), torch.randn(M, N), h, args["weight"], args["bias"], mean, rstd,
            args["seed"], 0.25, True, 1)  # fmt: skip
    return OPS.layer_norm_backward, named(OPS.layer_norm_backward, args) | changes


def mlp_activation_forward(**changes):
    args = (torch.randn(M, N), "silu", True, torch.float32)
    return OPS.mlp_activation_forward, named(OPS.mlp_activation_forward, args) | changes


def mlp_activation_backward(**changes):
    args = (torch.randn(M, N // 2), torch.randn(M, N), "silu", True, True)
    return OPS.mlp_activation_backward, named(OPS.mlp_activation_backward, args) | changes


CALLS: list[Callable] = [
    attention_forward, attention_packed, attention_paged, attention_backward, layer_norm_forward,
    layer_norm_backward, mlp_activation_forward, mlp_activation_backward,
]  # fmt: skip


def named(operator, args) -> dict:
    names = [argument.name for argument in operator.default._schema.arguments]
    return dict(zip(names, args, strict=True))


def misaligned(x):
    """The same elements, one byte off their places."""
    x = x.contiguous()
    raw = torch.zeros(x.nbytes + 1, dtype=torch.uint8)
    shifted = torch.frombuffer(memoryview(raw.numpy())[1:], dtype=x.dtype)
    return shifted.view(x.shape).copy_(x)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_are_valid(call):
    operator, args = call()
    assert all(x.isfinite().all() for x in operator(*args.values())[:1])


HOSTILE = [
    (layer_norm_forward, {"weight": torch.rand(N // 2, 2)}),
    (layer_norm_forward, {"weight": torch.rand(1).expand(N)}),
    (layer_norm_forward, {"bias": torch.rand(N // 2)}),
    (layer_norm_forward, {"bias": torch.rand(2 * N)[::2]}),
    (layer_norm_forward, {"x": torch.randn(N, M)}),
    (layer_norm_forward, {"axes": 0}),
    (layer_norm_forward, {"axes": 3}),
    (layer_norm_forward, {"axes": 2}),  # as many as x has, but weight has one
    (layer_norm_backward, {"axes": 2}),
    (layer_norm_backward, {"axes": -1}),
    (layer_norm_forward, {"residual": torch.randn(M, 1)}),
    (layer_norm_forward, {"residual": torch.ones(M, N, dtype=torch.int32)}),
    (layer_norm_forward, {"seed": torch.zeros(0, dtype=torch.int64)}),
    (layer_norm_forward, {"seed": torch.tensor(3.0)}),
    (layer_norm_forward, {"dropout_p": float("nan")}),
    (layer_norm_forward, {"x": misaligned(torch.randn(M, N))}),
    (layer_norm_backward, {"rstd": torch.rand(M).double()}),
    (layer_norm_backward, {"rstd": torch.rand(M).bfloat16(), "mean": torch.rand(M).bfloat16()}),
    (layer_norm_backward, {"rstd": torch.rand(M - 1)}),
    (layer_norm_backward, {"rstd": torch.rand(1).expand(M)}),
    (layer_norm_backward, {"rstd": misaligned(torch.rand(M))}),
    (layer_norm_backward, {"mean": misaligned(torch.rand(M))}),
    (layer_norm_backward, {"mean": torch.rand(M, 2)[:, 0]}),
    (layer_norm_backward, {"h": torch.randn(M, N).double()}),
    (layer_norm_backward, {"dy": torch.randn(M * N)}),
    (layer_norm_backward, {"bias": torch.rand(N + 1)}),
    (layer_norm_backward, {"weight": torch.rand(N, 1)}),
    (attention_forward, {"alibi_slopes": torch.rand(H, B)}),
    (attention_forward, {"alibi_slopes": torch.rand(1, B * H)}),
    (attention_forward, {"alibi_slopes": torch.rand(B * H)}),
    (attention_forward, {"sink": torch.rand(H, 1)}),
    (attention_forward, {"sink": torch.rand(H - 1)}),
    (attention_forward, {"sink": torch.ones(H, dtype=torch.int64)}),
    (attention_forward, {"k": torch.randn(B, 3, S, D)}),
    (attention_forward, {"v": torch.randn(B, 2, S - 1, D)}),
    (attention_forward, {"q": torch.randn(B, H, T, D - 1)}),
    (attention_forward, {"k": torch.randn(B, 2, S, D).double()}),
    (attention_forward, {"q": misaligned(torch.randn(B, H, T, D))}),
    (attention_forward, {"bias": torch.randn(B, 1, T, S + 1)}),
    (attention_forward, {"mask": torch.ones(1, 1, T - 1, S, dtype=torch.bool)}),
    (attention_forward, {"query_lengths": torch.ones(B, 1, dtype=torch.int64)}),
    (attention_forward, {"key_lengths": torch.ones(B + 1, dtype=torch.int64)}),
    (attention_forward, {"key_lengths": torch.ones(B)}),
    (attention_forward, {"key_lengths": misaligned(torch.ones(B, dtype=torch.int64))}),
    (attention_forward, {"seed": torch.tensor([1, 2])}),
    (attention_forward, {"dropout_p": -1.0}),
    (attention_packed, {"cu_seqlens_k": torch.tensor([0, 11])}),
    (attention_packed, {"cu_seqlens_k": None}),
    (attention_packed, {"cu_seqlens_q": torch.zeros(2, 2, dtype=torch.int64)}),
    (attention_paged, {"page_table": torch.zeros(3, 2, dtype=torch.int64)}),
    (attention_paged, {"page_table": torch.zeros(2, dtype=torch.int64)}),
    (attention_backward, {"lse": torch.randn(B, H, T)}),
    (attention_backward, {"lse": misaligned(torch.randn(2, B, H, T))}),
    (attention_backward, {"lse": torch.randn(2, B, H, T).double()}),
    (attention_backward, {"dlse": misaligned(torch.randn(B, H, T))}),
    (attention_backward, {"dlse": torch.randn(B, H, T - 1)}),
    (attention_backward, {"do": torch.randn(B, H, T, D + 1)}),
    (attention_backward, {"o": torch.randn(B, H, T, D).bfloat16()}),
    (mlp_activation_forward, {"total": torch.randn(M, N - 1)}),
    (mlp_activation_forward, {"total": torch.randn(M * N)}),
    (mlp_activation_forward, {"total": misaligned(torch.randn(M, N))}),
    (mlp_activation_forward, {"dtype": torch.int32}),
    (mlp_activation_forward, {"dtype": torch.float64}),
    (mlp_activation_forward, {"activation": "tanh"}),
    (mlp_activation_backward, {"dh": torch.randn(M, N)}),
    (mlp_activation_backward, {"pre": torch.randn(M - 1, N)}),
    (mlp_activation_backward, {"pre": torch.randn(M, N).double()}),
    (mlp_activation_backward, {"activation": ""}),
]  # fmt: skip


@pytest.mark.parametrize(
    "call, changes", HOSTILE, ids=lambda x: x.__name__ if callable(x) else "-".join(x)
)
def test_what_does_not_fit_is_refused(call, changes):
    operator, args = call(**changes)
    with pytest.raises(RuntimeError, match="tfkern"):
        operator(*args.values())


def test_checks_come_before_memory():
    """These would take terabytes."""
    huge = torch.zeros(1).expand(2**20, 2**20)
    with pytest.raises(RuntimeError, match="contiguous parameters"):
        OPS.layer_norm_forward(huge, torch.rand(3), None, None, None, 0.0, 0.0, False, 1)
    with pytest.raises(RuntimeError, match="unknown activation"):
        OPS.mlp_activation_forward(huge, "tanh", False, torch.float32)
    with pytest.raises(RuntimeError, match="products have the dtype of pre"):
        doubles = torch.zeros(1, dtype=torch.float64).expand(huge.shape)
        OPS.mlp_activation_backward(huge, doubles, "silu", False, True)
    q = torch.zeros(1).expand(1, 1, 2**36, 16)
    options = (*[None] * 8, 1.0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="sink do not fit"):
        OPS.attention_forward(q, q, q, None, None, None, torch.rand(2), *options)


# ---- drawn calls ----


def changed(x, draw: random.Random):
    """x or something like it, mostly of the wrong size, dtype or strides."""
    if not isinstance(x, torch.Tensor):
        numbers = [x, None, 0, -1, 2**40, 0.5, -1e30, float("inf"), "gelu", torch.float64]
        return draw.choice(numbers)
    dim = draw.randrange(x.dim()) if x.dim() else 0
    if x.dim() == 0:
        return draw.choice([x, x[None], x.double(), None])
    one = x.narrow(dim, 0, min(1, x.shape[dim]))
    flipped = x.transpose(0, -1)
    return draw.choice([
        x, None, one, one.expand(x.shape), x.narrow(dim, 0, 0), torch.cat([x, one], dim),
        x[..., ::2], x.transpose(dim, -1), flipped.contiguous().transpose(0, -1), x.flatten(),
        x[None], x.double(), x.float(), x.bfloat16(), x.to(torch.int32), x.bool(), misaligned(x),
        x.as_strided(x.shape, [0] * x.dim()), torch.empty_like(x).fill_(-(2**31)),
    ])  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_drawn_calls_touch_no_foreign_memory(call):
    """They fail or give outputs of some size, and the sanitizers of the next test watch them."""
    draw = random.Random(call.__name__)
    refused = 0
    for _ in range(int(os.environ.get("TFKERN_TEST_DRAWS", 150))):
        operator, args = call()
        for name in draw.sample(list(args), draw.choice([1, 1, 2, 3])):
            args[name] = changed(args[name], draw)
        try:
            operator(*args.values())
        except (RuntimeError, ValueError, TypeError, IndexError):
            refused += 1
    assert refused > 10


SOME = "(test_operators or each_value or activations or long_rows or matches or residual)"


@pytest.mark.parametrize(
    "chosen, draws",
    [
        (f"{SOME} and not compile and not opcheck and not slow", 150),
        pytest.param("not compile and not opcheck", 3000, marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_kernels_of_the_cpu_under_sanitizers(chosen, draws):
    """AddressSanitizer and UndefinedBehaviorSanitizer end the process at the first fault."""
    tests = [emulation.ROOT / "tests" / "test_operators.py"]
    for op in emulation.OPS:
        tests += sorted((emulation.ROOT / "tests").glob(f"test_{op}*.py"))
    selection = f"(native or test_operators) and ({chosen}) and not under_sanitizers"
    result = emulation.pytest_on_cpu("-k", selection, *tests, TFKERN_TEST_DRAWS=str(draws))
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout
