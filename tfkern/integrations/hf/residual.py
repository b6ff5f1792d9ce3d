"""A sum and the norm of it in one pass."""

from typing import Any

import torch
from torch import Tensor

from tfkern.integrations.hf import norms


def add_norm(norm: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """norm(a + b) and a + b."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        found = norms.plain(norm, b)
        if found is not None and a.device == b.device:
            return found(norm, b, residual=a, return_residual=True)
    h = torch.add(a, b) if isinstance(a, Tensor) else a + b
    return norm(h), h
