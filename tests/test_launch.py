"""Recipes on many processes, and the command that starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("grain")
pytest.importorskip("datatrove")

from tfkern.data import prepare as preparation  # noqa: E402
from tfkern.data.prepare import Recipe as Preparation  # noqa: E402
from tfkern.train import checkpoint, recipe, run  # noqa: E402
from tfkern.train.parallel.mesh import check_sizes, from_slurm  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "time year people way day man thing woman life child world school state family".split()
FAILS = """
import os, sys, threading, time

def patch():
    while not hasattr(sys.modules.get("tfkern.train.run"), "run"):
        time.sleep(0.001)
    run = sys.modules["tfkern.train.run"]._Run
    agreed = run._agreed
    def fails(self, step):
        if step >= 3:
            raise {error}
        return agreed(self, step)
    run._agreed = fails

if os.environ.get("RANK") == "1":
    threading.Thread(target=patch, daemon=True).start()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, rng.integers(3, 9))) + "." for _ in range(800)]
    (folder / "text.txt").write_text("\n\n".join(" ".join(lines[i : i + 4]) for i in range(800)))
    told = Preparation(
        input=str(folder / "text.txt"), output=str(folder / "out"), tokenizer="characters",
        validation=0.1, files=2,
    )  # fmt: skip
    return preparation.prepare(told, workers=1)


def told(folder, data, **changes):
    """The values of a recipe that takes a second."""
    return {
        "out": str(folder), "task": "causal", "length": 16, "batch": 8, "data": str(data),
        "model": {"dim": 16, "layers": 2, "heads": 2, "vocab_multiple": 8}, "steps": 12,
        "evaluate_every": 5, "save_every": 4, "evaluation_batches": 3, "device": "cpu",
        "optimiser": {"kind": "adamw", "lr": 0.01},
    } | changes  # fmt: skip


def record(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def runs(values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfkern.train.chart.draw", lambda *arguments: None)
        outcome = run(recipe.made(values))
    return outcome.step, outcome.reason, outcome.validation_loss


def assert_same_record(folder, expected):
    """Losses, norms and evaluations; times differ, and sums of parts by their rounding."""
    names = "step", "loss", "norm", "validation_loss", "accuracy", "tokens", "skipped"
    ours, theirs = (
        [{name: line[name] for name in names if name in line} for line in record(x)]
        for x in (folder, expected)
    )
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=2e-6), (a, b)


def test_a_run_goes_on_with_other_parallelism(two, tmp_path, data):
    """On one process, then on two that share batches, that share sequences, and that are stages of
    a pipeline."""
    whole = told(tmp_path / "whole", data, evaluate_every=4, steps=16)
    expected = runs(whole)
    parts = whole | {"out": str(tmp_path / "parts")}
    runs(parts | {"steps": 4})
    two(runs, parts | {"steps": 8})
    two(runs, parts | {"steps": 12, "parallel": {"cp": 2}})
    parallel = {"pp": 2, "schedule": "gpipe", "microbatches": 4}
    for *found, loss in two(runs, parts | {"parallel": parallel}):
        assert found == [16, "steps"] and loss == pytest.approx(expected[-1], rel=1e-4)
    assert_same_record(tmp_path / "parts", tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole" / "model").iterdir()}
    assert names == {path.name for path in (tmp_path / "parts" / "model").iterdir()}


# The command


def started(folder, *arguments, fails=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if fails is not None:
        (folder / "sitecustomize.py").write_text(FAILS.format(error=fails))
        environment["PYTHONPATH"] = f"{folder}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, "-m", "tfkern_program", "train", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def written(folder, data, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(told(folder / "out", data, **changes)))
    return path


def until(condition, process):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def done(folder):
    path = folder / "out" / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def workers(process):
    """The processes that the launcher has started, by rank."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        told = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(x.removeprefix(b"RANK=")): int(pid) for x in told if x.startswith(b"RANK=")}
    return found


def ended(pid):
    """Whether a process of others is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_is_killed_ends_all(tmp_path, data):
    process = started(tmp_path, written(tmp_path, data, steps=10**6), "--nproc", 2)
    until(lambda: done(tmp_path) >= 3, process)
    found = workers(process)
    assert found.keys() == {0, 1}
    os.kill(found[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == f"tfkern: rank 1: Signal 9 (SIGKILL) received by PID {found[1]}\n"
    assert all(map(ended, found.values()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_processes_end_with_the_one_that_has_started_them(tmp_path, data):
    process = started(tmp_path, written(tmp_path, data, steps=10**6), "--nproc", 2)
    until(lambda: done(tmp_path) >= 3, process)
    found = workers(process)
    assert found.keys() == {0, 1}
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while not all(map(ended, found.values())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        ('RuntimeError("no more")', "tfkern: rank 1: RuntimeError: no more\n", 1),
        ('ValueError("not this")', "tfkern: not this\n", 2),
        ('OSError(28, "No space")', "tfkern: rank 1: OSError: [Errno 28] No space\n", 1),
    ],
)
def test_the_error_of_one_process_ends_all(tmp_path, data, error, line, status):
    path = written(tmp_path, data, steps=10**6)
    process = started(tmp_path, path, "--nproc", 2, fails=error)
    until(lambda: done(tmp_path) >= 2, process)
    _, errors = process.communicate(timeout=30)
    assert (errors, process.returncode) == (line, status)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, data):
    values = {"steps": 40, "save_every": 1000, "parallel": {"fsdp": 2}}
    path = written(tmp_path, data, **values)
    process = started(tmp_path, path, "--nproc", 2)
    until(lambda: done(tmp_path) >= 10, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    step = int(checkpoint.latest(tmp_path / "out" / "checkpoints").name.removeprefix("step-"))
    assert 10 <= step < 40
    assert errors == f"interrupted after step {step}: the same command goes on\n"
    assert process.returncode == 130
    process = started(tmp_path, path, "--nproc", 2)
    output, errors = process.communicate(timeout=100)
    assert (errors, process.returncode) == ("", 0)
    assert "ended after step 40 (steps)" in output
    runs(told(tmp_path / "whole", data, steps=40))
    assert_same_record(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_errors_that_all_have_are_told_once(tmp_path, data):
    process = started(tmp_path, written(tmp_path, data, batch=3), "--nproc", 2)
    _, errors = process.communicate(timeout=60)
    told = "tfkern: batch must be a multiple of the 2 data ranks, got 3\n"
    assert (errors, process.returncode) == (told, 2)


def test_sizes_that_are_not_those_of_the_processes(tmp_path, data):
    process = started(tmp_path, written(tmp_path, data), "--nproc", 4, "parallel.tp=3")
    _, errors = process.communicate(timeout=60)
    told = "tfkern: the mesh needs tp 3 = 3 processes, and there are 4\n"
    assert (errors, process.returncode) == (told, 2)


@pytest.mark.parametrize(
    ("sizes", "world", "found"),
    [
        ({}, 4, {"dp": 4}),
        ({"tp": 2}, 4, {"dp": 2, "tp": 2}),
        ({"pp": 2, "microbatches": 3}, 2, {"dp": 1, "pp": 2}),
        ({"fsdp": 4}, 4, {"dp": 1, "fsdp": 4}),
    ],
)
def test_dp_follows_from_the_number_of_processes(sizes, world, found):
    assert check_sizes(sizes, world) == found


@pytest.mark.parametrize("sizes", [{"tp": 3}, {"dp": 2}, {"dp": 2, "tp": 4}, {"tp": 8}])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="and there are 4"):
        check_sizes(sizes, 4)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a7", "a7"), ("gpu-[003-007,12]", "gpu-003"), ("c2,c5", "c2"), ("n[1,3].x,m1", "n1.x")],
)
def test_the_environment_of_slurm(nodes, first):
    """By the manual of srun; the first node is where the processes meet."""
    slurm = {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    found = from_slurm(slurm)
    port = int(found.pop("MASTER_PORT"))
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": first}
    assert found == expected and 1024 < port < 65536
    batch_script = {name: x for name, x in slurm.items() if "STEP" not in name}
    assert from_slurm(batch_script) == {}


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"xp": 2}, "parallel must be one of pp, dp, fsdp, cp, tp, schedule, microbatches"),
        ({"tp": 0}, r"parallel\.tp must be an integer of at least 1, got 0"),
        ({"pp": 2, "schedule": "x"}, r"parallel\.schedule must be one of gpipe, 1f1b, got 'x'"),
        ({"microbatches": 2}, "schedule and microbatches need pp"),
    ],
)
def test_values_that_cannot_be(tmp_path, parallel, message):
    with pytest.raises(ValueError, match=message):
        recipe.made(told(tmp_path, "data", parallel=parallel))
