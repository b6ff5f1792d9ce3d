"""Plans of meshes, against models, their saved tensors and what processes send."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tfkern.cli import main
from tfkern.models import Transformer, TransformerConfig, preset, save
from tfkern.models.convert import read_config
from tfkern.nn.context_parallel import traffic
from tfkern.train import CrossEntropy
from tfkern.train.flops import count_flops
from tfkern.train.optimisers import optimiser
from tfkern.train.parallel import mesh, parallelise
from tfkern.train.parallel.gradients import local
from tfkern.train.parallel.plan import (
    Work,
    block_bytes,
    flops,
    meshes,
    plan,
    plans,
    stage_memory,
    weights,
)
from tfkern.train.steps import steps

SIZES = {"dim": 64, "layers": 4, "heads": 4, "vocab_size": 51, "vocab_multiple": 4}
MODELS = {
    "gpt": {"max_length": 128},
    "llama": {
        "positions": "rotary", "norm": "rms_norm", "gated": True, "bias": False,
        "tie_embeddings": False,
    },
    "grouped": {
        "positions": "rotary", "norm": "rms_norm", "gated": True, "hidden_dim": 96, "kv_heads": 2,
    },
    "grouped gpt": {"max_length": 128, "kv_heads": 2},
}  # fmt: skip
B, T = 4, 128


def work(name, **changes):
    config = TransformerConfig(**SIZES | MODELS[name])
    return Work(**{"config": config, "length": T, "batch": B, "precision": "float32"} | changes)


def batches(model=None):
    tokens = torch.randint(51, (B, T + 1), generator=torch.Generator().manual_seed(0))
    rank, world = (0, 1) if model is None else (model.data_rank, model.data_world)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    return [{"tokens": tokens[mine, :-1], "targets": tokens[mine, 1:]}]


def kept(config):
    """Bytes that forward keeps for backward beside parameters, each memory once."""
    model, found = Transformer(config), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(batches()[0]["tokens"])
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_blocks_keep_what_the_plan_tells(name):
    told = work(name)
    more = TransformerConfig(**SIZES | MODELS[name] | {"layers": 5})
    assert block_bytes(told) * B * T == kept(more) - kept(told.config)


@pytest.mark.parametrize("name", MODELS)
def test_activations_of_a_model(name):
    told = work(name)
    found = plan(told, {}).memory["activations"]
    # The loss in pieces adds a gradient of what it reads, which forward has not yet.
    assert found == pytest.approx(kept(told.config) + 4 * 64 * B * T, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_arithmetic_is_what_is_counted(name, recompute):
    told = work(name, recompute=recompute)
    model = Transformer(told.config)
    model.recompute = recompute
    tile = 64, 1  # of the kernel of csrc/cpu/attention.h
    assert flops(told, tile) == count_flops(model, CrossEntropy(), batches()[0])


@pytest.mark.parametrize("name", ["gpt2", "llama-2-7b", "gpt3-175b", "llama-3.1-70b"])
def test_parameters_of_published_models(name):
    with torch.device("meta"):
        model = Transformer(preset(name))
    told = Work(config=preset(name), length=1024, batch=1)
    memory = plan(told, {}).memory
    count = sum(p.numel() for p in model.parameters())
    assert memory["parameters"] == memory["gradients"] == 4 * count
    assert memory["optimiser"] == 8 * count


class Sent(TorchDispatchMode):
    """The bytes that this process of two sends, by the operators of torch.distributed, if sums and
    gathers go around a ring. A few numbers, as of the loss, do not count."""

    RING = {"reduce_scatter": 1 / 2, "all_gather": 1, "all_reduce": 1, "send": 1}

    def __init__(self):
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._schema.name
            if any(part in name for part in ("allgather", "all_gather")):
                name, sizes = "all_gather", args[0 if "functional" in name else 1]
            elif "reduce_scatter" in name:
                name, sizes = "reduce_scatter", args[0 if "functional" in name else 1]
            elif "allreduce" in name or "all_reduce" in name:
                name, sizes = "all_reduce", args[0]
            elif name == "c10d::send":
                name, sizes = "send", args[0]
            else:
                sizes = ()
            size = sum(x.nbytes for x in tree_leaves(sizes))
            if size > 64:
                self.bytes += self.RING[name] * size
        return function(*args, **(kwargs or {}))


def state(name, sizes, recompute):
    """Bytes of parameters, gradients and optimiser of a rank, and what it sends in a step."""
    inner = Transformer(work(name).config)
    inner.recompute = recompute
    model = parallelise(inner, mesh(**sizes, device="cpu"))
    made = optimiser("adamw", model, 1e-3)
    with traffic() as ring, Sent() as sent:
        list(steps(model, batches(model), CrossEntropy(), made, stop=1))
    found = [local(p) for p in model.parameters()]
    states = [local(x) for each in made.state.values() for x in each.values() if torch.is_tensor(x)]
    return {
        "parameters": sum(p.nbytes for p in found),
        "gradients": sum(local(p.grad).nbytes for p in model.parameters()),
        "optimiser": sum(x.nbytes for x in states if x.dim()),
        "ring": ring["bytes"],
        "sent": sent.bytes,
    }


@pytest.mark.parametrize("name, recompute", [("gpt", False), ("llama", False), ("llama", True)])
@pytest.mark.parametrize(
    "sizes", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}], ids=str
)
def test_state_and_traffic_of_ranks(two, name, recompute, sizes, one_thread):
    told = plan(work(name, recompute=recompute), sizes)
    counted = weights(work(name).config)
    for rank, found in enumerate(two(state, name, sizes, recompute)):
        stage = rank if "pp" in sizes else 0
        memory, _ = stage_memory(work(name), told.sizes, counted, stage)
        for kind in ("parameters", "gradients", "optimiser"):
            assert found[kind] == memory[kind]
        assert found["ring"] == told.sent["cp"]
        # tp also sums gradients of norms and biases, which are small.
        others = sum(told.sent.values()) - told.sent["cp"]
        assert found["sent"] == pytest.approx(others, rel=0.01 if "tp" in sizes else 1e-9)


def test_meshes_are_all_products():
    found = [tuple(sizes.values()) for sizes in meshes(12)]
    expected = {
        (a, b, c, d, 12 // (a * b * c * d))
        for a in range(1, 13) for b in range(1, 13) for c in range(1, 13) for d in range(1, 13)
        if 12 % (a * b * c * d) == 0
    }  # fmt: skip
    assert len(found) == len(set(found)) and set(found) == expected


def test_plans_fit_and_the_fastest_is_first():
    told = Work(config=preset("llama-3.1-70b"), length=8192, batch=64, recompute=True)
    found = plans(told, 64, 80e9)
    assert found and all(p.total <= 80e9 for p in found)
    assert [p.seconds for p in found] == sorted(p.seconds for p in found)
    with pytest.raises(ValueError, match="no mesh of 8 ranks fits: the least, .* needs"):
        plans(told, 8, 80e9)


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match="length must be positive, got 0"):
        work("gpt", length=0)
    with pytest.raises(ValueError, match="unknown optimiser 'abacus': expected one of adamw"):
        work("gpt", optimiser="abacus")
    with pytest.raises(ValueError, match="got head 'pretraining'"):
        Work(config=preset("bert-base-uncased"), length=8, batch=1)
    with pytest.raises(ValueError, match="batch 4 has no 3 equal parts"):
        plan(work("gpt"), {"dp": 3})
    with pytest.raises(ValueError, match="cp 2 cannot be combined with tp 2 yet"):
        plan(work("gpt"), {"cp": 2, "tp": 2})


def test_the_command(capsys, tmp_path):
    assert main(["plan", "gpt2", "--gpus", "2", "--length", "1024"]) == 0
    assert "fsdp=2" in capsys.readouterr().out
    save(Transformer(work("llama").config), tmp_path, form="tfkern")
    assert read_config(tmp_path) == work("llama").config
    assert main(["plan", str(tmp_path), "heads=2", "--gpus", "2", "--length", "64"]) == 0
    assert "tp=2" in capsys.readouterr().out
    assert main(["plan", "gpt2", "nope=3"]) == 2
    assert "no field 'nope'" in capsys.readouterr().err
    assert main(["plan", "gpt2", "--memory", "much"]) == 2
    assert "memory must be as 80GB or 64GiB" in capsys.readouterr().err
    assert main(["plan", "abacus"]) == 2
    assert "no preset" in capsys.readouterr().err


DOCS = (Path(__file__).parents[1] / "docs" / "parallel.md").read_text()


@pytest.mark.parametrize("command, told", re.findall(r"\$ tfkern (plan .*)\n((?:.+\n)+?)```", DOCS))
def test_tables_of_the_docs(command, told, capsys):
    assert main(command.split()) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == told.splitlines()
