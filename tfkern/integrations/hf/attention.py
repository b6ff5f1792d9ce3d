"""tfkern's attention in the form that models of transformers call."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.integrations.hf import worth
from tfkern.ops import attention, attention_weights

NAMES: set[str] = set()  # names that `register` was given


def register(name: str = "tfkern") -> None:
    """Makes tfkern's attention an `attn_implementation` of transformers.

    It takes what transformers' "sdpa" takes, and also position biases with a gradient (T5), soft
    caps, sinks and grouped key heads, without writing out a matrix of scores for any of them. Few
    scores in float32 on a CPU, as one token's, go to torch's function, which is called sooner.
    `output_attentions=True` in a call also computes the weights, from before dropout.

    Args:
        name: the string to give as attn_implementation.

    Raises:
        ImportError: transformers is not installed, or is older than 4.53.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    NAMES.add(name)
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
    collected = kwargs.get("output_attentions") or _collected()
    plain = attention_mask is None and position_bias is None and s_aux is None and not softcap
    plain = plain and not (dropout or collected or (causal and key.shape[2] < T))
    if plain and not worth.attention(query, key):
        o = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
        return o.transpose(1, 2).contiguous(), None
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
    if collected:
        weights = attention_weights(query, key, lse, **options).to(query.dtype)
    return o.transpose(1, 2).contiguous(), weights


def _collected() -> bool:
    """Whether the model will return attention weights. Some attention modules, such as GPT-2's,
    take output_attentions as an argument of their own and do not pass it on."""
    # Before version 5 transformers has no such file, and passes output_attentions on.
    capturing = sys.modules.get("transformers.utils.output_capturing")
    variable: Any = getattr(capturing, "_active_collector", None)
    collected: Any = None if variable is None else variable.get()
    return bool(collected) and any("attentions" in key for key in collected)
