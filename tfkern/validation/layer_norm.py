"""Random cases of layer norm and RMS norm."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from tfkern import ops
from tfkern.validation.case import Case, draw_size


def draws(rng: random.Random, tensor: Callable[..., Tensor], backend: str | None) -> Iterator[Case]:
    while True:
        yield _draw(rng, tensor, backend)


def _draw(rng, tensor, backend) -> Case:
    M, N = draw_size(rng, 4, 100), draw_size(rng, 32, 2000)
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
