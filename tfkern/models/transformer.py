"""A decoder-only transformer on the fused kernels.

    x = embedding(tokens) + positions
    h = 0
    for each block:
        h = h + x;  x = attention(norm1(h))
        h = h + x;  x = mlp(norm2(h))
    logits = head(norm(h + x))

This is the pre-norm transformer (Vaswani et al. 2017; Xiong et al. 2020), written so that each
addition to the residual stream h stands before a norm, not after a sublayer: both are one kernel.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.models.config import TransformerConfig
from tfkern.nn import MLP, GatedMLP, LayerNorm, RMSNorm
from tfkern.nn.rotary import rotary_table, rotate
from tfkern.ops import attention


class Transformer(nn.Module):
    """A decoder-only transformer. See `TransformerConfig` for its parts.

    Weights are drawn as in GPT-2: a normal distribution of deviation 0.02, divided by
    sqrt(2 layers) for the last weight of each sublayer, so that the residual stream does not grow
    with the depth. Biases start at 0.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_length, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = name.endswith(("attention.out.weight", "mlp.fc2.weight", "mlp.down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.layers) if last else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)  # the weight of a norm

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """The logits, or the loss if there are targets.

        Args:
            tokens: (B, T) int32 or int64, T up to max_length.
            targets: (B, T) int64, the token that follows each token; -100 where there is none.

        Returns:
            logits (B, T, vocab_size); with targets their cross entropy in nats, the mean over the
            targets, in float32 or wider.

        Raises:
            ValueError: shapes that do not fit.
        """
        config = self.config
        if tokens.dim() != 2 or tokens.shape[1] > config.max_length:
            raise ValueError(
                f"tokens must be (batch, length) with a length up to {config.max_length}, got "
                f"{tuple(tokens.shape)}"
            )
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}, expected {tuple(tokens.shape)}, the "
                "shape of tokens"
            )
        T = tokens.shape[1]
        x = self.embedding(tokens)
        rotation = None
        if config.positions == "learned":
            x = x + self.positions.weight[:T]
        else:
            rotation = rotary_table(T, config.head_dim, config.rotary_base, x)

        h = None
        for block in self.blocks:
            x, h = block(x, h, rotation)
        y = self.norm(x, residual=h, dropout_p=config.dropout)
        logits = F.linear(y, self.embedding.weight if config.tie_embeddings else self.head.weight)
        if targets is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues each row of tokens by count tokens, each drawn given the last max_length ones.

        Call eval() first if the model has dropout.

        Args:
            tokens: (B, T) with T >= 1.
            count: how many tokens to add.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: draw from the k most likely tokens only (Fan et al. 2018).
            generator: of the random numbers, on the device of the model.

        Returns:
            (B, T + count), beginning with tokens.

        Raises:
            ValueError: tokens without a first token, a negative temperature, or top_k below 1.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (batch, length >= 1), got {tuple(tokens.shape)}")
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be positive, got {top_k}")
        for _ in range(count):
            logits = self(tokens[:, -self.config.max_length :])[:, -1].float()
            if top_k is not None and top_k < logits.shape[-1]:
                least = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            if temperature == 0:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                p = (logits / temperature).softmax(-1)
                drawn = torch.multinomial(p, 1, generator=generator)
            tokens = torch.cat([tokens, drawn.to(tokens.dtype)], 1)
        return tokens


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm that adds the output of the one before."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, act, bias = config.dim, config.activation, config.bias
        self.norm1 = _norm(config)
        self.attention = CausalSelfAttention(config)
        self.norm2 = _norm(config)
        self.mlp: MLP | GatedMLP
        if config.gated:
            self.mlp = GatedMLP(dim, config.hidden_dim or -(-dim // 3) * 8, bias, act)
        else:
            self.mlp = MLP(dim, config.hidden_dim, bias, act)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, h: Tensor | None, rotation: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns the output of the last sublayer and the residual stream before it."""
        p = self.dropout
        y, h = self.norm1(x, residual=h, dropout_p=p, return_residual=True)
        y, h = self.norm2(
            self.attention(y, rotation), residual=h, dropout_p=p, return_residual=True
        )
        return self.mlp(y), h


class CausalSelfAttention(nn.Module):
    """Attention of each token to itself and those before, with grouped heads."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.dim, rows, config.bias)
        self.out = nn.Linear(config.dim, config.dim, config.bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, T, dim) to (B, T, dim); rotation as given by `rotary_table`."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return self.out(attention(q, k, v, causal=True).transpose(1, 2).flatten(-2))


def _norm(config: TransformerConfig) -> LayerNorm | RMSNorm:
    if config.norm == "rms_norm":
        return RMSNorm(config.dim, config.norm_eps)
    return LayerNorm(config.dim, config.norm_eps, bias=config.bias)
