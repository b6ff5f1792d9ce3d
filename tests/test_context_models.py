"""Models whose sequences are split over processes, against one process."""

import copy

import pytest
import torch
from torch import distributed

from tfkern.models import Transformer, TransformerConfig
from tfkern.models.loss import IGNORED
from tfkern.train import CrossEntropy
from tfkern.train.parallel import cut, spread

SIZES = {"vocab_size": 40, "dim": 32, "layers": 3, "heads": 4, "hidden_dim": 48}
MODELS = {
    "gpt": {"positions": "learned", "max_length": 64},
    "llama": {"positions": "rotary", "kv_heads": 2, "norm": "rms_norm", "gated": True},
    "windows": {
        "positions": "rotary", "kv_heads": 1, "window": 5, "windowed": (True, False), "gated": True,
    },
    "alibi": {"positions": "alibi"},
    "sinusoids": {"positions": "sinusoidal", "post_norm": True},
    "relative": {"positions": "relative", "norm": "rms_norm"},
    "bert": {
        "architecture": "encoder", "positions": "learned", "max_length": 64, "token_types": 2,
        "head": "mlm",
    },
    "roberta": {
        "architecture": "encoder", "positions": "learned", "max_length": 64, "skip_pad": True,
        "position_offset": 2, "pad_token": 1, "head": "mlm",
    },
    "rotary encoder": {"architecture": "encoder", "positions": "rotary", "head": "token",
                       "classes": 5},
    "bart": {"positions": "learned", "max_length": 64},
    "t5": {"positions": "relative", "norm": "rms_norm"},
}  # fmt: skip


def make(name, options):
    """A model in float64 whose parameters are all drawn, and a batch."""
    torch.manual_seed(5)
    sizes = SIZES | MODELS[name]
    if name in ("bart", "t5"):
        sizes |= {"architecture": "encoder_decoder", "start_token": 0}
    config = TransformerConfig(**sizes)
    model = Transformer(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    B, T, S = 3, options.get("length", 16), options.get("source", 24)
    batch = {"tokens": torch.randint(2, 40, (B, T))}
    classes = 5 if config.head == "token" else 40
    batch["targets"] = torch.randint(classes, (B, T))
    batch["targets"][0, 3:7] = IGNORED
    if config.architecture == "encoder_decoder":
        batch["source"] = torch.randint(2, 40, (B, S))
    if config.token_types:
        batch["token_types"] = torch.randint(2, (B, T))
    steps = torch.arange(T)
    lengths = torch.tensor([T, T - 3, 2])
    if options.get("mask") == "lengths":
        batch["mask"] = lengths
    elif options.get("mask") == "left":
        batch["mask"] = steps >= T - lengths[:, None]
    if options.get("mask") is not None:
        exists = steps < lengths[:, None] if batch["mask"].dim() == 1 else batch["mask"]
        batch["targets"].masked_fill_(~exists, IGNORED)
    if options.get("source_mask"):
        batch["source_mask"] = torch.arange(S) < torch.tensor([S, 3, S - 1])[:, None]
    if options.get("padded"):
        batch["tokens"][1, -4:] = config.pad_token
    if options.get("documents"):
        batch["documents"] = (steps > 2).long() + (steps > T - 6).long() + torch.zeros(B, 1).long()
    return model, batch


def step(model, batch, total):
    """The logits, this part of the loss, and its gradients."""
    batch = dict(batch)
    logits = model(**{k: x for k, x in batch.items() if k != "targets"})
    loss = CrossEntropy()(logits, batch).share(total).sum()
    loss.backward()
    return logits, loss, {n: p.grad for n, p in model.named_parameters()}


def compare(name, options):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    model, batch = make(name, options)
    model.recompute = options.get("recompute", False)
    total = CrossEntropy().count(batch)
    parts = copy.deepcopy(model)
    logits, loss, grads = step(model, batch, total)

    split = spread(parts, distributed.group.WORLD)
    part = cut(batch, parts)
    T = batch["tokens"].shape[1]
    assert part["tokens"].shape[1] == -(-T // split.multiple) * split.multiple // split.ranks
    part_logits, part_loss, part_grads = step(parts, part, total)
    whole = split.gather(part_logits.detach(), 1)[:, :T]
    counted = batch["targets"] != IGNORED
    torch.testing.assert_close(whole[counted], logits[counted], rtol=1e-9, atol=1e-9)
    distributed.all_reduce(part_loss.detach_())
    torch.testing.assert_close(part_loss, loss.detach(), rtol=1e-10, atol=1e-10)
    for key, expected in grads.items():
        got = part_grads[key]
        got = torch.zeros_like(expected) if got is None else got
        distributed.all_reduce(got)
        error = (got - expected).abs().max().item()
        assert error < 1e-9 * (1 + expected.abs().max().item()), (key, error)


CASES = [
    *(pytest.param(name, {}, marks=pytest.mark.slow) for name in MODELS),
    *((name, {"length": 13, "source": 19}) for name in MODELS),
    ("gpt", {"recompute": True}),
    ("gpt", {"mask": "left"}),
    ("llama", {"mask": "lengths"}),
    ("llama", {"documents": True, "length": 18}),
    ("relative", {"documents": True}),
    ("alibi", {"documents": True, "length": 15}),
    ("bert", {"mask": "lengths"}),
    ("bert", {"mask": "left", "length": 15}),
    ("rotary encoder", {"documents": True, "length": 15}),
    ("roberta", {"padded": True}),
    ("t5", {"source_mask": True, "source": 21}),
    ("bart", {"source_mask": True, "mask": "lengths"}),
]


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_matches_one_process(two, name, options):
    two(compare, name, options)


@pytest.mark.slow
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_four_match_one_process(four, name, options):
    four(compare, name, options)


def refuse(options, message):
    config = TransformerConfig(**{**SIZES, "positions": "rotary", **options})
    with pytest.raises(ValueError, match=message):
        spread(Transformer(config), distributed.group.WORLD)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "batch_norm"}, "the statistics of batch norm"),
        ({"head": "classification", "classes": 3}, "head 'classification' reads a row"),
    ],
    ids=str,
)
def test_models_that_mix_tokens(two, options, message):
    two(refuse, options, message)


def wrong_calls():
    model, batch = make("gpt", {"length": 64})
    with pytest.raises(ValueError, match="must be spread"):
        cut(batch, model)
    spread(model, distributed.group.WORLD)
    with pytest.raises(ValueError, match="has length 66, padding included, and the limit is 64"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    model.eval()
    with pytest.raises(ValueError, match="no weights of sequences that are split"):
        model.attention_maps(0, torch.zeros(1, 8, dtype=torch.int64))


def test_wrong_calls(two):
    two(wrong_calls)
