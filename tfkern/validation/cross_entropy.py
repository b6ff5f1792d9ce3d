"""Cross entropy in torch's own operators, and random cases of it, with and without its layer."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tfkern import ops
from tfkern.validation.case import Case, draw_size


def draws(rng: random.Random, tensor: Callable[..., Tensor], backend: str | None) -> Iterator[Case]:
    while True:
        yield _draw(rng, tensor, backend)


def _draw(rng, tensor, backend) -> Case:
    M, V = draw_size(rng, 4, 100), draw_size(rng, 2, 3000)
    K = draw_size(rng, 8, 100) if rng.random() < 0.5 else None
    targets = (tensor(M).float().abs() * V / 3).long().clamp(max=V - 1)
    ignored = rng.random() < 0.5
    if ignored:
        targets[1::3] = -100
    weight = tensor(V).abs().float() if rng.random() < 0.3 else None
    options = {
        "label_smoothing": rng.choice((0.0, 0.0, 0.1)),
        "softcap": rng.choice((0.0, 0.0, 5.0)),
        "z_loss": rng.choice((0.0, 0.0, 0.01)),
        "reduction": rng.choice(("none", "sum")),
    }
    label = f"M={M} V={V}" + "".join(f" {name}={x}" for name, x in options.items() if x)
    label += " ignored" * ignored + " weighted" * (weight is not None)
    told = {"targets": targets, "backend": backend, **options}
    if K is None:
        fn = partial(ops.cross_entropy, weight=weight, **told)
        inputs = {"logits": 3 * tensor(M, V)}
    else:
        fn = partial(ops.linear_cross_entropy, class_weight=weight, **told)
        inputs = {"x": tensor(M, K), "weight": 3 * tensor(V, K) / math.sqrt(K)}
        label = f"linear K={K} {label}"

    def reference(logits=None, x=None, **layer):
        logits = F.linear(x, layer["weight"]) if logits is None else logits
        return torch_cross_entropy(logits, targets, class_weight=weight, **options)

    return Case(label, fn, reference, inputs, {"weight": math.sqrt(M)})


def torch_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """What `tfkern.cross_entropy` computes, in torch's own operators; `class_weight` is its
    `weight`."""
    s = logits.to(torch.promote_types(logits.dtype, torch.float32))
    s = softcap * (s / softcap).tanh() if softcap else s
    loss = F.cross_entropy(
        s.flatten(0, -2),
        targets.flatten(),
        None if class_weight is None else class_weight.to(s.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if reduction == "none":
        loss = loss.view(targets.shape)
    if not z_loss:
        return loss
    used = targets != ignore_index
    squares = torch.where(used, s.logsumexp(-1), 0).square()
    if reduction == "none":
        return loss + z_loss * squares
    return loss + z_loss * squares.sum() / (used.sum() if reduction == "mean" else 1)
