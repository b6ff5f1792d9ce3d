"""Cross entropy of logits: checks, autograd, public function."""

from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import autograd, checks

dispatch.register("cross_entropy")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """The cross entropy of rows of logits in nats, in one pass over them.

        s    = softcap tanh(logits / softcap), or the logits if softcap is 0
        lse  = log sum_n exp(s_n)
        loss = (1 - e) w_t (lse - s_t) + (e / V) sum_n w_n (lse - s_n) + z_loss lse^2

    e is `label_smoothing`, t a row's target and w_n the weight of class n. Sums are float32
    (float64 for float64 logits) whatever the dtype of the logits, which are never overwritten; the
    gradient takes a second pass. Neither makes a tensor of the size of the logits but the gradient.

    Args:
        logits: (..., V), float32, float64, bfloat16 or float16: classes lie along the last axis.
        targets: (...) int64 or int32, the class of each row, or ignore_index.
        ignore_index: rows with this target have no loss and no gradient.
        label_smoothing: part of the target's probability that all classes share, 0 to 1.
        z_loss: factor of the squared log-sum-exp, which keeps it near 0.
        softcap: bound of the capped logits, 0 for none.
        weight: (V,), any floating dtype: factors of the classes, which get no gradient.
        reduction: "mean" over the rows that are not ignored, "sum" or "none". As in torch, a mean
            with weights divides by the sum of the targets' weights; that of z_loss by the number
            of rows.
        return_lse: also return the log-sum-exp of all rows, which is differentiable.
        backend: forces "native", "triton" or "reference" for this call.

    Returns:
        The loss, 0-d or (...) if reduction is "none", or (loss, lse) with lse (...). Both are
        float32, or float64 for float64 logits. The mean of no rows is 0.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit together. On a CPU also a
            target outside of 0 to V - 1, which elsewhere gives a loss and gradients of NaN.
        NotImplementedError: the forced backend cannot serve the call.

    Label smoothing: Szegedy et al. 2016. z-loss: Chowdhery et al. 2022 (PaLM). Softcap: Bello et
    al. 2017, Gemma Team 2024. One pass: Milakov, Gimelshein 2018.
    """
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    z_loss = checks.number("z_loss", z_loss)
    args = bind(
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        weight=weight,
        ignored_lse=return_lse,
    )
    backend = dispatch.select("cross_entropy", args, backend)
    loss, lse, _ = autograd.apply(_CrossEntropy, *dispatch.distinct(args), backend)
    _, targets, weight, ignore_index, *_ = args
    loss = reduced(loss, lse, targets, weight, ignore_index, z_loss, reduction)
    return (loss, lse) if return_lse else loss


def bind(
    logits,
    targets,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=0.0,
    weight=None,
    ignored_lse=False,
    z_loss=0.0,
    reduction="mean",
):
    """Checks the public arguments, and returns those of an implementation's forward, in order.

    `z_loss` and `reduction` are accepted for `explain`; no implementation knows them.
    """
    checks.floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V > 0, got shape {tuple(logits.shape)}")
    return logits, *bind_targets(
        "logits",
        logits,
        logits.shape[-1],
        targets,
        ignore_index,
        label_smoothing,
        softcap,
        "weight",
        weight,
    ), bool(ignored_lse)  # fmt: skip


def bind_targets(
    name, x, V, targets, ignore_index, label_smoothing, softcap, weight_name, weight
):  # fmt: skip
    """Checks the targets and options of rows x (..., any) with V classes, and returns targets,
    weight, ignore_index, label_smoothing and softcap as implementations take them."""
    if isinstance(targets, Tensor) and targets.is_floating_point():
        raise ValueError(f"targets must be class indices of int64 or int32, got {targets.dtype}")
    checks.integers("targets", targets, x, name)
    checks.shape("targets", targets, x.shape[:-1], f"the shape of {name} without the last axis")
    if not checks.is_integer(ignore_index) or not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int of 64 bits, got {ignore_index!r}")
    label_smoothing = checks.probability("label_smoothing", label_smoothing)
    softcap = checks.number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must not be negative, got {softcap}")
    if weight is not None:
        checks.floating(weight_name, weight)
        checks.same_device(name, x, weight_name, weight)
        checks.shape(weight_name, weight, (V,), "the number of classes")
        if torch.is_grad_enabled() and dispatch.requires_grad((weight,)):
            raise ValueError(f"{weight_name} gets no gradient: detach it")
        weight = weight.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    _check_range(targets, V, ignore_index)
    return targets.to(torch.int64), weight, ignore_index, label_smoothing, softcap


def _check_range(targets: Tensor, V: int, ignore_index: int) -> None:
    if not checks.values_at_hand(targets) or not targets.numel():
        return
    least, most = (int(x) for x in targets.aminmax())
    if least < 0 or most >= V:
        used = targets[targets != ignore_index]
        if used.numel():
            checks.within("targets", used, 0, V - 1)


def reduced(
    loss: Tensor,
    lse: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    z_loss: float,
    reduction: str,
) -> Tensor:
    """The losses of rows with z_loss, reduced as `cross_entropy` says."""
    squares = None
    if z_loss:  # the lse of an ignored row may be NaN
        squares = torch.where(targets != ignore_index, lse, 0).square()
    if reduction == "none":
        return loss if squares is None else loss + z_loss * squares
    # A float32 sum of many rows would cost more digits than the rows have lost.
    total = loss.sum(dtype=torch.float64)
    count, z_count = counts(targets, weight, ignore_index, reduction)
    total = total / count
    if squares is not None:
        total = total + z_loss * squares.sum(dtype=torch.float64) / z_count
    return total.to(loss.dtype)


def counts(
    targets: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """What the sums of the losses and of lse^2 are divided by, as 0-d float64 tensors: for a mean
    the sum of the targets' weights and the number of rows, or 1 if these are 0."""
    if reduction == "sum":
        one = torch.ones((), dtype=torch.float64, device=targets.device)
        return one, one
    used = targets != ignore_index
    count = weights = used.sum().double()
    if weight is not None:
        own = weight[targets.clamp(0, len(weight) - 1)]
        weights = torch.where(used, own, 0).sum(dtype=torch.float64)
    return _or_one(weights), _or_one(count)


def _or_one(x: Tensor) -> Tensor:
    """A divisor that leaves the sum of no rows 0."""
    return torch.where(x == 0, 1, x)


_Backward = autograd.first_order("cross_entropy")


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy for autograd: takes an implementation's arguments and the backend's name."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        *arguments, backend = args
        return dispatch.implementation("cross_entropy", backend).forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, targets, weight, *ctx.options, _, ctx.backend = inputs
        _, lse, rest = output
        ctx.mark_non_differentiable(rest)
        ctx.save_for_backward(logits, targets, weight, lse, rest)
        ctx.set_materialize_grads(False)  # dlse is often absent

    @staticmethod
    def backward(ctx, dloss, dlse, _rest):
        logits, *tensors = ctx.saved_tensors
        V = logits.shape[-1]
        dlogits = autograd.apply(
            _Backward, logits, *tensors, dloss, dlse, *ctx.options, 0, V, ctx.backend
        )
        return dlogits, *(None,) * 7
