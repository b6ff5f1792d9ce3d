"""Parameters that training leaves as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from tfkern.files import shown


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
