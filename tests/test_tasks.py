"""What models are trained on: texts come back from batches, and batches depend on nothing else."""

import json
import math
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("grain")
pytest.importorskip("datatrove")

from tfkern import tokenize  # noqa: E402
from tfkern.data import Shards  # noqa: E402
from tfkern.data.prepare import Recipe, prepare  # noqa: E402
from tfkern.models import Transformer, TransformerConfig  # noqa: E402
from tfkern.train.objective import CrossEntropy  # noqa: E402
from tfkern.train.tasks import task  # noqa: E402
from tfkern.train.tasks.parts import Parts  # noqa: E402
from tfkern.train.tasks.vocabulary import extended, sentence_ends, word_starts  # noqa: E402

WORDS = "time year people way day man thing woman life child world school state family".split()
TINY = {"dim": 32, "layers": 2, "heads": 2}
IGNORED = -100
TEXTS = {
    "causal": [{}],
    "masked": [{}, {"whole_words": True}, {"static": True}],
    "pretraining": [{}, {"sentence_order": True}],
    "denoising": [{}, {"permutation": False, "deletion": 0.1, "rotation": 0.5}],
    "spans": [{}, {"rate": 0.5, "mean": 2.0}],
    "prefix": [{}],
}
CASES = [(kind, options) for kind, several in TEXTS.items() for options in several]
LENGTH, BATCH = 48, 4


def paragraph(rng):
    sentences = [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(rng.integers(2, 7))]
    return " ".join(f"{s.capitalize()}." for s in sentences)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of a text of 300 paragraphs, for each kind of tokenizer."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("\n\n".join(paragraph(rng) for _ in range(300)))
    made = {}

    def get(tokenizer="characters", text=folder / "text.txt", validation=0.1):
        key = (tokenizer, text, validation)
        if key not in made:
            recipe = Recipe(
                input=str(text), output=str(folder / "out"), tokenizer=tokenizer,
                validation=validation, files=2,
            )  # fmt: skip
            made[key] = prepare(recipe, workers=1)
        return made[key]

    return get


def equal(a, b):
    """Whether two batches have the same keys and bits."""
    assert a.keys() == b.keys()
    flat = [[*x] if isinstance(x, tuple) else [x] for batch in (a, b) for x in batch.values()]
    both = zip(sum(flat[: len(a)], []), sum(flat[len(a) :], []), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in both)


def shapes(batch):
    return {k: [t.shape for t in x] if isinstance(x, tuple) else x.shape for k, x in batch.items()}


def documents(folder, part="train"):
    """The documents without their end tokens."""
    shards = Shards(folder / part)
    return [shards.document(i)[:-1].tolist() for i in range(shards.documents)]


def stream(folder, part="train"):
    shards = Shards(folder / part)
    return shards.read(0, shards.tokens).tolist()


def within(row, stream):
    """Whether tokens stand in a stream side by side."""
    text = "," + ",".join(map(str, stream)) + ","
    return "," + ",".join(map(str, row)) + "," in text


def rows(batch):
    """The items of a batch, without padding, as lists."""
    lengths = {"tokens": "mask", "token_types": "mask", "source": "source_mask"}
    found = []
    for i in range(len(batch["tokens"])):
        item = {}
        for name, x in batch.items():
            if name in ("mask", "source_mask"):
                continue
            x = x[0] if isinstance(x, tuple) else x
            count = batch.get(lengths.get(name, "mask"))
            item[name] = x[i].tolist() if count is None else x[i, : count[i]].tolist()
            if count is not None and name == "targets":
                assert (x[i, count[i] :] == IGNORED).all()
        found.append(item)
    return found


def shifted(row, start):
    """The decoder's tokens tell the target of the one before: each, but for the first."""
    assert row["tokens"][0] == start
    for i, target in enumerate(row["targets"][:-1]):
        assert row["tokens"][i + 1] == target
    assert len(row["tokens"]) == len(row["targets"])


def check(found, batch):
    """A model of the task's configuration runs, and knows nothing."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**TINY, **found.config))
    inputs = {name: x for name, x in batch.items() if name != "targets"}
    several = isinstance(batch["targets"], tuple)
    for name in ("tokens", "source"):
        assert name not in batch or batch[name].max() < found.config["vocab_size"]
    losses = CrossEntropy()(model(**inputs), batch).mean.tolist()
    sizes = [found.config["vocab_size"], found.config.get("classes", 2)]
    assert losses == pytest.approx(list(map(math.log, sizes[: 1 + several])), abs=0.5)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_batches_depend_on_seed_and_step(prepared, kind, options):
    make = lambda seed=3: task(kind, prepared(), length=LENGTH, batch=BATCH, seed=seed, **options)  # noqa: E731
    found, again, other = make(), make(), make(4)
    fifth = found.batches[5]
    assert equal(fifth, again.batches[5])  # without the batches before
    assert equal(fifth, pickle.loads(pickle.dumps(found.batches))[5])
    assert not equal(fifth, other.batches[5]) and not equal(fifth, found.batches[6])
    for step in range(8):
        assert shapes(found.batches[step]) == shapes(fifth)
    assert len(found.validation) > 1
    assert shapes(found.validation[1]) == shapes(fifth)
    assert equal(found.validation[1], other.validation[1])
    assert not equal(found.validation[0], found.validation[1])
    check(found, fifth)


def test_other_processes_make_the_same_batches(prepared):
    code = (
        "import sys, torch; from tfkern.train.tasks import task\n"
        "for kind in sys.argv[2:]:\n"
        "    batch = task(kind, sys.argv[1], length=48, batch=4, seed=3).batches[5]\n"
        "    print({k: [t.tolist() for t in (x if type(x) is tuple else [x])]\n"
        "           for k, x in batch.items()})"
    )
    argv = [sys.executable, "-c", code, str(prepared()), *TEXTS]
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    for kind, line in zip(TEXTS, told, strict=True):
        batch = task(kind, prepared(), length=48, batch=4, seed=3).batches[5]
        here = {
            k: [t.tolist() for t in (x if isinstance(x, tuple) else [x])] for k, x in batch.items()
        }
        assert line == str(here)


def test_causal_rows_are_the_stream(prepared):
    found = task("causal", prepared(), length=LENGTH, batch=BATCH)
    text = stream(prepared())
    starts = set()
    for step in range(40):
        for row in rows(found.batches[step]):
            assert within([*row["tokens"], row["targets"][-1]], text)
            assert row["targets"][:-1] == row["tokens"][1:]
            starts.add(tuple(row["tokens"]))
    assert len(starts) == 160


def test_causal_documents_stay_apart(prepared):
    found = task("causal", prepared(), length=200, batch=BATCH, documents=True)
    whole = [[*d, found.config["end_token"]] for d in documents(prepared())]
    batch = found.batches[0]
    assert batch["documents"].shape == (BATCH, 200)
    for tokens, targets, numbers in zip(*map(torch.Tensor.tolist, batch.values()), strict=True):
        for number in set(numbers):
            row = [t for t, n in zip(tokens, numbers, strict=True) if n == number]
            told = [t for t, n in zip(targets, numbers, strict=True) if n == number]
            if set(told) != {IGNORED}:  # padding is a document
                assert any(within(row, document) for document in whole)
                assert told[:-1] == row[1:]


def test_masked_rows_come_back_and_have_berts_rates(prepared):
    length = 64
    found = task("masked", prepared(), length=length, batch=50, seed=1)
    text = stream(prepared())
    end, mask = (found.tokenizer.special_id(role) for role in ("eos", "mask"))
    counts, tokens = np.zeros(3), 0
    for step in range(40):
        for row in rows(found.batches[step]):
            inputs, targets = np.array(row["tokens"]), np.array(row["targets"])
            picked = targets != IGNORED
            original = np.where(picked, targets, inputs)
            if step < 2:
                assert within(original.tolist(), text)
            assert not picked[original == end].any() and not (inputs[original != end] == end).any()
            kept = inputs[picked] == targets[picked]
            hidden = inputs[picked] == mask
            counts += [hidden.sum(), (~hidden & ~kept).sum(), kept.sum()]
            tokens += (original != end).sum()
    drawn = found.config["vocab_size"] - 2  # a random token is sometimes the old one
    rates = np.array([0.12, 0.015 * (1 - 1 / drawn), 0.015 * (1 + 1 / drawn)])
    sigma = np.sqrt(tokens * rates * (1 - rates))
    assert (abs(counts - tokens * rates) < 3 * sigma).all()


def test_static_masks_are_those_of_every_epoch(prepared):
    def seen(static):
        found = task("masked", prepared(), length=LENGTH, batch=1, static=static)
        count = (len(stream(prepared())) - 1) // LENGTH
        epochs = [[rows(found.batches[e * count + i])[0] for i in range(count)] for e in (0, 1)]
        masks = [{str(row["targets"]): row["tokens"] for row in epoch} for epoch in epochs]
        places = {tuple(t == str(IGNORED) for t in row.strip("[]").split(", ")) for row in masks[0]}
        assert len(places) > count / 2  # each row has masks of its own
        return masks[0] == masks[1]

    assert seen(True) and not seen(False)


@pytest.mark.parametrize("tokenizer", ["characters", "bpe:300", "wordpiece:60", "unigram:60"])
def test_whole_words_are_masked_in_whole(prepared, tokenizer):
    found = task("masked", prepared(tokenizer), length=LENGTH, batch=BATCH, whole_words=True)
    chosen = 0
    for step in range(5):
        for row in rows(found.batches[step]):
            picked = [t != IGNORED for t in row["targets"]]
            original = [a if p else b for a, b, p in zip(row["targets"], row["tokens"], picked)]  # noqa: B905
            # the text of the tokens up to each one tells to which word it belongs
            text = [found.tokenizer.decode(original[: i + 1]) for i in range(len(original))]
            special = found.tokenizer.special_id("eos")
            for i in range(1, len(original)):
                ended = original[i] == special or original[i - 1] == special
                inner = (
                    text[i].rsplit(None, 1)[-1][:-1].isalpha() and not text[i - 1][-1:].isspace()
                )
                grown = len(text[i].split()) == len(text[i - 1].split())
                if not ended and inner and grown and text[i][-1].isalpha():
                    assert picked[i] == picked[i - 1], (text[i], original)
            chosen += sum(picked)
    assert chosen


def test_words_and_sentences_of_vocabularies():
    texts = ["The end. And the beginning! Is it?\nYes the beginning of the end."] * 3
    for kind, size in (("bpe", 300), ("wordpiece", 60), ("unigram", 24), ("words", 40)):
        found = extended(tokenize.train(kind, texts, size, min_frequency=0), "eos", "mask")
        starts, ends = word_starts(found), sentence_ends(found)
        vocabulary = found.backend.get_vocab()
        special = {found.special_id(role) for role in found.special}
        for token, i in vocabulary.items():
            text = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
            if i in special:
                assert starts[i] and not ends[i]
            elif kind == "wordpiece":
                assert starts[i] == (token[:2] != "##")
            elif kind == "words":
                assert starts[i]
            elif not (kind == "bpe" and len(token) == 1):  # bytes have other names
                assert starts[i] == text[0].isspace(), token
            if token in (".", "!", "?", "Ċ", "##.", "end.", "Ġend."):
                assert ends[i] and token not in ("the", "Ġthe")
        assert ends.any() and not ends.all() and len(ends) == found.vocab_size


@pytest.mark.parametrize("order", [False, True])
def test_pretraining_pairs(prepared, order):
    found = task(
        "pretraining", prepared(), length=80, batch=50, seed=2, sentence_order=order
    )  # fmt: skip
    texts = documents(prepared())
    cls, sep, mask = (found.tokenizer.special_id(role) for role in ("cls", "sep", "mask"))
    labels = []
    for step in range(20):
        batch = found.batches[step]
        labels += batch["targets"][1].tolist()
        if step >= 2:
            continue
        for row, label in zip(rows(batch), labels[-50:], strict=True):
            pairs = zip(row["tokens"], row["targets"], strict=True)
            original = [b if b != IGNORED else a for a, b in pairs]
            assert original[0] == cls and original.count(sep) == 2 and original[-1] == sep
            middle = original.index(sep)
            first, second = original[1:middle], original[middle + 1 : -1]
            assert row["token_types"] == [0] * (middle + 1) + [1] * (len(second) + 1)
            assert all(row["targets"][i] == IGNORED for i in (0, middle, -1))
            assert mask not in original
            near = [d for d in texts if within(first, d) and within(second, d)]
            assert any(within(first, d) for d in texts) and any(within(second, d) for d in texts)
            if order or label == 0:
                assert near
    n = len(labels)
    assert abs(sum(labels) - n / 2) < 3 * (n / 4) ** 0.5
    check(found, batch)


def test_next_sentences_are_next_or_of_other_documents(prepared, tmp_path):
    """Each document has letters of its own, and its sentences are numbered by them."""
    alphabet = [chr(0x4E00 + i) for i in range(600)]
    lines = ["".join(f"{c}{c}." for c in alphabet[i : i + 6]) for i in range(0, 600, 6)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    found = task("pretraining", prepared(text=tmp_path / "text.txt"), length=24, batch=8)
    others = set()
    letter = {found.tokenizer.id(c): i for i, c in enumerate(alphabet) if c in _vocab(found)}
    for step in range(20):
        batch = found.batches[step]
        for row, label in zip(rows(batch), batch["targets"][1].tolist(), strict=True):
            original = [
                b if b != IGNORED else a for a, b in zip(row["tokens"], row["targets"], strict=True)
            ]
            middle = original.index(found.tokenizer.special_id("sep"))
            first, second = ([letter[t] for t in part if t in letter]
                             for part in (original[:middle], original[middle:]))  # fmt: skip
            if label == 0:
                assert second[0] in (first[-1], first[-1] + 1)
            else:
                assert first[0] // 6 != second[0] // 6
                others.add(second[0] // 6)
            assert len({i // 6 for i in first}) == len({i // 6 for i in second}) == 1
    assert len(others) > 20


def _vocab(found):
    return found.tokenizer.backend.get_vocab()


def subsequence(row, text):
    rest = iter(text)
    return all(token in rest for token in row)


@pytest.mark.parametrize("options", TEXTS["denoising"] + [{"rate": 0.02}])
def test_denoising_targets_are_the_text(prepared, options):
    found = task("denoising", prepared(), length=LENGTH, batch=50, **options)
    texts = documents(prepared())
    mask = found.tokenizer.special_id("mask")
    start, end = found.config["start_token"], found.config["end_token"]
    kept = lost = 0
    for step in range(4):
        for row in rows(found.batches[step]):
            shifted(row, start)
            assert row["targets"][-1] == end and row["source"][-1] == end
            text, source = row["targets"][:-1], row["source"][:-1]
            assert any(within(text, d) for d in texts)
            known = [t for t in source if t != mask]
            assert not set(known) - set(text)
            if options.get("permutation", True):
                assert all(known.count(t) <= text.count(t) for t in known)
            elif not options.get("rotation"):
                assert subsequence(known, text)
            kept, lost = kept + len(known), lost + len(text) - len(known)
    rate, deletion = options.get("rate", 0.3), options.get("deletion", 0)
    share = lost / (lost + kept)
    expected = 1 - (1 - rate) * (1 - deletion)
    assert expected - 0.02 < share < expected + 0.04  # spans are rounded up in each row


def test_denoising_without_noise_is_a_copy(prepared):
    options = {"rate": 0, "permutation": False}
    found = task("denoising", prepared(), length=LENGTH, batch=BATCH, **options)
    for row in rows(found.batches[0]):
        assert row["source"] == row["targets"]
    found = task("denoising", prepared(), length=LENGTH, batch=20, rate=0)
    point = found.tokenizer.id(".")
    for row in rows(found.batches[0]):  # sentences change places, and nothing else happens
        text, source = row["targets"][:-1], row["source"][:-1]
        cut = lambda x: np.split(x, [i + 1 for i, t in enumerate(x[:-1]) if t == point])  # noqa: E731
        assert sorted(text) == sorted(source)
        if source[-1] == point and text[-1] == point:
            assert sorted(map(list, cut(source))) == sorted(map(list, cut(text)))


@pytest.mark.parametrize("options", TEXTS["spans"])
def test_spans_come_back(prepared, options):
    found = task("spans", prepared(), length=LENGTH, batch=20, **options)
    text = stream(prepared())
    first = found.tokenizer.id("<extra_id_0>")
    end = found.config["end_token"]
    plain = task("prefix", prepared(), length=LENGTH, batch=1).tokenizer.vocab_size
    for step in range(3):
        batch = found.batches[step]
        assert "mask" not in batch and batch["source"].shape[1] <= LENGTH
        for row in rows(batch):
            shifted(row, found.config["start_token"])
            source, targets = row["source"], row["targets"]
            assert source.pop() == end and targets.pop() == end
            spans, whole = {}, []
            for token in targets:
                if first - 50 < token <= first and token >= min(source[0], first - 50):
                    name = found.tokenizer.backend.id_to_token(token)
                    if name.startswith("<extra_id_"):
                        spans[token] = []
                        last = token
                        continue
                spans[last].append(token)
            assert list(spans) == [first - i for i in range(len(spans))]
            assert found.tokenizer.vocab_size == plain + len(spans)
            for token in source:
                whole += spans.pop(token, None) or [token]
            assert not spans and within(whole, text)


def test_t5_keeps_its_sentinels(prepared, tmp_path):
    own = tokenize.train("unigram", ["a b c d e f g the end. time"] * 9, 20)
    own = extended(own, sentinels=100)
    assert extended(own, "eos", "pad", sentinels=7).vocab_size == own.vocab_size
    assert own.id("<extra_id_0>") == own.vocab_size - 1
    assert own.id("<extra_id_99>") == own.vocab_size - 100


def test_prefixes_go_on(prepared):
    found = task("prefix", prepared(), length=LENGTH, batch=50)
    text = stream(prepared())
    cuts = set()
    for step in range(4):
        for row in rows(found.batches[step]):
            shifted(row, found.config["start_token"])
            assert len(row["source"]) + len(row["targets"]) == LENGTH + 1
            assert within(row["source"] + row["targets"], text)
            cuts.add(len(row["source"]))
    assert {1, LENGTH} & cuts and len(cuts) > LENGTH / 2


def test_parts_are_the_documents(prepared):
    shards = Shards(prepared() / "train")
    for length, least in ((7, 1), (7, 2), (1000, 1)):
        found = Parts(shards, length, least=least)
        flat = [found[i]["tokens"].tolist() for i in range(len(found))]
        expected = [
            d[i : i + length] for d in documents(prepared()) for i in range(0, len(d), length)
        ]
        assert flat == [row for row in expected if len(row) >= least]
    longer = Parts(shards, 7, beyond=5)
    assert [longer[i]["tokens"][:7].tolist() for i in range(len(longer))] == [
        found[i]["tokens"].tolist() for found in [Parts(shards, 7)] for i in range(len(found))
    ]
    rng = np.random.default_rng(0)
    for i in (0, len(longer) - 1):
        own = longer._document(i)
        drawn = {tuple(longer.other(i, rng)[:7]) for _ in range(300)}
        assert len(drawn) > 100 and tuple(longer[i]["tokens"][:7]) not in drawn, own


def test_validation_has_each_item_once(prepared):
    every = task("causal", prepared(), length=LENGTH, batch=3, validation_batches=10**6)
    text = stream(prepared(), "validation")
    count = (len(text) - 1) // LENGTH
    assert len(every.validation) == count // 3
    seen = [tuple(row["tokens"]) for batch in every.validation for row in rows(batch)]
    assert len(seen) == 3 * (count // 3)
    places = [text[i * LENGTH : (i + 1) * LENGTH] for i in range(count)]
    assert all(list(row) in places for row in seen)
    assert len({places.index(list(row)) for row in seen}) >= len(set(seen))
    few = task("causal", prepared(), length=LENGTH, batch=3, validation_batches=2)
    assert len(few.validation) == 2
    last = [places.index(row["tokens"]) for row in rows(few.validation[1])]
    assert min(last) >= count // 2 and max(last) >= count * 4 // 5  # they come from everywhere
    large = task("causal", prepared(), length=LENGTH, batch=10**4)
    assert [len(b["tokens"]) for b in large.validation] == [count]
    with pytest.raises(IndexError):
        few.validation[2]


def test_tokenizers_keep_their_ids(prepared):
    before = tokenize.load(prepared("wordpiece:60") / "tokenizer")
    found = task("pretraining", prepared("wordpiece:60"), length=LENGTH, batch=BATCH)
    assert found.tokenizer.vocab_size == before.vocab_size == found.config["vocab_size"]
    assert found.config["pad_token"] == before.special_id("pad")
    before = tokenize.load(prepared("bpe:300") / "tokenizer")
    found = task("pretraining", prepared("bpe:300"), length=LENGTH, batch=BATCH)
    assert found.tokenizer.vocab_size == before.vocab_size + 3
    assert found.tokenizer.special_id("pad") == before.special_id("eos")
    assert "pad_token" not in found.config  # the end of a text has to be trained
    check(found, found.batches[0])


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def reversals(tmp_path_factory):
    """200 rows of letters and the same in reverse."""
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(1, 12))) for _ in range(200)]
    rows = [{"source": w, "target": w[::-1]} for w in words]
    return lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows), rows


@pytest.mark.parametrize("tokenizer", ["characters", "bpe:280", "wordpiece:40", "unigram:20"])
def test_pairs_come_back(reversals, tokenizer):
    path, written = reversals
    found = task("pairs", path, length=16, batch=10, tokenizer=tokenizer)
    tell = lambda ids: found.tokenizer.decode(ids, skip_special=False)  # noqa: E731
    end = found.config["end_token"]
    seen = [Counter(), Counter()]
    single = task("pairs", path, length=16, batch=1, tokenizer=tokenizer, validation_batches=999)
    held = len(single.validation)
    assert abs(held - 20) < 3 * (200 * 0.1 * 0.9) ** 0.5
    steps = (200 - held) // 10
    for counter, batches in zip(seen, (map(found.batches.__getitem__, range(steps)),
                                       found.validation), strict=True):  # fmt: skip
        for batch in batches:
            assert batch["source"].shape == batch["tokens"].shape == (10, 16)
            for row in rows(batch):
                shifted(row, found.config["start_token"])
                assert row["source"].pop() == end and row["targets"].pop() == end
                source, target = tell(row["source"]), tell(row["targets"])
                assert source == target[::-1]
                counter[source] += 1
    known = Counter(row["source"] for row in written)
    assert not set(seen[0]) & set(seen[1]) and set(seen[0]) | set(seen[1]) <= set(known)
    assert all(known[word] >= count for word, count in seen[0].items())
    check(found, batch)


def test_rows_stay_on_their_side(reversals, tmp_path):
    path, written = reversals
    more = lines(tmp_path / "more.jsonl", [{"source": "abc", "target": "cba"}] * 5 + written)
    sides = []
    for file in (path, more):
        found = task("pairs", file, length=16, batch=1, tokenizer="characters",
                     validation_batches=10**6)  # fmt: skip
        text = [found.tokenizer.decode(rows(batch)[0]["source"][:-1]) for batch in found.validation]
        sides.append(set(text) - {"abc"})
    assert sides[0] == sides[1] != set()


def sentiments(count=200, numbers=False):
    rng = np.random.default_rng(2)
    for _ in range(count):
        good = bool(rng.integers(2))
        text = " ".join([*rng.choice(WORDS, 3), "good" if good else "bad"])
        yield {"text": text, "label": (7 if good else 3) if numbers else "yes" if good else "no"}


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"architecture": "decoder"}, {"architecture": "decoder", "language_model": True}],
)
def test_classification_rows_come_back(tmp_path, options, numbers):
    path = lines(tmp_path / "texts.jsonl", sentiments(numbers=numbers))
    found = task("classification", path, length=40, batch=8, tokenizer="characters", **options)
    assert found.labels == ((3, 7) if numbers else ("no", "yes"))
    assert found.config["classes"] == 2
    special = [found.tokenizer.special_id(role) for role in ("cls", "sep")[: not options and 2]]
    for step in range(3):
        batch = found.batches[step]
        several = "language_model" in options
        labels = batch["targets"][1] if several else batch["targets"]
        for i, label in enumerate(labels.tolist()):
            count = int(batch["mask"][i])
            row = batch["tokens"][i, :count].tolist()
            text = found.tokenizer.decode(row)
            assert label == int(text.endswith("good")) == 1 - int(text.endswith("bad"))
            if several:
                targets = batch["targets"][0][i].tolist()
                assert targets[: count - 1] == row[1:] and set(targets[count - 1 :]) == {IGNORED}
            if options:
                assert row[-1] == found.config["end_token"]
            else:
                assert [row[0], row[-1]] == special
    torch.manual_seed(0)
    if several:
        check(found, batch)
    else:
        inputs = {name: x for name, x in batch.items() if name != "targets"}
        logits = Transformer(TransformerConfig(**TINY, **found.config))(**inputs)
        assert CrossEntropy()(logits, batch).mean.item() == pytest.approx(math.log(2), abs=0.5)


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    known = {tuple(x.ravel()): y for x, y in zip(digits.images, digits.target, strict=True)}
    found = task("images", "digits", length=1, batch=50, seed=6, validation_batches=100)
    assert found.labels == tuple(range(10)) and found.tokenizer is None
    assert found.config == {
        "architecture": "encoder", "head": "classification", "classes": 10, "image_size": 8,
        "patch_size": 2, "channels": 1,
    }  # fmt: skip
    held = {tuple(x.ravel()) for batch in found.validation for x in batch["tokens"].tolist()
            for x in [np.array(x)]}  # fmt: skip
    assert len(held) == 150
    for step in range(30):
        batch = found.batches[step]
        pixels = batch["tokens"]
        assert pixels.shape == (50, 1, 8, 8) and pixels.dtype == torch.float32
        for x, label in zip(pixels.numpy(), batch["targets"].tolist(), strict=True):
            assert known[tuple((x.ravel() + 1) * 8)] == label
            assert tuple(x.ravel()) not in held
    assert not equal(batch, task("images", "digits", length=1, batch=50, seed=7).batches[step])
    model = Transformer(TransformerConfig(**TINY, **found.config))
    loss = CrossEntropy()(model(batch["tokens"]), batch).mean.item()
    assert loss == pytest.approx(math.log(10), abs=0.5)


def test_images_of_files(tmp_path):
    rng = np.random.default_rng(3)
    bytes_ = rng.integers(0, 256, (40, 3, 12, 12)).astype(np.uint8)
    labels = rng.integers(0, 3, 40) * 10
    scaled = (bytes_.astype(np.float64) * 2 / 255 - 1).astype(np.float32)
    for pixels in (bytes_, scaled, scaled.astype(np.float64)):
        np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
        found = task("images", tmp_path / "images.npz", length=1, batch=4, patch_size=4)
        assert found.config["channels"] == 3 and found.config["patch_size"] == 4
        assert found.labels == (0, 10, 20)
        for batch in (found.batches[0], found.validation[0]):
            assert batch["tokens"].dtype == torch.float32
            for x, label in zip(batch["tokens"].numpy(), batch["targets"].tolist(), strict=True):
                (i,) = [i for i in range(40) if np.allclose(x, scaled[i], atol=1e-6)]
                assert labels[i] == 10 * label
    good = {"images": scaled, "labels": labels}
    for wrong, message in (
        ({"images": scaled[:, 0]}, r"images must be \(N, C, H, H\), got \(40, 12, 12\)"),
        ({"images": scaled[:, :, :6]}, r"images must be \(N, C, H, H\), got \(40, 3, 6, 12\)"),
        ({"labels": labels[:7]}, r"labels must be 40 integers, got int64 \(7,\)"),
        ({"labels": labels / 2}, "labels must be 40 integers, got float64"),
        ({"labels": labels * 0}, r"two labels at least, got \[0\]"),
        ({"images": scaled * 2}, r"must lie in \[-1, 1\], got -2 to 2"),
        ({"images": scaled * np.nan}, r"must lie in \[-1, 1\], got nan"),
        ({"images": bytes_.astype(int)}, "images must be uint8 or floats, got int64"),
        ({"images": scaled[:1], "labels": labels[:1]}, "two labels|images are for validation"),
    ):
        np.savez(tmp_path / "wrong.npz", **(good | wrong))
        with pytest.raises(ValueError, match=message):
            task("images", tmp_path / "wrong.npz", length=1, batch=4)
    np.savez(tmp_path / "wrong.npz", images=scaled)
    np.save(tmp_path / "wrong.npy", scaled)
    (tmp_path / "text.npz").write_text("no")
    for name in ("wrong.npz", "wrong.npy", "text.npz"):
        with pytest.raises(ValueError, match="is no .npz file with images and labels: "):
            task("images", tmp_path / name, length=1, batch=4)
    for patch, message in ((5, "must divide the side 12"), (0, "positive integer"), (2.0, "posit")):
        with pytest.raises(ValueError, match=f"patch_size must.*{message}|patch_size {message}"):
            task("images", tmp_path / "images.npz", length=1, batch=4, patch_size=patch)


@pytest.mark.parametrize(
    ("kind", "content", "options", "message"),
    [
        ("pairs", '{"source": "a"}', {}, "line 1: target must be a string, got None"),
        ("pairs", '{"source": "a", "target": "b"}\n{', {}, "line 2, is not JSON"),
        ("pairs", '[1, 2]', {}, "line 1, must hold an object, got list"),
        ("pairs", '', {}, "has no rows"),
        ("pairs", None, {}, "No such file"),
        ("pairs", '{"source": "a", "target": "b"}', {}, "none of 1 rows is for "),
        ("pairs", 40, {"length": 5}, "of 80 texts have more than length = 5 tokens, up to 11"),
        ("pairs", 40, {"validation": 0.7}, r"validation must lie in \[0, 0.5\], got 0.7"),
        ("pairs", 40, {"validation": 0}, "none of 40 rows is for validation"),
        ("pairs", 40, {"tokenizer": "bpe"}, "'bpe' needs the size of a vocabulary"),
        ("pairs", 40, {"tokenizer": "nothing"}, "nothing has neither tokenizer.json"),
        ("pairs", 40, {"tokenizer": "bpe:9"}, "vocab_size must be at least 257"),
        ("classification", '{"text": "a", "label": true}', {}, "label must be a string or an int"),
        ("classification", '{"text": "a", "label": 1.5}', {}, "label must be a string or an int"),
        ("classification", '{"text": "a", "label": 1}', {}, "two labels at least, got 1 alone"),
        ("classification", '{"text": "a", "label": 1}\n{"text": "a", "label": "1"}', {}, "all str"),
        ("classification", 40, {"architecture": "both"}, "architecture must be encoder or decoder"),
        ("classification", 40, {"language_model": True}, "needs architecture decoder, got enc"),
    ],
)  # fmt: skip
def test_wrong_rows(tmp_path, kind, content, options, message):
    path = tmp_path / "rows.jsonl"
    if isinstance(content, int):
        texts = [f"{i:010}" for i in range(content)]
        keys = ("source", "target") if kind == "pairs" else ("text", "label")
        lines(path, [dict.fromkeys(keys, text) for text in texts])
    elif content is not None:
        path.write_text(content)
    options = {"length": 32, "batch": 4, "tokenizer": "characters"} | options
    with pytest.raises(ValueError, match=message) as caught:
        task(kind, path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cause", {}, "kind must be one of causal, masked, .* got 'cause'"),
        ("causal", {"rate": 0.2}, "causal has no option 'rate'; it has documents"),
        ("causal", {"documents": "yes"}, "documents must be true or false, got 'yes'"),
        ("causal", {"length": 0}, "length must be an integer from 1 on, got 0"),
        ("causal", {"batch": 2.5}, "batch must be an integer from 1 on, got 2.5"),
        ("causal", {"seed": -1}, "seed must be an integer from 0 on, got -1"),
        ("causal", {"validation_batches": 0}, "validation_batches must be an integer from 1"),
        ("causal", {"length": 10**6}, "train has .* tokens: a window of 1000000 needs 1000001"),
        ("masked", {"rate": 1.5}, r"rate must lie in \[0, 1\], got 1.5"),
        ("masked", {"static": 1}, "static must be true or false, got 1"),
        ("pretraining", {"length": 4}, "length must be at least 5"),
        ("denoising", {"rotation": "often"}, r"rotation must lie in \[0, 1\], got 'often'"),
        ("denoising", {"mean": 0.5}, r"mean must lie in \[1, inf\], got 0.5"),
        ("denoising", {"length": 1}, "length must be at least 2"),
        ("spans", {"rate": 1.0}, r"rate must lie in \(0, 1\), got 1.0"),
        ("spans", {"length": 2}, "inputs must be at least 3, got 2"),
    ],
)
def test_wrong_options(prepared, kind, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        task(kind, prepared(), **({"length": 32, "batch": 4} | options))
    assert "\n" not in str(caught.value)


def test_wrong_data(prepared, tmp_path):
    with pytest.raises(ValueError, match="has no folder train"):
        task("causal", tmp_path, length=8, batch=2)
    with pytest.raises(ValueError, match="has no folder validation"):
        task("causal", prepared(validation=0), length=8, batch=2)
    (tmp_path / "text.txt").write_text("Ab. Cd. " * 20 + "\n\n" + "Ef. Gh. " * 20)
    folder = prepared(text=tmp_path / "text.txt", validation=0.5)
    with pytest.raises(ValueError, match="has no tokens|must have two documents|has no shards"):
        task("pretraining", folder, length=16, batch=2)
