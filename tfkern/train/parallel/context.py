"""Context parallelism: each process of a group has a part of every sequence."""

from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from tfkern.models import Transformer
from tfkern.models.blocks import Attention
from tfkern.models.config import TransformerConfig
from tfkern.models.loss import IGNORED
from tfkern.models.stack import Stack
from tfkern.models.transformer import in_groups
from tfkern.nn.context_parallel import SequenceSplit
from tfkern.train.objective import Batch


def spread(model: Transformer, group: ProcessGroup) -> SequenceSplit:
    """Makes a model compute on parts of sequences, which `cut` makes, in place.

        split = spread(model, mesh.get_group("cp"))
        part = cut(batch, model)
        targets = part.pop("targets")
        logits = model(**part)  # of this process's tokens, as are targets

    All tensors (B, T) of the model are then those of this process, while lengths (B,) remain those
    of whole sequences. Attention is `tfkern.nn.context_parallel_attention`. With a decoder the
    placement is "zigzag", where causal attention costs all processes the same. The parameters are
    whole in each process, and their gradients are those of the loss of its tokens: the gradient
    is the sum over the group.

    Raises:
        ValueError: a model whose layers other than attention mix tokens, or whose positions depend
            on those of other processes.
    """
    _check(model.config)
    split = SequenceSplit(group, "blocks" if model.decoder is None else "zigzag")
    for module in model.modules():
        if isinstance(module, (Attention, Stack)):
            module.split = split
    return split


def cut(batch: Batch, model: Transformer) -> dict[str, Any]:
    """This process's part of a batch of whole sequences, for a model that is `spread`.

    Sequences whose length cannot be split equally are padded on the right. Padding has no targets,
    and no other token sees it.

    Args:
        batch: arguments of `Transformer.forward`, and "targets" (B, T) of tokens.

    Raises:
        ValueError: a model that is not spread, or rows in groups.
    """
    stack = model.encoder if model.decoder is None else model.decoder
    split = None if stack is None else stack.split
    if split is None:
        raise ValueError("the model must be spread over a group before batches are cut")
    check_rows(model, batch)
    padded = dict(batch)
    # A decoder is causal, so that no token sees padding behind it.
    for name, mask in (("tokens", "mask"), ("source", "source_mask")):
        causal = name == "tokens" and model.decoder is not None
        x = batch.get(name)
        if x is None or x.shape[1] % split.multiple == 0 or causal:
            continue
        if batch.get(mask) is None and batch.get("documents") is None:
            padded[mask] = torch.full((len(x),), x.shape[1], device=x.device)
    for name, fill in _fills(model.config).items():
        x = padded.get(name)
        if x is not None and x.dim() > 1:
            x = F.pad(x, (0, -x.shape[1] % split.multiple), value=fill)
            padded[name] = split.split(x, 1)
    if (documents := batch.get("documents")) is not None:
        more = -documents.shape[1] % split.multiple
        padding = (documents[:, -1:] + 1).expand(-1, more)
        padded["documents"] = split.split(torch.cat([documents, padding], 1), 1)
    return padded


def check_rows(model: Transformer, batch: Batch) -> None:
    """Raises ValueError for rows in groups, which only a whole model on whole rows takes."""
    tokens = batch.get("tokens")
    if tokens is not None and in_groups(model.config, tokens):
        raise ValueError(f"neither cp nor pp takes rows in groups, got {tuple(tokens.shape)}")


def _fills(config: TransformerConfig) -> dict[str, int]:
    """What padding holds, by the name of a tensor (B, T) of a batch."""
    pad = config.pad_token or 0
    return {
        "tokens": pad, "source": pad, "mask": False, "source_mask": False, "token_types": 0,
        "positions": 0, "targets": IGNORED,
    }  # fmt: skip


def _check(config: TransformerConfig) -> None:
    scaling = config.rotary_scaling
    problem = None
    if config.patch_size is not None:
        problem = "images have no tokens to split"
    elif config.norm == "batch_norm":
        problem = "the statistics of batch norm are those of all tokens"
    elif config.head not in ("lm", "mlm", "token", "none"):
        problem = f"head {config.head!r} reads a row as one sequence"
    elif scaling is not None and scaling.kind in ("longrope", "dynamic"):
        problem = f"rotary scaling {scaling.kind!r} follows the longest text of the batch"
    if problem is not None:
        raise ValueError(f"sequences cannot be split over processes: {problem}")
