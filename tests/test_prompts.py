"""Prompts from files, and in batches for rollouts."""

import json

import pytest
import torch

pytest.importorskip("grain")
pytest.importorskip("tokenizers")

from tfkern import tokenize  # noqa: E402
from tfkern.models import Transformer, TransformerConfig  # noqa: E402
from tfkern.train import GRPO, Prompts, Rollouts, TextReward, adamw, steps  # noqa: E402
from tfkern.train.tasks import task  # noqa: E402
from tfkern.train.tasks.vocabulary import extended  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    found = extended(tokenize.characters(["0123456789+=abcdefghijklmnopqrstuvwxyz:; "]), "eos")
    tokenize.save(found, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def sums(folder, count=40):
    rows = [{"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(count)]
    rows[7] = {"prompt": [{"role": "user", "content": "7+8"}], "answer": "15", "hint": "odd"}
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "sums.jsonl"


def opened(folder, path=None, **options):
    options = {"length": 24, "batch": 6, "tokenizer": str(folder / "tokenizer")} | options
    return task("prompts", sums(folder) if path is None else path, **options)


def test_prompts_come_back_with_their_columns(folder):
    found = opened(folder)
    assert found.config["head"] == "lm"
    assert found.config["max_length"] == 24
    assert found.config["end_token"] == found.tokenizer.special_id("eos")
    seen, held = {}, {}
    for part, batches in (
        (seen, [found.batches[i] for i in range(8)]), (held, list(found.validation))
    ):  # fmt: skip
        for batch in batches:
            assert batch.keys() == {"prompt", "answer", "hint"}
            columns = (batch[name] for name in ("prompt", "answer", "hint"))
            for tokens, *told in zip(*columns, strict=True):
                part[found.tokenizer.decode(tokens)] = tuple(told)
    assert not seen.keys() & held.keys()
    assert len(held) >= 1
    assert len(seen) > 25
    for text, told in (seen | held).items():
        if text == "u:7+8;a:":
            assert told == ("15", "odd")
        else:
            i = int(text.partition("+")[0])
            assert text == f"{i}+{i + 1}="
            assert told == (str(2 * i + 1), None)


def test_ranks_have_their_parts(folder):
    path = sums(folder)
    whole, *parts = (
        opened(folder, path, rank=rank, world=world).batches[3]["answer"]
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    assert whole == parts[0] + parts[1]


def test_rewards_are_told_the_columns(folder):
    found = opened(folder)
    torch.manual_seed(0)
    config = TransformerConfig(dim=16, layers=1, heads=2, **found.config)
    policy = Transformer(config)
    seen = []

    def right(prompts, answers, *, answer, hint):
        for prompt, known in zip(prompts, answer, strict=True):
            assert prompt == "u:7+8;a:" or eval(prompt.rstrip("=")) == int(known)
        seen.append(len(answers))
        return [a == b for a, b in zip(answers, answer, strict=True)]

    objective = GRPO(kl=0.0)
    batches = Rollouts(
        policy, found.batches, TextReward(right, found.tokenizer), objective, max_tokens=5,
        samples=2,
    )  # fmt: skip
    assert len(list(steps(policy, batches, objective, adamw(policy, 1e-3), stop=2))) == 2
    assert seen == [12, 12]


@pytest.mark.parametrize(
    "content, options, told",
    [
        ('{"prompt": "1"}\n{"text": "1"}', {}, "line 2: prompt must be a string or a list of mes"),
        ('{"prompt": "1"}\n{', {}, "line 2, is not JSON"),
        ('{"prompt": "1", "answers": 2}', {}, "line 1: answers is what a reward is told already"),
        ('{"prompt": [{"content": "1"}]}', {}, r'line 1: prompt: prompt\[0\] must have a "role"'),
        ('{"prompt": "1+2+3+4+5+6="}', {"longest": 9}, "line 1: prompt: .* 1 to longest = 9 .* 12"),
        ('{"prompt": ""}', {}, "line 1: prompt: it must have 1 to longest = 12 tokens, got 0"),
        ("", {}, "has no rows"),
        ('{"prompt": "1"}', {"longest": 99}, r"longest must be an integer in \[1, 24\], got 99"),
        ('{"prompt": "1"}', {}, "none of 1 rows is for validation"),
    ],
)
def test_wrong_prompts(folder, content, options, told):
    (folder / "wrong.jsonl").write_text(content)
    with pytest.raises(ValueError, match=told) as caught:
        opened(folder, folder / "wrong.jsonl", **options)
    assert "\n" not in str(caught.value)


def test_prompts_in_memory():
    found = Prompts([[1], [2, 2], [3, 3, 3]], 2, seed=5, name=["a", "b", "c"])
    seen = [found[i] for i in range(3)]
    pairs = [(len(p), n) for b in seen for p, n in zip(b["prompt"], b["name"], strict=True)]
    assert sorted(pairs) == [(1, "a")] * 2 + [(2, "b")] * 2 + [(3, "c")] * 2
    assert seen == [found[i] for i in range(3)]
    parts = [Prompts([[1], [2, 2], [3]], 2, 5, rank=r, world=2)[1]["prompt"] for r in (0, 1)]
    assert parts[0] + parts[1] == Prompts([[1], [2, 2], [3]], 2, 5)[1]["prompt"]
    with pytest.raises(ValueError, match="name must have 2 values, got 1"):
        Prompts([[1], [2]], 2, name=["a"])
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        Prompts([[1], []], 2)
