"""The blocks that all architectures share: attention, and a layer made of it and an MLP."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tfkern.models.config import TransformerConfig
from tfkern.nn import (
    MLP,
    BatchNorm,
    GatedMLP,
    KVCache,
    LayerNorm,
    Linear,
    NoNorm,
    RMSNorm,
    ZeroCenteredRMSNorm,
)
from tfkern.nn.batch_norm import drop_and_add
from tfkern.nn.context_parallel import SequenceSplit, context_parallel_attention
from tfkern.nn.linear import WideLinear
from tfkern.ops import attention, attention_varlen, attention_weights, rotary
from tfkern.ops.packing import same_document

KeysValues = tuple[Tensor, Tensor]
_NORMS = (LayerNorm, RMSNorm, BatchNorm, NoNorm)  # norms that also drop and add


@dataclass(frozen=True)
class Context:
    """Arguments that are the same for all blocks of a stack.

    Attributes:
        self_options: arguments of self-attention, see `Attention.forward`.
        window_options: those that are others in blocks with a window.
        cross_options: arguments of cross-attention.
        norm_options: arguments of the norms: batch norm takes a mask of the tokens that count.
    """

    self_options: dict[str, Any] = field(default_factory=dict)
    window_options: dict[str, Any] = field(default_factory=dict)
    cross_options: dict[str, Any] = field(default_factory=dict)
    norm_options: dict[str, Any] = field(default_factory=dict)


class Attention(nn.Module):
    """Attention of a sequence to itself, or with `cross` to the output of an encoder.

    The rows of qkv_by_head are grouped by key head: first its queries, then its key and its value.
    So they can be cut into equal parts that hold whole heads. With `cross`, q has the rows of the
    queries, and kv_by_head those of keys and values, grouped in the same way. query_norm and
    key_norm follow these layers, if the configuration has such norms; those of all heads together
    need all of them at one place.

    Args:
        window: how many tokens a token sees, itself among them; all that causal leaves if None.

    Attributes:
        split: how sequences are split over processes, None if they are whole here.
    """

    split: SequenceSplit | None = None

    def __init__(
        self,
        config: TransformerConfig,
        causal: bool,
        cross: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.group = self.heads // self.kv_heads  # query heads of a key head
        self.head_dim, self.scale = config.head_size, config.attention_scale
        self.causal, self.cross, self.dropout = causal, cross, config.attention_dropout
        self.softcap = config.attention_softcap or 0.0
        self.window = None if window is None else (window - 1, None)  # keys before the token
        q, kv = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        if cross:
            self.q = Linear(config.dim, q, config.qkv_biased)
            self.kv_by_head = Linear(config.dim, kv, config.qkv_biased)
        else:
            self.qkv_by_head = Linear(config.dim, q + kv, config.qkv_biased)
        self.query_norm = self.key_norm = None
        self.normed_axes = 1 if config.query_key_norm == "head" else 2  # of (heads, head_dim)
        if config.query_key_norm != "none":
            sizes = (q, kv // 2) if self.normed_axes == 2 else (self.head_dim,) * 2
            self.query_norm, self.key_norm = (norm(config, size) for size in sizes)
        self.out = Linear(q, config.dim, config.out_biased)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | KeysValues | None = None,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """(B, T, dim) to (B, T, dim).

        Args:
            memory: with cross, the encoder's output (B, S, dim), or `keys_values` of it.
            rotation: cosine and sine as given by `rotary_table`.
            cache: keys and values of earlier tokens, to which those of x are appended.
            cu_seqlens: the limits (n + 1,) of the documents in all rows of x, if each token may see
                its own document only.
            options: further arguments of `tfkern.attention`, or of `attention_varlen` beside
                cu_seqlens, or of `context_parallel_attention` where sequences are split. T and S
                are then those of this process.
        """
        q, k, v = self._project(x, memory, rotation)
        if cache is not None:
            k, v, options["key_lengths"] = cache.append(k, v, options.get("query_lengths"))
        options |= self._options | {"dropout_p": self.dropout if self.training else 0.0}
        if self.split is not None:
            o = context_parallel_attention(q, k, v, self.split, **options).transpose(1, 2)
        elif cu_seqlens is None:
            o = attention(q, k, v, **options).transpose(1, 2)
        else:
            B, T = q.shape[0], q.shape[2]
            q, k, v = (y.transpose(1, 2).flatten(0, 1) for y in (q, k, v))
            o = attention_varlen(q, k, v, cu_seqlens, cu_seqlens, **options)
            o = o.unflatten(0, (B, T))
        return self.out(o.flatten(-2))

    def weights(
        self,
        x: Tensor,
        memory: Tensor | KeysValues | None = None,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The weights (B, H, T, S) with which `forward` sums values, before dropout."""
        if self.split is not None:
            raise ValueError("there are no weights of sequences that are split over processes")
        q, k, v = self._project(x, memory, rotation)
        options |= self._options
        if cu_seqlens is not None:
            number = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
            number = number.repeat_interleave(cu_seqlens.diff())
            options["mask"] = same_document(number.view(q.shape[0], q.shape[2]))
        _, lse = attention(q, k, v, return_lse=True, **options)
        return attention_weights(q, k, lse, **options)

    @property
    def _options(self) -> dict[str, Any]:
        """The arguments of `tfkern.attention` that are those of the layer."""
        return {
            "causal": self.causal, "window": self.window, "scale": self.scale,
            "softcap": self.softcap,
        }  # fmt: skip

    @property
    def query_layer(self) -> nn.Module:
        """The layer that makes the queries."""
        return self.q if self.cross else self.qkv_by_head

    def query_rows(self, weight: Tensor) -> Tensor:
        """The rows that make the queries, of the weight of `query_layer`, as a view."""
        return weight if self.cross else self._by_head(weight, 0)[:, : self.group]

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Keys and values (B, Hk, S, D) of an encoder's output, for all steps of a decoder."""
        k, v = self._by_head(self.kv_by_head(memory), -1).unbind(3)
        return self._normed(self.key_norm, k).transpose(1, 2), v.transpose(1, 2)

    def _project(
        self,
        x: Tensor,
        memory: Tensor | KeysValues | None,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.cross:
            assert memory is not None
            q = self._normed(self.query_norm, self.q(x).unflatten(-1, (-1, self.head_dim)))
            q = q.transpose(1, 2)
            k, v = self.keys_values(memory) if isinstance(memory, Tensor) else memory
        else:
            heads = self._by_head(self.qkv_by_head(x), -1)  # (B, T, Hk, G + 2, D)
            if self.group == 1:
                q, k, v = heads.unbind(3)
            else:  # flatten copies q, which costs less than separate products for k and v
                q, k, v = (x.flatten(2, 3) for x in heads.split((self.group, 1, 1), 3))
            q, k = self._normed(self.query_norm, q), self._normed(self.key_norm, k)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotation is not None:
            q, k = rotary(q, k, *rotation)
        return q, k, v

    def _normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        """Queries or keys (B, T, heads, D) behind their norm."""
        return x if norm is None else norm(x.flatten(-self.normed_axes)).view(x.shape)

    def _by_head(self, rows: Tensor, axis: int) -> Tensor:
        """Splits an axis of rows into key heads, the vectors of a head, and their elements."""
        each = 2 if self.cross else self.group + 2
        return rows.unflatten(axis, (-1, each, self.head_dim))


class Block(nn.Module):
    """One layer: attention, cross-attention in a decoder that follows an encoder, and an MLP.

    Pre-norm, where x is the output of the sublayer before and h the residual stream without it:

        h = h + x;  x = norm_out(sublayer(norm(h)))

    One of these two norms may be absent, and `norm_out` mostly is. Post-norm, which has no h:

        x = norm(x + sublayer(x))

    Both are written so that the addition and the norm are one kernel. In a parallel block, which is
    pre-norm, attention and MLP read the same h:

        h = h + x;  h, x = h + attention(norm1(h)), mlp(norm2(h))

    with the norms behind the sublayers, too, if there are any.
    """

    def __init__(
        self,
        config: TransformerConfig,
        causal: bool = True,
        cross: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm1_out = _norms(config)
        self.attention = Attention(config, causal, window=window)
        if cross:
            self.norm_cross, self.norm_cross_out = _norms(config)
            self.cross = Attention(config, False, cross=True)
        self.norm2, self.norm2_out = _norms(config)
        self.mlp = _mlp(config)
        self.windowed = window is not None
        self.dropout, self.post_norm = config.dropout, config.post_norm
        self.has_cross, self.parallel = cross, config.parallel

    def forward(
        self,
        x: Tensor,
        h: Tensor | None = None,
        context: Context | None = None,
        memory: Tensor | KeysValues | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes and returns the output of the last sublayer, and the residual stream before it.

        Args:
            x, h: (B, T, dim). With post_norm, and in front of the first block, x is the stream
                itself and h is None.
            context: arguments that all blocks share.
            memory: what cross-attention attends to.
            cache: keys and values of earlier tokens in self-attention.
        """
        context = context or Context()
        options = context.self_options | ({} if cache is None else {"cache": cache})
        if self.windowed:
            options |= context.window_options
        norms = self.norm1, self.norm1_out
        x, h = self._sublayer(norms, self.attention, x, h, context, options)
        if self.parallel:  # h is what attention has read, and x is added behind the MLP
            assert h is not None
            norms = self.norm2, self.norm2_out
            y, h = self._sublayer(norms, self.mlp, h, None, context, {})
            return y, drop_and_add(x, h, self.dropout, self.training)
        if self.has_cross:
            options = context.cross_options | {"memory": memory}
            norms = self.norm_cross, self.norm_cross_out
            x, h = self._sublayer(norms, self.cross, x, h, context, options)
        return self._sublayer((self.norm2, self.norm2_out), self.mlp, x, h, context, {})

    def residual_outputs(self) -> Iterator[nn.Module]:
        """The linear layers that write to the residual stream."""
        yield self.attention.out
        if self.has_cross:
            yield self.cross.out
        yield self.mlp.output

    def _sublayer(
        self,
        norms: tuple[nn.Module, nn.Module | None],
        apply: nn.Module,
        x: Tensor,
        h: Tensor | None,
        context: Context,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        dropout_p, counted = self.dropout if self.training else 0.0, context.norm_options
        norm, norm_out = norms
        if self.post_norm:
            return add_and_norm(norm, apply(x, **options), x, dropout_p, **counted), None
        if h is None:  # x is the stream: dropout is for outputs of sublayers
            dropout_p = 0.0
        y, h = add_and_norm(norm, x, h, dropout_p, return_residual=True, **counted)
        x = apply(y, **options)
        return (x if norm_out is None else add_and_norm(norm_out, x, None, 0.0, **counted)), h


def add_and_norm(
    norm: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    dropout_p: float,
    return_residual: bool = False,
    **counted: Tensor,
) -> Any:
    """norm(h) of `h = residual + dropout(x)`, or (norm(h), h). Foreign norms are called with h."""
    if isinstance(norm, _NORMS):
        options: Any = {"dropout_p": dropout_p, "return_residual": return_residual}
        result = norm(x, residual=residual, **options, **counted)
        if x.dtype != torch.float32 or getattr(norm, "weight", x).dtype != torch.float16:
            return result
        # x is the output of a layer that is kept in float32, and layers behind the norm are not
        return (result[0].half(), result[1]) if return_residual else result.half()
    h = drop_and_add(x, residual, dropout_p, True)
    y = norm(h, **counted).to(x.dtype)
    return (y, h) if return_residual else y


def norm(config: TransformerConfig, size: int | None = None) -> nn.Module:
    """The norm layer of a configuration, of vectors of a size, or of the stream if it is None.

    "weight_norm" needs none: see `normalise_weights`.
    """
    size = config.dim if size is None else size
    if config.norm == "layer_norm":
        return LayerNorm(size, config.norm_eps, bias=config.bias)
    if config.norm == "rms_norm":
        return RMSNorm(size, config.norm_eps)
    if config.norm == "zero_centered_rms_norm":
        return ZeroCenteredRMSNorm(size, config.norm_eps)
    return BatchNorm(size, config.norm_eps) if config.norm == "batch_norm" else NoNorm()


def _norms(config: TransformerConfig) -> tuple[nn.Module, nn.Module | None]:
    """The norms before and after a sublayer; the former also adds the output of the one before."""
    before = NoNorm() if config.norm_place == "after" else norm(config)
    return before, None if config.norm_place == "before" else norm(config)


def normalise_weights(block: nn.Module) -> None:
    """Writes each row of the block's linear layers as a length and a direction."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            weight_norm(module, dim=0)


def _mlp(config: TransformerConfig) -> MLP | GatedMLP:
    kind = GatedMLP if config.gated else MLP
    mlp = kind(config.dim, config.hidden_size, config.bias, config.activation)
    if config.wide_output:
        name = "down" if config.gated else "fc2"
        setattr(mlp, name, WideLinear(config.hidden_size, config.dim, config.bias))
    return mlp
