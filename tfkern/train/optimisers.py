"""Optimisers for the parameters of a model.

Weights decay and biases do not: parameters of two or more dimensions, tables of embeddings among
them, are in a group with the weight decay, and all others, such as the weights of norms, in a group
without (as in nanoGPT). Tied weights are in it once, and parameters that need no gradient not at
all. Groups keep the names of their parameters as `param_names`, also in the state.

    steps = adamw(model, 3e-4)
    steps = optimiser("muon", model, 3e-4, weight_decay=0.05)  # as a recipe names it
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tfkern.files import shown
from tfkern.train.kinds import check_number, make
from tfkern.train.lion import Lion

Rate = float | Tensor
Named = tuple[str, nn.Parameter]


def adamw(
    model: nn.Module,
    lr: Rate,
    *,
    weight_decay: float = 0.1,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    layer_decay: float = 1.0,
) -> Optimizer:
    """AdamW (Loshchilov, Hutter 2019): torch's, with its fused kernel where there is one.

    Args:
        lr: learning rate: a number, or a tensor of one element, which a CUDA graph can capture.
        weight_decay: share of a weight that is lost in a step, divided by lr.
        betas: how much of the running averages of gradients and their squares a step keeps.
        eps: added to the root of the averaged squares.
        layer_decay: factor of the learning rate from each block to the one before it, for
            fine-tuning (Clark et al. 2020). The last block has it once, what stands in front of the
            first one, such as embeddings, once more than the first one, and what stands behind the
            last one not at all.

    Raises:
        ValueError: a value out of its range, a model without parameters to train, or a layer_decay
            other than 1 with a tensor as learning rate or a model without an `nn.ModuleList`.
    """
    _check(lr, weight_decay, betas, eps)
    check_number("layer_decay", layer_decay, 0, 1)
    named = _trained(model)
    if layer_decay == 1:
        return _adamw(_groups(named, weight_decay), lr, weight_decay, betas, eps)
    if isinstance(lr, Tensor):
        raise ValueError("layer_decay makes several learning rates, which one tensor cannot be")
    top, depths = _depths(model)
    groups = []
    for depth in sorted({depths[name] for name, _ in named}):
        own = [(name, p) for name, p in named if depths[name] == depth]
        rate = {"lr": lr * layer_decay ** (top - depth)}
        groups += [group | rate for group in _groups(own, weight_decay)]
    return _adamw(groups, lr, weight_decay, betas, eps)


def lion(
    model: nn.Module,
    lr: Rate,
    *,
    weight_decay: float = 1.0,
    betas: Sequence[float] = (0.9, 0.99),
) -> Optimizer:
    """Lion (Chen et al. 2023), see `tfkern.train.lion.Lion`.

    Args:
        lr: learning rate, a number or a tensor of one element; a tenth to a third of AdamW's.
        weight_decay: share of a weight that is lost in a step, divided by lr; so 3 to 10 times that
            of AdamW makes the same strength with the smaller lr.
        betas: how much of the running average makes the step, and how much of it a step keeps.

    Raises:
        ValueError: a value out of its range, or a model without parameters to train.
    """
    _check(lr, weight_decay, betas)
    return Lion(_groups(_trained(model), weight_decay), lr, (betas[0], betas[1]))


def adafactor(
    model: nn.Module,
    lr: Rate,
    *,
    weight_decay: float = 0.0,
    beta2_decay: float = -0.8,
    d: float = 1.0,
) -> Optimizer:
    """Adafactor (Shazeer, Stern 2018): torch's. For a matrix it keeps one row and one column.

    Args:
        lr: learning rate relative to the root mean square of a parameter, a number or a tensor of
            one element. A step t takes no more than 1 / sqrt(t).
        weight_decay: share of a weight that is lost in a step, divided by lr.
        beta2_decay: c of the decay 1 - t^c of the averaged squares, at most 0.
        d: root mean square above which an update is scaled down to it, at least 1.

    Raises:
        ValueError: a value out of its range, a model without parameters to train, or one whose
            parameters are spread over devices, of which torch's Adafactor cannot take the norms.
    """
    _check(lr, weight_decay)
    check_number("beta2_decay", beta2_decay, -math.inf, 0)
    check_number("d", d, 1, math.inf)
    named = _trained(model)
    if any(hasattr(p, "placements") for _, p in named):
        raise ValueError("adafactor takes no parameters that are DTensors, such as those of FSDP")
    return torch.optim.Adafactor(_groups(named, weight_decay), lr, beta2_decay, d=d)


def muon(
    model: nn.Module,
    lr: Rate,
    *,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> Optimizer:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, and AdamW for all else.

    Muon is torch's, with Nesterov momentum. The blocks are what lies in an `nn.ModuleList`, as in
    `tfkern.models.Transformer` and the models of transformers; tables of embeddings in them are
    left to AdamW, as are the embedding and the head outside of them. Muon's updates are scaled to
    the size of those of AdamW (Liu et al. 2025), so that both have one learning rate and decay.

    Args:
        lr: learning rate, as for AdamW: a number or a tensor of one element.
        weight_decay: share of a weight that is lost in a step, divided by lr.
        momentum: how much of its running average of gradients a step of Muon keeps.
        betas, eps: for AdamW, see `adamw`.

    Raises:
        ValueError: a value out of its range, or a model without matrices in blocks.
    """
    _check(lr, weight_decay, betas, eps)
    check_number("momentum", momentum, 0, 1)
    named = _trained(model)
    hidden = _hidden(model)
    matrices = [(name, p) for name, p in named if p in hidden]
    if not matrices:
        raise ValueError("muon needs a model with matrices to train in an nn.ModuleList")
    groups = _groups(matrices, weight_decay)
    rate: Any = lr  # the annotation of torch knows no tensors, which its Muon takes
    first = torch.optim.Muon(groups, rate, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    others = [(name, p) for name, p in named if p not in hidden]
    if not others:
        return first
    rest = _adamw(_groups(others, weight_decay), lr, weight_decay, betas, eps)
    return Joined(first, rest)


OPTIMISERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
}


def optimiser(kind: str, model: nn.Module, lr: Rate, **options: Any) -> Optimizer:
    """The optimiser of a kind: "adamw", "lion", "adafactor" or "muon".

    Args:
        lr: learning rate, a number or a tensor of one element.
        options: the keyword arguments of the function of that name.

    Raises:
        ValueError: an unknown kind or option, or what that function refuses.
    """
    return make("optimiser", OPTIMISERS, kind, model, lr, **options)


class Joined(Optimizer):
    """Several optimisers of different parameters that step as one.

    Its groups are those of its parts, in their order, and its state is shared by all parts. So it
    is saved, loaded, scheduled and scaled as any other optimiser of torch.
    """

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps all parts. Returns what the closure returns, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor: a new group would belong to no part."""
        if hasattr(self, "parts"):
            raise NotImplementedError("a joined optimiser takes no more groups of parameters")
        super().add_param_group(param_group)

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what `load_state_dict` ends with, with groups and a state that are new objects."""
        super().__setstate__(state)
        self._share()


def _adamw(
    groups: list[dict[str, Any]],
    lr: Rate,
    weight_decay: float,
    betas: Sequence[float],
    eps: float,
) -> Optimizer:
    # The fused kernel takes parameters for dense, and those of one call either for DTensors of one
    # mesh or for none. Where it does not fit, torch loops over the parameters or their lists.
    parameters = [p for group in groups for _, p in group["params"]]
    fused = all(p.is_contiguous() and p.device.type in ("cpu", "cuda") for p in parameters)
    fused = fused and len({getattr(p, "device_mesh", None) for p in parameters}) == 1
    made = torch.optim.AdamW(
        groups, lr, (float(betas[0]), float(betas[1])), eps, weight_decay,
        fused=fused or None,
    )  # fmt: skip
    if fused:
        made.register_step_pre_hook(_lay_out_gradients)
    return made


@torch.no_grad()
def _lay_out_gradients(optimiser: Optimizer, args: Any, kwargs: Any) -> None:
    """Gives gradients the strides of their parameters.

    Backward does so itself, but gradients may also be assigned. On a CPU the fused kernel reads
    them in the order of memory, whatever their strides are, and CUDA's refuses other strides.
    """
    for group in optimiser.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)


def _trained(model: nn.Module) -> list[Named]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no parameters that need a gradient")
    return named


def _hidden(model: nn.Module) -> set[Tensor]:
    """The matrices of blocks, without tables of embeddings and matrices of one row or column."""
    modules = list(model.modules())
    inside = {p for m in modules if isinstance(m, nn.ModuleList) for p in m.parameters()}
    tables = {p for m in modules if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {p for p in inside - tables if p.dim() == 2 and min(p.shape) > 1}


def _depths(model: nn.Module) -> tuple[int, dict[str, int]]:
    """The depth of each parameter, and the greatest there is.

    Blocks have depths from 1 on, in the order in which the model has them. Tables of embeddings
    and what the model has before its first block have 0, and what it has after its last block, such
    as a head, has the greatest. What stands between two stacks has the depth of the block before.

    Raises:
        ValueError: the model has no blocks.
    """
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [a for a in lists if not any(a.startswith(f"{b}.") for b in lists if a != b)]
    prefixes = [f"{name}.{i}.".lstrip(".") for name in outer for i in range(lists[name])]
    if not prefixes:
        raise ValueError("layer_decay needs a model with an nn.ModuleList of blocks")
    ends = dict(zip(outer, itertools.accumulate(lists[name] for name in outer), strict=True))
    found: dict[str, int] = {}
    before = 0  # how many blocks stand before a module, those of other stages included
    for name, module in model.named_modules():
        before = ends.get(name, before)
        for own, _ in module.named_parameters(name, recurse=False):
            block = next((i for i, x in enumerate(prefixes, 1) if own.startswith(x)), None)
            behind = before + (before == len(prefixes))
            found[own] = 0 if isinstance(module, nn.Embedding) else block or behind
    return len(prefixes) + 1, found


def _groups(named: Sequence[Named], weight_decay: float) -> list[dict[str, Any]]:
    decayed = [(name, p) for name, p in named if p.dim() >= 2]
    others = [(name, p) for name, p in named if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _check(lr: Any, weight_decay: Any, betas: Any = (0, 0), eps: Any = 0) -> None:
    if not isinstance(lr, Tensor):
        check_number("lr", lr, 0, math.inf)
    elif lr.numel() != 1:
        raise ValueError(f"lr must have one element, got the shape {tuple(lr.shape)}")
    check_number("weight_decay", weight_decay, 0, math.inf)
    pair = isinstance(betas, list | tuple) and len(betas) == 2
    if not pair or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {shown(betas)}")
    check_number("eps", eps, 0, math.inf)
