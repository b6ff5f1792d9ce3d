"""Ways to change what a call of a layer does. Each of ADORNMENTS takes its parent and its name."""

import torch
import torch.nn.functional as F
from torch.nn.utils import prune


class Adapter(torch.nn.Module):
    """A layer plus a product of low rank, as in LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        for name, shape in (("a", (2, base.in_features)), ("b", (base.out_features, 2))):
            setattr(self, name, torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)))

    def forward(self, x):
        return self.base(x) + x @ self.a.t() @ self.b.t()


class Quantised(torch.nn.Module):
    """A quantised layer: it has neither weight nor bias."""

    def __init__(self, base):
        super().__init__()
        self.register_buffer("levels", (base.weight.detach() * 16).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.levels.to(x.dtype) / 16)


class Doubled(torch.Tensor):
    """A weight with its own product: twice the product of the tensor that it wraps."""

    @staticmethod
    def __new__(cls, inner):
        size, layout = inner.shape, {"dtype": inner.dtype, "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, size, **layout)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Doubled(inner["inner"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return 2 * F.linear(args[0], args[1].inner, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Doubled(args[0].inner)
        raise AssertionError(f"{function} of a weight with its own product")


def doubled_weight(parent, name):
    layer = getattr(parent, name)
    weight = Doubled(layer.weight.detach())
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)


def plain_attribute(parent, name):
    layer = getattr(parent, name)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight.requires_grad_()


def own_forward(parent, name):
    layer = getattr(parent, name)
    forward = layer.forward
    layer.forward = lambda *args: 3 * forward(*args)


def hook(kind, function):
    return lambda parent, name: getattr(getattr(parent, name), f"register_{kind}")(function)


def replaced(kind):
    return lambda parent, name: setattr(parent, name, kind(getattr(parent, name)))


def on_child(function, *args, **options):
    return lambda parent, name: function(getattr(parent, name), *args, **options)


ADORNMENTS = {
    "forward hook": hook("forward_hook", lambda m, args, y: 2 * y),
    "forward pre-hook": hook("forward_pre_hook", lambda m, args: (args[0].cos(), *args[1:])),
    "backward hook": hook("full_backward_hook", lambda m, dx, dy: (2 * dx[0],)),
    "backward pre-hook": hook("full_backward_pre_hook", lambda m, dy: (2 * dy[0],)),
    "pruning": on_child(prune.l1_unstructured, "weight", amount=0.5),
    "pruned bias": on_child(prune.l1_unstructured, "bias", amount=0.5),
    "weight norm": on_child(torch.nn.utils.weight_norm),
    "spectral norm": on_child(torch.nn.utils.spectral_norm),
    "parametrisation": on_child(torch.nn.utils.parametrizations.orthogonal),
    "adapter": replaced(Adapter),
    "quantised": replaced(Quantised),
    "quantised weight": doubled_weight,
    "identity": replaced(lambda base: torch.nn.Sequential(base, torch.nn.Identity())),
    "own forward": own_forward,
    "plain attribute": plain_attribute,
}
