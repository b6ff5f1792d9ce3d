"""Learning from preferences: losses by the formulas of their papers, references, data and runs."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from tfkern.models import Transformer, TransformerConfig
from tfkern.models.heads import DeferredLogits
from tfkern.train import adamw, evaluate, steps
from tfkern.train.objectives import objective as made
from tfkern.train.parallel import mesh, parallelise
from tfkern.train.preferences import (
    DPO,
    IPO,
    KTO,
    ORPO,
    PREFERENCES,
    Hinge,
    Known,
    Reference,
    Rewards,
    SimPO,
    frozen,
)

VOCAB, LENGTH, IGNORED = 32, 12, -100
FIELDS = {"vocab_size": VOCAB, "max_length": 20, "architecture": "decoder"}
SMALL = {"dim": 16, "layers": 2, "heads": 2}


@pytest.fixture(autouse=True)
def _small(one_thread):
    """All models here are small."""


def tiny(dtype=torch.float64, seed=0, **changes):
    """A small model whose parameters are all random: initial biases of 0 would hide mistakes."""
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(**FIELDS | SMALL | changes)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def pairs(count, seed=0, length=LENGTH, pad=0):
    """Pairs with a prompt of 2 to 4 tokens and answers of 1 to 7, padded on the right."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    tokens = torch.full((count, 2, length), pad)
    targets = torch.full((count, 2, length), IGNORED)
    mask = torch.zeros(count, 2, dtype=torch.long)
    for i in range(count):
        prompt = draw(1, VOCAB, int(draw(2, 5)))
        for j in range(2):
            row = torch.cat([prompt, draw(1, VOCAB, int(draw(1, 8)))])
            tokens[i, j, : len(row)], mask[i, j] = row, len(row)
            targets[i, j, len(prompt) - 1 : len(row) - 1] = row[len(prompt) :]
    return {"tokens": tokens, "mask": mask, "targets": targets}


def summed(logits, targets):
    """The log-probability of each answer and its length, token by token."""
    log_probs = F.log_softmax(logits.double(), -1)
    sums = log_probs.new_zeros(targets.shape[:-1])
    lengths = torch.zeros_like(sums)
    for *row, t in (targets != IGNORED).nonzero().tolist():
        place = tuple(row)
        sums[place] = sums[place] + log_probs[(*place, t, int(targets[(*place, t)]))]
        lengths[place] += 1
    return sums, lengths


def drawn(count=5, seed=1):
    """Logits for pairs, and a reference near to them."""
    batch = pairs(count, seed)
    torch.manual_seed(seed)
    logits = torch.randn(count, 2, LENGTH, VOCAB, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        near = summed(logits + 0.5 * torch.randn_like(logits), batch["targets"])[0]
    return logits, batch | {"targets": (batch["targets"], near)}


# Formulas of the losses: y of log-probabilities (B, 2), r of the reference, n tokens, beta b


def dpo(y, r, n, b=0.1):
    ratio = (y[:, 0] - r[:, 0]) - (y[:, 1] - r[:, 1])
    return -torch.log(1 / (1 + torch.exp(-b * ratio)))


def flipped(y, r, n, b=0.1):
    return dpo(y.flip(1), r.flip(1), n, b)


def averaged(y, r, n, b=0.1):
    return dpo(y / n, r / n, n, b)


def hinge(y, r, n, b=0.1):
    return (1 - b * ((y[:, 0] - r[:, 0]) - (y[:, 1] - r[:, 1]))).clamp(min=0)


def ipo(y, r, n, b=0.1):
    mean = (y - r) / n
    return (mean[:, 0] - mean[:, 1] - 1 / (2 * b)) ** 2


def simpo(y, r, n, b=2.0, gamma=1.0):
    margin = b / n[:, 0] * y[:, 0] - b / n[:, 1] * y[:, 1] - gamma
    return -torch.log(1 / (1 + torch.exp(-margin)))


def orpo(y, r, n, weight=0.1):
    p = torch.exp(y / n)
    odds = p / (1 - p)
    return -weight * torch.log(1 / (1 + torch.exp(-torch.log(odds[:, 0] / odds[:, 1]))))


FORMULAS = {
    "dpo": (DPO(), dpo),
    "dpo, other beta": (DPO(beta=0.7), lambda y, r, n: dpo(y, r, n, 0.7)),
    "conservative": (
        DPO(label_smoothing=0.2), lambda *a: 0.8 * dpo(*a) + 0.2 * flipped(*a),
    ),
    "robust": (
        DPO(label_smoothing=0.2, robust=True),
        lambda *a: (0.8 * dpo(*a) - 0.2 * flipped(*a)) / 0.6,
    ),
    "dpo per token": (DPO(per_token=True), averaged),
    "hinge": (Hinge(beta=0.7), lambda y, r, n: hinge(y, r, n, 0.7)),
    "ipo": (IPO(), ipo),
    "ipo of sums": (IPO(per_token=False), lambda y, r, n: ipo(y, r, torch.ones_like(n))),
    "simpo": (SimPO(), simpo),
    "simpo, other options": (
        SimPO(beta=0.5, gamma=0.3), lambda y, r, n: simpo(y, r, n, 0.5, 0.3)
    ),
    "orpo": (ORPO(nll=0.0), orpo),
    "orpo, other weight": (ORPO(nll=0.0, weight=0.5), lambda y, r, n: orpo(y, r, n, 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMULAS)
def test_losses_match_their_papers(kind):
    objective, formula = FORMULAS[kind]
    logits, batch = drawn()
    targets, reference = batch["targets"]
    found = objective(logits, batch)
    y, n = summed(logits, targets)
    expected = formula(y, reference, n).mean()
    assert found.count.tolist() == objective.count(batch).tolist() == [len(targets)]
    torch.testing.assert_close(found.mean, expected[None], atol=1e-12, rtol=1e-12)
    (ours,) = torch.autograd.grad(found.mean.sum(), logits)
    (theirs,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("objective", [DPO(nll=0.7), ORPO(), SimPO(nll=0.7)], ids=repr)
def test_likelihood_of_chosen_answers(objective):
    """It is a first term: a mean over tokens, not over answers."""
    logits, batch = drawn()
    y, n = summed(logits, batch["targets"][0])
    found = objective(logits, batch)
    factor = 1.0 if isinstance(objective, ORPO) else 0.7
    assert found.mean[0].item() == pytest.approx(-factor * (y[:, 0].sum() / n[:, 0].sum()).item())
    assert found.count.tolist() == [int(n[:, 0].sum()), len(y)]
    alone = type(objective)(nll=0.0)(logits, batch)
    assert found.mean[1].item() == pytest.approx(alone.mean.item(), abs=1e-14)


@pytest.mark.parametrize("labels", [[True, False, True, True, False], [False] * 5], ids=str)
def test_kto_matches_its_paper(labels):
    logits, batch = drawn()
    targets, reference = (x[:, 0] for x in batch["targets"])
    labels = torch.tensor(labels)
    z = torch.tensor(0.3).expand(5)
    objective = KTO(beta=0.4, desirable=1.2, undesirable=0.7)
    batch = {"targets": (targets, labels, reference, z)}
    found = objective(logits[:, 0], batch)
    ratios = summed(logits[:, 0], targets)[0] - reference
    expected = torch.stack(
        [
            1.2 * (1 - 1 / (1 + torch.exp(-0.4 * (r - 0.3))))
            if label
            else 0.7 * (1 - 1 / (1 + torch.exp(-0.4 * (0.3 - r))))
            for r, label in zip(ratios, labels, strict=True)
        ]
    ).mean()
    assert found.mean.item() == pytest.approx(expected.item(), abs=1e-7)
    assert found.count.tolist() == [5]
    right = sum(bool(r > 0.3) == bool(label) for r, label in zip(ratios, labels, strict=True))
    assert objective.right(logits[:, 0], batch).tolist() == [right]
    (ours,) = torch.autograd.grad(found.mean.sum(), logits)
    (theirs,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_rewards_match_their_papers():
    torch.manual_seed(0)
    rewards = torch.randn(6, 2, 1, dtype=torch.float64)
    margins = torch.tensor([0.0, 1.0, 0.5, 0.0, -0.5, 2.0])
    batch = {"targets": margins}
    chosen, rejected = rewards[:, 0, 0], rewards[:, 1, 0]
    loss = -torch.log(1 / (1 + torch.exp(-(chosen - rejected - margins)))).mean()
    found = Rewards()(rewards, batch)
    assert found.mean.tolist() == pytest.approx([loss.item()])
    assert found.count.tolist() == [6]
    found = Rewards(centre=0.3)(rewards, batch)
    centred = 0.3 * sum((a + b) ** 2 for a, b in zip(chosen, rejected, strict=True)) / 6
    assert found.mean.tolist() == pytest.approx([loss.item(), centred.item()])
    assert found.count.tolist() == [6, 6]
    right = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    assert Rewards(centre=0.3).right(rewards, batch).tolist() == [right, right]


def test_rewards_that_are_equal():
    equal = torch.full((3, 2, 1), 0.7)
    found = Rewards()(equal, {"targets": torch.zeros(3)})
    assert found.mean.item() == pytest.approx(math.log(2), abs=1e-6)


# TRL's own losses, where it is installed


class Heads:
    """What TRL's models return of logits: log-probabilities of labels, 0 where there is none."""

    def __init__(self, logits):
        self.logits, self.training = logits, True

    def __call__(self, labels, **inputs):
        labels, logits = labels[:, 1:], self.logits[:, :-1]
        found = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        nothing = torch.zeros_like(found)
        return SimpleNamespace(
            log_probs=found, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(),
            log_sum_sq_probs=nothing,
        )  # fmt: skip


class Alone:
    """The accelerator of one process."""

    device = torch.device("cpu")

    @staticmethod
    def gather(x):
        return x

    gather_for_metrics = gather


def trainer(**options):
    """What a trainer of TRL reads of itself when it computes a loss."""
    from collections import defaultdict

    options = {
        "accelerator": Alone, "aux_loss_enabled": False, "use_weighting": False, "ld_alpha": None,
        "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "loss_weights": [1.0],
        "label_smoothing": 0.0, "beta": 0.1, "_total_train_tokens": 0, "_tp_size": 1,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)}, **options,
    }  # fmt: skip
    return SimpleNamespace(**options)


def flattened(batch):
    """A batch of ours as theirs: all chosen rows, then all rejected ones."""
    targets = batch["targets"][0].transpose(0, 1).flatten(0, 1)
    tokens = batch["tokens"].transpose(0, 1).flatten(0, 1)
    answer = F.pad(targets != IGNORED, (1, 0))[:, :-1]
    return {"input_ids": tokens, "completion_mask": answer.long(), "attention_mask": tokens > 0}


THEIRS = {
    "sigmoid": (DPO(), {}),
    "sigmoid_norm": (DPO(per_token=True), {}),
    "hinge": (Hinge(), {}),
    "ipo": (IPO(), {}),
    "robust": (DPO(label_smoothing=0.1, robust=True), {"label_smoothing": 0.1}),
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("nll", [0.0, 0.5])
def test_losses_are_those_of_trl(kind, nll):
    theirs = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    objective, options = THEIRS[kind]
    objective = dataclasses.replace(objective, nll=nll)
    logits, batch = drawn()
    inputs = flattened(batch)
    ours = objective(logits, batch).mean.sum()
    model = Heads(logits.transpose(0, 1).flatten(0, 1))
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = batch["targets"][1].unbind(1)
    weights = {"loss_types": [kind, "sft"], "loss_weights": [1.0, nll]}
    expected = theirs._compute_loss(
        trainer(model=model, **options, **weights), model, inputs, False
    )
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)


def test_conservative_loss_is_that_of_trl():
    theirs = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    logits, batch = drawn()
    y, _ = summed(logits, batch["targets"][0])
    ratios = y - batch["targets"][1]
    options = {"loss_type": "sigmoid", "label_smoothing": 0.2, "alpha": 0.0}
    losses, *rewards = theirs.cpo_loss(trainer(**options), *ratios.unbind(1))
    objective = DPO(label_smoothing=0.2)
    assert objective(logits, batch).mean.item() == pytest.approx(losses.mean().item(), abs=1e-6)
    torch.testing.assert_close(objective.rewards(logits, batch), torch.stack(rewards, 1))


def test_simpo_is_that_of_trl():
    theirs = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    logits, batch = drawn()
    y, n = summed(logits, batch["targets"][0])
    options = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": 0.1}
    losses, *_ = theirs.cpo_loss(trainer(alpha=0.0, **options), *(y / n).unbind(1))
    found = SimPO(gamma=0.7, label_smoothing=0.1)(logits, batch)
    assert found.mean.item() == pytest.approx(losses.mean().item(), abs=1e-6)


def test_orpo_is_that_of_trl():
    theirs = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    logits, batch = drawn()
    y, n = summed(logits, batch["targets"][0])
    losses, *_ = theirs.odds_ratio_loss(trainer(), *(y / n).unbind(1))
    found = ORPO()(logits, batch)
    assert found.mean[1].item() == pytest.approx(-losses.mean().item(), abs=1e-6)


def test_kto_is_that_of_trl():
    theirs = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    logits, batch = drawn()
    labels = torch.tensor([True, False, True, True, False])
    first = {"tokens": batch["tokens"][:, :1], "targets": (batch["targets"][0][:, :1],)}
    inputs = flattened(first) | {"label": labels}
    inputs["ref_logps"], inputs["ref_KL_logps"] = batch["targets"][1].unbind(1)
    policy = batch["targets"][1][:, 1] + torch.tensor([0.5, -0.1, 0.9, 0.2, 0.0])
    told = trainer(
        model=SimpleNamespace(training=True), calculate_KL=True, loss_type="kto",
        _compute_kl_logps=lambda model, batch: policy, desirable_weight=1.2, undesirable_weight=0.7,
    )  # fmt: skip
    expected = theirs._compute_loss(told, Heads(logits[:, 0]), inputs, False)
    z = torch.full((5,), 0.3, dtype=torch.float64)
    objective = KTO(desirable=1.2, undesirable=0.7)
    known = (batch["targets"][0][:, 0], labels, batch["targets"][1][:, 0], z)
    ours = objective(logits[:, 0], {"targets": known})
    assert ours.mean.item() == pytest.approx(expected.item(), abs=1e-6)


def test_rewards_are_those_of_trl():
    theirs = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
    torch.manual_seed(0)
    rewards, margins = torch.randn(6, 2, 1, dtype=torch.float64), torch.rand(6)

    def model(**inputs):
        return SimpleNamespace(logits=rewards.transpose(0, 1).flatten(0, 1))

    told = trainer(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=0.01),
    )
    inputs = {"margin": margins, "attention_mask": torch.ones(12, 3)}
    expected = theirs.compute_loss(told, model, inputs)
    found = Rewards(centre=0.01)(rewards, {"targets": margins})
    assert found.mean.sum().item() == pytest.approx(expected.item(), abs=1e-6)


# References


REFERENCED = [DPO(), DPO(nll=0.5), Hinge(), IPO()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_of_a_model_that_is_its_reference(dtype):
    model = tiny(dtype, dropout=0.3)
    objective = DPO()
    (batch,) = objective.extended([pairs(6)], model)
    found = evaluate(model, [batch], objective)
    assert found.loss == pytest.approx(math.log(2), abs=1e-6)
    assert found.accuracies == (0.0,)  # no margin is above 0
    for hinge, loss in ((Hinge(), 1.0), (IPO(), 25.0)):
        assert evaluate(model, [batch], hinge).loss == pytest.approx(loss, rel=1e-5)


def by_torch(model, batch):
    """The log-probabilities of answers, of each row alone and without padding."""
    found = torch.zeros(batch["targets"].shape[:-1], dtype=torch.float64)
    for i, j in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        length = int(batch["mask"][i, j])
        row = batch["tokens"][i, j, :length]
        with torch.no_grad():
            found[i, j], _ = summed(model(row[None])[0], batch["targets"][i, j, :length])
    return found


@pytest.mark.parametrize("deferred", [False, True])
def test_reference_is_the_model_at_the_start(deferred):
    """Without dropout, without a gradient, and whatever becomes of the model."""
    model = tiny(dropout=0.3)
    model.vocabulary.deferred = deferred
    model.train()
    batch = pairs(4)
    expected = by_torch(copy.deepcopy(model).eval(), batch)
    extended = DPO().extended([batch], model)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    targets, found = extended[0]["targets"]
    assert torch.equal(targets, batch["targets"])
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert all(module.training for module in model.modules())
    assert extended[0]["tokens"] is batch["tokens"] and len(extended) == 1
    done = extended[0]
    assert DPO().extended([done], model)[0] is done


def test_log_probabilities_do_not_depend_on_padding():
    model = tiny()
    short, long, other = pairs(4, length=LENGTH), pairs(4, length=19), pairs(4, pad=7)
    found = [Reference(model)(batch) for batch in (short, long, other)]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], atol=1e-12, rtol=0)
    losses = []
    for batch in (short, long, other):
        (batch,) = DPO().extended([batch], tiny(seed=1))
        losses.append(evaluate(model, [batch], DPO(nll=1.0)).terms)
    assert losses[1] == pytest.approx(losses[0], abs=1e-12)
    assert losses[2] == pytest.approx(losses[0], abs=1e-12)


class Switched(nn.Module):
    """A model with an addition to its logits that can be switched off."""

    def __init__(self, model):
        super().__init__()
        self.model, self.on = model, True
        self.more = nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))

    def forward(self, **inputs):
        return self.model(**inputs) + (self.more if self.on else 0)

    def off(self):
        return Off(self)


class Off:
    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.model.on = False

    def __exit__(self, *error):
        self.model.on = True


def test_references_of_other_kinds_are_one():
    """A model, the trained model in a context, and a function: all of them without dropout."""
    base, batch = tiny(dropout=0.3), pairs(4)
    expected = by_torch(copy.deepcopy(base).eval(), batch)
    model = Switched(base).train()
    function = Reference(base)
    for reference in (base, Reference(model, model.off), lambda batch: function(batch)):
        (found,) = DPO().extended([batch], model, reference=reference)
        torch.testing.assert_close(found["targets"][1], expected, atol=1e-10, rtol=0)
        assert not found["targets"][1].requires_grad
        assert model.on and all(module.training for module in model.modules())


def test_references_make_logits_in_pieces():
    """Also in evaluation mode, where a model returns them whole otherwise."""
    model, seen = tiny(), []
    expected = by_torch(model, pairs(4))
    model.vocabulary.deferred = True
    model.register_forward_hook(lambda module, given, output: seen.append(type(output)))
    found = Reference(model)(pairs(4))
    assert seen == [DeferredLogits]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_known_log_probabilities(tmp_path):
    """They are computed once, and found again in other batches, other padding and a file."""
    model, calls = tiny(), []
    reference = Reference(model)

    def counted(batch):
        calls.append(len(batch["tokens"]))
        return reference(batch)

    batch, objective = pairs(6), DPO(nll=0.5)
    known = Known(counted)
    (online,) = objective.extended([batch], model)
    for _ in range(3):
        (kept,) = objective.extended([batch], model, reference=known)
        torch.testing.assert_close(kept["targets"], online["targets"], atol=1e-12, rtol=0)
    assert calls == [6]
    known.save(tmp_path / "reference.npz")
    read = Known.load(tmp_path / "reference.npz")
    order = torch.tensor([5, 2, 0])
    longer = {name: x[order] for name, x in pairs(6, length=19).items()}
    torch.testing.assert_close(read(longer), online["targets"][1][order], atol=1e-12, rtol=0)
    student = tiny(seed=1)
    losses = [
        evaluate(student, objective.extended([batch], student, reference=r), objective)
        for r in (model, read)
    ]
    assert losses[0].terms == pytest.approx(losses[1].terms, abs=1e-12)
    with pytest.raises(ValueError, match="2 of 2 rows are not known: they are of other data"):
        read(pairs(1, seed=9))
    (tmp_path / "other.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="other.npz holds no log-probabilities"):
        Known.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="none.npz: No such file"):
        Known.load(tmp_path / "none.npz")


# Runs


def unpaired(count, seed=0):
    batch = pairs(count, seed)
    labels = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.6
    return batch | {"targets": (batch["targets"], labels)}


def rated(count, seed=0):
    return pairs(count, seed) | {"targets": torch.rand(count)}


RUNS = {
    "dpo": (DPO(nll=0.5), pairs, {}),
    "orpo": (ORPO(), pairs, {}),
    "kto": (KTO(beta=0.5), unpaired, {}),
    "rewards": (Rewards(centre=0.1), rated, {"head": "classification", "classes": 1}),
}  # fmt: skip
BATCH = 6


def train(kind, many=False, accumulate=1):
    """The terms and norms of some steps, and an evaluation."""
    objective, make, changes = RUNS[kind]
    torch.manual_seed(0)
    batches = [make(BATCH, seed) for seed in range(4)]
    model = tiny(**changes)
    reference = None if kind == "dpo" else tiny(seed=1)
    if many:
        model = parallelise(model, mesh(dp=2, device="cpu"))
        size = BATCH // model.data_world
        mine = slice(model.data_rank * size, (model.data_rank + 1) * size)
        batches = [tree_map(lambda x: x[mine], batch) for batch in batches]
    held = batches[3:]
    if hasattr(objective, "extended"):
        batches = objective.extended(batches, model, reference=reference)
        held = objective.extended(held, model, reference=reference)
    found = []
    for record in steps(
        model, batches, objective, adamw(model, 1e-2), stop=3, accumulate=accumulate
    ):
        found.extend([*record.terms, record.norm])
    evaluation = evaluate(model, held, objective)
    return found + [*evaluation.terms, *evaluation.accuracies]


@pytest.mark.parametrize("kind", RUNS)
def test_batches_in_parts(kind):
    assert train(kind, accumulate=3) == pytest.approx(train(kind), abs=1e-9)


@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_train_as_one(two, kind):
    found = two(train, kind, True)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(train(kind), abs=1e-5)


def test_kto_compares_with_the_model_as_it_is():
    """z is the mean log-ratio of the second rows, with the model of the step and not of the start,
    and no less than 0."""
    model, reference, batch = tiny(), tiny(seed=2), unpaired(5)
    (targets, labels), seen = batch["targets"], []
    batches = KTO().extended([batch], model, reference=reference)
    for seed in (1, 3):
        with torch.no_grad():
            for p, q in zip(model.parameters(), tiny(seed=seed).parameters(), strict=True):
                p.copy_(q)
        ratios = [by_torch(m, batch | {"targets": targets}) for m in (model, reference)]
        z = (ratios[0] - ratios[1])[:, 1].mean().item()
        found = batches[0]
        assert found["tokens"].shape == (5, LENGTH) and found["mask"].shape == (5,)
        first, told, known, baseline = found["targets"]
        assert torch.equal(first, targets[:, 0]) and torch.equal(told, labels)
        torch.testing.assert_close(known, ratios[1][:, 0], atol=1e-10, rtol=0)
        assert baseline.tolist() == pytest.approx([max(z, 0)] * 5, abs=1e-10)
        seen.append(z)
    assert min(seen) < 0 < max(seen)


@pytest.mark.parametrize("objective", [*REFERENCED, SimPO(), ORPO()], ids=repr)
def test_prompts_have_no_gradient(objective):
    logits, batch = drawn()
    objective(logits, batch).mean.sum().backward()
    prompt = batch["targets"][0] == IGNORED
    assert (logits.grad[prompt] == 0).all()
    assert (logits.grad[~prompt] != 0).any(-1)[..., None].any()


def test_right_pairs():
    logits, batch = drawn(count=9)
    (targets, reference), (y, _) = batch["targets"], summed(logits, batch["targets"][0])
    larger = [a - b > c - d for (a, c), (b, d) in zip(y.tolist(), reference.tolist(), strict=True)]
    assert DPO().right(logits, batch).tolist() == [sum(larger)] != [0]
    assert Hinge(beta=0.7).right(logits, batch).tolist() == [sum(larger)]
    chosen = targets[:, 0]
    likeliest = (logits[:, 0].argmax(-1) == chosen).sum().item()
    assert DPO(nll=0.5).right(logits, batch).tolist() == [likeliest, sum(larger)]
    expected = 0.1 * (y - reference)
    torch.testing.assert_close(DPO().rewards(logits, batch), expected, atol=1e-12, rtol=0)


class Synthetic:
    """Pairs of which the chosen answer goes up from token to token, and the rejected one down."""

    def __init__(self, count, targets=None):
        self.count, self.targets = count, targets

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        first = torch.randint(8, VOCAB - 8, (self.count, 1, 1), generator=generator)
        way = torch.tensor([1, -1])[None, :, None]
        tokens = first + way * torch.arange(8)
        targets = torch.full_like(tokens, IGNORED)
        targets[..., :-1] = tokens[..., 1:]
        batch = {"tokens": tokens, "mask": torch.full((self.count, 2), 8), "targets": targets}
        return batch if self.targets is None else batch | {"targets": self.targets}


def test_dpo_learns():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(dim=64, layers=2, heads=4, **FIELDS))
    objective, data = DPO(beta=0.1), Synthetic(8)
    reference = frozen(model)
    batches = objective.extended(data, model, reference=reference)
    records = list(steps(model, batches, objective, adamw(model, 3e-3), stop=60))
    assert records[0].loss == pytest.approx(math.log(2), abs=1e-6)
    held = objective.extended([data[1000], data[1001]], model, reference=reference)
    found = evaluate(model, held, objective)
    assert found.accuracies == (1.0,) and found.loss <= 0.05
    rewards = objective.rewards(model(data[1000]["tokens"]), held[0])
    assert (rewards[:, 0] - rewards[:, 1]).mean() >= 3


@pytest.mark.parametrize("objective", [IPO(), Hinge(), SimPO(), ORPO()], ids=repr)
def test_other_losses_learn(objective):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**FIELDS | SMALL))
    data = Synthetic(16)
    held = [data[1000]]
    if hasattr(objective, "extended"):
        reference = frozen(model)
        data, held = (objective.extended(x, model, reference=reference) for x in (data, held))
    before = evaluate(model, held, objective)
    list(steps(model, data, objective, adamw(model, 3e-3), stop=30))
    after = evaluate(model, held, objective)
    assert after.accuracies[-1] == 1.0 and after.loss < 0.7 * before.loss


def test_kto_learns():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**FIELDS | SMALL))
    objective, data = KTO(beta=0.5), Synthetic(16)

    class Labelled:
        """Either answer of each pair, and behind the same prompt the other."""

        def __getitem__(self, step):
            batch = data[step]
            labels = torch.arange(16) % 2 == 0
            rows = {
                name: torch.where(labels.view(-1, *[1] * (x.dim() - 1)), x, x.flip(1))
                for name, x in batch.items()
            }
            return rows | {"targets": (rows["targets"], labels)}

    reference = frozen(model)
    batches = objective.extended(Labelled(), model, reference=reference)
    (first,) = steps(model, batches, objective, adamw(model, 3e-3), stop=1)
    assert first.loss == pytest.approx(0.5, abs=1e-6)
    list(steps(model, batches, objective, adamw(model, 3e-3), start=1, stop=40))
    found = evaluate(model, [batches[1000]], objective)
    assert found.accuracies == (1.0,) and found.loss < 0.25


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_reward_models_learn(architecture):
    """From pairs of which the chosen row has more tokens of one kind."""
    torch.manual_seed(0)
    fields = FIELDS | {"architecture": architecture, "head": "classification", "classes": 1}
    model = Transformer(TransformerConfig(**SMALL | fields))

    class Counts:
        def __getitem__(self, step):
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(2, VOCAB, (32, 2, 8), generator=generator)
            for row, few in ((0, 3), (1, 0)):
                count = torch.randint(few, few + 3, (32,), generator=generator)
                marked = torch.arange(8) < count[:, None]
                tokens[:, row] = torch.where(marked, 1, tokens[:, row])
            places = torch.argsort(torch.rand(32, 2, 8, generator=generator))
            mask = torch.full((32, 2), 8)
            return {"tokens": tokens.gather(-1, places), "mask": mask, "targets": torch.zeros(32)}

    list(steps(model, Counts(), Rewards(centre=0.01), adamw(model, 1e-2), stop=60))
    found = evaluate(model, [Counts()[i] for i in range(1000, 1004)], Rewards())
    assert found.accuracies[0] >= 0.98


# Errors of batches and options


@pytest.mark.parametrize("kind, options, message", [
    ("dpo", {"beta": 0}, "beta must be a number in"),
    ("dpo", {"beta": "1"}, "beta must be a number in"),
    ("dpo", {"label_smoothing": 0.5}, "label_smoothing must be less than 0.5"),
    ("dpo", {"robust": 1}, "robust must be true or false, got 1"),
    ("ipo", {"per_token": "no"}, "per_token must be true or false"),
    ("hinge", {"nll": -1}, "nll must be a number in"),
    ("simpo", {"gamma": -1}, "gamma must be a number in"),
    ("orpo", {"weight": float("nan")}, "weight must be a number in"),
    ("kto", {"desirable": -1}, "desirable must be a number in"),
    ("rewards", {"centre": -1}, "centre must be a number in"),
    ("dpo", {"gamma": 1}, "objective dpo: option 'gamma' is not one of"),
    ("none", {}, "objective must be one of cross_entropy, dpo"),
])  # fmt: skip
def test_options_that_do_not_fit(kind, options, message):
    with pytest.raises(ValueError, match=message):
        made(kind, **options)


def test_kinds():
    assert made("dpo", beta=0.3, nll=0.1) == DPO(beta=0.3, nll=0.1)
    assert all(type(made(kind)) is PREFERENCES[kind] for kind in PREFERENCES)


def test_batches_that_do_not_fit():
    logits, batch = drawn()
    targets, reference = batch["targets"]
    with pytest.raises(ValueError, match="DPO needs batches with a reference's log-probabilities"):
        DPO()(logits, {"targets": targets})
    with pytest.raises(ValueError, match="IPO needs batches with a reference's log-probabilities"):
        IPO()(logits, {"targets": (targets, reference[:, :1])})
    with pytest.raises(ValueError, match=r"targets must be pairs \(B, 2, T\), got \(5, 12\)"):
        SimPO()(logits[:, 0], {"targets": targets[:, 0]})
    with pytest.raises(ValueError, match='must have the head "lm", got tuple'):
        SimPO()((logits, logits), {"targets": targets})
    with pytest.raises(ValueError, match="KTO needs batches with a reference and z"):
        KTO()(logits, {"targets": targets})
    with pytest.raises(ValueError, match=r"one reward for each row \(B, 2, 1\), got \(5, 2, 3\)"):
        Rewards()(torch.zeros(5, 2, 3), {"targets": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"targets must be margins \(B,\), got \(5, 2, 12\)"):
        Rewards().count({"targets": targets})


def copies_a_shared_model():
    model = parallelise(tiny(), mesh(fsdp=2, device="cpu"))
    with pytest.raises(ValueError, match="shared by processes and cannot be copied"):
        DPO().extended([pairs(2)], model)


def test_a_shared_model_is_not_copied(two):
    two(copies_a_shared_model)


def refers_to_a_stage():
    model = parallelise(tiny(), mesh(pp=2, device="cpu"))
    with pytest.raises(ValueError, match="is spread along pp: use dp or fsdp"):
        KTO().extended([], model, reference=lambda batch: None)


def test_a_stage_of_a_model_is_no_reference(two):
    two(refers_to_a_stage)
