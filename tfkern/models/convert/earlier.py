"""Directories in tfkern's own names that earlier versions wrote, with other layers."""

import torch
from torch import Tensor

from tfkern.models.config import TransformerConfig
from tfkern.models.convert.store import State


def today(state: State, config: TransformerConfig) -> State:
    """The weights by the names of today.

    The rows of qkv and kv were those of all query heads, of all key heads, then of all value heads;
    those of gate_up the ones of gate, then of up.
    """
    heads, size = config.kv_heads or config.heads, config.head_size
    q, kv = config.heads * size, [heads * size] * 2
    names: State = {}
    for name, x in state.items():
        module, _, parameter = name.partition(".gate_up.")
        if parameter:
            gate, up = _split(name, x, [config.hidden_size] * 2)
            _add(names, {f"{module}.gate.{parameter}": gate, f"{module}.up.{parameter}": up})
            continue
        for joined, sizes in ((".qkv.", [q, *kv]), (".kv.", kv)):
            if joined in name:
                parts = _split(name, x, sizes)
                x = torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)
                name = name.replace(joined, f"{joined[:-1]}_by_head.")
        _add(names, {name: x})
    return names


def _add(names: State, more: State) -> None:
    for name in more.keys() & names.keys():
        raise ValueError(f"{name} is there twice: as it is named today, and within an earlier name")
    names |= more


def _split(name: str, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    if x.dim() == 0 or len(x) != sum(sizes):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {sum(sizes)} rows")
    return x.split(sizes)
