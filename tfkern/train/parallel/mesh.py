"""Processes as a grid with an axis for each way to share work."""

import math
import os
import re
from collections.abc import Mapping

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp", "fsdp", "cp", "tp")  # those that send most are innermost: within a machine


def mesh(
    *, dp: int = 1, fsdp: int = 1, tp: int = 1, cp: int = 1, pp: int = 1, device: str | None = None
) -> DeviceMesh:
    """The processes that torchrun or Slurm has started, as a mesh with the axes of `AXES`.

    The group of processes is set up from the environment that torchrun or srun makes, if it is not
    yet.

    Args:
        dp: replicas of the model, each with a part of the batch (DDP).
        fsdp: shards of each parameter; each process has a part of the batch (FSDP2).
        tp: parts of each layer (tensor parallelism).
        cp: parts of each sequence (context parallelism).
        pp: stages of the model (pipeline parallelism).
        device: "cpu" or "cuda"; if None, CUDA where there is one.

    Raises:
        ValueError: sizes whose product is not the number of processes.
    """
    sizes = {"pp": pp, "dp": dp, "fsdp": fsdp, "cp": cp, "tp": tp}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    known, world = distributed.is_initialized(), processes()
    check_sizes(sizes, world)
    if not known:
        if "RANK" not in os.environ:
            raise ValueError("there is no group of processes: start the program with torchrun")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def check_sizes(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """The sizes of a mesh, of which dp follows from the number of processes if it is not told.

    Raises:
        ValueError: sizes whose product is not the number of processes.
    """
    told = {name: size for name, size in sizes.items() if name in AXES}
    product = math.prod(told.values())
    found = {"dp": max(1, world // product), **told}
    if math.prod(found.values()) != world:
        shown = " * ".join(f"{name} {size}" for name, size in told.items() if size > 1) or "1"
        raise ValueError(f"the mesh needs {shown} = {product} processes, and there are {world}")
    return found


def conflict(sizes: Mapping[str, int]) -> str | None:
    """Why axes of these sizes cannot share the work of one model, or None."""
    others = [f"{axis} {sizes[axis]}" for axis in ("tp", "pp") if sizes.get(axis, 1) > 1]
    if others and sizes.get("cp", 1) > 1:
        return f"cp {sizes['cp']} cannot be combined with {' and '.join(others)} yet"
    return None


def joined(mesh: DeviceMesh, *axes: str) -> DeviceMesh:
    """The processes along several axes of a mesh as a mesh of one axis. All processes call this."""
    wide = [axis for axis in axes if mesh[axis].size() > 1] or axes[:1]
    return mesh[wide[0]] if len(wide) == 1 else mesh[tuple(wide)]._flatten("_".join(wide))


def data_place(mesh: DeviceMesh) -> tuple[int, int]:
    """Which part of a batch this process has, and how many parts there are."""
    dp, fsdp = mesh["dp"], mesh["fsdp"]
    return dp.get_local_rank() * fsdp.size() + fsdp.get_local_rank(), dp.size() * fsdp.size()


def processes() -> int:
    """How many processes torchrun or Slurm has started; 1 if neither has started this one."""
    if distributed.is_initialized():
        return distributed.get_world_size()
    if "RANK" not in os.environ:
        os.environ |= from_slurm(os.environ)
    return int(os.environ.get("WORLD_SIZE", "1"))


def from_slurm(told: Mapping[str, str]) -> dict[str, str]:
    """The environment that torchrun would make, from that of a task of srun; else empty.

    Slurm has no address where processes meet: it is the first node, with a port by the job.
    """
    if "SLURM_STEP_NUM_TASKS" not in told:  # which a batch script outside of srun lacks, too
        return {}
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", told["SLURM_STEP_NODELIST"])
    assert first is not None
    return {
        "RANK": told["SLURM_PROCID"],
        "WORLD_SIZE": told["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": told["SLURM_LOCALID"],
        "MASTER_ADDR": "".join(part or "" for part in first.groups()),
        "MASTER_PORT": str(20000 + int(told["SLURM_JOB_ID"]) % 20000),
    }
