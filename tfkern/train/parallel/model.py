"""A model and the processes that train it, as the loop of training sees them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tfkern.models import Transformer
from tfkern.train.objective import Batch, Objective
from tfkern.train.parallel.context import cut
from tfkern.train.parallel.mesh import AXES, data_place, joined

ROWS = ("dp", "fsdp")  # axes of a mesh along which ranks have other rows of a batch each
TOKENS = (*ROWS, "cp")  # and those along which they have other tokens each

Measure = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Share:
    """The share of a batch's loss that a part of the batch has.

    Attributes:
        objective: makes a loss of what the model returns.
        count: (terms,) what the whole batch has, on all ranks: see `Loss.count`.
        autocast: makes the context of forward and loss.
    """

    objective: Objective
    count: Tensor
    autocast: Callable[[], AbstractContextManager[Any]]

    def __call__(self, output: Any, part: Batch) -> Tensor:
        """The terms of the share."""
        return self.objective(output, part).share(self.count)


class Parallel(nn.Module):
    """A model on the processes of a mesh, which `parallelise` makes, or on this one alone.

    Each data rank trains on its part of a batch, `batches[step]`. The parts of all data ranks, one
    after the other, are the batch that one process would have. Processes that differ in other axes
    of the mesh have the same part. Those along cp take whole sequences of it, and each computes
    its own part of them, which `tfkern.train.parallel.cut` makes.

    Attributes:
        module: the model. Its parameters may be DTensors.
        mesh: the processes; None for this one alone.
        data_rank, data_world: which part of a batch this process has, and how many there are.
        borrowed: parameters that an earlier stage of a pipeline has, too.
    """

    borrowed: frozenset[nn.Parameter] = frozenset()
    _terms: Any

    def __init__(
        self, module: nn.Module, mesh: DeviceMesh | None = None, inner: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.module, self.mesh = module, mesh
        self.data_rank, self.data_world = (0, 1) if mesh is None else data_place(mesh)
        # The loss is made inside, so that DDP sees which parameters have a gradient. It is not a
        # module of this one, which would have all parameters twice.
        self.__dict__["_terms"] = _Terms(module) if inner is None else inner
        sharded = isinstance(module if inner is None else inner, FSDPModule)
        if self.averaged > 1 and not sharded:
            assert mesh is not None
            self.__dict__["_terms"] = DistributedDataParallel(
                self._terms, process_group=joined(mesh, "dp", "cp").get_group(),
                gradient_as_bucket_view=True,
                find_unused_parameters=_leaves_out(module),
            )  # fmt: skip

    @staticmethod
    def of(model: nn.Module) -> "Parallel":
        """The model itself if it is one, or the model on this process alone.

        Raises:
            ValueError: `torch.compile` has been applied to one. It would hide the other processes.
        """
        if isinstance(getattr(model, "_orig_mod", None), Parallel):
            raise ValueError(
                "what parallelise returns cannot be compiled: compile the model before: "
                "model.compile()"
            )
        return model if isinstance(model, Parallel) else Parallel(model)

    def forward(self, **inputs: Any) -> Any:
        """As the model's, of this process's part of the sequences."""
        return self._call(self._own(inputs))

    def _call(self, inputs: Batch) -> Any:
        output = self.module(**inputs)
        if isinstance(self.module, FSDPModule) and not self.training:
            self.module.reshard()  # backward would, and an evaluation has none
        return output

    def backward(
        self, part: Batch, share: Share, scale: Callable[[Tensor], Tensor], last: bool
    ) -> Tensor:
        """Adds the gradients of a part of the batch, and returns its terms of the loss.

        Args:
            part: of this data rank.
            scale: is applied to the loss.
            last: whether this is the last part of the batch. Gradients are the same on all ranks
                behind it, and not before.
        """
        with self._synchronised(last):
            terms = self._terms(self._own(part), share)
            # Gradients are averaged over ranks whose losses are to be summed.
            scale(terms.sum() * self.averaged).backward()
        return terms.detach()

    def measure(
        self, batch: Batch, measure: Measure, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Tensor:
        """What a function finds in the model's output, or the sum of that for parts of the batch.

        Args:
            measure: takes the output and the batch, or a part of both, and returns numbers (n,).
            autocast: makes the context of forward and of the function.
        """
        own = self._own(batch)
        with autocast():
            return measure(self._call(inputs(own)), own)

    def sum(self, x: Tensor, axes: tuple[str, ...] = TOKENS) -> Tensor:
        """The sum over all ranks along some axes of the mesh, in place.

        Args:
            axes: `TOKENS` for what depends on the part of the sequences that a process computes,
                `ROWS` for what depends on the batch it is given.
        """
        for axis in axes:
            if self.size(axis) > 1:
                distributed.all_reduce(x, group=self._group(axis))
        return x

    @property
    def averaged(self) -> int:
        """Over how many ranks gradients are averaged."""
        return self.data_world * self.size("cp")

    @property
    def leads(self) -> bool:
        """Whether this process is the first of those with its stage of the model."""
        return not any(self._place(axis) for axis in AXES if axis != "pp")

    @property
    def random_rank(self) -> int:
        """A number for each process whose dropout differs from that of the others."""
        other = self._place("pp") * self.size("cp") + self._place("cp")
        return self.data_rank + self.data_world * other

    @property
    def stages(self) -> ProcessGroup | None:
        """The processes that have the other stages of the model; None if it is on one."""
        return self._group("pp") if self.size("pp") > 1 else None

    def size(self, axis: str) -> int:
        """The number of ranks along an axis of the mesh."""
        return 1 if self.mesh is None else self.mesh[axis].size()

    def _own(self, batch: Batch) -> Batch:
        """This process's part of the sequences of a batch."""
        if self.size("cp") == 1:
            return batch
        assert isinstance(self.module, Transformer)
        return cut(batch, self.module)

    def _place(self, axis: str) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    def _group(self, axis: str) -> ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """A context of forward and backward in which gradients are averaged only if `last`."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        alone = isinstance(self._terms, DistributedDataParallel) and not last
        with self._terms.no_sync() if alone else nullcontext():
            yield


def _leaves_out(module: nn.Module) -> bool:
    """Whether a step may leave parameters without a gradient, for which DDP has to search, and
    which it warns of if there are none."""
    if isinstance(module, Transformer):
        return module.pooler is not None and module.classifier is None
    return True


class _Terms(nn.Module):
    """From a part of a batch to its terms of the loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, part: Batch, share: Share) -> Tensor:
        with share.autocast():
            return share(self.module(**inputs(part)), part)


def inputs(batch: Batch) -> dict[str, Any]:
    """What the model takes of a batch."""
    return {name: x for name, x in batch.items() if name != "targets"}
