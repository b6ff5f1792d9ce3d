"""Directories in tfkern's own names that earlier versions wrote, which joined some layers."""

from tfkern.models.convert.store import State


def today(state: State) -> State:
    """The weights by the names of today.

    The rows of gate_up were those of gate, then those of up.
    """
    names: State = {}
    for name, x in state.items():
        module, joined, parameter = name.partition(".gate_up.")
        if joined:
            gate, up = x.chunk(2)
            names |= {f"{module}.gate.{parameter}": gate, f"{module}.up.{parameter}": up}
        else:
            names[name] = x
    return names
