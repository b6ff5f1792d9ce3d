"""The files of a model: config.json and safetensors, in one file or in several with an index.

Those of one save belong together. They carry its name, so that a mixture is noticed, and what holds
the weights (or the index of them) also holds config.json, so that one rename replaces the model.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tfkern import files

State = dict[str, Tensor]
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # what weights may be

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_SHARD = re.compile(r"model(-[0-9a-f]{16})?-\d{5}-of-\d{5}\.safetensors")
# In the metadata: the name of the save, its config.json, and a digest of the one that it replaced.
SAVE, _CONTENT, _REPLACED = "tfkern_save", "tfkern_config", "tfkern_replaced"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


def write(
    directory: Path,
    description: dict[str, Any],
    state: State,
    shard_bytes: int,
    along: Mapping[str, Path | None],
) -> None:
    """Replaces the model of a directory, which is made if need be.

    Args:
        along: names of files that change with the model: copies of other files, or None for those
            that the directory shall not have.

    Raises:
        OSError: it cannot be written; the directory has the model that it had.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with files.beside(directory) as new:
        save = secrets.token_hex(8)
        content = json.dumps({**description, SAVE: save}, indent=2) + "\n"
        (new.folder / _CONFIG).write_text(content)
        name = {"format": "pt", SAVE: save}
        about: dict[str, Any] = name | {_CONTENT: content, _REPLACED: _digest(_config(directory))}
        shards = list(_shards(state, shard_bytes))
        if len(shards) == 1:
            names = [_WEIGHTS]
            write_file(shards[0], new.folder / _WEIGHTS, about)
        else:
            stem = f"model-{save}" if any(_old_shards(directory)) else "model"
            names = [
                f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
            ]
            for file, shard in zip(names, shards, strict=True):
                write_file(shard, new.folder / file, name)
            where = {k: file for file, shard in zip(names, shards, strict=True) for k in shard}
            about["total_size"] = sum(x.nbytes for x in state.values())
            text = json.dumps({"metadata": about, "weight_map": where}, indent=2) + "\n"
            (new.folder / _INDEX).write_text(text)
            names.append(_INDEX)
        copies = {name: path for name, path in along.items() if path is not None}
        for file, path in copies.items():
            shutil.copyfile(path, new.folder / file)
        new.settle()
        new.place(*names)  # the last one replaces the model
        if _WEIGHTS not in names:
            new.remove(_WEIGHTS)  # or this does, as it is read rather than an index
        new.remove(*along.keys() - copies.keys())
        new.place(_CONFIG, *copies)
        new.remove(*{*_old_shards(directory), _INDEX} - {*names})


@dataclass(frozen=True)
class Stored:
    """A model on disk, of which only the headers have been read.

    Attributes:
        description: what config.json says. In a model that another program saved, a field of
            generation_config.json that names a token replaces the field of the same name.
        like: the weights, without values (on the device "meta").
    """

    description: dict[str, Any]
    like: State
    _opened: dict[str, Any]

    def read(self) -> State:
        """The weights. Files that were replaced since are read as they were."""
        return {name: self._opened[name].get_tensor(name) for name in self.like}


def read(directory: Path) -> Stored:
    """The model of a directory.

    Raises:
        ValueError: there is none, its files belong to several saves, or they cannot be read.
    """
    paths = (directory / name for name in (_CONFIG, _WEIGHTS, _INDEX, _GENERATION))
    return files.steadily(lambda: _read(directory), *paths)


def _read(directory: Path) -> Stored:
    config, index = directory / _CONFIG, directory / _INDEX
    if not _there(config):
        raise ValueError(f"{directory} has no {_CONFIG}")
    content = files.read(config)
    description = files.parse(content, config)
    about: dict[str, Any] = {}
    where = None
    if _there(directory / _WEIGHTS):
        names = [_WEIGHTS]
    elif _there(index):
        about, where = _read_index(index)
        names = sorted(set(where.values()))
    else:
        raise ValueError(f"{directory} has neither {_WEIGHTS} nor {_INDEX}")
    like: State = {}
    opened: dict[str, Any] = {}
    saves = set() if where is None else {about.get(SAVE)}
    for name in names:
        file = _open(directory / name)
        metadata = file.metadata() or {}
        saves.add(metadata.get(SAVE))
        about = about or metadata
        found = _shapes(directory / name, file)
        if twice := found.keys() & like.keys():
            raise ValueError(f"{directory}: {files.shown(min(twice))} is in several files")
        like |= found
        opened |= dict.fromkeys(found, file)
    for name, place in (where or {}).items():
        if name not in like:
            raise ValueError(
                f"{directory / place} lacks {files.shown(name)}, which the index names"
            )
    if len(saves) > 1:
        raise ValueError(f"{directory} holds files of different saves, which do not fit together")
    (save,) = saves
    if save is not None and description.get(SAVE) != save:
        if about.get(_REPLACED) != _digest(content):
            raise ValueError(f"{config} is of another save than the weights")
        description = files.parse(str(about.get(_CONTENT)), f"{_CONFIG} within the weights")
    description.pop(SAVE, None)
    if save is None:  # our own saves have all tokens in config.json
        description |= _written_tokens(directory / _GENERATION)
    return Stored(description, like, opened)


def _written_tokens(path: Path) -> dict[str, Any]:
    """The tokens with which a text begins and ends, if generation_config.json tells them.

    The token for padding is not among them: that of config.json says which row is not trained.
    Tokens that a text is forced to have are those of this file alone, as in transformers.
    """
    if not _there(path):
        return {}
    told = files.read_object(path)
    forced = dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"))
    ids = {name: value for name, value in told.items() if name.endswith("_token_id")}
    return forced | {n: v for n, v in ids.items() if v is not None and n != "pad_token_id"}


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    wrong = f"{path} is no JSON with a weight_map of names to files"
    content = files.read(path)
    try:
        index = files.parse(content, path)
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}") from None
    about, where = index.get("metadata") or {}, index.get("weight_map")
    if not isinstance(about, dict) or not isinstance(where, dict) or not where:
        raise ValueError(wrong)
    for name in where.values():
        if not isinstance(name, str):
            raise ValueError(f"{wrong}: it has {files.shown(name)} in place of a file")
        if Path(name).name != name or len(name) > 255 or not name.isprintable():
            raise ValueError(
                f"{path} names {files.shown(name)}, which is not a file of that directory"
            )
    return about, where


def read_file(path: Path) -> State:
    """The tensors in a file.

    Raises:
        ValueError: the file cannot be read.
    """
    file = _open(path)
    return {name: file.get_tensor(name) for name in _shapes(path, file)}


def _open(path: Path) -> Any:
    try:
        return safe_open(files.regular(path), framework="pt")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: {files.one_line(error)}") from None


def _shapes(path: Path, file: Any) -> State:
    found: State = {}
    for name in file.keys():  # noqa: SIM118, it is no dict
        x = file.get_slice(name)
        shape, kind = x.get_shape(), x.get_dtype()
        if kind not in _DTYPES:
            raise ValueError(f"{path}: {files.shown(name)} has the unknown type {kind}")
        if 0 in shape:
            raise ValueError(f"{path}: {files.shown(name)} has no values, its shape is {shape}")
        found[name] = torch.empty(shape, dtype=_DTYPES[kind], device="meta")
    return found


def write_file(shard: State, path: Path, metadata: dict[str, Any]) -> None:
    """Writes tensors into a file.

    Raises:
        OSError: the file cannot be written.
    """
    contiguous = {k: x.detach().contiguous().cpu() for k, x in shard.items()}
    try:
        save_file(contiguous, path, metadata)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise OSError(f"{path.name}: {files.one_line(error)}") from None


def _shards(state: State, limit: int) -> Iterator[State]:
    shard: State = {}
    size = 0
    for name, x in state.items():
        if shard and size + x.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = x
        size += x.nbytes
    yield shard


def _old_shards(directory: Path) -> Iterator[str]:
    return (file.name for file in directory.iterdir() if _SHARD.fullmatch(file.name))


def _config(directory: Path) -> bytes:
    try:
        return files.read(directory / _CONFIG)
    except ValueError:
        return b""  # no save can have been made of it


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass  # reading it tells why it cannot be read
    return True
