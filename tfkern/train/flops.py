"""How much arithmetic a step of training takes."""

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from tfkern.ops.flops import attention_formulas, linear_cross_entropy_formulas
from tfkern.train.objective import Batch, Objective
from tfkern.train.steps import parts, size


def count_flops(
    model: nn.Module, objective: Objective, batch: Batch, *, accumulate: int = 1
) -> int:
    """The floating point operations of products and attention, forward and backward, of a batch.

    They are counted, and not taken from a formula, by running both once: for the first of the parts
    into which `steps` cuts the batch, which stands for the others. Attention counts by the tiles
    that it visits. The model stays as it was, but gradients that its parameters had are lost.

    Raises:
        ValueError: the batch cannot be cut.
    """
    device = next(model.parameters()).device
    part = parts(batch, accumulate)[0]
    part = pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, part)
    inputs = {name: x for name, x in part.items() if name != "targets"}
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]  # such as running means
    formulas = attention_formulas(causal=True) | linear_cross_entropy_formulas()
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), counter:
        objective(model(**inputs), part).mean.sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    return round(counter.get_total_flops() * size(batch) / size(part))
