"""Corruption: what is kept, how often each outcome comes, and that seeds decide everything."""

import itertools
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from tfkern.data import (
    IGNORED,
    corrupt_spans,
    delete_tokens,
    infill,
    mask_tokens,
    next_sentence,
    padded,
    permute_sentences,
    prefix,
    rotate,
    sentence_order,
    span_lengths,
    span_window,
)
from tfkern.data.corrupt import generator

MASK, CLS, SEP, END = 1, 2, 3, 4
SENTINELS = [999, *range(900, 990)]
TEXT = np.arange(100, 164)  # all different
ENDS = np.array([5, 6, 20, 33, 60, 64])

FUNCTIONS = {
    "mask": lambda t, s: mask_tokens(t, s, mask=MASK, vocab_size=500),
    "words": lambda t, s: mask_tokens(t, s, mask=MASK, vocab_size=500, words=t // 3),
    "spans": lambda t, s: corrupt_spans(t, s, sentinels=SENTINELS, end=END),
    "infill": lambda t, s: infill(t, s, mask=MASK),
    "delete": lambda t, s: delete_tokens(t, s),
    "rotate": rotate,
    "permute": lambda t, s: permute_sentences(t, ENDS, s),
    "prefix": lambda t, s: (np.array(prefix(t, s)[0]), prefix(t, s)[1]),
    "next": lambda t, s: next_sentence(t, ENDS, t + 200, ENDS, s, length=40, cls=CLS, sep=SEP)[:2],
    "order": lambda t, s: sentence_order(t, ENDS, s, length=40, cls=CLS, sep=SEP)[:2],
}


def like(counts, expected):
    """Whether counts fit expected ones: chi-square within 5 standard deviations of its mean."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert len(counts) == len(expected) and counts.sum() == pytest.approx(expected.sum())
    chi, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    return chi < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_seeds_decide(name):
    f = FUNCTIONS[name]
    before = TEXT.copy()
    np.random.seed(0)
    torch.manual_seed(0)
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = [np.concatenate([x.ravel() for x in f(TEXT, seed)]).tolist() for seed in range(8)]
    np.random.seed(5)
    again = [np.concatenate([x.ravel() for x in f(TEXT, seed)]).tolist() for seed in range(8)]
    assert first == again and len(set(map(tuple, first))) > 4
    np.random.seed(0)
    assert (np.random.get_state()[1] == state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (TEXT == before).all()
    for given in (TEXT.astype(np.uint16), torch.from_numpy(TEXT), TEXT[::1].tolist()):
        if name in ("words", "next") and not isinstance(given, np.ndarray):
            continue
        found = f(given, 3)
        assert all(x.dtype == np.int64 for x in found)
        assert np.concatenate([x.ravel() for x in found]).tolist() == first[3]
    for wrong in (-1, (3, -1), None, 1.5, "7", [[1]], True):
        with pytest.raises(ValueError, match="a seed is"):
            f(TEXT, wrong)
    for wrong in (TEXT[None], TEXT / 2):
        if name not in ("words",):
            with pytest.raises(ValueError, match=r"must be integers \(n,\)"):
                f(wrong, 1)


def test_seeds_are_apart():
    seeds = [0, 1, 2**32, 2**40, (0,), (0, 0), (0, 1), (1, 0), (7,), (7, 0), (2**32, 0), (0, 2**32)]
    draws = [int(generator(s).integers(2**62)) for s in seeds]
    assert len(set(draws)) == len(seeds) - 1  # 0 and (0,) are one
    assert draws[0] == draws[4]


def test_other_processes_agree():
    code = (
        "import numpy as np; from tfkern.data import corrupt_spans, infill, mask_tokens\n"
        "t = np.arange(100, 164); np.random.rand(3)\n"
        "print([x.tolist() for f in (lambda: mask_tokens(t, (3, 9), mask=1, vocab_size=500),\n"
        "  lambda: infill(t, (3, 9), mask=1),\n"
        "  lambda: corrupt_spans(t, (3, 9), sentinels=range(900, 990), end=4)) for x in f()])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": h}
        ).stdout
        for h in "12"
    }
    here = [
        x.tolist()
        for pair in (
            mask_tokens(TEXT, (3, 9), mask=1, vocab_size=500),
            infill(TEXT, (3, 9), mask=1),
            corrupt_spans(TEXT, (3, 9), sentinels=range(900, 990), end=4),
        )
        for x in pair
    ]
    assert runs == {f"{here}\n"}


def test_masks_have_berts_shares():
    special = (0, 5, 7, 600)
    text = np.tile([0, *range(8, 27), 5, 1], 10)
    n, ordinary, runs = len(text), 190, 800  # 10 * 19 tokens may be chosen
    counts, replaced, chosen = np.zeros(3), Counter(), np.zeros(n)
    for seed in range(runs):
        inputs, targets = mask_tokens(text, seed, mask=1, vocab_size=30, special=special)
        picked = targets != IGNORED
        chosen += picked
        assert (targets[picked] == text[picked]).all()
        assert (inputs[~picked] == text[~picked]).all()
        assert not np.isin(text[picked], [*special, 1]).any()
        assert picked.sum() in (math.floor(0.15 * ordinary), math.ceil(0.15 * ordinary))
        masked, changed = inputs[picked] == 1, inputs[picked] != text[picked]
        counts += (masked.sum(), (changed & ~masked).sum(), (~changed).sum())
        replaced.update(inputs[picked][changed & ~masked].tolist())
    total = counts.sum()
    # one of the 26 ordinary tokens below 30 that replaces a token is the token itself
    shares = np.array([0.8, 0.1 * 25 / 26, 0.1 + 0.1 / 26])
    assert like(counts, total * shares)
    assert abs(total / runs - 0.15 * ordinary) < 5 * (0.25 / runs) ** 0.5
    free = chosen[~np.isin(text, [*special, 1])]
    assert like(free, np.full(len(free), total / len(free)))
    assert set(replaced) == set(range(30)) - {0, 1, 5, 7}
    # the text has the tokens 8 to 26 alone: those that it lacks replace 26 / 25 as many
    weights = np.array([18 / 19 if 8 <= t < 27 else 1 for t in sorted(replaced)])
    observed = np.array([replaced[t] for t in sorted(replaced)])
    assert like(observed, observed.sum() * weights / weights.sum())


def test_masks_at_the_edges():
    for n in (0, 1, 2):
        for rate in (0, 1):
            inputs, targets = mask_tokens(TEXT[:n], 1, mask=MASK, vocab_size=500, rate=rate)
            assert ((targets != IGNORED) == rate).all() and len(inputs) == n
    only = np.array([5, 1, 5])
    inputs, targets = mask_tokens(only, 1, mask=1, vocab_size=9, special=[5], rate=1)
    assert (inputs == only).all() and (targets == IGNORED).all()
    with pytest.raises(ValueError, match="no ordinary tokens"):
        mask_tokens(TEXT, 1, mask=0, vocab_size=3, special=range(9))
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rate must lie in"):
            mask_tokens(TEXT, 1, mask=0, vocab_size=3, rate=rate)


def test_whole_words():
    words = np.repeat(np.arange(20), np.arange(20) % 4 + 1)
    text = np.arange(100, 100 + len(words))
    text[words == 3] = 5
    seen = Counter()
    for seed in range(1000):
        _, targets = mask_tokens(
            text, seed, mask=1, vocab_size=500, special=[5], words=words, rate=0.2
        )
        picked = {int(w) for w in words[targets != IGNORED]}
        assert set(words[targets == IGNORED].tolist()).isdisjoint(picked)
        assert len(picked) in (3, 4)  # 0.2 * 19
        seen.update(picked)
    assert 3 not in seen
    assert like(list(seen.values()), [sum(seen.values()) / 19] * 19)
    assert abs(sum(seen.values()) / 1000 - 3.8) < 5 * (0.16 / 1000) ** 0.5
    with pytest.raises(ValueError, match="words must have the shape"):
        mask_tokens(text, 1, mask=1, vocab_size=500, words=words[1:])


def t5_lengths(length, density, mean):
    """`random_spans_helper` of T5's code, for one length."""
    noise = round(length * density)
    spans = round(noise / mean)
    return length - noise + spans + 1, noise + spans + 1


def test_span_lengths_are_t5s():
    assert span_window(512) == 568 and span_lengths(568) == (512, 114)  # published
    for n in range(20, 600):
        for rate, mean in ((0.15, 3.0), (0.3, 2.0), (0.5, 8.0)):
            assert span_lengths(n, rate, mean) == t5_lengths(n, rate, mean)
            inputs = span_lengths(n, rate, mean)[0]
            assert span_window(inputs, rate, mean) >= n
            assert span_lengths(span_window(inputs, rate, mean), rate, mean)[0] <= inputs
            assert span_lengths(span_window(inputs, rate, mean) + 1, rate, mean)[0] > inputs
    with pytest.raises(ValueError, match="at least 3"):
        span_window(2)


def restored(inputs, targets, sentinels):
    """The text: sentinels of the inputs replaced by what follows them in the targets."""
    assert inputs[-1] == targets[-1] == END
    said, last = {}, None
    for token in targets[:-1].tolist():
        if token in sentinels:
            last = token
            said[last] = []
        else:
            said[last].append(token)
    out = []
    for token in inputs[:-1].tolist():
        out += said.pop(token) if token in sentinels else [token]
    assert not said
    return out


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 64, 500])
@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3), (0.5, 1), (0.9, 2.5), (0.01, 30)])
def test_spans_give_the_text_back(n, rate, mean):
    text = np.random.default_rng(n).integers(10, 800, n)
    sentinels = [10_000 - i for i in range(n)]
    for seed in range(5):
        inputs, targets = corrupt_spans(
            text, seed, sentinels=sentinels, end=END, rate=rate, mean=mean
        )
        assert (len(inputs), len(targets)) == span_lengths(n, rate, mean)
        assert restored(inputs, targets, sentinels) == text.tolist()
        used = [t for t in inputs.tolist() if t in sentinels]
        assert used == sentinels[: len(used)] == [t for t in targets.tolist() if t in sentinels]


def test_all_spans_are_equally_likely():
    """9 tokens, 4 lost in 2 spans: 3 ways to cut what is lost times 4 to cut what stays."""
    seen = Counter()
    for seed in range(3000):
        inputs, _ = corrupt_spans(TEXT[:9], seed, sentinels=SENTINELS, end=END, rate=0.45, mean=2)
        seen[tuple(inputs)] += 1
    assert len(seen) == 3 * 4 and like(list(seen.values()), [250] * 12)


def test_wrong_spans():
    with pytest.raises(ValueError, match="3 spans need as many sentinels, got 2"):
        corrupt_spans(TEXT, 1, sentinels=SENTINELS[:2], end=END)
    with pytest.raises(ValueError, match="have sentinels already"):
        corrupt_spans(np.append(TEXT, SENTINELS[80]), 1, sentinels=SENTINELS, end=END)
    for n in (0, 1):
        with pytest.raises(ValueError, match="2 tokens or more"):
            corrupt_spans(TEXT[:n], 1, sentinels=SENTINELS, end=END)
    for options, message in (({"rate": 0}, "rate"), ({"rate": 1}, "rate"), ({"mean": 0.5}, "mean")):
        with pytest.raises(ValueError, match=f"{message} must lie in"):
            corrupt_spans(TEXT, 1, sentinels=SENTINELS, end=END, **options)


def poisson(k, mean=3.0):
    return math.exp(-mean) * mean**k / math.factorial(k)


def test_infilling_keeps_the_rest():
    for n, rate, seed in itertools.product((0, 1, 2, 10, 64), (0, 0.3, 1), range(40)):
        inputs, targets = infill(TEXT[:n], seed, mask=MASK, rate=rate)
        kept = inputs[inputs != MASK]
        assert targets.tolist() == TEXT[:n].tolist()
        assert len(kept) == n - math.ceil(rate * n)
        assert (np.diff(kept) > 0).all() and np.isin(kept, targets).all()
        assert rate or (inputs == targets).all()


def test_infilling_draws_from_poisson():
    """Spans between tokens that stay: their lengths are told by the tokens on either side."""
    n, runs = 2000, 60
    lengths, slots = Counter(), np.zeros(10)
    text = np.arange(10, 10 + n)
    for seed in range(runs):
        inputs, _ = infill(text, seed, mask=MASK)
        where = np.flatnonzero(inputs == MASK)
        slots += np.histogram(where, 10, (0, len(inputs)))[0]
        for i in where[(where > 0) & (where < len(inputs) - 1)]:
            if MASK not in (inputs[i - 1], inputs[i + 1]):  # alone between two tokens
                lengths[int(inputs[i + 1] - inputs[i - 1]) - 1] += 1
    total = sum(lengths.values())
    shares = [poisson(k) for k in range(8)]
    counts = [lengths[k] for k in range(8)]
    assert like([*counts, total - sum(counts)], total * np.array([*shares, 1 - sum(shares)]))
    assert like(slots, np.full(10, slots.sum() / 10))


def test_infilling_cuts_any_span():
    """The span that is cut short to fit is as often the first of the row as the last."""
    longer = Counter()
    for seed in range(1500):
        inputs, _ = infill(TEXT, seed, mask=MASK, rate=0.1)
        where = np.flatnonzero(inputs == MASK)
        if len(where) > 1 and where[0] > 0 and where[-1] < len(inputs) - 1:
            sizes = [inputs[i + 1] - inputs[i - 1] for i in (where[0], where[-1])]
            if MASK not in inputs[[where[0] + 1, where[-1] - 1]]:
                longer[int(np.sign(sizes[0] - sizes[1]))] += 1
    more, less = longer[1], longer[-1]
    assert more + less > 500 and abs(more - less) < 5 * (more + less) ** 0.5


def test_deletion_rotation_permutation():
    kept = np.zeros(64)
    for seed in range(2000):
        inputs, targets = delete_tokens(TEXT, seed, rate=0.25)
        assert (np.diff(inputs) > 0).all() and (targets == TEXT).all()
        kept[inputs - 100] += 1
    assert abs(kept - 1500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    first = Counter(int(rotate(TEXT[:8], seed)[0][0]) for seed in range(1600))
    assert len(first) == 8 and like(list(first.values()), [200] * 8)
    assert any(rotate(TEXT, 5)[0].tolist() == np.roll(TEXT, -k).tolist() for k in range(64))
    assert rotate(TEXT[:0], 1)[0].tolist() == []
    orders = Counter()
    for seed in range(2400):
        inputs, targets = permute_sentences(TEXT[:9], [2, 3, 7, 9], seed)
        orders[tuple(inputs)] += 1
        assert targets.tolist() == TEXT[:9].tolist()
    sentences = ([100, 101], [102], [103, 104, 105, 106], [107, 108])
    assert set(orders) == {tuple(sum(p, [])) for p in itertools.permutations(sentences)}
    assert like(list(orders.values()), [100] * 24)
    for ends in ([], [8], [10], [0, 9], [5, 5, 9], [5, 3, 9], [-1, 9]):
        with pytest.raises(ValueError, match="ends must rise"):
            permute_sentences(TEXT[:9], ends, 1)


def test_prefix():
    ends = Counter()
    for seed in range(1200):
        end, targets = prefix(np.append(TEXT[1:7], [IGNORED] * 3), seed)
        ends[end] += 1
        # the prefix is the tokens 100 to 99 + end
        assert targets[: end - 1].tolist() == [IGNORED] * (end - 1)
        assert targets[end - 1 : 6].tolist() == TEXT[end:7].tolist()
        assert (targets[6:] == IGNORED).all()
    assert set(ends) == set(range(1, 7)) and like(list(ends.values()), [200] * 6)
    assert prefix(np.full(3, IGNORED), 1)[0] == 1
    assert prefix(TEXT[:1], 1)[0] == 1


def parted(pair):
    """The two texts of a row, whose form is checked."""
    tokens, types = pair.tokens.tolist(), pair.types.tolist()
    middle = tokens.index(SEP)
    assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
    assert types == [0] * (middle + 1) + [1] * (len(tokens) - middle - 1)
    return tokens[1:middle], tokens[middle + 1 : -1]


@pytest.mark.parametrize("length", [5, 6, 12, 40, 500])
def test_pairs(length):
    labels, starts, cuts = {"next": [], "order": []}, Counter(), Counter()
    edges = (ENDS + 100).tolist()
    for seed in range(600):
        pair = next_sentence(TEXT, ENDS, TEXT + 200, ENDS, seed, length=length, cls=CLS, sep=SEP)
        a, b = parted(pair)
        labels["next"].append(pair.label)
        assert len(pair.tokens) <= length and a and b and max(a) < 200
        assert np.diff(a).tolist() == [1] * (len(a) - 1)
        assert np.diff(b).tolist() == [1] * (len(b) - 1)
        assert (min(b) >= 300) == pair.label
        if length == 500:
            starts[a[0]] += 1
            if not pair.label:
                cuts[a[0], b[0]] += 1
                assert b[0] == a[-1] + 1 and b[0] in edges and b[-1] == TEXT[-1]
        pair = sentence_order(TEXT, ENDS, seed, length=length, cls=CLS, sep=SEP)
        a, b = parted(pair)
        labels["order"].append(pair.label)
        assert len(pair.tokens) <= length and a and b and (a[0] > b[0]) == pair.label
        if length == 500:
            assert (b[-1] + 1 == a[0]) if pair.label else (a[-1] + 1 == b[0])
    for drawn in labels.values():
        assert abs(np.mean(drawn) - 0.5) < 5 * 0.5 / 600**0.5
    if length == 500:
        assert len(starts) == 5 and like(list(starts.values()), [120] * 5)
        assert len(cuts) == 5 + 4 + 3 + 2 + 1


def cut_one_by_one(a, b, room, rng):
    """BERT's `truncate_seq_pair`, but for the generator: lengths alone are compared."""
    a, b = list(a), list(b)
    while len(a) + len(b) > room:
        longer = a if len(a) > len(b) else b
        longer.pop(0 if rng.random() < 0.5 else -1)
    return a, b


def test_pairs_lose_tokens_as_berts():
    from tfkern.data.pairs import _pair

    rng = np.random.default_rng(0)
    for la, lb, room in itertools.product((1, 2, 5, 9, 10), (1, 2, 5, 9, 10), (2, 3, 6, 11, 12)):
        a, b = np.arange(100, 100 + la), np.arange(200, 200 + lb)
        found = parted(_pair(a, b, 0, room, CLS, SEP, rng))
        assert [*map(len, found)] == [*map(len, cut_one_by_one(a, b, room, rng))]
    lost = Counter()
    expected = Counter()
    for _ in range(2000):
        found = _pair(np.arange(100, 110), np.arange(200, 202), 0, 8, CLS, SEP, rng)
        lost[parted(found)[0][0]] += 1
        expected[cut_one_by_one(range(100, 110), range(2), 8, rng)[0][0]] += 1
    assert lost.keys() == expected.keys() == {100, 101, 102, 103, 104}
    assert like([lost[k] for k in range(100, 105)], [2000 * math.comb(4, k) / 16 for k in range(5)])


def test_short_documents():
    one = np.array([5])
    for seed in range(20):
        pair = next_sentence(TEXT[:5], one, TEXT[5:9], [1, 4], seed, length=20, cls=CLS, sep=SEP)
        assert pair.label == 1 and parted(pair)[0] == TEXT[:5].tolist()
        with pytest.raises(ValueError, match="one sentence has no order"):
            sentence_order(TEXT[:5], one, seed, length=20, cls=CLS, sep=SEP)
    with pytest.raises(ValueError, match="length must be at least 5"):
        sentence_order(TEXT, ENDS, 1, length=4, cls=CLS, sep=SEP)
    with pytest.raises(ValueError, match="ends must rise"):
        next_sentence(TEXT, ENDS, TEXT, [], 1, length=20, cls=CLS, sep=SEP)
    row = sentence_order(TEXT, ENDS, 1, length=20, cls=CLS, sep=SEP)
    assert len(padded(row.types, 25, 0)) == 25
