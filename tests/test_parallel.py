"""Models on several processes train as on one: every way to share work, by architecture."""

import pytest
import torch
from ranks import Ranks

from tfkern.models import Transformer, TransformerConfig
from tfkern.train.evaluate import evaluate
from tfkern.train.objective import CrossEntropy
from tfkern.train.optimisers import adamw
from tfkern.train.parallel import mesh, parallelise
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
@pytest.mark.parametrize("sizes", [{"dp": 4}, {"fsdp": 4}, {"dp": 2, "fsdp": 2}], ids=str)
def test_four_processes_train_as_one(four, kind, sizes, one_thread):
    check(four, kind, sizes, accumulate=2)
