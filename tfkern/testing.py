"""The comparison of a kernel with float64, for users: see `tfkern.validation.compare`."""

from tfkern.validation.compare import Comparison, Report, validate

__all__ = ["Comparison", "Report", "validate"]
