"""Multi-head attention module on the fused kernels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.nn.functional import upper_left
from tfkern.nn.fusible import acting, fusible
from tfkern.ops import attention, linear
from tfkern.ops.attention_weights import attention_weights


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on the fused kernels, with its constructor and state dict.

    Every call runs the fused op, with all masks and dropout. need_weights=True also computes the
    weights, in memory that grows with T S; need_weights=False avoids this.

    There are four differences from torch. A query that may see no key gives the zero vector before
    out_proj, not NaN. is_causal needs no attn_mask. The returned weights are from before dropout.
    Nested tensors raise.

    Attention with several heads: Vaswani et al. 2017.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from query to key and value.

        B batch, T queries, S keys, H heads. Tensors are (B, T, features) if batch_first, else
        (T, B, features), or (T, features) without a batch.

        Args:
            query: embed_dim features.
            key, value: S instead of T; kdim and vdim features.
            key_padding_mask: (B, S), or (S,) without a batch. bool: True hides the key. Floating:
                added to the scores. For padding on the right, key_lengths is faster: hidden keys
                are not read.
            need_weights: also return the weights.
            attn_mask: (T, S) or (B * H, T, S). bool: True hides the key. Floating: added to the
                scores. Floating masks may have a gradient.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: query t sees the keys s <= t. An attn_mask beside it must say the same.
            key_lengths: (B,) integers, or 0-d without a batch: the keys from there on are hidden.
                With is_causal the queries from there on are padding too, and see nothing.

        Returns:
            The output, in the shape of query, and the weights: (B, T, S), or (B, H, T, S) if not
            averaged, without B if query has none; or None. bias_k and add_zero_attn each add a key,
            which every query sees.

        Raises:
            ValueError: shapes or dtypes that do not fit together, masks that exclude each other.
            NotImplementedError: nested tensors.
        """
        batched = query.dim() == 3
        if not batched:
            key_padding_mask, key_lengths = (
                m if m is None else m.unsqueeze(0) for m in (key_padding_mask, key_lengths)
            )
        self._check(query, key, value)
        q, k, v = (self._split(x, batched) for x in self._project(query, key, value))
        (B, H, T, _), S = q.shape, k.shape[2]
        _check_mask("key_padding_mask", key_padding_mask, (B, S))
        _check_mask("attn_mask", attn_mask, (T, S), (B * H, T, S))
        _check_lengths(key_lengths, B, key_padding_mask, is_causal and T != S)
        window = None
        if is_causal:  # an attn_mask beside it says the same
            attn_mask = None
            k, v, window = upper_left(k, v, T)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask[:, : k.shape[2]]
        # The added keys stand in front, so that they lie within all lengths and causal limits.
        k, v, added = self._prepend_keys(k, v)
        mask, bias = _mask_and_bias(q, added, attn_mask, key_padding_mask)
        options: dict = {
            "window": window,
            "mask": mask,
            "bias": bias,
            "query_lengths": key_lengths if is_causal else None,
            "key_lengths": None if key_lengths is None else key_lengths + added,
        }
        dropout_p = self.dropout if self.training else 0.0
        o, lse = attention(q, k, v, dropout_p=dropout_p, return_lse=True, **options)
        output, out_proj = self._merge(o, batched), acting(self.out_proj)
        if fusible(out_proj):
            output = linear(output, out_proj.weight, out_proj.bias)
        else:
            output = out_proj(output)
        if not need_weights:
            return output, None
        weights = attention_weights(q, k, lse, **options)
        # Torch has the added keys at the end. Keys that upper_left cut off have weights of 0.
        weights = F.pad(weights, (0, S + added - k.shape[2])).roll(-added, -1)
        weights = (weights.mean(1) if average_attn_weights else weights).to(query.dtype)
        return output, weights if batched else weights.squeeze(0)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"batch_first={self.batch_first}"
        )

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        inputs = {"query": query, "key": key, "value": value}
        features = (self.embed_dim, self.kdim, self.vdim)
        for (name, x), size in zip(inputs.items(), features, strict=True):
            if x.is_nested:
                raise NotImplementedError(f"{name} is a nested tensor, which is not implemented")
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != size:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}, expected 2 or 3 axes, as many as query "
                    f"has, the last of size {size}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}: only their last "
                "axes may differ"
            )
        batch_axis = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch_axis] != key.shape[batch_axis]:
            raise ValueError(
                f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}: their batch "
                f"sizes, those of axis {batch_axis}, differ"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weights: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return tuple(linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _split(self, x: Tensor, batched: bool) -> Tensor:
        """A projection as (B, H, T, D), without a copy."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge(self, o: Tensor, batched: bool) -> Tensor:
        """The inverse of _split."""
        if not batched:
            return o.squeeze(0).transpose(0, 1).flatten(-2)
        return (o.transpose(1, 2) if self.batch_first else o.permute(2, 0, 1, 3)).flatten(-2)

    def _prepend_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v (B, H, S, D) with bias_k and bias_v, then zeros, in front, where the module has
        them, and the number of added keys."""
        B, H, S, D = k.shape
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 1, 0)) for x in (k, v))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([bias.view(1, H, 1, D).expand(B, -1, -1, -1).to(x.dtype), x], 2)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        return k, v, k.shape[2] - S


def _check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {expected}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name} must be bool or floating, got {mask.dtype}")


def _check_lengths(
    key_lengths: Tensor | None, B: int, key_padding_mask: Tensor | None, oblong_causal: bool
) -> None:
    if key_lengths is None:
        return
    if key_lengths.shape != (B,) or key_lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"key_lengths must be ({B},) int32 or int64, got {tuple(key_lengths.shape)} "
            f"{key_lengths.dtype}"
        )
    if key_padding_mask is not None:
        raise ValueError("key_padding_mask and key_lengths exclude each other")
    if oblong_causal:
        raise ValueError("key_lengths with is_causal needs as many queries as keys")


def _mask_and_bias(
    q: Tensor, added: int, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The masks as the fused op takes them, each still broadcast as it was given."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, q.shape[:2])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
    mask: Tensor | None = None
    bias: Tensor | None = None
    for given in (attn_mask, key_padding_mask):
        if given is None:
            continue
        if added:
            given = F.pad(given, (added, 0))  # False or 0: visible
        if given.dtype == torch.bool and mask is None:
            mask = ~given
            continue
        if given.dtype == torch.bool:  # a second one; both in one mask may need (B, H, T, S)
            given = torch.zeros_like(given, dtype=q.dtype).masked_fill(given, -torch.inf)
        bias = given if bias is None else bias + given
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.to(torch.promote_types(q.dtype, torch.float32))
    return mask, bias
