"""The cross entropy of a linear layer, and its gradients, on pieces of the logits.

They consist of torch's products and of the kernels of `cross_entropy`. The loops over pieces are
operators, so that torch.compile does not unroll them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tfkern import dispatch

_library = torch.library.Library("tfkern_composed", "DEF")


def sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _slices(size: int, pieces: int, least: int) -> list[slice]:
    """At most `pieces` slices of a size; none but the last is shorter than `least`, with which
    products are still fast."""
    step = max(least, -(-size // pieces // 64) * 64)
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _row_pieces(M: int) -> list[slice]:
    return _slices(M, 16, least=256)


def _column_pieces(V: int) -> list[slice]:
    return _slices(V, 32, least=512)


def _linear(x, weight, bias, backend):
    """x weight^T + bias by torch or by a backend of `linear`."""
    if backend is None:
        return F.linear(x, weight, bias)
    return dispatch.implementation("linear", backend).forward(x, weight, bias)


def _linear_into(out, x, weight, bias, add, backend):
    """Writes x weight^T + bias into out, or with `add`, which goes without bias, adds it."""
    own = None if backend is None else dispatch.implementation("linear", backend)
    if own is not None and own.is_ours(x, x.dtype):
        own.product_into(out, x, weight, bias, add)
    elif bias is None:
        torch.addmm(out, x, weight.t(), beta=int(add), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _linear_backward(dy, x, weight, want_dbias, backend):
    """dx, dweight and dbias. dx is None if weight is, and dweight if x is."""
    dx = None if weight is None else _linear(dy, weight.t(), None, backend)
    dweight = None if x is None else _linear(dy.t(), x.t(), None, backend)
    return dx, dweight, dy.sum(0) if want_dbias else None


def _part(x: Tensor | None, n: slice) -> Tensor | None:
    return None if x is None else x[n]


def _start(
    x: Tensor | None, wanted: bool, other: Tensor, make: Callable[..., Tensor] = torch.zeros
) -> Tensor:
    """The start of the gradient of x, or an empty tensor if it is not wanted."""
    if x is None or not wanted:
        return other.new_empty(0)
    return make(x.shape, dtype=x.dtype, device=x.device)


def _logits(x, weight, bias, linear):
    """Yields pieces of rows with their logits, all in the same memory: on a CPU, to touch fresh
    memory takes longer than to compute what it holds."""
    pieces = _row_pieces(len(x))
    memory = x.new_empty(pieces[0].stop if pieces else 0, len(weight))
    for m in pieces:
        out = memory[: m.stop - m.start]
        _linear_into(out, x[m], weight, bias, False, linear)
        yield m, out


def _statistics(x, targets):
    """Uninitialised loss, lse and rest."""
    return tuple(x.new_empty(targets.shape, dtype=sum_dtype(x)) for _ in range(3))


def _forward(
    x, weight, bias, targets, class_weight, ignore_index, label_smoothing, softcap, ignored_lse,
    backend, linear,
):  # fmt: skip
    op, results = dispatch.implementation("cross_entropy", backend), _statistics(x, targets)
    x, t = x.reshape(targets.numel(), x.shape[-1]), targets.flatten()
    for m, logits in _logits(x, weight, bias, linear):
        parts = op.forward(
            logits, t[m], class_weight, ignore_index, label_smoothing, softcap, ignored_lse
        )
        for result, part in zip(results, parts, strict=True):
            result.view(-1)[m] = part
    return results


def _backward(
    x, weight, bias, targets, class_weight, lse, rest, dloss, dlse,
    ignore_index, label_smoothing, softcap, backend, linear, want_dx, want_dweight, want_dbias,
):  # fmt: skip
    op = dispatch.implementation("cross_entropy", backend)
    shape, x, t = x.shape, x.reshape(targets.numel(), x.shape[-1]), targets.flatten()
    V = len(weight)
    rows = [None if r is None else r.flatten() for r in (lse, rest, dloss, dlse)]
    dx = torch.zeros(x.shape if want_dx else 0, dtype=lse.dtype, device=x.device)
    dweight, dbias = _start(weight, want_dweight, x), _start(bias, want_dbias, x)
    for n in _column_pieces(V):
        dz = _linear(x, weight[n], _part(bias, n), linear)
        op.backward_(dz, t, class_weight, *rows, ignore_index, label_smoothing, softcap, n.start, V)
        if want_dx:
            for m in _slices(len(x), 4, least=256):
                dx[m] += _linear_backward(dz[m], None, weight[n], False, linear)[0]
        _, part_dweight, part_dbias = _linear_backward(
            dz, x if want_dweight else None, None, want_dbias, linear
        )
        if want_dweight:
            dweight[n] = part_dweight
        if want_dbias:
            dbias[n] = part_dbias
    return dx.to(x.dtype).view(shape) if want_dx else x.new_empty(0), dweight, dbias


def _formed(
    x, weight, bias, targets, class_weight, dloss, z,
    ignore_index, label_smoothing, softcap, backend, linear, want_dx, want_dweight, want_dbias,
):  # fmt: skip
    op, results = dispatch.implementation("cross_entropy", backend), _statistics(x, targets)
    options = ignore_index, label_smoothing, softcap
    shape, x, t = x.shape, x.reshape(targets.numel(), x.shape[-1]), targets.flatten()
    # The first piece overwrites dweight: to fill it with zeros is a pass over all of its memory.
    make = torch.zeros if len(x) == 0 else torch.empty
    dx, dweight = _start(x, want_dx, x, make), _start(weight, want_dweight, x, make)
    dbias = _start(bias, want_dbias, x)
    for m, dz in _logits(x, weight, bias, linear):
        loss, lse, rest = op.forward(dz, t[m], class_weight, *options, False)
        dlse = None if z is None else dlse_of(z, lse, t[m], ignore_index)
        op.backward_(
            dz, t[m], class_weight, lse, rest, dloss.expand(lse.shape), dlse,
            *options, 0, len(weight),
        )  # fmt: skip
        if want_dx:
            _linear_into(dx[m], dz, weight.t(), None, False, linear)
        if want_dweight:
            _linear_into(dweight, dz.t(), x[m].t(), None, m.start > 0, linear)
        if want_dbias:
            dbias += dz.sum(0)
        for result, part in zip(results, (loss, lse, rest), strict=True):
            result.view(-1)[m] = part
    return *results, dx.view(shape) if want_dx else dx, dweight, dbias


def dlse_of(z: Tensor, lse: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The gradient of lse, of which z lse^2 is a part of the loss in rows that are not ignored."""
    return torch.where(targets != ignore_index, 2 * z * lse, 0)


def _gradients(x, weight, bias, *others):
    """Uninitialised gradients; the last three arguments say which are wanted."""
    *_, want_dx, want_dweight, want_dbias = others
    wanted = want_dx, want_dweight, want_dbias
    return tuple(
        p.new_empty(p.shape) if w else x.new_empty(0)
        for p, w in zip((x, weight, bias), wanted, strict=True)
    )


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor targets, Tensor? class_weight"
_OPTIONS = "int ignore_index, float label_smoothing, float softcap"
_WANTED = "bool want_dx, bool want_dweight, bool want_dbias"
_ROWS, _GRADIENTS = (
    "Tensor loss, Tensor lse, Tensor rest",
    "Tensor dx, Tensor dweight, Tensor dbias",
)


def _register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    name = schema[: schema.index("(")]
    _library.define(schema)
    # An exported program calls operators with parameters that require a gradient.
    _library.impl(name, torch.no_grad()(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tfkern_composed::{name}", fake, lib=_library)
    operator = getattr(torch.ops.tfkern_composed, name).default
    dispatch.refuse_derivatives(operator)
    return operator


forward = _register(
    f"linear_cross_entropy_forward({_TENSORS}, {_OPTIONS}, bool ignored_lse, str backend, "
    f"str? linear) -> ({_ROWS})",
    _forward,
    lambda x, weight, bias, targets, *options: _statistics(x, targets),
)
backward = _register(
    f"linear_cross_entropy_backward({_TENSORS}, Tensor lse, Tensor rest, Tensor? dloss, "
    f"Tensor? dlse, {_OPTIONS}, str backend, str? linear, {_WANTED}) -> ({_GRADIENTS})",
    _backward,
    _gradients,
)
formed = _register(
    f"linear_cross_entropy_formed({_TENSORS}, Tensor dloss, Tensor? z, {_OPTIONS}, "
    f"str backend, str? linear, {_WANTED}) -> ({_ROWS}, {_GRADIENTS})",
    _formed,
    lambda x, weight, bias, targets, *others: (
        *_statistics(x, targets),
        *_gradients(x, weight, bias, *others),
    ),
)
