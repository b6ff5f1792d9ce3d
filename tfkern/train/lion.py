"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms")."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Steps of the sign of a running average m of the gradients g.

        p = p - lr weight_decay p
        p = p - lr sign(beta1 m + (1 - beta1) g)
        m = beta2 m + (1 - beta2) g

    It keeps one tensor per parameter, half of what AdamW keeps. As each entry moves by lr, the
    authors take a 3 to 10 times smaller lr and a 3 to 10 times larger weight decay than with AdamW.

    The sign of NaN is 0: gradients that are not finite do not show in the parameters, but they stay
    in m, so a loop has to stop at them or leave the step out, as `torch.amp.GradScaler` does.

    Args:
        params: parameters, groups, or pairs of a name and a parameter, as torch's optimisers take.
        lr: a number, or a tensor of one element, whose value is then read on its own device.
        betas: beta1 and beta2.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Changes all parameters that have a gradient.

        Args:
            closure: function that computes the gradients, and returns the loss.

        Returns:
            What the closure returns.

        Raises:
            ValueError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        for _, params in groups:
            for p in params:
                if p.grad.is_sparse:
                    raise ValueError(f"Lion takes no sparse gradients: shape {tuple(p.shape)}")
        for group, params in groups:
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        grads = [_local(p.grad, p) for p in params]
        averages = [_local(self.state[p]["exp_avg"], p) for p in params]
        params = [_local(p, p) for p in params]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        updates = torch._foreach_lerp(averages, grads, 1 - beta1)
        torch._foreach_sign_(updates)
        if isinstance(lr, Tensor):  # as alpha, it would have to be copied from its device
            torch._foreach_mul_(updates, -lr)
            torch._foreach_add_(params, updates)
        else:
            torch._foreach_add_(params, updates, alpha=-lr)
        torch._foreach_lerp_(averages, grads, 1 - beta2)


def _local(x: Any, p: Any) -> Any:
    """x, or this process's part of it if the parameter p is a DTensor.

    Every entry moves by itself, so the parts need no other process. The operations on lists refuse
    DTensors beside other tensors, which a model has if only some of its layers are split.
    """
    if not hasattr(p, "to_local"):
        return x
    return x.redistribute(placements=p.placements).to_local()
