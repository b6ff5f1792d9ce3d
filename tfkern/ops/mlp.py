"""The MLP, plain and gated: checks, autograd, public functions."""

from typing import Any

import torch
from torch import Tensor

from tfkern import dispatch
from tfkern.ops import autograd, checks
from tfkern.ops.activation import FUNCTIONS

dispatch.register("mlp")

ACTIVATIONS = tuple(FUNCTIONS)


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
        w1: (F, K), in the layout of `nn.Linear.weight`. All weights and biases have the dtype of x.
        b1: (F,) or None.
        w2: (N, F).
        b2: (N,) or None.
        activation: "relu"; "gelu", the exact x Phi(x); "gelu_tanh", its approximation by tanh, up
            to 5e-4 away; "silu", x / (1 + exp(-x)); or "quick_gelu", x / (1 + exp(-1.702 x)), up to
            0.02 away from "gelu".
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
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """Two linear layers, a gated activation and a third: SwiGLU with "silu", GEGLU with "gelu".

        y = (act(x w_gate^T + b_gate) * (x w_up^T + b_up)) w2^T + b2

    All else is as in `mlp`.

    Args:
        x: (..., K), as for `mlp`.
        w_gate, w_up: (F, K).
        b_gate, b_up: (F,) or None.
        w2: (N, F).
        b2: (N,) or None.
        activation, backend: as for `mlp`.

    Returns:
        y (..., N) in the dtype of x.

    Raises:
        ValueError, NotImplementedError: as `mlp`.

    Gated linear units in transformers: Shazeer 2020.
    """
    args = bind_gated(x, w_gate, b_gate, w_up, b_up, w2, b2, activation=activation)
    return _apply(x, args, backend)


def bind(x, w1, b1, w2, b2, *, activation="gelu_tanh"):
    """Checks the public arguments, and returns those of an implementation's forward, in order: x,
    then weight and bias of the first layer, of up (None here) and of the last layer."""
    named = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    x, w1, b1, w2, b2 = _checked(named, activation)
    return x, w1, b1, None, None, w2, b2, activation


def bind_gated(x, w_gate, b_gate, w_up, b_up, w2, b2, *, activation="silu"):
    """`bind` for the gated MLP."""
    named = {"x": x, "w_gate": w_gate, "b_gate": b_gate, "w_up": w_up, "b_up": b_up}
    return *_checked(named | {"w2": w2, "b2": b2}, activation), activation


def _checked(named: dict[str, Any], activation: str) -> list[Any]:
    """Checks the tensors: x, then pairs of weight and bias. Returns them cast, x as a matrix."""
    x = named["x"]
    for name, tensor in named.items():
        if tensor is not None or not name.startswith("b"):
            checks.floating(name, tensor)
            checks.same_device("x", x, name, tensor)
    x, *rest = checks.autocast(*named.values())
    for name, tensor in zip(list(named)[1:], rest, strict=True):
        if tensor is not None:
            checks.same_dtype("x", x, name, tensor)

    if x.dim() == 0:
        raise ValueError("x must have at least one axis, got a 0-d tensor")
    names, weights = list(named)[1::2], rest[::2]
    for name, weight in zip(names[:-1], weights[:-1], strict=True):
        checks.columns(name, weight, x.shape[-1], "the size of the last axis of x")
    hidden = weights[0].shape[0]
    for name, weight in zip(names[1:-1], weights[1:-1], strict=True):
        checks.shape(name, weight, (hidden, x.shape[-1]), f"as many rows as {names[0]}")
    checks.columns(names[-1], weights[-1], hidden, f"the hidden size, the rows of {names[0]}")
    for name, weight, bias in zip(names, weights, rest[1::2], strict=True):
        if bias is not None:
            checks.shape(name.replace("w", "b"), bias, (len(weight),), f"the rows of {name}")
    checks.choice("activation", activation, ACTIVATIONS)
    return [_matrix(x), *rest]


def _matrix(x: Tensor) -> Tensor:
    """x with all axes but the last joined; a view where strides allow."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _apply(x: Tensor, args: tuple, backend: str | None) -> Tensor:
    backend = dispatch.select("mlp", args, backend)
    with dispatch.no_autocast(x.device):
        keep = autograd.may_need_backward(args)
        y, *_ = autograd.apply(_MLP, *dispatch.distinct(args), keep, backend)
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
        *tensors, ctx.activation, _keep, ctx.backend = inputs
        _, *kept = output  # pre; and up if gated; neither where no backward will follow
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*tensors, *kept, *[None] * (2 - len(kept)))
        ctx.set_materialize_grads(False)  # no zeros for the gradient of pre, which nobody reads

    @staticmethod
    def backward(ctx, dy, _pre, _up=None):
        if dy is None:
            return (None,) * 10
        wanted = tuple(ctx.needs_input_grad[:7])
        with dispatch.no_autocast(dy.device):
            grads = autograd.apply(
                _Backward, dy, *ctx.saved_tensors, ctx.activation, wanted, ctx.backend
            )
        grads = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return *grads, None, None, None
