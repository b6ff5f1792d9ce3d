"""The cases that `tfkern validate` draws, each with its counterpart in torch's own operators."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tfkern import ops
from tfkern.testing import Report, validate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


@dataclass(frozen=True)
class Case:
    """One call of a public function, to be compared with torch's."""

    label: str
    fn: Callable
    reference: Callable
    inputs: dict[str, Tensor | None]
    floor_scale: dict[str, float] = field(default_factory=dict)

    def run(self, seed: int = 0) -> Report:
        return validate(
            self.fn, self.reference, self.inputs, floor_scale=self.floor_scale, seed=seed
        )


def cases(
    op: str, dtype: torch.dtype, device: str, backend: str | None, seed: int, count: int = 8
) -> Iterator[Case]:
    """`count` cases of an op: "attention", "layer_norm" or "mlp", with sizes around tile edges.

    Raises:
        ValueError: an unknown op.
    """
    draws = {"attention": _attention, "layer_norm": _layer_norm, "mlp": _mlp}
    if op not in draws:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(draws)}")
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for _ in range(count):
        yield draws[op](rng, tensor, backend)


def _size(rng: random.Random, least: int, most: int) -> int:
    """A size beside a power of two, or any."""
    edge = 2 ** rng.randrange(most.bit_length()) + rng.choice((-1, 0, 1))
    return min(max(least, rng.choice((edge, rng.randint(least, most)))), most)


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
):
    """What `tfkern.attention` computes, by torch's attention over a dense mask.

    torch's fused kernel rather than unfused code: its backward has the cancellation in
    dp - rowsum(do o) that all kernels of this kind have. The log-sum-exp is unfused.
    """
    (B, H, T, D), S, Dv = q.shape, k.shape[2], v.shape[3]
    t, s = torch.arange(T, device=q.device)[:, None], torch.arange(S, device=q.device)
    rows = torch.tensor([T] * B, device=q.device) if query_lengths is None else query_lengths
    keys = torch.tensor([S] * B, device=q.device) if key_lengths is None else key_lengths
    rows, keys = rows.view(B, 1, 1, 1), keys.view(B, 1, 1, 1)
    mask = (t < rows) & (s < keys) & ((s <= t + keys - rows) | (not causal))
    seen = mask.any(-1, keepdim=True)
    q = torch.where(seen, q, 0)  # padding may hold NaN
    k, v = (torch.where(s[:, None] < keys, x, 0) for x in (k, v))
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    if S:
        o = F.scaled_dot_product_attention(q, k, v, mask | ~seen, scale=scale) * seen
    else:
        o = q.new_zeros(B, H, T, Dv)
    if not return_lse:
        return o
    scores = (D**-0.5 if scale is None else scale) * (q @ k.mT)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.masked_fill(~(mask | ~seen), -torch.inf)
    lse = scores.logsumexp(-1) if S else scores.sum(-1)
    return o, lse.masked_fill(~seen[..., 0], -torch.inf)


def attention_floor_scale(dtype: torch.dtype, S: int) -> dict[str, float]:
    """The scale of the floors in float32.

    Scores and lse, of a few units or about log S, are each off by as many roundings of 1, and with
    them p = exp(s - lse) by the same factor. In narrower dtypes, whose scores and lse are float32
    too, this disappears in the rest.
    """
    names = ("output", "output 0", "output 1", "q", "k", "v")
    return dict.fromkeys(names, 1 + 2 * math.log(8 + S)) if dtype == torch.float32 else {}


def _attention(rng, tensor, backend) -> Case:
    Hk, group = rng.randint(1, 2), rng.choice((1, 1, 2, 3))
    # The rule compares maxima, which takes some rows; and where a softmax is close to one-hot, its
    # gradient is nothing but cancellation.
    T, S = _size(rng, 1, 150), _size(rng, 16, 150)
    B = rng.randint(1, 3) + 64 // T
    D = rng.choice((8, 16, 40, 64, 80, 128, _size(rng, 1, 256)))
    Dv = rng.choice((D, D, _size(rng, 1, 128)))
    causal = rng.random() < 0.5
    scale = rng.choice((None, None, 0.5 * D**-0.5, -(D**-0.5)))
    inputs = {
        "q": tensor(B, T, Hk * group, D).transpose(1, 2),  # as projections lay it out
        "k": tensor(B, S, Hk, D).transpose(1, 2),
        "v": tensor(B, Hk, S, Dv),
    }
    label = f"B={B} H={Hk * group}/{Hk} T={T} S={S} D={D}/{Dv}"
    if rng.random() < 0.4:
        device = inputs["q"].device
        inputs["key_lengths"] = torch.tensor([rng.randint(S // 2, S) for _ in range(B)]).to(device)
        label += " lengths"
    options = {"causal": causal, "scale": scale, "return_lse": True}
    label += (" causal" if causal else "") + (f" scale={scale:.3f}" if scale is not None else "")
    fn = partial(ops.attention, **options, backend=backend)
    reference = partial(torch_attention, **options)
    return Case(label, fn, reference, inputs, attention_floor_scale(inputs["q"].dtype, S))


def _layer_norm(rng, tensor, backend) -> Case:
    M, N = _size(rng, 4, 100), _size(rng, 32, 2000)
    rms, affine, residual = (rng.random() < 0.5 for _ in range(3))
    mean = rng.choice((0, 0, 30))
    inputs: dict[str, Tensor | None] = {"x": tensor(M, N) + mean}
    if affine:
        inputs["weight"] = tensor(N)
        inputs |= {} if rms else {"bias": tensor(N)}
    if residual:
        inputs["residual"] = tensor(M, N)

    def reference(x, weight=None, bias=None, residual=None):
        h = x if residual is None else x + residual
        if rms:
            return F.rms_norm(h, (N,), weight, 1e-5)
        return F.layer_norm(h, (N,), weight, bias, 1e-5)

    fn = partial(ops.rms_norm if rms else ops.layer_norm, eps=1e-5, backend=backend)
    label = f"{'rms' if rms else 'layer'} M={M} N={N} mean={mean}"
    label += (" affine" if affine else "") + (" residual" if residual else "")
    return Case(label, fn, reference, inputs, dict.fromkeys(("weight", "bias"), math.sqrt(M)))


def _mlp(rng, tensor, backend) -> Case:
    M, K, F_, N = (_size(rng, 16, most) for most in (100, 160, 200, 160))
    gated, biased = (rng.random() < 0.5 for _ in range(2))
    activation = rng.choice(list(ACTIVATIONS))
    rows = 2 * F_ if gated else F_
    inputs: dict[str, Tensor | None] = {
        "x": tensor(M, K),
        "w1": tensor(rows, K) / math.sqrt(K),
        "b1": tensor(rows) if biased else None,
        "w2": tensor(N, F_) / math.sqrt(F_),
        "b2": tensor(N) if biased else None,
    }
    fn = partial(ops.gated_mlp if gated else ops.mlp, activation=activation, backend=backend)
    label = f"{'gated ' if gated else ''}{activation} M={M} K={K} F={F_} N={N}"
    reference = partial(torch_mlp, activation=activation, gated=gated)
    scale = dict.fromkeys(("w1", "b1", "w2", "b2"), math.sqrt(M))
    return Case(label + (" bias" if biased else ""), fn, reference, inputs, scale)


def torch_mlp(x, w1, b1, w2, b2, *, activation: str = "gelu_tanh", gated: bool = False) -> Tensor:
    """What `tfkern.mlp` and `tfkern.gated_mlp` compute, in torch's own operators."""
    h = F.linear(x, w1, b1)
    act = ACTIVATIONS[activation]
    if gated:
        gate, up = h.chunk(2, -1)
        h = act(gate) * up
    else:
        h = act(h)
    return F.linear(h, w2, b2)
