"""Objectives of learning from preferences.

    from tfkern.train import adamw, steps
    from tfkern.train.preferences import DPO

    objective = DPO(beta=0.1)
    batches = objective.extended(found.batches, model)  # with a copy of the model as a reference
    for record in steps(model, batches, objective, adamw(model, 1e-6), stop=1000):
        ...

An item of a batch is a pair, as rows in a group of two: tokens (B, 2, T) and mask (B, 2) lengths,
the chosen row in front of the rejected one. "targets" (B, 2, T) are -100 at all but the answers.
`Rewards` takes the same rows, and `KTO` answers that are labelled one by one.

What an objective needs beside the data, such as the log-probabilities of a reference, `extended`
puts into the batches. It is called before the first step, and before a checkpoint is loaded,
because the reference is the model as it is at the start. Batches of an evaluation need it, too.
"""

from collections.abc import Callable

from tfkern.train.objective import Objective
from tfkern.train.preferences.pairs import DPO, IPO, ORPO, Hinge, SimPO
from tfkern.train.preferences.reference import Extended, Known, Reference, frozen
from tfkern.train.preferences.rewards import Rewards
from tfkern.train.preferences.unpaired import KTO

PREFERENCES: dict[str, Callable[..., Objective]] = {
    "dpo": DPO,
    "hinge": Hinge,
    "ipo": IPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "kto": KTO,
    "rewards": Rewards,
}

__all__ = [
    "DPO",
    "Extended",
    "Hinge",
    "IPO",
    "KTO",
    "Known",
    "ORPO",
    "PREFERENCES",
    "Reference",
    "Rewards",
    "SimPO",
    "frozen",
]
