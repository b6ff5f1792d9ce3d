"""Runs models of the library transformers on tfkern's kernels, without changing their code.

hf.register()
model = AutoModel.from_pretrained(name, attn_implementation="tfkern")
hf.patch(model)  # norms, MLPs and rotary positions, too
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from tfkern.nn.fusible import LINEAR, fusible, unadorned
from tfkern.ops import (
    attention,
    attention_weights,
    gated_mlp,
    layer_norm,
    mlp,
    rms_norm,
    rotary,
)


def register(name: str = "tfkern") -> None:
    """Makes tfkern's attention an `attn_implementation` of transformers.

    It takes what transformers' "sdpa" takes, and also position biases with a gradient (T5), soft
    caps, sinks and grouped key heads, without writing out a matrix of scores for any of them.
    `output_attentions=True` in a call also computes the weights, from before dropout.

    Args:
        name: the string to give as attn_implementation.

    Raises:
        ImportError: transformers is not installed, or is older than 4.53.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention_forward)
    # Without a mask function of this name transformers makes no mask, not even a causal one.
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the arguments and results of an attention function of transformers.

    Args:
        module: the calling module. Its attribute is_causal counts if the argument is None.
        query: (B, H, T, D); key, value: (B, Hk, S, D).
        attention_mask: bool, True where a query sees a key, or floating, added to the scores. If
            None all keys are seen, or with is_causal query t sees the keys up to t.
        dropout: probability; scaling: factor of the scores; softcap: their limit, None for none.
        position_bias: added to the scores, before the mask.
        s_aux: (H,), logit of the sink of each head.

    Returns:
        (B, T, H, D), and the weights (B, H, T, S) if kwargs have output_attentions, else None.

    Raises:
        NotImplementedError: a paged cache.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError("tfkern does not serve the paged caches of transformers")
    T = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and T > 1
    if causal and key.shape[2] > T:  # a static cache has room behind the first T tokens
        key, value = key[:, :, :T], value[:, :, :T]
        position_bias = None if position_bias is None else position_bias[..., :T]
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.dtype != torch.bool:
        bias = mask if bias is None else bias + mask
        mask = None
    options: dict[str, Any] = {
        "causal": causal,
        "scale": scaling,
        "softcap": softcap or 0.0,
        "mask": mask,
        "bias": bias,
    }
    o, lse = attention(query, key, value, sink=s_aux, dropout_p=dropout, return_lse=True, **options)
    weights = None
    if kwargs.get("output_attentions"):
        weights = attention_weights(query, key, lse, **options).to(query.dtype)
    return o.transpose(1, 2).contiguous(), weights


class Patch:
    """What `patch` did to a model.

    Attributes:
        names: names of the modules that now run on tfkern.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._modules: list[nn.Module] = []

    def undo(self) -> None:
        """Gives every patched module its own forward back."""
        for module in self._modules:
            del module.forward
        self.names, self._modules = [], []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def _replace(self, module: nn.Module, forward: Callable[..., Any], bound: object) -> None:
        """Makes a call of the module run `forward(bound, ...)`. A deep copy of the module also
        copies what a partial binds; with a closure the copy would use the original's weights."""
        module.forward = partial(forward, bound)
        self._modules.append(module)


def patch(model: nn.Module) -> Patch:
    """Makes the norms, MLPs and rotary positions of a model compute with tfkern's kernels.
    Parameters stay where they are.

    It knows torch's layer norm, RMS norms by name and form (a weight and variance_epsilon), and
    MLPs of these forms on torch's linear layers: c_fc and c_proj (the GPTs), fc1 and fc2 (ViT,
    BART), wi and wo or wi_0, wi_1 and wo (T5), gate_proj, up_proj and down_proj (Llama),
    intermediate and output (BERT). Modules of other forms or activations stay as they are. An MLP
    runs its own code in calls where a layer of it has hooks, has been replaced by an adapter, a
    quantised or a parametrised layer, or where dropout acts between its layers.

    An attention module runs its own code with another `apply_rotary_pos_emb`, if that of its file
    gives what `tfkern.rotary` does: Llama, GPT-NeoX and most later decoders. Other models of the
    same class are not changed. Under torch.compile it keeps the function of its file.

        with hf.patch(model) as patched:
            print(patched.names)

    Args:
        model: changed in place.

    Returns:
        A `Patch` that takes it back by `undo()` or at the end of a with statement.
    """
    done = Patch()
    for name, module in model.named_modules():
        if "forward" in vars(module):
            continue  # a part of a module that is already patched
        if any(change(done, module) for change in (_norm, _whole, _fc, _bert, _attention)):
            done.names.append(name)
    return done


_ACTIVATIONS = {
    "GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu", "SiLUActivation": "silu",
}  # fmt: skip


def _activation(module: Any) -> str | None:
    """tfkern's name for an activation of transformers or torch, None if unknown or with hooks."""
    if not isinstance(module, nn.Module) or not unadorned(module, _ours(module)):
        return None
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module).__name__)


def _ours(module: nn.Module) -> Any:
    """The forward that `patch` gave the module, or None."""
    forward = vars(module).get("forward")
    ours = isinstance(forward, partial) and forward.func.__module__ == __name__
    return forward if ours else None


def _has(module: Any, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _linear(module: Any, *names: str) -> bool:
    """Whether the named layers are plain linear layers: subclasses may add to the product."""
    if not _has(module, *names):
        return False
    return all(fusible(m, LINEAR, _ours(m)) for m in (getattr(module, name) for name in names))


def _drops(dropout: nn.Module) -> bool:
    """Whether a call of this dropout may do more than return its input."""
    idle = type(dropout) is nn.Dropout and not (dropout.training and dropout.p)
    return not idle or not unadorned(dropout)


def _norm(done: Patch, module: Any) -> bool:
    named = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        done._replace(module, _layer_norm, module)
    elif (
        named
        and hasattr(module, "variance_epsilon")
        and [n for n, _ in module.named_parameters()] == ["weight"]
    ):
        done._replace(module, _rms_norm, module)
    else:
        return False
    return True


def _layer_norm(module: Any, input: Tensor) -> Tensor:
    return layer_norm(input, module.weight, module.bias, eps=module.eps)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype != module.weight.dtype:
        return type(module).forward(module, x)  # the class decides on the result's dtype
    return rms_norm(x, module.weight, eps=module.variance_epsilon)


def _whole(done: Patch, module: Any) -> bool:
    """Patches an MLP that its model calls as one module."""
    for activation, forward in (
        (_gpt_activation, _gpt_mlp),
        (_t5_activation, _t5_mlp),
        (_llama_activation, _llama_mlp),
    ):
        if activation(module) is not None:
            done._replace(module, forward, module)
            return True
    return False


def _gpt_activation(module: Any) -> str | None:
    """The activation of an MLP of the GPTs, None for other modules or if it must not be fused."""
    if not _has(module, "c_fc", "c_proj", "act", "dropout"):
        return None
    # Some of these models use Conv1D, a linear layer with weights (in, out).
    turned = _turned(module)
    kinds = (type(module.c_fc),) if turned else LINEAR
    plain = fusible(module.c_fc, kinds) and fusible(module.c_proj, kinds)
    return _activation(module.act) if plain else None


def _turned(module: Any) -> bool:
    return type(module.c_fc).__name__ == type(module.c_proj).__name__ == "Conv1D"


def _gpt_mlp(module: Any, x: Tensor) -> Tensor:
    act, fc, proj = _gpt_activation(module), module.c_fc, module.c_proj
    if act is None:
        return type(module).forward(module, x)
    w1, w2 = (y.weight.t() if _turned(module) else y.weight for y in (fc, proj))
    return module.dropout(mlp(x, w1, fc.bias, w2, proj.bias, activation=act))


def _t5_activation(module: Any) -> str | None:
    if not _has(module, "act", "dropout"):
        return None
    plain = _linear(module, "wi_0", "wi_1", "wo") or _linear(module, "wi", "wo")
    return _activation(module.act) if plain else None


def _t5_mlp(module: Any, x: Tensor) -> Tensor:
    act, wo = _t5_activation(module), module.wo
    # transformers may keep wo in float32 in a 16-bit model
    if act is None or _drops(module.dropout) or x.dtype != wo.weight.dtype:
        return type(module).forward(module, x)
    if hasattr(module, "wi_0"):
        return _gated(x, module.wi_0, module.wi_1, wo, act)
    return mlp(x, module.wi.weight, module.wi.bias, wo.weight, wo.bias, activation=act)


def _llama_activation(module: Any) -> str | None:
    plain = _linear(module, "gate_proj", "up_proj", "down_proj") and _has(module, "act_fn")
    return _activation(module.act_fn) if plain else None


def _llama_mlp(module: Any, x: Tensor) -> Tensor:
    act = _llama_activation(module)
    if act is None:
        return type(module).forward(module, x)
    return _gated(x, module.gate_proj, module.up_proj, module.down_proj, act)


def _gated(x: Tensor, gate: Any, up: Any, down: Any, act: str) -> Tensor:
    return gated_mlp(
        x, gate.weight, gate.bias, up.weight, up.bias, down.weight, down.bias, activation=act
    )


_ROTATION = "apply_rotary_pos_emb"  # in the files of models a function (q, k, cos, sin)
_WITH_ROTARY: dict[type, Callable[..., Any]] = {}  # forwards of attention that call tfkern.rotary


def _attention(done: Patch, module: Any) -> bool:
    """Patches an attention whose file turns queries and keys as tfkern does."""
    kind, forward = type(module), type(module).forward
    inner = inspect.unwrap(forward)
    if _ROTATION not in getattr(getattr(inner, "__code__", None), "co_names", ()):
        return False
    if kind not in _WITH_ROTARY:
        theirs = inner.__globals__.get(_ROTATION)
        interleaved = [x for x in (False, True) if _turns_as_we_do(theirs, x)]
        if not interleaved:
            return False
        changed = _copied(forward, {_ROTATION: _rotation(theirs, interleaved[0])})
        if changed is None:
            return False
        _WITH_ROTARY[kind] = changed
    done._replace(module, _attend, module)
    return True


def _copied(function: Any, names: dict[str, Any]) -> Any:
    """The same code, which finds `names` where it looks for globals of its file. Decorators around
    it are copied with it; None if one of these does not hold the function in its closure."""
    scope, closure = function.__globals__, function.__closure__ or ()
    if (inner := getattr(function, "__wrapped__", None)) is None:
        scope = scope | names
    else:
        held = [cell.cell_contents is inner for cell in closure]
        changed = _copied(inner, names)
        if not any(held) or changed is None:
            return None
        closure = tuple(CellType(changed) if h else c for h, c in zip(held, closure, strict=True))
    code, defaults = function.__code__, function.__defaults__
    copied = FunctionType(code, scope, function.__name__, defaults, closure or None)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _attend(module: Any, *args: Any, **kwargs: Any) -> Any:
    kind = type(module)
    # Dynamo does not trace functions with other globals than their file's.
    ours = kind in _WITH_ROTARY and not torch.compiler.is_compiling()
    return (_WITH_ROTARY[kind] if ours else kind.forward)(module, *args, **kwargs)


def _turns_as_we_do(theirs: Any, interleaved: bool) -> bool:
    """Whether a function gives what ours does. No two entries of the tables are equal, so that one
    that uses other entries is told apart."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)

    q, k, cos, sin = drawn(2, 3, 5, 8), drawn(2, 1, 5, 8), drawn(2, 5, 8), drawn(2, 5, 8)
    ours = rotary(q, k, cos, sin, interleaved=interleaved, backend="reference")
    try:
        with torch.no_grad():
            turned = theirs(q, k, cos, sin)
        return all(torch.allclose(x, y) for x, y in zip(turned, ours, strict=True))
    except Exception:  # a function of another signature or of other shapes
        return False


def _rotation(theirs: Callable[..., Any], interleaved: bool) -> Callable[..., Any]:
    """tfkern's rotation, for calls with ordinary arguments."""

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        ordinary = q.dim() == k.dim() == 4 and cos.dim() == 3 and not args and not kwargs
        ordinary = ordinary and q.dtype == k.dtype == cos.dtype and cos.shape[1] == q.shape[2]
        if not ordinary or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return rotary(q, k, cos, sin, interleaved=interleaved)

    return turned


class _Parts:
    """An MLP whose parts a model calls one by one. If it may be fused when the first part is
    called, all parts but the last return their inputs, and the last computes the whole MLP."""

    act: str | None = None  # activation of the fused call in progress

    def __init__(self, module: Any) -> None:
        self.module = module

    def activation(self) -> str | None:
        raise NotImplementedError

    def _begin(self, part: Any, x: Tensor) -> Tensor:
        self.act = self.activation()
        return self._pass(part, x)

    def _pass(self, part: Any, x: Tensor) -> Tensor:
        return type(part).forward(part, x) if self.act is None else x

    def _end(self) -> str | None:
        act, self.act = self.act, None
        return act


class _Fc(_Parts):
    """The MLP of BART, which calls fc1, the activation and fc2 itself."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.fc1, self.fc2, self.middle = module.fc1, module.fc2, module.activation_fn

    def activation(self) -> str | None:
        m = self.module
        same = m.fc1 is self.fc1 and m.fc2 is self.fc2 and m.activation_fn is self.middle
        if not same or not _linear(m, "fc1", "fc2") or vars(m).get("activation_dropout"):
            return None
        return _activation(self.middle)

    def begin(self, x: Tensor) -> Tensor:
        return self._begin(self.fc1, x)

    def activate(self, x: Tensor) -> Tensor:
        return self._pass(self.middle, x)

    def end(self, x: Tensor) -> Tensor:
        act, fc1, fc2 = self._end(), self.fc1, self.fc2
        if act is None:
            return type(fc2).forward(fc2, x)
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=act)


def _fc(done: Patch, module: Any) -> bool:
    if not _has(module, "fc1", "fc2", "activation_fn"):
        return False
    parts = _Fc(module)
    forwards = {parts.fc1: _Fc.begin, parts.middle: _Fc.activate, parts.fc2: _Fc.end}
    return _replace_parts(done, parts, forwards)


class _Bert(_Parts):
    """The MLP of BERT: intermediate and output, which also adds the residual and normalises."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.inner, self.output = module.intermediate, module.output

    def activation(self) -> str | None:
        m, inner, output = self.module, self.inner, self.output
        same = m.intermediate is inner and m.output is output
        plain = unadorned(inner, _ours(inner)) and unadorned(output, _ours(output))
        if not (same and plain and _linear(inner, "dense") and _linear(output, "dense")):
            return None
        if not _has(output, "dropout", "LayerNorm"):
            return None
        norm, dropout = output.LayerNorm, output.dropout
        if not fusible(norm, (nn.LayerNorm,), _ours(norm)):
            return None
        if type(dropout) is not nn.Dropout or not unadorned(dropout):
            return None
        return _activation(getattr(inner, "intermediate_act_fn", None))

    def begin(self, x: Tensor) -> Tensor:
        return self._begin(self.inner, x)

    def end(self, x: Tensor, residual: Tensor) -> Tensor:
        act, inner, output = self._end(), self.inner, self.output
        if act is None:
            return type(output).forward(output, x, residual)
        fc1, fc2, norm, dropout = inner.dense, output.dense, output.LayerNorm, output.dropout
        y = mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=act)
        p = dropout.p if dropout.training else 0.0
        weights = (norm.weight, norm.bias)
        return layer_norm(y, *weights, residual=residual, dropout_p=p, eps=norm.eps)


def _bert(done: Patch, module: Any) -> bool:
    if not _has(module, "intermediate", "output"):
        return False
    parts = _Bert(module)
    return _replace_parts(done, parts, {parts.inner: _Bert.begin, parts.output: _Bert.end})


def _replace_parts(
    done: Patch, parts: _Parts, forwards: dict[nn.Module, Callable[..., Any]]
) -> bool:
    if parts.activation() is None or any("forward" in vars(m) for m in forwards):
        return False
    for module, forward in forwards.items():
        done._replace(module, forward, parts)
    return True


__all__ = ["Patch", "attention_forward", "patch", "register"]
