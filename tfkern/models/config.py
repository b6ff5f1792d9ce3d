"""The configuration of a transformer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerConfig:
    """What defines a `Transformer`. The defaults are those of GPT-2 (Radford et al. 2019).

    Args:
        vocab_size: number of tokens.
        dim: size of the residual stream.
        layers: number of blocks.
        heads: query heads of each block; dim / heads is the head size.
        max_length: the longest sequence.
        kv_heads: key and value heads, a divisor of heads (Ainslie et al. 2023); heads if None.
        hidden_dim: of the MLP. If None 4 dim, or 8/3 dim rounded up to a multiple of 8 for a gated
            MLP, which then has as many weights (Shazeer 2020).
        norm: "layer_norm" or "rms_norm".
        norm_eps: added to the variance or the mean square.
        gated: whether the MLP is gated; "silu" is the usual activation then.
        activation: one of `tfkern.mlp`.
        positions: "learned", or "rotary" (Su et al. 2021).
        rotary_base: base of the wave lengths of rotary positions.
        dropout: probability after the embedding and after each sublayer, in training mode.
        tie_embeddings: whether the output head is the token embedding (Press, Wolf 2017).
        bias: whether linear layers and layer norms have one.

    Raises:
        ValueError: a number or name out of range, or numbers that do not fit together.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    max_length: int
    kv_heads: int | None = None
    hidden_dim: int | None = None
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    gated: bool = False
    activation: str = "gelu_tanh"
    positions: str = "learned"
    rotary_base: float = 10000.0
    dropout: float = 0.0
    tie_embeddings: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "layers", "heads", "max_length", "kv_heads", "hidden_dim")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, choices in (
            ("norm", ("layer_norm", "rms_norm")),
            ("positions", ("learned", "rotary")),
            ("activation", ("relu", "gelu", "gelu_tanh", "silu")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, got {self.head_dim}")
        if not self.rotary_base > 0:
            raise ValueError(f"rotary_base must be positive, got {self.rotary_base}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps must not be negative, got {self.norm_eps}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads
