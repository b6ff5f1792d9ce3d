"""Weights that make every part of a model matter.

Fresh ones are of no use as a reference: biases are 0 and norms are the identity in them, so that
exchanged norms or a dropped bias change nothing.
"""

import torch


def perturb(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of norms in [0.5, 1.5], all others of deviation 0.2."""
    generator = torch.Generator().manual_seed(seed)
    buffers = dict(module.named_buffers())
    bias = {n: x for n, x in buffers.items() if n == "final_logits_bias"}  # of BART
    with torch.no_grad():
        for name, x in (dict(module.named_parameters()) | bias).items():
            norm = "ln" in name.lower() or "norm" in name.lower()
            if x.dim() == 1 and norm and name.endswith("weight"):
                x.uniform_(0.5, 1.5, generator=generator)
            else:
                x.normal_(0, 0.2, generator=generator)
    return module
