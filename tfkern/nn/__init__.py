"""Modules on the fused kernels, with constructors and parameters of their torch.nn namesakes."""

from tfkern.nn import functional
from tfkern.nn.attention import MultiheadAttention
from tfkern.nn.batch_norm import BatchNorm, NoNorm
from tfkern.nn.cache import KVCache
from tfkern.nn.context_parallel import SequenceSplit, context_parallel_attention
from tfkern.nn.cross_entropy import CrossEntropyLoss
from tfkern.nn.layer_norm import LayerNorm, RMSNorm, ZeroCenteredRMSNorm
from tfkern.nn.linear import Int8Linear, Linear, PackedLinear
from tfkern.nn.lora import LoRALinear
from tfkern.nn.mlp import MLP, GatedMLP
from tfkern.nn.rotary import RotaryScaling

__all__ = [
    "MLP",
    "BatchNorm",
    "CrossEntropyLoss",
    "GatedMLP",
    "Int8Linear",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LoRALinear",
    "MultiheadAttention",
    "PackedLinear",
    "NoNorm",
    "RMSNorm",
    "RotaryScaling",
    "SequenceSplit",
    "ZeroCenteredRMSNorm",
    "context_parallel_attention",
    "functional",
]
