"""Checkpoints that are read by other numbers of processes, and with other kinds of parallelism."""

import json

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from tfkern import models
from tfkern.models import Transformer, TransformerConfig
from tfkern.train import checkpoint
from tfkern.train.objective import CrossEntropy
from tfkern.train.optimisers import optimiser
from tfkern.train.parallel import Parallel, gather, mesh, parallelise
from tfkern.train.steps import steps

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 20
SIZES = {  # the table has 22 rows, and 18 is no multiple of 4: parts are of unequal size
    "vocab_size": VOCAB, "vocab_multiple": 22, "max_length": 12, "dim": 18, "layers": 4, "heads": 2,
    "hidden_dim": 20, "positions": "relative",
}  # fmt: skip

MODES = [{}, {"fsdp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2}]
FOUR = [{"fsdp": 4}, {"tp": 2, "fsdp": 2}, {"pp": 2, "fsdp": 2}, {"pp": 2, "dp": 2}]


class Run:
    """A model and its optimiser, on the processes of a mesh or on this one."""

    def __init__(self, sizes, kind, seed=0):
        torch.manual_seed(seed)
        self.model = Transformer(TransformerConfig(**SIZES))
        if sizes:
            self.model = parallelise(self.model, mesh(device="cpu", **sizes))
        self.optimiser = optimiser(kind, self.model, lr=1e-2)

    def whole(self):
        """All tensors that are here, whole, by name."""
        module = getattr(self.model, "module", self.model)
        found = {f"model.{name}": x for name, x in module.state_dict().items()}
        for name, p in module.named_parameters():
            found |= {f"{name}.{key}": x for key, x in self.optimiser.state[p].items()}
        return {
            name: x.full_tensor() if isinstance(x, DTensor) else x.clone()
            for name, x in found.items()
        }


def assert_bits(found, expected):
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


class Batches:
    """Random rows by the number of the step, of which a data rank has some."""

    def __init__(self, rank=0, world=1):
        self.mine = slice(rank * 8 // world, (rank + 1) * 8 // world)

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(VOCAB, (8, 13), generator=generator)[self.mine]
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def saves(sizes, kind, folder):
    run = Run(sizes, kind)
    model = Parallel.of(run.model)
    batches = Batches(model.data_rank, model.data_world)
    list(steps(run.model, batches, CrossEntropy(), run.optimiser, stop=2))
    checkpoint.save(folder, 2, run.model, run.optimiser)
    return run.whole()


def loads(sizes, kind, folder):
    run = Run(sizes, kind, seed=1)
    assert checkpoint.load(folder, run.model, run.optimiser) == 2
    return run.whole()


def on(ranks, sizes, function, *args):
    """The tensors of a run on processes or on this one."""
    found = ranks(function, sizes, *args) if sizes else [function(sizes, *args)]
    whole = {}
    for state in found:
        for name, x in state.items():
            assert name not in whole or torch.equal(whole[name], x), name
            whole[name] = x
    return whole


def check_moves(ranks, folder, kind, one, other):
    saved = on(ranks, one, saves, kind, folder)
    assert {f"model.{name}" for name in Run({}, kind).model.state_dict()} < set(saved)
    assert_bits(on(ranks, other, loads, kind, folder), saved)


@pytest.mark.parametrize("kind", ["adamw", "muon", "lion"])
def test_many_processes_to_one_and_back(two, tmp_path, kind):
    check_moves(two, tmp_path / "a", kind, {"fsdp": 2}, {})
    check_moves(two, tmp_path / "b", kind, {}, {"fsdp": 2})


@pytest.mark.parametrize("other", MODES, ids=str)
@pytest.mark.parametrize("one", MODES[1:], ids=str)
def test_every_kind_of_parallelism_to_every_other(two, tmp_path, one, other):
    check_moves(two, tmp_path, "adamw", one, other)


@pytest.mark.slow
@pytest.mark.parametrize("many", FOUR, ids=str)
def test_two_processes_to_four_and_back(two, four, tmp_path, many):
    saved = on(two, {"fsdp": 2}, saves, "adamw", tmp_path / "two")
    assert_bits(on(four, many, loads, "adamw", tmp_path / "two"), saved)
    saved = on(four, many, saves, "adamw", tmp_path / "four")
    for few in MODES:
        assert_bits(on(two, few, loads, "adamw", tmp_path / "four"), saved)


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "max_length": 12, "dim": 16, "layers": 2, "heads": 2}
    return Transformer(TransformerConfig(**sizes))


def exported(sizes, folder):
    whole = gather(parallelise(gpt2(), mesh(device="cpu", **sizes)))
    if whole is not None:
        models.save(whole, folder)
    return whole is not None


@pytest.mark.parametrize("sizes", MODES[1:], ids=str)
def test_the_first_process_has_the_whole_model(two, tmp_path, sizes):
    """It writes the directory of Hugging Face that one process would write."""
    assert two(exported, sizes, tmp_path) == [True, False]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"
    assert_bits(models.load(tmp_path).state_dict(), gpt2().state_dict())


def fails(sizes, folder, broken, name):
    """What is raised in each process if a function of the module of checkpoints fails in one."""
    run = Run(sizes, "adamw")
    checkpoint.save(folder, 1, run.model, run.optimiser)
    before = run.whole()
    with pytest.MonkeyPatch.context() as patch:
        if distributed.get_rank() == broken:

            def refuses(*args, **options):
                raise OSError(f"{name} fails in {broken}")

            owner, _, attribute = name.rpartition(".")
            patch.setattr(getattr(checkpoint, owner) if owner else checkpoint, attribute, refuses)
        try:
            checkpoint.save(folder, 2, run.model, run.optimiser)
            checkpoint.load(folder, run.model, run.optimiser)
        except OSError as error:
            assert_bits(run.whole(), before)
            return str(error)


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(
    "name", ["_tensors", "HuggingFaceStorageWriter.write_data", "_check_run", "_room", "_read"]
)
def test_errors_of_one_process_are_raised_in_all(two, tmp_path, name, broken):
    for told in two(fails, {"fsdp": 2}, tmp_path, broken, name):
        assert f"{name} fails in {broken}" in told
    saved = ["step-00000001"] + ["step-00000002"] * (name in ("_check_run", "_room", "_read"))
    assert sorted(path.name for path in tmp_path.iterdir()) == saved
