"""Models on several processes train as on one: every way to share work, by architecture."""

import pytest
import torch
from ranks import Ranks
from torch.distributed.tensor import DTensor

from tfkern.models import Transformer, TransformerConfig
from tfkern.train.evaluate import evaluate
from tfkern.train.objective import CrossEntropy
from tfkern.train.optimisers import adamw
from tfkern.train.parallel import mesh, parallelise
from tfkern.train.parallel.gradients import total_norm
from tfkern.train.steps import steps

VOCAB, LENGTH, BATCH, STEPS = 24, 17, 8, 6
SMALL = {"vocab_size": VOCAB, "max_length": 20, "dim": 16, "layers": 4, "heads": 4}
MODELS = {
    "decoder": {},
    "encoder": {"architecture": "encoder", "head": "mlm", "post_norm": True},
    "encoder_decoder": {
        "architecture": "encoder_decoder", "positions": "relative", "norm": "rms_norm",
        "gated": True, "start_token": 0, "layers": 2, "encoder_layers": 2, "tie_embeddings": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def tiny(kind, dtype=torch.float32, **changes):
    """A model whose parameters are all random: initial biases of 0 would hide mistakes."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL | MODELS[kind] | changes)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


class Batches:
    """A part of each batch. Rows have 1 to LENGTH targets, so that the parts have unequal ones."""

    def __init__(self, kind, rank=0, world=1):
        self.kind, self.rank, self.world = kind, rank, world

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        for row, count in enumerate((1, 2, 3, 1, 17, 9, 17, 16)):
            targets[row, count:] = -100
        batch = {"tokens": tokens[:, :-1], "targets": targets}
        if self.kind == "encoder_decoder":
            batch["source"] = tokens.flip(1)[:, :13]
        size = BATCH // self.world
        mine = slice(self.rank * size, (self.rank + 1) * size)
        return {name: x[mine] for name, x in batch.items()}


def train(kind, sizes, changes, options):
    """What training tells: losses, norms and tokens of steps, and an evaluation. On one process if
    there are no sizes of a mesh."""
    model = tiny(kind, **changes)
    part = {}
    if sizes is not None:
        model = parallelise(model, mesh(**sizes, device="cpu"))
        part = {"rank": model.data_rank, "world": model.data_world}
    batches = Batches(kind, **part)
    records = list(
        steps(
            model, batches, CrossEntropy(0.1, 1e-3), adamw(model, 1e-3), stop=STEPS, clip_norm=1.0,
            **options,
        )
    )  # fmt: skip
    found = evaluate(model, [batches[i] for i in (7, 8)], CrossEntropy())
    return {
        "losses": [r.loss for r in records] + [found.loss],
        "norms": [r.norm for r in records],
        "counts": [r.tokens for r in records] + list(found.accuracies),
    }


_alone = {}


def check(ranks, kind, sizes, changes=None, **options):
    """Training on ranks is that on one process, and all ranks tell the same."""
    changes = changes or {}
    key = str((kind, changes, options))
    if key not in _alone:
        _alone[key] = train(kind, None, changes, options)
    expected = _alone[key]
    found = ranks(train, kind, sizes, changes, options)
    assert all(f == found[0] for f in found)
    assert found[0]["losses"] == pytest.approx(expected["losses"], abs=5e-6)
    assert found[0]["norms"] == pytest.approx(expected["norms"], rel=2e-5)
    assert found[0]["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-6)
    assert found[0]["counts"] == expected["counts"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sizes", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}], ids=str)
def test_two_processes_train_as_one(two, kind, sizes, one_thread):
    check(two, kind, sizes)


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}], ids=str)
def test_batches_in_parts(two, sizes, one_thread):
    check(two, "decoder", sizes, accumulate=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "sizes",
    [{"dp": 4}, {"fsdp": 4}, {"tp": 4}]
    + [{"dp": 2, "fsdp": 2}, {"dp": 2, "tp": 2}, {"fsdp": 2, "tp": 2}],
    ids=str,
)
def test_four_processes_train_as_one(four, kind, sizes, one_thread):
    check(four, kind, sizes, accumulate=2)


# Tensor parallelism by the gradients of each parameter

VARIANTS = {
    "rotary": ("decoder", {"positions": "rotary", "kv_heads": 2, "gated": True, "recompute": True}),
    "alibi": ("decoder", {"positions": "alibi", "post_norm": True, "documents": True}),
    "norms": (
        "decoder",
        {"norm_place": "both", "query_key_norm": "head", "norm": "rms_norm", "window": 5},
    ),
    "parallel": ("decoder", {"parallel": True, "bias": False, "attention_softcap": 5.0}),
    "padded": (
        "decoder", {"vocab_size": 28, "vocab_multiple": 16, "logit_bias": True, "pad_token": 20}
    ),
    "softcap": ("decoder", {"logit_softcap": 2.0, "logit_scale": 0.5, "scale_embedding": True}),
    "narrow": ("decoder", {"embedding_dim": 8, "positions": "none", "norm": "none"}),
    "segments": ("encoder", {"token_types": 2, "embedding_norm": True, "post_norm": False}),
    "two heads": ("encoder", {"head": "pretraining", "pooler": True}),
    "classes": ("decoder", {"head": "lm_classification", "classes": 3, "tie_embeddings": False}),
    "translation": ("encoder_decoder", {"norm": "layer_norm", "post_norm": True, "gated": False}),
    "t5": ("encoder_decoder", {"wide_output": True, "attention_scale": 1.0}),
}  # fmt: skip


def batch_of(model, kind):
    batch = Batches(kind)[3]
    batch["tokens"][:2, 3:5] = 20
    if model.config.head in ("pretraining", "lm_classification"):
        batch["targets"] = batch["targets"], torch.arange(BATCH) % 2
    if kind == "encoder":
        batch["mask"] = torch.arange(LENGTH) < torch.tensor([17, 3, 9, 16, 17, 17, 2, 5])[:, None]
    return batch


def gradients(name, sizes, objective):
    """The loss, all gradients as whole tensors, and logits in evaluation mode."""
    kind, changes = VARIANTS[name]
    changes = {"layers": 2} | changes
    recompute, documents = (changes.pop(name, False) for name in ("recompute", "documents"))
    model = tiny(kind, torch.float64, **changes)
    model.recompute = recompute
    batch, inner = batch_of(model, kind), model
    if documents:
        batch["documents"] = torch.arange(LENGTH).div(7, rounding_mode="floor").expand(BATCH, -1)
    if sizes is not None:
        model = parallelise(model, mesh(**sizes, device="cpu"))
    inputs = {name: x for name, x in batch.items() if name != "targets"}
    loss = objective(model(**inputs), batch).mean.sum()
    loss.backward()
    grads = {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = model.eval()(**inputs)
    return {
        "loss": loss.item(),
        "norm": total_norm(grads.values()).item(),
        "logits": [x.numpy() for x in (logits if isinstance(logits, tuple) else (logits,))],
        "gradients": {name: whole(g).numpy() for name, g in grads.items()},
    }


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_same(found, expected):
    """All gradients, and logits, differ by less than rounding of float64."""
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-12)
    for a, b in zip(found["logits"], expected["logits"], strict=True):
        assert abs(a - b).max() < 1e-12
    assert found["gradients"].keys() == expected["gradients"].keys()
    size = max(abs(g).max() for g in expected["gradients"].values())
    wrong = {
        name: abs(found["gradients"][name] - g).max() / size
        for name, g in expected["gradients"].items()
        if not abs(found["gradients"][name] - g).max() <= 1e-12 * size
    }
    assert not wrong


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_of_layers_have_the_gradients_of_whole_ones(two, name, one_thread):
    objective = CrossEntropy(0.1, 1e-3)
    expected = gradients(name, None, objective)
    for found in two(gradients, name, {"tp": 2}, objective):
        assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "rotary"])  # 2 key heads
def test_four_parts_of_layers(four, name, one_thread):
    objective = CrossEntropy()
    expected = gradients(name, None, objective)
    for found in four(gradients, name, {"tp": 4}, objective):
        assert_same(found, expected)
