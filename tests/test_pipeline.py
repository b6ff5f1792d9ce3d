"""Pipelines over processes against one process with the whole model."""

import itertools

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from weights import perturb

from tfkern.models import Transformer, TransformerConfig
from tfkern.train import CrossEntropy, adamw, evaluate, steps
from tfkern.train.parallel import mesh, parallelise
from tfkern.train.parallel.pipeline import Stage

B, T, S, V = 8, 7, 5, 13
SIZES = {"dim": 16, "layers": 4, "heads": 4, "vocab_size": V, "vocab_multiple": 2, "max_length": 9}
BOTH = {"architecture": "encoder_decoder", "layers": 3, "encoder_layers": 3}
CASES = {
    "tied": {},
    "positions": {"positions": "learned"},
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
    if case == "positions":  # one row for all
        batch["positions"] = torch.arange(T)[None] + 1
    if case == "bert":
        batch["token_types"] = draw(2, B, T)
        batch["targets"] = (batch["targets"], draw(2, B))
    if case == "classes":
        batch["targets"] = draw(3, B)
    if config.architecture == "encoder_decoder":
        batch["source"], batch["source_mask"] = draw(V, B, S), draw(S, B) + 1
    return batch


class Batches:
    """The part of each batch that a data rank has."""

    def __init__(self, case, rank=0, world=1):
        self.case, self.mine = case, slice(rank * B // world, (rank + 1) * B // world)

    def __getitem__(self, step):
        return pytree.tree_map(
            lambda x: x[self.mine] if len(x) == B else x, batch_of(self.case, step)
        )


def trained(model, batches, **options):
    """Records, an evaluation, and the weights behind some steps."""
    found = steps(
        model, batches, CrossEntropy(), adamw(model, 1e-3), stop=3, clip_norm=0.5, **options
    )
    told = [(*r.terms, r.norm, r.tokens) for r in found]
    told.append(evaluate(model, [batches[i] for i in (7, 8)], CrossEntropy())[1:])
    inner = getattr(model, "module", model)
    weights = {name: whole(p.detach()) for name, p in inner.named_parameters()}
    return pytree.tree_leaves(told), weights


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def alone(case, accumulate=1):
    return trained(make(case).train(), Batches(case), accumulate=accumulate)


def staged(case, sizes, options, accumulate=1):
    grid = mesh(device="cpu", **sizes)
    model = parallelise(make(case), grid, **options)
    batches = Batches(case, model.data_rank, model.data_world)
    return trained(model, batches, accumulate=accumulate)


def check(ranks, case, sizes, accumulate=1, **options):
    """Training on ranks is that on one process, and all ranks tell the same."""
    expected, weights = alone(case, accumulate)
    left = set(weights)
    for found, stage in ranks(staged, case, sizes, options, accumulate):
        assert found == pytest.approx(expected, rel=1e-10)
        for name, p in stage.items():
            torch.testing.assert_close(p, weights[name], rtol=0, atol=1e-9, msg=name)
            left.discard(name)
    assert not left


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_one_process(two, case):
    check(two, case, {"pp": 2}, microbatches=4)


@pytest.mark.parametrize("case", ["tied", "t5"])
def test_gpipe(two, case):
    check(two, case, {"pp": 2}, schedule="gpipe", microbatches=2)


def test_batches_in_parts(two):
    check(two, "tied", {"pp": 2}, accumulate=2, microbatches=2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tied", "both", "long encoder"])
@pytest.mark.parametrize("other", ["dp", "fsdp", "tp"])
def test_with_other_axes(four, case, other):
    check(four, case, {"pp": 2, other: 2}, accumulate=2, microbatches=2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_three_stages(three, case):
    """Of which the middle one has neither end, or in some models both ends of stacks."""
    check(three, case, {"pp": 3}, microbatches=4)


def evaluated(rows):
    """A loss, and the sum of the logits that the last stage returns."""
    model = parallelise(make("tied"), mesh(pp=2, device="cpu"), microbatches=4).eval()
    batch = {name: x[:rows] for name, x in batch_of("tied", 0).items()}
    loss = evaluate(model, [batch], CrossEntropy()).loss
    with torch.no_grad():
        logits = model(tokens=batch["tokens"], mask=batch["mask"])
    return loss, logits


@pytest.mark.parametrize("rows", [8, 5])
def test_evaluation(two, rows):
    """Also of a batch that cannot be cut into equal parts."""
    batch = {name: x[:rows] for name, x in batch_of("tied", 0).items()}
    model = make("tied").eval()
    expected = evaluate(model, [batch], CrossEntropy()).loss
    (first, nothing), (last, logits) = two(evaluated, rows)
    assert nothing is None
    assert (first, last) == pytest.approx((expected, expected), rel=1e-12)
    torch.testing.assert_close(logits, model(tokens=batch["tokens"], mask=batch["mask"]))


class Shorter(Batches):
    """Batches of other lengths, one after the other."""

    def __getitem__(self, step):
        return {name: x[:, : (7, 4, 7)[step % 3]] for name, x in super().__getitem__(step).items()}


def lengths_differ():
    model = parallelise(make("tied"), mesh(pp=2, device="cpu"), microbatches=2)
    return trained(model, Shorter("tied"))[0]


def test_lengths_may_differ_between_batches(two):
    expected, _ = trained(make("tied"), Shorter("tied"))
    for found in two(lengths_differ):
        assert found == pytest.approx(expected, rel=1e-10)


def tables():
    return staged("tied", {"pp": 2}, {})[1]["embedding.weight"]


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
    try:
        model = parallelise(make("tied"), mesh(pp=2, device="cpu"), **options)
        model.backward({"tokens": torch.zeros(rows, T, dtype=torch.long)}, None, None, True)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "zero"}, "schedule must be one of gpipe, 1f1b, got 'zero'"),
        ({"microbatches": 1}, "microbatches must be at least 2"),
        ({"microbatches": 3}, "8 rows cannot be cut into 3 equal microbatches"),
    ],
)
def test_wrong_values(two, options, message):
    for told in two(refused, options, 8):
        assert message in told


def half(sizes, kind):
    """Losses in 16 bits: by autocast, in float16 with a scaler, or of what FSDP casts."""
    model = make("tied").float()
    options, part = {}, (0, 1)
    cast = torch.bfloat16 if kind == "fsdp" and sizes else None
    if kind != "fsdp":
        options["precision"] = getattr(torch, kind)
        if kind == "float16":
            options["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    if sizes:
        model = parallelise(model, mesh(device="cpu", **sizes), cast, microbatches=2)
        part = model.data_rank, model.data_world
    records = steps(
        model, Batches("tied", *part), CrossEntropy(), adamw(model, 1e-2), stop=4, **options
    )
    return [record.loss for record in records if not record.skipped]


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_autocast(two, kind):
    expected = half({}, kind)
    first, last = two(half, {"pp": 2}, kind)
    assert first == last == pytest.approx(expected, rel=2e-2)
    assert len(first) == 4


@pytest.mark.slow
def test_parameters_cast_by_fsdp(four):
    expected = half({}, "fsdp")
    for found in four(half, {"pp": 2, "fsdp": 2}, "fsdp"):
        assert found == pytest.approx(expected, rel=2e-2)


def dropped():
    """Random numbers in front of each part of a batch, as dropout would draw them."""
    model = parallelise(make("tied"), mesh(pp=2, device="cpu"))
    seen = []

    hook = model.stage.register_forward_pre_hook(lambda *_: seen.append(torch.rand(())))
    next(steps(model, Batches("tied"), CrossEntropy(), adamw(model, 1e-3), stop=1))
    hook.remove()
    return seen


def test_stages_draw_other_random_numbers(two):
    first, last = two(dropped)
    assert len(first) == len(last) == 4
    assert len({x.item() for x in (*first, *last)}) == 8
