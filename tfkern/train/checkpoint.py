"""Checkpoints: all that a run of training needs to go on, in safetensors.

A folder of checkpoints has one folder for each, "step-00002000", with the tensors of model and
optimiser as `torch.distributed.checkpoint` writes them, and `training.json`. A new one is written
beside the others and appears by one rename, so that whatever ends a process leaves whole ones.

Of a model on many processes each writes and reads its part, in a folder that all of them see.
Tensors have the names and the shapes of the whole model, so that a checkpoint can be read by other
numbers of processes, and with other kinds of parallelism.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tfkern import files
from tfkern.train.parallel.model import Parallel
from tfkern.train.parallel.together import each, first, gathered

_NAME = re.compile(r"step-\d{8,}")
_TOLD = "training.json"


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    configuration: Mapping[str, Any] | None = None,
    keep: int | None = 3,
) -> Path:
    """Writes a checkpoint, and then removes all but the last ones.

    Args:
        folder: of the checkpoints; it is made if there is none.
        step: how many steps are done: `Record.step`.
        scaler: of float16.
        configuration: what the run is, as JSON has it. `load` refuses another one.
        keep: how many checkpoints stay; all if None.

    Returns:
        the folder of this checkpoint. If it was there already, nothing is written: the steps of a
        run do not depend on how often it was stopped.

    Raises:
        ValueError: keep is not positive, the optimiser's state is not made of tensors, or the
            folder has a checkpoint of a later step, which this run should have loaded.
        OSError: files cannot be written. Earlier checkpoints stay.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be positive, got {keep}")
    folder = Path(folder)
    path = folder / f"step-{step:08}"
    told = {
        "step": step,
        "configuration": configuration,
        "optimiser": _kind(optimiser),
        "torch": torch.__version__,
    }
    many = _many(model)
    with ExitStack() as held:
        tensors = each(lambda: _tensors(model, optimiser, scaler), many)
        new = first(lambda: _begin(folder, step, held), many)
        fresh = new / path.name
        if not first(path.exists, many):
            _write(tensors, fresh, many)
            first(lambda: _finish(fresh, path, told), many)
        if keep is not None:
            first(lambda: _remove_first(folder, keep, new), many)
    return path


def _begin(folder: Path, step: int, held: ExitStack) -> Path:
    """A folder for new files, which is there until `held` ends."""
    folder.mkdir(parents=True, exist_ok=True)
    new = held.enter_context(files.beside(folder))
    last = latest(folder)
    if last is not None and _step(last) > step:
        raise ValueError(
            f"{folder} has {last.name} already, which is later than step {step}: load it, or "
            "choose another folder"
        )
    return new.folder


def _finish(fresh: Path, path: Path, told: Mapping[str, Any]) -> None:
    files.write(fresh / _TOLD, json.dumps(told, indent=2) + "\n")
    files.place(fresh, path)


def _remove_first(folder: Path, keep: int, new: Path) -> None:
    for old in _found(folder)[:-keep]:
        os.rename(old, new / old.name)  # gone at once, also if this ends here


def load(
    folder: str | Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    configuration: Mapping[str, Any] | None = None,
) -> int:
    """Reads the last checkpoint of a folder into model, optimiser and scaler.

    Returns:
        how many steps are done: the `start` of `steps`. 0 if there is no checkpoint.

    Raises:
        ValueError: the checkpoint is of another configuration, model or optimiser, or damaged. It
            names what differs, and nothing has been read into the model.
    """
    many = _many(model)
    path = first(lambda: latest(folder), many)
    if path is None:
        return 0
    each(lambda: _check_run(path, optimiser, configuration), many)
    trained = {id(p) for group in optimiser.param_groups for p in group["params"]}
    parameters = {name: p for name, p in _parameters(model).items() if id(p) in trained}
    room = each(lambda: _room(path, _model(model), parameters, scaler), many)
    each_has = gathered(room.ours, model.stages if isinstance(model, Parallel) else None)
    ours = {name: form for ours in each_has for name, form in ours.items()}
    if differing := _differing(room.theirs, ours):
        raise ValueError(f"{path} has other tensors: {'; '.join(differing[:_SHOWN])}")
    each(lambda: _read(path, room.tensors), many)
    _put(room.tensors, model, optimiser, scaler)
    return _step(path)


def _check_run(
    path: Path, optimiser: torch.optim.Optimizer, configuration: Mapping[str, Any] | None
) -> None:
    """Raises ValueError if a checkpoint is of another run."""
    told = files.read_object(path / _TOLD)
    if told.get("step") != _step(path):
        raise ValueError(f"{path / _TOLD}: step is {files.shown(told.get('step'))}")
    theirs = {"configuration": told.get("configuration"), "optimiser": told.get("optimiser")}
    ours = {"configuration": configuration, "optimiser": _kind(optimiser)}
    if differing := _differing(theirs, json.loads(json.dumps(ours))):
        raise ValueError(f"{path} is of another run: {'; '.join(differing[:_SHOWN])}")


def latest(folder: str | Path) -> Path | None:
    """The last checkpoint of a folder, None if there is none."""
    found = _found(Path(folder))
    return found[-1] if found else None


def _many(model: nn.Module) -> bool:
    """Whether a model is on many processes."""
    return isinstance(model, Parallel) and model.mesh is not None and model.mesh.size() > 1


_SHOWN = 4


def _found(folder: Path) -> list[Path]:
    """The checkpoints of a folder by their steps."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    """How many steps were done at a checkpoint."""
    return int(path.name.removeprefix("step-"))


def _kind(optimiser: torch.optim.Optimizer) -> str:
    parts = getattr(optimiser, "parts", (optimiser,))
    return " and ".join(type(part).__name__ for part in parts)


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel | Parallel) else model


def _plain(name: str) -> str:
    """The name of a tensor without the marks that torch.compile leaves on modules."""
    return name.replace("_orig_mod.", "")


def _model(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name: the very tensors."""
    found = _inner(model).state_dict()
    return {f"model.{_plain(name)}": x for name, x in found.items() if isinstance(x, Tensor)}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_plain(name): p for name, p in _inner(model).named_parameters()}


def _scaler(scaler: torch.amp.GradScaler | None) -> dict[str, Tensor]:
    state = {} if scaler is None else scaler.state_dict()
    names = state.keys() & {"scale", "_growth_tracker"}
    return {f"scaler.{name}": torch.tensor(state[name]) for name in names}


def _tensors(
    model: nn.Module, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> dict[str, Tensor]:
    """All tensors of a run by name. The hyper-parameters of the optimiser are the caller's, and a
    parameter that had no gradient yet has no state."""
    found = _model(model) | _scaler(scaler)
    for name, p in _parameters(model).items():
        for key, x in optimiser.state.get(p, {}).items():
            if not isinstance(x, Tensor):
                raise ValueError(f"{key} of {name} in the optimiser is no tensor, but {x!r}")
            found[f"optimiser.{name}.{key}"] = x
    return found


def _put(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    with torch.no_grad():
        for name, x in _model(model).items():
            x.copy_(tensors[name])
    groups = optimiser.state_dict()["param_groups"]
    numbers = {
        p: number
        for group, told in zip(optimiser.param_groups, groups, strict=True)
        for p, number in zip(group["params"], told["params"], strict=True)
    }
    state: dict[int, dict[str, Tensor]] = {}
    for name, p in _parameters(model).items():
        prefix = f"optimiser.{name}."
        found = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        if found:
            state[numbers[p]] = found
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    if scaler is not None:
        told = {name.removeprefix("scaler."): tensors[name].item() for name in _scaler(scaler)}
        scaler.load_state_dict(scaler.state_dict() | told)


def _write(tensors: dict[str, Tensor], folder: Path, many: bool) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=many)
    with _own_errors():
        dcp.save(tensors, storage_writer=writer, no_dist=not many)


class _Room(NamedTuple):
    """Tensors for what a process needs of a checkpoint.

    Attributes:
        tensors: distributed as those here are.
        ours: the shapes and dtypes that they have.
        theirs: those of all tensors of the checkpoint.
    """

    tensors: dict[str, Tensor]
    ours: dict[str, str]
    theirs: dict[str, str]


def _room(
    path: Path,
    model: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    scaler: torch.amp.GradScaler | None,
) -> _Room:
    """Room for the tensors of a checkpoint that are here.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    try:
        with _own_errors():
            reader = HuggingFaceStorageReader(str(path))
            told: dict[str, Any] = reader.read_metadata().state_dict_metadata
            theirs = {name: _form(x.size, x.properties.dtype) for name, x in told.items()}
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(f"{path} cannot be read: {files.one_line(error)}") from None
    tensors = {name: x.clone() for name, x in (*model.items(), *_scaler(scaler).items())}
    ours = {name: _form(x.shape, x.dtype) for name, x in tensors.items()}
    for name, x in told.items():
        p = parameters.get(name.removeprefix("optimiser.").rpartition(".")[0])
        if name.startswith("optimiser.") and p is not None:
            tensors[name] = _like(p, x.size, x.properties.dtype)
            ours[name] = theirs[name]
    return _Room(tensors, ours, theirs)


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Reads tensors of a checkpoint.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    try:
        with _own_errors():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {files.one_line(error)}") from None


def _like(p: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor for a state of a parameter, distributed as this one if it is as large."""
    if isinstance(p, DTensor) and p.shape == size:
        return torch.empty_like(p, dtype=dtype)
    return torch.empty(size, dtype=dtype)


def _form(size: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(size)}"


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raises what torch wraps into an error of its own, which no `except Exception` catches.

    Its warning that there are no other processes is left out.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def _differing(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """What two nested dicts do not share, as sentences."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted(theirs.keys() | ours.keys())
        prefix = f"{name}." if name else ""
        return [
            told
            for key in names
            for told in _differing(theirs.get(key), ours.get(key), f"{prefix}{key}")
        ]
    if theirs == ours:
        return []
    return [f"{name} is {files.shown(theirs)} there, {files.shown(ours)} here"]
