"""How much arithmetic a step of training takes."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tfkern.train.objective import Batch, Objective


def count_flops(model: nn.Module, objective: Objective, batch: Batch) -> int:
    """The floating point operations of products and attention, forward and backward, of a batch.

    They are counted, and not taken from a formula, by running both once. Gradients that the
    parameters had are lost.
    """
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    inputs = {name: x for name, x in batch.items() if name != "targets"}
    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), counter:
        objective(model(**inputs), batch).mean.sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()
