"""The floating point operations of our operators, for torch's `FlopCounterMode`.

with FlopCounterMode(custom_mapping=formulas(causal=True)) as counter:
    model(tokens)
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from tfkern.reference.attention import Arguments

Band = tuple[int | None, int | None]  # keys seen before and after the query; None: no limit


# kBlock queries of csrc/cpu/attention.h, whose walk over keys ends with the last visible key.
_NATIVE_TILE = 64, 1


def formulas(
    causal: bool = False, triton_tile: tuple[int, int] = (128, 64)
) -> dict[Any, Callable[..., int]]:
    """Formulas for `FlopCounterMode`: its own know neither CPU kernels, nor tfkern, nor tiles.

    Args:
        causal: whether torch's operators of attention are; tfkern's have their band among the
            arguments.
        triton_tile: queries and keys of a tile of Triton's attention.
    """
    return _of_attention(causal, triton_tile) | _of_linear_layers() | _of_losses()


def _of_attention(causal: bool, triton_tile: tuple[int, int]) -> dict[Any, Callable[..., int]]:

    def of_torch(skip: int, products: tuple[int, int]) -> Callable[..., int]:
        def formula(*args, **_):
            q, k, v = args[skip : skip + 3]
            # As in ATen's FlashAttentionKernel.cpp; a causal walk ends with the last query.
            tile = (256 if q[2] >= 768 else 64 if q[2] >= 192 else 32), 1
            band = None, 0 if causal else None
            return tile_flops(q, k, v, band=band, tile=tile, products=products)

        return formula

    def ours(tile: tuple[int, int], products: tuple[int, int]) -> Callable[..., int]:
        """A formula for an operator with the arguments of forward, or of backward around these."""

        def formula(*args, **_):
            if len(args) > len(Arguments._fields):  # backward
                _do, _dlse, _o, _lse, *args, _bias_grad = args
            a = Arguments(*args)
            band = a.left, a.right
            return tile_flops(a.q, a.k, a.v, band=band, tile=tile, products=products)

        return formula

    # One walk over the tiles computes s, dq, dk with D and dp, dv with Dv. Two compute s, dp twice.
    one_walk, two_walks = (3, 2), (4, 3)
    by_operator = {
        "aten._scaled_dot_product_flash_attention_for_cpu": of_torch(0, (1, 1)),
        "aten._scaled_dot_product_flash_attention_for_cpu_backward": of_torch(1, one_walk),
        "tfkern.attention_forward": ours(_NATIVE_TILE, (1, 1)),
        "tfkern.attention_backward": ours(_NATIVE_TILE, one_walk),
        "tfkern_triton.attention_forward": ours(triton_tile, (1, 1)),
        "tfkern_triton.attention_backward": ours(triton_tile, two_walks),
    }
    found = {}
    for name, formula in by_operator.items():
        library, _, operator = name.partition(".")
        if hasattr(getattr(torch.ops, library), operator):  # only if its backend is loaded
            found[getattr(getattr(torch.ops, library), operator)] = formula
    return found


def _of_losses() -> dict[Any, Callable[..., int]]:
    """The products within `linear_cross_entropy`."""
    ops = torch.ops.tfkern_composed

    def count(x: Any, weight: Any, *others: Any, wanted: tuple = (), **_: Any) -> int:
        """The product that makes the logits, and those of the gradients of x and weight."""
        return (1 + sum(wanted)) * 2 * math.prod(x) * weight[0]

    def with_gradients(*args: Any, **_: Any) -> int:
        return count(*args, wanted=args[-3:-1])  # want_dx, want_dweight and want_dbias come last

    return {
        ops.linear_cross_entropy_forward: count,
        ops.linear_cross_entropy_backward: with_gradients,
        ops.linear_cross_entropy_formed: with_gradients,
    }


def _of_linear_layers() -> dict[Any, Callable[..., int]]:
    """The native backend's own products of linear layers and MLPs."""

    def product(a: Any, b: Any, _bias: Any = None, a2: Any = None, b2: Any = None, **_: Any) -> int:
        """a b^T, and the second such product that is added to it."""
        first = 2 * math.prod(a) * b[0]
        return first if a2 is None else first + 2 * math.prod(a2) * b2[0]

    def into(_out: Any, a: Any, b: Any, *_others: Any, **_: Any) -> int:
        return product(a, b)

    def hidden(x: Any, w: Any, _b: Any, w_up: Any, *_others: Any, **_: Any) -> int:
        """The first layers of an MLP, one or two."""
        return product(x, w) * (1 if w_up is None else 2)

    def packed(x: Any, _w: Any, _b: Any, w_up: Any, _b_up: Any, N: int, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * N * (1 if w_up is None else 2)

    by_operator: dict[str, Callable[..., int]] = {
        "linear_product": product,
        "linear_product_": into,
        "linear_packed": packed,
        "linear_int8": product,
        "mlp_hidden": hidden,
    }
    ops = torch.ops.tfkern  # it has them if the native backend is loaded
    return {getattr(ops, name): f for name, f in by_operator.items() if hasattr(ops, name)}


def tile_flops(q, k, v, *, band: Band, tile: tuple[int, int], products: tuple[int, int]) -> int:
    """FLOPs of the tiles that a kernel visits, by the shapes of q, k and v.

    `products` are the numbers of matrix products with D and with Dv for each tile: (1, 1) in
    forward.
    """
    (B, H, T, D), S, Dv = q, k[2], v[3]
    return 2 * B * H * visible_pairs(T, S, band, tile) * (products[0] * D + products[1] * Dv)


def visible_pairs(T: int, S: int, band: Band, tile: tuple[int, int] = (1, 1)) -> int:
    """The number of pairs of query and key in the tiles that a kernel visits.

    For every tile of queries a kernel walks over tiles of keys, from the tile with the first key
    that any of its queries sees to the tile with the last one. Tiles that the ends of the sequences
    cut off count with their real size.
    """
    import numpy as np  # tensors would be without values under the counter

    left, right = band
    tile_t, tile_s = tile
    start = np.arange(0, T, tile_t)
    end = np.minimum(start + tile_t, T)
    first = np.zeros_like(start)
    if left is not None:
        first = np.maximum(0, start + S - T - left) // tile_s * tile_s
    stop = np.full_like(start, S)
    if right is not None:
        stop = np.minimum(S, np.maximum(0, end + S - T + right))
    keys = np.minimum(S, -(-stop // tile_s) * tile_s) - first
    return int(((end - start) * np.maximum(0, keys)).sum())
