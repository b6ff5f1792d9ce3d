"""Cross entropy of a linear layer whose logits are never whole in memory.

It works on pieces of the logits (`logit_pieces.py`). There are two ways to the gradients:

Formed: if the rows are summed, the gradient is known up to a factor as soon as the loss is. A piece
has some rows of the logits, which turn into their own gradient at once, and the gradients of weight
and bias are sums over the pieces. This takes three products, as many as the plain layer does. It
serves float32 and float64, in which the gradients themselves can hold these sums.

Recomputed: forward keeps the log-sum-exp only. In backward a piece has some columns, so that the
gradient of their weights is a single product, which sums in float32, and only the gradient of x is
a sum over pieces. This takes a fourth product, but saves 16-bit numbers a copy of the weight's
gradient in float32, which would be larger than the pieces.
"""

from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import autograd, checks, logit_pieces
from tfkern.ops.cross_entropy import bind_targets, counts, reduced


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`cross_entropy` of the logits `x weight^T + bias`, which are never whole in memory.

    At most 1 / 16 of the logits is alive at once, or 256 rows of them. The result is that of
    `tfkern.cross_entropy(tfkern.linear(x, weight, bias), targets, ...)`. Gradients of float32 and
    float64 are formed along with the loss, unless `reduction` is "none" or `return_lse` is true;
    otherwise backward computes the logits again. Sums over pieces are float32 or wider. For a loss
    without a backward, use torch.no_grad(), so that no gradients are formed.

    Args:
        x: (..., K) hidden states, float32, float64, bfloat16 or float16.
        weight: (V, K) in the dtype of x; may be the table of a token embedding. Under autocast, x,
            weight and bias are cast to its dtype.
        targets: (...) int64 or int32, the class of each row, or ignore_index.
        bias: (V,) in the dtype of x.
        class_weight: (V,), the `weight` of `cross_entropy`.
        ignore_index, label_smoothing, z_loss, softcap, reduction, return_lse: as in
            `cross_entropy`.
        backend: forces "native", "triton" or "reference" for the part between the products.

    Returns:
        The loss, or (loss, lse), as `cross_entropy` returns them. The lse of a part of the
        vocabulary, with the logits of targets, lets several processes share a large vocabulary.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit together. On a CPU also a
            target outside of 0 to V - 1, which elsewhere gives a loss and gradients of NaN.
        NotImplementedError: the forced backend cannot serve the call.

    Method: Wijmans et al. 2024, "Cut your losses in large-vocabulary language models"; forming the
    gradient with the loss: Hsu et al. 2024 (Liger Kernel).
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    z_loss = checks.number("z_loss", z_loss)
    args, options = bind(
        x,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        class_weight=class_weight,
        return_lse=return_lse,
    )
    backend = dispatch.select("cross_entropy", (x, *args[3:], *options), backend)
    linear = dispatch.find("linear", (x, weight, None, x.dtype)) if x.dtype.itemsize == 2 else None
    args, names = dispatch.distinct(args), (backend, linear)
    with dispatch.no_autocast(x.device):
        if reduction == "none" or return_lse or not _can_form(args):
            loss, lse, _ = autograd.apply(_Recomputed, *args, *options, *names)
            targets, class_weight, ignore_index = args[3], args[4], options[0]
            loss = reduced(loss, lse, targets, class_weight, ignore_index, z_loss, reduction)
            return (loss, lse) if return_lse else loss
        wanted = [t is not None and t.requires_grad for t in args[:3]]
        options = (*options[:3], z_loss, reduction)
        return autograd.apply(_Formed, *args, *options, *names, *wanted)[0]


def bind(
    x,
    weight,
    targets,
    *,
    bias=None,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=0.0,
    class_weight=None,
    return_lse=False,
):
    """Checks the public arguments. Returns the tensors x, weight, bias, targets, class_weight, and
    ignore_index, label_smoothing, softcap and return_lse."""
    checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one axis, got a 0-d tensor")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            checks.floating(name, tensor)
            checks.same_device("x", x, name, tensor)
            checks.same_dtype("x", x, name, tensor)
    checks.columns("weight", weight, x.shape[-1], "the size of the last axis of x")
    V = weight.shape[0]
    if V == 0:
        raise ValueError(f"weight must have rows, got shape {tuple(weight.shape)}")
    if bias is not None:
        checks.shape("bias", bias, (V,), "the number of rows of weight")
    targets, class_weight, *options = bind_targets(
        "x", x, V, targets, ignore_index, label_smoothing, softcap, "class_weight", class_weight
    )
    return (x, weight, bias, targets, class_weight), (*options, bool(return_lse))


def bind_kernels(*args: Any, reduction: str = "mean", z_loss: float = 0.0, **options: Any) -> tuple:
    """The arguments for which the kernels between the products are chosen, for `explain`."""
    tensors, numbers = bind(*args, **options)
    return tensors[0], *tensors[3:], *numbers


def _can_form(args: tuple) -> bool:
    """Whether the gradients are formed with the loss: in their own dtype, outside of torch.func."""
    if args[0].dtype.itemsize == 2 or torch._C._are_functorch_transforms_active():
        return False
    return torch.is_grad_enabled() and dispatch.requires_grad(args)


class _Recomputed(torch.autograd.Function):
    """Loss, lse and rest of each row, whose backward computes the logits again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return logit_pieces.forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ignore_index, label_smoothing, softcap, _, backend, linear = inputs
        _, lse, rest = output
        ctx.mark_non_differentiable(rest)
        ctx.save_for_backward(*tensors, lse, rest)
        ctx.options = ignore_index, label_smoothing, softcap, backend, linear
        ctx.set_materialize_grads(False)  # dlse is often absent

    @staticmethod
    def backward(ctx, dloss, dlse, _rest):
        wanted = ctx.needs_input_grad[:3]
        tensors = ctx.saved_tensors
        with dispatch.no_autocast(tensors[0].device):
            grads = autograd.apply(_Gradients, *tensors, dloss, dlse, *ctx.options, *wanted)
        return *(d if w else None for d, w in zip(grads, wanted, strict=True)), *(None,) * 8


class _Formed(torch.autograd.Function):
    """The reduced loss, and all that its backward needs: the gradients up to a factor.

    The first backward hands these gradients over. Should there be a second one of the same graph,
    it computes the logits again.
    """

    @staticmethod
    def forward(*args):
        *tensors, ignore_index, label_smoothing, softcap, z_loss, reduction, backend, _ = args[:12]
        x, *_, targets, class_weight = tensors
        factors = _row_factors(targets, class_weight, ignore_index, z_loss, reduction, x)
        loss, lse, rest, *grads = logit_pieces.formed(
            *tensors, *factors, ignore_index, label_smoothing, softcap, backend, *args[12:]
        )
        total = reduced(loss, lse, targets, class_weight, ignore_index, z_loss, reduction)
        return total, lse, rest, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, numbers = inputs[:5], inputs[5:12]
        _, lse, rest, *formed = output
        ctx.mark_non_differentiable(lse, rest, *formed)
        ctx.numbers, ctx.formed = numbers, None
        if torch.compiler.is_compiling():  # which wants all tensors saved
            ctx.save_for_backward(*tensors, lse, rest, *formed)
        else:  # autograd would copy gradients that it has saved
            ctx.save_for_backward(*tensors, lse, rest)
            ctx.formed = formed

    @staticmethod
    def backward(ctx, factor, *_):
        saved = ctx.saved_tensors  # which checkpoints allow to be read once
        *tensors, lse, rest = saved[:7]
        formed, ctx.formed = saved[7:] or ctx.formed, None
        wanted = ctx.needs_input_grad[:3]
        if formed is not None:
            grads = autograd.apply(_Scaled, factor, *formed, *tensors)
        else:
            x, *_, targets, class_weight = tensors
            ignore_index, label_smoothing, softcap, z_loss, reduction, *names = ctx.numbers
            dloss, z = _row_factors(targets, class_weight, ignore_index, z_loss, reduction, x)
            dlse = (
                None if z is None else logit_pieces.dlse_of(factor * z, lse, targets, ignore_index)
            )
            grads = autograd.apply(
                _Gradients, *tensors, lse, rest, (factor * dloss).expand(lse.shape), dlse,
                ignore_index, label_smoothing, softcap, *names, *wanted,
            )  # fmt: skip
        return *(d if w else None for d, w in zip(grads, wanted, strict=True)), *(None,) * 12


def _row_factors(targets, class_weight, ignore_index, z_loss, reduction, x):
    """Factors of each row's loss and of its lse^2 in the reduced loss, the latter None without
    z_loss: 0-d tensors in the dtype of sums over x."""
    count, z_count = counts(targets, class_weight, ignore_index, reduction)
    dtype = logit_pieces.sum_dtype(x)
    return count.reciprocal().to(dtype), (z_loss / z_count).to(dtype) if z_loss else None


def _scaled(factor: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, *inputs: Any) -> tuple:
    """The formed gradients times the gradient of the loss, in place unless a compiler decides, or
    the loss has several gradients."""
    grads = dx, dweight, dbias
    if torch.compiler.is_compiling() or checks.is_batched(factor):
        return tuple(d * factor for d in grads)
    if not (checks.values_at_hand(factor) and factor == 1):
        for d in grads:
            d.mul_(factor)
    return grads


_Gradients = autograd.first_order("linear_cross_entropy", logit_pieces.backward)
_Scaled = autograd.first_order("linear_cross_entropy", _scaled)
