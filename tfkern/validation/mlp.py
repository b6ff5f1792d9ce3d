"""The MLP in torch's own operators, and random cases of it."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from tfkern import ops
from tfkern.ops.activation import FUNCTIONS
from tfkern.validation.case import Case, draw_size


def draws(rng: random.Random, tensor: Callable[..., Tensor], backend: str | None) -> Iterator[Case]:
    while True:
        yield _draw(rng, tensor, backend)


def _draw(rng, tensor, backend) -> Case:
    M, K, F_, N = (draw_size(rng, 16, most) for most in (100, 160, 200, 160))
    gated, biased = (rng.random() < 0.5 for _ in range(2))
    activation = rng.choice(list(FUNCTIONS))

    def layer(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        return tensor(rows, columns) / math.sqrt(columns), tensor(rows) if biased else None

    inputs: dict[str, Tensor | None] = {"x": tensor(M, K)}
    if gated:
        inputs["w_gate"], inputs["b_gate"] = layer(F_, K)
        inputs["w_up"], inputs["b_up"] = layer(F_, K)
    else:
        inputs["w1"], inputs["b1"] = layer(F_, K)
    inputs["w2"], inputs["b2"] = layer(N, F_)
    fn = partial(ops.gated_mlp if gated else ops.mlp, activation=activation, backend=backend)
    label = f"{'gated ' if gated else ''}{activation} M={M} K={K} F={F_} N={N}"
    reference = partial(torch_gated_mlp if gated else torch_mlp, activation=activation)
    scale = dict.fromkeys(set(inputs) - {"x"}, math.sqrt(M))
    return Case(label + (" bias" if biased else ""), fn, reference, inputs, scale)


def torch_mlp(x, w1, b1, w2, b2, *, activation: str = "gelu_tanh") -> Tensor:
    """What `tfkern.mlp` computes, in torch's own operators."""
    return F.linear(FUNCTIONS[activation](F.linear(x, w1, b1)), w2, b2)


def torch_gated_mlp(x, w_gate, b_gate, w_up, b_up, w2, b2, *, activation: str = "silu") -> Tensor:
    """What `tfkern.gated_mlp` computes, in torch's own operators."""
    gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
    return F.linear(FUNCTIONS[activation](gate) * up, w2, b2)
