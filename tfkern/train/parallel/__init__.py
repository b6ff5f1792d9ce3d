"""A model on many processes: data, tensor, sequence, context and pipeline parallelism."""

from tfkern.train.parallel.context import cut, spread
from tfkern.train.parallel.gather import gather
from tfkern.train.parallel.mesh import mesh
from tfkern.train.parallel.model import Parallel
from tfkern.train.parallel.parallelise import parallelise

__all__ = ["Parallel", "cut", "gather", "mesh", "parallelise", "spread"]
