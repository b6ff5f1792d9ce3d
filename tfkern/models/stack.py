"""The blocks of an encoder or a decoder, with what precedes and follows them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tfkern.models.blocks import Block, Context, KeysValues, add_and_norm, norm
from tfkern.models.config import TransformerConfig
from tfkern.models.positions import RelativeBias, alibi_slopes, sinusoids
from tfkern.nn import KVCache
from tfkern.nn.batch_norm import drop_and_add
from tfkern.nn.context_parallel import SequenceSplit
from tfkern.nn.rotary import rotary_table
from tfkern.ops.packing import cu_seqlens, same_document

Mask = Tensor | None


class Stack(nn.Module):
    """Blocks with what precedes and follows them: positions, segments, norms.

    In a stage of a pipeline, the blocks of other stages are None, and the norm is None except in
    the last stage. The modules that are left keep their names.

    Attributes:
        split: how sequences are split over processes, None if they are whole here.
    """

    split: SequenceSplit | None = None

    def __init__(
        self, config: TransformerConfig, layers: int, causal: bool, cross: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.positions: nn.Module | None = None
        if config.positions == "learned" and config.patch_size is None:
            assert config.max_length is not None
            offset = config.position_offset
            padding = offset - 1 if config.skip_pad else None
            self.positions = nn.Embedding(config.max_length + offset, config.dim, padding)
        elif config.positions == "relative":
            buckets, furthest = config.relative_buckets, config.relative_distance
            self.positions = RelativeBias(config.heads, causal, buckets, furthest)
        self.token_types = (
            nn.Embedding(config.token_types, config.dim) if config.token_types else None
        )
        self.embedding_norm = norm(config) if config.embedding_norm else None
        windows = config.windows if causal else (None,) * layers
        self.blocks = nn.ModuleList(Block(config, causal, cross, window) for window in windows)
        self.norm = None if config.post_norm else norm(config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        embedded: bool = True,
        mask: Mask = None,
        token_types: Tensor | None = None,
        memory: Tensor | Sequence[KeysValues] | None = None,
        memory_mask: Mask = None,
        caches: Sequence[KVCache] | None = None,
        documents: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """(B, T, dim) to (B, T, dim), with the arguments of `Transformer`.

        Args:
            x: embedded tokens; if not `embedded`, what the previous stage of a pipeline returned.
                T is that of `positions`, never the length of x: where the stream is spread over
                devices, x is only a part. With `split`, T is that of this process, and so are
                all arguments except for lengths (B,).
            positions: (B or 1, T) int64, of the tokens.

        Returns:
            The hidden states, or the residual stream from a stage without the norm.
        """
        config = self.config
        if token_types is not None and not config.token_types:
            raise ValueError("this model has no segments to tell apart, and takes no token_types")
        if mask is not None and mask.dim() == 2 and caches is not None:
            raise ValueError("with caches a mask must be lengths (B,)")
        if caches is not None and self.split is not None:
            raise ValueError("there are no caches of sequences that are split over processes")
        dropout_p = config.dropout if self.training else 0.0
        context = self._context(x, positions, mask, memory_mask, caches, documents)
        if embedded:
            x = self._add_positions(x, positions, token_types)
            if self.embedding_norm is not None:
                x = self.embedding_norm(x, **context.norm_options)
            x = F.dropout(x, config.embedding_drop, self.training)
        h = None
        for i, block in enumerate(self.blocks):
            if block is None:
                continue
            inputs = (
                x,
                h,
                context,
                memory if memory is None or isinstance(memory, Tensor) else memory[i],
                None if caches is None else caches[i],
            )
            if recompute and torch.is_grad_enabled():
                x, h = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, h = block(*inputs)
        if self.norm is not None:
            return add_and_norm(self.norm, x, h, dropout_p, **context.norm_options)
        return x if h is None else drop_and_add(x, h, dropout_p, True)

    def _add_positions(self, x: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        """Adds the vectors of the positions and of the segments."""
        config = self.config
        if config.positions.startswith("sinusoidal"):
            halves = config.positions == "sinusoidal_halves"
            x = x + sinusoids(positions, config.dim, halves).to(x.dtype)
        elif config.positions == "learned" and self.positions is not None:
            x = x + self.positions(positions + config.position_offset)
        if self.token_types is not None:
            kinds = torch.zeros_like(positions) if token_types is None else token_types
            x = x + self.token_types(kinds)
        return x

    def _context(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Mask,
        memory_mask: Mask,
        caches: Sequence[KVCache] | None,
        documents: Tensor | None,
    ) -> Context:
        """The arguments that all blocks share. x tells only the dtype and the device."""
        config, steps = self.config, torch.arange(positions.shape[1], device=x.device)
        options = self._visible(mask)
        if mask is not None and mask.dim() == 1:
            options["query_lengths"] = mask
        window_options: dict[str, Any] = {}
        if config.positions == "rotary":
            options["rotation"] = rotary_table(
                positions, config.rotary_size, config.rotary_base, x, config.rotary_scaling
            )
            if (base := config.window_rotary_base) is not None:
                window_options["rotation"] = rotary_table(positions, config.rotary_size, base, x)
        elif config.positions == "alibi":
            options["alibi_slopes"] = alibi_slopes(config.heads, x.device)
        elif isinstance(self.positions, RelativeBias):
            for cache in caches or ():
                cache.reserve(positions.shape[1])
            if self.split is not None:
                S = positions.shape[1] * self.split.ranks
                positions = self.split.positions(S, device=x.device)[None]
            elif caches is None:
                S, positions = positions.shape[1], steps[None]
            else:
                S = caches[0].capacity
            options["bias"] = self.positions(positions, torch.arange(S, device=x.device))
        if documents is not None and self.split is not None:
            options["documents"] = self.split.gather(documents, 1)
        elif documents is not None:
            # attention_varlen takes no bias, and a trace cannot depend on the number of documents.
            if "bias" in options or torch.compiler.is_compiling():
                options["mask"] = same_document(documents)
            else:
                options["cu_seqlens"] = cu_seqlens(documents)
        norm_options = {}
        if config.norm == "batch_norm" and mask is not None:
            norm_options["mask"] = mask if mask.dim() == 2 else steps < mask[:, None]
        return Context(options, window_options, self._visible(memory_mask), norm_options)

    def _visible(self, mask: Mask) -> dict[str, Any]:
        """A mask of keys as an option of attention."""
        if mask is None:
            return {}
        if mask.dim() == 1:
            return {"key_lengths": mask}
        if self.split is not None:
            mask = self.split.gather(mask, 1)
        return {"mask": mask[:, None, None]}
