"""Reinforcement learning from rewards: PPO, GRPO and RLOO, on the same answers.

policy = tfkern.models.load("out/sft/model")
model = ActorCritic(policy, critic_of(policy))
objective = PPO(kl=0.05)
batches = Rollouts(model, Prompts(rows, 64), reward, objective, max_tokens=64, epochs=4,
                   reference=frozen(policy))
for record in steps(model, batches, objective, adamw(model, 1e-5), stop=1000, clip_norm=1.0):
    print(record.step, batches.last)
"""

from tfkern.train.policy.answers import Answers
from tfkern.train.policy.critic import ActorCritic, critic_of
from tfkern.train.policy.objective import GRPO, OBJECTIVES, PPO, RLOO, FromRewards
from tfkern.train.policy.prompts import Prompts
from tfkern.train.policy.rewards import ModelReward, TextReward
from tfkern.train.policy.rollouts import Rollouts, Round

__all__ = [
    "GRPO",
    "OBJECTIVES",
    "PPO",
    "RLOO",
    "ActorCritic",
    "Answers",
    "FromRewards",
    "ModelReward",
    "Prompts",
    "Rollouts",
    "Round",
    "TextReward",
    "critic_of",
]
