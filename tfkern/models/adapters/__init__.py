"""Adapters of low rank on the layers of a model, as users of peft know them."""

from tfkern.models.adapters.disk import load_adapter, save_adapter
from tfkern.models.adapters.place import (
    adapt,
    adapter_parameters,
    merge,
    unload,
    unmerge,
    without_adapters,
)

__all__ = [
    "adapt",
    "adapter_parameters",
    "load_adapter",
    "merge",
    "save_adapter",
    "unload",
    "unmerge",
    "without_adapters",
]
