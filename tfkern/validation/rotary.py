"""Random cases of rotary positions."""

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tfkern import ops
from tfkern.validation.case import Case, draw_size


def draws(rng: random.Random, tensor: Callable[..., Tensor], backend: str | None) -> Iterator[Case]:
    while True:
        yield _draw(rng, tensor, backend)


def _draw(rng, tensor, backend) -> Case:
    B, T, D = rng.randint(1, 3), draw_size(rng, 1, 200), draw_size(rng, 2, 256)
    Hk = rng.randint(1, 4)
    H = Hk * rng.randint(1, 4)
    R = rng.choice((D // 2 * 2, 2 * rng.randint(1, D // 2)))
    interleaved, each = rng.random() < 0.5, rng.random() < 0.5
    x = tensor(B, T, H + Hk, D).transpose(1, 2)  # a projection of both
    angles = tensor(*((B,) if each else ()), T, R // 2).float()
    if interleaved:
        angles = angles.repeat_interleave(2, -1)
    else:
        angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def reference(q, k):
        c, s = (y.to(q.dtype)[:, None] if each else y.to(q.dtype) for y in (cos, sin))

        def turned(x):
            y = x[..., :R]
            if interleaved:
                other = torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)
            else:
                other = torch.cat([-y[..., R // 2 :], y[..., : R // 2]], -1)
            return torch.cat([y * c + other * s, x[..., R:]], -1)

        return turned(q), turned(k)

    def fn(q, k):
        return ops.rotary(q, k, cos, sin, interleaved=interleaved, backend=backend)

    label = f"B={B} H={H} Hk={Hk} T={T} D={D} R={R} " + ("neighbours" if interleaved else "halves")
    label += " a table for each sequence" if each else ""
    return Case(label, fn, reference, {"q": x[:, :H], "k": x[:, H:]})
