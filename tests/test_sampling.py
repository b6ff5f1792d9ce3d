"""How a token is chosen: the processors of transformers, and the distributions to draw from."""

import pytest
import torch

huggingface = pytest.importorskip("huggingface")
from huggingface import transformers  # noqa: E402

from tfkern.generate import Sampling  # noqa: E402
from tfkern.generate import sampling as processors  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, WIDTH = 1000, 50


def random_logits():
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(ROWS, WIDTH, generator=generator)


def random_history():
    generator = torch.Generator().manual_seed(4)
    return torch.randint(WIDTH, (ROWS, 60), generator=generator)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"temperature": 0.7}, ("TemperatureLogitsWarper", (0.7,))),
        ({"top_k": 7}, ("TopKLogitsWarper", (7,))),
        ({"top_k": 200}, ("TopKLogitsWarper", (200,))),
        ({"top_p": 0.8}, ("TopPLogitsWarper", (0.8,))),
        ({"top_p": 0.01}, ("TopPLogitsWarper", (0.01,))),
        ({"min_p": 0.1}, ("MinPLogitsWarper", (0.1,))),
        ({"typical_p": 0.6}, ("TypicalLogitsWarper", (0.6,))),
        ({"repetition_penalty": 1.3}, ("RepetitionPenaltyLogitsProcessor", (1.3,))),
        ({"repetition_penalty": 0.8}, ("RepetitionPenaltyLogitsProcessor", (0.8,))),
        ({"no_repeat_ngram": 2}, ("NoRepeatNGramLogitsProcessor", (2,))),
        ({"no_repeat_ngram": 1}, ("NoRepeatNGramLogitsProcessor", (1,))),
        ({"banned": [[3], [7, 9], [1, 2, 4]]},
         ("NoBadWordsLogitsProcessor", ([[3], [7, 9], [1, 2, 4]],))),
        ({"bias": {4: 2.5, 8: -1.0}},
         ("SequenceBiasLogitsProcessor", ({(4,): 2.5, (8,): -1.0},))),
        ({"min_tokens": 80}, ("MinLengthLogitsProcessor", (80, [5, 6]))),
    ],
)  # fmt: skip
def test_processors_are_those_of_transformers(options, theirs):
    kind, arguments = theirs
    history, logits = random_history(), random_logits()
    if "banned" in options:
        history[::2, -1], history[1::4, -2:] = 7, torch.tensor([1, 2])
    expected = getattr(transformers, kind)(*arguments)(history, logits.clone())
    result = Sampling(**options).logits(logits, history.tolist(), 60, [5, 6])
    assert torch.equal(result == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(result, expected)


def test_cuts_at_one_cut_nothing():
    """Rounding in sums over a large vocabulary takes no token."""
    logits = 3 * torch.randn(4, 50257)
    for options in ({"top_p": 1.0}, {"typical_p": 1.0}):
        assert Sampling(**options).logits(logits, [[]] * 4).isfinite().all()


def test_draws_follow_the_softmax():
    """Chi-square of 20 000 draws, with and without a cut; nothing of probability 0."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(temperature=0.5)):
        p = sampling.probabilities(sampling.logits(logits, [[]]))
        generator = torch.Generator().manual_seed(9)
        counts = torch.zeros(6, dtype=torch.float64)
        for _ in range(20_000):
            counts[processors.draw(p, [generator])] += 1
        expected = 20_000 * (logits.double() / sampling.temperature).softmax(-1)[0]
        if sampling.top_k:
            expected[3:] = 0
            expected *= 20_000 / expected.sum()
        kept = expected > 0
        assert counts[~kept].sum() == 0
        chi = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
        assert chi < 25  # with 5 degrees of freedom more has a probability of 1e-4
