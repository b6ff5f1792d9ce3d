"""Attention with every option in torch's own operators, and cases that combine the options."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfkern import ops
from tfkern.reference.dropout import dropout, philox
from tfkern.validation.case import Case

# The parameters of a case of attention, with the values of each, the plain one first. The pairwise
# tests, `tfkern validate` and the feature table of README go through these.
PARAMETERS: dict[str, tuple] = {
    "band": ("full", "causal", "window", "causal window", "left window"),
    "batch": ("equal lengths", "key lengths", "query and key lengths", "documents", "pages"),
    "heads": ("equal heads", "grouped heads", "one key head"),
    "sizes": ("square", "more keys", "more queries", "decode", "value size", "odd sizes"),
    "bias": (None, "BHTS", "1HTS", "11TS", "B11S", "1HT1"),
    "mask": (None, "BHTS", "11TS", "B11S"),
    "scale": (None, "negative", "zero"),
    "softcap": (None, "softcap"),
    "alibi": (None, "alibi"),
    "sink": (None, "sink"),
    "dropout": (None, "dropout"),
    "layout": ("BHTD", "BTHD"),
}
_SIZES = {  # T, S, D, Dv: on both sides of the edges of tiles
    "square": (67, 67, 32, 32),
    "more keys": (37, 131, 64, 64),
    "more queries": (70, 33, 16, 16),
    "decode": (8, 260, 64, 64),
    "value size": (34, 65, 40, 80),
    "odd sizes": (65, 97, 23, 7),
}


def possible(choice: dict[str, Any]) -> bool:
    """Whether the chosen values fit together. Absent parameters do not matter."""
    if choice.get("batch") == "documents":  # their scores have no common shape
        return choice.get("bias") is None and choice.get("mask") is None
    return True


def make_case(
    choice: dict[str, Any], tensor: Callable[..., Tensor], rng: random.Random, backend: str | None
) -> Case:
    """The case with the chosen values of PARAMETERS; an absent parameter has its first value."""
    choice = {name: choice.get(name, values[0]) for name, values in PARAMETERS.items()}
    T, S, D, Dv = _SIZES[choice["sizes"]]
    # The limit compares the largest errors, which is fair only over enough rows.
    B = 2 + 32 // T
    H, Hk = {"equal heads": (2, 2), "grouped heads": (4, 2), "one key head": (3, 1)}[
        choice["heads"]
    ]
    options: dict[str, Any] = {"return_lse": True, "causal": "causal" in choice["band"]}
    if "window" in choice["band"]:
        right = None if choice["band"] == "left window" else rng.randint(0, S // 2)
        options["window"] = (rng.randint(0, S // 2), right)
    if choice["scale"]:
        options["scale"] = -(D**-0.5) if choice["scale"] == "negative" else 0.0
    if choice["softcap"]:
        options["softcap"] = 2.0
    if choice["dropout"]:
        options |= {"dropout_p": 0.2, "seed": rng.randrange(2**63)}

    def heads(n: int, length: int, size: int) -> Tensor:
        if choice["layout"] == "BHTD":
            return tensor(B, n, length, size)
        return tensor(B, length, n, size).transpose(1, 2)

    inputs: dict[str, Any] = {
        "q": heads(H, T, D),
        "k": heads(Hk, S, D),
        "v": heads(Hk, S, Dv),
    }

    def scores_shape(pattern: str) -> list[int]:
        full = {"B": B, "H": H, "T": T, "S": S, "1": 1}
        return [full[letter] for letter in pattern]

    if choice["bias"]:
        inputs["bias"] = tensor(*scores_shape(choice["bias"]))
    if choice["mask"]:
        options["mask"] = tensor(*scores_shape(choice["mask"])) < 0.7
    if choice["sink"]:
        inputs["sink"] = tensor(H)
    if choice["alibi"]:
        slopes = tensor(*rng.choice(((H,), (B, H)))).float().abs() / 8
        options["alibi_slopes"] = slopes
    fn: Callable = ops.attention
    reference: Callable = torch_attention
    if choice["batch"] == "documents":
        fn, reference = ops.attention_varlen, torch_attention_varlen
        _pack(inputs, options, rng)
    elif choice["batch"] != "equal lengths":
        if choice["batch"] == "query and key lengths":
            _cut("query_lengths", "q", inputs, options, rng)
        _cut("key_lengths", "kv", inputs, options, rng)
    if choice["batch"] == "pages":
        _page(inputs, options, rng)
        S = options["page_table"].shape[1] * inputs["k"].shape[2]
    label = " ".join(
        str(value if parameter not in ("bias", "mask") else f"{parameter} {value}")
        for parameter, value in choice.items()
        if value != PARAMETERS[parameter][0]
    )
    return Case(
        label or "plain",
        partial(fn, **options, backend=backend),
        partial(reference, **options),
        inputs,
        floor_scale(inputs, B, T, S),
        gradients=choice["batch"] != "pages",
    )


def _cut(name: str, tensors: str, inputs: dict, options: dict, rng: random.Random) -> None:
    """Gives the batches lengths, the first 0 or full, and fills the padding with NaN."""
    B, _, size, _ = inputs[tensors[0]].shape
    lengths = [rng.choice((0, size)), *(rng.randint(size // 2, size) for _ in range(B - 1))]
    options[name] = torch.tensor(lengths, device=inputs["q"].device)
    beyond = torch.arange(size, device=inputs["q"].device) >= options[name][:, None]
    for x in tensors:
        inputs[x] = inputs[x].masked_fill(beyond[:, None, :, None], math.nan)


def _pack(inputs: dict, options: dict, rng: random.Random) -> None:
    """Cuts the rows of all batches into documents of random lengths, which may be 0."""
    for name, x in (("cu_seqlens_q", "q"), ("cu_seqlens_k", "k")):
        B, _, size, _ = inputs[x].shape
        cuts = sorted(rng.randint(0, B * size) for _ in range(B - 1))
        cu = [0, *cuts, B * size]
        options[name] = torch.tensor(cu, dtype=torch.int32, device=inputs["q"].device)
    for x in "qkv":
        inputs[x] = inputs[x].transpose(1, 2).flatten(0, 1)


def _page(inputs: dict, options: dict, rng: random.Random, size: int = 12) -> None:
    """Moves keys and values to pages in a random order. Unused pages are NaN."""
    B, _, S, _ = inputs["k"].shape
    count = -(-S // size)
    order = rng.sample(range(B * count + 2), B * count)
    device = inputs["k"].device
    table = torch.tensor(order, dtype=torch.int32, device=device).view(B, count)
    for name in "kv":
        x = F.pad(inputs[name], (0, 0, 0, count * size - S), value=math.nan)
        pages = x.new_full((B * count + 2, x.shape[1], size, x.shape[3]), math.nan)
        pages[table.long().flatten()] = x.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
        inputs[name] = pages
    for name, of in (("bias", inputs), ("mask", options)):
        if name in of and of[name].shape[3] > 1:
            of[name] = F.pad(of[name], (0, count * size - S))
    unused = torch.arange(count, device=device) * size >= options["key_lengths"][:, None]
    options["page_table"] = table.masked_fill(unused, -7)


def draws(rng: random.Random, tensor: Callable[..., Tensor], backend: str | None) -> Iterator[Case]:
    """Endless cases. Each parameter takes its values in turn from a shuffled list, so that every
    value occurs within as many cases as the longest list has values."""
    decks: dict[str, list] = {name: [] for name in PARAMETERS}
    while True:
        for name, deck in decks.items():
            deck.extend(rng.sample(PARAMETERS[name], len(PARAMETERS[name])) if not deck else [])
        choice = {name: deck.pop() for name, deck in decks.items()}
        if not possible(choice):
            for name in ("bias", "mask"):
                decks[name].append(choice.pop(name))
        yield make_case(choice, tensor, rng, backend)


def floor_scale(inputs: dict[str, Any], B: int, T: int, S: int) -> dict[str, float]:
    """The factors `floor_scale` of `tfkern.testing.validate`.

    Scores are a few units large, and lse is about log S, so each is off by that many roundings of
    1, and p = exp(s - lse) by a relative error of the same size. Narrower dtypes than float32 have
    float32 scores and lse, too, so there only lse itself ("output 1") shows it. Gradients of bias
    and sink are sums of many terms.
    """
    q, wide = inputs["q"], inputs["q"].dtype == torch.float32
    names = (*inputs, "output", "output 0", "output 1")
    scale = dict.fromkeys(names, 1.0)
    scale |= dict.fromkeys(names if wide else ("output 1",), 1 + 2 * math.log(8 + S))
    terms = {"sink": B * T}
    if "bias" in inputs:
        terms["bias"] = B * q.shape[1] * T * S // max(inputs["bias"].numel(), 1)
    return {name: x * math.sqrt(terms.get(name, 1)) for name, x in scale.items()}


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    return_lse: bool = False,
    document: int = 0,
) -> Any:
    """What `tfkern.attention` computes, by torch's attention with a dense mask where this serves.

    It uses torch's fused kernel rather than unfused code because the backward of that kernel has
    the same cancellation in dp - rowsum(do o) as ours. The log-sum-exp, softcap and dropout are
    unfused. `document` is the document number of the first batch, for dropout.
    """
    if page_table is not None:
        table = page_table.clamp(0).tolist()
        k, v = (torch.stack([x[i].transpose(0, 1).flatten(1, 2) for i in table]) for x in (k, v))
    (B, H, T, D), S, wide = q.shape, k.shape[2], torch.promote_types(q.dtype, torch.float32)
    t, s = torch.arange(T, device=q.device)[:, None], torch.arange(S, device=q.device)
    rows = torch.tensor([T] * B, device=q.device) if query_lengths is None else query_lengths
    keys = torch.tensor([S] * B, device=q.device) if key_lengths is None else key_lengths
    rows, keys = rows.view(B, 1, 1, 1), keys.view(B, 1, 1, 1)
    left, right = window or (None, None)
    diagonal = t + keys - rows
    visible = ((t < rows) & (s < keys)).expand(B, H, T, S)
    visible = visible if mask is None else visible & mask
    visible = visible if left is None else visible & (s >= diagonal - left)
    visible = visible if right is None else visible & (s <= diagonal + right)
    visible = visible if not causal else visible & (s <= diagonal)
    addend = q.new_zeros(B, H, T, S, dtype=wide)
    if bias is not None:
        addend = addend + bias
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(wide).expand(B, H)[..., None, None]
        addend = addend - slopes * (diagonal - s).abs()
    q = torch.where(t < rows, q, 0)  # padding may hold NaN
    k, v = (torch.where(s[:, None] < keys, x, 0) for x in (k, v))
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    scale = D**-0.5 if scale is None else scale
    x = (scale * (q @ k.mT)).to(wide)
    x = softcap * (x / softcap).tanh() if softcap else x
    if sink is not None:  # one more key, zero as its value
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        addend = torch.cat((addend, sink.to(wide)[:, None, None].expand(B, H, T, 1)), -1)
        visible = torch.cat((visible, (t < rows).expand(B, H, T, 1)), -1)
        x = F.pad(x, (0, 1))
    seen = visible.any(-1, keepdim=True)
    addend = addend.masked_fill(~(visible | ~seen), -torch.inf)
    x = x + addend
    if not visible.shape[-1]:
        o, lse = q.new_zeros(B, H, T, v.shape[3]), x.sum(-1)
    elif softcap or dropout_p:
        p = x.softmax(-1)
        if dropout_p:
            lanes = torch.arange(-(-p.shape[-1] // 4), device=q.device)
            head = torch.arange(document * H, (document + B) * H, device=q.device)
            key = torch.tensor(seed, device=q.device)
            draws = philox(key, lanes, t, head.view(B, H, 1, 1), 0).flatten(-2)
            p = dropout(p, draws[..., : p.shape[-1]], dropout_p)
        o, lse = p.to(v.dtype) @ v, x.logsumexp(-1)
    else:
        plain = bias is None and alibi_slopes is None and sink is None
        attn_mask = visible | ~seen if plain else addend
        o, lse = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale), x.logsumexp(-1)
    o, lse = o * seen, lse.masked_fill(~seen[..., 0], -torch.inf)
    return (o, lse) if return_lse else o


def torch_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """What `tfkern.attention_varlen` computes, one document after the other."""
    results = []
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for i, ((t0, s0), (t1, s1)) in enumerate(itertools.pairwise(ends)):
        document = [x.transpose(0, 1)[None] for x in (q[t0:t1], k[s0:s1], v[s0:s1])]
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[i]
        options |= {"alibi_slopes": slopes, "document": i, "return_lse": True}
        results.append(torch_attention(*document, **options))
    o = torch.cat([o[0].transpose(0, 1) for o, _ in results])
    lse = torch.cat([lse[0] for _, lse in results], 1)
    return (o, lse) if return_lse else o
