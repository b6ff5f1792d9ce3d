"""A tokenizer with special tokens by role, padded batches, and decoding as a stream."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Encoding
from tokenizers.decoders import DecodeStream
from torch import Tensor

from tfkern import files

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class Batch:
    """Encoded texts of one length.

    Attributes:
        tokens: (B, T) int64.
        mask: (B, T) bool, True where there is a token and False at padding.
        types: (B, T) int64, the segment of each token.
        source: (B,) int64, index of the text of each row. A long text may have several rows.
        encodings: the `tokenizers.Encoding` of each row, with offsets into the text and words.
    """

    tokens: Tensor
    mask: Tensor
    types: Tensor
    source: Tensor
    encodings: list[Encoding]

    @property
    def positions(self) -> Tensor:
        """(B, T) int64: the positions of tokens, counted without padding on either side. Padding
        has the position of the token before it, or 0."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: the number of tokens in each row."""
        return self.mask.sum(1)


class Tokenizer:
    """Text to ids and back.

    Text of a user never becomes a control token: "<|endoftext|>" is encoded as the characters that
    it is, unless `allow_special=True`.

    Args:
        backend: a `tokenizers.Tokenizer`.
        special: tokens by role: "bos", "eos", "unk", "sep", "pad", "cls" and "mask". They
            are added to the vocabulary if it lacks them.

    Raises:
        ValueError: an unknown role, or a token that is no string.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str]) -> None:
        unknown = set(special) - set(ROLES)
        if unknown:
            raise ValueError(f"role {sorted(unknown)[0]!r} is not one of {', '.join(ROLES)}")
        for role, token in special.items():
            if not isinstance(token, str):
                raise ValueError(f"the {role} token must be a string, got {files.shown(token)}")
        self.backend, self.special = backend, dict(special)
        known = {str(token): token for token in backend.get_added_tokens_decoder().values()}
        new = [t for t in special.values() if t not in known or not known[t].special]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])

    @property
    def vocab_size(self) -> int:
        """All ids are below this number."""
        return max(self.backend.get_vocab().values(), default=-1) + 1

    def id(self, token: str) -> int:
        """The id of a token.

        Raises:
            ValueError: the vocabulary lacks it.
        """
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"{token!r} is no token of this tokenizer")
        return found

    def special_id(self, role: str) -> int:
        """The id of the special token with a role, such as "mask".

        Raises:
            ValueError: no token has this role.
        """
        if role not in self.special:
            raise ValueError(
                f"no token has the role {role!r}, only {', '.join(self.special) or 'none at all'}"
            )
        return self.id(self.special[role])

    def encode(
        self,
        text: str,
        pair: str | None = None,
        *,
        template: bool = True,
        allow_special: bool = False,
    ) -> list[int]:
        """The ids of a text, or of a pair of texts.

        Args:
            template: put the special tokens of the model around the text, such as [CLS] and [SEP].
            allow_special: encode special tokens that the text spells out as control tokens.

        Raises:
            ValueError: a character or word that the vocabulary lacks and cannot replace.
        """
        return self._encode([text], [pair] if pair is not None else None, template, allow_special)[
            0
        ].ids

    def batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        side: str = "right",
        length: int | None = None,
        multiple: int = 1,
        truncate: bool = False,
        stride: int | None = None,
        template: bool = True,
        allow_special: bool = False,
    ) -> Batch:
        """The ids of several texts, padded to one length.

        Args:
            texts, pairs: lists of one length: the texts, and what follows each of them in its row.
            side: where padding stands, "left" or "right".
            length: tokens of every row, special ones included; those of the longest row if None.
            multiple: the length is rounded up to a multiple of this number.
            truncate: cut off texts that are longer than length, instead of raising.
            stride: with truncate, what is cut off makes further rows, which repeat this many
                tokens of the row before.
            template, allow_special: as in `encode`.

        Raises:
            ValueError: texts longer than length, no "pad" token where one is needed, or arguments
                that do not fit.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side must be left or right, got {side!r}")
        if multiple < 1:
            raise ValueError(f"multiple must be positive, got {multiple}")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"there are {len(texts)} texts and {len(pairs)} pairs")
        if truncate and length is None:
            raise ValueError("truncate needs length")
        if stride is not None and not truncate:
            raise ValueError("stride needs truncate")
        limit = length if truncate else None
        found = self._encode(texts, pairs, template, allow_special, limit, stride or 0)
        rows = [[e, *(e.overflowing if stride is not None else ())] for e in found]
        source = [i for i, row in enumerate(rows) for _ in row]
        encodings = [e for row in rows for e in row]
        longest = max((len(e.ids) for e in encodings), default=0)
        T = longest if length is None else length
        if longest > T:
            raise ValueError(f"a text has {longest} tokens, more than length = {T}")
        T = -(-T // multiple) * multiple
        pad = 0
        if any(len(e.ids) < T for e in encodings):
            if "pad" not in self.special:
                raise ValueError('texts of unequal length need a token with the role "pad"')
            pad = self.special_id("pad")
        tokens = torch.full((len(encodings), T), pad, device="cpu")
        types, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        for i, e in enumerate(encodings):
            n = len(e.ids)
            where = slice(T - n, T) if side == "left" else slice(n)
            tokens[i, where] = tokens.new_tensor(e.ids)
            types[i, where] = types.new_tensor(e.type_ids)
            mask[i, where] = True
        return Batch(tokens, mask, types, tokens.new_tensor(source), encodings)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD."""
        with refusing("the tokens cannot be decoded"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> "Stream":
        """A `Stream` that decodes ids one by one."""
        return Stream(self, skip_special)

    def _encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        template: bool,
        allow_special: bool,
        limit: int | None = None,
        stride: int = 0,
    ) -> list[Encoding]:
        backend = self.backend
        backend.encode_special_tokens = not allow_special
        if limit is not None:
            room = limit
            if template:
                room -= backend.num_special_tokens_to_add(pairs is not None)
            if room < 1:
                raise ValueError(f"length = {limit} leaves no room beside {limit - room} tokens")
            if not 0 <= stride < room:
                raise ValueError(f"stride must lie in [0, {room}), got {stride}")
            backend.enable_truncation(limit, stride=stride)
        inputs: Any = texts if pairs is None else list(zip(texts, pairs, strict=True))
        try:
            with refusing("the text cannot be encoded"):
                return backend.encode_batch(inputs, add_special_tokens=template)
        finally:
            backend.no_truncation()
            backend.encode_special_tokens = False


class Stream:
    """Text from ids that come one by one.

    A character of several tokens comes with the last of them, so that the pieces put together are
    what `decode` gives."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._stream = DecodeStream(skip_special_tokens=skip_special)
        self._ids: list[int] = []
        self._length = 0

    def push(self, token: int) -> str:
        """The text that this token makes certain: often its own text, sometimes none."""
        self._ids.append(int(token))
        with refusing("the tokens cannot be decoded"):
            piece = self._stream.step(self._tokenizer.backend, int(token)) or ""
        self._length += len(piece)
        return piece

    def finish(self) -> str:
        """The rest of the text: an incomplete character becomes U+FFFD."""
        rest = self._tokenizer.decode(self._ids, skip_special=self._skip)[self._length :]
        self._length += len(rest)
        return rest

    def feed(self, tokens: Iterable[int]) -> Iterator[str]:
        """The pieces of text of several tokens, then the rest."""
        for token in tokens:
            yield self.push(token)
        yield self.finish()


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns exceptions of the library into ValueErrors. It raises plain Exceptions, and panics,
    which are BaseExceptions."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what}: {files.one_line(error)}") from None
        raise
