"""Whether a kernel may stand in for calls of a module.

A fused kernel reads the parameters of layers that it does not call, so everything that hangs on
their calls would be lost: hooks, and with them pruning and norms of weights; adapters, quantised
and parametrised layers, which are of other types. Such layers are called instead.
"""

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tfkern.nn.linear import Linear

LINEAR = (nn.Linear, Linear, NonDynamicallyQuantizableLinear)  # the last is torch's out_proj


def fusible(
    module: nn.Module, kinds: tuple[type[nn.Module], ...] = LINEAR, forward: object = None
) -> bool:
    """Whether the module is exactly of one of these types, with weight and bias where they belong,
    and unadorned. It costs a microsecond, and is to be asked at every call."""
    own = module._parameters
    if type(module) not in kinds or own.keys() != {"weight", "bias"}:
        return False
    return unadorned(module, forward) and not (_strange(own["weight"]) or _strange(own["bias"]))


def unadorned(module: nn.Module, forward: object = None) -> bool:
    """Whether a call of the module is its type's `forward`, or `forward` if the instance has one,
    and nothing besides."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module.__dict__.get("forward") is not forward
        or _has_any_global_hook()
    )


def _strange(p: Tensor | None) -> bool:
    """Whether p brings operators of its own, as the weights of quantised layers do."""
    return p is not None and type(p) is not nn.Parameter and is_traceable_wrapper_subclass(p)
