"""The configuration of a transformer."""

import math
import sys
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin

from tfkern import files
from tfkern.nn import RotaryScaling
from tfkern.ops.mlp import ACTIVATIONS

_CHOICES = {
    "architecture": ("decoder", "encoder", "encoder_decoder"),
    "norm": (
        "layer_norm",
        "rms_norm",
        "zero_centered_rms_norm",
        "batch_norm",
        "weight_norm",
        "none",
    ),
    "norm_place": ("before", "after", "both"),
    "query_key_norm": ("none", "head", "all"),
    "activation": ACTIVATIONS,
    "positions": (
        "learned",
        "sinusoidal",
        "sinusoidal_halves",
        "relative",
        "rotary",
        "alibi",
        "none",
    ),
    "head": (
        "lm",
        "mlm",
        "pretraining",
        "next_sentence",
        "classification",
        "lm_classification",
        "token",
        "span",
        "choice",
        "none",
    ),
    "pooler_activation": ("tanh", "relu"),
    "init": ("gpt2", "normal", "truncated", "t5", "xavier"),
}
_SIZE = 2**31
_RANGES: dict[str, tuple[float, float]] = {  # what a number may be, and what it is below
    **dict.fromkeys(("dim", "head_dim", "kv_heads", "hidden_dim", "vocab_size"), (1, _SIZE)),
    **dict.fromkeys(
        ("embedding_dim", "vocab_multiple", "image_size", "patch_size", "channels"), (1, _SIZE)
    ),
    **dict.fromkeys(("max_length", "classes", "window"), (1, _SIZE)),
    **dict.fromkeys(("relative_buckets", "relative_distance"), (1, _SIZE)),
    **dict.fromkeys(("token_types", "position_offset"), (0, _SIZE)),
    **dict.fromkeys(("pad_token", "start_token", "end_token"), (0, _SIZE)),
    **dict.fromkeys(("forced_first", "forced_last"), (0, _SIZE)),
    **dict.fromkeys(("layers", "encoder_layers"), (1, 2**14)),
    "heads": (1, 2**20),
    **dict.fromkeys(("dropout", "attention_dropout", "embedding_dropout"), (0, 1)),
    "norm_eps": (0, math.inf),
    **dict.fromkeys(("rotary_base", "window_rotary_base"), (sys.float_info.min, math.inf)),
    "rotary_fraction": (sys.float_info.min, math.inf),
    **dict.fromkeys(("attention_softcap", "logit_softcap"), (1e-30, math.inf)),
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The definition of a `Transformer`. The defaults give GPT-2 (Radford et al. 2019).

    Shape:
        architecture: "decoder", "encoder" or "encoder_decoder".
        dim: size of the residual stream.
        layers: number of blocks; in an encoder-decoder, of the decoder.
        encoder_layers: number of blocks of the encoder in an encoder-decoder; layers if None.
        heads: query heads of each block.
        head_dim: size of a head; dim / heads if None.
        kv_heads: key and value heads, a divisor of heads (Ainslie et al. 2023); heads if None.
        hidden_dim: inner size of the MLP. If None 4 dim, or for a gated MLP 8/3 dim rounded up to a
            multiple of 8, which gives it as many weights (Shazeer 2020).

    Input, of tokens or of images:
        vocab_size: number of tokens.
        vocab_multiple: the embedding has rows for a multiple of this many tokens, which makes
            faster products. The added rows have no logits.
        embedding_dim: size of the vectors of tokens. If it is not None, a layer makes vectors of
            size dim of them, and one in front of the head the reverse, as in OPT.
        pad_token: the token that fills up short sequences.
        pad_trained: whether the embedding of pad_token is trained like all others, which it has to
            be where this token also has another use, as the first token of T5's decoder.
        start_token: the token with which a decoder begins to write.
        end_token: the token that ends what a decoder writes, or several of which any one does.
        forced_first, forced_last: tokens that a generated text begins with, behind a prompt of one
            token, and that it ends with if it becomes as long as it may.
        token_types: number of segments told apart, as in BERT.
        scale_embedding: whether embeddings are multiplied by sqrt(dim), rounded to their dtype
            (Vaswani et al. 2017).
        embedding_norm: whether a norm follows the embedding.
        image_size, patch_size, channels: instead of vocab_size, squares of pixels that are cut into
            square patches (Dosovitskiy et al. 2021).

    Positions:
        max_length: the longest sequence; needed by learned positions, no limit for others if None.
        positions: "learned"; "sinusoidal" (Vaswani et al. 2017: sines and cosines alternate) or
            "sinusoidal_halves" (tensor2tensor: the sines, then the cosines); "relative", a bias of
            the scores (Raffel et al. 2020); "rotary" (Su et al. 2021); "alibi" (Press et al. 2022);
            "none". Images have learned ones.
        position_offset: rows of the learned positions before the row of position 0; BART has 2.
        skip_pad: whether only tokens other than pad_token have positions. All of pad_token then
            have the row before that of position 0, which is not trained, as in RoBERTa.
        rotary_base: base of the wave lengths of rotary positions.
        rotary_fraction: share of the features of a head that is turned, the first of them.
        rotary_scaling: a `tfkern.nn.RotaryScaling` of these lengths, for longer texts.
        window_rotary_base: base in the blocks that have the window, without scaling; if None as in
            the others.
        relative_buckets, relative_distance: for relative positions, the number of kinds of distance
            and the distance from which on all are of the last kind.

    Blocks:
        norm: "layer_norm", "rms_norm", "zero_centered_rms_norm" whose weights are stored less 1 as
            in Gemma, "batch_norm" over the tokens, "weight_norm" of the linear layers (Salimans,
            Kingma 2016) in place of norms, or "none".
        norm_eps: added to the variance or the mean square.
        post_norm: the norm follows the residual addition (Vaswani et al. 2017), rather than stand
            before each sublayer and at the end (Xiong et al. 2020).
        parallel: whether the MLP reads the same stream as attention, each through its own norm,
            rather than what attention made of it (Wang, Komatsuzaki 2021).
        norm_place: without post_norm, whether a norm stands "before" each sublayer, "after" it and
            in front of the addition as in OLMo 2, or "both" as in Gemma 2.
        query_key_norm: an RMS norm of queries and keys, in front of their rotation: of each "head"
            as in Qwen3, of "all" heads together as in OLMo 2, or "none".
        gated: whether the MLP is gated; "silu" is the usual activation then.
        wide_output: whether the last layer of each MLP, and with it the residual stream, is float32
            in a model of float16. That of T5 is larger than float16 can hold.
        activation: one of `tfkern.mlp`.
        window: tokens that self-attention of a decoder sees, the token itself among them; all that
            come before it if None.
        windowed: whether a block has the window, for one block after the other. The last is
            followed by the first again, so that (True, False) means every second one. All have it
            if None.
        attention_softcap: bound c of the scores: a score s becomes c tanh(s / c) (Gemma Team 2024).
        attention_scale: factor of the scores; head_dim^-0.5 if None, 1 in T5.
        bias: whether linear layers and layer norms have a bias.
        qkv_bias: whether the layers that make queries, keys and values have one; bias if None.
        out_bias: whether the layers behind attention have one; bias if None.
        dropout: probability after each sublayer, in training mode.
        embedding_dropout: probability after the embedding, in training mode; dropout if None.
        attention_dropout: probability for the weights of attention, in training mode.

    Output:
        head: "lm" (the next token), "mlm" (the masked tokens, with BERT's transform),
            "pretraining" (mlm and next_sentence), "next_sentence", "classification" of the
            sequence or the image, "lm_classification" (lm and classification, as for GPT-1: Radford
            et al. 2018), "token" (a class for each), "span" (its first and last token), "choice"
            (the best of several sequences) or "none" (hidden states).
        classes: number of classes of the heads "classification", "lm_classification" and "token".
        pooler: whether heads for the whole sequence have a dense layer in front.
        pooler_activation: "tanh" or "relu", behind the dense layer.
        classifier_bias: whether the layer that chooses among classes has a bias.
        tie_embeddings: whether the head is the token embedding (Press, Wolf 2017).
        logit_scale: factor of the logits; dim^-0.5 in T5.
        logit_softcap: bound of the logits of tokens, as attention_softcap is of scores.
        logit_bias: whether an lm head has a constant bias, as in BART's files.

    Weights:
        int8: whether the weights of linear layers are int8, as `tfkern.models.quantize` makes them.
        init: "gpt2": deviation 0.02, and 0.02 / sqrt(2 layers) for the last weight of a sublayer;
            "normal": 0.02 (BERT, GPT-1, BART); "truncated": the same, cut off at two deviations
            (ViT); "t5": by fan in; "xavier": uniform by both fans (Vaswani et al. 2017).

    Raises:
        ValueError: a value of another type, a number or name out of range, or values that do not
            fit together.
    """

    dim: int
    layers: int
    heads: int
    architecture: str = "decoder"
    encoder_layers: int | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    hidden_dim: int | None = None
    vocab_size: int | None = None
    vocab_multiple: int = 1
    embedding_dim: int | None = None
    pad_token: int | None = None
    pad_trained: bool = False
    start_token: int | None = None
    end_token: int | tuple[int, ...] | None = None
    forced_first: int | None = None
    forced_last: int | None = None
    token_types: int = 0
    scale_embedding: bool = False
    embedding_norm: bool = False
    image_size: int | None = None
    patch_size: int | None = None
    channels: int = 3
    max_length: int | None = None
    positions: str = "learned"
    position_offset: int = 0
    skip_pad: bool = False
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    rotary_scaling: RotaryScaling | None = None
    window_rotary_base: float | None = None
    relative_buckets: int = 32
    relative_distance: int = 128
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    post_norm: bool = False
    parallel: bool = False
    norm_place: str = "before"
    query_key_norm: str = "none"
    gated: bool = False
    wide_output: bool = False
    activation: str = "gelu_tanh"
    window: int | None = None
    windowed: tuple[bool, ...] | None = None
    attention_softcap: float | None = None
    attention_scale: float | None = None
    bias: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    head: str = "lm"
    classes: int | None = None
    pooler: bool = False
    pooler_activation: str = "tanh"
    classifier_bias: bool = True
    tie_embeddings: bool = True
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    logit_bias: bool = False
    int8: bool = False
    init: str = "gpt2"

    def __post_init__(self) -> None:
        if isinstance(self.rotary_scaling, dict):  # as JSON has it
            object.__setattr__(self, "rotary_scaling", _scaling(self.rotary_scaling))
        for field in fields(self):
            check_field(field.name, getattr(self, field.name))
        for name in ("end_token", "windowed"):
            if isinstance(value := getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        self._check_input()
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        self._check_norms()
        self._check_windows()
        self._check_rotary()
        if self.parallel and (self.post_norm or self.architecture == "encoder_decoder"):
            raise ValueError("parallel is for a model with one stack, and without post_norm")
        if self.positions.startswith("sinusoidal") and self.dim % 2:
            raise ValueError(f"sinusoidal positions need an even dim, got {self.dim}")
        if self.head in ("classification", "lm_classification", "token") and self.classes is None:
            raise ValueError(f"head {self.head!r} needs classes")
        if self.head == "choice" and self.architecture != "encoder":
            raise ValueError("head 'choice' needs architecture 'encoder'")
        if self.head in ("pretraining", "next_sentence") and not self.pooler:
            raise ValueError(f"head {self.head!r} needs pooler=True")

    def _check_numbers(self) -> None:
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise ValueError(
                f"relative_buckets must be a multiple of 4, got {self.relative_buckets}"
            )
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_distance must exceed half of relative_buckets, {self.relative_buckets}, "
                f"got {self.relative_distance}"
            )
        size = self.vocab_size or 0
        names = ("pad_token", "start_token", "forced_first", "forced_last")
        tokens = [(name, getattr(self, name)) for name in names]
        tokens += [("end_token", end) for end in self.end_tokens]
        for name, token in tokens:
            if token is not None and not 0 <= token < size:
                raise ValueError(f"{name} must lie in [0, vocab_size = {size}), got {token}")

    def _check_rotary(self) -> None:
        if self.positions != "rotary":
            for name, default in (("rotary_fraction", 1), ("rotary_scaling", None)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} is for rotary positions, not {self.positions}")
            return
        if self.rotary_fraction == 1 and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, got {self.head_size}")
        if self.rotary_fraction > 1 or self.rotary_size % 2 or not self.rotary_size:
            raise ValueError(
                "rotary_fraction must give an even number of features of a head of "
                f"{self.head_size}, got {self.rotary_fraction}"
            )
        scaling = self.rotary_scaling
        if scaling is None:
            return
        if scaling.short and 2 * len(scaling.short) != self.rotary_size:
            raise ValueError(
                f"rotary_scaling must have {self.rotary_size // 2} numbers short and long, got "
                f"{len(scaling.short)}"
            )
        if scaling.kind == "yarn" and self.rotary_base <= 1:
            raise ValueError(f"yarn needs a rotary_base above 1, got {self.rotary_base}")

    def _check_norms(self) -> None:
        if self.int8 and self.norm == "weight_norm":
            raise ValueError("int8 weights cannot be written as length and direction (weight_norm)")
        if self.post_norm and self.norm_place != "before":
            raise ValueError(f"post_norm has no norm_place, got {self.norm_place!r}")
        if self.wide_output and (
            self.norm_place == "after" or self.norm in ("none", "weight_norm")
        ):
            raise ValueError("wide_output needs a norm before each sublayer, which narrows again")
        if self.query_key_norm != "none" and not self.norm.endswith("rms_norm"):
            raise ValueError(f"query_key_norm needs norm 'rms_norm', got {self.norm!r}")

    def _check_windows(self) -> None:
        if self.window is not None and self.architecture == "encoder":
            raise ValueError("window is for self-attention of a decoder, and this is an encoder")
        for name in ("windowed", "window_rotary_base"):
            if getattr(self, name) is not None and self.window is None:
                raise ValueError(f"{name} needs a window")
        if self.windowed == ():
            raise ValueError("windowed must have one entry at least")
        if self.window_rotary_base is not None and self.positions != "rotary":
            raise ValueError(f"window_rotary_base needs rotary positions, not {self.positions!r}")

    def _check_input(self) -> None:
        if self.patch_size is not None:
            if self.vocab_size is not None or self.architecture != "encoder":
                raise ValueError("patch_size needs architecture 'encoder' and no vocab_size")
            if self.image_size is None or self.image_size % self.patch_size:
                raise ValueError(
                    f"image_size must be a multiple of patch_size, got {self.image_size} and "
                    f"{self.patch_size}"
                )
            if self.embedding_dim is not None:
                raise ValueError("embedding_dim is for tokens, and this model has images")
            if self.positions != "learned":
                raise ValueError(f"images have learned positions, not {self.positions!r}")
            if self.head not in ("classification", "token", "span", "none"):
                raise ValueError(f"head {self.head!r} needs tokens, and this model has images")
            return
        if self.vocab_size is None:
            raise ValueError("vocab_size (for tokens) or patch_size (for images) is needed")
        if self.embedding_dim is not None and self.architecture != "decoder":
            raise ValueError(f"embedding_dim needs architecture 'decoder', not {self.architecture}")
        if self.embedding_dim is not None and (self.pooler or self.head in ("mlm", "pretraining")):
            raise ValueError(
                "embedding_dim goes neither with a pooler nor with head 'mlm' or 'pretraining'"
            )
        if self.positions == "learned" and self.max_length is None:
            raise ValueError("learned positions need max_length")
        learned = self.positions == "learned" and self.position_offset > 0
        if self.skip_pad and (
            self.architecture != "encoder" or self.pad_token is None or not learned
        ):
            raise ValueError(
                "skip_pad needs an encoder with pad_token, learned positions and a position_offset"
            )

    @property
    def embedding_size(self) -> int:
        """The size of the vectors of tokens, and of those that go into the head."""
        return self.dim if self.embedding_dim is None else self.embedding_dim

    @property
    def qkv_biased(self) -> bool:
        """Whether the layers that make queries, keys and values have a bias."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def out_biased(self) -> bool:
        """Whether the layers behind attention have a bias."""
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def embedding_drop(self) -> float:
        """The probability of dropout after the embedding."""
        return self.dropout if self.embedding_dropout is None else self.embedding_dropout

    @property
    def rotary_size(self) -> int:
        """How many features of a head are turned."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens of end_token, of which there may be none."""
        if self.end_token is None:
            return ()
        return (self.end_token,) if isinstance(self.end_token, int) else self.end_token

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each block of a decoder."""
        windowed = self.windowed or (True,)
        return tuple(self.window if windowed[i % len(windowed)] else None
                     for i in range(self.layers))  # fmt: skip

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.heads

    @property
    def score_scale(self) -> float:
        """The factor of the scores."""
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def hidden_size(self) -> int:
        return self.hidden_dim or (-(-self.dim // 3) * 8 if self.gated else 4 * self.dim)


def _scaling(told: dict[str, Any]) -> RotaryScaling:
    try:
        return RotaryScaling(**told)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rotary_scaling: {error}, in {files.shown(told)}") from None


_TYPES: dict[str, Any] = {field.name: field.type for field in fields(TransformerConfig)}


def check_field(name: str, value: Any) -> None:
    """Checks the type and the range of the value of one field, without looking at other fields.

    Raises:
        ValueError: `TransformerConfig` cannot have it.
    """
    kind = _TYPES[name]
    _check(name, value, get_args(kind) or (kind,))


def _check(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    kind = _TYPES[name]
    several = [get_args(k)[:1] for k in kinds if get_origin(k) is tuple]
    if isinstance(value, (list, tuple)) and several:
        for item in value:
            _check(name, item, several[0])
        return
    kinds = tuple(k for k in kinds if get_origin(k) is not tuple)
    kinds = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        named = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(f"{name} must be {named}, got {files.shown(value)}")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(
            f"{name} must be one of {', '.join(_CHOICES[name])}, got {files.shown(value)}"
        )
    if value is None or isinstance(value, (bool, str, RotaryScaling)):
        return
    least, limit = _RANGES.get(name, (-math.inf, math.inf))
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {files.shown(value)}")
    if value < least or value >= limit:
        what = f"lie in [0, {limit})" if limit == 1 else f"be less than {limit}"
        if value < least and limit != 1:
            what = "be positive" if least > 0 else "not be negative"
        raise ValueError(f"{name} must {what}, got {files.shown(value)}")
