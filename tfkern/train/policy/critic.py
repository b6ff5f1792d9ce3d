"""A policy and the critic that is trained beside it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tfkern.models import Transformer


class ActorCritic(nn.Module):
    """A policy and its critic, as PPO trains them. `policy` is a model of its own, to be saved.

        model = ActorCritic(policy, critic_of(reward_model))

    Attributes:
        policy: a decoder with head "lm".
        critic: a decoder with head "token" and one class, which tells what reward is to be expected
            behind each token. See `critic_of`.

    Raises:
        ValueError: the critic has another head.
    """

    def __init__(self, policy: Transformer, critic: Transformer) -> None:
        super().__init__()
        if (critic.config.head, critic.config.classes) != ("token", 1):
            raise ValueError(
                "a critic must have head 'token' with 1 class, got "
                f"{critic.config.head!r} with {critic.config.classes}: see critic_of"
            )
        self.policy, self.critic = policy, critic

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> tuple[Any, Tensor]:
        """The logits (B, T, V) of the policy and the values (B, T) of the critic.

        Args:
            tokens: (B, T) int32 or int64.
            mask: (B,) lengths or (B, T) bool, see `Transformer`.
        """
        return self.policy(tokens, mask=mask), self.critic(tokens, mask=mask).squeeze(-1)


def critic_of(model: Transformer) -> Transformer:
    """A critic with the weights of a model, which may be a reward model or the policy.

    The layer that makes values is that of a reward model (head "classification" with one class).
    Other models have none, and the critic tells 0 at first.

    Raises:
        ValueError: a model that is no decoder of tokens, or that has a pooler.
    """
    config = model.config
    if config.architecture != "decoder" or config.pooler:
        pooler = " with a pooler" if config.pooler else ""
        raise ValueError(f"a critic needs a decoder, got an {config.architecture}{pooler}")
    with torch.device("meta"):
        critic = Transformer(replace(config, head="token", classes=1))
    told = model.state_dict()
    classifies = config.head == "classification" and config.classes == 1
    weight = model.embedding.weight
    state = {}
    for name, x in critic.state_dict().items():
        if name.startswith("classifier.") and not classifies:
            state[name] = torch.zeros(x.shape, dtype=weight.dtype, device=weight.device)
        else:
            state[name] = told[name].clone()
    critic.load_state_dict(state, assign=True)
    critic.recompute = model.recompute
    for parameter in critic.parameters():
        parameter.requires_grad_()
    return critic.train(model.training)


def check_repeats(model: nn.Module) -> None:
    """Raises ValueError if a model in training mode computes something else than in evaluation."""
    for name, module in model.named_modules():
        share = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0)
        if isinstance(module, Transformer):
            share = module.config.embedding_drop
            if module.config.norm == "batch_norm":
                raise ValueError(f"{_REPEATS} batch norm")
        if isinstance(share, int | float) and share > 0:
            told = name or type(module).__name__
            raise ValueError(f"{_REPEATS} dropout: {told} has {share}")


_REPEATS = "the ratio of a policy to itself must be 1, so that no module may have"
