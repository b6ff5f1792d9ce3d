"""What the ranks of a group send each other. Everything goes through here, and is counted."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:  # builds of torch without processes have no such class
    from torch.distributed import ProcessGroup

_open: list[Counter[str]] = []


@contextmanager
def traffic() -> Iterator[Counter[str]]:
    """Counts what context parallelism sends to other processes while the block runs.

        with traffic() as sent:
            o = context_parallel_attention(q, k, v, split)
        print(sent["bytes"], sent["messages"])

    What a process sends to itself does not count.
    """
    counted: Counter[str] = Counter()
    _open.append(counted)
    try:
        yield counted
    finally:
        _open.pop()


class Passing:
    """A tensor on its way to the rank `hop` further on, while that of `hop` ranks before arrives.

    The transfer runs beside what is computed until `wait`, which returns what has arrived.
    """

    def __init__(self, x: Tensor, group: "ProcessGroup | None", hop: int, tag: int = 0) -> None:
        rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
        self._sent, self._received = x, torch.empty_like(x)
        _count(x.nbytes, 1)
        ends = (
            (distributed.isend, self._sent, (rank + hop) % ranks),
            (distributed.irecv, self._received, (rank - hop) % ranks),
        )
        self._works = distributed.batch_isend_irecv(
            [distributed.P2POp(f, y, group=group, tag=tag, group_peer=peer) for f, y, peer in ends]
        )

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


def all_to_all(x: Tensor, group: "ProcessGroup | None") -> Tensor:
    """x[j] goes to rank j, and [i] of the result has come from rank i. Differentiable."""
    return _AllToAll.apply(x, group)


def all_gather(x: Tensor, group: "ProcessGroup | None") -> Tensor:
    """The tensors of all ranks, (ranks, *x.shape). In backward their gradients are summed."""
    return _AllGather.apply(x, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(x, group):
        x = x.contiguous()
        received = torch.empty_like(x)
        _count(x.nbytes - x.nbytes // len(x), len(x) - 1)
        distributed.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, dx):
        return _AllToAll.apply(dx, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(x, group):
        ranks = distributed.get_world_size(group)
        gathered = x.new_empty(ranks, *x.shape)
        _count(x.nbytes * (ranks - 1), ranks - 1)
        distributed.all_gather(list(gathered.unbind()), x.contiguous(), group=group)
        return gathered

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, dx):
        # Summed here in the order of the ranks, so that the result does not depend on the library.
        return _AllToAll.apply(dx, ctx.group).sum(0), None


def _count(size: int, messages: int) -> None:
    for counted in _open:
        counted["bytes"] += size
        counted["messages"] += messages
