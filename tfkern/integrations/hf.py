"""transformers on tfkern's kernels, without a change to its models.

hf.register()
model = AutoModel.from_pretrained(name, attn_implementation="tfkern")
hf.patch(model)  # norms and MLPs, too
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tfkern.nn import Linear
from tfkern.ops import attention, attention_weights, gated_mlp, layer_norm, mlp, rms_norm


def register(name: str = "tfkern") -> None:
    """Makes tfkern's attention an `attn_implementation` of transformers.

    It takes what transformers' "sdpa" takes, besides position biases with a gradient (T5), soft
    caps, sinks and fewer key heads than query heads, none of which makes it write out a matrix of
    scores. `output_attentions=True` in a call gives the weights before dropout, computed besides.

    Args:
        name: the string to be given as attn_implementation.

    Raises:
        ImportError: transformers is not installed, or is older than 4.53.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention_forward)
    # Under the same name: without it transformers makes no mask, not even a causal one.
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
    """Attention with the arguments and results that transformers has for it.

    Args:
        module: the caller; its is_causal counts if that argument is None.
        query: (B, H, T, D); key, value: (B, Hk, S, D).
        attention_mask: bool, True where a query sees a key, or floating, added to the scores. If
            None all keys are seen, or with is_causal query t sees the keys up to t.
        dropout, scaling, softcap: numbers.
        position_bias: added to the scores, before the mask.
        s_aux: (H,), the sink.

    Returns:
        (B, T, H, D), and the weights (B, H, T, S) if kwargs ask for them.

    Raises:
        NotImplementedError: a paged cache.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError("tfkern does not serve the paged caches of transformers")
    T = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and T > 1
    if causal and key.shape[2] > T:  # a static cache with room behind the T first tokens
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
        names: the modules that run on tfkern now.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._modules: list[nn.Module] = []

    def undo(self) -> None:
        """Gives every module its own forward back."""
        for module in self._modules:
            del module.forward
        self.names, self._modules = [], []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._modules.append(module)


def patch(model: nn.Module) -> Patch:
    """Lets the norms and MLPs of a model compute with tfkern's kernels. Parameters stay where they
    are.

    Known are torch's layer norm, RMS norms by their name and form (a weight and variance_epsilon),
    and MLPs of these forms, on torch's linear layers: c_fc and c_proj (the GPTs), fc1 and fc2 (ViT,
    BART), wi and wo, wi_0 and wi_1 (T5), gate_proj, up_proj and down_proj (Llama), intermediate and
    output (BERT). What has another form or activation stays as it is, as do layers that an adapter
    or a quantiser has replaced, and what has dropout inside its MLP does so in training.

    A copy of a patched model would compute with the weights of the original: undo it first.

        with hf.patch(model) as patched:
            print(patched.names)

    Args:
        model: changed in place.

    Returns:
        What undoes it, by `undo()` or at the end of a with statement.
    """
    done = Patch()
    for name, module in model.named_modules():
        if "forward" in vars(module):
            continue  # of a part of what was patched before
        if any(change(done, module) for change in (_norm, _gpt, _fc, _t5, _llama, _bert)):
            done.names.append(name)
    return done


def _activation(module: Any) -> str | None:
    """tfkern's name of an activation of transformers or torch."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    names = {
        "GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu", "SiLUActivation": "silu",
    }  # fmt: skip
    return names.get(type(module).__name__)


def _has(module: Any, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _linear(module: Any, *names: str) -> bool:
    """Whether these are linear layers and no more: subclasses may add to the product."""
    return all(type(getattr(module, name, None)) in (nn.Linear, Linear) for name in names)


def _norm(done: Patch, module: Any) -> bool:
    named = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        done._replace(module, lambda x: layer_norm(x, module.weight, module.bias, eps=module.eps))
    elif (
        named
        and hasattr(module, "variance_epsilon")
        and [n for n, _ in module.named_parameters()] == ["weight"]
    ):
        plain = module.forward

        def forward(x: Tensor) -> Tensor:
            if x.dtype != module.weight.dtype:
                return plain(x)  # each has rules of its own for the dtype of the result
            return rms_norm(x, module.weight, eps=module.variance_epsilon)

        done._replace(module, forward)
    else:
        return False
    return True


def _gpt(done: Patch, module: Any) -> bool:
    if not _has(module, "c_fc", "c_proj", "act", "dropout"):
        return False
    fc, proj, dropout = module.c_fc, module.c_proj, module.dropout
    # Conv1D, the linear layer of some, holds weights (in, out)
    turned = type(fc).__name__ == type(proj).__name__ == "Conv1D"
    act = _activation(module.act)
    if act is None or not (turned or _linear(module, "c_fc", "c_proj")):
        return False

    def forward(x: Tensor) -> Tensor:
        w1, w2 = (y.weight.t() if turned else y.weight for y in (fc, proj))
        return dropout(mlp(x, w1, fc.bias, w2, proj.bias, activation=act))

    done._replace(module, forward)
    return True


def _fc(done: Patch, module: Any) -> bool:
    """The activation and fc1 hand on what they get, and fc2 does it all: BART calls them singly."""
    if not _linear(module, "fc1", "fc2") or not _has(module, "activation_fn"):
        return False
    fc1, fc2, act = module.fc1, module.fc2, _activation(module.activation_fn)
    if act is None or vars(module).get("activation_dropout"):
        return False
    done._replace(fc1, lambda x: x)
    done._replace(module.activation_fn, lambda x: x)
    done._replace(fc2, lambda x: mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=act))
    return True


def _t5(done: Patch, module: Any) -> bool:
    gated = _linear(module, "wi_0", "wi_1", "wo")
    if not (gated or _linear(module, "wi", "wo")) or not _has(module, "act", "dropout"):
        return False
    act = _activation(module.act)
    if act is None:
        return False
    dropout, plain = module.dropout, module.forward

    def forward(x: Tensor) -> Tensor:
        if module.training and dropout.p or x.dtype != module.wo.weight.dtype:
            return plain(x)  # wo may be kept in float32
        if gated:
            both = torch.cat([module.wi_0.weight, module.wi_1.weight])
            return gated_mlp(x, both, None, module.wo.weight, None, activation=act)
        return mlp(x, module.wi.weight, None, module.wo.weight, None, activation=act)

    done._replace(module, forward)
    return True


def _llama(done: Patch, module: Any) -> bool:
    if not _linear(module, "gate_proj", "up_proj", "down_proj") or not _has(module, "act_fn"):
        return False
    gate, up, down = module.gate_proj, module.up_proj, module.down_proj
    act = _activation(module.act_fn)
    if act is None:
        return False

    def forward(x: Tensor) -> Tensor:
        weight = torch.cat([gate.weight, up.weight])
        bias = None if gate.bias is None else torch.cat([gate.bias, up.bias])
        return gated_mlp(x, weight, bias, down.weight, down.bias, activation=act)

    done._replace(module, forward)
    return True


def _bert(done: Patch, module: Any) -> bool:
    """intermediate hands on what it gets, and output computes the MLP, adds and normalises."""
    if not _has(module, "intermediate", "output") or not _has(module.output, "dropout"):
        return False
    inner, output = module.intermediate, module.output
    act = _activation(getattr(inner, "intermediate_act_fn", None))
    plain = _linear(inner, "dense") and _linear(output, "dense")
    if act is None or not plain or type(getattr(output, "LayerNorm", None)) is not nn.LayerNorm:
        return False
    fc1, fc2, norm = inner.dense, output.dense, output.LayerNorm

    def forward(x: Tensor, residual: Tensor) -> Tensor:
        y = mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=act)
        p = output.dropout.p if output.training else 0.0
        weights = (norm.weight, norm.bias)
        return layer_norm(y, *weights, residual=residual, dropout_p=p, eps=norm.eps)

    done._replace(inner, lambda x: x)
    done._replace(output, forward)
    return True


__all__ = ["Patch", "attention_forward", "patch", "register"]
