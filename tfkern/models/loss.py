"""From logits to a loss."""

from typing import Any

import torch
from torch import Tensor

from tfkern import ops
from tfkern.models.heads import DeferredLogits
from tfkern.ops import checks

IGNORED = -100  # the target of what has no loss
Logits = Tensor | DeferredLogits


def cross_entropy(
    logits: Logits | tuple[Logits, ...],
    targets: Tensor | tuple[Tensor, ...],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The mean cross entropy in nats, float32 or wider; for several heads, the sum of their means.

    Args:
        logits: (..., classes), as a model returns them, or a tuple with the logits of each head.
            Of `DeferredLogits` the loss is made in pieces. On a CPU it leaves out rows without a
            target where these are most, and logits of 16 bits are whole. With a part of a
            vocabulary, all processes that share it call this at once, and get the same loss.
        targets: (...) int64 or int32, -100 where there is none; for several heads, one tensor for
            each. For a language model (B, T): the token that follows each token.
        label_smoothing, z_loss: see `tfkern.cross_entropy`.

    Raises:
        ValueError: what `tfkern.cross_entropy` refuses, and another number of targets than heads.
    """
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    if isinstance(logits, DeferredLogits):
        if not isinstance(targets, Tensor):
            raise ValueError(f"targets must be one tensor, got {len(targets)}")
        x, targets, _ = _with_targets(logits.x, targets)
        return _of_deferred(logits._replace(x=x), targets, **options)
    if isinstance(logits, tuple):
        if not isinstance(targets, (tuple, list)) or len(targets) != len(logits):
            raise ValueError(f"targets must be {len(logits)} tensors, one for each head")
        means: Any = zip(logits, targets, strict=True)
        return torch.stack([cross_entropy(a, b, **options) for a, b in means]).sum()
    if isinstance(targets, (tuple, list)):
        raise ValueError(f"targets must be one tensor, got {len(targets)}")
    return ops.cross_entropy(logits, targets, **options)


def log_probs(logits: Logits, targets: Tensor) -> Tensor:
    """The log-probability in nats that a model gives each target, float32 or wider.

    Args:
        logits: (..., classes), as a model returns them, also in pieces (`DeferredLogits`).
        targets: (...) int64 or int32, -100 where there is none.

    Returns:
        (...), 0 where there is no target.

    Raises:
        ValueError: what `tfkern.cross_entropy` refuses, and logits of a part of a vocabulary.
    """
    if not isinstance(logits, DeferredLogits):
        return -ops.cross_entropy(logits, targets, reduction="none")
    if logits.part is not None:
        raise ValueError("no process has all log-probabilities of a vocabulary that several share")
    x, kept, rows = _with_targets(logits.x, targets)
    found = -_of_deferred(logits._replace(x=x), kept, reduction="none")
    if rows is None:
        return found
    return found.new_zeros(targets.numel()).index_put((rows,), found).view(targets.shape)


def _of_deferred(logits: DeferredLogits, targets: Tensor, **options: Any) -> Tensor:
    x, weight, bias = checks.autocast(logits.x, logits.weight, logits.bias)
    options["softcap"] = logits.softcap
    if logits.part is not None:
        # It imports DTensors, which takes longer than all else in this package.
        from tfkern.models.partial_loss import partial_cross_entropy

        return partial_cross_entropy(x, weight, bias, targets, logits.part, IGNORED, **options)
    if x.device.type == "cpu" and x.dtype.itemsize == 2:  # pieces take thrice as long there
        return ops.cross_entropy(ops.linear(x, weight, bias), targets, **options)
    return ops.linear_cross_entropy(x, weight, targets, bias=bias, **options)


def _with_targets(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of x that have a target, where most have none, as in masked language models, their
    targets and their numbers, which are None for all rows.

    How many there are is data, which a GPU would have to be asked for and a compiler cannot know:
    there all rows stay.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.shape[:-1] != targets.shape:
        return x, targets, None
    rows = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    if 2 * len(rows) > targets.numel():
        return x, targets, None
    return x.flatten(0, -2)[rows], targets.flatten()[rows], rows
