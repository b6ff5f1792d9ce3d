"""The whole of a model that is spread over processes."""

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from tfkern.models import Transformer
from tfkern.models.adapters.place import lay_out, layout
from tfkern.train.parallel.model import Parallel


def gather(model: nn.Module) -> Any:
    """A model on one process, with the weights that it has now.

    All processes of the model have to call this.

    Returns:
        The model itself if it is on this process alone. Otherwise a new `Transformer` on the CPU in
        the first process, and None in the others.

    Raises:
        ValueError: a model of many processes that is no `Transformer`.
    """
    if not isinstance(model, Parallel):
        return model
    module: Any = model.module
    if model.mesh is None or model.mesh.size() == 1:
        return module
    if not isinstance(module, Transformer):  # in all processes, so that none waits for another
        raise ValueError(
            f"only a tfkern.models.Transformer can be gathered, got {type(module).__name__}"
        )
    first = distributed.get_rank() == 0
    state = {}
    for name, x in module.state_dict().items():
        whole = x.full_tensor() if isinstance(x, DTensor) else x
        if model.leads:
            state[name.replace("_orig_mod.", "")] = whole.cpu()
        del whole
    parts: list[Any] = [(state, layout(module))]
    if model.stages is not None and model.leads:
        own, parts = parts[0], [None] * model.size("pp")
        distributed.gather_object(own, parts if first else None, 0, model.stages)
    if not first:
        return None
    states, layouts = zip(*parts, strict=True)
    state = {name: x for part in states for name, x in part.items()}
    with torch.device("meta"):
        found = Transformer(module.config)
        lay_out(found, *layouts)
    found.load_state_dict(state, assign=True)
    found.family = module.family
    return found.train(module.training)
