"""Models from before transformers: a recurrent encoder-decoder, and attention beside it."""

from tfkern.classic.attention import (
    AdditiveAttention,
    AdditiveScores,
    Choice,
    HardAttention,
    LuongAttention,
    MovingBaseline,
    SoftAttention,
    coverage_penalty,
    reinforce,
    running_mean,
)
from tfkern.classic.recurrent import RecurrentSeq2Seq

__all__ = [
    "AdditiveAttention",
    "AdditiveScores",
    "Choice",
    "HardAttention",
    "LuongAttention",
    "MovingBaseline",
    "RecurrentSeq2Seq",
    "SoftAttention",
    "coverage_penalty",
    "reinforce",
    "running_mean",
]
