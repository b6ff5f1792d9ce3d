"""Tables of angles for `tfkern.rotary`."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfkern.files import shown

SCALINGS = ("linear", "llama3", "yarn", "longrope", "dynamic")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How much more slowly rotary positions turn, for longer texts than in the first training.

    The frequencies of "longrope" and "dynamic" depend on the length of the text, which is that of
    the longest one in the batch. Keys in a cache stay as they were turned when they came.
    `tfkern.generate` reads a text again where it outgrows `length` with "longrope"; with "dynamic"
    it does not. Both is what transformers does.

    Attributes:
        kind: "linear" divides all frequencies by `factor` (Chen et al. 2023). "llama3" (Grattafiori
            et al. 2024) does so with the slow ones, of which fewer than `low` waves fit into
            `length` tokens, and leaves the fast ones, of which more than `high` waves fit; what
            lies between is divided in part, by its number of waves. "yarn" (Peng et al. 2024) does
            the same, but in part by the place between these limits. "longrope" (Ding et al. 2024)
            divides each frequency by its number in `short`, or in `long` if the text is longer than
            `length`. "dynamic" (bloc97, emozilla 2023) raises the base with the length of such a
            text.
        factor: how many times as long the texts are; of "longrope" only the amplitude follows it.
        length: number of tokens of the longest text in the first training; "linear" needs none.
        low, high: waves, for "llama3" and "yarn"; if high is None it is 4, or 32 for "yarn".
        amplitude: factor of cosine and sine. If None it is 0.1 ln(factor) + 1 for "yarn",
            sqrt(1 + ln(factor) / ln(length)) for "longrope", both at least 1, and 1 for the others.
        truncate: whether the limits of "yarn" are widened to whole places.
        short, long: numbers of "longrope", one for each frequency.

    Raises:
        ValueError: values that do not fit.
    """

    kind: str
    factor: float
    length: int | None = None
    low: float = 1.0
    high: float | None = None
    amplitude: float | None = None
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ValueError(f"kind must be one of {', '.join(SCALINGS)}, got {shown(self.kind)}")
        if self.high is None:
            object.__setattr__(self, "high", 32.0 if self.kind == "yarn" else 4.0)
        for name in ("factor", "low", "high", "amplitude"):
            x = getattr(self, name)
            if not (_positive(x) or name == "amplitude" and x is None):
                raise ValueError(f"{name} must be positive and finite, got {shown(x)}")
        if self.kind != "linear" and (type(self.length) is not int or not 0 < self.length < 2**31):
            raise ValueError(f"length must be a positive integer, got {shown(self.length)}")
        assert self.high is not None
        if self.low >= self.high:
            raise ValueError(f"low must be less than high, got {self.low} and {self.high}")
        if type(self.truncate) is not bool:
            raise ValueError(f"truncate must be True or False, got {shown(self.truncate)}")
        for name in ("short", "long"):
            numbers = getattr(self, name)
            if not isinstance(numbers, (list, tuple)) or not all(map(_positive, numbers)):
                raise ValueError(f"{name} must be positive and finite numbers")
            object.__setattr__(self, name, tuple(numbers))
        if len(self.short) != len(self.long) or bool(self.short) != (self.kind == "longrope"):
            raise ValueError(
                "'longrope' alone has numbers short and long, and as many of them, got "
                f"{len(self.short)} and {len(self.long)} of {self.kind!r}"
            )
        if self.kind == "longrope" and self.length == 1 and self.amplitude is None:
            raise ValueError("length must exceed 1 where the amplitude follows from it")

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return self.kind in ("longrope", "dynamic")

    @property
    def size(self) -> float:
        """The amplitude, also where it follows from the kind."""
        if self.amplitude is not None:
            return self.amplitude
        growth = math.log(max(self.factor, 1.0))
        if self.kind == "longrope":
            assert self.length is not None
            return math.sqrt(1 + growth / math.log(self.length))
        return 0.1 * growth + 1 if self.kind == "yarn" else 1.0

    def __call__(self, plain: Tensor, base: float, length: Tensor) -> Tensor:
        """The frequencies after scaling.

        Args:
            plain: (N,), the frequencies before, in radians for each token.
            base: of which they are made.
            length: 0-d, the number of tokens of the longest text.
        """
        slow = plain / self.factor
        if self.kind == "linear":
            return slow
        assert self.length is not None
        if self.kind == "longrope":
            short, long = (plain.new_tensor(x) for x in (self.short, self.long))
            return plain / torch.where(length > self.length, long, short)
        if self.kind == "dynamic":
            growth = self.factor * length.clamp(min=self.length) / self.length - (self.factor - 1)
            places = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
            return plain * growth.to(plain.dtype) ** (-places / max(len(plain) - 1, 1))
        kept = self._by_waves(plain) if self.kind == "llama3" else self._by_place(plain, base)
        return slow + kept.clamp(0, 1) * (plain - slow)

    def _by_waves(self, plain: Tensor) -> Tensor:
        assert self.length is not None and self.high is not None
        waves = self.length * plain / (2 * math.pi)
        return (waves - self.low) / (self.high - self.low)

    def _by_place(self, plain: Tensor, base: float) -> Tensor:
        assert self.length is not None and self.high is not None
        N = len(plain)
        fast, slow = (
            N * math.log(self.length / (2 * math.pi * waves)) / math.log(base)
            for waves in (self.high, self.low)
        )
        if self.truncate:
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, 2 * N - 1)
        places = torch.arange(N, dtype=plain.dtype, device=plain.device)
        return 1 - (places - fast) / (slow - fast or 0.001)


def _positive(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x <= sys.float_info.max


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
    frequencies, size = base ** (-even / D), 1.0
    if scaling is not None:
        length = positions.max() + 1 if positions.numel() else positions.new_zeros(())
        frequencies, size = scaling(frequencies, base, length), scaling.size
    angles = positions[..., None] * frequencies
    dtype = torch.promote_types(x.dtype, torch.float32)
    pair = ((size * y).to(dtype) for y in (angles.cos(), angles.sin()))
    cos, sin = (torch.cat([y, y], -1) for y in pair)
    return cos, sin
