"""The MLP, plain and gated: checks, autograd, public functions."""

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import autograd, checks

dispatch.register("mlp")

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    backend: str | None = None,
) -> Tensor:
    """Two linear layers with an activation between them, a transformer's feed-forward sublayer.

        y = act(x w1^T + b1) w2^T + b2

    Backward computes act(...) again from its argument, so that one tensor (..., F) is kept for it
    and not two. Under autocast, inputs are cast as `F.linear` casts its own.

    Args:
        x: (..., K), float32, float64, bfloat16 or float16.
        w1: (F, K), in the layout of `nn.Linear.weight` and the dtype of x, as are all that follow.
        b1: (F,) or None.
        w2: (N, F).
        b2: (N,) or None.
        activation: "relu"; "gelu", the exact x Phi(x); "gelu_tanh", its approximation by tanh, up
            to 5e-4 away; or "silu", x / (1 + exp(-x)).
        backend: forces "native", "triton" or "reference" for this call.

    Returns:
        y (..., N) in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or an unknown activation.
        NotImplementedError: the forced backend cannot serve the call.

    Feed-forward sublayer: Vaswani et al. 2017. GELU: Hendrycks, Gimpel 2016.
    """
    return _apply(x, bind(x, w1, b1, w2, b2, activation=activation), backend)


def gated_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """Two linear layers and a gated activation between them: SwiGLU with "silu", GEGLU with "gelu".

        gate, up = split(x w1^T + b1);   y = (act(gate) * up) w2^T + b2

    Otherwise as `mlp`.

    Args:
        x: (..., K), as for `mlp`.
        w1: (2F, K): the rows of the gate, then those of up.
        b1: (2F,), in the same order, or None.
        w2: (N, F).
        b2: (N,) or None.
        activation, backend: as for `mlp`.

    Returns:
        y (..., N) in the dtype of x.

    Raises:
        ValueError, NotImplementedError: as `mlp`.

    Gated linear units in transformers: Shazeer 2020.
    """
    return _apply(x, bind_gated(x, w1, b1, w2, b2, activation=activation), backend)


def bind(x, w1, b1, w2, b2, *, activation="gelu_tanh", gated=False):
    """The public arguments, checked, as the positional arguments of an implementation's forward."""
    named = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    for name, tensor in named.items():
        if tensor is not None or name not in ("b1", "b2"):
            checks.floating(name, tensor)
            checks.same_device("x", x, name, tensor)
    x, w1, b1, w2, b2 = checks.autocast(x, w1, b1, w2, b2)
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is not None:
            checks.same_dtype("x", x, name, tensor)

    if x.dim() == 0:
        raise ValueError("x must have at least one axis, got a 0-d tensor")
    checks.columns("w1", w1, x.shape[-1], "the size of the last axis of x")
    W = w1.shape[0]
    if gated and W % 2:
        raise ValueError(f"w1 must have rows for gate and up, an even number, got {W}")
    checks.columns("w2", w2, W // 2 if gated else W, "the hidden size given by the rows of w1")
    if b1 is not None:
        checks.shape("b1", b1, (W,), "the rows of w1")
    if b2 is not None:
        checks.shape("b2", b2, (w2.shape[0],), "the rows of w2")
    checks.choice("activation", activation, ACTIVATIONS)
    return _matrix(x), w1, b1, w2, b2, activation, gated


def bind_gated(x, w1, b1, w2, b2, *, activation="silu"):
    """`bind` for the gated MLP."""
    return bind(x, w1, b1, w2, b2, activation=activation, gated=True)


def _matrix(x: Tensor) -> Tensor:
    """x with all axes but the last as one; a view where strides allow."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _apply(x: Tensor, args: tuple, backend: str | None) -> Tensor:
    backend = dispatch.select("mlp", args, backend)
    with dispatch.no_autocast(x.device):
        y, _ = autograd.apply(_MLP, *dispatch.distinct(args), backend)
    return y.view(*x.shape[:-1], y.shape[-1])


_Backward = autograd.first_order("mlp")


class _MLP(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        *arguments, backend = args
        return dispatch.implementation("mlp", backend).forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w1, b1, w2, b2, activation, gated, backend = inputs
        _, pre = output
        ctx.mark_non_differentiable(pre)
        ctx.save_for_backward(x, w1, b1, w2, b2, pre)
        ctx.activation, ctx.gated, ctx.backend = activation, gated, backend
        ctx.set_materialize_grads(False)  # nobody reads the gradient of pre, as large as pre

    @staticmethod
    def backward(ctx, dy, _pre):
        if dy is None:
            return (None,) * 8
        wanted = tuple(ctx.needs_input_grad[:5])
        with dispatch.no_autocast(dy.device):
            grads = autograd.apply(
                _Backward, dy, *ctx.saved_tensors, ctx.activation, ctx.gated, wanted, ctx.backend
            )
        grads = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return *grads, None, None, None
