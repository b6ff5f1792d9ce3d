"""Proximal policy optimisation (PPO, Schulman et al. 2017) finds the best policy, which is known.

A tiny decoder writes 8 tokens of 32. The reward of an answer is the share of its tokens that are
good ones, those of the first half. Each answer also costs 0.1 nats^-1 of its KL divergence from the
model at the start. The policy with the greatest reward less this cost is in proportion to that
model times exp(reward / 0.1). A good token adds 1/8 to the reward, so it becomes e^1.25 times as
likely: if the model draws one with probability q, the best policy does so with probability

    q e^1.25 / (q e^1.25 + 1 - q)

Run: python examples/ppo.py
"""

import json
import math

import torch

from tfkern.models import Transformer, TransformerConfig
from tfkern.train import PPO, ActorCritic, Rollouts, adamw, critic_of, frozen, schedule, steps

ANSWER, VOCABULARY, ROUNDS, EPOCHS, KL = 8, 32, 40, 2, 0.1


class Prompts:
    """The same 64 prompts in all rounds: token 0."""

    def __getitem__(self, step):
        return {"prompt": [[0]] * 64}


def reward(prompts, answers):
    return [sum(token < VOCABULARY // 2 for token in answer) / len(answer) for answer in answers]


torch.manual_seed(0)
size = {"dim": 64, "layers": 2, "heads": 2, "vocab_size": VOCABULARY, "max_length": 2 * ANSWER}
policy = Transformer(TransformerConfig(**size))
reference = frozen(policy)  # a copy
model = ActorCritic(policy, critic_of(policy))  # the critic expects rewards, and is trained beside
objective = PPO(kl=KL, lam=1.0, value=1.0)
batches = Rollouts(
    model, Prompts(), reward, objective, max_tokens=ANSWER, epochs=EPOCHS, reference=reference
)

# q, at the places where the model at the start writes
first = batches[0]
with torch.no_grad():
    probabilities = reference(first["tokens"], mask=first["mask"]).softmax(-1)
q = probabilities[..., : VOCABULARY // 2].sum(-1)[first["targets"].exist].mean().item()
growth = math.exp(1 / ANSWER / KL)
best = q * growth / (q * growth + 1 - q)

stop = ROUNDS * EPOCHS
updates = adamw(model, 2e-3, weight_decay=0.0)
rates = schedule("linear", steps=stop, floor=0.1)
rewards = []
for record in steps(model, batches, objective, updates, stop=stop, clip_norm=1.0, schedule=rates):
    if record.step % EPOCHS == 0:
        told = batches.last
        rewards.append(told.reward)
        if told.number % 5 == 0:
            print(f"round {told.number}: reward {told.reward:.3f}, KL {told.kl:.2f} nats")

last = sum(rewards[-8:]) / 8
print(f"mean reward of the last 8 rounds: {last:.3f}; of the best policy: {best:.3f}")
print(json.dumps({"start": rewards[0], "reward": last, "optimum": best}))
