"""A transformer: encoder, decoder, or both, from one set of blocks.

    x = embedding(tokens) + positions
    for each block:
        x = x + attention(norm1(x))
        x = x + cross(norm_cross(x), memory)    in a decoder that follows an encoder
        x = x + mlp(norm2(x))
    logits = head(norm(x))

With post_norm each norm stands behind its addition, and there is none at the end. With norm_place
there are norms behind the sublayers, too, or there alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tfkern.models import heads
from tfkern.models.blocks import Attention, KeysValues, normalise_weights
from tfkern.models.config import TransformerConfig
from tfkern.models.embedding import PatchEmbedding, TokenEmbedding, length
from tfkern.models.initialise import initialise
from tfkern.models.quantize import replace_linear
from tfkern.models.stack import Mask, Stack
from tfkern.nn import Int8Linear, KVCache, Linear, LoRALinear, PackedLinear
from tfkern.nn.context_parallel import SequenceSplit
from tfkern.ops import packing


class Transformer(nn.Module):
    """A transformer as `TransformerConfig` describes it.

    A mask tells which tokens exist. (B, T) bool: True where there is one; padding may be on either
    side, and positions are counted without it. Or (B,) int32 or int64: how many there are, with
    padding on the right, which is then never read. Outputs at padding mean nothing.

    Rows may hold several documents, as those of `tfkern.data.Packed` do. With `documents` a token
    sees its own document only, and the model computes of each document what it would compute of it
    alone. Heads for the whole sequence, batch norm (whose statistics would mix documents), images
    and encoder-decoders do not take them. Attention's memory stays linear in T, except with
    relative positions and under torch.compile, where it is that of a mask (B, 1, T, T).

    A stage of a pipeline is a model with one stack, in which modules that belong to other stages
    are None. Only the first stage has the embedding, only the last one the norm, the layer
    `narrow`, the vocabulary, the pooler and the classifier, and each stage has some of the blocks.
    Other stages take the residual stream (B, T, dim) in place of tokens, and return it in place of
    logits. With tied embeddings the last stage has the embedding, too, or the table alone as
    `vocabulary.weight`.

    Attributes:
        recompute: whether a training step keeps only the inputs of the blocks, and computes what is
            inside them again in backward (Chen et al. 2016). Default False. If True, the running
            statistics of batch norms take in each batch twice.
        family: the model_type of the files that the model was read from, if any. `save` keeps it.
    """

    family: str | None = None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        embedding = TokenEmbedding if config.patch_size is None else PatchEmbedding
        self.embedding: Any = embedding(config)
        both = config.architecture == "encoder_decoder"
        self.encoder = self.decoder = None
        if config.architecture != "decoder":
            layers = config.encoder_layers if both else None
            self.encoder = Stack(config, layers or config.layers, causal=False)
        if config.architecture != "encoder":
            self.decoder = Stack(config, config.layers, causal=True, cross=both)
        self.vocabulary = self.pooler = self.narrow = None
        if config.embedding_dim is not None:
            self.narrow = Linear(config.dim, config.embedding_dim, False)
        masked = config.head in ("mlm", "pretraining")
        if masked or config.head in ("lm", "lm_classification"):
            self.vocabulary = heads.VocabularyHead(config, masked)
        if config.pooler:
            self.pooler = heads.Pooler(config)
        self.classifier = heads.classifier(config)
        self.reset_parameters()
        if config.norm == "weight_norm":
            for stack in filter(None, (self.encoder, self.decoder)):
                normalise_weights(stack)
        if config.int8:
            replace_linear(self)

    def reset_parameters(self) -> None:
        """Draws all weights as `config.init` says.

        Raises:
            ValueError: weights are int8 or packed, or layers have adapters.
        """
        fixed = ((Int8Linear, "int8"), (PackedLinear, "packed"), (LoRALinear, "adapted"))
        for kind, told in fixed:
            if any(isinstance(module, kind) for module in self.modules()):
                raise ValueError(f"{told} weights cannot be drawn")
        initialise(self, self.config)

    def forward(
        self,
        tokens: Tensor,
        *,
        source: Tensor | None = None,
        mask: Mask = None,
        source_mask: Mask = None,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Any:
        """The logits. `tfkern.models.cross_entropy` makes a loss of them.

        Rows may come in groups, such as the answers that a text is to be chosen from: all inputs
        then have an axis G behind B, and so have the results.

        Args:
            tokens: (B, T) int32 or int64, or images (B, channels, height, width).
            source: (B, S), tokens for the encoder of an encoder-decoder. `tokens` are then for its
                decoder, and begin with start_token.
            mask, source_mask: masks of tokens and of source, see the class.
            token_types: (B, T), the segment of each token; 0 if None.
            positions: (B or 1, T) int64, of the tokens. If None they are counted, which a model
                without embedding cannot do. ALiBi and relative positions are distances between
                tokens, in number: they take no more than T from here.
            documents: (B, T) integers, the document of each token: one begins with each row, and
                wherever the number is another one than before. Positions, if None, begin at 0 in
                each. Padding is a document, too, so there is no mask beside it, and rotary scalings
                that follow the longest text of the batch count it.

        Returns:
            By head: "lm", "mlm" (B, T, vocab_size); "token" (B, T, classes); "classification"
            (B, classes); "choice" (B, G), whose rows are always in groups; "next_sentence" (B, 2);
            "pretraining" the results of mlm and next_sentence; "lm_classification" those of lm and
            classification; "span" (B, 2, T), logits of the first token, then of the last; "none"
            the hidden states (B, T, dim).

        Raises:
            ValueError: shapes that do not fit, or inputs that the architecture lacks.
        """
        self.check_inputs(source, source_mask, documents)
        given = (tokens, source, mask, source_mask, token_types, positions, documents)
        if not in_groups(self.config, tokens):
            return self._logits(*given)
        rows: list[Any] = [None if x is None else x.flatten(0, 1) for x in given]
        return _grouped(self._logits(*rows), tokens.shape[:2])

    def _logits(
        self,
        tokens: Tensor,
        source: Tensor | None,
        mask: Mask,
        source_mask: Mask,
        token_types: Tensor | None,
        positions: Tensor | None,
        documents: Tensor | None,
    ) -> Any:
        """As `forward`, of rows that are not in groups."""
        if self.decoder is None:
            y = self.encode(tokens, mask, token_types, positions, documents)
        else:
            memory = None if source is None else self.encode(source, source_mask)
            y = self.decode(
                tokens, memory, mask, source_mask, token_types, positions=positions,
                documents=documents,
            )  # fmt: skip
            if self.config.head.endswith("classification") and self.embedding is not None:
                mask = heads.ends(self.config, tokens, source, mask)
        return self.project(y, mask)

    def check_inputs(
        self, source: Tensor | None, source_mask: Mask, documents: Tensor | None
    ) -> None:
        """Raises ValueError for arguments of `forward` that the architecture or the head lacks."""
        both = self.encoder is not None and self.decoder is not None
        if both != (source is not None):
            raise ValueError("encoder-decoders need source, and other models do not take one")
        if source is None and source_mask is not None:
            raise ValueError("source_mask needs source")
        if documents is not None:
            _check_takes_documents(self.config, self.config.head)

    def encode(
        self,
        tokens: Tensor,
        mask: Mask = None,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The hidden states (B, T, dim) of the encoder."""
        if self.encoder is None:
            raise ValueError("a decoder-only model has no encoder: use decode")
        return self._run(
            self.encoder, tokens, positions, mask=mask, token_types=token_types,
            documents=documents,
        )  # fmt: skip

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor | Sequence[KeysValues] | None = None,
        mask: Mask = None,
        memory_mask: Mask = None,
        token_types: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The hidden states (B, T, dim) of the decoder.

        Args:
            memory: what `encode` returned, or for each block its `keys_values`.
            caches: for each block, keys and values of earlier tokens, to which those of `tokens`
                are appended. With caches, a mask must be lengths (B,).

        Raises:
            ValueError: as `forward`.
        """
        if self.decoder is None:
            raise ValueError("an encoder-only model has no decoder: use encode")
        if (memory is None) != (self.encoder is None):
            raise ValueError("a decoder behind an encoder needs memory, and others do not take one")
        return self._run(
            self.decoder, tokens, positions, mask=mask, token_types=token_types, memory=memory,
            memory_mask=memory_mask, caches=caches, documents=documents,
        )  # fmt: skip

    def project(self, y: Tensor, mask: Mask = None) -> Any:
        """Logits of hidden states, as `forward` returns them."""
        tokens = None
        if self.narrow is not None:
            y = self.narrow(y)
        if self.vocabulary is not None:
            table = None if self.embedding is None else self.embedding.weight
            tokens = self.vocabulary(y, table=table)
        if self.classifier is None:
            return y if tokens is None else tokens
        if self.config.head in ("token", "span"):
            classes = self.classifier(y)
            return classes if self.config.head == "token" else classes.transpose(1, 2)
        classes = self.classifier(self.pool(y, mask))
        if self.config.head == "choice":
            return classes.squeeze(-1)
        return classes if tokens is None else (tokens, classes)

    def pool(self, y: Tensor, mask: Mask = None, kind: str | None = None) -> Tensor:
        """One vector (B, dim) for each sequence of hidden states.

        Args:
            kind: "first", "last" or "mean" of the tokens. If None, as for the heads: the first
                token of an encoder, the last of a decoder, through the pooler if there is one.
        """
        if kind is not None:
            return heads.pool(y, mask, kind)
        y = heads.pool(y, mask, "first" if self.decoder is None else "last")
        return y if self.pooler is None else self.pooler(y)

    @torch.no_grad()
    def attention_maps(
        self,
        layer: int,
        tokens: Tensor,
        *,
        side: str | None = None,
        cross: bool = False,
        **options: Any,
    ) -> Tensor:
        """The weights of attention in one block, (B, H, T, S), before dropout.

        The kernels stay fused: the weights are computed separately, for this block only.

        Args:
            layer: index of the block in its stack, from 0.
            tokens: as in `forward`, as are options (source and masks).
            side: "encoder" or "decoder"; the decoder if there is one and this is None.
            cross: the weights of cross-attention, from the decoder's tokens to the encoder's.

        Raises:
            ValueError: a side or a layer that the model lacks.
        """
        side = side or ("encoder" if self.decoder is None else "decoder")
        stack = {"encoder": self.encoder, "decoder": self.decoder}.get(side)
        if stack is None or not 0 <= layer < len(stack.blocks):
            has = "no such part" if stack is None else f"layers 0 to {len(stack.blocks) - 1}"
            raise ValueError(f"layer {layer} of {side!r}: the model has {has}")
        found: list[Tensor] = []
        if stack.blocks[layer] is None:
            raise ValueError(f"layer {layer} of {side!r} is in another stage of the model")
        module = getattr(stack.blocks[layer], "cross" if cross else "attention", None)
        if not isinstance(module, Attention):
            raise ValueError(f"the {side} has no cross-attention")
        handle = module.register_forward_pre_hook(
            lambda m, inputs, named: found.append(module.weights(*inputs, **named)),
            with_kwargs=True,
        )
        try:
            self(tokens, **options)
        finally:
            handle.remove()
        return found[0]

    def _run(
        self,
        stack: Stack,
        tokens: Tensor,
        positions: Tensor | None,
        mask: Mask,
        caches: Sequence[KVCache] | None = None,
        documents: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Runs a stack on tokens, or on the residual stream in a stage without embedding."""
        counted = positions is not None or documents is not None
        is_stream = counted and tokens.is_floating_point() and tokens.dim() == 3
        embedding = None if is_stream else self.embedding
        if documents is not None:
            _check_takes_documents(self.config)
            if mask is not None or caches is not None:
                other = "a mask" if caches is None else "caches"
                raise ValueError(f"documents and {other} exclude each other")
        if embedding is None and positions is None and documents is None:
            raise ValueError("a model without embedding needs positions: it has no tokens to count")
        x = tokens if embedding is None else embedding(tokens)
        B, T = x.shape[0], None if embedding is None else length(self.config, tokens)
        if positions is not None:
            _check_numbers("positions", positions, (B, 1), T)
            T = positions.shape[1]
        if documents is not None:
            _check_numbers("documents", documents, (B,), T)
            T = documents.shape[1]
        # Dynamo takes tuples with symbolic sizes for unequal, so sizes are compared one by one.
        if mask is not None and not (
            mask.dim() in (1, 2) and all(n == m for n, m in zip(mask.shape, (B, T), strict=False))
        ):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(B, T)} or {(B,)}")
        if positions is None and embedding is None:
            assert documents is not None
            split = stack.split
            whole = documents if split is None else split.gather(documents, 1)
            positions = packing.positions(whole)
            positions = positions if split is None else split.split(positions, 1)
        elif positions is None:
            positions = count_positions(self.config, tokens, mask, documents, caches, stack.split)
        options |= {"mask": mask, "caches": caches, "documents": documents}
        options["recompute"] = self.recompute
        return stack(x, positions, embedded=embedding is not None, **options)


def in_groups(config: TransformerConfig, tokens: Tensor) -> bool:
    """Whether tokens are (B, G, T), rows in groups, and not (B, T).

    Raises:
        ValueError: the head chooses among the rows of a group, and there are no groups.
    """
    stream = tokens.is_floating_point() or config.patch_size is not None
    if config.head == "choice" and tokens.dim() != 3:
        raise ValueError(f"tokens must be (batch, choices, length), got {tuple(tokens.shape)}")
    return tokens.dim() == 3 and not stream


def _grouped(found: Any, groups: torch.Size) -> Any:
    """Results of rows (B * G, ...) as those of groups (B, G, ...)."""
    if isinstance(found, heads.DeferredLogits):
        return found._replace(x=found.x.unflatten(0, groups))
    if isinstance(found, tuple):
        return tuple(_grouped(x, groups) for x in found)
    return found.unflatten(0, groups)


def count_positions(
    config: TransformerConfig,
    tokens: Tensor,
    mask: Mask = None,
    documents: Tensor | None = None,
    caches: Sequence[KVCache] | None = None,
    split: SequenceSplit | None = None,
) -> Tensor:
    """The positions (B or 1, T) of tokens or images, as a model counts them if it is told none.

    Those of a split sequence are counted in the whole.
    """
    T, pad = length(config, tokens), config.pad_token
    padding = tokens.eq(pad) if config.skip_pad and pad is not None else None
    if split is not None:
        T *= split.ranks
        if config.max_length is not None and T > config.max_length:
            raise ValueError(
                f"the whole sequence has length {T}, padding included, and the limit is "
                f"{config.max_length}"
            )
        padding, documents = (
            None if x is None else split.gather(x, 1) for x in (padding, documents)
        )
        if mask is not None and mask.dim() == 2:
            mask = split.gather(mask, 1)
    if padding is not None:
        positions = _counted_without(padding, documents)
    elif documents is not None:
        positions = packing.positions(documents)
    else:
        positions = _counted(torch.arange(T, device=tokens.device)[None], mask, caches)
    return positions if split is None else split.split(positions, 1)


def _check_takes_documents(config: TransformerConfig, head: str = "none") -> None:
    """Refuses several documents in a row where the model, or its head, would mix them."""
    if config.architecture == "encoder_decoder":
        raise ValueError("an encoder-decoder takes no documents: a row of source is one of tokens")
    if config.patch_size is not None:
        raise ValueError("a model of images takes no documents")
    if config.norm == "batch_norm":
        raise ValueError("batch norm takes no documents: its statistics would mix them")
    if head not in ("lm", "mlm", "token", "none"):
        raise ValueError(f"head {head!r} takes no documents: it reads a row as one sequence")


def _check_numbers(name: str, x: Tensor, rows: tuple[int, ...], T: int | None) -> None:
    """T is that of tokens. Without an embedding nobody but x knows it."""
    fits = x.dim() == 2 and x.shape[0] in rows
    if not fits or (T is not None and x.shape[1] != T):
        expected = (" or ".join(map(str, rows)), "T" if T is None else T)
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected ({expected[0]}, {expected[1]})"
        )
    if x.is_floating_point() or x.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {x.dtype}")


def _counted_without(padding: Tensor, documents: Tensor | None) -> Tensor:
    """Positions (B, T) of tokens that are not padding, counted in each document; -1 at padding."""
    counts = (~padding).long()
    places = counts.cumsum(1)
    if documents is not None:
        first = torch.arange(documents.shape[1], device=documents.device)
        first = first - packing.positions(documents)
        places = places - (places - counts).gather(1, first)
    return places * counts - 1


def _counted(steps: Tensor, mask: Mask, caches: Sequence[KVCache] | None) -> Tensor:
    """Positions (B or 1, T) of tokens; padding on the left is not counted."""
    if caches is not None:
        return caches[0].lengths[:, None] + steps
    if mask is not None and mask.dim() == 2:
        return (mask.cumsum(1) - 1).clamp(min=0)
    return steps
