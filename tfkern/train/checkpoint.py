"""Checkpoints: all that a run of training needs to go on, in safetensors.

A folder of checkpoints has one folder for each, "step-00002000", with the tensors of model and
optimiser as `torch.distributed.checkpoint` writes them, and `training.json`. A new one is written
beside the others and appears by one rename, so that whatever ends a process leaves whole ones.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tfkern import files

_NAME = re.compile(r"step-(\d{8,})")
_TOLD = "training.json"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


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
        ValueError: keep is not positive.
        OSError: files cannot be written. Earlier checkpoints stay.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be positive, got {keep}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08}"
    told = {"step": step, "configuration": configuration, "torch": torch.__version__}
    with files.beside(folder) as new:
        if not path.exists():
            fresh = new.folder / path.name
            _write(_tensors(model, optimiser, scaler), fresh)
            files.write(fresh / _TOLD, json.dumps(told, indent=2) + "\n")
            new.place(path.name)
        if keep is not None:
            for old in _found(folder)[:-keep]:
                os.rename(old, new.folder / old.name)  # gone at once, also if this ends here
    return path


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
    found = _found(Path(folder))
    if not found:
        return 0
    path = found[-1]
    told = files.read_object(path / _TOLD)
    ours = json.loads(json.dumps(configuration))
    if differing := _differing(told.get("configuration"), ours):
        raise ValueError(f"{path} is of another run: {'; '.join(differing[:_SHOWN])}")
    tensors = _tensors(model, optimiser, scaler)
    tensors = {name: x.clone() for name, x in tensors.items()}
    _read(path, tensors)
    _put(tensors, model, optimiser, scaler)
    return int(told["step"])


def latest(folder: str | Path) -> Path | None:
    """The last checkpoint of a folder, None if there is none."""
    found = _found(Path(folder))
    return found[-1] if found else None


_SHOWN = 4


def _found(folder: Path) -> list[Path]:
    """The checkpoints of a folder by their steps."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [path for _, path in sorted((int(m[1]), path) for m, path in named if m)]


def _tensors(
    model: nn.Module, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> dict[str, Tensor]:
    """All tensors of a run by name. The hyper-parameters of the optimiser are the caller's."""
    parts: dict[str, dict[str, Any]] = {
        "model": get_model_state_dict(model),
        "optimiser": get_optimizer_state_dict(model, optimiser, options=_FLAT),
    }
    if scaler is not None:
        numbers = {name: scaler.state_dict()[name] for name in ("scale", "_growth_tracker")}
        parts["scaler"] = {name: torch.tensor(value) for name, value in numbers.items()}
    return {
        f"{part}.{name}": x
        for part, tensors in parts.items()
        for name, x in tensors.items()
        if isinstance(x, Tensor)
    }


def _put(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimiser": {}, "scaler": {}}
    for name, x in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = x
    set_model_state_dict(model, parts["model"])
    ours = get_optimizer_state_dict(model, optimiser, options=_FLAT)
    set_optimizer_state_dict(model, optimiser, ours | parts["optimiser"], options=_FLAT)
    if scaler is not None:
        numbers = {name: x.item() for name, x in parts["scaler"].items()}
        scaler.load_state_dict(scaler.state_dict() | numbers)


def _write(tensors: dict[str, Tensor], folder: Path) -> None:
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder)), no_dist=True)


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors from a checkpoint.

    Raises:
        ValueError: the checkpoint has other tensors, or cannot be read.
    """
    reader = HuggingFaceStorageReader(str(path))
    try:
        found: dict[str, Any] = reader.read_metadata().state_dict_metadata
        theirs = {name: tuple(x.size) for name, x in found.items()}
        ours = {name: tuple(x.shape) for name, x in tensors.items()}
        if differing := _differing(theirs, ours):
            raise ValueError(f"{path} has other tensors: {'; '.join(differing[:_SHOWN])}")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {files.one_line(error)}") from None


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
    return [
        f"{name or 'the configuration'} is {files.shown(theirs)} there, {files.shown(ours)} here"
    ]
