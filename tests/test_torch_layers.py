"""Weights of torch.nn's transformer layers in blocks of ours, and back."""

import pytest
import torch
from torch import nn
from weights import perturb

from tfkern.integrations.torch_layers import from_torch, to_torch
from tfkern.models import Transformer, TransformerConfig, preset
from tfkern.models.blocks import Context

B, T, S, C, H = 2, 7, 9, 24, 3
OPTIONS = {"batch_first": True, "dtype": torch.float64, "dropout": 0.0}


def encoder_layer(**options):
    return perturb(nn.TransformerEncoderLayer(C, H, 40, **(OPTIONS | options)))


def decoder_layer(**options):
    return perturb(nn.TransformerDecoderLayer(C, H, 40, **(OPTIONS | options)))


def output(x, h):
    return x if h is None else x + h


def padding():
    lengths = torch.tensor([T, 4])
    return lengths, torch.arange(T) >= lengths[:, None]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("training", [False, True])
def test_encoder(norm_first, activation, training):
    """In eval without gradients, torch takes a fast path for which padding is 0."""
    layer = encoder_layer(norm_first=norm_first, activation=activation).train(training)
    block = from_torch(layer)
    x, (lengths, hidden) = torch.randn(B, T, C, dtype=torch.float64), padding()
    with torch.set_grad_enabled(training):
        expected = layer(x, src_key_padding_mask=hidden)
        for own in ({"key_lengths": lengths}, {"mask": ~hidden[:, None, None]}):
            result = output(*block(x, context=Context(own)))
            torch.testing.assert_close(result[~hidden], expected[~hidden], rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_decoder(norm_first, training):
    layer = decoder_layer(norm_first=norm_first).train(training)
    block = from_torch(layer)
    x, memory = (torch.randn(B, n, C, dtype=torch.float64) for n in (T, S))
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    lengths = torch.tensor([3, S])
    hidden = torch.arange(S) >= lengths[:, None]
    with torch.set_grad_enabled(training):
        expected = layer(x, memory, tgt_mask=causal, memory_key_padding_mask=hidden)
        result = output(
            *block(x, memory=memory, context=Context(cross_options={"key_lengths": lengths}))
        )
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [encoder_layer, decoder_layer])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_is_bit_equal(kind, bias):
    layer = kind(bias=bias, norm_first=True, activation="gelu", layer_norm_eps=1e-3, dropout=0.25)
    back = to_torch(from_torch(layer.eval()))
    state = back.state_dict()
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in layer.state_dict().items())
    assert back.norm_first and back.norm1.eps == 1e-3 and not back.training
    assert back.dropout1.p == back.self_attn.dropout == 0.25 and back.dropout.p == 0
    x = torch.randn(B, T, C, dtype=torch.float64)
    args = (x,) if kind is encoder_layer else (x, x)
    torch.testing.assert_close(back(*args), layer(*args))


def test_the_model_of_2017():
    """Six layers of `nn.Transformer` without its last norms, which the paper lacks; gradients."""
    theirs = nn.Transformer(C, H, 2, 2, 40, 0.0, batch_first=True, dtype=torch.float64)
    theirs.encoder.norm = theirs.decoder.norm = None
    perturb(theirs)
    config = preset(
        "transformer-base", dim=C, heads=H, layers=2, hidden_dim=40, vocab_size=11, dropout=0.0,
        head="none",
    )  # fmt: skip
    ours = Transformer(config).double()
    for stack, layers in (
        (ours.encoder, theirs.encoder.layers),
        (ours.decoder, theirs.decoder.layers),
    ):
        for block, layer in zip(stack.blocks, layers, strict=True):
            block.load_state_dict(from_torch(layer).state_dict())
    source, tokens = torch.randint(11, (B, S)), torch.randint(11, (B, T))
    place = torch.arange(S, dtype=torch.float64)[:, None]
    even = 10000.0 ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
    table = torch.zeros(S, C, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = (place * even).sin(), (place * even).cos()

    def embed(x):
        return nn.functional.embedding(x, ours.embedding.weight) * C**0.5 + table[: x.shape[1]]

    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    lengths = torch.tensor([S, 5])
    hidden = torch.arange(S) >= lengths[:, None]
    expected = theirs(
        embed(source), embed(tokens), tgt_mask=causal, src_key_padding_mask=hidden,
        memory_key_padding_mask=hidden,
    )  # fmt: skip
    result = ours(tokens, source=source, source_mask=lengths)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    a, b = (
        torch.autograd.grad(y.square().sum(), ours.embedding.weight) for y in (result, expected)
    )
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="activation must be ReLU, GELU or SiLU, got"):
        from_torch(encoder_layer(activation=torch.tanh))
    for options in ({"kdim": 5}, {"add_zero_attn": True}, {"add_bias_kv": True}):
        for make, name in ((encoder_layer, "self_attn"), (decoder_layer, "multihead_attn")):
            layer = make()
            setattr(layer, name, nn.MultiheadAttention(C, H, **options))
            with pytest.raises(ValueError, match="no key and value sizes of their own"):
                from_torch(layer)
    small = {"dim": C, "layers": 1, "heads": H, "vocab_size": 3, "positions": "none"}
    for changes, message in (
        ({"norm": "rms_norm"}, "layer norm, no gate and equal heads"),
        ({"gated": True}, "layer norm, no gate and equal heads"),
        ({"kv_heads": 1}, "layer norm, no gate and equal heads"),
        ({"window": 3}, "no window"),
        ({"attention_softcap": 3.0}, "no softcap"),
        ({"norm_place": "both"}, "no norm after a sublayer"),
        ({"norm_place": "after"}, "layer norm, no gate and equal heads"),
        ({"qkv_bias": False}, "biases everywhere or nowhere"),
        ({"out_bias": False}, "biases everywhere or nowhere"),
        ({"parallel": True}, "an MLP behind attention, not beside it"),
        ({"activation": "gelu_tanh"}, "this one has gelu_tanh"),
    ):
        model = Transformer(TransformerConfig(**small | {"activation": "gelu"} | changes))
        with pytest.raises(ValueError, match=message):
            to_torch(model.decoder.blocks[0])
