"""How a sequence is split over the ranks of a group."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from tfkern.nn.context_parallel.exchange import all_gather
from tfkern.ops import checks

if TYPE_CHECKING:  # builds of torch without processes have no such class
    from torch.distributed import ProcessGroup

PLACEMENTS = ("zigzag", "blocks")


@dataclass(frozen=True)
class SequenceSplit:
    """Which positions of a sequence each of n ranks has.

    All ranks have equally many, so a length must be a multiple of `multiple`. Longer sequences
    with padding and lengths serve for others.

    Attributes:
        group: the ranks; all processes if None.
        placement: "blocks": rank r has the r-th of n equal parts. "zigzag": it has parts r and
            2n - 1 - r of 2n. Causal attention then costs all ranks the same (Zhu 2024,
            "ring-flash-attention"; Grattafiori et al. 2024), while with blocks the last rank has
            almost twice the work of the mean. Narrow windows send less with blocks.

    Raises:
        ValueError: an unknown placement.
    """

    group: "ProcessGroup | None" = None
    placement: str = "zigzag"

    def __post_init__(self) -> None:
        checks.choice("placement", self.placement, PLACEMENTS)

    @property
    def rank(self) -> int:
        return distributed.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return distributed.get_world_size(self.group)

    @property
    def multiple(self) -> int:
        """The number that must divide a length."""
        return 1 if self.ranks == 1 else self.ranks * self._chunks

    def chunks(self, length: int, rank: int | None = None) -> list[range]:
        """The positions of a rank, this one if None, in a sequence of a length: in rising order.

        Raises:
            ValueError: a length that cannot be split equally.
        """
        n, rank = self.ranks, self.rank if rank is None else rank
        if length % self.multiple:
            raise ValueError(
                f"a sequence of {length} cannot be split over {n} ranks by {self.placement!r}: "
                f"pad it to a multiple of {self.multiple}"
            )
        if n == 1:
            return [range(length)]
        size = length // self.multiple
        numbers = (rank,) if self.placement == "blocks" else (rank, 2 * n - 1 - rank)
        return [range(i * size, (i + 1) * size) for i in numbers]

    def positions(self, length: int, rank: int | None = None, device: Any = None) -> Tensor:
        """`chunks` as a tensor (length / n,) int64."""
        steps = torch.arange(length, device=device)
        return torch.cat([steps[c.start : c.stop] for c in self.chunks(length, rank)])

    def split(self, x: Tensor, axis: int) -> Tensor:
        """This rank's part of a whole sequence along an axis. The gradient elsewhere is 0.

        Raises:
            ValueError: as `chunks`.
        """
        parts = [x.narrow(axis, c.start, len(c)) for c in self.chunks(x.shape[axis])]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def gather(self, x: Tensor, axis: int) -> Tensor:
        """The whole sequence, from the parts that all ranks have along an axis.

        The gradient of a part is the sum of those that the ranks have for it: it is that of the
        sum of their losses.
        """
        parts = all_gather(x.movedim(axis, 0), self.group).flatten(0, 1)
        return parts.index_select(0, self.order(len(parts), x.device)).movedim(0, axis)

    def order(self, length: int, device: Any = None) -> Tensor:
        """Where each position is in the parts of all ranks one after the other: (length,) int64."""
        parts = [self.positions(length, rank, device) for rank in range(self.ranks)]
        return torch.cat(parts).argsort()

    def __deepcopy__(self, memo: dict) -> "SequenceSplit":
        return self  # groups of processes cannot be copied, and nothing here changes

    @property
    def _chunks(self) -> int:
        return 1 if self.placement == "blocks" else 2
