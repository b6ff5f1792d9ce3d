"""Parameters and models that training leaves as they are."""

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tfkern.files import shown
from tfkern.train.parallel.model import Parallel


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Lets parameters need no gradient, so that no optimiser of `tfkern.train` changes them.

        freeze(model, ["embedding.*", "encoder.blocks.0.*"])

    Args:
        names: of parameters, as `named_parameters` has them; * stands for any letters.

    Raises:
        ValueError: a name that no parameter has, or no parameter is left to train.
    """
    known = dict(model.named_parameters())
    for name in names:
        found = [known[other] for other in known if fnmatchcase(other, name)]
        if not found:
            some = ", ".join(list(known)[:3])
            raise ValueError(f"freeze: no parameter is named {shown(name)}; there are {some}, ...")
        for p in found:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in known.values()):
        raise ValueError(f"freeze: {shown(list(names))} leaves no parameter to train")


def frozen(model: nn.Module) -> Any:
    """A copy of a model as it is now, whose parameters need no gradient, in evaluation mode: the
    reference of a policy, for instance.

    Raises:
        ValueError: processes share the parameters, so that none can copy them.
    """
    inner = model.module if isinstance(model, Parallel) else model
    inner = getattr(inner, "_orig_mod", inner)  # of a compiled model
    shared = any(isinstance(m, FSDPModule) for m in inner.modules())
    if shared or any(isinstance(p, DTensor) for p in inner.parameters()):
        raise ValueError(
            "the model is shared by processes and cannot be copied: give a reference, or make the "
            "batches before parallelise"
        )
    return copy.deepcopy(inner).requires_grad_(False).eval()
