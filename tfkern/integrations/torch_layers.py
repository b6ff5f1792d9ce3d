"""Converts `torch.nn.TransformerEncoderLayer` and `TransformerDecoderLayer` to blocks and back."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.models.blocks import Block
from tfkern.models.config import TransformerConfig
from tfkern.models.convert.family import Rule, heads_of, linear, rule
from tfkern.nn.lora import has_adapters

Layer = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer

_FUNCTIONS = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu"}


def from_torch(layer: Layer, causal: bool | None = None) -> Block:
    """A block with the weights of a layer of torch.

    A call of the block returns (x, h). With norm_first=False the layer's output is x; with
    norm_first=True it is x + h, which the norm of the next block adds. Padding is given as context:
    `Context({"key_lengths": lengths})` or `Context({"mask": mask[:, None, None]})` of
    `tfkern.models.blocks`, where the mask is True where a key exists.

    Args:
        layer: a layer with ReLU, GELU or SiLU. The probabilities of dropout are taken over, except
            between its two linear layers, where a block has no dropout.
        causal: whether a token sees no later ones; if None, true for the layer of a decoder.

    Returns:
        A copy, in the layer's dtype, device and mode. Tensors are (B, T, dim) whatever batch_first.

    Raises:
        ValueError: another activation, key and value sizes of their own, added keys, or adapters.
    """
    _check_no_adapters(layer)
    decoder = isinstance(layer, nn.TransformerDecoderLayer)
    attention, weight = layer.self_attn, layer.linear1.weight
    parts: list[Any] = [attention, layer.multihead_attn] if decoder else [attention]
    for module in parts:
        if module.in_proj_weight is None or module.add_zero_attn or module.bias_k is not None:
            raise ValueError(
                "a block has no key and value sizes of their own (kdim, vdim) and no added keys "
                "(add_bias_kv, add_zero_attn)"
            )
    config = TransformerConfig(
        vocab_size=1,
        positions="none",
        dim=attention.embed_dim,
        layers=1,
        heads=attention.num_heads,
        hidden_dim=layer.linear1.out_features,
        norm_eps=layer.norm1.eps,
        post_norm=not layer.norm_first,
        activation=_activation(layer.activation),
        bias=layer.linear1.bias is not None,
        dropout=layer.dropout1.p,
        attention_dropout=attention.dropout,
    )
    block = Block(config, causal=decoder if causal is None else causal, cross=decoder)
    block.to(weight.device, weight.dtype)
    state, shapes = layer.state_dict(), {n: x.shape for n, x in block.state_dict().items()}
    ours: dict[str, Tensor] = {}
    for r in _rules(config.bias, decoder, heads_of(config)):
        ours |= r.load(state, shapes)
    block.load_state_dict(ours)
    return block.train(layer.training)


def to_torch(block: Any, batch_first: bool = True) -> Layer:
    """The layer of torch with the weights of a block, the inverse of `from_torch`.

    Args:
        block: a `Block`.
        batch_first: the layer's argument: whether its tensors are (B, T, dim), not (T, B, dim).

    Raises:
        ValueError: a block that torch's layers cannot express: other norms, gated MLPs, grouped
            heads, a head size of its own, a window, a softcap, norms after sublayers, parallel
            sublayers, biases in some layers only, adapters, or tanh GELU.
    """
    _check_no_adapters(block)
    attention, mlp = block.attention, block.mlp
    heads, dim = attention.heads, attention.out.out_features
    fits = attention.kv_heads == heads and attention.head_dim * heads == dim
    if not isinstance(block.norm1, nn.LayerNorm) or not hasattr(mlp, "fc1") or not fits:
        raise ValueError("torch's layers have layer norm, no gate and equal heads of dim / heads")
    if attention.window is not None or attention.softcap or block.norm2_out is not None:
        raise ValueError("torch's layers have no window, no softcap and no norm after a sublayer")
    if block.parallel:
        raise ValueError("torch's layers have an MLP behind attention, not beside it")
    if len({layer.bias is None for layer in (attention.query_layer, attention.out, mlp.fc1)}) > 1:
        raise ValueError("torch's layers have biases everywhere or nowhere")
    if attention.scale is not None or mlp.activation not in _FUNCTIONS.values():
        raise ValueError(
            f"torch's layers have scores divided by the root of the head size, and an activation "
            f"of {', '.join(_FUNCTIONS.values())}; this one has {mlp.activation}"
        )
    kind: Any = nn.TransformerDecoderLayer if block.has_cross else nn.TransformerEncoderLayer
    weight = mlp.fc1.weight
    layer = kind(
        dim,
        heads,
        mlp.fc1.out_features,
        block.dropout,
        {name: function for function, name in _FUNCTIONS.items()}[mlp.activation],
        block.norm1.eps,
        batch_first,
        not block.post_norm,
        mlp.fc1.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    layer.self_attn.dropout = attention.dropout
    layer.dropout.p = 0.0  # between the linear layers, where a block has none
    state = block.state_dict()
    theirs: dict[str, Tensor] = {}
    for r in _rules(mlp.fc1.bias is not None, block.has_cross, (heads, attention.head_dim)):
        theirs |= r.save(state)
    layer.load_state_dict(theirs)
    return layer.train(block.training)


def _check_no_adapters(module: nn.Module) -> None:
    if has_adapters(module):
        raise ValueError("layers with adapters are not converted: unload them before")


def _activation(given: Any) -> str:
    if given in _FUNCTIONS:
        return _FUNCTIONS[given]
    if isinstance(given, nn.GELU):
        return "gelu" if given.approximate == "none" else "gelu_tanh"
    if type(given) in _MODULES:
        return _MODULES[type(given)]
    raise ValueError(f"activation must be ReLU, GELU or SiLU, got {given!r}")


def _rules(bias: bool, decoder: bool, heads: tuple[int, int]) -> list[Rule]:
    rules = []
    for kind in ("weight", "bias") if bias else ("weight",):
        ours = f"attention.qkv_by_head.{kind}"
        rules.append(rule(ours, f"self_attn.in_proj_{kind}", heads=heads))
        if decoder:
            cross = (f"cross.q.{kind}", f"cross.kv_by_head.{kind}")
            rules.append(rule(cross, f"multihead_attn.in_proj_{kind}", heads=heads))
    names = {
        "attention.out": "self_attn.out_proj", "norm1": "norm1", "mlp.fc1": "linear1",
        "mlp.fc2": "linear2", "norm2": "norm3" if decoder else "norm2",
    }  # fmt: skip
    if decoder:
        names |= {"cross.out": "multihead_attn.out_proj", "norm_cross": "norm2"}
    for ours, theirs in names.items():
        rules += linear(ours, theirs, bias)
    return rules


__all__ = ["from_torch", "to_torch"]
