"""Whole models on the modules of `tfkern.nn`."""

from tfkern.models.config import TransformerConfig
from tfkern.models.transformer import Transformer

__all__ = ["Transformer", "TransformerConfig"]
