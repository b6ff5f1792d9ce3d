"""Texts in, texts out."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tfkern.generate.decode import generate, stream
from tfkern.models import Transformer

if TYPE_CHECKING:  # needs the library tokenizers, without which models still generate tokens
    from tfkern.tokenize import Tokenizer


def complete(
    model: Transformer,
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    max_tokens: int = 64,
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> list[str]:
    """The text that follows each prompt; from an encoder-decoder, the text that it makes of it.

    Args:
        stop: strings before which a text ends, wherever the borders of tokens are.
        options: further arguments of `generate`.

    Returns:
        As many texts as prompts, times samples.

    Raises:
        ValueError: as `generate`, a string in place of several, or an empty one to stop at.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a sequence of strings, got {prompts!r}")
    texts = [_Text(tokenizer, stop) for _ in range(len(prompts) * options.get("samples", 1))]

    def ends(row: int, token: int) -> bool:
        texts[row].push(token)
        return texts[row].ended

    generate(
        model,
        max_tokens=max_tokens,
        stop=ends,
        **encode_prompts(model, tokenizer, prompts),
        **options,
    )
    return [text.finish() for text in texts]


def stream_text(
    model: Transformer,
    tokenizer: "Tokenizer",
    prompt: str | None = None,
    max_tokens: int = 64,
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """The text of `complete` in pieces, each given as soon as no string to stop at can begin in it.
    Without a prompt the text begins with the model's start token."""
    if options.get("samples", 1) != 1:
        raise ValueError(f"a stream has one text, got samples = {options['samples']}")
    text = _Text(tokenizer, stop)
    shown = 0
    inputs = {} if prompt is None else encode_prompts(model, tokenizer, [prompt])
    for (token,) in stream(model, max_tokens=max_tokens, **inputs, **options):
        assert token is not None
        text.push(token)
        certain = text.certain()
        yield text.value[shown:certain]
        shown = certain
        if text.ended:
            return
    yield text.finish()[shown:]


def fill_mask(
    model: Transformer, tokenizer: "Tokenizer", text: str, count: int = 5
) -> list[list[tuple[str, float]]]:
    """The likeliest tokens for each mask in a text, with their probabilities.

    Args:
        model: an encoder with head "mlm" or "pretraining".
        text: with the tokenizer's mask token, such as "[MASK]".
        count: number of tokens for each mask, at most the size of the vocabulary.

    Raises:
        ValueError: a model without such a head, a text without a mask, or count out of range.
    """
    if model.config.head not in ("mlm", "pretraining"):
        raise ValueError(f"fill_mask needs head 'mlm', the model has {model.config.head!r}")
    if not 1 <= count <= (model.config.vocab_size or 0):
        raise ValueError(f"count must lie in 1 to {model.config.vocab_size}, got {count}")
    batch = tokenizer.batch([text], allow_special=["mask"])
    masks = (batch.tokens[0] == tokenizer.special_id("mask")).nonzero()[:, 0]
    if not len(masks):
        raise ValueError(f"the text has no {tokenizer.special['mask']}: {text!r}")
    device = next(model.parameters()).device
    with torch.no_grad():
        types = batch.types.to(device) if model.config.token_types else None
        logits = model(batch.tokens.to(device), token_types=types)
    logits = logits[0] if isinstance(logits, tuple) else logits
    top = logits[0, masks.to(device)].float().softmax(-1).topk(count)
    return [
        [
            (tokenizer.decode([token], skip_special=False), p)
            for token, p in zip(tokens, ps, strict=True)
        ]
        for tokens, ps in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def encode_prompts(
    model: Transformer, tokenizer: "Tokenizer", prompts: Sequence[str]
) -> dict[str, Any]:
    """Texts as an argument of `generate`: prompts of a decoder, or source of an encoder-decoder."""
    both = model.config.architecture == "encoder_decoder"
    rows = [tokenizer.encode(text, template=both) for text in prompts]
    return {"source" if both else "prompts": rows}


class _Text:
    """A text that grows by tokens until a string to stop at is in it."""

    def __init__(self, tokenizer: "Tokenizer", stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            raise ValueError(f"stop must be a sequence of strings, got {stop!r}")
        if not all(stop):
            raise ValueError("a string to stop at must not be empty")
        self._stream, self._stop = tokenizer.stream(), stop
        self.value, self.ended = "", False

    def push(self, token: int) -> None:
        self._add(self._stream.push(token))

    def finish(self) -> str:
        if not self.ended:
            self._add(self._stream.finish())
        return self.value

    def certain(self) -> int:
        """How many characters of the value can be in no string to stop at; this never shrinks."""
        if self.ended:
            return len(self.value)
        longest = 0
        for word in self._stop:
            for n in range(1, min(len(word), len(self.value) + 1)):
                if self.value.endswith(word[:n]):
                    longest = max(longest, n)
        return len(self.value) - longest

    def _add(self, piece: str) -> None:
        self.value += piece
        found = [i for i in map(self.value.find, self._stop) if i >= 0]
        if found:
            self.value, self.ended = self.value[: min(found)], True
