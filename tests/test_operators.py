"""The operators of the C++ library called directly, as torch.ops lets anybody do."""

import ctypes
import os
from collections import Counter
from collections.abc import Callable

import emulation
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tfkern.ops
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
    return "attention_forward", named("attention_forward", args) | changes


def attention_packed(**changes):
    q, k, v = (torch.randn(n, h, D) for n, h in ((9, H), (11, 2), (11, 2)))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 4, 9], [0, 3, 8, 11]))
    args = bind_varlen(q, k, v, cu_q, cu_k, alibi_slopes=torch.rand(3, H), window=(2, 1))
    return "attention_forward", named("attention_forward", args) | changes


def attention_paged(**changes):
    k, v = torch.randn(2, 5, 2, 4, D)
    table = torch.tensor([[0, 3], [4, 1]])
    args = bind(torch.randn(B, H, T, D), k, v, page_table=table, key_lengths=torch.tensor([6, 2]))
    return "attention_forward", named("attention_forward", args) | changes


def attention_backward(**changes):
    name, args = attention_forward()
    o, lse = getattr(OPS, name)(*args.values())
    saved = {"do": torch.randn_like(o), "dlse": torch.randn(B, H, T), "o": o, "lse": lse}
    return "attention_backward", saved | args | {"bias_grad": True} | changes


def layer_norm_forward(**changes):
    args = (torch.randn(M, N), torch.rand(N), torch.rand(N), torch.randn(M, N), torch.tensor(3),
            0.25, 1e-5, False, 1)  # fmt: skip
    return "layer_norm_forward", named("layer_norm_forward", args) | changes


def layer_norm_backward(**changes):
    name, args = layer_norm_forward()
    _, h, mean, rstd = getattr(OPS, name)(*args.values())
    args = (torch.randn(M, N), torch.randn(M, N), h, args["weight"], args["bias"], mean, rstd,
            args["seed"], 0.25, True, 1)  # fmt: skip
    return "layer_norm_backward", named("layer_norm_backward", args) | changes


def linear_product(**changes):
    args = (torch.randn(2, M, N), torch.randn(5, N), torch.randn(5), torch.randn(2, M, 3),
            torch.randn(5, 3))  # fmt: skip
    return "linear_product", named("linear_product", args) | changes


def mlp_hidden(**changes):
    args = (torch.randn(M, N), torch.randn(5, N), torch.randn(5), torch.randn(5, N), torch.randn(5),
            "silu", True)  # fmt: skip
    return "mlp_hidden", named("mlp_hidden", args) | changes


def mlp_activation_forward(**changes):
    args = (torch.randn(M, N), torch.randn(M, N), "silu")
    return "mlp_activation_forward", named("mlp_activation_forward", args) | changes


def mlp_activation_backward(**changes):
    args = (*(torch.randn(M, N) for _ in range(3)), "silu", True)
    return "mlp_activation_backward", named("mlp_activation_backward", args) | changes


def cross_entropy_forward(V=N, **changes):
    targets = torch.randint(V, (M,))
    targets[1] = -100
    args = (torch.randn(M, V), targets, torch.rand(V), -100, 0.1, 5.0, False)
    return "cross_entropy_forward", named("cross_entropy_forward", args) | changes


def cross_entropy_long(**changes):
    return cross_entropy_forward(V=307, **changes)


def cross_entropy_backward(V=N, **changes):
    """The arguments of a backward whose logits have only some of the classes."""
    name, args = cross_entropy_forward(V)
    _, lse, rest = getattr(OPS, name)(*args.values())
    logits = torch.randn(M, 2 * V)[:, :V]
    args = (logits, args["targets"], torch.rand(V + 9), lse, rest, torch.randn(M), torch.randn(M),
            -100, 0.1, 5.0, 4, V + 9)  # fmt: skip
    return "cross_entropy_backward", named("cross_entropy_backward", args) | changes


def cross_entropy_in_place(**changes):
    """Returns nothing, so that the gradient is looked at where it is."""
    _, args = cross_entropy_backward(V=307)
    return "cross_entropy_backward_", args | changes


def rotary(**changes):
    args = (torch.randn(B, H, T, D), torch.randn(B, 2, T, D), torch.rand(B, T, 12),
            torch.rand(B, T, 12), False, False)  # fmt: skip
    return "rotary", named("rotary", args) | changes


def rotary_inplace(**changes):
    return "rotary_", rotary()[1] | {"interleaved": True} | changes


def append_(**changes):
    """Tokens for a cache, which goes on at its first place in one batch."""
    caches = torch.zeros(2, B, H, S, D)
    args = (*caches, torch.tensor([0, 5]), *torch.randn(2, B, T, H, D).transpose(2, 3),
            torch.tensor([3, 4]))  # fmt: skip
    return "append_", named("append_", args) | changes


def linear_product_(**changes):
    """A product that is added to what there is."""
    args = (torch.randn(M, 9), torch.randn(M, N), torch.randn(9, N), torch.rand(9), True)
    return "linear_product_", named("linear_product_", args) | changes


def linear_pack(**changes):
    return "linear_pack", named("linear_pack", (torch.randn(9, N),)) | changes


def linear_packed(**changes):
    """The second layer of a gated pair is packed from the same matrix."""
    w = OPS.linear_pack(torch.randn(9, N))
    args = (torch.randn(2, M, N), w, torch.rand(9), w.clone(), torch.rand(9), 9, "silu")
    return "linear_packed", named("linear_packed", args) | changes


def linear_int8(**changes):
    weight = torch.randint(-127, 128, (9, N), dtype=torch.int8)
    args = (torch.randn(M, N), weight, torch.rand(9), torch.rand(9))
    return "linear_int8", named("linear_int8", args) | changes


CALLS: list[Callable] = [
    attention_forward, attention_packed, attention_paged, attention_backward, layer_norm_forward,
    layer_norm_backward, linear_product, mlp_hidden, mlp_activation_forward,
    mlp_activation_backward, cross_entropy_forward, cross_entropy_long, cross_entropy_backward,
    cross_entropy_in_place, rotary, rotary_inplace, append_,
    linear_int8, linear_product_, linear_pack, linear_packed,
]  # fmt: skip

ONLY_ON_CPU = {
    "append_", "linear_int8", "linear_product", "linear_product_", "linear_pack", "linear_packed",
    "mlp_hidden",
}  # fmt: skip

# Where operators run: on the CPU, or those of a GPU on the host or on a GPU.
PLACES = [
    "cpu",
    "host",
    pytest.param(
        "gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    ),
]


@pytest.fixture(params=PLACES)
def run(request):
    """Calls an operator of one place with arguments that are tensors of the CPU."""
    ops = emulation.load() if request.param == "host" else OPS
    place = on_gpu if request.param == "gpu" else lambda x: x

    def call(operator, args):
        if operator in ONLY_ON_CPU and request.param != "cpu":
            pytest.skip("only the CPU has this operator")
        return getattr(ops, operator)(*map(place, args.values()))

    return call


def on_gpu(x):
    """A copy of x with the same elements at the same distances."""
    if not isinstance(x, torch.Tensor):
        return x
    if x.data_ptr() % x.element_size():
        pytest.skip("torch makes no such tensor on a GPU")
    there = torch.empty(0, dtype=x.dtype, device="cuda")
    return there.set_(x.untyped_storage().cuda(), x.storage_offset(), x.shape, x.stride())


def named(operator: str, args) -> dict:
    names = [argument.name for argument in getattr(OPS, operator).default._schema.arguments]
    return dict(zip(names, args, strict=True))


def misaligned(x):
    """A copy of x whose elements, if there are any, lie one byte off their places."""
    x = x.contiguous()
    if x.numel() == 0:
        return x
    raw = torch.zeros(x.nbytes + 1, dtype=torch.uint8)
    shifted = torch.frombuffer(memoryview(raw.numpy())[1:], dtype=x.dtype)
    return shifted.view(x.shape).copy_(x)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_are_valid(call, run):
    operator, args = call()
    outputs = run(operator, args)
    if outputs is None:  # in place
        outputs = next(iter(args.values()))
    first = outputs if torch.is_tensor(outputs) else outputs[0]
    assert first.isfinite().all()


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
    (attention_forward, {"bias": torch.ones(B, 1, T, S, dtype=torch.bool)}),
    (attention_forward, {"bias": torch.ones(B, 1, T, S, dtype=torch.int8)}),
    (attention_forward, {"mask": torch.ones(B, 1, T, S)}),
    (attention_forward, {"mask": torch.ones(T, S, dtype=torch.bool)}),
    (attention_forward, {"query_lengths": torch.ones(B, 1, dtype=torch.int64)}),
    (attention_forward, {"key_lengths": torch.ones(B + 1, dtype=torch.int64)}),
    (attention_forward, {"key_lengths": torch.ones(B)}),
    (attention_forward, {"key_lengths": misaligned(torch.ones(B, dtype=torch.int64))}),
    (attention_forward, {"seed": torch.tensor([1, 2])}),
    (attention_forward, {"dropout_p": -1.0}),
    (attention_packed, {"cu_seqlens_k": torch.tensor([0, 11])}),
    (attention_packed, {"cu_seqlens_k": None}),
    (attention_packed, {"mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}),
    (attention_packed, {"page_table": torch.zeros(1, 1, dtype=torch.int64)}),
    (attention_packed, {"cu_seqlens_q": torch.zeros(2, 2, dtype=torch.int64)}),
    (attention_paged, {"page_table": torch.zeros(3, 2, dtype=torch.int64)}),
    (attention_paged, {"page_table": torch.zeros(2, dtype=torch.int64)}),
    (attention_paged, {"page_table": torch.zeros(2, 2)}),
    (attention_paged, {x: torch.zeros(0, 2, 4, D) for x in "kv"}),
    (attention_backward, {"lse": torch.randn(B, H, T)}),
    (attention_backward, {"lse": misaligned(torch.randn(2, B, H, T))}),
    (attention_backward, {"lse": torch.randn(2, B, H, T).double()}),
    (attention_backward, {"dlse": misaligned(torch.randn(B, H, T))}),
    (attention_backward, {"dlse": torch.randn(B, H, T - 1)}),
    (attention_backward, {"do": torch.randn(B, H, T, D + 1)}),
    (attention_backward, {"o": torch.randn(B, H, T, D).bfloat16()}),
    (linear_product, {"a": torch.randn(2, M, N - 1)}),
    (linear_product, {"a": torch.randn(M, N)}),
    (linear_product, {"a": torch.randn(())}),
    (linear_product, {"a": torch.randn(2, M, N).double()}),
    (linear_product, {x: None for x in ("a2", "b2")} | {
        x: torch.randn(4, 4).double() for x in ("a", "b")} | {"bias": None}),
    (linear_product, {"b": torch.randn(4, N)}),
    (linear_product, {"b": torch.randn(5, N, 1)}),
    (linear_product, {"b": misaligned(torch.randn(5, N))}),
    (linear_product, {"bias": torch.randn(4)}),
    (linear_product, {"bias": torch.randn(5).bfloat16()}),
    (linear_product, {"a2": None}),
    (linear_product, {"a2": torch.randn(M, 3)}),
    (linear_product, {"b2": torch.randn(5, 4)}),
    (linear_product, {"b2": torch.randn(4, 3)}),
    (mlp_hidden, {"x": torch.randn(M, N - 1)}),
    (mlp_hidden, {"x": torch.randn(1, M, N)}),
    (mlp_hidden, {"w": torch.randn(5)}),
    (mlp_hidden, {"w": torch.randn(4, N)}),
    (mlp_hidden, {"w": torch.randn(5, N).bfloat16()}),
    (mlp_hidden, {"b": torch.randn(4)}),
    (mlp_hidden, {"w_up": None}),
    (mlp_hidden, {"w_up": torch.randn(5, N + 1)}),
    (mlp_hidden, {"b_up": torch.randn(5, 1)}),
    (mlp_hidden, {"b_up": misaligned(torch.randn(5))}),
    (mlp_hidden, {"activation": "tanh"}),
    (linear_pack, {"w": torch.randn(9)}),
    (linear_pack, {"w": torch.randn(9, N).double()}),
    (linear_pack, {"w": misaligned(torch.randn(9, N))}),
    (linear_packed, {"x": torch.randn(M, N + 9)}),
    (linear_packed, {"x": torch.randn(M, N).half()}),
    (linear_packed, {"w": torch.randn(9, N)}),
    (linear_packed, {"w_up": torch.randn(1, N, 16, 1)[..., :8, :]}),
    (linear_packed, {"b": torch.rand(8)}),
    (linear_packed, {"b_up": torch.rand(8)}),
    (linear_packed, {"w_up": None}),
    (linear_packed, {"N": 900}),
    (linear_packed, {"N": -1}),
    (linear_packed, {"activation": ""}),
    (linear_packed, {"activation": "sine"}),
    (mlp_activation_forward, {"pre": torch.randn(M, N - 1)}),
    (mlp_activation_forward, {"up": torch.randn(M - 1, N)}),
    (mlp_activation_forward, {"up": torch.randn(M, N).double()}),
    (mlp_activation_forward, {"pre": torch.randn(M * N)}),
    (mlp_activation_forward, {"pre": misaligned(torch.randn(M, N))}),
    (mlp_activation_forward, {"pre": torch.ones(M, N, dtype=torch.int32), "up": None}),
    (mlp_activation_forward, {"activation": "tanh"}),
    (mlp_activation_backward, {"dh": torch.randn(M, N - 1)}),
    (mlp_activation_backward, {"dh": torch.randn(M, N).bfloat16()}),
    (mlp_activation_backward, {"up": torch.randn(M, N // 2)}),
    (mlp_activation_backward, {"up": misaligned(torch.randn(M, N))}),
    (mlp_activation_backward, {"pre": torch.randn(M - 1, N)}),
    (mlp_activation_backward, {"pre": torch.randn(M, N).double()}),
    (mlp_activation_backward, {"activation": ""}),
    (cross_entropy_forward, {"logits": torch.randn(M + 1, N)}),
    (cross_entropy_forward, {"logits": torch.randn(M * N)}),
    (cross_entropy_forward, {"logits": torch.randn(M, 0), "weight": None}),
    (cross_entropy_forward, {"logits": torch.ones(M, N, dtype=torch.int64)}),
    (cross_entropy_forward, {"logits": misaligned(torch.randn(M, N))}),
    (cross_entropy_forward, {"targets": torch.zeros(M, dtype=torch.int32)}),
    (cross_entropy_forward, {"targets": torch.zeros(M, 1, dtype=torch.int64)}),
    (cross_entropy_forward, {"targets": misaligned(torch.zeros(M, dtype=torch.int64))}),
    (cross_entropy_forward, {"weight": torch.rand(N - 1)}),
    (cross_entropy_forward, {"weight": torch.rand(N, 2)[:, 0]}),
    (cross_entropy_forward, {"weight": torch.rand(N).double()}),
    (cross_entropy_forward, {"weight": misaligned(torch.rand(N))}),
    (cross_entropy_backward, {"weight": torch.rand(N)}),  # of the columns, not of all classes
    (cross_entropy_backward, {"first": 10}),
    (cross_entropy_backward, {"first": -1}),
    (cross_entropy_backward, {"first": 2**63 - 1}),
    (cross_entropy_backward, {"classes": N + 3, "weight": torch.rand(N + 3)}),
    (cross_entropy_backward, {"lse": torch.rand(M - 1)}),
    (cross_entropy_backward, {"lse": torch.rand(M).double()}),
    (cross_entropy_backward, {"rest": torch.rand(0)}),
    (cross_entropy_backward, {"rest": misaligned(torch.rand(M))}),
    (cross_entropy_backward, {"dloss": torch.rand(())}),
    (cross_entropy_backward, {"dloss": torch.rand(M).bfloat16()}),
    (cross_entropy_backward, {"dlse": torch.rand(M + 1)}),
    (cross_entropy_in_place, {"logits": torch.randn(307).expand(M, 307)}),
    (cross_entropy_in_place, {"logits": torch.randn(307, M).T}),
    (cross_entropy_in_place, {"logits": torch.randn(400).as_strided((M, 307), (5, 1))}),
    (cross_entropy_in_place, {"logits": torch.randn(M, 307).double()}),
    (rotary, {"q": torch.randn(B, H, T, D)[0]}),
    (rotary, {"q": torch.randn(B, H, T, 10)}),
    (rotary, {"q": misaligned(torch.randn(B, H, T, D))}),
    (rotary, {"k": torch.randn(B + 1, 2, T, D)}),
    (rotary, {"k": torch.randn(B, 2, T - 1, D)}),
    (rotary, {"k": torch.randn(B, 2, T, D + 1)}),
    (rotary, {"k": torch.randn(B, 2, T, D).double()}),
    (rotary, {"k": torch.randn(B, T, D)}),
    (rotary, {"cos": torch.rand(T, 12)}),
    (rotary, {"cos": torch.rand(1, T, 12)}),
    (rotary, {"cos": torch.rand(B, T + 1, 12)}),
    (rotary, {"cos": torch.rand(B, T, 12).long()}),
    (rotary, {x: torch.rand(B, T, 18) for x in ("cos", "sin")}),
    (rotary, {x: torch.rand(B, T, 11) for x in ("cos", "sin")}),
    (rotary, {"sin": torch.rand(B, T, 10)}),
    (rotary_inplace, {"q": torch.randn(B, H, T - 1, D)}),
    (rotary_inplace, {"k": torch.ones(B, 2, T, D, dtype=torch.int32)}),
    (rotary_inplace, {"sin": torch.rand(B, T)}),
    (linear_product_, {"out": torch.randn(M, 10)}),
    (linear_product_, {"out": torch.randn(9, M).t()}),
    (linear_product_, {"out": torch.randn(M, 9).bfloat16()}),
    (linear_product_, {"b": torch.randn(9, N + 1)}),
    (linear_product_, {"bias": torch.rand(8)}),
    (linear_int8, {"x": torch.randn(M, N + 1)}),
    (linear_int8, {"x": torch.randn(M, N).double()}),
    (linear_int8, {"w": torch.randn(9, N)}),
    (linear_int8, {"w": torch.zeros(10, N, dtype=torch.int8)}),
    (linear_int8, {"scale": torch.rand(9).bfloat16()}),
    (linear_int8, {"bias": torch.rand(10)}),
    (linear_int8, {"bias": torch.rand(9).bfloat16()}),
    (append_, {"k": torch.randn(B, H, S + 1, D), "v": torch.randn(B, H, S + 1, D)}),
    (append_, {"k": torch.randn(B, H, T, D + 1)}),
    (append_, {"v": torch.randn(B, H - 1, T, D)}),
    (append_, {"v": torch.randn(B, H, T, D).double()}),
    (append_, {"k_cache": torch.zeros(B, H, S + 1, D)}),
    (append_, {"k_cache": torch.zeros(B, H, D, S).transpose(2, 3)}),
    (append_, {"v_cache": torch.zeros(B + 1, H, S, D)}),
    (append_, {"lengths": torch.tensor([0, -1])}),
    (append_, {"lengths": torch.tensor([0, 2**63 - 1])}),
    (append_, {"lengths": torch.zeros(B, dtype=torch.int32)}),
    (append_, {"lengths": torch.zeros(1, dtype=torch.int64)}),
    (append_, {"counts": torch.zeros(B + 1, dtype=torch.int64)}),
    (append_, {"counts": torch.ones(B)}),
]  # fmt: skip


@pytest.mark.parametrize(
    "call, changes", HOSTILE, ids=lambda x: x.__name__ if callable(x) else "-".join(x)
)
def test_what_does_not_fit_is_refused(call, changes, run):
    with pytest.raises(RuntimeError, match="tfkern"):
        run(*call(**changes))


def test_checks_come_before_memory(run):
    """These would take gigabytes and terabytes."""

    def refuses(message, operator, *args):
        with pytest.raises(RuntimeError, match=message):
            run(operator, named(operator, args))

    huge = torch.zeros(2**20).expand(2**20, 2**20)
    doubles = huge[0].double().expand(huge.shape)
    options = (None, None, None, 0.0, 0.0, False, 1)
    refuses("contiguous parameters", "layer_norm_forward", huge, torch.rand(3), *options)
    refuses("unknown activation", "mlp_activation_forward", huge, None, "tanh")
    refuses("do not fit", "mlp_activation_backward", huge, doubles, None, "silu", True)
    targets = torch.zeros(2**20, dtype=torch.int64)
    refuses(
        "contiguous weights", "cross_entropy_forward", huge, targets, targets, 0, 0.0, 0.0, False
    )
    q = torch.zeros(1).expand(1, 1, 2**30, 16)
    sink = (None, None, None, torch.rand(2))
    refuses("an even R", "rotary", q, None, q[0], q[0, :, :3], False, False)
    refuses("sink do not fit", "attention_forward", q, q, q, *sink, *[None] * 8, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("run", PLACES[1:], indirect=True)
@pytest.mark.parametrize("call", CALLS)
def test_kernels_of_cuda_take_no_float64(call, run):
    operator, args = call()
    names = [x for x in args if isinstance(args[x], torch.Tensor) and args[x].is_floating_point()]
    for changed in [names, *[[name] for name in names]]:
        doubles = {name: args[name].double() for name in changed}
        with pytest.raises(RuntimeError, match="tfkern"):
            run(operator, args | doubles)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("call", [call for call in CALLS if call.__name__ not in ONLY_ON_CPU])
def test_every_tensor_is_on_the_same_device(call):
    operator, args = call()
    names = [name for name in args if isinstance(args[name], torch.Tensor)]
    for name in names if len(names) > 1 else ():
        mixed = {x: value if x == name else on_gpu(value) for x, value in args.items()}
        with pytest.raises(RuntimeError, match="the same device"):
            getattr(OPS, operator)(*mixed.values())


@pytest.mark.parametrize(
    "call",
    [layer_norm_forward, attention_forward, mlp_activation_forward, cross_entropy_forward, rotary],
)
def test_sizes_that_an_int64_cannot_count(call, run):
    """They have no elements, so torch makes them."""
    wide = torch.zeros(0, 2**62)
    attention = {x: torch.zeros(1, 1, 2**62, 0) for x in "qkv"}
    changes = {
        layer_norm_forward: {"x": wide, "residual": None, "weight": None, "bias": None},
        attention_forward: dict.fromkeys(attention_forward()[1]) | attention,
        mlp_activation_forward: {"pre": wide, "up": None},
        cross_entropy_forward: {
            "logits": wide, "targets": torch.zeros(0, dtype=torch.int64), "weight": None
        },
        rotary: {x: torch.zeros(1, 1, 2**62, 0) for x in "qk"}
        | {x: torch.zeros(1, 2**62, 0) for x in ("cos", "sin")},
    }[call]  # fmt: skip
    operator, args = call()
    with pytest.raises(RuntimeError, match="product is an int64"):
        numbers = {name: x for name, x in args.items() if not isinstance(x, torch.Tensor | None)}
        run(operator, args | changes | numbers)


# ---- drawn calls ----

NUMBERS = [None, 0, -1, 2**40, 0.5, -1e30, float("inf"), float("nan"), "gelu", torch.float64]

# Changes of a tensor x along a dimension n.
CHANGES: dict[str, Callable] = {
    "absent": lambda x, n: None,
    "one": lambda x, n: x.narrow(n, 0, min(1, x.shape[n])),
    "one, expanded": lambda x, n: x.narrow(n, 0, min(1, x.shape[n])).expand(x.shape),
    "none": lambda x, n: x.narrow(n, 0, 0),
    "one more": lambda x, n: torch.cat([x, x.narrow(n, 0, min(1, x.shape[n]))], n),
    "every other": lambda x, n: x.movedim(n, -1)[..., ::2].movedim(-1, n),
    "far apart": lambda x, n: torch.stack([x] * 3, n + 1).select(n + 1, 1),
    "transposed": lambda x, n: x.transpose(n, -1),
    "columns first": lambda x, n: x.transpose(n, -1).contiguous().transpose(n, -1),
    "flat": lambda x, n: x.flatten(),
    "in a batch": lambda x, n: x[None],
    "in a column": lambda x, n: x[..., None].expand(*x.shape, 3)[..., :1],
    "the same everywhere": lambda x, n: x.as_strided(x.shape, [0] * x.dim()),
    "misaligned": lambda x, n: misaligned(x),
    "far below": lambda x, n: torch.full_like(x, -128 if x.itemsize == 1 else -(2**31)),
    "far above": lambda x, n: torch.full_like(x, 127 if x.itemsize == 1 else 2**31 - 1),
    **{
        str(dtype): lambda x, n, dtype=dtype: x.to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.int64,
                      torch.bool)
    },
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_drawn_calls_touch_no_foreign_memory(call, run):
    """They fail or give outputs of some size, and the sanitizers of the next tests watch them."""
    outcomes = Counter()

    @settings(
        max_examples=int(os.environ.get("TFKERN_TEST_DRAWS", 150)),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def draws(data):
        torch.manual_seed(0)
        operator, args = call()
        for name in data.draw(st.lists(st.sampled_from(list(args)), min_size=1, max_size=3)):
            x = args[name]
            if not isinstance(x, torch.Tensor):
                args[name] = data.draw(st.sampled_from([x, *NUMBERS]), name)
                continue
            x = x if x.dim() else x[None]
            change = CHANGES[data.draw(st.sampled_from(list(CHANGES)), name)]
            args[name] = change(x, data.draw(st.integers(0, x.dim() - 1), "dimension"))
        try:
            run(operator, args)
            outcomes["computed"] += 1
        except (RuntimeError, ValueError, TypeError, IndexError):
            outcomes["refused"] += 1

    draws()
    assert outcomes["computed"] > 5 and outcomes["refused"] > 5


# ---- sanitizers ----

FILE = emulation.ROOT / "tests" / "test_operators.py"
FILES = [FILE, *(x for op in tfkern.ops.OPS for x in sorted(FILE.parent.glob(f"test_{op}*.py")))]
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
    selection = f"(native or (test_operators and cpu)) and ({chosen}) and not under_sanitizers"
    options = {"flavour": "sanitized", "TFKERN_TEST_DRAWS": str(draws)}
    passes(emulation.pytest_on_cpu("-k", selection, *FILES, **options))


@pytest.mark.parametrize(
    "draws", [100, pytest.param(3000, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_kernels_of_cuda_under_sanitizers(draws):
    """tests/test_cuda.py does the same to the tests of the ops."""
    options = {"flavour": "sanitized", "order": 7, "TFKERN_TEST_DRAWS": str(draws)}
    passes(emulation.pytest("-k", "host and not under_sanitizers", FILE, **options))


@pytest.mark.slow
def test_threads_of_the_cpu_under_sanitizers():
    """ThreadSanitizer ends the process at the first access that nothing orders."""
    chosen = (
        "matches or residual or activations or each_value or long_rows or decode or bias or sizes"
    )
    left_out = "compile or opcheck or vmap or float64 or float16"
    selection = f"(native or (valid and cpu)) and ({chosen}) and not ({left_out})"
    passes(emulation.pytest_on_cpu("-k", selection, *FILES, flavour="threads"))


def passes(result):
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout


def schema(operator):
    """The types of an operator's arguments."""
    return [str(x.type) for x in getattr(OPS, operator).default._schema.arguments]


class _Heap(ctypes.Structure):
    """What mallinfo2 of the GNU C library returns; `uordblks` are the bytes in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="malloc does not tell what is in use"
)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_calls_leave_no_memory_in_use(call, run, one_thread, request):
    """Not even the bytes of a string: they would keep large freed blocks beside them apart."""
    used = ctypes.CDLL(None).mallinfo2
    used.restype = _Heap
    operator, args = call()
    if request.node.callspec.params["run"] == "host" and "str" not in schema(operator):
        pytest.skip("threads that stand for a GPU's have memory of their own, which comes and goes")
    counts, calls = [], 200
    for _ in range(4):
        for _ in range(calls):
            run(operator, args)
        counts.append(used().uordblks)
    assert counts[-1] - counts[-2] < calls * 16  # the smallest block that could leak has 32
