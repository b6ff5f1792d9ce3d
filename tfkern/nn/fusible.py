"""Whether a fused kernel may replace calls of a module.

A fused kernel reads the parameters of layers without calling them. This would lose what acts in a
call: hooks (which also do pruning and old-style weight norm), and whatever other types of layers
do, such as adapters, quantised and parametrised layers. Such layers are called instead.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tfkern.nn.linear import Linear, WideLinear
from tfkern.nn.lora import LoRALinear

LINEAR = (
    nn.Linear,
    Linear,
    WideLinear,
    NonDynamicallyQuantizableLinear,  # the type of out_proj in torch's attention
)


def fusible(
    module: nn.Module, kinds: tuple[type[nn.Module], ...] = LINEAR, forward: object = None
) -> bool:
    """Whether the module is exactly of one of these types, has weight and bias as parameters, and
    is unadorned. All of it may change, so ask at every call: it takes a microsecond."""
    own = module._parameters
    if type(module) not in kinds or own.keys() != {"weight", "bias"}:
        return False
    return unadorned(module, forward) and not (
        has_own_operators(own["weight"]) or has_own_operators(own["bias"])
    )


def acting(layer: nn.Module) -> Any:
    """The layer whose call is all that a call of this one does: the layer itself, or one that has
    an adapter which is merged or switched off, and so may be fused."""
    return layer.acting if type(layer) is LoRALinear and unadorned(layer) else layer


def unadorned(module: nn.Module, forward: object = None) -> bool:
    """Whether a call of the module runs one function and no hooks: its type's forward, or if the
    instance has a forward of its own, the one given as `forward`."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module.__dict__.get("forward") is not forward
        or _has_any_global_hook()
    )


def has_own_operators(p: Tensor | None) -> bool:
    """Whether p is of a type with operators of its own, as the weights of quantised layers are."""
    return p is not None and type(p) is not nn.Parameter and is_traceable_wrapper_subclass(p)
