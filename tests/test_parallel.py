"""Models on several processes train as on one: every way to share work, by architecture."""

import math
import zlib

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tfkern.models import Transformer, TransformerConfig, cross_entropy
from tfkern.train.evaluate import evaluate
from tfkern.train.objective import CrossEntropy
from tfkern.train.optimisers import adamw, optimiser
from tfkern.train.parallel import Parallel, gather, mesh, parallelise
from tfkern.train.parallel.gradients import agree_on_overflow, clamp, clip, total_norm
from tfkern.train.steps import steps

VOCAB, LENGTH, BATCH, STEPS = 24, 17, 8, 6
SMALL = {"vocab_size": VOCAB, "max_length": 24, "dim": 16, "layers": 4, "heads": 4}
MODELS = {
    "decoder": {},
    "encoder": {"architecture": "encoder", "head": "mlm", "post_norm": True},
    "encoder_decoder": {
        "architecture": "encoder_decoder", "positions": "relative", "norm": "rms_norm",
        "gated": True, "start_token": 0, "layers": 2, "encoder_layers": 2, "tie_embeddings": False,
    },
}  # fmt: skip


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


def train(kind, sizes, changes, options, updates="adamw"):
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
            model, batches, CrossEntropy(0.1, 1e-3), optimiser(updates, model, 1e-3), stop=STEPS,
            clip_norm=1.0,
            **options,
        )
    )  # fmt: skip
    before = list(model.parameters())
    found = evaluate(model, [batches[i] for i in (7, 8)], CrossEntropy())
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    return {
        "losses": [r.loss for r in records] + [found.loss],
        "norms": [r.norm for r in records],
        "counts": [r.tokens for r in records] + list(found.accuracies),
    }


_alone = {}


def check(ranks, kind, sizes, changes=None, updates="adamw", tolerance=5e-6, **options):
    """Training on ranks is that on one process, and all ranks tell the same."""
    changes = changes or {}
    key = str((kind, changes, updates, options))
    if key not in _alone:
        _alone[key] = train(kind, None, changes, options, updates)
    expected = _alone[key]
    found = ranks(train, kind, sizes, changes, options, updates)
    assert all(f == found[0] for f in found)
    assert found[0]["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert found[0]["norms"] == pytest.approx(expected["norms"], rel=tolerance / 5)
    assert found[0]["counts"] == expected["counts"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sizes", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}, {"cp": 2}], ids=str)
def test_two_processes_train_as_one(two, kind, sizes, one_thread):
    check(two, kind, sizes)


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}, {"cp": 2}], ids=str)
def test_batches_in_parts(two, sizes, one_thread):
    check(two, "decoder", sizes, accumulate=3)


# Muon computes in bfloat16, and so rounds sums over processes in another way.
@pytest.mark.parametrize("updates, tolerance", [("lion", 5e-6), ("muon", 2e-3)])
@pytest.mark.parametrize("sizes", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}], ids=str)
def test_optimisers(two, sizes, updates, tolerance, one_thread):
    check(two, "decoder", sizes, updates=updates, tolerance=tolerance)


def cp_beside(axis):
    with pytest.raises(ValueError, match=f"cp 2 cannot be combined with {axis} 2 yet"):
        parallelise(tiny("decoder"), mesh(**{"cp": 2, axis: 2}, device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_sequences_are_not_cut_beside_layers_or_stages(four, axis):
    four(cp_beside, axis)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "sizes",
    [{"dp": 4}, {"fsdp": 4}, {"tp": 4}]
    + [{"dp": 2, "fsdp": 2}, {"dp": 2, "tp": 2}, {"fsdp": 2, "tp": 2}]
    + [{"cp": 4}, {"dp": 2, "cp": 2}, {"fsdp": 2, "cp": 2}],
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
    "one token": ("decoder", {}),
    "images": (
        "encoder",
        {
            "vocab_size": None, "max_length": None, "image_size": 8, "patch_size": 4, "classes": 3,
            "head": "classification",
        },
    ),
}  # fmt: skip


def batch_of(name, model, kind):
    batch = Batches(kind)[3]
    if name == "one token":
        return {name: x[:, :1] for name, x in batch.items()}
    if name == "images":
        images = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return {"tokens": images.double(), "targets": torch.arange(BATCH) % 3}
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
    batch, inner = batch_of(name, model, kind), model
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


# ---- what processes tell each other ----


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not isinstance(x, DTensor):
                self.size = max(self.size, x.numel())
        return result


def largest(deferred):
    model = tiny("decoder", vocab_size=4096)
    parallel = parallelise(model, mesh(tp=2, device="cpu"))
    model.vocabulary.deferred = deferred
    with Largest() as found:
        batch = Batches("decoder")[0]
        CrossEntropy(0.1)(parallel(tokens=batch["tokens"]), batch).mean.sum().backward()
    return found.size


def test_no_process_has_the_logits_of_the_whole_vocabulary(two, one_thread):
    logits = BATCH * LENGTH * 4096
    assert all(size <= logits // 2 for size in two(largest, True))
    assert all(size >= logits for size in two(largest, False))  # so they would be seen


def clipped():
    """Norms of plain gradients beside DTensors of two meshes, and the clipped gradients."""
    grid = mesh(dp=2, device="cpu")
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
    half = full[2].tensor_split(2)[distributed.get_rank()]
    grads = [
        full[0].clone(),
        distribute_tensor(full[1].clone(), grid["dp"], [Replicate()]),
        DTensor.from_local(half.clone(), grid["dp"], [Shard(0)]),
        distribute_tensor(full[3].clone(), grid["fsdp", "dp"], [Replicate(), Shard(1)]),
    ]
    parameters = [torch.nn.Parameter(g.clone()) for g in grads]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g.clone()
    with pytest.raises(RuntimeError, match="mixed"):
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    with pytest.raises(ValueError, match="still to be summed"):
        total_norm([DTensor.from_local(half, grid["dp"], [Partial()])])
    norm = total_norm(grads).item()
    clip(grads, 1.0, norm)
    found = [whole(g).clone().numpy() for g in grads]
    clamp(grads, 0.05)
    return norm, found, [whole(g).numpy() for g in grads], [x.numpy() for x in full]


def test_plain_gradients_and_distributed_ones_have_one_norm(two):
    for norm, found, clamped, full in two(clipped):
        expected = math.sqrt(sum((x**2).sum() for x in full))
        assert norm == pytest.approx(expected, rel=1e-12)
        for a, b, c in zip(found, clamped, full, strict=True):
            assert a == pytest.approx(c / expected, rel=1e-5)
            assert b == pytest.approx((c / expected).clip(-0.05, 0.05), rel=1e-5)


def overflowing(sizes):
    """Float16 with a gradient that is infinite in step 3, in the shard of rank 1 alone."""
    model = parallelise(tiny("decoder"), mesh(**sizes, device="cpu"))
    calls = iter(range(9))

    def broken(p):
        if next(calls) == 2 and distributed.get_rank() == 1:
            p.grad.to_local().fill_(math.inf)

    first = model.module.decoder.blocks[0].mlp.fc1.weight
    first.register_post_accumulate_grad_hook(broken)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    batches = Batches("decoder", model.data_rank, model.data_world)
    told = []
    for record in steps(
        model, batches, CrossEntropy(), adamw(model, 1e-3), stop=4, clip_norm=1.0,
        precision=torch.float16, scaler=scaler,
    ):  # fmt: skip
        weight = whole(model.module.decoder.blocks[1].mlp.fc2.weight.detach())
        told.append((record.skipped, scaler.get_scale(), weight.sum().item()))
    return told


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {"tp": 2}], ids=str)
def test_an_overflow_on_one_process_leaves_the_step_out_on_all(two, sizes, one_thread):
    found = two(overflowing, sizes)
    assert found[0] == found[1]
    skipped, scales, weights = zip(*found[0], strict=True)
    assert skipped == (False, False, True, False)
    assert scales == (256.0, 256.0, 128.0, 128.0)
    assert weights[2] == weights[1] != weights[3]


def disagreeing():
    """What a scaler makes of a gradient that is infinite in rank 1 only, as in a stage."""
    p = torch.nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([p], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(p.sum() * (math.inf if distributed.get_rank() == 1 else 1.0)).backward()
    scaler.unscale_(sgd)
    agree_on_overflow(scaler, sgd)
    scaler.step(sgd)
    scaler.update()
    return p.tolist(), scaler.get_scale()


def test_scalers_agree(two):
    assert two(disagreeing) == [([1.0, 1.0], 128.0)] * 2


def diverging():
    model = parallelise(tiny("decoder"), mesh(tp=2, device="cpu"))
    model.module.decoder.norm.weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(FloatingPointError, match="largest: decoder.norm.weight nan, ") as error:
        list(steps(model, Batches("decoder"), CrossEntropy(), adamw(model, 1e-3), stop=1))
    return str(error.value)


def test_all_processes_tell_of_a_loss_that_diverges(two, one_thread):
    first, second = two(diverging)
    assert first == second


# Dropout


def random_states(sizes):
    """States of the generator where the stream is whole, within blocks, and behind them."""
    model = parallelise(
        tiny("decoder", dropout=0.5, attention_dropout=0.5), mesh(**sizes, device="cpu")
    )
    states = []

    def keep(*_):
        states.append(zlib.crc32(torch.get_rng_state().numpy()))

    for module in (model.module.embedding, model.module.decoder.blocks[1], model.module.vocabulary):
        module.register_forward_hook(keep)
    batches = Batches("decoder", model.data_rank, model.data_world)
    losses = [
        r.loss
        for r in steps(model, batches, CrossEntropy(), adamw(model, 1e-2), stop=3, clip_norm=1.0)
    ]
    same = [
        p.to_local().detach().numpy()
        for p in model.parameters()
        if isinstance(p, DTensor) and p.placements == (Replicate(),)
    ]
    return states, same, losses


def test_dropout_differs_by_data_rank(two, one_thread):
    (first, *_), (second, *_) = two(random_states, {"dp": 2})
    assert not set(first) & set(second)


def test_dropout_differs_by_tp_rank_where_the_stream_is_cut(two, one_thread):
    (first, weights, losses), (second, others, same) = two(random_states, {"tp": 2})
    embedded, within, behind = first[::3], first[1::3], first[2::3]
    assert (embedded, behind) == (second[::3], second[2::3])
    assert not set(within) & set(second[1::3])
    assert len(set(first)) == len(first)
    assert losses == same
    for a, b in zip(weights, others, strict=True):
        assert (a == b).all()


def recomputed(recompute):
    model = tiny(
        "decoder", torch.float64, dropout=0.3, attention_dropout=0.3, embedding_dropout=0.2
    )
    model.recompute = recompute
    parallel = parallelise(model, mesh(fsdp=1, tp=2, device="cpu"))
    batch = Batches("decoder")[0]
    torch.manual_seed(1)
    losses = []
    for training in (True, False, True):  # what backward has drawn is of no effect later
        loss = CrossEntropy()(parallel.train(training)(tokens=batch["tokens"]), batch).mean.sum()
        loss.backward()
        losses.append(loss.item())
    return losses, [whole(p.grad).numpy() for p in model.parameters()]


def test_what_is_recomputed_has_the_same_dropout(two, one_thread):
    for kept, again in zip(two(recomputed, False), two(recomputed, True), strict=True):
        assert kept[0] == again[0] and kept[0][0] != kept[0][2]
        for a, b in zip(kept[1], again[1], strict=True):
            assert abs(a - b).max() <= 1e-12


# Precision, and parameters that are not used


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}], ids=str)
def test_autocast(two, sizes, one_thread):
    """Losses of bfloat16 are about as far from those of float32 on two processes as on one."""
    options = {"precision": torch.bfloat16}
    exact = train("decoder", None, {}, {})["losses"]
    alone = train("decoder", None, {}, options)["losses"]
    found = two(train, "decoder", sizes, {}, options)[0]["losses"]
    assert found != alone
    limit = 5 * max(abs(a - b) for a, b in zip(alone, exact, strict=True))
    assert max(abs(a - b) for a, b in zip(found, exact, strict=True)) < limit


def sharded(precision):
    """Losses, and the dtypes of parameters, their gradients and what a block returns."""
    model = parallelise(tiny("decoder"), mesh(fsdp=2, device="cpu"), precision)
    dtypes = set()
    model.module.decoder.blocks[1].mlp.register_forward_hook(lambda m, a, y: dtypes.add(y.dtype))
    batches = Batches("decoder", model.data_rank, model.data_world)
    records = steps(model, batches, CrossEntropy(), adamw(model, 1e-3), stop=STEPS, clip_norm=1.0)
    losses = [r.loss for r in records]
    held = {x.dtype for p in model.parameters() for x in (p, p.grad)}
    return losses, [str(d) for d in dtypes], [str(d) for d in held]


def test_shards_are_gathered_in_a_narrower_dtype(two, one_thread):
    exact, _, _ = two(sharded, None)[0]
    losses, blocks, held = two(sharded, torch.bfloat16)[0]
    assert blocks == ["torch.bfloat16"] and held == ["torch.float32"]
    assert losses != exact
    assert losses == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}], ids=str)
def test_parameters_may_be_unused(two, sizes, one_thread):
    check(two, "encoder", sizes, {"pooler": True, "layers": 1})


# Compiled models


def compiled(kind, sizes):
    torch._dynamo.reset()
    model = tiny(kind, layers=1)
    model.compile(backend="aot_eager")
    model = parallelise(model, mesh(**sizes, device="cpu"))
    batches = Batches(kind, model.data_rank, model.data_world)
    return [r.loss for r in steps(model, batches, CrossEntropy(), adamw(model, 1e-3), stop=2)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}], ids=str)
def test_compiled_models(two, sizes, one_thread):
    model = tiny("decoder", layers=1)
    expected = [
        r.loss for r in steps(model, Batches("decoder"), CrossEntropy(), adamw(model, 1e-3), stop=2)
    ]
    for found in two(compiled, "decoder", sizes):
        assert found == pytest.approx(expected, abs=5e-6)


def test_a_model_is_compiled_before_it_is_spread():
    model = torch.compile(Parallel(torch.nn.Linear(2, 2)), backend="eager")
    with pytest.raises(ValueError, match=r"compile the model before: model.compile\(\)"):
        steps(model, [], CrossEntropy(), torch.optim.SGD(model.parameters()))


# Refusals

WRONG = [
    ({"tp": 2}, {"kv_heads": 1}, "kv_heads must be a multiple of tp, got 1 and tp 2"),
    ({"tp": 2}, {"hidden_dim": 7}, "hidden_dim must be a multiple of tp, got 7"),
    ({"tp": 2}, {"vocab_size": 25}, "vocab_multiple must be a multiple of tp, got 25"),
    ({"tp": 2}, {"vocab_size": 16, "vocab_multiple": 32}, "would have no tokens: vocab_size 16"),
    ({"tp": 2}, {"norm": "batch_norm"}, "takes no batch_norm"),
    ({"tp": 2}, {"norm": "weight_norm"}, "takes no weight_norm"),
    ({"tp": 2}, {"norm": "rms_norm", "query_key_norm": "all"}, "no norm of all heads"),
    ({"tp": 2}, {"int8": True}, "no int8 weights"),
]


def refusals():
    found = []
    for sizes, changes, told in WRONG:
        config = TransformerConfig(**SMALL | MODELS["decoder"] | changes)
        with pytest.raises(ValueError, match=told):
            parallelise(Transformer(config), mesh(**sizes, device="cpu"))
        found.append(told)
    with pytest.raises(ValueError, match="needs a Transformer, got Linear"):
        parallelise(torch.nn.Linear(2, 2), mesh(tp=2, device="cpu"))
    with pytest.raises(ValueError, match="cp needs a tfkern.models.Transformer, got Linear"):
        parallelise(torch.nn.Linear(2, 2), mesh(cp=2, device="cpu"))
    with pytest.raises(ValueError, match="precision torch.bfloat16 needs fsdp"):
        parallelise(torch.nn.Linear(2, 2), mesh(dp=2, device="cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match="the mesh must have the axes"):
        parallelise(torch.nn.Linear(2, 2), mesh(dp=2, device="cpu")["dp"])
    with pytest.raises(ValueError, match="the mesh is of cpu, and the model on .*meta"):
        parallelise(torch.nn.Linear(2, 2, device="meta"), mesh(dp=2, device="cpu"))
    return found


def test_what_cannot_be_spread_is_refused(two):
    assert all(len(found) == len(WRONG) for found in two(refusals))


def wrong_numbers():
    """Tokens and targets that no process has."""
    model = tiny("decoder")
    parallel = parallelise(model, mesh(tp=2, device="cpu"))
    batch = Batches("decoder")[0]
    with pytest.raises(IndexError):
        parallel(tokens=torch.full((1, 2), VOCAB))
    output = parallel(tokens=batch["tokens"])
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 24\) or be -100"):
        cross_entropy(
            output, batch["targets"].clamp(max=VOCAB).masked_fill(batch["targets"] > 3, VOCAB)
        )
    return True


def test_tokens_outside_of_the_vocabulary_are_refused(two):
    assert all(two(wrong_numbers))


def refusals_to_gather():
    model = parallelise(torch.nn.Linear(2, 2), mesh(dp=2, device="cpu"))
    with pytest.raises(ValueError) as raised:
        gather(model)
    return str(raised.value)


def test_all_processes_refuse_to_gather_another_model(two):
    told = "only a tfkern.models.Transformer can be gathered, got Linear"
    assert two(refusals_to_gather) == [told, told]
