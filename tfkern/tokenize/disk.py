"""Tokenizers on disk: the files of transformers, and the vocabularies that models come with."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tfkern import files
from tfkern.tokenize import folders
from tfkern.tokenize.tokenizer import ROLES, Tokenizer, refusing

_TOKENIZER, _CONFIG, _MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
# Keys of the configuration: the digest of its tokenizer.json, and the digest and the roles of the
# tokenizer.json before. Between the renames of a save the old tokenizer.json still has its roles.
_OF, _BEFORE = "tfkern_of", "tfkern_before"


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a directory with one.

    A directory may also have tokenizer_config.json or special_tokens_map.json, which tell the
    roles. In place of tokenizer.json it may have the vocabulary of a tokenizer of GPT-1, GPT-2,
    BERT, BART, RoBERTa, T5 or Llama: see `tfkern.tokenize.folders`.

    Raises:
        ValueError: there is no such file, or its content is no tokenizer or is not understood.
    """
    path = Path(path)
    try:
        file = path / _TOKENIZER if path.is_dir() else path
        if file.exists():
            paths = (file, file.parent / _CONFIG, file.parent / _MAP)
            return files.steadily(lambda: _read(file), *paths)
        return folders.read(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def save(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers reads, too.

    Wherever a save is cut off, `load` finds the whole former tokenizer or the whole new one.

    Raises:
        OSError: the files cannot be written. The directory is left as it was.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with files.beside(directory) as new:
        content = tokenizer.backend.to_str(pretty=True).encode()
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {f"{role}_token": token for role, token in tokenizer.special.items()}
        config[_OF] = _digest(content)
        with suppress(ValueError):  # no former tokenizer that could be read
            before = files.read(directory / _TOKENIZER)
            config[_BEFORE] = {_OF: _digest(before), **_told(directory, before)[0]}
        (new.folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (new.folder / _TOKENIZER).write_bytes(content)
        new.settle()
        new.place(_CONFIG, _TOKENIZER)
        new.remove(_MAP)  # tells the former roles


def _read(file: Path) -> Tokenizer:
    content = files.read(file)
    with refusing(str(file)):
        backend = tokenizers.Tokenizer.from_str(content.decode())
    backend.no_truncation()
    backend.no_padding()
    roles, special = _told(file.parent, content)
    tokenizer = Tokenizer(backend, roles)
    backend.add_special_tokens([t for t in special if backend.token_to_id(str(t)) is not None])
    return tokenizer


def _told(directory: Path, tokenizer: bytes) -> tuple[dict[str, str], list[str | AddedToken]]:
    """The special tokens by role that a directory tells for a tokenizer.json with this content, and
    further ones that have no role."""
    config = directory / _CONFIG
    told = files.read_object(config) if config.exists() else {}
    before = told.get(_BEFORE)
    of = _digest(tokenizer)
    if isinstance(before, dict) and before.get(_OF) == of:  # a save was cut off
        return {role: before[role] for role in ROLES if role in before}, []
    others = directory / _MAP
    if told.get(_OF) != of and others.exists():
        told = files.read_object(others) | told
    special: dict[str, str] = {}
    for role in ROLES:
        token = told.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise ValueError(f"{config}: {role}_token must be a string, got {files.shown(token)}")
        if token:
            special[role] = token
    extra = [t for name in folders.EXTRA for t in folders.several(name, told.get(name))]
    added = folders.added(directory, told, set()) if "added_tokens_decoder" in told else {}
    return special, [*extra, *(token for token in added.values() if token.special)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
