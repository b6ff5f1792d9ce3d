"""New tokens in a cache of keys and values, in plain PyTorch.

cache[b, :, (lengths[b] + t) mod S] = x[b, :, t]  for t < counts[b];  lengths += counts
"""

import torch


def forward(k_cache, v_cache, lengths, k, v, counts):
    S, T = k_cache.shape[2], k.shape[2]
    step = torch.arange(T, device=k.device)
    batch = torch.arange(k.shape[0], device=k.device)[:, None]
    # The T places differ also where they wrap around; only padding may lie beyond the capacity.
    place = (lengths[:, None] + step) % S
    for cache, x in ((k_cache, k), (v_cache, v)):
        x = x.transpose(1, 2)
        if counts is not None:
            exists = (step < counts[:, None])[..., None, None]
            x = torch.where(exists, x, cache[batch, :, place])
        cache[batch, :, place] = x
    lengths += T if counts is None else counts
    return lengths.clamp(max=S)


def why_not(*args, needs_grad) -> str | None:
    return None
