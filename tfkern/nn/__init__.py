"""Modules on the fused kernels, with constructors and parameters of their torch.nn namesakes."""

from tfkern.nn.attention import MultiheadAttention
from tfkern.nn.layer_norm import LayerNorm, RMSNorm
from tfkern.nn.mlp import MLP, GatedMLP

__all__ = ["MLP", "GatedMLP", "LayerNorm", "MultiheadAttention", "RMSNorm"]
