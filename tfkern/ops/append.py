"""New tokens in a cache of keys and values."""

from torch import Tensor

from tfkern import dispatch

dispatch.register("append")


def append_(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor | None = None,
) -> Tensor:
    """Writes k and v behind the tokens that a cache holds, in place, and adds to its lengths.

    A token that would lie beyond the last place goes on at the first one. Callers check arguments.

    Args:
        k_cache: (B, Hk, S, D), v_cache: (B, Hk, S, Dv).
        lengths: (B,) int64, how many tokens each sequence has had.
        k: (B, Hk, T, D), v: (B, Hk, T, Dv), T <= S.
        counts: (B,) int64 in [0, T], how many of the tokens each sequence has; all if None.

    Returns:
        (B,) int64, how many places of the cache each sequence uses now.
    """
    args = (k_cache, v_cache, lengths, k, v, counts)
    backend = dispatch.find("append", args) or "reference"
    return dispatch.implementation("append", backend).forward(*args)
