"""From text to batches (`pip install tfkern[data]`).

`Shards` are tokens on disk. `Windows`, `Documents` and `Packed` make items of one length of them,
and `order` makes batches of items. Other functions corrupt rows for objectives of training.
`Chat` makes tokens of conversations, and `Conversations` rows of these.

    from tfkern.data import Shards, Windows, order
    from tfkern.models import Transformer, TransformerConfig, cross_entropy

    shards = Shards("shards")
    config = TransformerConfig(
        vocab_size=shards.vocab_size, max_length=64, dim=32, layers=1, heads=2,
        architecture="decoder",
    )
    model = Transformer(config)
    batches = order([Windows(shards, 64)], batch=8, seed=7)
    for step in range(3):
        loss = cross_entropy(model(batches[step]["tokens"]), batches[step]["targets"])
"""

from tfkern.data.chat import Chat
from tfkern.data.conversations import Conversations
from tfkern.data.corrupt import (
    corrupt_spans,
    delete_tokens,
    infill,
    mask_tokens,
    permute_sentences,
    prefix,
    rotate,
    span_lengths,
    span_window,
)
from tfkern.data.order import order
from tfkern.data.packed import Packed
from tfkern.data.pairs import Pair, next_sentence, sentence_order
from tfkern.data.shards import Shards
from tfkern.data.sources import IGNORED, Documents, Windows, padded
from tfkern.data.template import Template, read_template
from tfkern.ops.packing import cu_seqlens, positions

__all__ = [
    "Chat",
    "Conversations",
    "Documents",
    "IGNORED",
    "Packed",
    "Pair",
    "Shards",
    "Template",
    "Windows",
    "corrupt_spans",
    "cu_seqlens",
    "delete_tokens",
    "infill",
    "mask_tokens",
    "next_sentence",
    "order",
    "padded",
    "permute_sentences",
    "positions",
    "prefix",
    "read_template",
    "rotate",
    "sentence_order",
    "span_lengths",
    "span_window",
]
