"""From text to batches (`pip install tfkern[data]`)."""

from tfkern.data.order import order
from tfkern.data.packed import Packed
from tfkern.data.shards import Shards
from tfkern.data.sources import IGNORED, Documents, Windows, cu_seqlens, padded, positions

__all__ = [
    "Documents",
    "IGNORED",
    "Packed",
    "Shards",
    "Windows",
    "cu_seqlens",
    "order",
    "padded",
    "positions",
]
