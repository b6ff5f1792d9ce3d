"""Tasks on preferences: rows of a file come back from batches, and errors name their lines."""

import json
import math

import pytest
import torch

pytest.importorskip("grain")
pytest.importorskip("tokenizers")
pytest.importorskip("xxhash")

from tfkern import tokenize  # noqa: E402
from tfkern.models import Transformer, TransformerConfig  # noqa: E402
from tfkern.tokenize import Tokenizer  # noqa: E402
from tfkern.train import adamw, steps, task  # noqa: E402
from tfkern.train.preferences import DPO, KTO, Rewards  # noqa: E402

IGNORED, LENGTH = -100, 40
TINY = {"dim": 16, "layers": 1, "heads": 2}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _small(one_thread):
    """All models here are small."""


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbers(count):
    """Texts of {"prompt", "chosen", "rejected"}, each of another length."""
    return [
        {"prompt": f"count {i}: ", "chosen": "a" * (i % 7 + 1), "rejected": "b" * (i % 4) + "a"}
        for i in range(count)
    ]


def talk(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of characters on disk, as a model's folder has it, with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    known = tokenize.characters(["".join(map(chr, range(32, 127))) + "\n"])
    special = {"bos": "<s>", "eos": "<|im_end|>"}
    known.backend.add_special_tokens(["<|im_start|>"])
    tokenize.save(Tokenizer(known.backend, special), folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def rows_of(found, batch):
    """Each row of a batch as its text and the text of its targets."""
    tell = lambda ids: found.tokenizer.decode(ids, skip_special=False)  # noqa: E731
    targets = batch["targets"][0] if isinstance(batch["targets"], tuple) else batch["targets"]
    for i in range(len(batch["tokens"])):
        group = []
        for j in range(2):
            count = int(batch["mask"][i, j])
            row, target = batch["tokens"][i, j].tolist(), targets[i, j].tolist()
            assert set(target[count:]) <= {IGNORED}
            aimed = [t for t in target if t != IGNORED]
            # the targets of an answer stand one place in front of its tokens
            start = target.index(aimed[0])
            assert target[start : start + len(aimed)] == aimed
            assert aimed[: count - start - 1] == row[start + 1 : count]
            group.append((tell(row[: start + 1]), tell(aimed)))
        yield group


def everything(found):
    """All rows of validation and of an epoch of batches of one row."""
    count = found.batches.sources[0]
    batches = [found.batches[i] for i in range(len(count))] + list(found.validation)
    return [group for batch in batches for group in rows_of(found, batch)]


def options(**changes):
    return {"length": LENGTH, "batch": 1, "validation_batches": 999, **changes}


@pytest.mark.parametrize("tokenizer", ["characters", "bpe:300", "folder"])
def test_texts_come_back(tmp_path, tokenizer, folder):
    told = numbers(60)
    path = written(tmp_path / "pairs.jsonl", told)
    tokenizer = str(folder) if tokenizer == "folder" else tokenizer
    found = task("preferences", path, **options(tokenizer=tokenizer))
    end = found.tokenizer.special["eos"]
    expected = [[(r["prompt"], r[k] + end) for k in ("chosen", "rejected")] for r in told]
    assert sorted(map(str, everything(found))) == sorted(map(str, expected))
    assert 0 < len(found.validation) < 20
    assert found.config["head"] == "lm" and found.config["architecture"] == "decoder"
    assert found.config["vocab_size"] == found.tokenizer.vocab_size
    if tokenizer == str(folder):  # it is left as it is
        assert found.tokenizer.vocab_size == tokenize.load(folder).vocab_size
        assert found.tokenizer.special == tokenize.load(folder).special


FORMS = {
    "prompt": lambda a, b: {
        "prompt": talk("Hi", "Ho", a),
        "chosen": talk(b, first="assistant"),
        "rejected": talk("no", first="assistant"),
    },
    "no prompt": lambda a, b: {
        "chosen": talk("Hi", "Ho", a, b), "rejected": talk("Hi", "Ho", a, "no")
    },
    "a text as prompt": lambda a, b: {
        "prompt": a, "chosen": talk("Hi", "Ho", a, b), "rejected": talk("Hi", "Ho", a, "no")
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_messages_come_back(tmp_path, form, folder):
    told = [(f"{i}?", f"yes {i}") for i in range(12)]
    path = written(tmp_path / "pairs.jsonl", [FORMS[form](*row) for row in told])
    for more in ({}, {"template": str(folder)}, {"template": str(folder / "chat_template.jinja")}):
        found = task(
            "preferences",
            path,
            **options(length=120, validation=0.4, tokenizer=str(folder), **more),
        )
        expected = []
        for question, answer in told:
            prompt = "".join(
                f"<|im_start|>{role}\n{text}<|im_end|>\n"
                for role, text in (("user", "Hi"), ("assistant", "Ho"), ("user", question))
            )
            prompt += "<|im_start|>assistant\n"
            expected.append([(prompt, f"{text}<|im_end|>\n") for text in (answer, "no")])
        assert sorted(map(str, everything(found))) == sorted(map(str, expected))


def test_texts_without_prompt(tmp_path):
    told = [
        {"chosen": f"the sky {i} is blue", "rejected": f"the sky {i} is red"} for i in range(30)
    ]
    found = task("preferences", written(tmp_path / "a", told), **options(tokenizer="characters"))
    end = found.tokenizer.special["eos"]
    expected = [
        [(f"the sky {i} is ", f"{color}{end}") for color in ("blue", "red")] for i in range(30)
    ]
    assert sorted(map(str, everything(found))) == sorted(map(str, expected))


def test_margins_of_rewards(tmp_path):
    told = [row | ({"margin": i / 4} if i % 3 else {}) for i, row in enumerate(numbers(60))]
    path = written(tmp_path / "pairs.jsonl", told)
    found = task("rewards", path, **options(tokenizer="characters"))
    pairs = task("preferences", path, **options(tokenizer="characters"))
    assert found.config == pairs.config | {
        "head": "classification", "classes": 1, "pad_token": found.tokenizer.special_id("pad"),
    }  # fmt: skip
    known = {(r["prompt"], r["chosen"]): r.get("margin", 0) for r in told}
    for step in range(20):
        batch, pair = found.batches[step], pairs.batches[step]
        assert torch.equal(batch["tokens"], pair["tokens"])
        assert torch.equal(batch["mask"], pair["mask"])
        ((chosen, _),) = rows_of(pairs, pair)
        text = chosen[1].removesuffix(found.tokenizer.special["eos"])
        assert batch["targets"].tolist() == [known[(chosen[0], text)]]
        assert batch["targets"].dtype == torch.float32


def test_answers_with_labels(tmp_path):
    """Behind each prompt stands its answer, which makes 14 tokens with its end, and in the second
    row that of the next row, as much as fits. The last target is a token that did not fit."""
    told = [
        {
            "prompt": f"{i:02}" + "?" * (9 - i % 9) + " ",
            "completion": chr(97 + i) * (i % 9 + 1),
            "label": i % 3 == 0,
        }
        for i in range(26)
    ]
    path = written(tmp_path / "answers.jsonl", told)
    found = task("unpaired", path, **options(tokenizer="characters", length=14))
    end = found.tokenizer.special["eos"]
    known = {row["prompt"]: row for row in told}
    seen = set()
    batches = [found.batches[i] for i in range(26 - len(found.validation))]
    for part in (batches, list(found.validation)):
        prompts = sorted(next(rows_of(found, batch))[0][0] for batch in part)
        after = dict(zip(prompts, prompts[1:] + prompts[:1], strict=True))
        for batch in part:
            ((own, other),) = rows_of(found, batch)
            row = known[own[0]]
            assert own == (row["prompt"], row["completion"] + end)
            behind = known[after[row["prompt"]]]["completion"] + "$"
            behind = behind[: 15 - len(row["prompt"])].replace("$", end)
            assert other == (row["prompt"], behind)
            assert batch["targets"][1].tolist() == [row["label"]]
            assert batch["targets"][1].dtype == torch.bool
            seen.add(row["prompt"])
    assert seen == set(known)


def test_rows_that_do_not_fit(tmp_path):
    """Prompts of 10 to 39 letters, and answers of 3 and 5 with their end, in 24 tokens."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789ABC"
    told = [{"prompt": alphabet[:n], "chosen": "!!", "rejected": "????"} for n in range(10, 40)]
    path = written(tmp_path / "pairs.jsonl", told)
    given = options(tokenizer="characters", length=24, validation=0.3)
    with pytest.raises(
        ValueError, match=r"20 of 30 rows have more than length = 24 tokens, up to 44"
    ):
        task("preferences", path, **given)
    prompts = {}
    for fit in ("drop", "keep_end", "keep_start"):
        found = task("preferences", path, **given, fit=fit)
        end = found.tokenizer.special["eos"]
        groups = everything(found)
        assert all(a[1] == "!!" + end and b == (a[0], "????" + end) for a, b in groups)
        prompts[fit] = sorted(a[0] for a, _ in groups)
    whole = [row["prompt"] for row in told]
    assert prompts["drop"] == sorted(whole[:10])
    assert prompts["keep_end"] == sorted(p[-19:] for p in whole)
    assert prompts["keep_start"] == sorted(p[:19] for p in whole)
    for fit, length, count in (("keep_end", 5, 30), ("drop", 5, 30)):
        with pytest.raises(
            ValueError, match=f"{count} of 30 rows have more than length = {length}"
        ):
            task("preferences", path, **given | {"length": length}, fit=fit)


def test_parts_of_ranks_are_the_whole(tmp_path):
    path = written(tmp_path / "pairs.jsonl", numbers(60))
    given = options(tokenizer="characters", batch=6)
    whole = task("preferences", path, **given)
    parts = [task("preferences", path, **given, rank=rank, world=2) for rank in range(2)]
    for name in ("tokens", "mask", "targets"):
        joined = torch.cat([part.batches[3][name] for part in parts])
        assert torch.equal(joined, whole.batches[3][name])


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
LABELLED = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize("kind, good, bad, message", [
    ("preferences", GOOD, {"prompt": "a", "chosen": "b"}, "rejected is missing, there is prompt"),
    ("preferences", GOOD, GOOD | {"chosen": 3}, "prompt and chosen must both be texts"),
    ("preferences", GOOD, GOOD | {"chosen": [{"content": "x"}]}, "prompt and chosen must both be"),
    ("preferences", GOOD, {"chosen": talk("a", "b"), "rejected": talk("a", "c")},
     "the tokenizer has no chat template"),
    ("rewards", GOOD, GOOD | {"margin": "big"}, "margin must be a number in"),
    ("unpaired", LABELLED, {"prompt": "a", "completion": "b"}, "label must be true or false, got"),
    ("unpaired", LABELLED, LABELLED | {"label": 1}, "label must be true or false, got 1"),
    ("unpaired", LABELLED, GOOD, "completion is missing, there is prompt, chosen, rejected"),
])  # fmt: skip
def test_errors_name_the_line(tmp_path, kind, good, bad, message):
    path = written(tmp_path / "rows.jsonl", [good, good, bad])
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 3: .*{message}"):
        task(kind, path, **options(tokenizer="characters"))


def test_other_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n{")
    with pytest.raises(ValueError, match="rows.jsonl, line 3, is not JSON"):
        task("preferences", path, **options())
    path.write_text("\n")
    with pytest.raises(ValueError, match="rows.jsonl has no rows"):
        task("preferences", path, **options())
    written(path, numbers(30))
    for bad, message in (
        ({"fit": "cut"}, "fit must be one of error, drop, keep_end, keep_start, got"),
        ({"template": str(tmp_path / "none")}, "none: No such file"),
        ({"template": 3}, "template must be a path, got 3"),
        ({"validation": 0.9}, "validation must lie in"),
        ({"margin": 1}, "preferences has no option 'margin'"),
    ):
        with pytest.raises(ValueError, match=message):
            task("preferences", path, **options(tokenizer="characters", **bad))


RUNS = {
    "preferences": (DPO(), math.log(2), numbers(60)),
    "rewards": (Rewards(), math.log(2), numbers(60)),
    "unpaired": (KTO(), 0.5, [
        {"prompt": f"{i}? ", "completion": "ab"[i % 2] * 3, "label": i % 2 == 0} for i in range(60)
    ]),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_models_train_on_the_batches(tmp_path, kind):
    objective, loss, told = RUNS[kind]
    path = written(tmp_path / "rows.jsonl", told)
    found = task(kind, path, **options(tokenizer="characters", batch=8))
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**TINY, **found.config))
    batches = found.batches
    if hasattr(objective, "extended"):
        batches = objective.extended(batches, model)
    records = list(steps(model, batches, objective, adamw(model, 1e-2), stop=20))
    assert records[0].loss == pytest.approx(loss, abs=1e-6 if kind != "rewards" else 0.1)
    assert records[-1].loss < loss - 0.02
