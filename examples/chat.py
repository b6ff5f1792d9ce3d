"""Supervised fine-tuning on conversations (Ouyang et al. 2022): a tiny decoder learns to answer.

It is asked to spell words of letters backwards or twice. A chat template writes a conversation as
one text. Only what the assistant says is learned, and several conversations share a row without
seeing each other. Afterwards the model answers questions on words that it has not seen.

Run: python examples/chat.py
"""

import json
import random
import tempfile
from pathlib import Path

import torch

from tfkern import tokenize
from tfkern.data import Chat, Template
from tfkern.generate import GREEDY, generate
from tfkern.models import Transformer, TransformerConfig
from tfkern.train import CrossEntropy, adamw, evaluate, schedule, steps, task

STEPS = 700
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '?' if message.role == 'user' else '!' }}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' }}"
    "{% endfor %}{{ '!' if add_generation_prompt }}"
)
RULES = {"back": lambda word: word[::-1], "twice": lambda word: word + word}


def conversation(rng):
    """One or two questions with answers."""
    messages = []
    for _ in range(rng.randint(1, 2)):
        rule, word = rng.choice([*RULES]), "".join(rng.choices("abcdef", k=rng.randint(2, 4)))
        messages += [{"role": "user", "content": f"{rule} {word}"}]
        messages += [{"role": "assistant", "content": RULES[rule](word)}]
    return messages


rng = random.Random(0)
conversations = [conversation(rng) for _ in range(1200)]
letters = tokenize.characters(["abcdefghijklmnopqrstuvwxyz ?!"])
tokenizer = tokenize.Tokenizer(letters.backend, {"eos": "<|endoftext|>"})

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder)
    tokenize.save(tokenizer, path / "tokenizer")
    (path / "template").write_text(TEMPLATE)
    (path / "rows").write_text("\n".join(json.dumps({"messages": x}) for x in conversations))
    found = task(
        "chat", path / "rows", length=64, batch=16, packed=True, validation_batches=4,
        tokenizer=str(path / "tokenizer"), template=str(path / "template"),
    )  # fmt: skip

torch.manual_seed(0)
model = Transformer(
    TransformerConfig(dim=96, layers=2, heads=4, positions="rotary", **found.config)
)
updates, rates = adamw(model, 3e-3), schedule("cosine", steps=STEPS, warmup=50, floor=0.1)
for record in steps(
    model, found.batches, CrossEntropy(), updates, stop=STEPS, schedule=rates, clip_norm=1.0
):
    if record.step % 100 == 0:
        loss = evaluate(model, found.validation, CrossEntropy()).loss
        print(f"step {record.step}: loss {record.loss:.3f}, of rows kept apart {loss:.3f}")

model.eval()
chat, known = Chat(tokenizer, Template(TEMPLATE)), {m["content"] for x in conversations for m in x}
asked = [x for x in (conversation(rng)[:2] for _ in range(300)) if x[0]["content"] not in known]
prompts = [chat.prompt({"prompt": x[:1]}).tolist() for x in asked]
answers = [tokenizer.decode(row) for row in generate(model, prompts, 10, sampling=GREEDY)]
right = [a == x[1]["content"] for a, x in zip(answers, asked, strict=True)]
print(*(f"{x[0]['content']}: {a}" for a, x in zip(answers[:4], asked, strict=False)), sep="\n")
share = sum(right) / len(right)
print(f"{share:.1%} of {len(right)} answers to new questions are right")
print(json.dumps({"right": share, "questions": len(right)}))
