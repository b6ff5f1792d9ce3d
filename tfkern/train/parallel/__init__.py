"""A model on many processes: data, tensor, sequence, context and pipeline parallelism."""

from tfkern.train.parallel.context import cut, spread
from tfkern.train.parallel.mesh import mesh

__all__ = ["cut", "mesh", "spread"]
