"""Weights that make every part of a model matter.

Fresh weights are no use as a reference: their biases are 0 and their norms are the identity, so
that exchanged norms or a dropped bias would change nothing.
"""

import torch


def perturb(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws weights of norms from [0.5, 1.5], and all others with mean 0 and deviation 0.2."""
    generator = torch.Generator().manual_seed(seed)
    buffers = dict(module.named_buffers())
    bias = {n: x for n, x in buffers.items() if n == "final_logits_bias"}  # a buffer of BART
    with torch.no_grad():
        for name, x in (dict(module.named_parameters()) | bias).items():
            if name.endswith("embed_positions.weight") and not x.requires_grad:
                continue  # a table of sinusoids
            norm = "ln" in name.lower() or "norm" in name.lower()
            if x.dim() == 1 and norm and name.endswith("weight"):
                x.uniform_(0.5, 1.5, generator=generator)
            else:
                x.normal_(0, 0.2, generator=generator)
    return module
