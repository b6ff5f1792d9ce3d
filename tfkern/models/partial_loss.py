"""The cross entropy of logits that several processes share, each with those of some tokens.

No process has all logits of a row: of each row they exchange its log-sum-exp over a part of the
vocabulary, and the logit of its target, which one of them has (Shoeybi et al. 2019).
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tfkern import ops
from tfkern.models.heads import VocabularyPart
from tfkern.ops import checks


def partial_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    part: VocabularyPart,
    ignore_index: int,
    *,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """The mean `tfkern.cross_entropy` of logits, of which this process has a part.

    With s_n the logits, t the target and V the number of tokens, a row has the loss

        lse - (1 - label_smoothing) s_t - label_smoothing / V sum_n s_n + z_loss lse^2

    Args:
        x: (..., K), the same on all processes. Its gradient is one of the parts of the whole one.
        weight, bias: (size, K) and (size,) of the part.
        targets: (...), of the whole vocabulary, or ignore_index; the same on all processes.

    Raises:
        ValueError: what `tfkern.linear_cross_entropy` refuses.
    """
    mesh, first, size, classes = part
    exists = targets != ignore_index
    wrong = exists & ((targets < 0) | (targets >= classes))
    if checks.values_at_hand(targets) and wrong.any():
        raise ValueError(f"targets must lie in [0, {classes}) or be {ignore_index}")
    mine = (targets >= first) & (targets < first + size)
    own = torch.where(mine, targets - first, ignore_index)
    loss, lse = _rows(x, weight, bias, own, softcap)
    given = (1 - label_smoothing) * torch.where(mine, lse - loss, 0)  # lse - loss is s_t
    if label_smoothing:
        share = label_smoothing / classes
        given = given + share * _sum(x, weight, bias, softcap).to(given.dtype)
    lse = _gathered(lse, mesh).logsumexp(0)
    losses = lse - _summed(given, mesh) + z_loss * lse.square()
    losses = torch.where(wrong, torch.nan, torch.where(exists, losses, 0))
    return losses.sum() / exists.sum().clamp(min=1)


def _rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, **more: Any
) -> tuple[Tensor, Tensor]:
    """The loss and the log-sum-exp of each row."""
    options: dict[str, Any] = {"softcap": softcap, "reduction": "none", "return_lse": True, **more}
    if x.device.type == "cpu" and x.dtype.itemsize == 2:  # pieces take thrice as long there
        return ops.cross_entropy(ops.linear(x, weight, bias), targets, **options)
    return ops.linear_cross_entropy(x, weight, targets, bias=bias, **options)


def _sum(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """The sum of the logits of each row."""
    if softcap:  # with all of its probability for all classes alike, the loss is lse - mean
        none = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
        loss, lse = _rows(x, weight, bias, none, softcap, label_smoothing=1.0)
        return len(weight) * (lse - loss)
    dtype = torch.promote_types(x.dtype, torch.float32)
    found = x.to(dtype) @ weight.sum(0, dtype=dtype)
    return found if bias is None else found + bias.sum(dtype=dtype)


def _gathered(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The x of all processes, along a new first axis. All processes make the same of it."""
    parts = DTensor.from_local(x[None], mesh, [Shard(0)], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local()


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the x of all processes. All processes make the same of it."""
    summands = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return summands.redistribute(placements=[Replicate()]).to_local()
