"""Adapters of low rank on the layers of a model, as users of peft know them."""

from tfkern.models.adapters.disk import load_adapter, save_adapter
from tfkern.models.adapters.place import (
    adapt,
    adapt_like,
    adapter_parameters,
    merge,
    unload,
    unmerge,
    without_adapters,
)

__all__ = [
    "adapt",
    "adapt_like",
    "adapter_parameters",
    "load_adapter",
    "merge",
    "save_adapter",
    "unload",
    "unmerge",
    "without_adapters",
]
