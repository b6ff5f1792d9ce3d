"""How much arithmetic a step of training takes."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from tfkern.ops.flops import formulas
from tfkern.train.objective import Batch, Objective
from tfkern.train.steps import parts, size


def count_flops(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    accumulate: int = 1,
    precision: torch.dtype | None = None,
) -> int:
    """The floating point operations of products and attention, forward and backward, of a batch.

    They are counted, and not taken from a formula, by running both once: for the first of the parts
    into which `steps` cuts the batch, which stands for the others. Attention counts by the tiles
    that it visits, and what is recomputed counts, too. The model stays as it was, but gradients
    that its parameters had are lost.

    Args:
        accumulate, precision: as for `steps`, so that this takes no more memory than a step.

    Raises:
        ValueError: the batch cannot be cut.
    """
    device = next(model.parameters()).device
    part = parts(batch, accumulate)[0]
    part = pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, part)
    inputs = {name: x for name, x in part.items() if name != "targets"}
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]  # such as running means
    counter = FlopCounterMode(display=False, custom_mapping=formulas(causal=True))
    mixed = nullcontext() if precision is None else torch.autocast(device.type, precision)
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), counter:
        with mixed:
            loss = objective(model(**inputs), part)
        loss.mean.sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    return round(counter.get_total_flops() * size(batch) / size(part))
