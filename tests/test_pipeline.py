"""Pipelines over processes against one process with the whole model."""

import itertools

import pytest
import torch
from ranks import Ranks
from torch import distributed
from weights import perturb

from tfkern.models import Transformer, TransformerConfig
from tfkern.train import CrossEntropy, adamw
from tfkern.train.parallel.pipeline import Pipeline, Stage

B, T, S, V = 8, 7, 5, 13
SIZES = {"dim": 16, "layers": 4, "heads": 4, "vocab_size": V, "max_length": 9}
BOTH = {"architecture": "encoder_decoder", "layers": 3, "encoder_layers": 3}
CASES = {
    "tied": {},
    "untied": {"tie_embeddings": False, "norm": "rms_norm", "positions": "rotary"},
    "narrow": {"embedding_dim": 8, "post_norm": True},
    "bert": {
        "architecture": "encoder", "head": "pretraining", "pooler": True, "post_norm": True,
        "embedding_norm": True, "token_types": 2,
    },
    "classes": {"head": "classification", "classes": 3, "pad_token": 0},
    "documents": {"positions": "relative"},
    "both": BOTH,
    "t5": BOTH | {"positions": "relative", "encoder_layers": 1, "layers": 4},
    "long encoder": BOTH | {"encoder_layers": 4, "layers": 2},
    "images": {
        "architecture": "encoder", "head": "classification", "classes": 3, "patch_size": 2,
        "image_size": 4, "channels": 1, "vocab_size": None, "max_length": None,
        "positions": "learned",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def three():
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def make(case):
    torch.manual_seed(1)
    return perturb(Transformer(TransformerConfig(**(SIZES | CASES[case])))).double()


def batch_of(case, step):
    """A batch in which the parts have unequal numbers of targets."""
    config = TransformerConfig(**(SIZES | CASES[case]))
    generator = torch.Generator().manual_seed(step)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    lengths = draw(T, B) + 1
    mask = torch.arange(T) < lengths[:, None]
    if case == "images":
        images = torch.randn(B, 1, 4, 4, generator=generator, dtype=torch.float64)
        return {"tokens": images, "targets": draw(3, B)}
    batch = {"tokens": draw(V, B, T), "mask": mask, "targets": draw(V, B, T)}
    batch["targets"][~mask] = -100
    if case == "documents":
        del batch["mask"]
        batch["documents"] = draw(2, B, T).cumsum(1)
    if case == "bert":
        batch["token_types"] = draw(2, B, T)
        batch["targets"] = (batch["targets"], draw(2, B))
    if case == "classes":
        batch["targets"] = draw(3, B)
    if config.architecture == "encoder_decoder":
        batch["source"], batch["source_mask"] = draw(V, B, S), draw(S, B) + 1
    return batch


def training(model, case, step_of, steps=3):
    """Losses, norms and weights of some steps of AdamW, with gradients by step_of(batch)."""
    optimiser = adamw(model, 1e-3)
    found = []
    for step in range(steps):
        optimiser.zero_grad()
        found.append(step_of(batch_of(case, step)))
        optimiser.step()
    return found, {name: p.detach() for name, p in model.named_parameters()}


def alone(case):
    model, objective = make(case).train(), CrossEntropy()

    def step(batch):
        inputs = {name: x for name, x in batch.items() if name != "targets"}
        loss = objective(model(**inputs), batch)
        loss.mean.sum().backward()
        return loss.mean.detach()

    return training(model, case, step)


def staged(case, schedule, microbatches):
    rank, world = distributed.get_rank(), distributed.get_world_size()
    stage = Stage(make(case), rank, world).train()
    group = distributed.group.WORLD
    pipeline = Pipeline(stage, stage, group, schedule=schedule, microbatches=microbatches)
    objective = CrossEntropy()

    def step(batch):
        whole = objective.count(batch)
        terms = pipeline.train(batch, lambda y, part: objective(y, part).share(whole))
        pipeline.reduce()
        return terms

    return training(stage, case, step)


def check(ranks, case, schedule, microbatches):
    losses, weights = alone(case)
    left = set(weights)
    for found, stage in ranks(staged, case, schedule, microbatches):
        for ours, expected in zip(found, losses, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        for name, p in stage.items():
            name = name.removeprefix("model.")
            torch.testing.assert_close(p, weights[name], rtol=0, atol=1e-9, msg=name)
            left.discard(name)
    assert not left


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_one_process(two, case):
    check(two, case, "1f1b", 4)


@pytest.mark.parametrize("case", ["tied", "t5"])
def test_gpipe(two, case):
    check(two, case, "gpipe", 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_three_stages(three, case):
    """Of which the middle one has neither end, or in some models both ends of stacks."""
    check(three, case, "1f1b", 4)


def evaluated(rows):
    rank = distributed.get_rank()
    stage = Stage(make("tied"), rank, 2).eval()
    pipeline = Pipeline(stage, stage, distributed.group.WORLD, microbatches=4)
    batch = {name: x[:rows] for name, x in batch_of("tied", 0).items()}
    return pipeline.evaluate(batch, lambda y, part: y.logsumexp(-1).sum()[None]).item()


@pytest.mark.parametrize("rows", [8, 5])
def test_evaluation(two, rows):
    batch = {name: x[:rows] for name, x in batch_of("tied", 0).items() if name != "targets"}
    expected = make("tied").eval()(**batch).logsumexp(-1).sum().item()
    assert two(evaluated, rows) == pytest.approx([expected] * 2, rel=1e-12)


def lengths_differ():
    """Losses of batches with other lengths, one after the other."""
    stage = Stage(make("tied"), distributed.get_rank(), 2)
    pipeline = Pipeline(stage, stage, distributed.group.WORLD, microbatches=2)
    found = []
    for length in (7, 4, 7):
        batch = {name: x[:, :length] for name, x in batch_of("tied", 0).items()}
        whole = CrossEntropy().count(batch)
        measure = lambda y, part, whole=whole: CrossEntropy()(y, part).share(whole)  # noqa: E731
        found.append(pipeline.train(batch, measure).item())
    return found


def test_lengths_may_differ_between_batches(two):
    expected = []
    for length in (7, 4, 7):
        batch = {name: x[:, :length] for name, x in batch_of("tied", 0).items()}
        inputs = {name: x for name, x in batch.items() if name != "targets"}
        expected.append(CrossEntropy()(make("tied")(**inputs), batch).mean.item())
    for found in two(lengths_differ):
        assert found == pytest.approx(expected, rel=1e-12)


def tables():
    found, weights = staged("tied", "1f1b", 4)
    return weights["model.embedding.weight"]


def test_tied_weights_stay_equal_bit_by_bit(two):
    first, last = two(tables)
    assert torch.equal(first, last)


def names_of(case, count):
    stages = [Stage(make(case), i, count) for i in range(count)]
    return [{name.removeprefix("model.") for name in stage.state_dict()} for stage in stages]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_stages_share_what_is_tied_and_nothing_else(case, count):
    names = names_of(case, count)
    assert set().union(*names) == set(make(case).state_dict())
    both = {name for a, b in itertools.combinations(names, 2) for name in a & b}
    tied = {"embedding.weight"}
    tied |= {name for name in make(case).state_dict() if "positions.weight" in name}
    untied = case in ("untied", "images", "classes")
    assert both <= (set() if untied else tied)
    assert untied or "embedding.weight" in both


def test_more_stages_than_blocks():
    with pytest.raises(ValueError, match="5 stages needs as many blocks, and the model has 4"):
        Stage(make("tied"), 0, 5)


def refused(options, rows):
    stage = Stage(make("tied"), distributed.get_rank(), 2)
    try:
        pipeline = Pipeline(stage, stage, distributed.group.WORLD, **options)
        pipeline.train({"tokens": torch.zeros(rows, T, dtype=torch.long)}, None)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "zero"}, "schedule must be one of gpipe, 1f1b, got 'zero'"),
        ({"microbatches": 1}, "microbatches must be at least 2"),
        ({"microbatches": 3}, "a batch of 8 rows cannot be cut into 3 equal microbatches"),
    ],
)
def test_wrong_values(two, options, message):
    for told in two(refused, options, 8):
        assert message in told
