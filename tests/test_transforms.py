"""Every op and module under torch.func, torch.compile, torch.jit.trace and torch.export, against
plain torch in float64. What has no derivative raises: none is 0 or None without a word."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import tfkern
import tfkern.nn
from tfkern.models import Transformer, TransformerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

CU = torch.tensor([0, 2, 5], dtype=torch.int32)


def attention(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def documents(q, k, v):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    parts = [attention(*(x[:, a:b] for x in (q, k, v))) for a, b in ((0, 2), (2, 5))]
    return torch.cat(parts, 1).transpose(0, 1)


def gated(x, gate, up, w2):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), w2)


TARGETS = torch.tensor([[1, 7, -100], [0, 2, 5]])


def classes_of(x, w=None):
    return F.cross_entropy((x if w is None else F.linear(x, w)).flatten(0, 1), TARGETS.flatten())


ANGLES = torch.arange(20.0).view(5, 4).repeat_interleave(2, -1)


def turned(q, k, cos, sin):
    other = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
    return torch.cat([x * cos + y * sin for x, y in zip((q, k), other, strict=True)], 1)


OPS = {  # ours, torch's, the shapes of the arguments
    "attention": (tfkern.attention, attention, [(1, 2, 5, 8)] * 3),
    "attention_varlen": (
        lambda q, k, v, **kw: tfkern.attention_varlen(q, k, v, CU, CU, **kw),
        documents,
        [(5, 2, 8)] * 3,
    ),
    "cross_entropy": (
        lambda x, **kw: tfkern.cross_entropy(x, TARGETS, **kw),
        classes_of,
        [(2, 3, 8)],
    ),
    "linear_cross_entropy": (
        lambda x, w, **kw: tfkern.linear_cross_entropy(x, w, TARGETS, **kw),
        classes_of,
        [(2, 3, 5), (8, 5)],
    ),
    "layer_norm": (
        lambda x, r, w, b, **kw: tfkern.layer_norm(x, w, b, residual=r, **kw),
        lambda x, r, w, b: F.layer_norm(x + r, (8,), w, b),
        [(2, 3, 8), (2, 3, 8), (8,), (8,)],
    ),
    "rms_norm": (
        lambda x, w, **kw: tfkern.rms_norm(x, w, eps=1e-6, **kw),
        lambda x, w: F.rms_norm(x, (8,), w, 1e-6),
        [(2, 3, 8), (8,)],
    ),
    "mlp": (
        lambda x, w1, b1, w2, **kw: tfkern.mlp(x, w1, b1, w2, None, activation="gelu", **kw),
        lambda x, w1, b1, w2: F.linear(F.gelu(F.linear(x, w1, b1)), w2),
        [(2, 3, 8), (16, 8), (16,), (8, 16)],
    ),
    "gated_mlp": (
        lambda x, gate, up, w2, **kw: tfkern.gated_mlp(x, gate, None, up, None, w2, None, **kw),
        gated,
        [(2, 3, 8), (16, 8), (16, 8), (8, 16)],
    ),
    "rotary": (
        lambda q, k, **kw: torch.cat(
            tfkern.rotary(q, k, ANGLES.cos(), ANGLES.sin(), interleaved=True, **kw), 1
        ),
        lambda q, k: turned(q, k, ANGLES.double().cos(), ANGLES.double().sin()),
        [(1, 2, 5, 8), (1, 1, 5, 8)],
    ),
}
BACKENDS = [(op, backend) for op in OPS for backend in ("native", "triton", "reference")]


def pair(op, chosen):
    ours, theirs, shapes = OPS[op]
    kernel = {"attention_varlen": "attention", "rms_norm": "layer_norm", "gated_mlp": "mlp"}
    kernel |= {"linear_cross_entropy": "cross_entropy"}
    if reason := tfkern.backends(kernel.get(op, op))[chosen]:
        pytest.skip(reason)
    torch._dynamo.reset()
    return lambda *a: ours(*a, backend=chosen), theirs, [torch.randn(s) / 2 for s in shapes]


def scalar(f):
    return lambda *a: f(*a).float().sin().sum()


def every(args):
    return tuple(range(len(args)))


def batch(args):
    return [torch.stack([x, 2 * x]) for x in args]


def jacobian(f, a):
    return jacrev(lambda *a: f(*a).sum(-1).flatten(), 0)(*a)


def through_vmap(f, a):
    """The backward runs outside of the transform, where a wrapped tensor hides what it requires."""
    a = [x.detach().requires_grad_() for x in batch(a)]
    return torch.autograd.grad(vmap(f)(*a).float().sin().sum(), a)


RIGHT = {
    "grad": lambda f, a: grad(scalar(f), every(a))(*a),
    "vjp": lambda f, a: vjp(scalar(f), *a)[1](torch.ones(())),
    "jacrev": jacobian,
    "vmap": lambda f, a: vmap(f)(*batch(a)),
    "vmap of vmap": lambda f, a: vmap(vmap(f))(*batch(batch(a))),
    "vmap of grad": lambda f, a: vmap(grad(scalar(f), every(a)))(*batch(a)),
    "grad of vmap": lambda f, a: grad(lambda *b: vmap(scalar(f))(*b).sum(), every(a))(*batch(a)),
    "grad through vmap": through_vmap,
}


def forward_mode(f, a):
    with forward_ad.dual_level():
        y = f(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in a))
        return forward_ad.unpack_dual(y).tangent


def second(f, a):
    return grad(lambda *b: sum(g.sin().sum() for g in grad(scalar(f), every(a))(*b)))(*a)


def second_outside(f, a):
    """The first derivative by a transform, the second by autograd."""
    a = [x.detach().requires_grad_() for x in a]
    first = grad(scalar(f))(*a)
    return torch.autograd.grad(first.sin().sum() + sum(x.sum() for x in a), a)


REFUSED = {
    "jvp": lambda f, a: jvp(f, tuple(a), tuple(torch.ones_like(x) for x in a))[1],
    "dual numbers": forward_mode,
    "jacfwd": lambda f, a: jacfwd(lambda *b: f(*b).sum(-1).flatten(), 0)(*a),
    "hessian": lambda f, a: hessian(scalar(f), 0)(*a),
    "second derivative": second,
    "second derivative outside": second_outside,
}


def same(got, expected, **limits):
    limits = limits or {"rtol": 1e-3, "atol": 1e-4}
    got, expected = (torch.utils._pytree.tree_leaves(x) for x in (got, expected))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **limits)


@pytest.mark.parametrize("transform", RIGHT)
@pytest.mark.parametrize("op, chosen", BACKENDS)
def test_transforms(op, chosen, transform):
    ours, theirs, args = pair(op, chosen)
    same(RIGHT[transform](ours, args), RIGHT[transform](theirs, [x.double() for x in args]))


FIRST_ORDER = [(op, chosen) for op, chosen in BACKENDS if op != "rotary"]


@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("chosen", ["native", "triton", "reference"])
def test_linear_ops_have_all_derivatives(chosen, transform):
    ours, theirs, args = pair("rotary", chosen)
    same(REFUSED[transform](ours, args), REFUSED[transform](theirs, [x.double() for x in args]))


@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("op, chosen", FIRST_ORDER)
def test_what_has_no_derivative_raises(op, chosen, transform):
    ours, _, args = pair(op, chosen)
    with pytest.raises(NotImplementedError):
        REFUSED[transform](ours, args)


COMPILED = [(op, b) for op, b in BACKENDS if b == "native"] + [("layer_norm", "reference")]
if torch.cuda.is_available():  # Dynamo cannot trace the interpreter of Triton
    COMPILED.append(("layer_norm", "triton"))
KERNELS = [c for c in COMPILED if c[1] != "reference"]


def compiled(run, fullgraph=False):
    return torch.compile(run, backend="aot_eager", fullgraph=fullgraph)


@pytest.mark.parametrize("transform", RIGHT)
@pytest.mark.parametrize("op, chosen", COMPILED)
def test_compiled_transforms(op, chosen, transform):
    ours, theirs, args = pair(op, chosen)
    expected = RIGHT[transform](theirs, [x.double() for x in args])
    same(compiled(lambda *a: RIGHT[transform](ours, a))(*args), expected)
    try:
        result = compiled(lambda *a: RIGHT[transform](ours, a), fullgraph=True)(*args)
    except torch._dynamo.exc.Unsupported:
        return  # for want of a graph break
    same(result, expected)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("op, chosen", KERNELS)
def test_compiled_transforms_raise_where_eager_mode_does(op, chosen, transform, fullgraph):
    ours, theirs, args = pair(op, chosen)
    if op == "rotary":  # raises, or leaves the transform to eager mode
        try:
            result = compiled(lambda *a: REFUSED[transform](ours, a), fullgraph)(*args)
        except (NotImplementedError, torch._dynamo.exc.Unsupported):
            return
        same(result, REFUSED[transform](theirs, [x.double() for x in args]))
        return
    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported)):
        compiled(lambda *a: REFUSED[transform](ours, a), fullgraph)(*args)


@pytest.mark.parametrize("op, chosen", COMPILED)
def test_dual_numbers_of_a_compiled_function(op, chosen):
    ours, theirs, args = pair(op, chosen)
    if op == "rotary":  # Dynamo leaves the call to eager mode
        expected = forward_mode(theirs, [x.double() for x in args])
        return same(forward_mode(compiled(ours), args), expected)
    with pytest.raises(NotImplementedError):
        forward_mode(compiled(ours), args)


@pytest.mark.parametrize("op", ["layer_norm", "attention", "mlp_activation", "rotary"])
def test_kernels_refuse_to_be_differentiated_in_traces(op):
    """Whatever calls an operator without the function that differentiates it."""
    pytest.importorskip("tfkern._C", reason="no native build")
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    call = {
        "layer_norm": lambda x: torch.ops.tfkern.layer_norm_forward(
            x[0, 0], None, None, None, None, 0.0, 1e-5, False, 1
        )[0],
        "attention": lambda x: torch.ops.tfkern.attention_forward(
            x, x.clone(), x.clone(), *[None] * 12, 1.0, 0.0, 0.0
        )[0],
        "mlp_activation": lambda x: torch.ops.tfkern.mlp_activation_forward(x[0, 0], None, "relu"),
        "rotary": lambda x: torch.ops.tfkern.rotary(
            x, None, x[:, 0].detach(), x[:, 1].detach(), False, False
        )[0],
    }[op]
    torch._dynamo.reset()
    run = compiled(call, fullgraph=True)
    with pytest.raises(Exception, match="has no derivative here"):
        run(x)
    torch.testing.assert_close(run(x.detach()), call(x.detach()))


@pytest.fixture
def widened(monkeypatch):
    """tfkern.linear takes its own way on every processor."""
    native = pytest.importorskip("tfkern.native.linear", reason="no native build")
    monkeypatch.setattr(native, "why_not", lambda *a, needs_grad: None)


SECOND = {"second": second, "jvp": REFUSED["jvp"], "jacfwd": REFUSED["jacfwd"]}


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("transform", RIGHT | SECOND)
def test_linear(widened, transform, compiler):
    """Torch's function has derivatives of every order."""
    torch._dynamo.reset()
    run = (RIGHT | SECOND)[transform]
    args = [torch.randn(s).bfloat16() for s in ((150, 8), (6, 8), (6,))]
    fn = lambda *a: run(tfkern.linear, a)  # noqa: E731
    fn = fn if compiler is None else compiled(fn)
    got = torch.utils._pytree.tree_leaves(fn(*args))
    expected = torch.utils._pytree.tree_leaves(run(F.linear, [x.double() for x in args]))
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= 0.05 * b.norm()


def test_functional_call_has_gradients_for_each_sample():
    """The gradients of DP-SGD: of a module's parameters, for each row of a batch."""
    module = nn.Sequential(tfkern.nn.LayerNorm(8), tfkern.nn.MLP(8), tfkern.nn.RMSNorm(8))
    parameters = dict(module.named_parameters())
    x = torch.randn(4, 3, 8)

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().sum()

    ours = vmap(grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        same([ours[name][i] for name in parameters], expected)


def test_alibi_slopes_with_a_gradient_are_refused_under_vmap():
    q, slopes = torch.randn(2, 1, 2, 3, 8), torch.rand(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="alibi_slopes has no gradient"):
        vmap(lambda q, a: tfkern.attention(q, q, q, alibi_slopes=a))(q, slopes)


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x, residual=2 * x, return_residual=True)


class Multihead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.attention = tfkern.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        o, weights = self.attention(x, x, x, **self.options)
        return o if weights is None else (o, weights)


class Call(nn.Module):
    """A module of a function of x (2, T, 8)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def heads(x):
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def attend(**options):
    return Call(lambda x: tfkern.attention(heads(x), heads(x), heads(x), **options))


@pytest.mark.parametrize("chosen", ["native", "reference"])
def test_gradients_of_each_sample_with_targets_of_its_own(chosen):
    """The targets' values are not at hand, although vmap is not their outermost wrapper."""
    x, w, targets = torch.randn(4, 3, 5), torch.randn(8, 5), torch.randint(8, (4, 3))

    def ours(w, x, t):
        return tfkern.linear_cross_entropy(x, w, t, backend=chosen) + tfkern.cross_entropy(
            F.linear(x, w), t, backend=chosen
        )

    def theirs(w, x, t):
        return 2 * F.cross_entropy(F.linear(x, w), t)

    got = vmap(grad(ours), (None, 0, 0))(w, x, targets)
    same(got, torch.stack([grad(theirs)(w, *sample) for sample in zip(x, targets, strict=True)]))


MODULES = {
    "attention": lambda: attend(),
    "attention causal": lambda: attend(causal=True, return_lse=True),
    "attention window": lambda: attend(causal=True, window=(2, None), softcap=5.0),
    "attention lengths": lambda: attend(causal=True, key_lengths=torch.tensor([2, 4])),
    "attention dropout": lambda: attend(dropout_p=0.3, seed=5),
    "attention scale of a size": lambda: Call(
        lambda x: tfkern.attention(heads(x), heads(x), heads(x), scale=1 / x.shape[-1])
    ),
    "attention bias": lambda: Call(
        lambda x: tfkern.attention(
            heads(x),
            heads(x),
            heads(x),
            bias=x.new_ones(x.shape[1], x.shape[1]).tril(),
            sink=x.new_ones(2),
            alibi_slopes=x.new_ones(2),
        )
    ),
    "scaled_dot_product_attention": lambda: Call(
        lambda x: tfkern.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    ),
    "layer_norm": lambda: tfkern.nn.LayerNorm(8),
    "layer_norm residual": lambda: Residual(tfkern.nn.LayerNorm(8)),
    "rms_norm residual": lambda: Residual(tfkern.nn.RMSNorm(8)),
    "layer_norm dropout": lambda: Call(lambda x: tfkern.layer_norm(x, dropout_p=0.2, seed=3)),
    "mlp": lambda: tfkern.nn.MLP(8),
    "gated_mlp": lambda: tfkern.nn.GatedMLP(8, 16),
    "linear": lambda: tfkern.nn.Linear(8, 4),
    "rotary": lambda: Call(lambda x: tfkern.rotary(heads(x), None, *[x.detach()[0, :, :2]] * 2)[0]),
    "multihead attention": lambda: Multihead(),
    "multihead attention causal": lambda: Multihead(is_causal=True, need_weights=False),
    "pad": lambda: Call(
        lambda x: tfkern.pad(
            x.flatten(0, 1), torch.arange(x.shape[0] * x.shape[1]), x.shape[0], x.shape[1]
        )
    ),
}


@pytest.mark.parametrize("chosen", ["native", "reference"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_jit_trace(name, chosen, gradients):
    """The traced function at its own length and at another one."""
    module = MODULES[name]()
    with tfkern.use_backend(chosen), torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(module, torch.randn(2, 5, 8), check_trace=False)
        for T in (5, 9):
            x = torch.randn(2, T, 8, requires_grad=gradients)
            ours, expected = traced(x), module(x)
            same(ours, expected)
            if gradients:
                ours, expected = (y[0] if isinstance(y, tuple) else y for y in (ours, expected))
                same(
                    torch.autograd.grad(ours.sin().sum(), x),
                    torch.autograd.grad(expected.sin().sum(), x),
                )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_export(name, strict):
    torch._dynamo.reset()
    module = MODULES[name]()
    shapes = ({1: torch.export.Dim("T", min=2, max=64)},)
    program = torch.export.export(
        module, (torch.randn(2, 6, 8),), dynamic_shapes=shapes, strict=strict
    )
    for length in (6, 11):
        x = torch.randn(2, length, 8)
        same(program.module()(x), module(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_window_and_a_seed_made_of_sizes(strict):
    torch._dynamo.reset()
    module = Call(
        lambda x: tfkern.attention(
            heads(x),
            heads(x),
            heads(x),
            window=(x.shape[1] - 2, x.shape[1] // 2),
            dropout_p=0.5,
            seed=x.shape[1],
        )
    )
    shapes = ({1: torch.export.Dim("T", min=2, max=64)},)
    program = torch.export.export(
        module, (torch.randn(2, 6, 8),), dynamic_shapes=shapes, strict=strict
    )
    for length in (6, 11):
        x = torch.randn(2, length, 8)
        same(program.module()(x), module(x))


@pytest.mark.parametrize("positions", ["rotary", "alibi", "relative"])
def test_export_of_a_model(positions):
    torch._dynamo.reset()
    config = TransformerConfig(vocab_size=50, dim=16, layers=2, heads=2, positions=positions)
    model = Transformer(config).eval()
    shapes = {"tokens": {1: torch.export.Dim("T", min=2, max=64)}}
    program = torch.export.export(model, (torch.randint(50, (2, 6)),), dynamic_shapes=shapes)
    for length in (6, 11):
        tokens = torch.randint(50, (2, length))
        same(program.module()(tokens), model(tokens))


PAGES = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
LENGTHS = torch.tensor([5, 7], dtype=torch.int32)
CU_OF_TWO = torch.tensor([0, 1, 2], dtype=torch.int32)
MAKES_TENSORS = {  # calls that need tensors beside their arguments
    "paged": lambda x, **kw: tfkern.attention(
        x.detach(), *[x.detach().view(4, 1, 6, 8)[:, :, :4]] * 2,
        page_table=PAGES, key_lengths=LENGTHS, causal=True, **kw,
    ),
    "window": lambda x, **kw: tfkern.attention(x, x, x, window=(1, 2), **kw),
    "dropout": lambda x, **kw: tfkern.attention(x, x, x, dropout_p=0.5, seed=7, **kw),
    "scores": lambda x, **kw: tfkern.attention(
        x, x, x, bias=x @ x.mT, alibi_slopes=x[0, :, 0, 0].detach(), sink=x[0, :, 0, 1],
        softcap=2.0, query_lengths=LENGTHS - 2, key_lengths=LENGTHS - 1, **kw,
    ),
    "varlen": lambda x, **kw: tfkern.attention_varlen(
        x[0], x[0], x[0], CU_OF_TWO, CU_OF_TWO, causal=True, dropout_p=0.5, seed=7, **kw
    ),
    "layer_norm": lambda x, **kw: tfkern.layer_norm(x, residual=x, dropout_p=0.5, seed=7, **kw),
    "rms_norm": lambda x, **kw: tfkern.rms_norm(x, **kw),
    "mlp": lambda x, **kw: tfkern.mlp(x, x[0, 0], None, x[0, 0].mT, None, **kw),
    "rotary": lambda x, **kw: tfkern.rotary(x, None, x.detach()[0], x.detach()[0], **kw)[0],
}  # fmt: skip


@pytest.mark.parametrize("chosen", ["native", "triton", "reference"])
@pytest.mark.parametrize("name", MAKES_TENSORS)
def test_the_default_device_does_not_matter(name, chosen):
    """It says where users build their models, and nothing about the arguments of a call."""
    if reason := tfkern.backends("attention")[chosen]:
        pytest.skip(reason)
    x = torch.randn(2, 2, 6, 8, requires_grad=True)
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            y = MAKES_TENSORS[name](x, backend=chosen)
            gradients = torch.autograd.grad(y.sin().sum(), x) if y.requires_grad else ()
            results.append((y, *gradients))
    same(*results)


@pytest.mark.parametrize("kind", ["jagged", "strided", "sparse"])
@pytest.mark.parametrize("op", OPS)
def test_tensors_that_are_not_dense_are_refused(op, kind):
    """Each argument is refused in its turn, and the error has its name."""
    ours, _, shapes = OPS[op]
    dense = [torch.randn(s) for s in shapes]
    for i, x in enumerate(dense):
        if kind == "sparse":
            other = x.to_sparse()
        else:
            layout = torch.jagged if kind == "jagged" else torch.strided
            other = torch.nested.nested_tensor([torch.randn(n, 8) for n in (2, 3)], layout=layout)
        with pytest.raises(ValueError, match=r"^\w+ (is a nested|must be a dense) tensor"):
            ours(*dense[:i], other, *dense[i + 1 :])
