"""Reinforcement learning from rewards: PPO, GRPO and RLOO by the formulas of their papers, in
float64, and on a bandit whose best policy is known."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tfkern import models
from tfkern.models import Transformer, TransformerConfig
from tfkern.train import (
    GRPO,
    PPO,
    RLOO,
    ActorCritic,
    ModelReward,
    Rollouts,
    TextReward,
    adamw,
    critic_of,
    frozen,
    schedule,
    steps,
)
from tfkern.train.kinds import make
from tfkern.train.parallel import mesh, parallelise
from tfkern.train.policy import OBJECTIVES, Answers
from tfkern.train.policy.advantages import (
    at_last,
    gae,
    group_relative,
    kl_estimate,
    leave_one_out,
    whiten,
)

VOCAB, END = 11, 10


@pytest.fixture(autouse=True)
def _small(one_thread):
    """All models here are small."""


def tiny(dtype=torch.float64, seed=0, **changes):
    """A small decoder whose parameters are all random: initial biases of 0 would hide mistakes."""
    options = {"vocab_size": VOCAB, "max_length": 16, "dim": 16, "layers": 2, "heads": 2}
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(**options | {"end_token": END} | changes)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def trained(objective, **changes):
    """A model for an objective, and its reference, which is another one."""
    policy = tiny(**changes)
    reference = frozen(tiny(seed=1))
    if not objective.critic:
        return policy, reference
    critic = tiny(seed=2, head="token", classes=1)
    return ActorCritic(policy, critic), reference


class Fixed:
    """Prompts of unequal lengths, other ones in each batch, of which each rank has a part."""

    def __init__(self, batch=6, rank=0, world=1):
        self.batch, self.rank, self.world = batch, rank, world

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        lengths = torch.randint(1, 6, (self.batch,), generator=generator).tolist()
        rows = [torch.randint(END, (n,), generator=generator).tolist() for n in lengths]
        mine = slice(
            self.batch * self.rank // self.world, self.batch * (self.rank + 1) // self.world
        )
        return {"prompt": rows[mine], "row": [100 * step + i for i in range(self.batch)][mine]}


def evens(prompts, answers, **columns):
    """A reward: how many tokens of an answer are even, less a tenth of its length."""
    return [sum(t % 2 == 0 for t in a) - 0.1 * len(a) for a in answers]


def rollouts(model, objective, reference=None, prompts=None, reward=evens, **options):
    options = {"max_tokens": 6, "samples": max(2, objective.samples)} | options
    return Rollouts(
        model, Fixed() if prompts is None else prompts, reward, objective, reference=reference,
        **options,
    )  # fmt: skip


ALL = [PPO(), GRPO(), RLOO()]
NAMES = ["ppo", "grpo", "rloo"]


# Advantages


def drawn(B=5, T=9, seed=0):
    """Numbers (B, T) at tokens of answers, which begin and end anywhere."""
    generator = torch.Generator().manual_seed(seed)
    exist = torch.zeros(B, T, dtype=torch.bool)
    for row in range(B):
        first, last = torch.randint(T, (2,), generator=generator).sort().values.tolist()
        exist[row, first : last + 1] = True
    x = torch.randn(2, B, T, dtype=torch.float64, generator=generator)
    return *torch.where(exist, x, 0), exist


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (0.8, 1.0)])
def test_gae_is_its_double_sum(gamma, lam):
    rewards, values, exist = drawn()
    values = values + 5.0 * ~exist  # which nothing may read
    found = gae(rewards, values, exist, gamma, lam)
    for row in range(len(exist)):
        places = exist[row].nonzero().flatten().tolist()
        r, v = rewards[row, places].tolist(), [*values[row, places].tolist(), 0.0]
        for t in range(len(places)):
            expected = 0.0
            for later in range(t, len(places)):
                error = r[later] + gamma * v[later + 1] - v[later]
                expected += (gamma * lam) ** (later - t) * error
            assert found[row, places[t]].item() == pytest.approx(expected, abs=1e-12)
    assert (found[~exist] == 0).all()


def test_gae_with_lambda_1_is_what_is_still_to_come_less_the_value():
    rewards, values, exist = drawn()
    found = gae(rewards, values, exist, 1.0, 1.0)
    for row in range(len(exist)):
        for t in exist[row].nonzero().flatten().tolist():
            expected = rewards[row, t:].sum() - values[row, t]
            assert found[row, t].item() == pytest.approx(expected.item(), abs=1e-12)


def test_advantages_of_groups():
    rewards = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = leave_one_out(rewards)
    scaled, plain = (group_relative(rewards, scale) for scale in (True, False))
    for group in range(4):
        r = rewards[group].tolist()
        mean = sum(r) / 5
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / 4)
        for i in range(5):
            rest = sum(r[:i] + r[i + 1 :]) / 4
            assert others[group, i].item() == pytest.approx(r[i] - rest, abs=1e-12)
            assert plain[group, i].item() == pytest.approx(r[i] - mean, abs=1e-12)
            assert scaled[group, i].item() == pytest.approx((r[i] - mean) / (std + 1e-4), abs=1e-12)
    for x in (others, scaled, plain):
        assert x.sum(1).abs().max() < 1e-12


def test_a_group_of_equal_rewards_has_no_advantage():
    for found in (group_relative(torch.full((2, 4), 0.7), True), leave_one_out(torch.ones(2, 4))):
        assert found.abs().max() < 1e-3


@pytest.mark.parametrize("shift", [True, False])
def test_whitening_is_over_all_tokens_and_ranks(shift):
    x, _, exist = drawn()
    kept = x[exist]
    expected = (kept - kept.mean()) / kept.std(correction=0) + (0 if shift else kept.mean())
    found = whiten(x, exist, lambda x: x, shift=shift)
    assert (found[exist] - expected).abs().max() < 1e-6
    assert (found[~exist] == 0).all()


def test_a_reward_comes_with_the_last_token():
    _, _, exist = drawn()
    found = at_last(torch.arange(1.0, 6.0), exist)
    for row in range(5):
        last = exist[row].nonzero().max().item()
        assert found[row].nonzero().flatten().tolist() == [last]
        assert found[row, last] == row + 1


def test_estimates_of_the_kl_divergence_have_it_as_their_mean():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        p, q = torch.randn(2, 7, dtype=torch.float64, generator=generator).softmax(-1)
        exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        assert exact >= 0
        for kind in ("k1", "k3"):
            each = kl_estimate(p.log(), q.log(), kind)
            assert (p * each).sum().item() == pytest.approx(exact, abs=1e-12)
        assert (each >= 0).all()
    assert (kl_estimate(p.log(), q.log(), "k1") < 0).any()


def test_gradients_of_the_estimates():
    """Which divergence a policy goes down with an estimate in the reward, and with k3 in the loss,
    by sums over all tokens."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    logp, logq = x.log_softmax(-1), y.log_softmax(-1)
    p = logp.detach().exp()

    def gradient(value):
        return torch.autograd.grad(value, x, retain_graph=True)[0]

    ahead = gradient((logp.exp() * (logp - logq)).sum())
    back = gradient((logq.exp() * (logq - logp)).sum())
    for kind, expected in (("k1", ahead), ("k3", ahead - back)):
        reward = kl_estimate(logp.detach(), logq, kind)
        assert (gradient((p * reward * logp).sum()) - expected).abs().max() < 1e-12
    for kind, expected in (("k1", torch.zeros(7)), ("k3", back)):
        assert (gradient((p * kl_estimate(logp, logq, kind)).sum()) - expected).abs().max() < 1e-12


# Losses


def batch_of_answers(returns=True):
    """Logits, values and answers with old numbers that are near, as tensors of random numbers."""
    generator = torch.Generator().manual_seed(0)
    _, _, exist = drawn()
    B, T = exist.shape

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    logits = noise(B, T, 7)
    tokens = torch.where(exist, torch.randint(7, (B, T), generator=generator), -100)
    new = logits.log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    near = {name: torch.where(exist, new + 0.3 * noise(B, T), 0) for name in ("old", "reference")}
    values = noise(B, T)
    extra = {
        "values": torch.where(exist, values + 0.5 * noise(B, T), 0),
        "returns": torch.where(exist, noise(B, T), 0),
        "advantages": torch.where(exist, noise(B, T), 0) if returns else noise(B),
    }
    return logits, values, Answers(tokens, **near, rewards=noise(B), **extra)


def each_token(logits, answers):
    """For each row, the places of its tokens and their log-probabilities by hand."""
    for row, places in enumerate(answers.exist):
        places = places.nonzero().flatten().tolist()
        new = [math.log(logits[row, t].softmax(-1)[answers.tokens[row, t]].item()) for t in places]
        yield row, places, new


def clipped(ratio, advantage, clip):
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def test_ppo_is_its_formula():
    logits, values, answers = batch_of_answers()
    values = torch.where(answers.exist, values, math.nan).requires_grad_()
    objective = PPO(clip=0.15, clip_value=0.3, value=0.7, entropy=0.01)
    policy, squares, entropies = [], [], []
    for row, places, new in each_token(logits, answers):
        for t, n in zip(places, new, strict=True):
            ratio = math.exp(n - answers.old[row, t])
            policy.append(clipped(ratio, answers.advantages[row, t].item(), 0.15))
            v, old, r = (x[row, t].item() for x in (values, answers.values, answers.returns))
            held = old + min(max(v - old, -0.3), 0.3)
            squares.append(max((v - r) ** 2, (held - r) ** 2) / 2)
            p = logits[row, t].softmax(-1).tolist()
            entropies.append(-sum(x * math.log(x) for x in p))
    loss = objective((logits, values), {"targets": answers})
    count = len(policy)
    expected = (sum(policy), 0.7 * sum(squares), -0.01 * sum(entropies))
    assert loss.mean.tolist() == pytest.approx([x / count for x in expected], abs=1e-12)
    assert loss.count.tolist() == [count] * 3
    (gradient,) = torch.autograd.grad(loss.mean.sum(), values)
    assert (gradient[~answers.exist] == 0).all()
    free = PPO(clip=0.15, clip_value=None)((logits, values), {"targets": answers})
    square = (values - answers.returns)[answers.exist].square().mean()
    assert free.mean[1].item() == pytest.approx(0.1 * square.item() / 2, abs=1e-12)
    assert free.count.tolist() == [count] * 2


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_grpo_is_its_formula(mean):
    logits, _, answers = batch_of_answers(returns=False)
    policy, divergences, lengths = [], [], []
    for row, places, new in each_token(logits, answers):
        lengths.append(len(places))
        ratios = [math.exp(n - answers.old[row, t]) for t, n in zip(places, new, strict=True)]
        policy.append(sum(clipped(r, answers.advantages[row].item(), 0.2) for r in ratios))
        r = [answers.reference[row, t].item() - n for t, n in zip(places, new, strict=True)]
        divergences.append(sum(math.exp(x) - x - 1 for x in r))
    if mean == "token":
        expected = [sum(x) / sum(lengths) for x in (policy, divergences)]
    else:
        pairs = (zip(x, lengths, strict=True) for x in (policy, divergences))
        expected = [sum(a / n for a, n in pair) / len(lengths) for pair in pairs]
    loss = GRPO(kl=0.5, mean=mean)(logits, {"targets": answers})
    assert loss.mean.tolist() == pytest.approx([expected[0], 0.5 * expected[1]], abs=1e-12)
    assert loss.count.tolist() == [sum(lengths) if mean == "token" else len(lengths)] * 2
    alone = GRPO(kl=0.0, mean=mean)(logits, {"targets": answers._replace(reference=None)})
    assert alone.mean.tolist() == pytest.approx(expected[:1], abs=1e-12)


def test_rloo_is_its_formula():
    logits, _, answers = batch_of_answers(returns=False)
    found = []
    for row, places, new in each_token(logits, answers):
        ratio = math.exp(sum(new) - sum(answers.old[row, places].tolist()))
        found.append(clipped(ratio, answers.advantages[row].item(), 0.2))
    loss = RLOO()(logits, {"targets": answers})
    assert loss.mean.tolist() == pytest.approx([sum(found) / len(found)], abs=1e-12)
    assert loss.count.tolist() == [len(found)]


def test_the_first_gradient_of_rloo_is_that_of_reinforce():
    logits, _, answers = batch_of_answers(returns=False)
    logits.requires_grad_()
    every = logits.log_softmax(-1).gather(-1, answers.tokens.clamp(min=0)[..., None])[..., 0]
    new = torch.where(answers.exist, every, 0)
    (expected,) = torch.autograd.grad(-(answers.advantages * new.sum(1)).mean(), logits)
    loss = RLOO()(logits, {"targets": answers._replace(old=new.detach())})
    (found,) = torch.autograd.grad(loss.mean.sum(), logits)
    assert (found - expected).abs().max() < 1e-12


# Credit: from rewards of answers to advantages


def test_credit_of_ppo():
    """Rewards of tokens are -kl times the estimate, and the answer's reward at its last token."""
    _, _, answers = batch_of_answers()
    for kind in ("k1", "k3"):
        objective = PPO(kl=0.3, kl_kind=kind, gamma=0.9, lam=0.8, whiten=False)
        found = objective.credited(answers, 1, lambda x: x)
        for row, places in enumerate(answers.exist):
            places = places.nonzero().flatten().tolist()
            r = [(answers.reference - answers.old)[row, t].item() for t in places]
            costs = [-x if kind == "k1" else math.exp(x) - 1 - x for x in r]
            rewards = [-0.3 * x for x in costs]
            rewards[-1] += answers.rewards[row].item()
            v = [*answers.values[row, places].tolist(), 0.0]
            for i, t in enumerate(places):
                errors = [rewards[j] + 0.9 * v[j + 1] - v[j] for j in range(i, len(places))]
                expected = sum(0.72**n * e for n, e in enumerate(errors))
                assert found.advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
                assert found.returns[row, t].item() == pytest.approx(expected + v[i], abs=1e-12)
        white = PPO(kl=0.3, kl_kind=kind, gamma=0.9, lam=0.8).credited(answers, 1, lambda x: x)
        kept = found.advantages[answers.exist]
        expected = (kept - kept.mean()) / kept.std(correction=0)
        assert (white.advantages[answers.exist] - expected).abs().max() < 1e-6
        assert torch.equal(white.returns, found.returns)


def test_credit_of_rloo_and_grpo():
    _, _, answers = batch_of_answers()
    answers = Answers(*(None if x is None else x[:4] for x in answers))  # two groups of two
    kl = (answers.old - answers.reference).sum(1)
    r = (answers.rewards - 0.3 * kl).tolist()
    found = RLOO(kl=0.3).credited(answers, 2, lambda x: x).advantages.tolist()
    assert found == pytest.approx([r[0] - r[1], r[1] - r[0], r[2] - r[3], r[3] - r[2]], abs=1e-12)
    r = answers.rewards.tolist()
    found = GRPO(scale=False).credited(answers, 2, lambda x: x).advantages.tolist()
    half = [(r[0] - r[1]) / 2, (r[2] - r[3]) / 2]
    assert found == pytest.approx([half[0], -half[0], half[1], -half[1]], abs=1e-12)


# Rollouts


def by_hand(model, prompt, answer, temperature):
    """Log-probabilities of an answer by a model that reads this row alone."""
    logits = model(torch.tensor([[*prompt, *answer[:-1]]]))[0] / temperature
    p = logits.log_softmax(-1)[len(prompt) - 1 :]
    return p[torch.arange(len(answer)), answer]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_targets_are_the_answers_and_their_numbers(temperature):
    objective = PPO(kl=0.1, temperature=temperature, whiten=False)
    model, reference = trained(objective)
    model.policy.vocabulary.deferred = True
    seen = []

    def reward(prompts, answers, *, row):
        seen.extend(zip(prompts, answers, row, strict=True))
        return torch.arange(float(len(answers)))

    batches = rollouts(model, objective, reference, reward=reward, minibatches=2, rows=5)
    found = [batches[0], batches[1]]
    texts = list(seen)
    assert [t[2] for t in texts] == [100 * step + i // 2 for step in (0, 1) for i in range(12)]
    assert len({len(t[1]) for t in texts}) >= 4
    place = 0
    model.eval()
    for step, batch in enumerate(found):
        assert batch["tokens"].shape == batch["targets"].tokens.shape
        for i, (n, answers) in enumerate(
            zip(batch["mask"].tolist(), batch["targets"].tokens, strict=True)
        ):
            prompt, answer, _ = texts[place]
            assert prompt == Fixed()[step]["prompt"][i // 2]
            assert batch["tokens"][i, :n].tolist() == [*prompt, *answer[:-1]]
            mine = slice(len(prompt) - 1, n)
            assert answers[mine].tolist() == answer
            assert (answers != -100).sum() == len(answer)
            assert answer.count(END) == (answer[-1] == END)
            told = batch["targets"]
            assert told.rewards[i] == place
            for x, policy in ((told.old, model.policy), (told.reference, reference)):
                expected = by_hand(policy, prompt, answer, temperature)
                assert (x[i, mine] - expected).abs().max() < 1e-10
                assert x[i].count_nonzero() == len(answer)
            values = model.critic(torch.tensor([[*prompt, *answer[:-1]]]))[0, :, 0]
            assert (told.values[i, mine] - values[len(prompt) - 1 :]).abs().max() < 1e-10
            place += 1
    assert place == 24


def test_answers_are_drawn_from_the_policy():
    """The share of each first token is its probability, by a test of chi squared."""
    policy = tiny(max_length=4)
    prompts = [{"prompt": [[3]] * 2000}]
    batch = rollouts(policy, RLOO(kl=0.0, temperature=1.5), prompts=prompts, max_tokens=1)[0]
    expected = 4000 * (policy.eval()(torch.tensor([[3]]))[0, 0] / 1.5).softmax(-1)
    counts = batch["targets"].tokens[:, 0].bincount(minlength=VOCAB)
    assert ((counts - expected).square() / expected).sum() < 35.6  # 0.9999 of chi squared with 10


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
@pytest.mark.parametrize("deferred", [False, True])
def test_the_ratio_is_1_at_first(objective, deferred):
    model, reference = trained(objective)
    model = model.float()
    policy = model.policy if objective.critic else model
    policy.vocabulary.deferred = deferred
    batch = rollouts(model, objective, reference.float())[0]
    assert policy.training
    output = model(batch["tokens"], mask=batch["mask"])
    logits = output[0] if objective.critic else output
    assert isinstance(logits, torch.Tensor) != deferred
    new = models.log_probs(logits, batch["targets"].tokens)
    assert (new - batch["targets"].old).exp().sub(1).abs().max() < 1e-5
    if objective.critic:
        exist = batch["targets"].exist
        assert (output[1] - batch["targets"].values)[exist].abs().max() < 1e-5


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_loss_and_gradients_know_nothing_but_answers(objective):
    """Padding may be anything and as wide as it likes, logits elsewhere have no gradient, and the
    reference has none."""
    model, reference = trained(objective)
    batch = rollouts(model, objective, reference)[0]
    policy = model.policy if objective.critic else model

    def terms(batch):
        output = model(batch["tokens"], mask=batch["mask"])
        logits = output[0] if objective.critic else output
        logits.retain_grad()
        model.zero_grad()
        loss = objective(output, batch)
        loss.mean.sum().backward()
        assert (logits.grad[~batch["targets"].exist] == 0).all()
        assert (logits.grad[batch["targets"].exist] != 0).any()
        return loss.mean.detach(), [p.grad.clone() for p in model.parameters()]

    loss, gradients = terms(batch)
    wide = nn.functional.pad(batch["tokens"], (0, 2), value=7)
    padding = torch.arange(wide.shape[1]) >= batch["mask"][:, None]
    wide = torch.where(padding, 7, wide)
    T = batch["tokens"].shape[1]
    more = {
        name: nn.functional.pad(x, (0, 2), value=-100 if name == "tokens" else 0)
        if x is not None and x.dim() == 2
        else x
        for name, x in batch["targets"]._asdict().items()
    }
    other, others = terms({"tokens": wide, "mask": batch["mask"], "targets": Answers(**more)})
    assert wide.shape[1] == T + 2
    assert (loss - other).abs().max() < 1e-12
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).abs().max() < 1e-12
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert all(p.grad is not None for p in policy.parameters())


def test_a_reference_may_be_a_context_of_the_policy():
    objective = GRPO(kl=0.1)
    policy, reference = trained(objective)
    expected = rollouts(policy, objective, reference)[0]["targets"].reference
    own = {name: x.clone() for name, x in policy.state_dict().items()}

    @contextmanager
    def other():
        policy.load_state_dict(reference.state_dict())
        yield
        policy.load_state_dict(own)

    found = rollouts(policy, objective, other)[0]["targets"]
    assert (found.reference - expected).abs().max() < 1e-12
    assert (found.reference - found.old).abs().max() > 0.1


def test_a_round_tells_what_its_answers_are_like():
    model, reference = trained(GRPO())
    seen = []

    def reward(prompts, answers, **columns):
        seen.extend(answers)
        return evens(prompts, answers)

    batches = rollouts(model, GRPO(), reference, reward=reward, missing_end=2.0)
    assert batches.last is None
    told = batches[0]["targets"]
    last = batches.last
    ended = [a[-1] == END for a in seen]
    assert 0 < sum(ended) < len(ended)
    expected = [x - 2.0 * (not e) for x, e in zip(evens(None, seen), ended, strict=True)]
    assert told.rewards.tolist() == pytest.approx(expected)
    assert last.number == 0
    assert last.reward == pytest.approx(sum(expected) / 12)
    assert last.ended == pytest.approx(sum(ended) / 12)
    assert last.length == pytest.approx(sum(map(len, seen)) / 12)
    assert last.kl == pytest.approx((told.old - told.reference).sum().item() / 12)


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_parts_of_a_batch_have_the_gradients_of_the_whole(objective):
    weights = []
    for accumulate in (1, 3):
        model, reference = trained(objective)
        batches = rollouts(model, objective, reference, epochs=2)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = [
            r.terms for r in steps(model, batches, objective, optimiser, stop=4,
                                   accumulate=accumulate)
        ]  # fmt: skip
        weights.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert torch.tensor(weights[0][0]).allclose(torch.tensor(weights[1][0]), atol=1e-10, rtol=0)
    for a, b in zip(weights[0][1], weights[1][1], strict=True):
        assert (a - b).abs().max() < 1e-10


def three_rounds(name, sizes, options):
    """What training tells on the processes of a mesh, or on one process without sizes."""
    objective = OBJECTIVES[name](**options)
    model, reference = trained(objective)
    part = {}
    if sizes is not None:
        model = parallelise(model, mesh(**sizes, device="cpu"))
        part = {"rank": model.data_rank, "world": model.data_world}
    prompts = Fixed(4, **part)
    batches = rollouts(
        model, objective, reference, prompts, epochs=2, minibatches=2, missing_end=0.5
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    told = []
    for record in steps(model, batches, objective, optimiser, stop=12):
        told += [*record.terms, record.norm, *batches.last]
    sums = [p.detach().double().abs().sum().item() for p in model.parameters()]
    return told + sums


@pytest.mark.parametrize(
    "name, options",
    [("ppo", {"whiten_rewards": True, "entropy": 0.01}), ("grpo", {}), ("rloo", {})],
    ids=NAMES,
)
def test_two_processes_train_as_one(two, name, options):
    expected = three_rounds(name, None, options)
    found = two(three_rounds, name, {"dp": 2}, options)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(expected, abs=1e-5)


def answers_to_five(sizes):
    """The answers to five prompts, of which the second of two processes has three."""
    model, reference = trained(GRPO())
    part = slice(None)
    if sizes is not None:
        model = parallelise(model, mesh(**sizes, device="cpu"))
        part = (slice(0, 2), slice(2, 5))[model.data_rank]
    prompts = [{"prompt": [[1], [2], [3], [1], [2]][part]}]
    written = []

    def reward(prompts, answers):
        written.extend([int(t) for t in row] for row in answers)
        return [0.0] * len(answers)

    rollouts(model, GRPO(), reference, prompts, reward=reward)[0]
    return written


def test_unequal_parts_of_prompts_have_the_answers_of_one_process(two):
    first, second = two(answers_to_five, {"dp": 2})
    assert first + second == answers_to_five(None)


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_a_run_goes_on_at_the_beginning_of_a_round(objective):
    def run(stop, start=0, state=None):
        model, reference = trained(objective)
        optimiser = adamw(model, 1e-2)
        if state is not None:
            model.load_state_dict(state[0])
            optimiser.load_state_dict(state[1])
        batches = rollouts(model, objective, reference, epochs=2)
        for _ in steps(model, batches, objective, optimiser, start=start, stop=stop):
            pass
        return model.state_dict(), optimiser.state_dict()

    half = run(2)
    kept = {name: x.clone() for name, x in half[0].items()}
    whole, again = run(4)[0], run(4, 2, half)[0]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(not torch.equal(whole[name], x) for name, x in kept.items())


def test_answers_depend_on_weights_seed_and_round_alone():
    policy = tiny()
    first = rollouts(policy, GRPO(kl=0.0), seed=3)
    one = [first[i]["targets"].tokens for i in (0, 1, 0)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = rollouts(policy, GRPO(kl=0.0), seed=3, rows=5)
    assert torch.equal(second[1]["targets"].tokens, one[1])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one[0], one[2])
    other = rollouts(policy, GRPO(kl=0.0), seed=4)[0]["targets"].tokens
    assert other.shape != one[0].shape or not torch.equal(other, one[0])


# Models and rewards


def test_a_critic_begins_with_the_weights_of_a_reward_model():
    reward = tiny(head="classification", classes=1, seed=4)
    critic = critic_of(reward)
    tokens = torch.randint(END, (3, 5))
    last = critic(tokens)[:, -1]
    assert (last - reward(tokens)).abs().max() < 1e-12
    assert all(a is not b for a in critic.parameters() for b in reward.parameters())
    assert all(p.requires_grad for p in critic_of(frozen(reward)).parameters())


def test_a_critic_may_begin_with_the_weights_of_the_policy(tmp_path):
    policy = tiny(torch.float32)
    model = ActorCritic(policy, critic_of(policy))
    tokens = torch.randint(END, (3, 5))
    logits, values = model(tokens)
    assert (values == 0).all()
    assert values.shape == (3, 5)
    hidden = (m.decode(tokens) for m in (policy, model.critic))
    assert torch.equal(*hidden)
    models.save(model.policy, tmp_path / "policy", form="tfkern")
    assert torch.equal(models.load(tmp_path / "policy")(tokens), logits)


def test_rewards_of_a_model():
    model = tiny(head="classification", classes=1)
    prompts, answers = [[1, 2], [3], [4, 5, 6]], [[7], [8, 9, END], [1, 2]]
    found = ModelReward(model, rows=2)(prompts, answers, other=[1, 2, 3])
    assert model.training
    for x, prompt, answer in zip(found, prompts, answers, strict=True):
        expected = model(torch.tensor([[*prompt, *answer]]))[0, 0]
        assert (x - expected).abs() < 1e-12


def test_rewards_of_texts():
    class Letters:
        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

    def right(prompts, answers, answer):
        assert prompts == ["ab", "c"]
        return [a == b for a, b in zip(answers, answer, strict=True)]

    found = TextReward(right, Letters())([[0, 1], [2]], [[3], [4]], answer=["d", "x"])
    assert found.tolist() == [1, 0]


def test_kinds_of_recipes():
    assert make("objective", OBJECTIVES, "ppo", kl=0.2) == PPO(kl=0.2)
    assert make("objective", OBJECTIVES, "grpo", mean="token") == GRPO(mean="token")
    assert make("objective", OBJECTIVES, "rloo") == RLOO()
    with pytest.raises(ValueError, match="objective ppo: option 'scale' is not one of kl, clip"):
        make("objective", OBJECTIVES, "ppo", scale=True)


@pytest.mark.parametrize(
    "kind, options, told",
    [
        (PPO, {"kl": -1}, "kl must be a number"),
        (PPO, {"lam": 1.5}, "lam must be a number"),
        (PPO, {"kl_kind": "k2"}, "kl_kind must be one of k1, k3"),
        (PPO, {"whiten": 1}, "whiten must be true or false"),
        (GRPO, {"temperature": 0}, "temperature must be a number"),
        (GRPO, {"mean": "row"}, "mean must be one of sequence, token"),
        (RLOO, {"clip": "wide"}, "clip must be a number"),
    ],
)
def test_objectives_refuse(kind, options, told):
    with pytest.raises(ValueError, match=told):
        kind(**options)


def test_rollouts_refuse():
    policy = tiny()
    free = GRPO(kl=0.0)
    both = ActorCritic(policy, critic_of(policy))
    cases = [
        (policy, GRPO(), {}, r"kl = 0.04 needs a reference, got None"),
        (policy, free, {"samples": 1}, "samples must be an integer of at least 2, got 1"),
        (policy, free, {"max_tokens": 0}, "max_tokens must be an integer of at least 1"),
        (policy, free, {"missing_end": -1}, "missing_end must be a number"),
        (policy, free, {"missing_end": 1.0, "end_tokens": ()}, "needs an end token"),
        (policy, PPO(kl=0.0), {}, "PPO trains an ActorCritic, got Transformer"),
        (both, free, {}, "GRPO trains the policy alone, got ActorCritic"),
        (tiny(dropout=0.1), free, {}, "no module may have dropout: .* has 0.1"),
        (tiny(attention_dropout=0.2), free, {}, "no module may have dropout: .* has 0.2"),
        (tiny(embedding_dropout=0.3), free, {}, "no module may have dropout: .* has 0.3"),
        (tiny(norm="batch_norm"), free, {}, "must be 1, .* no module may have batch norm"),
        (tiny(head="none"), free, {}, "a decoder with head 'lm', got an? decoder with 'none'"),
        (nn.Linear(2, 2), free, {}, "a policy must be a Transformer, got Linear"),
    ]
    for model, objective, options, told in cases:
        with pytest.raises(ValueError, match=told):
            rollouts(model, objective, **options)
    for reward, told in (
        (lambda p, a, **c: [1.0], r"reward must give \(12,\) numbers, got the shape \(1,\)"),
        (lambda p, a, **c: [math.nan] * 12, "reward must be finite, got nan for answer 0"),
    ):
        with pytest.raises(ValueError, match=told):
            rollouts(policy, free, reward=reward)[0]
    with pytest.raises(ValueError, match="more than the context of 16"):
        rollouts(policy, free, max_tokens=16)[0]
    with pytest.raises(ValueError, match="head 'token' with 1 class, got 'lm' with None"):
        ActorCritic(policy, policy)
    with pytest.raises(ValueError, match="head 'classification' with 1 class, got 'lm'"):
        ModelReward(policy)


# A bandit: the reward is the share of tokens in the good half of the vocabulary


class Same:
    """The same prompts in all rounds."""

    def __init__(self, count):
        self.count = count

    def __getitem__(self, step):
        return {"prompt": [[0]] * self.count}


def bandit(objective, rounds, prompts, lr, *, size=32, tokens=8, dim=64, **options):
    """The mean reward of each round, and the share of good tokens that the reference has."""
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=dim, layers=2, heads=2, vocab_size=size, max_length=2 * tokens
    )  # fmt: skip
    policy = Transformer(config)
    reference = frozen(policy)
    model = ActorCritic(policy, critic_of(policy)) if objective.critic else policy

    def good(prompts, answers):
        return [sum(t < size // 2 for t in a) / len(a) for a in answers]

    batches = Rollouts(
        model, Same(prompts), good, objective, max_tokens=tokens, reference=reference, **options
    )
    stop = rounds * batches.epochs * batches.minibatches
    updates = adamw(model, lr, weight_decay=0.0)
    first = batches[0]
    with torch.no_grad():
        p = reference(first["tokens"], mask=first["mask"]).softmax(-1)
    share = p[..., : size // 2].sum(-1)[first["targets"].exist].mean().item()
    rewards = []
    falling = schedule("linear", steps=stop, floor=0.1)
    loop = steps(model, batches, objective, updates, stop=stop, clip_norm=1.0, schedule=falling)
    for _ in loop:
        if batches.last.number == len(rewards):
            rewards.append(batches.last.reward)
    batches[stop]
    return [*rewards, batches.last.reward], share


SHORT = {"size": 8, "tokens": 4, "dim": 32}


@pytest.mark.parametrize(
    "objective, options",
    [
        (PPO(kl=0.0, value=1.0), {"prompts": 24, "epochs": 2, "lr": 5e-3}),
        (GRPO(kl=0.0), {"prompts": 4, "samples": 6, "epochs": 2, "lr": 5e-3}),
        (RLOO(kl=0.0), {"prompts": 4, "samples": 6, "epochs": 2, "lr": 5e-3}),
    ],
    ids=NAMES,
)
def test_rewards_rise(objective, options):
    rewards, _ = bandit(objective, 14, **SHORT, **options)
    assert rewards[0] < 0.65
    assert rewards[-1] > 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective, rounds, options",
    [
        (PPO(kl=0.0, value=1.0), 20, {"prompts": 64, "epochs": 4, "lr": 2e-3}),
        (GRPO(kl=0.0), 30, {"prompts": 8, "samples": 8, "epochs": 4, "lr": 1e-3}),
        (RLOO(kl=0.0), 30, {"prompts": 8, "samples": 8, "epochs": 2, "lr": 2e-3}),
    ],
    ids=NAMES,
)
def test_a_bandit_is_won(objective, rounds, options):
    rewards, _ = bandit(objective, rounds, **options)
    assert rewards[0] < 0.55
    assert rewards[-1] >= 0.95


def best(share, weight):
    """The share of good tokens of the policy with the greatest reward less kl KL(policy ||
    reference). It is in proportion to the reference times exp(reward / kl), which is e^weight for
    a good token."""
    return share * math.exp(weight) / (share * math.exp(weight) + 1 - share)


def best_reversed(share, weight):
    """As `best` with KL(reference || policy), of which the estimate k3 in a loss has the gradient:
    the g with weight + share / g = (1 - share) / (1 - g)."""
    half = (weight - 1) / (2 * weight)
    return half + math.sqrt(half * half + share / weight)


# The mean of a group of 8 has an answer's own reward in it, which leaves 7 / 8 of the gradient.
@pytest.mark.slow
@pytest.mark.parametrize(
    "objective, options, expected, factor",
    [
        (PPO(kl=0.1, lam=1.0, value=1.0), {"prompts": 64}, best, 1),
        (RLOO(kl=0.1), {"prompts": 8, "samples": 8}, best, 1),
        (GRPO(kl=0.1, scale=False), {"prompts": 8, "samples": 8}, best_reversed, 7 / 8),
    ],
    ids=["ppo", "rloo", "grpo"],
)
def test_a_bandit_with_a_reference_settles_at_the_best_policy(objective, options, expected, factor):
    rewards, share = bandit(objective, 40, lr=2e-3, epochs=2, **options)
    found = sum(rewards[-8:]) / 8
    assert found == pytest.approx(expected(share, factor / (8 * 0.1)), abs=0.03)
