"""Direct preference optimisation (DPO, Rafailov et al. 2023) of a tiny decoder.

The model first learns to answer with any letters from a to h. Then it sees pairs of answers to the
same prompt, of which the chosen one has more vowels. DPO lets the chosen answer become likelier
than the rejected one, each compared with a reference, the model at the start. The margin is beta
times the difference of both log-ratios, so 0 before. A pair is told right if it is positive.

Run: python examples/dpo.py
"""

import json
import random

import torch

from tfkern.generate import generate
from tfkern.models import Transformer, TransformerConfig
from tfkern.train import CrossEntropy, adamw, steps
from tfkern.train.preferences import DPO

LETTERS, PROMPT, ANSWER = "abcdefgh:", 3, 4
END = 8  # the token ":" between prompt and answer
rng = random.Random(0)


def draw(count):
    return [rng.randrange(END) for _ in range(count)]


def vowels(row):
    """The share of vowels, a and e, in the answer of a row."""
    return sum(LETTERS[x] in "ae" for x in row[PROMPT + 1 :]) / ANSWER


def pair():
    """The same prompt with two answers, the better one first."""
    prompt = [*draw(PROMPT), END]
    rows = sorted(([*prompt, *draw(ANSWER)] for _ in "ab"), key=vowels, reverse=True)
    return rows if vowels(rows[0]) > vowels(rows[1]) else pair()


def batch(rows):
    """Rows as inputs, and as targets the tokens that follow; those of prompts are none (-100)."""
    rows = torch.tensor(rows)
    targets = rows[..., 1:].clone()
    targets[..., :PROMPT] = -100
    return {"tokens": rows[..., :-1], "targets": targets}


def look(title):
    """Pairs that are told right, their margins, and answers that the model writes."""
    model.eval()
    with torch.no_grad():
        chosen, rejected = objective.rewards(model(held["tokens"]), held).unbind(1)
    rows = [[*draw(PROMPT), END] for _ in range(200)]
    rows = [p + a.tolist() for p, a in zip(rows, generate(model, rows, ANSWER), strict=True)]
    right, margin = (chosen > rejected).float().mean().item(), (chosen - rejected).mean().item()
    told = {"right": right, "margin": margin, "vowels": sum(map(vowels, rows)) / len(rows)}
    print(title, told, *("".join(LETTERS[x] for x in row) for row in rows[:5]))
    return told


torch.manual_seed(0)
size = {"dim": 64, "layers": 2, "heads": 2, "vocab_size": 9, "positions": "rotary"}
model = Transformer(TransformerConfig(**size))
answers = [batch([pair()[i % 2] for i in range(32)]) for _ in range(100)]
list(steps(model, answers, CrossEntropy(), adamw(model, 3e-3), stop=100))  # runs the loop

objective = DPO(beta=0.5)
pairs = [batch([pair() for _ in range(32)]) for _ in range(100)]  # two rows are one item
batches = objective.extended(pairs, model)  # with log-probabilities of a copy, the reference
held = objective.extended([batch([pair() for _ in range(256)])], model)[0]
before = look("before:")
for record in steps(model, batches, objective, adamw(model, 1e-3), stop=100, clip_norm=1.0):
    print(f"step {record.step}: loss {record.loss:.3f}")
after = look("after:")
print(json.dumps({"before": before, "after": after}))
