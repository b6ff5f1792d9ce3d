"""Tables of angles for `tfkern.rotary`."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCALINGS = ("linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How much more slowly rotary positions turn, for longer texts than in the first training.

    Attributes:
        kind: "linear" divides all frequencies by `factor` (Chen et al. 2023). "llama3" (Grattafiori
            et al. 2024) does so with the slow ones, of which fewer than `low` waves fit into
            `length` tokens, and leaves the fast ones, of which more than `high` waves fit; what
            lies between is divided in part.
        factor: how many times as long the texts are.
        length: number of tokens of the longest text in the first training, which "llama3" needs.
        low, high: waves, for "llama3".

    Raises:
        ValueError: values that do not fit.
    """

    kind: str
    factor: float
    length: int | None = None
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ValueError(f"kind must be one of {', '.join(SCALINGS)}, got {self.kind!r}")
        for name in ("factor", "low", "high"):
            if not _positive(getattr(self, name), (int, float)):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        if self.kind == "llama3" and not _positive(self.length, (int,)):
            raise ValueError(f"length must be a positive integer, got {self.length!r}")
        if self.low >= self.high:
            raise ValueError(f"low must be less than high, got {self.low} and {self.high}")

    def __call__(self, frequencies: Tensor) -> Tensor:
        """The frequencies, in radians for each token, after scaling."""
        slow = frequencies / self.factor
        if self.kind == "linear":
            return slow
        assert self.length is not None
        waves = self.length * frequencies / (2 * math.pi)
        kept = ((waves - self.low) / (self.high - self.low)).clamp(0, 1)
        return slow + kept * (frequencies - slow)


def _positive(x: Any, kinds: tuple[type, ...]) -> bool:
    return type(x) in kinds and 0 < x <= sys.float_info.max


def rotary_table(
    positions: Tensor, D: int, base: float, x: Tensor, scaling: RotaryScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., T, D) of the angles at positions (..., T), in the dtype of x or
    float32.

    Position t turns the pair of features i and i + D / 2 by the angle t base^(-2i / D) (Su et al.
    2021), so that the product of a query and a key depends on their distance only. The angles are
    computed in float64: in float32 the error at position t would reach 6e-8 t.
    """
    even = torch.arange(0, D, 2, dtype=torch.float64, device=positions.device)
    frequencies = base ** (-even / D)
    angles = positions[..., None] * (frequencies if scaling is None else scaling(frequencies))
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (torch.cat([y, y], -1) for y in (angles.cos().to(dtype), angles.sin().to(dtype)))
    return cos, sin
