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
    tensors, options = bind(
        x,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        class_weight=class_weight,
    )
    backend = dispatch.select("cross_entropy", _of_kernels(tensors, options, return_lse), backend)
    linear = dispatch.find("linear", (x, weight, None, x.dtype))
    tensors, names = dispatch.distinct(tensors), (backend, linear)
    _, _, _, targets, class_weight = tensors
    with dispatch.no_autocast(x.device):
        if reduction != "none" and not return_lse and _can_form(x, tensors):
            wanted = [t is not None and t.requires_grad for t in (x, weight, bias)]
            total, *_ = autograd.apply(
                _Formed, *tensors, *options, z_loss, reduction, *names, *wanted
            )
            return total
        loss, lse, _ = autograd.apply(_Recomputed, *tensors, *options, return_lse, *names)
        loss = reduced(loss, lse, targets, class_weight, ignore_index, z_loss, reduction)
        return (loss, lse) if return_lse else loss


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
):
    """Checks the public arguments. Returns the tensors x, weight, bias, targets, class_weight, and
    ignore_index, label_smoothing and softcap."""
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
    return (x, weight, bias, targets, class_weight), tuple(options)


def bind_kernels(
    *args: Any,
    reduction: str = "mean",
    z_loss: float = 0.0,
    return_lse: bool = False,
    **options: Any,
) -> tuple:
    """`bind` for `explain`: the arguments of the kernels between the products."""
    tensors, numbers = bind(*args, **options)
    return _of_kernels(tensors, numbers, return_lse)


def _of_kernels(tensors: tuple, options: tuple, ignored_lse: bool) -> tuple:
    """The arguments of `cross_entropy` by which a backend is chosen. x stands for the logits, whose
    dtype and device it has."""
    x, _, _, targets, class_weight = tensors
    return x, targets, class_weight, *options, bool(ignored_lse)


def _can_form(x: Tensor, tensors: tuple) -> bool:
    """Whether the gradients are formed with the loss: in their own dtype, outside of torch.func."""
    if x.dtype.itemsize == 2 or torch._C._are_functorch_transforms_active():
        return False
    return torch.is_grad_enabled() and dispatch.requires_grad(tensors)


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
        want_dx, want_dweight, want_dbias, *_ = ctx.needs_input_grad
        wanted = want_dx, want_dweight, want_dbias
        x, *others = ctx.saved_tensors
        with dispatch.no_autocast(x.device):
            grads = autograd.apply(_Gradients, x, *others, dloss, dlse, *ctx.options, *wanted)
        return *(d if w else None for d, w in zip(grads, wanted, strict=True)), *(None,) * 8


class _Formed(torch.autograd.Function):
    """The reduced loss, and all that its backward needs: the gradients up to a factor.

    The first backward hands these gradients over. Should there be a second one of the same graph,
    it computes the logits again.
    """

    @staticmethod
    def forward(
        x, weight, bias, targets, class_weight, ignore_index, label_smoothing, softcap, z_loss,
        reduction, backend, linear, *wanted,
    ):  # fmt: skip
        factors = _row_factors(targets, class_weight, ignore_index, z_loss, reduction, x)
        loss, lse, rest, *grads = logit_pieces.formed(
            x, weight, bias, targets, class_weight, *factors,
            ignore_index, label_smoothing, softcap, backend, linear, *wanted,
        )  # fmt: skip
        total = reduced(loss, lse, targets, class_weight, ignore_index, z_loss, reduction)
        return total, lse, rest, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, targets, class_weight, *ctx.options = inputs
        _, lse, rest, *formed = output
        ctx.mark_non_differentiable(lse, rest, *formed)
        tensors = x, weight, bias, targets, class_weight, lse, rest
        if torch.compiler.is_compiling():  # which wants all tensors saved
            ctx.save_for_backward(*tensors, *formed)
            ctx.formed = None
        else:  # autograd would copy gradients that it has saved
            ctx.save_for_backward(*tensors)
            ctx.formed = formed

    @staticmethod
    def backward(ctx, factor, *_):
        # Checkpoints allow to read the saved tensors once.
        x, weight, bias, targets, class_weight, lse, rest, *saved = ctx.saved_tensors
        tensors = x, weight, bias, targets, class_weight
        ignore_index, label_smoothing, softcap, z_loss, reduction, backend, linear, *wanted = (
            ctx.options
        )
        formed, ctx.formed = saved or ctx.formed, None
        if formed is not None:
            grads = autograd.apply(_Scaled, factor, *formed, *tensors)
        else:
            dloss, z = _row_factors(targets, class_weight, ignore_index, z_loss, reduction, x)
            dlse = None
            if z is not None:
                dlse = logit_pieces.dlse_of(factor * z, lse, targets, ignore_index)
            grads = autograd.apply(
                _Gradients, *tensors, lse, rest, (factor * dloss).expand(lse.shape), dlse,
                ignore_index, label_smoothing, softcap, backend, linear, *wanted,
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
