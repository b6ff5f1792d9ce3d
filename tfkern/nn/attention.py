"""Multi-head attention module on the fused kernels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern import dispatch
from tfkern.ops import attention


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on the fused kernels: its constructor, parameters, state dict.

    Calls with need_weights=False and without masks, or with is_causal or key_lengths in their
    place, run the fused op, whose memory grows linearly with the length. All others compute the
    whole matrix of weights in plain PyTorch, in float32 or float64.

    It differs from torch in these points. A query that may see no key gives the zero vector before
    out_proj, not NaN. is_causal needs no attn_mask. Dropout of the weights is not implemented: a
    module with dropout > 0 works in evaluation and raises in training mode. Nested tensors raise.

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
                added to the scores. Give padding on the right as key_lengths, which is fused.
            need_weights: also return the weights, which rules out the fused kernels.
            attn_mask: (T, S) or (B * H, T, S). bool: True hides the key. Floating: added to the
                scores.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: query t sees the keys s <= t. An attn_mask beside it must be that same mask.
            key_lengths: (B,) integers, or 0-d without a batch: the keys from there on are hidden.
                With is_causal the queries from there on are padding too, and see nothing.

        Returns:
            The output, in the shape of query, and the weights: (B, T, S), or (B, H, T, S) if not
            averaged, without B if query has none; or None. bias_k and add_zero_attn each add a key.

        Raises:
            ValueError: shapes or dtypes that do not fit together, masks that exclude each other.
            NotImplementedError: dropout in training mode, or nested tensors.
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
        k, v = self._append_keys(k, v)

        if need_weights or key_padding_mask is not None:
            fused = False
        elif k.shape[2] > S:  # the appended keys are seen by all queries, whatever the masks
            fused = attn_mask is None and key_lengths is None and not is_causal
        else:
            fused = T == S if is_causal else attn_mask is None
        if fused:
            query_lengths = key_lengths if is_causal else None
            o = attention(
                q, k, v, causal=is_causal, query_lengths=query_lengths, key_lengths=key_lengths
            )
        else:
            bias = _bias(q, S, attn_mask, key_padding_mask, key_lengths, is_causal)
            o, weights = _attention_with_weights(q, k, v, F.pad(bias, (0, k.shape[2] - S)))

        output = self.out_proj(self._merge(o, batched))
        if not need_weights:
            return output, None
        weights = (weights.mean(1) if average_attn_weights else weights).to(query.dtype)
        return output, weights if batched else weights.squeeze(0)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"batch_first={self.batch_first}"
        )

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.training and self.dropout > 0:
            raise NotImplementedError(
                f"dropout={self.dropout} is not implemented in training mode: construct the module "
                "with dropout=0, or call eval()"
            )
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
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

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

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, H, S, D) with bias_k and bias_v, then zeros, where the module has them."""
        B, H, _, D = k.shape
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, bias.view(1, H, 1, D).expand(B, -1, -1, -1).to(x.dtype)], 2)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return k, v


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


def _bias(
    q: Tensor,
    S: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """All masks as one summand of the scores, -inf where hidden, broadcastable to (B, H, T, S)."""
    B, H, T, _ = q.shape
    bias = torch.zeros(
        1, 1, 1, S, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )

    def summand(mask: Tensor) -> Tensor:
        if mask.is_floating_point():
            return mask.to(bias.dtype)
        return torch.zeros_like(mask, dtype=bias.dtype).masked_fill(mask, -torch.inf)

    if attn_mask is not None:
        bias = bias + summand(attn_mask.unflatten(0, (B, H)) if attn_mask.dim() == 3 else attn_mask)
    elif is_causal:
        bias = bias + summand(torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1))
    if key_padding_mask is not None:
        bias = bias + summand(key_padding_mask[:, None, None])
    if key_lengths is not None:
        beyond = torch.arange(S, device=q.device) >= key_lengths[:, None]
        bias = bias + summand(beyond[:, None, None])
        if is_causal:
            bias = bias + summand(beyond[:, None, :, None])
    return bias


def _attention_with_weights(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by the whole matrix of weights: o in the dtype of q, and p in that of bias.

        p = softmax(q k^T / sqrt(D) + bias)    (B, H, T, S)
        o = p v                                (B, H, T, D)

    A row of -inf, where no key is seen, gives weights of 0.
    """
    with dispatch.no_autocast(q.device):
        s = (q.to(bias.dtype) * q.shape[-1] ** -0.5) @ k.to(bias.dtype).mT + bias
        # filled before the softmax as well, whose gradient is NaN for a row of -inf
        dead = (s == -torch.inf).all(-1, keepdim=True)
        p = s.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)
        return (p @ v.to(bias.dtype)).to(q.dtype), p
