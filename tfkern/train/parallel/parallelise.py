"""From a model and a mesh to a model on the mesh."""

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tfkern.models import Transformer
from tfkern.models.stack import Stack
from tfkern.train.parallel import tensor
from tfkern.train.parallel.context import spread
from tfkern.train.parallel.mesh import AXES, conflict, joined
from tfkern.train.parallel.model import Parallel
from tfkern.train.parallel.pipeline import Pipeline, Stage


def parallelise(
    model: nn.Module,
    mesh: DeviceMesh,
    precision: torch.dtype | None = None,
    *,
    schedule: str = "1f1b",
    microbatches: int | None = None,
) -> Parallel:
    """Spreads a model over the processes of a mesh, in place.

    All processes need the same weights beforehand. Make the optimiser behind it, of the parameters
    that the model then has. To compile the model, call `model.compile()` before.

        grid = mesh(dp=2, tp=2)
        model = parallelise(Transformer(config), grid)
        batches = order(sources, 32, seed, rank=model.data_rank, world=model.data_world)
        for record in steps(model, batches, CrossEntropy(), adamw(model, 1e-3), stop=1000): ...

    By axis of the mesh: dp replicates the model and averages gradients (DDP, Li et al. 2020), fsdp
    cuts each parameter and gathers those of a block while it runs (FSDP2, Zhao et al. 2023); with
    both, there are dp replicas of what fsdp ranks have cut. tp cuts each layer, see
    `tfkern.train.parallel.tensor`. cp cuts each sequence, see `tfkern.train.parallel.spread`; its
    ranks average gradients like those of dp, or cut parameters like those of fsdp. pp gives each
    process some of the blocks of a `Transformer`, and sends the parts of a batch through them.

    Args:
        model: on the device of the mesh.
        mesh: see `tfkern.train.parallel.mesh`.
        precision: with fsdp, the dtype in which parameters are gathered and blocks compute, as
            torch.bfloat16; that of the parameters if None. The parameters that the optimiser sees
            and the sums of gradients stay as they are.
        schedule, microbatches: of pp, see `tfkern.train.parallel.pipeline.Pipeline`.

    Raises:
        ValueError: a mesh with other axes, a model on another device or of which tp cannot have
            equal parts, cp beside tp or pp, a precision without fsdp, or what `spread`, `Pipeline`
            and `Stage` refuse.
    """
    if mesh.mesh_dim_names != AXES:
        raise ValueError(f"the mesh must have the axes {AXES}, got {mesh.mesh_dim_names}")
    kinds = {p.device.type for p in model.parameters()}
    if kinds != {mesh.device_type}:
        raise ValueError(f"the mesh is of {mesh.device_type}, and the model on {sorted(kinds)}")
    if precision is not None and mesh["fsdp"].size() == 1:
        raise ValueError(f"precision {precision} needs fsdp: use that of steps")
    if (reason := conflict({axis: mesh[axis].size() for axis in AXES})) is not None:
        raise ValueError(reason)
    if mesh["cp"].size() > 1:
        if not isinstance(model, Transformer):
            raise ValueError(f"cp needs a tfkern.models.Transformer, got {type(model).__name__}")
        spread(model, mesh.get_group("cp"))
    stage = None
    if mesh["pp"].size() > 1:
        if not isinstance(model, Transformer):
            raise ValueError(f"pp needs a tfkern.models.Transformer, got {type(model).__name__}")
        index = mesh.get_local_rank("pp")
        stage = Stage(model, index, mesh["pp"].size(), precision)
    if mesh["tp"].size() > 1:
        tensor.split(model, mesh["tp"])
    # DDP takes no DTensors: beside tp, FSDP replicates, with whole parameters for its shards.
    if mesh["fsdp"].size() > 1 or mesh["tp"].size() > 1 and mesh["dp"].size() > 1:
        _shard(model if stage is None else stage, mesh, precision)
    if stage is None:
        return Parallel(model, mesh)
    return Pipeline(stage, mesh, schedule=schedule, microbatches=microbatches)


def _shard(model: nn.Module, mesh: DeviceMesh, precision: torch.dtype | None) -> None:
    """Cuts the parameters of each block, and those of the whole model that are not in blocks."""
    shards = joined(mesh, "fsdp", "cp")
    axes = shards
    if mesh["dp"].size() > 1:
        joint = shards.size() > mesh["fsdp"].size()  # with cp, whose joint axis cannot be sliced
        axes = DeviceMesh._concatenate([mesh["dp"], shards]) if joint else mesh["dp", "fsdp"]
    # The residual stream enters blocks in its own dtype, which may be wider than the parameters.
    policy = MixedPrecisionPolicy(
        param_dtype=precision,
        reduce_dtype=None if precision is None else torch.float32,
        cast_forward_inputs=False,
    )
    # It warns of views that could be changed in place, which neither blocks nor loop do.
    told = r"FSDP2-wrapped module \(FSDP(Block|Transformer)\) returned a view"
    warnings.filterwarnings("ignore", told)
    blocks = [b for m in model.modules() if isinstance(m, Stack) for b in m.blocks if b is not None]
    for module in (*blocks, model):
        fully_shard(module, mesh=axes, mp_policy=policy)
