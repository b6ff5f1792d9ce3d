"""Attention over sequences that are split over processes."""

from tfkern.nn.context_parallel.attention import context_parallel_attention
from tfkern.nn.context_parallel.exchange import traffic
from tfkern.nn.context_parallel.split import SequenceSplit

__all__ = ["SequenceSplit", "context_parallel_attention", "traffic"]
