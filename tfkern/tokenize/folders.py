"""Directories without tokenizer.json: a vocabulary, and files that say how it is meant.

What transformers makes of such a directory is what comes out here. A setting that is not understood
raises ValueError, as its vocabulary would be misread without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tfkern import files
from tfkern.tokenize.tokenizer import ROLES, Tokenizer
from tfkern.tokenize.vocabularies import bart, bert, gpt1, gpt2, llama, sentencepiece, t5

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# settings that do not change which ids a text has
_HARMLESS = {
    "_commit_hash", "backend", "chat_template", "clean_up_tokenization_spaces", "errors",
    "deprecation_warnings", "full_tokenizer_file", "init_inputs", "is_local", "legacy",
    "local_files_only", "max_len", "max_length", "merges_file", "model_input_names",
    "model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id", "padding_side",
    "processor_class", "spaces_between_special_tokens", "special_tokens_map_file", "stride",
    "tokenizer_class", "tokenizer_file", "transformers_version", "trim_offsets", "truncation_side",
    "truncation_strategy", "use_default_system_prompt", "use_fast", "vocab_file",
}  # fmt: skip
EXTRA = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Kind:
    """A class of tokenizers.

    Attributes:
        make: the function that reads its files.
        names: the names of these files.
        settings: by the names of transformers: the argument of `make` that each of them is.
        fixed: settings that have to be absent or this.
    """

    make: Callable[..., Tokenizer]
    names: tuple[str, ...]
    settings: dict[str, str]
    fixed: dict[str, Any]


_PAIR = ("vocab.json", "merges.txt")
_ENDS = {"add_bos_token": "begins", "add_eos_token": "ends"}
_BERT = Kind(
    bert,
    ("vocab.txt",),
    {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "chinese",
    },
    {"do_basic_tokenize": True, "never_split": [], "wordpieces_prefix": "##"},
)
_CASE = {"do_lower_case": False}
_GPT2 = Kind(gpt2, _PAIR, {"add_prefix_space": "prefix_space", **_ENDS}, _CASE)
_BART = Kind(bart, _PAIR, {"add_prefix_space": "prefix_space"}, _CASE)
_GPT1 = Kind(gpt1, _PAIR, {}, {"do_lower_case": True})
_T5 = Kind(t5, ("spiece.model",), {"extra_ids": "sentinels"}, _CASE | {"sp_model_kwargs": {}})
_LLAMA = Kind(llama, ("tokenizer.model",), _ENDS, {"sp_model_kwargs": {}, "add_prefix_space": True})
KINDS = {
    **dict.fromkeys(("Bert", "DistilBert", "Electra", "MobileBert", "Retribert"), _BERT),
    **dict.fromkeys(("Bart", "Roberta", "Longformer"), _BART),
    "GPT2": _GPT2,
    "OpenAIGPT": _GPT1,
    "T5": _T5,
    "Llama": _LLAMA,
}
# the class of a model, where no file names that of its tokenizer
_MODELS = {
    "bert": "Bert", "distilbert": "DistilBert", "electra": "Electra", "gpt2": "GPT2",
    "gpt_neo": "GPT2", "gptj": "GPT2", "opt": "GPT2", "openai-gpt": "OpenAIGPT", "bart": "Bart",
    "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "t5": "T5", "mt5": "T5", "llama": "Llama",
}  # fmt: skip


def read(directory: Path) -> Tokenizer:
    """The tokenizer of a directory without tokenizer.json.

    Raises:
        ValueError: there is none, or one of a class or with settings that are not understood.
    """
    if not any(all((directory / name).exists() for name in names) for names in _CANDIDATES):
        raise ValueError(
            f"{directory} has neither tokenizer.json nor vocab.json and merges.txt, vocab.txt, "
            "spiece.model or tokenizer.model"
        )
    told = _object(directory / _CONFIG)
    if told.get("added_tokens_decoder") is None:  # as old versions of transformers write it
        told |= _object(directory / _MAP)
    kind = _kind(directory, told)
    extra = [token for name in EXTRA for token in several(name, told.pop(name, None))]
    roles = {role: _token(f"{role}_token", told.pop(f"{role}_token", None)) for role in ROLES}
    settings: dict[str, Any] = {}
    for name, value in told.items():
        if value is None or name in _HARMLESS or name == "added_tokens_decoder":
            continue
        if name in kind.settings and type(value) is (int if name == "extra_ids" else bool):
            settings[kind.settings[name]] = value
        elif name.endswith("_token") and isinstance(value, str | dict):
            extra += several(name, [value])  # a role that models of one class have
        elif name not in kind.fixed or kind.fixed[name] != value:
            raise ValueError(
                f"{directory / _CONFIG}: {name} = {files.shown(value)} is not understood"
            )
    if kind is _T5 and (count := sum(str(t).startswith("<extra_id_") for t in extra)):
        if settings.setdefault("sentinels", count) != count:
            raise ValueError(f"{directory / _CONFIG}: extra_ids differ from {count} extra tokens")
    special = {role: token for role, token in roles.items() if token is not None}
    new = added(directory, told, {*map(str, special.values()), *map(str, extra)})
    by_name = {str(token): token for token in new.values()}
    special = {role: by_name.get(str(token), token) for role, token in special.items()}
    tokenizer = kind.make(
        *(directory / name for name in kind.names),
        **settings,
        special={**{str(i): token for i, token in sorted(new.items())}, **special},
    )
    tokenizer.backend.add_special_tokens([by_name.get(str(t), t) for t in extra])
    for i, token in new.items():
        if tokenizer.id(str(token)) != i:
            raise ValueError(
                f"{directory}: the added token {files.shown(str(token))} has the id "
                f"{tokenizer.id(str(token))} after the vocabulary, and not {i}"
            )
    return tokenizer


def _kind(directory: Path, told: dict[str, Any]) -> Kind:
    """The class that the files name, or if none does, the one that has such a vocabulary."""
    model = _object(directory / "config.json")
    name = told.get("tokenizer_class") or model.get("tokenizer_class")
    if name is None and model.get("model_type") not in (None, "tfkern"):
        name = _MODELS.get(str(model["model_type"]), str(model["model_type"]))
    if name is None:
        name = _by_files(directory)
    kind = KINDS.get(str(name).removesuffix("Fast").removesuffix("Tokenizer"))
    if kind is None:
        raise ValueError(
            f"{directory}: the tokenizer {files.shown(name)} is read from tokenizer.json alone; "
            f"from a vocabulary those of {', '.join(KINDS)} are"
        )
    for file in kind.names:
        if not (directory / file).exists():
            raise ValueError(f"{directory} has neither tokenizer.json nor {file}")
    return kind


def _by_files(directory: Path) -> str:
    """The class whose special tokens the vocabulary has."""
    for names, candidates in _CANDIDATES.items():
        if not all((directory / name).exists() for name in names):
            continue
        here = [name for name, fits in candidates.items() if fits(directory / names[0])]
        if len(here) == 1:
            return here[0]
        raise ValueError(
            f"{directory / names[0]} may be of {' or '.join(here) or 'an unknown tokenizer'}: "
            f"tokenizer_class in {_CONFIG} has to name it"
        )
    raise AssertionError("`read` has seen a vocabulary")


def _has(*tokens: str) -> Callable[[Path], bool]:
    """Whether a vocab.json has these tokens, of which one may be the end of others."""
    return lambda file: all(
        any(name.endswith(token) for name in files.read_object(file)) for token in tokens
    )


def _begins_with(*roles: str) -> Callable[[Path], bool]:
    """Whether the first tokens of a model of SentencePiece have these roles, and no others do."""

    def fits(file: Path) -> bool:
        found = sentencepiece(file)
        ids = {role: found.special_id(role) for role in found.special}
        return ids == {role: i for i, role in enumerate(roles)}

    return fits


# by the files of a vocabulary: the classes that it may be of, and whether it is
_CANDIDATES: dict[tuple[str, ...], dict[str, Callable[[Path], bool]]] = {
    _PAIR: {
        "GPT2": _has("<|endoftext|>"),
        "Bart": _has("<s>", "</s>", "<mask>"),
        "OpenAIGPT": _has("<unk>", "</w>"),
    },
    _BERT.names: {
        "Bert": lambda file: {b"[UNK]", b"[CLS]", b"[SEP]"} <= {*files.read(file).split()}
    },
    _T5.names: {"T5": _begins_with("pad", "eos", "unk")},
    _LLAMA.names: {"Llama": _begins_with("unk", "bos", "eos")},
}


def added(directory: Path, told: dict[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """The tokens that were added to the vocabulary, by id."""
    found = told.get("added_tokens_decoder")
    if found is not None:
        if not isinstance(found, dict) or not all(key.isdecimal() for key in found):
            raise ValueError(f"added_tokens_decoder must hold tokens, got {files.shown(found)}")
        read = ((int(i), _token(f"added_tokens_decoder: {i}", t)) for i, t in found.items())
        return {i: token for i, token in read if isinstance(token, AddedToken)}
    tokens = {}
    for name, i in _object(directory / _ADDED).items():
        if type(i) is not int or i in tokens:
            raise ValueError(f"{directory / _ADDED}: {files.shown(name)} has no id of its own")
        tokens[i] = AddedToken(name, special=name in special, normalized=name not in special)
    return tokens


def _token(name: str, value: Any) -> str | AddedToken | None:
    """A token as the files have it: its name, or an object with what it takes in of a text."""
    if isinstance(value, dict):
        flags = {k: v for k, v in value.items() if k not in ("content", "__type", "id")}
        known = {"lstrip", "rstrip", "single_word", "normalized", "special"}
        content = value.get("content")
        if flags.keys() <= known and all(isinstance(flag, bool) for flag in flags.values()):
            if isinstance(content, str) and content:
                decoded = name.startswith("added_tokens_decoder")
                return AddedToken(content, **(flags if decoded else flags | {"special": True}))
    if isinstance(value, str) or value is None:
        return value or None
    raise ValueError(f"{name} must be a string, got {files.shown(value)}")


def several(name: str, value: Any) -> list[str | AddedToken]:
    """Further special tokens, in a list or by names of their own."""
    values = list(value.values()) if isinstance(value, dict) else value or []
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of tokens, got {files.shown(value)}")
    return [token for token in (_token(name, item) for item in values) if token is not None]


def _object(path: Path) -> dict[str, Any]:
    return files.read_object(path) if path.exists() else {}
