"""Optimisers: updates against other implementations, groups of parameters, states, scalers."""

import copy
import math
import pickle

import lion_pytorch.foreach
import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tfkern.models import Transformer, TransformerConfig, cross_entropy
from tfkern.train.lion import Lion
from tfkern.train.optimisers import OPTIMISERS, adamw, lion, muon, optimiser
from tfkern.train.schedules import set_learning_rate

LR = {"adamw": 1e-2, "lion": 1e-2, "adafactor": 0.1, "muon": 1e-2}


def tiny(**changes):
    torch.manual_seed(0)
    options = {"vocab_size": 20, "max_length": 16, "dim": 16, "layers": 2, "heads": 2} | changes
    return Transformer(TransformerConfig(architecture="decoder", **options))


def loss_of(model):
    """Each token is followed by the next number."""
    tokens = (torch.arange(8)[:, None] + torch.arange(13)) % 20
    return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def train(model, steps, count):
    """The losses of some steps."""
    losses = []
    for _ in range(count):
        steps.zero_grad()
        loss = loss_of(model)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


class Shapes(nn.Module):
    """Parameters of several shapes, with gradients drawn anew for each step."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for i, shape in enumerate([(), (7,), (5, 3), (1, 1), (2, 3, 4), (0, 3), (33, 65)]):
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(f"p{i}", nn.Parameter(value))

    def draw(self, step):
        generator = torch.Generator().manual_seed(step)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def two_groups(model, weight_decay):
    """The groups as they are said to be, in plain words."""
    named = list(model.parameters())
    return [
        {"params": [p for p in named if len(p.shape) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in named if len(p.shape) < 2], "weight_decay": 0},
    ]


def test_adamw_equals_torch():
    ours, theirs = Shapes(), Shapes()
    a = adamw(ours, 0.01, weight_decay=0.3, betas=[0.8, 0.97], eps=1e-7)
    b = torch.optim.AdamW(
        two_groups(theirs, 0.3), lr=0.01, betas=(0.8, 0.97), eps=1e-7, foreach=False
    )
    for step in range(200):
        for model, steps in ((ours, a), (theirs, b)):
            model.draw(step)
            steps.step()
    for name, p in weights(ours).items():
        torch.testing.assert_close(p, weights(theirs)[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_decay_is_decoupled(kind):
    """Without gradient, weights lose exactly lr * weight_decay of themselves, others nothing."""
    model = Shapes()
    steps = optimiser(kind, model, 0.125, weight_decay=0.5)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    steps.step()
    for name, p in weights(model).items():
        assert torch.equal(p, before[name] * (1 - 0.125 * 0.5 if p.dim() >= 2 else 1))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lion_equals_lion_pytorch(dtype, weight_decay):
    ours, theirs = Shapes(dtype), Shapes(dtype)
    a = Lion(two_groups(ours, weight_decay), lr=0.01)
    b = lion_pytorch.foreach.Lion(two_groups(theirs, weight_decay), lr=0.01)
    for step in range(200):
        for model, steps in ((ours, a), (theirs, b)):
            model.draw(step)
            steps.step()
    assert equal(weights(ours), weights(theirs))


def test_lion_is_its_paper():
    """Algorithm 2 of Chen et al., line by line."""
    model, lr, wd, beta1, beta2 = Shapes(), 0.01, 0.3, 0.9, 0.99
    steps = Lion(model.parameters(), lr=lr, weight_decay=wd, betas=(beta1, beta2))
    theta = [p.detach().clone() for p in model.parameters()]
    m = [torch.zeros_like(t) for t in theta]
    for step in range(200):
        model.draw(step)
        for i, p in enumerate(model.parameters()):
            c = beta1 * m[i] + (1 - beta1) * p.grad
            theta[i] = theta[i] - lr * (torch.sign(c) + wd * theta[i])
            m[i] = beta2 * m[i] + (1 - beta2) * p.grad
        steps.step()
    for p, t in zip(model.parameters(), theta, strict=True):
        torch.testing.assert_close(p.detach(), t, rtol=0, atol=1e-12)


def test_lion_moves_every_entry_by_lr():
    model = Shapes()
    for p in model.parameters():
        p.data.zero_()  # so that no rounding comes in
    steps = lion(model, 0.01, weight_decay=0.0)
    for step in range(3):
        before = weights(model)
        model.draw(step)
        steps.step()
        for name, p in weights(model).items():
            torch.testing.assert_close(
                (p - before[name]).abs(), torch.full_like(p, 0.01), rtol=1e-14, atol=0
            )


def test_lion_takes_a_rate_in_a_tensor():
    plain, tensor = Shapes(), Shapes()
    a = lion(plain, 0.5, weight_decay=0.25)
    b = lion(tensor, torch.tensor(0.5, dtype=torch.float64), weight_decay=0.25)
    for step in range(20):
        for model, steps in ((plain, a), (tensor, b)):
            set_learning_rate(steps, 0.5**step)
            model.draw(step)
            steps.step()
    assert equal(weights(plain), weights(tensor))


def test_lion_refuses_sparse_gradients():
    dense, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 3, sparse=True)
    steps = Lion([dense, table.weight])
    (table(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(ValueError, match=r"Lion takes no sparse gradients: .*\(5, 3\)"):
        steps.step()
    assert torch.equal(dense, torch.ones(3)) and not steps.state


def test_muon_is_torchs_beside_adamw():
    """The matrices of blocks move as under torch.optim.Muon, all else as under AdamW."""
    ours, theirs = tiny(), tiny()
    steps = muon(ours, 1e-2, weight_decay=0.2)
    blocks = {name for name, p in theirs.named_parameters() if ".blocks." in name and p.dim() == 2}
    assert len(blocks) >= 8  # four matrices at least in each of two blocks
    groups = [
        [p for n, p in theirs.named_parameters() if (n in blocks) == y] for y in (True, False)
    ]
    parts = [
        torch.optim.Muon(
            groups[0], lr=1e-2, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": [p for p in groups[1] if p.dim() >= 2], "weight_decay": 0.2},
                {"params": [p for p in groups[1] if p.dim() < 2], "weight_decay": 0},
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    ]
    for _ in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            loss_of(model).backward()
        steps.step()
        for part in parts:
            part.step()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)
            p.data.copy_(q)  # the Newton-Schulz iteration in bfloat16 makes small differences large


def test_muon_leaves_tables_in_blocks_to_adamw():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.matrix = nn.Embedding(5, 4), nn.Linear(4, 4)
            self.gain, self.kernel = nn.Linear(4, 1, bias=False), nn.Conv1d(4, 4, 3)

    model = nn.Module()
    model.layers, model.head = nn.ModuleList([Layer()]), nn.Linear(4, 9)
    names = [name for g in muon(model, 0.1).parts[0].param_groups for name in g["param_names"]]
    assert names == ["layers.0.matrix.weight"]


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("tied", [True, False])
def test_groups(kind, tied):
    model = tiny(tie_embeddings=tied)
    frozen = model.decoder.blocks[0].norm1.weight.requires_grad_(False)
    steps = optimiser(kind, model, 0.1, weight_decay=0.7)
    got = [
        (name, p, group["weight_decay"])
        for group in steps.state_dict()["param_groups"]
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]
    assert [p for _, p, _ in got] == list(range(len(got)))
    params = [p for group in steps.param_groups for p in group["params"]]
    expected = {name: p for name, p in model.named_parameters() if p is not frozen}
    assert len(expected) == len(list(model.parameters())) - 1
    assert sorted(name for name, _, _ in got) == sorted(expected)
    for (name, _, decay), p in zip(got, params, strict=True):
        assert p is expected[name]
        bias_or_norm = name.endswith("bias") or "norm" in name
        assert decay == (0 if bias_or_norm else 0.7), name
    table = [name for name in expected if name in ("embedding.weight", "vocabulary.weight")]
    assert len(table) == 2 - tied


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_loss_falls(kind):
    model = tiny()
    losses = train(model, optimiser(kind, model, LR[kind]), 30)
    assert losses[0] == pytest.approx(math.log(20), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_state_round_trip(kind):
    """A run that goes on from a saved state, a pickle or a copy is bit-equal to the run itself."""
    model = tiny()
    steps = optimiser(kind, model, LR[kind])
    train(model, steps, 3)
    again = tiny()
    again.load_state_dict(model.state_dict())
    resumed = optimiser(kind, again, 123.0)
    resumed.load_state_dict(copy.deepcopy(steps.state_dict()))
    pickled = pickle.loads(pickle.dumps((model, steps)))
    copied = copy.deepcopy((model, steps))
    losses = train(model, steps, 3)
    for other, its in ((again, resumed), pickled, copied):
        assert train(other, its, 3) == losses
        assert equal(weights(other), weights(model))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_distributed_checkpoint(kind, flat):
    """The state by names of parameters, as torch.distributed.checkpoint keeps it."""
    options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = tiny()
    steps = optimiser(kind, model, LR[kind])
    train(model, steps, 3)
    state = copy.deepcopy(checkpoint.get_optimizer_state_dict(model, steps, options=options))
    again = tiny()
    again.load_state_dict(model.state_dict())
    resumed = optimiser(kind, again, LR[kind])
    checkpoint.set_optimizer_state_dict(again, resumed, state, options=options)
    assert train(again, resumed, 3) == train(model, steps, 3)
    assert equal(weights(again), weights(model))


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_scaler(kind, unscaled):
    """A step with inf in one gradient changes nothing, and others are as without a scaler."""
    plain, scaled = tiny(), tiny()
    a, b = (optimiser(kind, model, LR[kind]) for model in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (False, True, False):
        before = weights(scaled)
        a.zero_grad()
        b.zero_grad()
        scaler.scale(loss_of(scaled)).backward()
        if bad:
            scaled.decoder.blocks[1].norm1.bias.grad[3] = math.inf
        else:
            train(plain, a, 1)
        if unscaled:
            scaler.unscale_(b)
        scaler.step(b)
        scaler.update()
        assert equal(weights(scaled), before) == bad
        assert equal(weights(scaled), weights(plain))
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_schedule_reaches_all_groups(kind):
    model = tiny()
    steps = optimiser(kind, model, 0.5)
    before = weights(model)
    assert set_learning_rate(steps, 0.0) == 0
    train(model, steps, 1)
    assert equal(weights(model), before)
    set_learning_rate(steps, 1e-3)
    train(model, steps, 1)
    moved = [name for name, p in weights(model).items() if not torch.equal(p, before[name])]
    assert sorted(moved) == sorted(before)


def test_gradients_of_other_strides():
    """Gradients that are assigned, as transposed or expanded tensors, or on a part of a tensor."""

    def run(parameter, grad, make):
        module = nn.Module()
        module.p = nn.Parameter(parameter)
        steps = make(module)
        for _ in range(3):
            module.p.grad = grad
            steps.step()
        return module.p.detach().clone()

    def theirs(module):
        return torch.optim.AdamW(
            module.parameters(), 0.1, betas=(0.9, 0.95), weight_decay=0.1, foreach=False
        )

    value = torch.randn(6, 4, dtype=torch.float64)
    grad = torch.randn(6, 4, dtype=torch.float64)
    cases = {
        "transposed gradient": (value, grad.t().contiguous().t()),
        "expanded gradient": (value, grad[:1].expand(6, 4)),
        "transposed parameter": (value.t(), grad.t().contiguous()),
        "part of a tensor": (torch.cat([value, value], 1)[:, :4], grad),
    }
    for name, (p, g) in cases.items():
        expected = run(p.clone(), g, theirs)
        got = run(p, g, lambda module: adamw(module, 0.1))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, msg=name)


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", sorted(set(OPTIMISERS) - {"adafactor"}))
def test_sharded_parameters(kind, mixed, mesh):
    """Parameters that are DTensors, all or only those of a block, move as others do."""
    plain, sharded = tiny().double(), tiny().double()
    fully_shard(sharded.decoder.blocks[0] if mixed else sharded, mesh=mesh)
    a, b = (optimiser(kind, model, LR[kind]) for model in (plain, sharded))
    for model, steps in ((plain, a), (sharded, b)):
        train(model, steps, 1)  # later steps of Muon, in bfloat16, enlarge differences of rounding
    assert mixed == any(not hasattr(p, "full_tensor") for p in sharded.parameters())
    whole = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in sharded.named_parameters()
    }
    torch.testing.assert_close(whole, weights(plain), rtol=0, atol=1e-12)
    options = checkpoint.StateDictOptions(full_state_dict=True)
    states = [
        checkpoint.get_optimizer_state_dict(model, steps, options=options)["state"]
        for model, steps in ((plain, a), (sharded, b))
    ]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-12)


def test_adafactor_refuses_sharded_parameters(mesh):
    with pytest.raises(ValueError, match="adafactor takes no parameters that are DTensors"):
        optimiser("adafactor", fully_shard(tiny(), mesh=mesh), 0.1)


def test_closures():
    for kind in OPTIMISERS:
        model = tiny()
        steps = optimiser(kind, model, LR[kind])

        def closure(model=model, steps=steps):
            steps.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        first = steps.step(closure).item()
        assert steps.step(closure).item() < first


def test_joined_takes_no_more_groups():
    with pytest.raises(NotImplementedError, match="takes no more groups"):
        muon(tiny(), 0.1).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def frozen_model():
    return tiny().requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sgd", {}, "optimiser must be one of adamw, .*, muon, got 'sgd'"),
        (None, {}, "optimiser must be one of adamw, .*, muon, got None"),
        ("adamw", {"beta": 0.9}, "optimiser adamw: option 'beta' is not one of weight_decay"),
        ("lion", {"eps": 1e-8}, "optimiser lion: option 'eps' is not one of weight_decay, betas"),
        ("adamw", {"lr": "3e-4"}, "lr must be a number of at least 0, got '3e-4'"),
        ("adamw", {"lr": -1}, "lr must be a number of at least 0, got -1"),
        ("lion", {"lr": math.nan}, "lr must be a number of at least 0, got nan"),
        ("muon", {"lr": torch.ones(2)}, r"lr must have one element, got the shape \(2,\)"),
        ("lion", {"weight_decay": -0.1}, "weight_decay must be a number of at least 0, got -0.1"),
        ("adamw", {"betas": [0.9, 1]}, r"betas must be two numbers in \[0, 1\), got \[0.9, 1\]"),
        ("lion", {"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ("muon", {"betas": (0.9, "x")}, r"betas must be two numbers in \[0, 1\), got \(0.9, 'x'"),
        ("adamw", {"eps": -1e-8}, "eps must be a number of at least 0, got -1e-08"),
        ("muon", {"momentum": 1.5}, r"momentum must be a number in \[0, 1\], got 1.5"),
        ("adafactor", {"beta2_decay": 0.8}, "beta2_decay must be a number .*, got 0.8"),
        ("adafactor", {"d": 0.5}, "d must be a number of at least 1, got 0.5"),
    ],
)
def test_bad_input(kind, options, message):
    with pytest.raises(ValueError, match=message) as error:
        optimiser(kind, tiny(), **{"lr": 0.1} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_nothing_to_train(kind):
    with pytest.raises(ValueError, match="the model has no parameters that need a gradient"):
        optimiser(kind, frozen_model(), 0.1)


def test_muon_needs_blocks():
    with pytest.raises(ValueError, match="muon needs a model with matrices to train in an nn.M"):
        muon(nn.Sequential(nn.Linear(3, 3)), 0.1)


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_may_be_a_tensor_of_one_element(kind, shape):
    torch.manual_seed(0)
    models = [nn.ModuleList([nn.Linear(6, 5)]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, rate in zip(models, (1e-2, torch.full(shape, 1e-2)), strict=True):
        updates = optimiser(kind, model, lr=rate)
        for _ in range(3):
            updates.zero_grad()
            model[0](torch.arange(6.0)).square().sum().backward()
            updates.step()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-5, atol=1e-7)
