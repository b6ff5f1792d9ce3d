"""`hf.patch` is right or absent: modules that only look like a known form, what is hung on modules
before and after, copies, and whole models of many families."""

import copy
import pickle
import subprocess
import sys
import warnings

import families
import pytest
import torch
from adornments import ADORNMENTS
from huggingface import transformers
from torch import nn
from torch.nn import functional as F

from tfkern.integrations import hf
from tfkern.integrations.hf import layers, norms, rotation, wholes

pytestmark = pytest.mark.usefixtures("one_thread", "every_size")
hf.register()

D, H = 6, 10


def close(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            limit = 1e-5 * y.abs().max().item() + 1e-12
            torch.testing.assert_close(x, y, rtol=1e-5, atol=limit)


def values(module, *inputs, seed=0):
    """The result and all gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    y = module(*inputs)
    own = module.parameters() if isinstance(module, nn.Module) else ()
    parameters = [p for p in own if p.requires_grad]
    return y, *torch.autograd.grad(y.sin().sum(), inputs + parameters, allow_unused=True)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Mlp(nn.Module):
    """Names of children that tell nothing."""

    def __init__(self, act=nn.SiLU, gated=True, bias=True):
        super().__init__()
        self.a, self.b = nn.Linear(D, H, bias=bias), nn.Linear(D, H, bias=bias)
        self.c, self.f, self.d = nn.Linear(H, D, bias=bias), act(), nn.Dropout(0.3)
        self.scale, self.on = 1.0, False
        self.double()


class Gated(Mlp):
    def forward(self, x):
        return self.c(self.b(x) * self.f(self.a(x)))


class Plain(Mlp):
    def forward(self, x):
        h = self.f(self.a(x))
        return self.d(self.c(self.d(h)))


class Switch(Mlp):
    def forward(self, x):
        h = self.f(self.a(x))
        if self.on:
            h = h.clamp(max=0.1)
        return self.c(h * self.b(x))


class Functional(Mlp):
    def forward(self, x, residual):
        h = F.dropout(F.gelu(self.a(x)), 0.3, self.training)
        return F.dropout(self.c(h), p=0.5, training=self.training) + residual


class Joined(Mlp):
    def forward(self, x):
        gate, up = self.a(x).chunk(2, dim=-1)
        return self.e(up * self.f(gate))

    def __init__(self):
        super().__init__()
        self.e = nn.Linear(H // 2, D, dtype=torch.float64)


class JoinedSwapped(Joined):
    def forward(self, x):
        up, gate = self.a(x).split(H // 2, -1)
        return self.e(self.f(gate) * up)


class Inside(Mlp):
    def forward(self, x):
        return self.helper(x) + x

    def helper(self, x):
        return self.parts(x)

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(self.a, self.f, self.d, self.c)


KNOWN = [Gated, Plain, Switch, Functional, Joined, JoinedSwapped, Inside]


class Scaled(Mlp):
    def forward(self, x):
        return self.c(self.f(self.a(x) * self.scale) * self.b(x))


class Sparse(Mlp):
    def forward(self, x):
        h = self.a(x)
        h = torch.where(h > h.mean(-1, keepdim=True), h, 0.0)
        return self.c(self.f(h) * self.b(x))


class Normed(Mlp):
    def __init__(self):
        super().__init__()
        self.n = nn.RMSNorm(H, eps=1e-5, dtype=torch.float64)

    def forward(self, x):
        return self.c(self.n(self.f(self.a(x)) * self.b(x)))


class Limited(Mlp):
    def forward(self, x):
        return self.c(self.f(self.a(x).clamp(max=0.5)))


class Moved(Mlp):
    def forward(self, x):
        return self.c(self.f(self.a(x)) + self.b(x))


class Both(Mlp):
    def forward(self, x):
        return self.c(self.f(self.a(x)) * self.f(self.b(x)))


class Twice(Mlp):
    def forward(self, x):
        h = self.f(self.a(x))
        return self.c(h) + h.sum(-1, keepdim=True)


class Keeps(Mlp):
    def forward(self, x):
        self.last = self.a(x)
        return self.c(self.f(self.last))


class Shaped(Mlp):
    def forward(self, x):
        return self.c(self.f(self.a(x))) * (2 if x.shape[0] > 1 else 1)


class Graded(Mlp):
    def forward(self, x):
        h = self.a(x)
        return self.c(self.f(h)) if torch.is_grad_enabled() else self.c(h)


class Configured(Mlp):
    def __init__(self):
        super().__init__()
        self.config = transformers.LlamaConfig()

    def forward(self, x):
        h = self.f(self.a(x))
        return self.c(h if self.config.mlp_bias else 2 * h)


UNKNOWN = [
    Scaled, Sparse, Normed, Limited, Moved, Both, Twice, Keeps, Shaped, Graded, Configured,
]  # fmt: skip


@pytest.mark.parametrize("kind", [*KNOWN, *UNKNOWN])
def test_forms(kind):
    """By what they compute: equal with gradients, in evaluation and training, or left alone."""
    torch.manual_seed(0)
    plain = kind()
    ours = copy.deepcopy(plain)
    names = hf.patch(ours).names
    assert ("" in names or "parts" in names) == (kind in KNOWN), names
    inputs = [drawn(2, 3, D) for _ in range(2 if kind is Functional else 1)]
    for training in (False, True):
        close(*(values(m.train(training), *inputs) for m in (ours, plain)))
    with torch.no_grad():
        close([ours.eval()(*inputs)], [plain.eval()(*inputs)])


@pytest.mark.parametrize("kind", [Gated, Joined, JoinedSwapped, Functional])
def test_known_forms_are_computed_by_one_call(kind, monkeypatch):
    calls = []
    for name in ("mlp", "gated_mlp"):
        original = getattr(wholes, name)
        monkeypatch.setattr(wholes, name, lambda *a, f=original, **k: calls.append(1) or f(*a, **k))
    module = kind().eval()
    with hf.patch(module):
        module(*[drawn(2, D) for _ in range(2 if kind is Functional else 1)])
    assert calls == [1]


def test_attributes_are_asked_at_every_call():
    for change in (
        lambda m: setattr(m, "on", True),
        lambda m: setattr(m, "f", nn.GELU()),
        lambda m: setattr(m, "f", nn.Tanh()),
        lambda m: setattr(m, "c", nn.Sequential(m.c, nn.ReLU())),
        lambda m: setattr(m, "a", nn.Linear(D, H, bias=False, dtype=torch.float64)),
    ):
        plain, x = Switch(), drawn(2, D)
        ours = copy.deepcopy(plain)
        hf.patch(ours)
        for m in (plain, ours):
            torch.manual_seed(3)
            change(m)
        close(values(ours, x), values(plain, x))


def test_methods_of_other_libraries_take_effect(monkeypatch):
    """On the class and on the instance, after the patch."""
    x = drawn(2, D)
    for target in ("class", "instance", "helper"):
        module = Inside() if target == "helper" else Gated()
        hf.patch(module)
        module(x)
        if target == "helper":
            module.helper = lambda x: 0 * x
            torch.testing.assert_close(module(x), x)
            continue
        where = type(module) if target == "class" else module
        with monkeypatch.context() as context:
            changed = (lambda self, x: 7 * x) if target == "class" else (lambda x: 7 * x)
            context.setattr(where, "forward", changed)
            torch.testing.assert_close(module(x), 7 * x)


ADORNED = [n for n in ADORNMENTS if n not in ("backward hook", "backward pre-hook")]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("adornment", ADORNED)
@pytest.mark.parametrize("kind", [Gated, Joined, Inside])
def test_children(kind, adornment, order):
    module = kind().eval()
    results = []
    for patched in (False, True):
        m = copy.deepcopy(module)
        if patched and order == "after":
            hf.patch(m)
        torch.manual_seed(0)
        ADORNMENTS[adornment](m, "a")
        if patched and order == "before":
            hf.patch(m)
        results.append(values(m, torch.ones(2, D, dtype=torch.float64)))
    close(*results)


def _hook(module, args, y):
    return y * 1.3 if isinstance(y, torch.Tensor) and y.is_floating_point() else None


def _replaced(module):
    inner = module.forward

    def forward(*args, **kwargs):
        y = inner(*args, **kwargs)
        changed = _hook(module, args, y)
        return y if changed is None else changed

    module.forward = forward


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["Llama", "OPT", "BERT", "Phi-3", "GPT-2", "GPT-J"])
def test_each_module_of_a_model_may_be_changed(family, order):
    """By a hook or a forward of the instance, the inner modules of a fused step included."""
    plain = families.model(family)
    names = [n for n, _ in plain.named_modules() if n and "1" not in n.split(".")]
    given = families.inputs(plain)
    for name in names:
        for change in (lambda m: m.register_forward_hook(_hook), _replaced):
            outputs = []
            for patched in (False, True):
                model = copy.deepcopy(plain)
                if patched and order == "after":
                    hf.patch(model)
                change(model.get_submodule(name))
                if patched and order == "before":
                    hf.patch(model)
                with torch.no_grad():
                    outputs.append(model(**given)[0])
            assert families.difference(outputs[1], outputs[0]) < 1e-4, name


def test_dynamic_quantisation():
    module = Gated().float().eval()
    hf.patch(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
        fresh = torch.ao.quantization.quantize_dynamic(
            _unpatched(module), {nn.Linear}, dtype=torch.qint8
        )
    x = torch.randn(2, D)
    assert torch.equal(small(x), fresh(x))
    assert not torch.equal(small(x), module(x))


def _unpatched(module):
    other = type(module)().to(next(module.parameters()).dtype).eval()
    other.load_state_dict(module.state_dict())
    return other


def test_hooks_that_replace_forward():
    """As accelerate does, around modules and around their children, and undo beside it."""
    for where in ("", "a"):
        for order in ("before", "after"):
            module, x, calls = Gated(), drawn(2, D), []
            expected = module(x)
            patched = hf.patch(module) if order == "after" else None
            target = module.get_submodule(where)
            inner = target.forward
            target.forward = lambda *a, inner=inner, calls=calls: calls.append(1) or inner(*a)
            patched = patched or hf.patch(module)
            torch.testing.assert_close(module(x), expected)
            assert calls == [1]
            patched.undo()
            torch.testing.assert_close(module(x), expected)
            assert calls == [1, 1]


def test_patching_twice():
    module, x = transformers.BertModel(transformers.BertConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=12,
        vocab_size=20,
    )).eval(), torch.arange(6)[None]  # fmt: skip
    expected = module(x)[0]
    first, second = hf.patch(module), hf.patch(module)
    assert first.names and not second.names
    second.undo()
    first.undo()
    methods = ("forward", *wholes.METHODS)
    assert not any(method in vars(m) for m in module.modules() for method in methods)
    assert torch.equal(module(x)[0], expected)


class Norm(nn.Module):
    def __init__(self, kind, size=D):
        super().__init__()
        self.kind, self.small, self.count = kind, 1e-5, 0
        self.factor = nn.Parameter(drawn(size))

    def forward(self, x, gate=None):
        h = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if self.kind == "centred":
            h = h - h.mean(-1, keepdim=True)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.small)
        if self.kind == "one":
            return (h * (1 + self.factor.to(h.dtype))).to(x.dtype)
        if self.kind == "clipped":
            h = h.clamp(-2, 2)
        if self.kind == "counted":
            self.count += 1
        if self.kind == "stopped":
            h = h.detach()
        if self.kind == "dropped":
            h = F.dropout(h, 0.1, self.training)
        h = h.to(x.dtype) * self.factor.to(x.dtype)
        return h if gate is None else h * gate


@pytest.mark.parametrize(
    "kind", ["rms", "one", "centred", "clipped", "counted", "stopped", "dropped"]
)
def test_norms(kind):
    known = kind in ("rms", "one", "centred")
    module = Norm(kind)
    names = hf.patch(module).names
    assert (names == [""]) == known
    x = drawn(2, 3, D)
    for eps in (1e-5, 0.3):  # eps belongs to the module and may change
        module.small = eps
        plain = Norm(kind)
        plain.factor, plain.small = module.factor, eps
        close(values(module, x), values(plain, x))
    close(*(values(lambda x, m=m: m.eval()(x, gate=x), x) for m in (module, plain)))
    module.kind = plain.kind = "clipped"
    close(values(module, x), values(plain, x))
    module.kind = plain.kind = "rms"
    half, other = x.bfloat16(), module(x.bfloat16())
    assert other.dtype == plain(half).dtype == torch.bfloat16


def test_norms_with_a_constant_eps_or_without_weight():
    olmo = transformers.models.olmo.modeling_olmo.OlmoLayerNorm(D)
    nemotron = transformers.models.nemotron.modeling_nemotron.NemotronLayerNorm1P(D)
    for module in (olmo, nemotron):
        plain = copy.deepcopy(module)
        assert hf.patch(module).names == [""]
        for scale in (1e-3, 1.0, 100.0):
            x = scale * torch.randn(2, 3, D)
            close(values(module, x), values(plain, x))
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
        x = torch.randn(2, D)
        assert norms.form(nemotron, x) is None  # its code has a rule of its own
        assert norms.form(olmo, x) is not None


def _turned_at_the_end(q, k, cos, sin):
    """As GLM-like functions do, but the last features of a head are turned."""
    rest = q.shape[-1] - cos.shape[-1]
    llama = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    turned = llama(q[..., rest:], k[..., rest:], cos, sin)
    return tuple(torch.cat([x[..., :rest], y], -1) for x, y in zip((q, k), turned, strict=True))


def _wrong_sign(tensor, sin, cos):
    return transformers.models.gptj.modeling_gptj.apply_rotary_pos_emb(tensor, -sin, cos)


def test_rotations():
    """Of heads as a whole or in part, where theirs has both."""
    models = transformers.models
    q, k, cos, sin = drawn(2, 3, 5, 8), drawn(2, 1, 5, 8), drawn(2, 5, 8), drawn(2, 5, 8)
    for theirs, sizes in (
        (models.llama.modeling_llama.apply_rotary_pos_emb, (8,)),
        (models.cohere.modeling_cohere.apply_rotary_pos_emb, (8,)),
        (models.gpt_neox.modeling_gpt_neox.apply_rotary_pos_emb, (8, 4)),
        (models.glm.modeling_glm.apply_rotary_pos_emb, (8, 4)),
        (_turned_at_the_end, (8, 4)),
    ):
        ours = rotation.rotation(theirs)
        for size in sizes:
            tables = cos[..., :size], sin[..., :size]
            close(*(values(lambda q, k, f=f, t=tables: sum(map(torch.sum, f(q, k, *t))), q, k)
                    for f in (ours, theirs)))  # fmt: skip
            close(ours(q, k, *tables), theirs(q, k, *tables))


def test_rotations_of_one_tensor():
    theirs = transformers.models.gptj.modeling_gptj.apply_rotary_pos_emb
    ours, x, tables = rotation.rotation(theirs), drawn(2, 5, 3, 8), drawn(2, 2, 5, 4)
    close(*(values(lambda x, f=f: f(x, *tables), x) for f in (ours, theirs)))
    one = tables[:, :, :1]  # one row for all tokens is not what ours takes
    close([ours(x, *one)], [theirs(x, *one)])
    assert rotation.rotation(_wrong_sign) is None


@pytest.mark.parametrize("mode", ["inference", "autocast", "meta", "float64"])
def test_what_is_recognised_does_not_depend_on_the_mode(mode):
    for table in (norms._FORMS, norms._READ, wholes._PLANS, layers._FORWARDS):
        table.clear()
    model = families.model("Llama")
    expected = hf.patch(copy.deepcopy(model)).names
    for table in (norms._FORMS, norms._READ, wholes._PLANS, layers._FORWARDS):
        table.clear()
    contexts = {
        "inference": torch.inference_mode(), "autocast": torch.autocast("cpu", torch.bfloat16),
        "meta": torch.device("meta"), "float64": torch.no_grad(),
    }  # fmt: skip
    if mode == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        with contexts[mode]:
            assert hf.patch(model).names == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_new_process(tmp_path):
    """Nothing but what the file holds tells it how the model is patched."""
    for family in ("Llama", "BERT", "BART"):
        model = families.model(family)
        model.config._attn_implementation = "eager"
        given = families.inputs(model)
        expected = model(**given)[0]
        hf.patch(model)
        (tmp_path / "model").write_bytes(pickle.dumps((model, given, expected)))
        code = (
            "import pickle, sys, torch, tfkern\n"
            "model, given, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
            "sys.modules['tfkern.integrations.hf.worth']._costs = lambda x: False\n"
            "torch.testing.assert_close(model(**given)[0], expected, rtol=1e-4, atol=1e-4)\n"
            "assert sum('forward' in vars(m) for m in model.modules()) > 10\n"
        )
        run = [sys.executable, "-c", code, str(tmp_path / "model")]
        result = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "BERT", "BART"])
def test_gradient_checkpointing(family):
    """Layers run again in backward, with and without a patch."""
    counts, gradients = [], []
    for patched in (False, True):
        model = families.model(family).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.gradient_checkpointing_enable()
        if patched:
            hf.patch(model)
        calls = []
        kinds = [m for n, m in model.named_modules() if n.endswith(("attn", "attention.self"))]
        for module in kinds:
            module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.train()
        torch.manual_seed(0)
        model(**families.inputs(model))[0].sum().backward()
        counts.append(len(calls))
        gradients.append(len([p for p in model.parameters() if p.grad is not None]))
    assert counts[0] == counts[1] >= 4
    assert gradients[0] == gradients[1]


FAST = ("Llama", "GPT-2", "BERT", "Gemma 2", "Phi-3", "Falcon", "BLOOM", "MPT", "ModernBERT",
        "CLIP", "Gemma 3n", "Falcon-H1", "DistilBERT", "BART", "T5Gemma", "SegFormer")  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in families.FAMILIES],
)
def test_families(family):
    """With transformers' attention: outputs and gradients in evaluation and, with the same random
    numbers for dropout, in training."""
    plain = families.model(family)
    ours = copy.deepcopy(plain)
    assert hf.patch(ours).names
    for training in (False, True):
        results = []
        for model in (plain, ours):
            model.train(training)
            torch.manual_seed(0)
            out, gradients, _ = families.results(model, generates=False)
            results.append((out, gradients))
        (a, expected), (b, got) = results
        assert families.difference(b, a) < 2e-4
        assert got.keys() == expected.keys()
        largest = max(g.abs().max().item() for g in expected.values())
        for name, gradient in expected.items():
            assert (got[name] - gradient).abs().max().item() < 1e-3 * largest, name


@pytest.mark.parametrize(
    "family",
    [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in families.FAMILIES],
)
def test_families_in_bfloat16(family):
    """No farther from the model with these weights in float32 than transformers' own code is,
    whose dtypes differ from step to step. Several inputs share the limit, since each alone may be
    lucky."""
    plain = families.model(family).bfloat16()
    exact, ours = copy.deepcopy(plain).float(), copy.deepcopy(plain)
    hf.patch(ours)
    errors = []
    for seed in range(4):
        outputs = []
        for model in (exact, plain, ours):
            with torch.no_grad():
                out = model(**families.inputs(model, seed))[0]
            outputs.append(out.float())
        expected, theirs, got = outputs
        assert got.isfinite().all()
        errors.append([(x - expected).square().sum().item() for x in (theirs, got)])
    theirs, got = (sum(e) ** 0.5 for e in zip(*errors, strict=True))
    assert got <= 1.5 * theirs + 1e-2 * expected.norm().item()


@pytest.mark.parametrize("family", ["GPT-2", "OPT", "StableLM", "Llama", "BERT", "T5"])
def test_attention_weights_that_a_model_returns(family):
    plain = families.model(family)
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("tfkern")
    given = families.inputs(plain)
    given["attention_mask"][:] = 1
    with torch.no_grad():
        a, b = (m(**given, output_attentions=True) for m in (plain, ours))
    for name in ("attentions", "decoder_attentions", "encoder_attentions", "cross_attentions"):
        if getattr(a, name, None):
            assert len(a[name]) == len(b[name]) == 2
            for x, y in zip(a[name], b[name], strict=True):
                torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)


def test_attention_that_is_never_asked_warns_once(recwarn):
    hf.patch.__globals__["_WARNED"].clear()
    for family, expected in (("Falcon", 1), ("Falcon", 0), ("BLOOM", 1), ("Llama", 0)):
        model = families.model(family)
        model.config._attn_implementation = "tfkern"
        recwarn.clear()
        hf.patch(model)
        found = [w for w in recwarn if "computes attention in its own code" in str(w.message)]
        assert len(found) == expected, family
    model = families.model("MPT")
    recwarn.clear()
    hf.patch(model)
    assert not [w for w in recwarn if "computes attention" in str(w.message)]
