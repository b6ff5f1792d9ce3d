"""Whole models on the modules of `tfkern.nn`."""

from tfkern.models.config import TransformerConfig
from tfkern.models.presets import preset, presets
from tfkern.models.transformer import Transformer

__all__ = ["Transformer", "TransformerConfig", "preset", "presets"]
