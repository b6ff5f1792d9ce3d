"""What came before transformers: attention beside a recurrent network, and that network alone."""

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
