"""Whole models on the modules of `tfkern.nn`."""

from tfkern.models.adapters import adapt, load_adapter, save_adapter, without_adapters
from tfkern.models.config import TransformerConfig
from tfkern.models.convert import load, save
from tfkern.models.loss import cross_entropy, log_probs
from tfkern.models.presets import preset, presets
from tfkern.models.quantize import prepack, quantize
from tfkern.models.report import LayerReport, report_layers
from tfkern.models.transformer import Transformer

__all__ = [
    "LayerReport",
    "Transformer",
    "TransformerConfig",
    "adapt",
    "cross_entropy",
    "load",
    "load_adapter",
    "log_probs",
    "preset",
    "presets",
    "prepack",
    "quantize",
    "report_layers",
    "save",
    "save_adapter",
    "without_adapters",
]
