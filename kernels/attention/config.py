"""Tile sizes: a pure function of the head sizes, the dtype and the architecture."""

import torch
import triton

from .. import Tiles, precision

# (queries, keys, num_warps, num_stages) for head sizes up to 64, 128 and 256. Tiles are large, but
# neither spill registers nor exceed the shared memory of an SM, which is 163 KiB on sm_80, 227 KiB
# on sm_90 and sm_100, and 99 KiB on others.
_TILES = {
    ("sm_80", "forward"): ((128, 32, 4, 4), (128, 64, 8, 3), (64, 32, 8, 3)),
    ("sm_80", "dkv"): ((32, 128, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("sm_80", "dq"): ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
    ("sm_90", "forward"): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    ("sm_90", "forward by descriptors"): ((128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 2)),
    ("sm_80", "forward with options"): ((128, 16, 4, 4), (128, 32, 8, 4), (64, 16, 8, 3)),
    ("sm_90", "forward with options"): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
    ("sm_90", "forward by descriptors with options"): (
        (128, 64, 8, 3),
        (128, 64, 8, 3),
        (128, 32, 8, 2),
    ),
    ("sm_90", "dkv with options"): ((32, 128, 8, 3), (16, 128, 8, 2), (32, 32, 8, 3)),
    ("sm_90", "dkv"): ((64, 128, 8, 2), (32, 128, 8, 3), (64, 32, 8, 3)),
    ("sm_90", "dq"): ((128, 128, 8, 2), (128, 128, 8, 2), (64, 64, 8, 2)),
    ("sm_100", "forward by descriptors with options"): (
        (128, 32, 8, 4),
        (128, 64, 8, 3),
        (128, 16, 8, 2),
    ),
    ("sm_100", "forward by descriptors"): ((128, 64, 8, 4), (128, 64, 8, 3), (128, 32, 8, 2)),
    ("sm_100", "forward"): ((128, 64, 8, 4), (128, 64, 8, 3), (128, 32, 8, 2)),
    ("sm_100", "dkv"): ((64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 8, 2)),
    ("sm_100", "dq"): ((128, 128, 8, 2), (128, 128, 8, 2), (128, 32, 8, 2)),
    ("others", "forward"): ((128, 32, 4, 4), (128, 64, 8, 3), (64, 32, 8, 2)),
    ("others", "dkv"): ((32, 128, 8, 3), (64, 64, 8, 2), (32, 32, 8, 2)),
    ("others", "dkv with options"): ((16, 64, 8, 3), (64, 32, 8, 2), (32, 16, 8, 2)),
    ("others", "dq"): ((128, 64, 8, 3), (128, 32, 8, 3), (32, 32, 4, 2)),
    ("float32", "forward"): ((128, 16, 8, 2), (16, 32, 4, 2), (16, 16, 8, 2)),
    ("float32", "dkv"): ((32, 32, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2)),
    ("float32", "dq"): ((64, 16, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2)),
}
_FAMILIES = {80: "sm_80", 87: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}

# The sides of tiles that options halve, for kernels without an entry "... with options" above. The
# family "" stands for all families that are not listed.
_HALVED = {
    ("sm_80", "dq"): ("rows", "columns"),
    ("others", "forward"): ("rows", "columns"),
    ("others", "dq"): ("rows", "columns"),
    ("sm_100", "dkv"): ("columns",),
    ("", "forward"): ("columns",),
    ("", "dkv"): ("rows",),
    ("", "dq"): ("columns",),
}

# Tiles of kernels that use the same on every architecture, by (kernel, whether q is float32).
_OTHER_TILES = {
    ("decode", False): ((16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 2)),
    ("decode", True): ((16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
    ("dbias", False): ((64, 32, 8, 2), (64, 32, 8, 3), (32, 32, 4, 2)),
    ("dbias", True): ((32, 32, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2)),
}


def tiles_of(
    kernel: str, D: int, Dv: int, dtype: torch.dtype, arch: int, *, options: bool = False
) -> Tiles:
    """The tile, queries (rows) by keys (columns), of a kernel on sm_<arch>: "forward", "dkv", "dq",
    "decode" or "dbias". `options` tells that the call needs more registers: see tile.heavy."""
    size = max(D, Dv)
    float32 = dtype == torch.float32
    family = "float32" if float32 else _FAMILIES.get(arch, "others")
    own = _TILES.get((family, f"{kernel} with options")) if options else None
    known = own or _OTHER_TILES.get((kernel, float32)) or _TILES[family, kernel]
    tiles = Tiles(*known[0 if size <= 64 else 1 if size <= 128 else 2])
    if options and not own:
        halved = _HALVED.get((family, kernel)) or _HALVED.get(("", kernel), ())
        tiles = tiles._replace(**{side: max(16, getattr(tiles, side) // 2) for side in halved})
        if (family, kernel) == ("others", "forward"):
            tiles = tiles._replace(num_stages=2)
    return tiles


def constants(tiles: Tiles, D: int, Dv: int, dtype: torch.dtype) -> dict:
    """The constants and launch options that all attention kernels take."""
    PRECISION = precision(dtype)
    if PRECISION == "tf32x3" and max(D, Dv) > 128:
        PRECISION = "ieee"  # three products would need more registers than there are
    return {
        "BLOCK_T": tiles.rows, "BLOCK_S": tiles.columns,
        "D": D, "Dv": Dv, "BLOCK_D": block(D), "BLOCK_DV": block(Dv), "PRECISION": PRECISION,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip


def block(size: int) -> int:
    """`size` rounded up to a head size that tl.dot takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))
