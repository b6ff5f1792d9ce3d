"""The layers in front of the first block: from tokens or images to vectors."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.models.config import TransformerConfig
from tfkern.nn import Linear


def rows(config: TransformerConfig) -> int:
    """Rows of the table of tokens: vocab_size, rounded up to a multiple of vocab_multiple."""
    assert config.vocab_size is not None
    return -(-config.vocab_size // config.vocab_multiple) * config.vocab_multiple


def length(config: TransformerConfig, tokens: Tensor) -> int:
    """The length of the sequences of tokens (B, T), or that images (B, channels, height, width)
    become: one class token and the patches."""
    if config.patch_size is None:
        return tokens.shape[1]
    height, width = (n // config.patch_size for n in tokens.shape[2:])
    return 1 + height * width


class TokenEmbedding(nn.Embedding):
    """A vector for each token. The head may use the same table.

    A scale is rounded to the dtype of the vectors: Gemma was trained in bfloat16 with 55.5 in place
    of sqrt(3072) = 55.43.
    """

    def __init__(self, config: TransformerConfig) -> None:
        untrained = None if config.pad_trained else config.pad_token
        size = config.embedding_size
        super().__init__(rows(config), size, untrained)
        self.widen = None if config.embedding_dim is None else Linear(size, config.dim, False)
        self.max_length = config.max_length
        self.scale = config.dim**0.5 if config.scale_embedding else 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to (B, T, dim)."""
        if tokens.dim() != 2 or tokens.shape[1] > (self.max_length or tokens.shape[1]):
            limit = f" with a length up to {self.max_length}" if self.max_length else ""
            raise ValueError(f"tokens must be (batch, length){limit}, got {tuple(tokens.shape)}")
        x = super().forward(tokens)
        x = x if self.widen is None else self.widen(x)
        return x if self.scale == 1 else x * x.new_full((), self.scale)


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
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + positions

    def _positions(self, height: int, width: int) -> Tensor:
        if (height, width) == (self.side, self.side):
            return self.positions
        grid = self.positions[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (height, width), mode="bicubic")
        return torch.cat([self.positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)
