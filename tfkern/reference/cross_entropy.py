"""The cross entropy of each row of logits in plain PyTorch: the definition of the op.

    s    = softcap tanh(z / softcap), or z if softcap is 0
    lse  = log sum_n exp(s_n)
    loss = (1 - e) w_t (lse - s_t) + (e / V) sum_n w_n (lse - s_n)        e = label_smoothing

    a    = (1 - e) w_t + (e / V) sum_n w_n
    ds_n = (a dloss + dlse) p_n - dloss ((1 - e) w_t [n = t] + (e / V) w_n)    p_n = exp(s_n - lse)
    dz_n = ds_n (1 - (s_n / softcap)^2)

z is a row of `logits` (..., V), t its target, w_n the weight of class n, 1 without weights. A row
whose target is ignore_index has loss = 0, and dloss there counts as 0. The loss of a row with any
other target outside of 0 to V - 1 is NaN, and so is its gradient.
"""

import torch
from torch import Tensor

from tfkern.reference import rounded


def forward(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    ignored_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss, and the log-sum-exp as the sum of two parts, lse and rest; each (...).

    In lse alone, rounding next to a large logit would lose the logarithm of the sum. Kernels leave
    the lse of rows whose target is ignore_index 0, unless `ignored_lse`.
    """
    s = _capped(logits, softcap)
    top = s.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)  # no logit is above -inf
    centred = s - top
    log_sum = centred.exp().sum(-1).log()
    lse = top.squeeze(-1) + log_sum
    own, _, ignored, t = _coefficients(
        logits, targets, weight, ignore_index, label_smoothing, logits.shape[-1]
    )
    loss = own * (log_sum - centred.gather(-1, t).squeeze(-1))
    if label_smoothing:
        terms = log_sum[..., None] - centred
        terms = terms if weight is None else terms * weight
        loss = loss + label_smoothing * terms.mean(-1)
    rest = torch.where(lse.isfinite(), top.squeeze(-1) - lse + log_sum, 0)
    return torch.where(ignored, 0, loss), lse, rest


def backward(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    rest: Tensor,
    dloss: Tensor | None,
    dlse: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    first: int,
    classes: int,
) -> Tensor:
    """Returns the gradient of the logits, which may be some columns of all `classes`, from `first`
    on. An absent dloss or dlse is 0."""
    s = _capped(logits, softcap)
    own, mean_w, ignored, t = _coefficients(
        logits, targets, weight, ignore_index, label_smoothing, classes
    )
    dloss = torch.zeros_like(lse) if dloss is None else torch.where(ignored, 0, dloss.to(s.dtype))
    # forward: loss = own (lse - s_t) + e sum_n w_n (lse - s_n) / V
    total = dloss * (own + label_smoothing * mean_w)
    total = total if dlse is None else total + dlse.to(s.dtype)
    # forward: lse = log sum_n exp(s_n)
    ds = total[..., None] * (s - lse[..., None] - rest[..., None]).exp()
    if label_smoothing:
        w = 1 if weight is None else weight[first : first + logits.shape[-1]]
        ds = ds - dloss[..., None] * (label_smoothing / classes) * w
    column = torch.arange(first, first + logits.shape[-1], device=logits.device)
    ds = ds - torch.where(t == column, (dloss * own)[..., None], 0)
    # forward: s = softcap tanh(z / softcap)
    if softcap:
        ds = ds * (1 - (s / softcap).square())
    # No row that has no gradient: its logits may hold NaN.
    ds = torch.where(((dloss == 0) & (total == 0))[..., None], 0, ds)
    return rounded(ds, logits.dtype)


def backward_(logits: Tensor, *args) -> None:
    """Writes the gradient over the logits."""
    logits.copy_(backward(logits, *args))


def forward_outputs(logits: Tensor, targets: Tensor, *options) -> tuple[Tensor, ...]:
    """Uninitialised the loss, lse and rest, as kernels return them."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(targets.shape, dtype=dtype) for _ in range(3))


def why_not(*args, needs_grad: bool) -> str | None:
    return None


def _capped(logits: Tensor, softcap: float) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * (z / softcap).tanh() if softcap else z


def _coefficients(logits, targets, weight, ignore_index, label_smoothing, classes):
    """(1 - e) w_t, the mean weight, whether rows are ignored, and a target (..., 1) in range."""
    ignored = targets == ignore_index
    outside = ~ignored & ((targets < 0) | (targets >= classes))
    t = targets.clamp(0, classes - 1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    own = torch.ones_like(t, dtype=dtype) if weight is None else weight[t]
    own = torch.where(outside, torch.nan, (1 - label_smoothing) * own)
    mean_w = 1.0 if weight is None else weight.mean()
    return own, mean_w, ignored, t[..., None]
