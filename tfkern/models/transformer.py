"""A transformer: encoder, decoder, or both, from one set of blocks.

    x = embedding(tokens) + positions
    for each block:
        x = x + attention(norm1(x))
        x = x + cross(norm_cross(x), memory)    in a decoder that follows an encoder
        x = x + mlp(norm2(x))
    logits = head(norm(x))

With post_norm each norm stands behind its addition, and there is none at the end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tfkern.models import heads
from tfkern.models.blocks import (
    Attention,
    Block,
    KeysValues,
    add_and_norm,
    norm,
    normalise_weights,
)
from tfkern.models.config import TransformerConfig
from tfkern.models.initialise import initialise
from tfkern.models.positions import RelativeBias, alibi_slopes, sinusoids
from tfkern.nn import KVCache
from tfkern.nn.rotary import rotary_table

Mask = Tensor | None


class Transformer(nn.Module):
    """A transformer as `TransformerConfig` describes it.

    A mask tells which tokens exist. (B, T) bool: True where there is one; padding may be on either
    side, and positions are counted without it. Or (B,) int32 or int64: how many there are, with
    padding on the right, which is then never read. Outputs at padding mean nothing.

    Attributes:
        recompute: whether a training step keeps only the inputs of the blocks, and computes what is
            inside them again in backward (Chen et al. 2016). False at first. The running statistics
            of batch norms take in each batch twice then.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        if config.patch_size is not None:
            self.embedding: nn.Module = PatchEmbedding(config)
        else:
            self.embedding = nn.Embedding(heads.rows(config), config.dim, config.pad_token)
        both = config.architecture == "encoder_decoder"
        self.encoder = self.decoder = None
        if config.architecture != "decoder":
            layers = config.encoder_layers if both else None
            self.encoder = Stack(config, layers or config.layers, causal=False)
        if config.architecture != "encoder":
            self.decoder = Stack(config, config.layers, causal=True, cross=both)
        self.vocabulary = self.pooler = None
        if config.head in ("lm", "mlm", "pretraining"):
            self.vocabulary = heads.VocabularyHead(config, masked=config.head != "lm")
        if config.pooler:
            self.pooler = heads.Pooler(config)
        self.classifier = heads.classifier(config)
        self.reset_parameters()
        if config.norm == "weight_norm":
            for stack in filter(None, (self.encoder, self.decoder)):
                normalise_weights(stack)

    def reset_parameters(self) -> None:
        """Draws all weights as `config.init` says."""
        initialise(self)

    def forward(
        self,
        tokens: Tensor,
        *,
        source: Tensor | None = None,
        mask: Mask = None,
        source_mask: Mask = None,
        token_types: Tensor | None = None,
    ) -> Any:
        """The logits. `tfkern.models.cross_entropy` makes a loss of them.

        Args:
            tokens: (B, T) int32 or int64, or images (B, channels, height, width).
            source: (B, S), what the encoder of an encoder-decoder reads; tokens are those of its
                decoder, beginning with start_token.
            mask, source_mask: of tokens and source, see the class.
            token_types: (B, T), the segment of each token; 0 if None.

        Returns:
            By head: "lm", "mlm" (B, T, vocab_size); "token" (B, T, classes); "classification"
            (B, classes); "next_sentence" (B, 2); "pretraining" those of mlm and next_sentence;
            "span" (B, 2, T), of the first token and of the last; "none" the hidden states
            (B, T, dim).

        Raises:
            ValueError: shapes that do not fit, or inputs that the architecture lacks.
        """
        both = self.encoder is not None and self.decoder is not None
        if both != (source is not None):
            raise ValueError("encoder-decoders need source, and other models do not take one")
        if source is None and source_mask is not None:
            raise ValueError("source_mask needs source")
        if self.decoder is None:
            y = self.encode(tokens, mask, token_types)
        else:
            memory = None if source is None else self.encode(source, source_mask)
            y = self.decode(tokens, memory, mask, source_mask, token_types)
        return self.project(y, mask)

    def encode(
        self, tokens: Tensor, mask: Mask = None, token_types: Tensor | None = None
    ) -> Tensor:
        """The hidden states (B, T, dim) of the encoder."""
        if self.encoder is None:
            raise ValueError("a decoder-only model has no encoder: use decode")
        return self.encoder(self._embed(tokens), mask, token_types, recompute=self.recompute)

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor | Sequence[KeysValues] | None = None,
        mask: Mask = None,
        memory_mask: Mask = None,
        token_types: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """The hidden states (B, T, dim) of the decoder.

        Args:
            memory: what `encode` returned, or for each block the `keys_values` of it.
            caches: for each block what earlier tokens left; these are appended. A mask must be
                lengths then.

        Raises:
            ValueError: as `forward`.
        """
        if self.decoder is None:
            raise ValueError("an encoder-only model has no decoder: use encode")
        if (memory is None) != (self.encoder is None):
            raise ValueError("a decoder behind an encoder needs memory, and others do not take one")
        x = self._embed(tokens)
        return self.decoder(x, mask, token_types, memory, memory_mask, caches, self.recompute)

    def project(self, y: Tensor, mask: Mask = None) -> Any:
        """Logits of hidden states, as `forward` returns them."""
        head = self.config.head
        if head == "none":
            return y
        tokens = None
        if self.vocabulary is not None:
            tokens = self.vocabulary(y, table=self.embedding.weight)
        if head in ("lm", "mlm"):
            return tokens
        assert self.classifier is not None
        if head in ("token", "span"):
            return self.classifier(y) if head == "token" else self.classifier(y).transpose(1, 2)
        classes = self.classifier(self.pool(y, mask))
        return classes if tokens is None else (tokens, classes)

    def pool(self, y: Tensor, mask: Mask = None, kind: str | None = None) -> Tensor:
        """One vector (B, dim) for each sequence of hidden states.

        Args:
            kind: "first", "last" or "mean" of the tokens. If None what the heads use: the first of
                an encoder, the last of a decoder, and behind it the pooler if there is one.
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

        The kernels stay fused: the weights are computed besides, in the block that is asked for.

        Args:
            layer: of the stack, from 0.
            tokens: as in `forward`, as are options (source and masks).
            side: "encoder" or "decoder"; the decoder if there is one and this is None.
            cross: those of the decoder's tokens to the encoder's.

        Raises:
            ValueError: a side or a layer that the model lacks.
        """
        side = side or ("encoder" if self.decoder is None else "decoder")
        stack = {"encoder": self.encoder, "decoder": self.decoder}.get(side)
        if stack is None or not 0 <= layer < len(stack.blocks):
            has = "no such part" if stack is None else f"layers 0 to {len(stack.blocks) - 1}"
            raise ValueError(f"layer {layer} of {side!r}: the model has {has}")
        found: list[Tensor] = []
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

    def _embed(self, tokens: Tensor) -> Tensor:
        config = self.config
        if config.patch_size is not None:
            return self.embedding(tokens)
        if tokens.dim() != 2 or tokens.shape[1] > (config.max_length or tokens.shape[1]):
            limit = f" with a length up to {config.max_length}" if config.max_length else ""
            raise ValueError(f"tokens must be (batch, length){limit}, got {tuple(tokens.shape)}")
        x = self.embedding(tokens)
        return x * config.dim**0.5 if config.scale_embedding else x


class Stack(nn.Module):
    """Blocks with what precedes and follows them: positions, segments, norms."""

    def __init__(
        self, config: TransformerConfig, layers: int, causal: bool, cross: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.positions: nn.Module | None = None
        if config.positions == "learned" and config.patch_size is None:
            assert config.max_length is not None
            self.positions = nn.Embedding(config.max_length + config.position_offset, config.dim)
        elif config.positions == "relative":
            buckets, furthest = config.relative_buckets, config.relative_distance
            self.positions = RelativeBias(config.heads, causal, buckets, furthest)
        self.token_types = (
            nn.Embedding(config.token_types, config.dim) if config.token_types else None
        )
        self.embedding_norm = norm(config) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, causal, cross) for _ in range(layers))
        self.norm = None if config.post_norm else norm(config)

    def forward(
        self,
        x: Tensor,
        mask: Mask = None,
        token_types: Tensor | None = None,
        memory: Tensor | Sequence[KeysValues] | None = None,
        memory_mask: Mask = None,
        caches: Sequence[KVCache] | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Embedded tokens (B, T, dim) to hidden states, with the arguments of `Transformer`."""
        B, T, config = *x.shape[:2], self.config
        if mask is not None and tuple(mask.shape) not in ((B, T), (B,)):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(B, T)} or {(B,)}")
        if token_types is not None and self.token_types is None:
            raise ValueError("this model has no segments to tell apart, and takes no token_types")
        if mask is not None and mask.dim() == 2 and caches is not None:
            raise ValueError("with caches a mask must be lengths (B,)")
        places = self._places(x, mask, caches)
        if config.positions.startswith("sinusoidal"):
            halves = config.positions == "sinusoidal_halves"
            x = x + sinusoids(places, config.dim, halves).to(x.dtype)
        elif config.positions == "learned" and self.positions is not None:
            x = x + self.positions(places + config.position_offset)
        if self.token_types is not None:
            kinds = torch.zeros_like(places) if token_types is None else token_types
            x = x + self.token_types(kinds)
        own = self._attention_options(x, mask, caches, places)
        counted: dict[str, Any] = {}
        if config.norm == "batch_norm" and mask is not None:
            counted["mask"] = mask if mask.dim() == 2 else places < mask[:, None]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x, **counted)
        if config.post_norm:  # else the first norm drops
            x = F.dropout(x, config.dropout, self.training)

        h, other = None, _visible(memory_mask)
        for i, block in enumerate(self.blocks):
            seen = memory if memory is None or isinstance(memory, Tensor) else memory[i]
            if caches is not None:
                own = own | {"cache": caches[i]}
            inputs = (x, h, seen, own, other, counted)
            if recompute and torch.is_grad_enabled():
                x, h = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, h = block(*inputs)
        if self.norm is None:
            return x
        return add_and_norm(self.norm, x, h, config.dropout if self.training else 0.0, **counted)

    def _places(self, x: Tensor, mask: Mask, caches: Sequence[KVCache] | None) -> Tensor:
        """Positions (B or 1, T) of the tokens, without those of padding on the left."""
        steps = torch.arange(x.shape[1], device=x.device)[None]
        if caches is not None:
            return caches[0].lengths[:, None] + steps
        if mask is not None and mask.dim() == 2:
            return (mask.cumsum(1) - 1).clamp(min=0)
        return steps

    def _attention_options(
        self, x: Tensor, mask: Mask, caches: Sequence[KVCache] | None, places: Tensor
    ) -> dict[str, Any]:
        """What self-attention is told in every block."""
        config = self.config
        options: dict[str, Any] = _visible(mask)
        if mask is not None and mask.dim() == 1:
            options["query_lengths"] = mask
        if config.positions == "rotary":
            table = rotary_table(places, config.head_size, config.rotary_base, x)
            options["rotation"] = tuple(y[:, None] for y in table)
        elif config.positions == "alibi":
            options["alibi_slopes"] = alibi_slopes(config.heads, x.device)
        elif isinstance(self.positions, RelativeBias):
            for cache in caches or ():
                cache.reserve(x.shape[1])
            S = x.shape[1] if caches is None else caches[0].capacity
            keys = torch.arange(S, device=x.device)
            options["bias"] = self.positions(keys[None] if caches is None else places, keys)
        return options


class PatchEmbedding(nn.Module):
    """Images as sequences: a class token, then patches row by row, each with its learned position
    (Dosovitskiy et al. 2021)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.patch_size is not None and config.image_size is not None
        size, self.side = config.patch_size, config.image_size // config.patch_size
        self.projection = nn.Conv2d(config.channels, config.dim, size, size)
        self.first = nn.Parameter(torch.empty(1, 1, config.dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.side**2, config.dim))

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width), multiples of the patch size, to (B, 1 + patches, dim).

        Sizes other than the configuration's interpolate the positions.
        """
        channels, size = self.projection.in_channels, self.projection.kernel_size[0]
        if images.dim() != 4 or images.shape[1] != channels or any(
            n % size or not n for n in images.shape[2:]
        ):  # fmt: skip
            raise ValueError(
                f"images must be (batch, {channels}, height, width) with multiples of {size}, got "
                f"{tuple(images.shape)}"
            )
        x = self.projection(images)
        positions = self._positions(x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(x), -1, -1), x], 1) + positions

    def _positions(self, height: int, width: int) -> Tensor:
        if (height, width) == (self.side, self.side):
            return self.positions
        grid = self.positions[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (height, width), mode="bicubic")
        return torch.cat([self.positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def _visible(mask: Mask) -> dict[str, Any]:
    """A mask as an option of attention."""
    if mask is None:
        return {}
    return {"key_lengths": mask} if mask.dim() == 1 else {"mask": mask[:, None, None]}
