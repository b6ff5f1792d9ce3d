"""Rotary positions: checks, autograd, the public function."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tfkern import dispatch
from tfkern.ops import autograd, checks

dispatch.register("rotary")


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Turns queries and keys by the angles of their positions, both in one pass over memory.

    The first R features of a head are pairs (x_i, x_j); the rest is copied.

        y_i = x_i cos_i - x_j sin_i
        y_j = x_j cos_j + x_i sin_j

    j = i + R / 2, as in GPT-NeoX and Llama, or if `interleaved` j = i + 1 with an even i, as in
    GPT-J. The two entries of a pair are equal in tables of angles. Where they differ, the result is
    as written. Autocast does not apply: results keep the dtype of q.

    Args:
        q: (B, H, T, D), float32, float64, bfloat16 or float16. Any strides: q and k are often views
            of one projection.
        k: (B, Hk, T, D), with the dtype of q; or None, if there are only queries to turn.
        cos, sin: (T, R) or (B or 1, T, R) with an even R of at most D, any floating dtype, often
            float32 beside a bfloat16 q. One entry for each feature, as the models of transformers
            make them; for tables (T, R / 2) of pairs give `torch.cat([cos, cos], -1)`, or if
            interleaved `cos.repeat_interleave(2, -1)`. Row t belongs to token t, so packed
            documents and caches take tables made from their positions. They have no gradient.
        interleaved: which features are a pair.
        inplace: overwrite q and k with the results, which saves memory (but for torch.compile and
            vmap, which copy). Only where no gradient is needed, as under torch.no_grad().
        backend: forces "native", "triton" or "reference" for this call.

    Returns:
        q and k, turned: contiguous new tensors, or with `inplace` q and k themselves. None in place
        of k if there is none. The gradients of both lie in memory as (B, T, H, D), the order of the
        projection that they go on to.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; cos or sin that requires a
            gradient; with `inplace` a tensor whose elements share memory.
        RuntimeError: `inplace` where q or k requires a gradient.
        NotImplementedError: the forced backend cannot serve the call.

    Rotary position embedding: Su et al. 2021.
    """
    args = bind(q, k, cos, sin, interleaved=interleaved, inplace=inplace)
    backend = dispatch.select("rotary", args, backend)
    with dispatch.no_autocast(q.device):
        if inplace and not _is_traced():
            dispatch.implementation("rotary", backend).forward_(*args)
            for x in (q, k):
                if x is not None and not x.is_inference():
                    torch.autograd.graph.increment_version(x)  # so that autograd notices
            return q, k
        turned_q, turned_k = _apply(args, backend)
    if inplace:
        q.copy_(turned_q)
        if k is not None and turned_k is not None:
            k.copy_(turned_k)
        return q, k
    return turned_q, turned_k


def _is_traced() -> bool:
    """Whether an operator that overwrites its arguments must be replaced by a copy: vmap has no
    rule for it, tangents would stay as they are, and with symbolic sizes the Inductor of torch 2.13
    gives wrong results for views.
    """
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return traced or forward_ad._current_level >= 0


def bind(q, k, cos, sin, *, interleaved=False, inplace=False):
    """Checks the public arguments, and returns those of an implementation's forward, in order."""
    checks.floating("q", q)
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected 4 axes, (B, H, T, D)")
    B, _, T, D = q.shape
    if k is not None:
        checks.floating("k", k)
        checks.same_device("q", q, "k", k)
        checks.same_dtype("q", q, "k", k)
        heads = k.shape[1] if k.dim() == 4 else "Hk"
        checks.shape("k", k, (B, heads, T, D), "as q but for the number of heads")
    for name, table in (("cos", cos), ("sin", sin)):
        checks.floating(name, table)
        checks.same_device("q", q, name, table)
        if torch.is_grad_enabled() and dispatch.requires_grad([table]):
            raise ValueError(f"{name} has no gradient: detach it")
    if cos.dim() not in (2, 3):
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}, expected ({T}, R) or ({B}, {T}, R) beside q"
        )
    R = cos.shape[-1]
    if R % 2 or R > D:
        raise ValueError(f"cos must have an even number of features, at most {D} as q, got {R}")
    batch = () if cos.dim() == 2 else (1,) if cos.shape[0] == 1 else (B,)
    checks.shape("cos", cos, (*batch, T, R), "the tokens of q and the features to turn")
    checks.shape("sin", sin, cos.shape, "the shape of cos")
    if inplace:
        _check_inplace(q, k)
    return q, k, cos.expand(B, T, R), sin.expand(B, T, R), bool(interleaved), False


def _check_inplace(q: Tensor, k: Tensor | None) -> None:
    tensors = [q] if k is None else [q, k]
    if torch.is_grad_enabled() and dispatch.requires_grad(tensors):
        raise RuntimeError(
            "q or k requires a gradient, which inplace=True would lose: call under torch.no_grad()"
        )
    for name, x in zip("qk", tensors, strict=False):
        if _overlaps(x):
            raise ValueError(
                f"{name} has strides {x.stride()} for shape {tuple(x.shape)}: inplace=True cannot "
                "write to elements that share memory"
            )
    # Tensors have no addresses while torch.compile traces.
    if k is not None and not torch.compiler.is_compiling() and not _apart(q, k):
        raise ValueError("q and k share memory: inplace=True would turn elements twice")


def _axes(x: Tensor) -> list[tuple[int, int]]:
    """Stride and size of each axis that has several elements, the largest stride first."""
    axes = [(s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1]
    return sorted(axes, reverse=True)


def _reach(axes: list[tuple[int, int]]) -> int:
    """The distance from the first to the last element."""
    return sum(stride * (size - 1) for stride, size in axes)


def _overlaps(x: Tensor) -> bool:
    """Whether elements of x may share memory: whether an axis steps into what the axes below it
    reach. While torch.compile traces, which cannot sort symbolic strides, steps of 0 alone count.
    """
    if x.numel() == 0 or x.is_contiguous():
        return False
    if torch.compiler.is_compiling():
        return any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))
    axes = _axes(x)
    return any(axes[i][0] <= _reach(axes[i + 1 :]) for i in range(len(axes)))


def _apart(q: Tensor, k: Tensor) -> bool:
    """Whether q and k, neither of which overlaps itself, are known to share no elements.

    Along an axis that both have, one steps over the other: what is left to compare is a single step
    of each, from the same place on.
    """
    if torch._C._are_functorch_transforms_active() or not (q.numel() and k.numel()):
        return True
    if q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        return True
    start, above, below = k.storage_offset() - q.storage_offset(), _axes(q), _axes(k)
    while not (start > _reach(above) or -start > _reach(below)):
        if not above or not below or above[0][0] != below[0][0]:
            return False
        stride, above, below = above[0][0], above[1:], below[1:]
        start %= stride
        if start + _reach(below) >= stride:  # the step of k goes on into the next one of q
            return False
    return True


def _apply(args: tuple, backend: str) -> tuple[Tensor, Tensor | None]:
    # Dynamo traces no Function that defines jvp.
    function = _Rotary if torch.compiler.is_compiling() else _RotaryForwardMode
    turned = autograd.apply(function, *dispatch.distinct(args), backend)
    return turned if isinstance(turned, tuple) else (turned, None)


class _Rotary(torch.autograd.Function):
    """The rotation for autograd. Its backward is itself, so there are derivatives of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        *arguments, backend = args
        turned = dispatch.implementation("rotary", backend).forward(*arguments)
        return turned[0] if arguments[1] is None else turned

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, cos, sin, interleaved, inverse, backend = inputs
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.inverse, ctx.backend = interleaved, inverse, backend
        ctx.set_materialize_grads(False)  # a result that nobody uses has no gradient

    @staticmethod
    def backward(ctx, dq, dk=None):
        return *_turned(ctx, dq, dk, not ctx.inverse), *(None,) * 5


class _RotaryForwardMode(_Rotary):
    """The same with derivatives in forward mode."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Rotary.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[2:4])
        ctx.shapes = [x.shape for x in (output if isinstance(output, tuple) else (output,))]

    @staticmethod
    def jvp(ctx, q, k, cos, sin, *_):
        if cos is not None or sin is not None:
            raise NotImplementedError("rotary has no derivative by cos and sin")
        turned = zip(_turned(ctx, q, k, ctx.inverse), ctx.shapes, strict=False)
        some = k if q is None else q
        tangents = tuple(some.new_zeros(shape) if x is None else x for x, shape in turned)
        return tangents if len(tangents) == 2 else tangents[0]


def _turned(
    ctx: Any, q: Tensor | None, k: Tensor | None, inverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Turns tangents or gradients, of which one or both may be absent."""
    first, second = (k, None) if q is None else (q, k)
    if first is None:
        return None, None
    with dispatch.no_autocast(first.device):
        args = (first, second, *ctx.saved_tensors, ctx.interleaved, inverse)
        first, second = _apply(args, ctx.backend)
    return (None, first) if q is None else (first, second)
