"""Checkpoints: runs that go on bit by bit, processes that are killed, files that are wrong."""

import errno
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from tfkern.models import Transformer, TransformerConfig
from tfkern.train import checkpoint
from tfkern.train.objective import CrossEntropy
from tfkern.train.optimisers import optimiser
from tfkern.train.schedules import schedule
from tfkern.train.steps import steps

VOCAB = 20
LR = {"adamw": 1e-2, "lion": 3e-3, "adafactor": 0.2, "muon": 1e-2}


@pytest.fixture(autouse=True)
def _small(one_thread):
    """All models here are small."""


class Shuffled:
    """Random rows by the number of the step."""

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(VOCAB, (6, 13), generator=generator)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


class Run:
    """A model and all that trains it, made anew."""

    def __init__(self, kind="adamw", half=False, **changes):
        torch.manual_seed(changes.pop("seed", 0))
        options = {"vocab_size": VOCAB, "max_length": 12, "dim": 16, "layers": 2, "heads": 2}
        options |= {"dropout": 0.1, "attention_dropout": 0.1} | changes
        self.model = Transformer(TransformerConfig(**options))
        self.optimiser = optimiser(kind, self.model, lr=LR[kind])
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=7) if half else None
        self.precision = torch.float16 if half else None

    def train(self, start, stop):
        """The records of some steps."""
        found = steps(
            self.model, Shuffled(), CrossEntropy(), self.optimiser, start=start, stop=stop,
            schedule=schedule("cosine", steps=40, warmup=5), accumulate=2, clip_norm=1.0, seed=3,
            precision=self.precision, scaler=self.scaler,
        )  # fmt: skip
        return [(r.step, r.loss, r.norm, r.learning_rate, r.skipped) for r in found]

    def save(self, folder, step, **options):
        return checkpoint.save(
            folder, step, self.model, self.optimiser, scaler=self.scaler, **options
        )

    def load(self, folder, **options):
        return checkpoint.load(folder, self.model, self.optimiser, scaler=self.scaler, **options)

    def state(self):
        """All tensors of the run."""
        found = {f"model.{name}": x.clone() for name, x in self.model.state_dict().items()}
        for i, part in self.optimiser.state_dict()["state"].items():
            found |= {f"{i}.{name}": x.clone() for name, x in part.items()}
        if self.scaler is not None:
            found["scale"] = torch.tensor(self.scaler.get_scale())
            found["growth"] = torch.tensor(self.scaler._get_growth_tracker())
        return found


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# Resuming


@pytest.mark.parametrize(
    "kind, half",
    [("adamw", False), ("lion", False), ("adafactor", False), ("muon", False), ("adamw", True)],
)
def test_a_run_in_two_parts_is_one_run(tmp_path, kind, half):
    whole, first, second = Run(kind, half), Run(kind, half), Run(kind, half, seed=1)
    expected = whole.train(0, 40)
    found = first.train(0, 20)
    first.save(tmp_path, 20, configuration={"kind": kind})
    torch.manual_seed(99)
    start = second.load(tmp_path, configuration={"kind": kind})
    assert start == 20
    assert_bits(second.state(), first.state())
    assert found + second.train(start, 40) == expected
    assert_bits(second.state(), whole.state())


def test_a_run_that_saves_is_one_that_does_not(tmp_path):
    """Not even a checkpoint before the first step changes anything, nor one that is refused."""
    whole, saved = Run(), Run()
    expected = whole.train(0, 6)
    saved.save(tmp_path / "a", 0)
    other = Run(dim=32)
    other.save(tmp_path / "b", 3)
    with pytest.raises(ValueError, match="other tensors"):
        saved.load(tmp_path / "b")
    found = []
    for step in range(6):
        found += saved.train(step, step + 1)
        saved.save(tmp_path / "a", step + 1)
    assert found == expected
    assert_bits(saved.state(), whole.state())
    resumed = Run(seed=5)
    assert resumed.load(tmp_path / "a") == 6
    assert_bits(resumed.state(), whole.state())


def test_a_checkpoint_before_the_first_step_is_a_start(tmp_path):
    whole, resumed = Run(), Run(seed=1)
    whole.save(tmp_path, 0)
    assert resumed.load(tmp_path) == 0
    assert resumed.train(0, 6) == whole.train(0, 6)


@pytest.mark.parametrize("kind", LR)
def test_parameters_without_a_gradient_are_no_obstacle(tmp_path, kind):
    """A layer that no step uses has no state in the optimiser."""
    runs = []
    for _ in range(3):
        run = Run(kind)
        run.model.unused = nn.Linear(3, 3)
        torch.nn.init.zeros_(run.model.unused.weight)
        torch.nn.init.zeros_(run.model.unused.bias)
        run.optimiser = optimiser(kind, run.model, lr=LR[kind])
        runs.append(run)
    whole, first, second = runs
    expected = whole.train(0, 8)
    found = first.train(0, 4)
    first.save(tmp_path, 4)
    assert second.load(tmp_path) == 4
    assert found + second.train(4, 8) == expected
    assert_bits(second.state(), whole.state())


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import os, signal, torch
torch.set_num_threads(1)
from test_checkpoint import Run
run = Run()
"""


def process(body, *arguments):
    """A fresh process with a `run` of this file."""
    program = SCRIPT.format(tests=os.path.dirname(__file__)) + body
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_new_process_goes_on(tmp_path):
    whole = Run()
    expected = whole.train(0, 12)
    first = process("run.train(0, 6); run.save(sys.argv[1], 6)", tmp_path)
    assert first.wait(120) == 0, first.stdout.read()
    resumed = Run(seed=1)
    assert resumed.load(tmp_path) == 6
    assert resumed.train(6, 12) == expected[6:]
    assert_bits(resumed.state(), whole.state())


# Folders


def test_the_last_checkpoints_are_kept(tmp_path):
    run = Run()
    assert run.load(tmp_path / "none") == 0
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 100, 20_000_000, 300_000_000):
        path = run.save(tmp_path, step, keep=3)
        assert checkpoint.latest(tmp_path) == path
    (tmp_path / "step-9").mkdir()  # of nobody
    names = {"step-00000100", "step-20000000", "step-300000000"}
    assert {p.name for p in tmp_path.iterdir()} == names | {"step-9"}
    assert run.load(tmp_path) == 300_000_000
    run.save(tmp_path, 300_000_001, keep=None)
    assert len(list(tmp_path.iterdir())) == 5
    with pytest.raises(ValueError, match="keep must be positive, got 0"):
        run.save(tmp_path, 1, keep=0)


def test_a_checkpoint_that_is_there_stays(tmp_path):
    run = Run()
    path = run.save(tmp_path, 4)
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in path.iterdir()}
    run.train(0, 1)
    assert run.save(tmp_path, 4) == path
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in path.iterdir()} == before


def test_all_files_are_safetensors_or_json(tmp_path):
    run = Run(half=True)
    run.train(0, 2)
    path = run.save(tmp_path, 2)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    for file in path.glob("*.json"):
        json.loads(file.read_text())


def test_no_pickle_is_ever_read(tmp_path, monkeypatch):
    run = Run()
    run.train(0, 2)
    path = run.save(tmp_path, 2)
    expected = run.state()

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "bang"),)

    for name in (".metadata", "model.pt", "training.pkl", "model.bin"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
    resumed = Run(seed=1)
    assert resumed.load(tmp_path) == 2
    assert_bits(resumed.state(), expected)
    (file,) = path.glob("*.safetensors")
    for damaged in (file, path / "training.json"):
        damaged.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError):
            resumed.load(tmp_path)
    assert not (tmp_path / "bang").exists()


# Processes that end at any moment


def forked(function):
    """The number of a process that calls a function, and returns what it does as its status."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            status = function() or 0
        finally:
            os._exit(status)
    return pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save(folder, *numbers):
    """Saves checkpoints whose weights are all the number of their step."""
    run = Run()
    for step in numbers:
        for p in run.model.parameters():
            p.data.fill_(step)
        run.save(folder, step, keep=2)


def assert_whole(folder):
    """The last checkpoint loads, and all of its weights are those of its step."""
    run = Run()
    step = run.load(folder)
    assert step > 0
    for p in run.model.parameters():
        assert (p == step).all()
    return step


def test_a_process_that_is_killed_leaves_whole_checkpoints(tmp_path):
    save(tmp_path, 1)
    step = 1
    for delay in (0, 0.003, 0.007, 0.013, 0.021, 0.034, 0.055, 0.089):
        pid = forked(lambda start=step: save(tmp_path, *range(start + 1, 10**6)))
        deadline = time.monotonic() + 300
        while checkpoint.latest(tmp_path).name == f"step-{step:08}":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        assert status_of(pid) == -signal.SIGKILL
        assert assert_whole(tmp_path) > step
        step = assert_whole(tmp_path)
    save(tmp_path, step + 1)
    assert not list(tmp_path.glob(".tfkern-*"))  # what the dead have left


CALLS = ("os.replace", "os.rename", "os.fsync", "os.open", "os.mkdir", "shutil.rmtree")


@pytest.mark.parametrize("call", CALLS)
def test_a_process_that_ends_at_a_system_call(tmp_path, call):
    """A save with two checkpoints before it ends just ahead of one of its calls."""
    module, name = call.split(".")
    for count in range(1, 7):
        folder = tmp_path / str(count)

        def dies(folder=folder, count=count):
            save(folder, 1, 2)
            real, calls = getattr(sys.modules[module], name), iter(range(1, 10**6))

            def call(*args, **options):
                if next(calls) == count:
                    os._exit(9)
                return real(*args, **options)

            setattr(sys.modules[module], name, call)
            save(folder, 3)

        status = status_of(forked(dies))
        assert assert_whole(folder) in (2, 3)
        if status == 0:  # there are fewer calls
            assert count > 1
            return
        assert status == 9


@pytest.mark.parametrize("target", ["os.fsync", "os.mkdir", "safetensors.torch.save"])
def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch, target):
    """One write of a save finds no room: the first, the second and so on."""
    run = Run()
    first = run.save(tmp_path, 1)
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    module, _, name = target.rpartition(".")
    real = getattr(sys.modules[module], name)
    for count in range(1, 9):
        calls = iter(range(1, 10**6))

        def full(*args, calls=calls, count=count, **options):
            if next(calls) >= count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        monkeypatch.setattr(target, full)
        try:
            run.save(tmp_path, 2)
        except OSError as error:
            assert error.errno == errno.ENOSPC and "\n" not in str(error)
        monkeypatch.undo()
        assert {p.name: p.read_bytes() for p in first.iterdir()} == before
        if next(calls) <= count:  # it has fewer of these calls
            break
        if len(list(tmp_path.iterdir())) > 1:  # only the last sync, after the rename, has failed
            assert Run().load(tmp_path) == 2
            break
    assert count > 1


def test_files_that_may_not_grow_keep_what_was_there(tmp_path):
    run = Run()
    run.save(tmp_path, 1)

    def writes():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            run.save(tmp_path, 2)
        except OSError as error:
            return 7 if "\n" not in str(error) and error.errno == errno.EFBIG else 8

    assert status_of(forked(writes)) == 7
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001"}
    assert Run(seed=1).load(tmp_path) == 1


# Checkpoints that do not fit


def refused(run, folder, told, **options):
    """What is said, in one line, while nothing changes."""
    before = run.state()
    with pytest.raises(ValueError) as raised:
        run.load(folder, **options)
    assert re.search(told, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000
    assert_bits(run.state(), before)


def test_another_configuration_is_told_by_name(tmp_path):
    run = Run()
    run.train(0, 1)
    run.save(tmp_path, 1, configuration={"a": {"b": (1, 2), "c": None}, "lr": 0.1})
    other = Run(seed=1)
    assert other.load(tmp_path, configuration={"lr": 0.1, "a": {"b": [1, 2], "c": None}}) == 1
    for configuration, told in (
        (
            {"a": {"b": [1, 3], "c": None}, "lr": 0.1},
            r"configuration\.a\.b is \[1, 2\] there, \[1, 3\] here",
        ),
        ({"a": {"b": [1, 2], "c": None}, "lr": 0.2}, r"lr is 0\.1 there, 0\.2 here"),
        ({"a": {"b": [1, 2]}, "lr": 0.1, "d": 1}, "d is None there, 1 here"),
        ({"a": 1, "lr": 0.1}, r"a is \{.*\} there, 1 here"),
        (None, "configuration is .* there, None here"),
    ):
        refused(other, tmp_path, told, configuration=configuration)


@pytest.mark.parametrize(
    "kind, changes, told",
    [
        ("adamw", {"dim": 32}, r"model\.decoder.*is 'float32 \(.*16.*\)' there, '.*32.*\)' here"),
        ("adamw", {"layers": 3}, r"blocks\.2\..* is None there"),
        ("adamw", {"layers": 1}, r"blocks\.1\..* None here"),
        ("lion", {}, "optimiser is 'AdamW' there, 'Lion' here"),
        ("muon", {}, "optimiser is 'AdamW' there, 'Muon and AdamW' here"),
    ],
)
def test_another_model_or_optimiser_is_told_by_name(tmp_path, kind, changes, told):
    run = Run()
    run.train(0, 1)
    run.save(tmp_path, 1)
    other = Run(kind, **changes)
    refused(other, tmp_path, told)
    other.train(0, 1)
    refused(other, tmp_path, told)


def test_another_dtype_and_another_scaler_are_told(tmp_path):
    run = Run(half=True)
    run.train(0, 1)
    run.save(tmp_path, 1)
    refused(Run(), tmp_path, "scaler.scale is .* there, None here")
    other = Run(half=True)
    other.model.double()
    refused(other, tmp_path, "float32 .*there, .*float64.* here")
    Run().save(tmp_path, 2)
    refused(Run(half=True), tmp_path, "scaler.scale is None there")


def test_damaged_files_are_told(tmp_path):
    run = Run()
    run.train(0, 1)
    path = run.save(tmp_path, 1)
    other = Run(seed=1)
    (tensors,) = path.glob("*.safetensors")
    told = path / "training.json"
    for file in (tensors, told):
        whole = file.read_bytes()
        cuts = {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1}
        contents = [whole[:cut] for cut in sorted(cuts) if cut < len(whole) - 1 or file == tensors]
        for place in range(0, min(len(whole), 200), 3):
            contents.append(whole[:place] + b"\xff" + whole[place + 1 :])
        for content in contents:
            file.write_bytes(content)
            refused(other, tmp_path, path.name)
        file.unlink()
        refused(other, tmp_path, path.name)
        file.mkdir()
        refused(other, tmp_path, path.name)
        file.rmdir()
        file.write_bytes(whole)
    for content in ("[]", "{}", '{"step": "x"}', '{"step": 2}', '{"step": true}', '{"step": null}'):
        told.write_text(content)
        refused(other, tmp_path, path.name)


def test_headers_that_lie_are_told(tmp_path):
    """The names, shapes and places of tensors in the file of tensors, changed one at a time."""
    run = Run()
    run.train(0, 1)
    path = run.save(tmp_path, 1)
    (file,) = path.glob("*.safetensors")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    other = Run(seed=1)
    lies = [
        {name: header[name] | {"shape": [-1]}},
        {name: header[name] | {"dtype": "F99"}},
        {name: header[name] | {"data_offsets": [0, 2**60]}},
        {name: {}},
        {name: None},
        {"__metadata__": {"DCP_SHARDING_INFO": "{"}},
        {"__metadata__": {"DCP_SHARDING_INFO": "{}"}},
        {"__metadata__": {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": "x"}})}},
        {"__metadata__": {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [2**70]}})}},
        {"__metadata__": None, name: []},
    ]
    for lie in lies:
        text = json.dumps(header | lie).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        refused(other, tmp_path, path.name)


def test_an_earlier_step_does_not_follow_a_later_one(tmp_path):
    """A loop that has not loaded what is there would else lose its own checkpoints at once."""
    run = Run()
    run.train(0, 3)
    checkpoint.save(tmp_path, 3, run.model, run.optimiser)
    with pytest.raises(ValueError, match="step-00000003 already, which is later than step 2"):
        checkpoint.save(tmp_path, 2, run.model, run.optimiser)
    assert checkpoint.latest(tmp_path).name == "step-00000003"


def test_an_optimiser_of_fewer_parameters_is_told_by_name(tmp_path):
    whole, part = Run(), Run(seed=1)
    whole.train(0, 2)
    checkpoint.save(tmp_path, 2, whole.model, whole.optimiser)
    part.model.embedding.weight.requires_grad_(False)
    part.optimiser = optimiser("adamw", part.model, lr=1e-2)
    before = part.model.embedding.weight.clone()
    with pytest.raises(ValueError, match="other tensors: optimiser.embedding.weight.exp_avg"):
        checkpoint.load(tmp_path, part.model, part.optimiser)
    assert torch.equal(part.model.embedding.weight, before)
