"""Gives modules of a model forwards that compute with tfkern."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from tfkern.integrations.hf import layers, norms, wholes
from tfkern.integrations.hf.attention import NAMES
from tfkern.integrations.hf.plain import is_ours


class Patch:
    """What `patch` did to a model.

    Attributes:
        names: names of the modules that now run on tfkern.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._done: list[tuple[nn.Module, str]] = []

    def undo(self) -> None:
        """Gives every patched module its own forward back."""
        for module, method in self._done:
            # We leave alone what another library has put around our forward.
            if is_ours(vars(module).get(method)):
                delattr(module, method)
        self.names, self._done = [], []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def _replace(self, module: Any, method: str, function: Callable[..., Any]) -> None:
        """Makes a call of the method run `function(module, ...)`. A deep copy or a pickled module
        also copies what a partial binds; with a closure it would use the original's weights."""
        setattr(module, method, partial(function, module))
        self._done.append((module, method))

    def _module(self, module: nn.Module) -> bool:
        """Whether there was anything to change in the module."""
        if norms.known(module) is not None:
            self._replace(module, "forward", norms.forward)
            return True
        methods = [m for m in wholes.methods(module) if m not in vars(module)]
        for method in methods:
            self._replace(module, method, wholes.FORWARDS[method])
        if "forward" not in methods and layers.rewritten(module) is not None:
            self._replace(module, "forward", layers.forward)
            return True
        return bool(methods)


def patch(model: nn.Module) -> Patch:
    """Makes the norms, MLPs and rotary positions of a model compute with tfkern's kernels.
    Parameters stay where they are.

    Modules are recognised by what they compute, whatever their attributes are called; all others
    stay as they are.

    - Norms: layer norm and RMS norm over the last axis with the factor weight, 1 + weight or none.
      The forward of the class is tried on random inputs.
    - MLPs of two linear layers with an activation that `tfkern.mlp` has between them, and gated
      ones, also where one layer gives gate and up. The forward of the class is recorded.
    - Layers whose own code adds a residual and normalises the sum, or calls the layers of an MLP
      one by one: that code runs with these statements exchanged.
    - Rotary positions, if `apply_rotary_pos_emb` of the attention's file gives what
      `tfkern.rotary` does: Llama, GPT-NeoX, GPT-J, GLM and most later decoders.

    A patched module looks at its children in every call. It runs its own code where one of them
    has hooks or another forward, or has been replaced by an adapter, a quantised or a parametrised
    layer, where dropout acts between the layers of an MLP, and where dtypes are mixed. On a CPU it
    also does so where an input is so small, or torch's own op so good, that tfkern's would take
    longer (`use_backend` lifts this). Other models of the same class are not changed. Copies and
    pickled models are patched like the original.

    If the model has asked for tfkern's attention but its attention modules compute their own, a
    warning tells so, once for each class.

        with hf.patch(model) as patched:
            print(patched.names)

    Args:
        model: changed in place.

    Returns:
        A `Patch` that takes it back by `undo()` or at the end of a with statement.
    """
    _warn_if_attention_is_not_asked(model)
    done = Patch()
    for name, module in model.named_modules():
        if "forward" not in vars(module) and done._module(module):
            done.names.append(name)
    return done


_WARNED: set[type] = set()


def _warn_if_attention_is_not_asked(model: nn.Module) -> None:
    kind = type(model)
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name not in NAMES or kind in _WARNED:
        return
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            return
    _WARNED.add(kind)
    warnings.warn(
        f"{kind.__name__} computes attention in its own code: "
        f"attn_implementation={name!r} changes nothing in it",
        stacklevel=3,
    )
