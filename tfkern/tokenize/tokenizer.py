"""A tokenizer with special tokens by role, padded batches, and decoding as a stream."""

import bisect
import itertools
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Encoding
from torch import Tensor

from tfkern import files
from tfkern.tokenize.unspellable import unspellable

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

    Text of a user never becomes a control token, which is a special token of the backend or one
    with a role: "<|endoftext|>" is encoded as the characters that it is, unless `allow_special`
    says otherwise. A tokenizer that has no other tokens for these characters raises ValueError.

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
        with refusing("the special tokens cannot be added"):
            backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])
        self._unspellable: dict[frozenset[str], tokenizers.Tokenizer] = {}

    @property
    def vocab_size(self) -> int:
        """All ids are below this number."""
        return max(self.backend.get_vocab().values(), default=-1) + 1

    def id(self, token: str) -> int:
        """The id of a token.

        Raises:
            ValueError: the vocabulary lacks it.
        """
        with refusing(f"{files.shown(token)} is no token"):
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
        allow_special: bool | Collection[str] = False,
    ) -> list[int]:
        """The ids of a text, or of a pair of texts.

        Args:
            template: put the special tokens of the model around the text, such as [CLS] and [SEP].
            allow_special: encode special tokens that the text spells out as control tokens: all of
                them, or those with these roles, such as ["mask"].

        Raises:
            ValueError: a character or word that the vocabulary lacks and cannot replace, or a role
                that no token has.
        """
        return self._encode([text], [pair] if pair is not None else None, template, allow_special)[
            0
        ].ids

    def encode_pieces(self, pieces: Sequence[str | int]) -> tuple[list[int], list[range]]:
        """The ids of one text that is given in pieces, some of which are tokens.

            ids, made_of = tokenizer.encode_pieces(["user: ", text, tokenizer.special_id("eos")])

        Args:
            pieces: strings, in which no control token is spelled, and ids of tokens that stand in
                the vocabulary as added tokens, such as control tokens, but for the unknown one.

        Returns:
            the ids, without the template of the model, and for each the pieces that it is made of:
            strings that follow each other are one text, so that a token may be made of several.

        Raises:
            ValueError: an integer that is no added token, or what `encode` refuses.
        """
        backend = self._without(frozenset())
        added = backend.get_added_tokens_decoder()
        texts: list[str] = []
        for p in pieces:
            if not isinstance(p, str) and (not isinstance(p, int) or p not in added):
                raise ValueError(f"{files.shown(p)} is neither text nor an added token")
            # the copy has names for control tokens that no text has
            texts.append(p if isinstance(p, str) else str(backend.id_to_token(p)))
        starts = list(itertools.accumulate(map(len, texts), initial=0))
        with refusing("the text cannot be encoded"):
            found = backend.encode("".join(texts), add_special_tokens=False)

        def piece(place: int) -> int:
            return min(bisect.bisect_right(starts, place), len(texts)) - 1

        return found.ids, [range(piece(a), piece(max(a, b - 1)) + 1) for a, b in found.offsets]

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
        allow_special: bool | Collection[str] = False,
    ) -> Batch:
        """The ids of several texts, padded to one length.

        Args:
            texts, pairs: lists of one length: the texts, and what follows each of them in its row.
            side: where padding stands, "left" or "right".
            length: tokens of every row, special ones included; those of the longest row if None.
            multiple: the length is rounded up to a multiple of this number.
            truncate: cut off texts that are longer than length, instead of raising.
            stride: with truncate, what is cut off makes further rows, which repeat this many
                tokens of the row before: fewer than a row has beside its special tokens, or of
                pairs fewer than half of them, as both texts may be cut off.
            template, allow_special: as in `encode`.

        Raises:
            ValueError: texts longer than length, no "pad" token where one is needed, or arguments
                that do not fit.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side must be left or right, got {side!r}")
        multiple = integer("multiple", multiple, 1)
        length = None if length is None else integer("length", length, 0)
        stride = None if stride is None else integer("stride", stride, 0)
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
            return self.backend.decode([operator.index(i) for i in ids], skip_special)

    def stream(self, *, skip_special: bool = True) -> "Stream":
        """A `Stream` that decodes ids one by one."""
        return Stream(self, skip_special)

    def _encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        template: bool,
        allow_special: bool | Collection[str],
        limit: int | None = None,
        stride: int = 0,
    ) -> list[Encoding]:
        if limit is not None:
            room = limit
            if template:
                room -= self.backend.num_special_tokens_to_add(pairs is not None)
            if room < 1:
                raise ValueError(f"length = {limit} leaves no room beside {limit - room} tokens")
            most = room if pairs is None else max(room // 2, 1)
            if stride >= most:
                raise ValueError(f"stride must lie in [0, {most}), got {stride}")
        inputs: list[Any] = list(strings("texts", texts))
        if pairs is not None:
            second = strings("pairs", pairs)
            if len(second) != len(inputs):
                raise ValueError(f"there are {len(inputs)} texts and {len(second)} pairs")
            inputs = list(zip(inputs, second, strict=True))

        def run(backend: tokenizers.Tokenizer, inputs: list[Any], special: bool) -> list[Encoding]:
            if limit is not None:
                backend.enable_truncation(limit, stride=stride)
            backend.encode_special_tokens = not special
            try:
                with refusing("the text cannot be encoded"):
                    return backend.encode_batch(inputs, add_special_tokens=template)
            finally:
                backend.no_truncation()
                backend.encode_special_tokens = False

        if allow_special is True:
            return run(self.backend, inputs, True)
        roles = strings("allow_special", allow_special or ())
        if absent := [role for role in roles if role not in self.special]:
            self.special_id(absent[0])  # raises
        allowed = frozenset(self.special[role] for role in roles)
        if allowed:
            return run(self._without(allowed), inputs, True)
        found = run(self.backend, inputs, False)
        control = {i for i, t in self.backend.get_added_tokens_decoder().items() if t.special}
        if wrong := [i for i, e in enumerate(found) if _spells(e, control)]:
            again = run(self._without(allowed), [inputs[i] for i in wrong], False)
            for i, encoding in zip(wrong, again, strict=True):
                found[i] = encoding
        return found

    def _without(self, allowed: frozenset[str]) -> tokenizers.Tokenizer:
        """The backend for encoding, in which texts spell no control token but the allowed."""
        added = self.backend.get_added_tokens_decoder().values()
        control = frozenset(str(token) for token in added if token.special) - allowed
        if control not in self._unspellable:
            self._unspellable[control] = unspellable(self.backend, control)
        return self._unspellable[control]


def _spells(encoding: Encoding, control: set[int]) -> bool:
    """Whether a text has become one of these tokens, beside those of the template."""
    return any(
        token in control and not of_template
        for row in (encoding, *encoding.overflowing)
        for token, of_template in zip(row.ids, row.special_tokens_mask, strict=True)
    )


class Stream:
    """Text from ids that come one by one.

    The pieces put together are what `decode` gives. So a piece ends before what a later token may
    change: bytes that are no whole character yet, and characters of tokens that stand for one byte
    each, up to the next token that does not. `decode` makes such a run of bytes U+FFFD in whole if
    a part of it is no UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._special: set[int] = set()
        if skip_special:
            added = tokenizer.backend.get_added_tokens_decoder()
            self._special = {i for i, token in added.items() if token.special}
        self._ids: list[int] = []  # the last ones, enough to decode those that follow
        self._length = 0  # of the text of these ids that has been given

    def push(self, token: int) -> str:
        """The text that this token makes certain: often its own text, sometimes none."""
        self._decode([token])  # raises for what is no token
        token = operator.index(token)
        if token in self._special:
            return ""
        self._ids.append(token)
        if _BYTE.fullmatch(self._tokenizer.backend.id_to_token(token) or ""):
            return ""
        text = self._decode(self._ids)
        certain = text.rstrip("\ufffd")
        piece = certain[self._length :]
        self._length = max(self._length, len(certain))
        if len(self._ids) > 2 * _CONTEXT and certain == text:
            self._forget(text)
        return piece

    def finish(self) -> str:
        """The rest of the text: an incomplete character becomes U+FFFD."""
        rest = self._decode(self._ids)[self._length :]
        self._length += len(rest)
        return rest

    def feed(self, tokens: Iterable[int]) -> Iterator[str]:
        """The pieces of text of several tokens, then the rest."""
        for token in tokens:
            yield self.push(token)
        yield self.finish()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip)

    def _forget(self, text: str) -> None:
        """Keeps the last ids alone, if the text ends with theirs: the first of them may lack a
        space in front, but may not begin within a character or a word."""
        last = self._ids[-_CONTEXT:]
        end = self._decode(last)
        if end and text.endswith(end):
            self._ids, self._length = last, len(end)


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_CONTEXT = 16  # tokens that a stream decodes again with those that follow


def integer(name: str, value: Any, low: int) -> int:
    """`value` as an integer that the library can take.

    Raises:
        ValueError: it is no integer, or less than `low`, which is 0 or 1, or not less than 2**31.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {files.shown(value)}") from None
    if number < low:
        kind = "be positive" if low else "not be negative"
        raise ValueError(f"{name} must {kind}, got {files.shown(number)}")
    if number >= 2**31:
        raise ValueError(f"{name} must be less than 2**31, got {files.shown(number)}")
    return number


def strings(name: str, values: Collection[str]) -> Collection[str]:
    """`values`, if they are several strings.

    Raises:
        ValueError: they are one string, or something else than strings.
    """
    if isinstance(values, str) or not isinstance(values, Collection):
        raise ValueError(f"{name} must be a sequence of strings, got {files.shown(values)}")
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{name} must hold strings, got {files.shown(value)}")
    return values


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
