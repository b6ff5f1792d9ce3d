"""Modules against their namesakes in torch.nn: parameters, outputs, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from adornments import ADORNMENTS
from torch.func import functional_call

import tfkern
import tfkern.nn.attention
from tfkern import nn
from tfkern.ops import OPS
from tfkern.testing import validate

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["default", "reference", "native"])
def forced(request):
    """The backends of the device's order, and each that runs all ops on this machine."""
    name = None if request.param == "default" else request.param
    if name and any(tfkern.backends(op)[name] for op in OPS):
        pytest.skip(f"{name} does not run all ops here")
    with tfkern.use_backend(name):
        yield


def pair(kind, *args, **options):
    """Our module and torch's with the same random weights, loaded strictly in both directions."""
    ours, theirs = (getattr(module, kind)(*args, **options) for module in (nn, torch.nn))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert not any(ours.load_state_dict(theirs.state_dict()))
    assert not any(theirs.load_state_dict(ours.state_dict()))
    return ours, theirs


def compare(ours, theirs, modules, inputs):
    """Outputs of two functions of inputs; gradients of inputs and of the parameters of modules."""
    results = []
    for function, module in zip((ours, theirs), modules, strict=True):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = [outputs] if torch.is_tensor(outputs) else [o for o in outputs if o is not None]
        torch.manual_seed(3)
        # not randn_like, which draws in the order of the memory
        loss = sum((o * torch.randn(o.shape, dtype=o.dtype)).sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def check(ours, theirs, dtype, inputs, rows, **options):
    """The error limits of `validate` for a call of both modules, with gradients of parameters."""
    parameters = dict(theirs.named_parameters())

    def run(module):
        def function(**tensors):
            own = {name: tensors.pop(name) for name in parameters}
            output = functional_call(module, own, tuple(tensors.values()), options)
            return output if torch.is_tensor(output) else output[0]

        return function

    tensors = {name: x.to(dtype) for name, x in {**inputs, **parameters}.items()}
    scale = dict.fromkeys(parameters, math.sqrt(rows))
    validate(run(ours), run(theirs), tensors, floor_scale=scale).check()


@pytest.mark.parametrize(
    ("kind", "args", "options"),
    [
        ("LayerNorm", (6,), {}),
        ("LayerNorm", ((5, 6),), {"bias": False}),
        ("LayerNorm", (6,), {"elementwise_affine": False}),
        ("RMSNorm", (6,), {"dtype": torch.float64}),
        ("RMSNorm", ([5, 6],), {"elementwise_affine": False}),
        ("MultiheadAttention", (6, 2), {}),
        ("MultiheadAttention", (6, 2), {"bias": False, "add_bias_kv": True}),
        ("MultiheadAttention", (6, 3), {"kdim": 4, "vdim": 5, "dtype": torch.float64}),
    ],
)
def test_same_initialisation_and_state(kind, args, options):
    states = []
    for module in (nn, torch.nn):
        torch.manual_seed(1)
        states.append(getattr(module, kind)(*args, **options).state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter) and ours[name].dtype == parameter.dtype


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
class TestNorm:
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
    def test_matches_torch(self, kind, shape, affine):
        ours, theirs = pair(kind, shape, elementwise_affine=affine, dtype=torch.float64)
        x = torch.randn(2, 5, *shape, dtype=torch.float64)
        compare(ours, theirs, (ours, theirs), [x])
        strided = x.transpose(0, -1).contiguous().transpose(0, -1)
        assert torch.equal(ours(strided), ours(x))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_error_limits(self, kind, shape, dtype):
        check(*pair(kind, shape), dtype, {"x": torch.randn(2, 5, *shape)}, rows=10)

    def test_adds_residual(self, kind, shape):
        ours, theirs = pair(kind, shape, dtype=torch.float64)
        x, residual = torch.randn(2, 2, 5, *shape, dtype=torch.float64)
        compare(
            lambda x, residual: ours(x, residual=residual, return_residual=True),
            lambda x, residual: (theirs(residual + x), residual + x),
            (ours, theirs),
            [x, residual],
        )
        assert torch.equal(ours(x, residual=residual), ours(x + residual))
        y, h = ours(x, return_residual=True)
        assert torch.equal(y, ours(x)) and torch.equal(h, x)

    def test_drops_in_training_only(self, kind, shape):
        norm = getattr(nn, kind)(shape)
        x, residual = torch.randn(2, 400, *shape)
        _, h = norm(x, residual=residual, dropout_p=0.25, return_residual=True)
        kept = (h - residual).abs() > 1e-6
        torch.testing.assert_close((h - residual)[kept], x[kept] / 0.75, atol=1e-5, rtol=1e-5)
        assert 0.7 < kept.float().mean() < 0.8
        _, h = norm.eval()(x, residual=residual, dropout_p=0.25, return_residual=True)
        assert torch.equal(h, x + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_with_weights_stored_less_1(dtype):
    """It is the plain norm at first, and multiplies by a sum that has no rounding to bfloat16."""
    ours = nn.ZeroCenteredRMSNorm(7, eps=1e-6).to(dtype)
    x = torch.randn(3, 5, 7).to(dtype).requires_grad_()
    assert not ours.weight.any()
    assert torch.equal(ours(x), nn.RMSNorm(7, eps=1e-6).to(dtype)(x))
    torch.nn.init.normal_(ours.weight, std=0.01)
    wide, weight = (t.detach().double().requires_grad_() for t in (x, ours.weight))
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight)
    result, dy = ours(x), torch.randn(3, 5, 7).to(dtype)
    assert result.dtype == dtype
    eps = torch.finfo(dtype).eps
    once = max(0.505 * eps, 4 * torch.finfo(torch.float32).eps)  # rounded once, at the end
    torch.testing.assert_close(result.double(), expected, rtol=once, atol=0)
    grads = torch.autograd.grad(result, (x, ours.weight), dy)
    for g, e in zip(grads, torch.autograd.grad(expected, (wide, weight), dy.double()), strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=8 * eps, atol=8 * eps)
    plain = nn.ZeroCenteredRMSNorm(7, elementwise_affine=False)
    assert not list(plain.parameters()) and torch.equal(
        plain(x.float()), nn.RMSNorm(7, elementwise_affine=False)(x.float())
    )


def test_norm_errors():
    norm = nn.LayerNorm((3, 4))
    with pytest.raises(ValueError, match="input has shape .* expected its last axes to be"):
        norm(torch.randn(5, 4))
    with pytest.raises(ValueError, match="residual has shape"):
        norm(torch.randn(2, 3, 4), residual=torch.randn(3, 4))
    with pytest.raises(ValueError, match="dropout_p"):
        norm(torch.randn(2, 3, 4), dropout_p=2.0)


B, T, S, E, H = 3, 5, 7, 12, 2
LENGTHS = torch.tensor([7, 4, 1])
PADDING = torch.arange(S) >= LENGTHS[:, None]
# key 0 is always seen: torch gives NaN otherwise
MASK = torch.arange(T)[:, None] * torch.arange(S) % 3 == 1
HEADS_MASK = (torch.arange(B * H)[:, None, None] + MASK.long()) * torch.arange(S) % 4 == 3
SLOPES = -0.3 * (torch.arange(T)[:, None] - torch.arange(S)).abs().double()

MASKS = {
    "no mask": {},
    "padding": {"key_padding_mask": PADDING},
    "additive padding": {"key_padding_mask": SLOPES[:B]},
    "mask": {"attn_mask": MASK},
    "mask of each head": {"attn_mask": HEADS_MASK},
    "additive mask": {"attn_mask": SLOPES},
    "both": {"attn_mask": MASK, "key_padding_mask": PADDING},
    "both, additive": {"attn_mask": SLOPES, "key_padding_mask": SLOPES[-B:]},
}
MODULES = {
    "time first": {},
    "batch first": {"batch_first": True},
    "bias_kv": {"bias": False, "add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "other sizes": {"kdim": 4, "vdim": 9, "add_bias_kv": True, "add_zero_attn": True},
}


def attention_pair(**options):
    return pair("MultiheadAttention", E, H, dtype=torch.float64, **options)


def attention_inputs(kdim=E, vdim=E, batch_first=False, **options):
    shapes = ((B, T, E), (B, S, kdim), (B, S, vdim))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return inputs if batch_first else [x.transpose(0, 1).contiguous() for x in inputs]


class TestMultiheadAttention:
    @pytest.mark.parametrize("masks", MASKS)
    @pytest.mark.parametrize("options", MODULES)
    def test_matches_torch(self, options, masks):
        masks, options = MASKS[masks], MODULES[options]
        ours, theirs = attention_pair(**options)
        inputs = attention_inputs(**options)
        for extra in (
            {},
            {"average_attn_weights": False},
            {"need_weights": False},
        ):
            compare(
                lambda *x, extra=extra: ours(*x, **masks, **extra),
                lambda *x, extra=extra: theirs(*x, **masks, **extra),
                (ours, theirs),
                inputs,
            )

    @pytest.mark.usefixtures("forced")
    @pytest.mark.parametrize("options", MODULES)
    def test_fused_matches_torch(self, options):
        ours, theirs = attention_pair(**MODULES[options])
        compare(
            lambda *x: ours(*x, need_weights=False),
            lambda *x: theirs(*x, need_weights=False),
            (ours, theirs),
            attention_inputs(**MODULES[options]),
        )

    @pytest.mark.parametrize("masks", MASKS)
    @pytest.mark.parametrize("need_weights", [True, False])
    def test_without_batch(self, masks, need_weights):
        ours, theirs = attention_pair(add_bias_kv=True)
        masks = dict(MASKS[masks], need_weights=need_weights)
        if "key_padding_mask" in masks:
            masks["key_padding_mask"] = masks["key_padding_mask"][1]
        if masks.get("attn_mask") is HEADS_MASK:
            masks["attn_mask"] = HEADS_MASK[:H]
        inputs = [x[:, 0] for x in attention_inputs()]
        compare(
            lambda *x: ours(*x, **masks), lambda *x: theirs(*x, **masks), (ours, theirs), inputs
        )

    def test_inference(self):
        """There torch runs another implementation of its own."""
        ours, theirs = attention_pair(batch_first=True)
        x = torch.randn(B, S, E, dtype=torch.float64)
        with torch.no_grad():
            for masks in ({}, {"key_padding_mask": PADDING}):
                got, expected = (m.eval()(x, x, x, **masks) for m in (ours, theirs))
                torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)

    @pytest.mark.usefixtures("forced")
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("options", ["batch first", "bias_kv", "zero_attn"])
    @pytest.mark.parametrize("keys", [T, S, 2])
    def test_causal(self, keys, options, need_weights):
        ours, theirs = attention_pair(**MODULES[options])
        query, *rest = attention_inputs(batch_first=ours.batch_first)
        inputs = [query, *(x.narrow(int(ours.batch_first), 0, keys) for x in rest)]
        mask = torch.ones(T, keys, dtype=torch.bool).triu(1)
        for given in (None, mask):
            compare(
                lambda *x, given=given: ours(
                    *x, is_causal=True, attn_mask=given, need_weights=need_weights
                ),
                lambda *x: theirs(*x, attn_mask=mask, need_weights=need_weights),
                (ours, theirs),
                inputs,
            )

    @pytest.mark.usefixtures("forced")
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("options", ["batch first", "other sizes"])
    @pytest.mark.parametrize("padding", [PADDING, SLOPES[:B]], ids=["bool", "additive"])
    def test_causal_padding(self, padding, options, need_weights):
        """T < S, so that causality cuts keys off, and with them their padding."""
        ours, theirs = attention_pair(**MODULES[options])
        mask = torch.ones(T, S, dtype=torch.bool).triu(1)
        if padding.dtype != torch.bool:  # torch wants one type for both
            mask = torch.zeros_like(mask, dtype=padding.dtype).masked_fill(mask, -torch.inf)
        compare(
            lambda *x: ours(*x, padding, need_weights, is_causal=True),
            lambda *x: theirs(*x, padding, need_weights, mask),
            (ours, theirs),
            attention_inputs(**MODULES[options]),
        )

    @pytest.mark.usefixtures("forced")
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("options", ["time first", "batch first", "bias_kv"])
    def test_key_lengths(self, options, need_weights):
        ours, theirs = attention_pair(**MODULES[options])
        compare(
            lambda *x: ours(*x, key_lengths=LENGTHS, need_weights=need_weights),
            lambda *x: theirs(*x, key_padding_mask=PADDING, need_weights=need_weights),
            (ours, theirs),
            attention_inputs(**MODULES[options]),
        )

    @pytest.mark.usefixtures("forced")
    @pytest.mark.parametrize("need_weights", [True, False])
    def test_causal_key_lengths(self, need_weights):
        """Queries beyond the length are padding, too: there torch differs."""
        ours, theirs = attention_pair(batch_first=True)
        mask = torch.ones(S, S, dtype=torch.bool).triu(1)
        padded = PADDING[..., None]
        options = {"is_causal": True, "key_lengths": LENGTHS, "need_weights": need_weights}

        def plain(x):
            output, weights = theirs(x, x, x, PADDING, need_weights, mask)
            output = torch.where(padded, theirs.out_proj.bias, output)
            return output, torch.where(padded, 0, weights) if need_weights else None

        x = torch.randn(B, S, E, dtype=torch.float64)
        compare(lambda x: ours(x, x, x, **options), plain, (ours, theirs), [x])

    @pytest.mark.usefixtures("forced")
    def test_padding_may_be_nan(self):
        ours, _ = attention_pair(batch_first=True)
        x = torch.randn(B, S, E, dtype=torch.float64)
        expected, _ = ours(x[:, :T], x, x, key_lengths=LENGTHS, need_weights=False)
        x = x.masked_fill(PADDING[..., None], torch.nan)
        query = x[:, :T].nan_to_num()
        got, _ = ours(query, x, x, key_lengths=LENGTHS, need_weights=False)
        assert not got.isnan().any()
        seen = ~PADDING[:, :T]
        torch.testing.assert_close(got[seen], expected[seen])

    @pytest.mark.usefixtures("forced")
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("by", ["key_lengths", "key_padding_mask", "attn_mask"])
    def test_no_visible_key(self, by, need_weights):
        ours, _ = attention_pair(batch_first=True)
        hidden = {
            "key_lengths": torch.tensor([S, 0, S]),
            "key_padding_mask": torch.tensor([[False], [True], [False]]).expand(B, S),
            "attn_mask": (torch.arange(B * H) // H == 1)[:, None, None].expand(-1, T, S),
        }
        inputs = [x.requires_grad_() for x in attention_inputs(batch_first=True)]
        output, weights = ours(*inputs, need_weights=need_weights, **{by: hidden[by]})
        assert torch.equal(output[1], ours.out_proj.bias.expand(T, E))
        if need_weights:
            assert torch.equal(weights[1], torch.zeros(T, S))
        for grad in torch.autograd.grad(output.sum(), [*inputs, ours.in_proj_weight]):
            assert grad.isfinite().all()

    @pytest.mark.usefixtures("forced")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("need_weights", [True, False])
    def test_error_limits(self, dtype, need_weights):
        ours, theirs = pair("MultiheadAttention", 32, 2, batch_first=True)
        inputs = {name: torch.randn(2, 67, 32) for name in ("query", "key", "value")}
        check(ours, theirs, dtype, inputs, rows=134, need_weights=need_weights)

    @pytest.mark.usefixtures("forced")
    def test_autocast(self):
        ours = nn.MultiheadAttention(32, 2)
        theirs = torch.nn.MultiheadAttention(32, 2)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(9, 2, 32)
        for need_weights in (True, False):
            with torch.autocast("cpu", torch.bfloat16):
                a, b = (m(x, x, x, need_weights=need_weights)[0] for m in (ours, theirs))
            assert a.dtype == b.dtype == torch.bfloat16
            torch.testing.assert_close(a, b, atol=0.01, rtol=0.01)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_inside_torch_transformer(norm_first):
    """torch.nn.Transformer with its attention and norms replaced by ours."""

    def make():
        torch.manual_seed(4)
        return torch.nn.Transformer(
            E, H, 2, 2, 16, 0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
        )

    ours, theirs = make(), make()
    for module in ours.modules():
        if type(module) in (torch.nn.MultiheadAttention, torch.nn.LayerNorm):
            module.__class__ = getattr(nn, type(module).__name__)  # ours have no further state
    options = {
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
        "tgt_mask": torch.ones(T, T, dtype=torch.bool).triu(1),
        "tgt_is_causal": True,
    }
    inputs = [torch.randn(B, length, E, dtype=torch.float64) for length in (S, T)]
    compare(
        lambda *x: ours(*x, **options), lambda *x: theirs(*x, **options), (ours, theirs), inputs
    )
    with torch.no_grad():
        got, expected = (m.eval()(*inputs, **options) for m in (ours, theirs))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_masks_stay_as_small_as_they_are(monkeypatch, masks, need_weights):
    """Every call runs the fused op, and none with a mask or bias for all of (B, H, T, S)."""
    calls = []
    original = tfkern.nn.attention.attention
    monkeypatch.setattr(
        tfkern.nn.attention, "attention", lambda *a, **kw: calls.append(kw) or original(*a, **kw)
    )
    query, key, value = attention_inputs(batch_first=True)
    module = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    module(query, key, value, need_weights=need_weights, **MASKS[masks])
    (call,) = calls
    given = sum(x.numel() for x in MASKS[masks].values())
    used = sum(x.numel() for x in (call["mask"], call["bias"]) if x is not None)
    assert used == (B * T * S if masks == "both, additive" else given)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("options", ["batch first", "other sizes"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_additive_masks_have_gradients(options, need_weights):
    ours, theirs = attention_pair(**MODULES[options])
    inputs = attention_inputs(**MODULES[options])
    masks = [torch.randn(shape, dtype=torch.float64) for shape in ((B * H, T, S), (T, S), (B, S))]
    for attn_mask in masks[:2]:

        def call(module, *x):
            return module(*inputs, x[1], need_weights, x[0])

        compare(
            lambda *x: call(ours, *x),
            lambda *x: call(theirs, *x),
            (ours, theirs),
            [attn_mask, masks[2]],
        )


def test_masks_of_other_dtypes():
    """bfloat16 beside float32 is read as it is; float64, which no op of float32 takes, is cast."""
    ours, theirs = pair("MultiheadAttention", E, H)
    inputs = [x.float() for x in attention_inputs()]
    for mask in (SLOPES, SLOPES.bfloat16()):
        got, expected = (
            m(*inputs, attn_mask=x)[0] for m, x in ((ours, mask), (theirs, mask.float()))
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout(need_weights):
    """With an identity for value and out_proj the output is the dropped weights themselves."""
    S, p = 64, 0.25
    module = nn.MultiheadAttention(S, 1, dropout=p, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        module.in_proj_weight[2 * S :] = torch.eye(S)
        module.out_proj.weight.copy_(torch.eye(S))
    query, value = torch.randn(2, 40, S).double(), torch.eye(S).double().expand(2, S, S)
    key = torch.randn(2, S, S).double()

    def run():
        return module(query, key, value, need_weights=need_weights)

    torch.manual_seed(1)
    dropped, returned = run()
    weights = module.eval()(query, key, value)[1]
    torch.testing.assert_close(module(query, key, value, need_weights=False)[0], run()[0])
    torch.testing.assert_close(run()[0], weights, atol=1e-12, rtol=1e-12)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - p), atol=1e-12, rtol=1e-12)
    assert 1 - p - 0.02 < kept.double().mean() < 1 - p + 0.02
    if need_weights:  # those before dropout
        torch.testing.assert_close(returned, weights, atol=1e-12, rtol=1e-12)
    module.train()
    assert not torch.allclose(run()[0], dropped)
    torch.manual_seed(1)
    torch.testing.assert_close(run()[0], dropped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": torch.randn(T, B, E + 1)}, "query has shape"),
        ({"query": torch.randn(T, E)}, "key has shape"),
        ({"query": torch.randn(T, 1, E)}, "batch sizes, those of axis 1"),
        ({"value": torch.randn(S + 1, B, E)}, "key has shape .* and value"),
        ({"attn_mask": torch.zeros(T, T)}, "attn_mask has shape"),
        ({"attn_mask": torch.zeros(B, T, S)}, "attn_mask has shape"),
        ({"attn_mask": torch.zeros(T, S, dtype=torch.int64)}, "attn_mask must be bool"),
        ({"key_padding_mask": torch.zeros(S, B)}, "key_padding_mask has shape"),
        ({"key_lengths": torch.ones(B)}, "key_lengths must be"),
        ({"key_lengths": torch.ones(B + 1, dtype=torch.int64)}, "key_lengths must be"),
        ({"key_lengths": LENGTHS, "key_padding_mask": PADDING}, "exclude each other"),
        ({"key_lengths": LENGTHS, "is_causal": True}, "as many queries as keys"),
    ],
)
def test_attention_errors(arguments, message):
    query, key, value = (x.float() for x in attention_inputs())
    with pytest.raises(ValueError, match=message):
        nn.MultiheadAttention(E, H)(**{"query": query, "key": key, "value": value, **arguments})


class PlainMLP(torch.nn.Module):
    """Computes what `MLP` and `GatedMLP` compute, with modules of the same names."""

    def __init__(self, module, activation, gated):
        super().__init__()
        self.gated, self.activation = gated, activation
        for name, child in module.named_children():
            setattr(self, name, child)

    def forward(self, x):
        act = {
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "gelu": F.gelu,
            "relu": F.relu,
            "silu": F.silu,
            "quick_gelu": lambda x: F.silu(1.702 * x) / 1.702,
        }[self.activation]
        if not self.gated:
            return self.fc2(act(self.fc1(x)))
        return self.down(act(self.gate(x)) * self.up(x))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu", "quick_gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_mlp(gated, bias, activation):
    kind = nn.GatedMLP if gated else nn.MLP
    module = kind(8, 20, bias=bias, activation=activation)
    plain = PlainMLP(module, activation, gated)
    x = torch.randn(2, 5, 8)
    for dtype in DTYPES:
        check(module, plain, dtype, {"x": x}, rows=10)
    module.double()
    compare(module, plain, (module, plain), [x.double()])


def test_mlp_parameters():
    def shapes(module):
        return {name: tuple(p.shape) for name, p in module.named_parameters()}

    assert shapes(nn.MLP(6)) == {
        "fc1.weight": (24, 6),
        "fc1.bias": (24,),
        "fc2.weight": (6, 24),
        "fc2.bias": (6,),
    }
    assert shapes(nn.MLP(6, 10, bias=False)) == {"fc1.weight": (10, 6), "fc2.weight": (6, 10)}
    assert shapes(nn.GatedMLP(6, 10)) == {
        "gate.weight": (10, 6), "up.weight": (10, 6), "down.weight": (6, 10)
    }  # fmt: skip
    assert nn.GatedMLP(6, 10, bias=True, dtype=torch.float64).down.bias.dtype == torch.float64
    with pytest.raises(ValueError, match="activation"):
        nn.MLP(6, activation="tanh")(torch.randn(2, 6))


PARENTS = {
    "fc1": lambda: nn.MLP(E, 10, activation="silu").double(),
    "fc2": lambda: nn.MLP(E, 10, activation="silu").double(),
    "gate": lambda: nn.GatedMLP(E, 10, bias=True).double(),
    "up": lambda: nn.GatedMLP(E, 10, bias=True).double(),
    "down": lambda: nn.GatedMLP(E, 10, bias=True).double(),
    "out_proj": lambda: attention_pair(batch_first=True)[0],
}


def call(module, x):
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x, need_weights=False)[0]
    return module(x)


def called_one_by_one(module):
    """The same function with a call of each child."""
    if not isinstance(module, nn.MultiheadAttention):
        return PlainMLP(module, "silu", isinstance(module, nn.GatedMLP))
    heads = attention_pair(batch_first=True)[1]  # torch's, which ends with the heads side by side
    heads.in_proj_weight, heads.in_proj_bias = module.in_proj_weight, module.in_proj_bias
    torch.nn.init.eye_(heads.out_proj.weight)
    torch.nn.init.zeros_(heads.out_proj.bias)
    return lambda x: module.out_proj(heads(x, x, x, need_weights=False)[0])


def adorned(name, adornment):
    module = PARENTS[name]()
    ADORNMENTS[adornment](module, name)
    return module.eval()  # where spectral norm stays as it is


@pytest.mark.parametrize("adornment", ADORNMENTS)
@pytest.mark.parametrize("name", PARENTS)
def test_children_with_more_than_a_weight(name, adornment):
    """Twice, since some hold what was computed in the first call."""
    module = adorned(name, adornment)
    plain = called_one_by_one(module)
    x = torch.randn(2, 5, E, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        results = []
        for y in (call(module, x), plain(x)):
            leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PARENTS)
def test_hooks_of_children_are_called_once(name, monkeypatch):
    """Hooks of one module and of all modules run; without hooks the layers are not called."""
    module, calls = PARENTS[name](), []
    child = getattr(module, name)
    x = torch.randn(2, 5, E, dtype=torch.float64, requires_grad=True)
    note = lambda m, *_: calls.append(m)  # noqa: E731
    kinds = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")
    for kind in kinds:
        for register in (
            getattr(child, f"register_{kind}"),
            getattr(torch.nn.modules.module, f"register_module_{kind}"),
        ):
            handle = register(note)
            call(module, x).sum().backward()
            handle.remove()
            assert calls.count(child) == 1
            calls.clear()
    monkeypatch.setattr(torch.nn.Linear, "__call__", None)
    call(module, x)


@pytest.mark.parametrize("adornment", ["forward hook", "adapter", "quantised"])
@pytest.mark.parametrize("name", PARENTS)
def test_children_are_called_when_traced(name, adornment):
    torch._dynamo.reset()
    module = adorned(name, adornment)
    x = torch.randn(2, 5, E, dtype=torch.float64)
    expected = called_one_by_one(module)(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, x, x)[0] if name == "out_proj" else compiled(x), expected
    )
    args = (x, x, x) if name == "out_proj" else (x,)
    exported = torch.export.export(module, args).module()(*args)
    torch.testing.assert_close(exported[0] if name == "out_proj" else exported, expected)


def test_repr_names_the_options():
    assert "activation=silu" in repr(nn.GatedMLP(6, 10))
    assert "activation=relu" in repr(nn.MLP(6, activation="relu"))
    assert "embed_dim=12, num_heads=2, batch_first=True" in repr(
        nn.MultiheadAttention(12, 2, batch_first=True)
    )
    assert "(3, 4), eps=1e-05" in repr(nn.LayerNorm((3, 4)))


def test_compiles_without_graph_breaks():
    x = torch.randn(B, T, E)

    def run(norm, attention, mlp, gated, lengths, x):
        y, h = norm(x, residual=x, return_residual=True)
        y = attention(y, y, y, need_weights=False, key_lengths=lengths, is_causal=True)[0]
        y = attention(y, y, y, need_weights=True)[0]
        return gated(mlp(y)) + h

    modules = (
        nn.LayerNorm(E),
        nn.MultiheadAttention(E, H, batch_first=True),
        nn.MLP(E),
        nn.GatedMLP(E, 16),
    )
    lengths = torch.tensor([5, 2, 1])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*modules, lengths, x), run(*modules, lengths, x))
