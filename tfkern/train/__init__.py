"""From batches to a trained model (`pip install tfkern[train]`).

`steps` is the loop: it yields a record after each step, and the caller's `for` does what else a run
does. `run` is such a loop by a `Recipe`, with evaluations, checkpoints and a record of it all, and
`tfkern train` runs it.

    from tfkern.models import Transformer, TransformerConfig
    from tfkern.train import CrossEntropy, optimiser, schedule, steps, task

    found = task("causal", "out/1234", length=64, batch=12)  # what tfkern prepare made
    model = Transformer(TransformerConfig(dim=128, layers=4, heads=4, **found.config))
    updates = optimiser("adamw", model, lr=1e-3)
    for record in steps(
        model, found.batches, CrossEntropy(), updates, stop=2000, clip_norm=1.0,
        schedule=schedule("cosine", steps=2000, warmup=100),
    ):
        print(record.step, record.loss)
"""

from tfkern.train import checkpoint
from tfkern.train.evaluate import Evaluation, bleu, evaluate, exact_match
from tfkern.train.freezing import freeze, frozen
from tfkern.train.lion import Lion
from tfkern.train.objective import CrossEntropy, Loss, Objective
from tfkern.train.optimisers import adafactor, adamw, lion, muon, optimiser
from tfkern.train.policy import (
    GRPO,
    PPO,
    RLOO,
    ActorCritic,
    ModelReward,
    Prompts,
    Rollouts,
    TextReward,
    critic_of,
)
from tfkern.train.preferences import DPO, IPO, KTO, ORPO, Hinge, Rewards, SimPO
from tfkern.train.recipe import Recipe
from tfkern.train.run import Outcome, run
from tfkern.train.schedules import schedule
from tfkern.train.steps import Record, steps
from tfkern.train.tasks import Task, task

__all__ = [
    "ActorCritic",
    "CrossEntropy",
    "DPO",
    "Evaluation",
    "GRPO",
    "Hinge",
    "IPO",
    "KTO",
    "Lion",
    "Loss",
    "ModelReward",
    "ORPO",
    "Objective",
    "Outcome",
    "PPO",
    "Prompts",
    "RLOO",
    "Recipe",
    "Record",
    "Rewards",
    "Rollouts",
    "SimPO",
    "Task",
    "TextReward",
    "adafactor",
    "adamw",
    "bleu",
    "checkpoint",
    "critic_of",
    "evaluate",
    "exact_match",
    "freeze",
    "frozen",
    "lion",
    "muon",
    "optimiser",
    "run",
    "schedule",
    "steps",
    "task",
]
