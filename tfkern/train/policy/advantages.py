"""How much better an answer, or a token of it, was than expected: formulas on tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # from a tensor of one process to the sum over all data ranks
KL_KINDS = ("k1", "k3")


def kl_estimate(new: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Estimates of KL(policy || reference) by tokens that the policy drew (Schulman 2020,
    "Approximating KL divergence").

    With r = reference - new, "k1" is -r, and "k3" is exp(r) - 1 - r, which is never negative and
    varies less. Both have the KL divergence as their mean, but mostly not its gradient (Tang, Munos
    2025). In a reward, k1 has it, and k3 that of KL(policy || reference) - KL(reference || policy),
    which hardly holds a policy back. In a loss, k3 has that of KL(reference || policy), and k1
    none.

    Args:
        new, reference: log-probabilities of the tokens, of one shape.

    Returns:
        in nats, of that shape.
    """
    if kind not in KL_KINDS:
        raise ValueError(f"kind must be one of {', '.join(KL_KINDS)}, got {kind!r}")
    log_ratio = reference - new
    return -log_ratio if kind == "k1" else log_ratio.expm1() - log_ratio


def gae(rewards: Tensor, values: Tensor, exist: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016) of the tokens of answers.

        A_t = sum over l of (gamma lam)^l (r_(t+l) + gamma V_(t+l+1) - V_(t+l))

    An answer ends the episode: what follows its last token has the value 0.

    Args:
        rewards, values: (B, T).
        exist: (B, T) bool, the tokens of answers, which stand side by side in each row.

    Returns:
        (B, T), 0 where there is no token.
    """
    found = torch.zeros_like(values)
    following = running = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        error = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(exist[:, t], error + gamma * lam * running, 0)
        following = torch.where(exist[:, t], values[:, t], 0)
        found[:, t] = running
    return found


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (P, G) of G answers to each prompt, less the mean of the other answers' (RLOO: Kool
    et al. 2019; Ahmadian et al. 2024)."""
    G = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (G / (G - 1))


def group_relative(rewards: Tensor, scale: bool, eps: float = 1e-4) -> Tensor:
    """Rewards (P, G) of G answers to each prompt, less their mean, and divided by their standard
    deviation (with G - 1) plus eps if `scale` (GRPO: Shao et al. 2024). Liu et al. 2025 do not
    divide (Dr. GRPO), since division favours prompts that are too easy or too hard."""
    found = rewards - rewards.mean(1, keepdim=True)
    return found / (rewards.std(1, keepdim=True) + eps) if scale else found


def whiten(x: Tensor, exist: Tensor, total: Total, *, shift: bool = True) -> Tensor:
    """x with variance 1 and mean 0 over all tokens that exist, on all data ranks.

    Args:
        x: (B, T).
        exist: (B, T) bool.
        shift: whether the mean becomes 0; it stays as it is if False.

    Returns:
        (B, T), 0 where there is no token.
    """
    kept = torch.where(exist, x, 0).double()
    count, summed = total(torch.stack([exist.sum().double(), kept.sum()]))
    mean = summed / count.clamp(min=1)
    centred = torch.where(exist, kept - mean, 0)
    variance = total(centred.square().sum()) / count.clamp(min=1)
    found = centred * (variance + 1e-8).rsqrt()
    found = found if shift else found + torch.where(exist, mean, 0)
    return found.to(x.dtype)


def at_last(x: Tensor, exist: Tensor) -> Tensor:
    """Numbers (B,) at the last token of each row (B, T) that exists, and 0 elsewhere."""
    later = exist.flip(1).cumsum(1).flip(1)  # how many exist from here on
    return torch.where(exist & (later == 1), x[:, None], 0)
