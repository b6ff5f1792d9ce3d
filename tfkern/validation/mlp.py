"""The MLP in torch's own operators, and random cases of it."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from tfkern import ops
from tfkern.validation.case import Case, draw_size

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def draws(rng: random.Random, tensor: Callable[..., Tensor], backend: str | None) -> Iterator[Case]:
    while True:
        yield _draw(rng, tensor, backend)


def _draw(rng, tensor, backend) -> Case:
    M, K, F_, N = (draw_size(rng, 16, most) for most in (100, 160, 200, 160))
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
