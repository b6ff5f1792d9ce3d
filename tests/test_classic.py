"""Luong's, Bahdanau's, soft, hard and aggregated attention against loops, and on tasks that tell
them apart."""

import math

import pytest
import torch
from torch import nn

import tfkern
from tfkern.classic import (
    AdditiveAttention,
    HardAttention,
    LuongAttention,
    MovingBaseline,
    RecurrentSeq2Seq,
    SoftAttention,
    coverage_penalty,
    reinforce,
    running_mean,
)
from tfkern.models import cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, S, C = 2, 5, 7, 6


def inputs(T=T, S=S):
    return (torch.randn(B, n, C, dtype=torch.float64, requires_grad=True) for n in (T, S))


def test_aggregated_context():
    """The running mean by a loop, a matrix, a softmax of masked zeros, and causal attention with
    queries of zero."""
    x = torch.randn(B, T, C, dtype=torch.float64)
    loop = torch.stack([torch.stack([r[: t + 1].mean(0) for t in range(T)]) for r in x])
    ones = torch.ones(T, T, dtype=torch.float64).tril()
    matrix = ones / ones.sum(1, keepdim=True) @ x
    masked = torch.zeros_like(ones).masked_fill(ones == 0, -torch.inf).softmax(-1) @ x
    k = torch.randn(B, 1, T, C, dtype=torch.float64)
    fused = tfkern.attention(torch.zeros_like(k), k, x[:, None], causal=True)[:, 0]
    for y in (matrix, masked, fused, running_mean(x)):
        torch.testing.assert_close(y, loop, rtol=0, atol=1e-12)
    numbers = running_mean(torch.tensor([18.0, 47.0, 56.0]).view(1, 3, 1)).flatten()
    torch.testing.assert_close(numbers, torch.tensor([18.0, 32.5, 40.333333]))


def loop(module, query, memory, lengths, first=0):
    """Luong's formulas, one number at a time."""
    zero = torch.zeros((), dtype=torch.float64)
    rows, out = [], []
    for b in range(B):
        n = memory.shape[1] if lengths is None else int(lengths[b])
        for t, h in enumerate(query[b]):
            if module.kind == "dot":
                scores = [h @ m for m in memory[b, :n]]
            elif module.kind == "general":
                scores = [m @ (module.general.weight @ h) for m in memory[b, :n]]
            elif module.kind == "concat":
                a = module.additive
                both = torch.cat([a.query.weight, a.memory.weight], 1)
                scores = [
                    a.score.weight[0] @ (both @ torch.cat([h, m]) + a.query.bias).tanh()
                    for m in memory[b, :n]
                ]
            else:
                scores = list((module.location.weight @ h + module.location.bias)[:n])
            centre = float(first + t)
            if module.reach == "local-p":
                hidden = (module.place_hidden.weight @ h).tanh()
                centre = (n * (module.place.weight[0] @ hidden).sigmoid()).item()
            D = math.inf if module.reach == "global" else module.window
            row = [zero] * memory.shape[1]
            seen = [s for s in range(n) if abs(s - centre) <= D]
            if seen:
                p = torch.stack([scores[s] for s in seen]).softmax(0)
                for s, value in zip(seen, p, strict=True):
                    if module.reach == "local-p":
                        value = value * math.exp(-((s - centre) ** 2) / (2 * (D / 2) ** 2))
                    row[s] = value
            rows.append(torch.stack(row))
            out.append(module.combine.weight @ torch.cat([rows[-1] @ memory[b], h]))
    weights = torch.stack(rows).view(B, query.shape[1], memory.shape[1])
    return torch.stack(out).view(query.shape).tanh(), weights


@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
@pytest.mark.parametrize("reach", ["global", "local-m", "local-p"])
@pytest.mark.parametrize("padded", [False, True, "empty"])
def test_luong(score, reach, padded):
    """Outputs, weights and the gradients of everything, for T unlike S and for T = S."""
    module = LuongAttention(C, score, reach, window=2, max_length=S).double()
    lengths = torch.tensor([S, 0]) if padded == "empty" else torch.tensor([S, 4])
    lengths = lengths if padded else None
    for sizes in ((T, S), (S, S)):
        query, memory = inputs(*sizes)
        y, weights = module(query, memory, lengths)
        expected, expected_weights = loop(module, query, memory, lengths)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-12)
        leaves = [query, memory, module.combine.weight]
        leaves += [module.general.weight] if score == "general" else []
        a, b = (
            torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
            for out in (y, expected)
        )
        if reach != "local-p":  # whose centre the loop takes as a number
            for x, e in zip(a, b, strict=True):
                torch.testing.assert_close(x, e, rtol=0, atol=1e-10)


def test_local_p_learns_where_to_look():
    """The place has a gradient through the Gaussian, that of finite differences."""
    module = LuongAttention(C, "general", "local-p", window=3).double()
    query, memory = inputs()
    loss = module(query, memory)[0].square().sum()
    weight = module.place.weight
    grads = torch.autograd.grad(loss, [weight, module.place_hidden.weight])
    assert all(g.abs().sum() > 1e-3 for g in grads)
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight[0, 2] += sign * step
            values.append(module(query, memory)[0].square().sum().item())
            weight[0, 2] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(grads[0][0, 2].item(), rel=1e-5)


def test_local_attention_is_a_sliding_window():
    module = LuongAttention(C, "dot", "local-m", window=2)
    x = torch.randn(B, 1, S, C)
    o = tfkern.attention(x, x, x, scale=1.0, window=(2, 2))[:, 0]
    y, _ = module(x[:, 0], x[:, 0])
    torch.testing.assert_close(y, module.combine(torch.cat([o, x[:, 0]], -1)).tanh())


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_wide_windows_are_global(score):
    """A window that reaches everywhere, and a Gaussian that falls off nowhere, change nothing."""
    query, memory = inputs()
    whole = LuongAttention(C, score).double()
    for reach, window, tolerance in (("local-m", S, 1e-12), ("local-p", 10**6, 1e-9)):
        local = LuongAttention(C, score, reach, window=window).double()
        local.load_state_dict(whole.state_dict(), strict=False)
        for a, b in zip(local(query, memory), whole(query, memory), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_steps_of_local_attention():
    """One query at a time, with its number, is all at once."""
    module = LuongAttention(C, "general", "local-m", window=1).double()
    query, memory = inputs()
    y, _ = module(query, memory)
    steps = [module(query[:, t : t + 1], memory, first=t)[0] for t in range(T)]
    torch.testing.assert_close(torch.cat(steps, 1), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [AdditiveAttention, SoftAttention])
def test_additive_attention(kind):
    """Bahdanau's formula, with another size of memory, and the gate of soft attention."""
    module = kind(C, 4, 5).double()
    query, memory = next(inputs()), torch.randn(B, S, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([S, 3])
    y, weights = module(query, memory, lengths)
    for b in range(B):
        for t, h in enumerate(query[b]):
            a, there = module.scores, memory[b, : lengths[b]]
            hidden = [(a.query(h) + a.memory(m)).tanh() for m in there]
            p = torch.cat([a.score(x) for x in hidden]).softmax(0)
            context = p @ memory[b, : lengths[b]]
            if kind is SoftAttention:
                context = context * (module.gate.weight[0] @ h + module.gate.bias).sigmoid()
            torch.testing.assert_close(y[b, t], context)
            torch.testing.assert_close(weights[b, t, : lengths[b]], p)
    assert not weights[1, :, 3:].any()
    assert torch.autograd.gradcheck(lambda q, m: module(q, m, lengths), (query, memory))


@pytest.mark.parametrize(
    "kind, member",
    [
        (lambda: LuongAttention(C, "concat"), "additive"),
        (lambda: AdditiveAttention(C), "scores"),
        (lambda: SoftAttention(C), "scores"),
        (lambda: HardAttention(C), "scores"),
    ],
)
def test_the_network_that_scores_is_called(kind, member):
    """The network is called as a module, so that its hooks run."""
    module = kind().double()
    query, memory = inputs()
    getattr(module, member).register_forward_hook(lambda m, args, scores: 0 * scores)
    weights = module(query, memory)[1]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / S))


def test_coverage_penalty():
    even = torch.full((1, 4, 4), 0.25)
    assert coverage_penalty(even).item() == 0
    stuck = torch.zeros(1, 4, 4)
    stuck[:, :, 0] = 1
    assert coverage_penalty(stuck).item() == 9 + 3  # (1 - 4)^2 + 3


@pytest.mark.parametrize("baseline", [0.0, 1.7])
def test_reinforce_is_unbiased(baseline):
    """The mean of 200 000 estimates is the exact gradient, for every logit."""
    torch.manual_seed(0)
    n, logits = 200_000, torch.tensor([0.5, -0.3, 0.0, 1.0, -1.0, 0.2], dtype=torch.float64)
    rewards = torch.tensor([1.0, 3.0, -2.0, 0.5, 4.0, 0.0], dtype=torch.float64)
    rows = logits.expand(n, 1, -1).clone().requires_grad_()
    module = HardAttention(1, 1, soft_share=0.0).train()
    module.scores.forward = lambda *_: rows
    choice = module(None, torch.zeros(n, 6, 1))
    loss = reinforce(choice, rewards[choice.place], baseline, entropy=0.0)
    (grad,) = torch.autograd.grad(loss, rows)
    estimates = -n * grad[:, 0]  # of the reward, one for each draw
    p = logits.softmax(0)
    exact = p * (rewards - p @ rewards)
    error = estimates.mean(0) - exact
    assert (error.abs() <= 4 * estimates.std(0) / math.sqrt(n)).all()


def test_entropy_and_log_probability():
    module = HardAttention(C, soft_share=0.0).double().train()
    query, memory = inputs()
    choice = module(query, memory, torch.tensor([S, 1]))
    p = module.scores(query, memory, torch.tensor([S, 1])).softmax(-1)
    torch.testing.assert_close(choice.log_prob.exp(), p.gather(-1, choice.place[..., None])[..., 0])
    torch.testing.assert_close(choice.entropy, torch.special.entr(p).sum(-1))
    assert torch.equal(choice.place[1], torch.zeros(T, dtype=torch.int64))
    grad = torch.autograd.grad(choice.entropy.sum(), query)[0]
    assert grad.isfinite().all()


def test_hard_attention_looks_at_one_patch():
    """What other patches hold does not matter; in evaluation the likeliest is taken."""
    module = HardAttention(C).eval()
    query, memory = torch.randn(1, 1, C), torch.randn(1, S, C)
    choice = module(query, memory)
    assert choice.place.item() == choice.weights.argmax().item()
    assert torch.equal(choice.context[0, 0], memory[0, choice.place.item()])
    others = torch.arange(S) != choice.place.item()
    values = memory.clone()
    values[:, others] = torch.nan
    scores = module.scores(query, memory)
    module.scores.forward = lambda *_: scores
    assert module(query, values).context.isfinite().all()


def test_moving_baseline():
    baseline = MovingBaseline(0.9)
    values = [baseline(torch.tensor([r, r])).item() for r in (1.0, 1.0, 5.0)]
    assert values == pytest.approx([0.0, 0.1, 0.19])
    assert baseline.value.item() == pytest.approx(0.19 * 0.9 + 0.5)


class Looker(nn.Module):
    """A question that attention asks of patches, and a class from what they show."""

    def __init__(self, attention):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.attention, self.classes = attention, nn.Linear(4, 4)

    def forward(self, patches):
        seen = self.attention(self.query.expand(len(patches), -1, -1), patches)
        return self.classes(seen[0][:, 0, :4]), seen


def cues(n):
    """16 patches: one has a mark and shows the class to tell, the others all show some class. That
    of the others tells nothing, and what has the mark cannot be told by elimination."""
    target, cue, row = torch.randint(4, (n,)), torch.randint(16, (n,)), torch.arange(n)
    shown = torch.randint(4, (n, 1)).expand(n, 16).clone()
    shown[row, cue] = target
    patches = torch.cat([nn.functional.one_hot(shown, 4), torch.zeros(n, 16, 1)], -1)
    patches[row, cue, 4] = 1
    return patches, target, cue


@pytest.mark.parametrize("hard", [False, True])
def test_cue_task(hard):
    """Attention finds the marked patch, trained by gradients or by REINFORCE."""
    torch.manual_seed(0)
    model = Looker(HardAttention(16, 5) if hard else SoftAttention(16, 5))
    baseline, optimizer = MovingBaseline(), torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(600):
        patches, target, _ = cues(64)
        logits, seen = model(patches)
        logp = logits.log_softmax(-1).gather(1, target[:, None])
        loss = -logp.mean()
        if hard:
            loss = loss + reinforce(seen, logp, baseline(logp), entropy=0.002)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    patches, target, cue = cues(1000)
    logits, seen = model(patches)
    assert (logits.argmax(-1) == target).float().mean() >= 0.97
    assert (seen[1][:, 0].argmax(-1) == cue).float().mean() >= 0.97


def copy_accuracy(reach, length, steps=600, **options):
    """The share of symbols that a recurrent model copies right, with teacher forcing."""
    torch.manual_seed(0)
    attention = None if reach is None else LuongAttention(64, "general", reach, window=2)
    model = RecurrentSeq2Seq(20, 64, attention=attention, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def batch(n):
        source = torch.randint(2, 20, (n, length))
        return source, torch.cat([torch.ones(n, 1, dtype=torch.int64), source[:, :-1]], 1)

    for _ in range(steps):
        source, tokens = batch(64)
        optimizer.zero_grad()
        cross_entropy(model(tokens, source=source), source).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    source, tokens = batch(500)
    with torch.no_grad():
        return (model(tokens, source=source).argmax(-1) == source).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("reach", [None, "global", "local-m", "local-p"])
def test_copy_table(reach):
    """One vector suffices for 6 symbols and not for 24; attention does not mind."""
    short, long = copy_accuracy(reach, 6), copy_accuracy(reach, 24)
    if reach is None:
        assert short >= 0.85 and long <= 0.6
    else:
        assert short >= 0.97 and long >= 0.97


def test_copy_task_in_short():
    """Local attention copies 16 symbols when one vector holds less than half of them."""
    assert copy_accuracy("local-m", 16, steps=150) >= 0.9
    assert copy_accuracy(None, 16, steps=150) <= 0.5


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("attention", [None, "global", "local-m", "local-p", "additive"])
@pytest.mark.parametrize("input_feeding", [False, True])
def test_recurrent_models(cell, attention, input_feeding):
    """Padding of the source changes nothing, later tokens change no earlier output, and training
    reaches every parameter."""
    if attention is None and input_feeding:
        with pytest.raises(ValueError, match="input_feeding needs attention"):
            RecurrentSeq2Seq(9, C, cell, input_feeding=True)
        return
    module = None
    if attention == "additive":
        module = AdditiveAttention(C)
    elif attention:
        module = LuongAttention(C, "general", attention, window=2)
    model = RecurrentSeq2Seq(9, C, cell, module, input_feeding).double()
    source, tokens = torch.randint(9, (2, 6)), torch.randint(9, (2, 4))
    if attention == "local-m":  # query t looks at the places around t, also step by step
        weights = []
        handle = module.register_forward_hook(lambda m, args, out: weights.append(out[1]))
        model(tokens, source=source)
        handle.remove()
        near = (torch.arange(6) - torch.arange(4)[:, None]).abs() <= 2
        assert torch.equal(torch.cat(weights, 1) > 0, near.expand(2, -1, -1))
    alone = model(tokens[1:], source=source[1:, :4])
    padded = model(tokens, source=source, lengths=torch.tensor([6, 4]))
    torch.testing.assert_close(padded[1:], alone, rtol=0, atol=1e-12)
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] + 1) % 9
    before, after = model(tokens, source=source), model(changed, source=source)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-12)
    loss = cross_entropy(model(tokens, source=source), tokens)
    expected = nn.functional.cross_entropy(
        model(tokens, source=source).flatten(0, 1), tokens.flatten()
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_errors():
    for arguments, message in (
        (("sum",), "score"),
        (("dot", "near"), "reach"),
        (("dot", "local-m"), "reach 'local-m' needs a positive window, got None"),
        (("location",), "score 'location' needs max_length"),
    ):
        with pytest.raises(ValueError, match=message):
            LuongAttention(C, *arguments)
    with pytest.raises(ValueError, match="memory has length 7, more than max_length, 3"):
        LuongAttention(C, "location", max_length=3).double()(*inputs())
    with pytest.raises(ValueError, match=r"soft_share must lie in \[0, 1\]"):
        HardAttention(C, soft_share=2.0)
    with pytest.raises(ValueError, match="cell must be gru or lstm, got 'rnn'"):
        RecurrentSeq2Seq(9, C, "rnn")
