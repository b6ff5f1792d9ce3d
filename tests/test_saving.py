"""Saves that end in the middle, at once or on a full disk: the old model or the new one is there."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch")

from tfkern.models import Transformer, TransformerConfig  # noqa: E402
from tfkern.models.convert import load, save  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# the forms in which a directory may hold a model
FORMS = {
    "one file": {},
    "shards": {"shard_bytes": 20_000},
    "own": {"form": "tfkern"},
    "own shards": {"form": "tfkern", "shard_bytes": 30_000},
}
CONFIG = TransformerConfig(dim=32, layers=2, heads=2, vocab_size=64, max_length=16)


def model(number):
    """All of whose weights are the number, which its configuration tells, too: of the same shape,
    so that the weights of one fit to the configuration of another."""
    made = Transformer(replace(CONFIG, norm_eps=number / 1e6)).eval()
    with torch.no_grad():
        for x in made.parameters():
            x.fill_(number)
    return made


def number_in(directory):
    """The number of the model that is loaded; an assertion if it is a mixture."""
    found = load(directory)
    numbers = {x for p in found.parameters() for x in p.unique().tolist()}
    assert len(numbers) == 1, f"weights of {sorted(numbers)}"
    (number,) = numbers
    assert found.config.norm_eps == number / 1e6, f"weights of {number}, {found.config}"
    return number


def in_child(act, kill_after=None):
    """Runs a function in a fork of this process, which is killed after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def killed_saves(directory, tries, seed):
    """Saves one model over another, each in another form, and kills it at a random moment.

    Returns:
        how many saves were lost, how many left the old model, and how many the new one.
    """
    draw = random.Random(seed)
    counts = {"lost": 0, "old": 0, "new": 0}
    models = [model(1), model(2)]
    save(models[0], directory)
    begun = time.perf_counter()
    for form in FORMS.values():
        save(models[0], directory, **form)
    duration = (time.perf_counter() - begun) / len(FORMS)
    old = 0
    for _ in range(tries):
        form = FORMS[draw.choice(list(FORMS))]
        in_child(
            lambda form=form: save(models[1 - old], directory, **form),
            draw.uniform(0, 1.5 * duration),
        )
        try:
            found = int(number_in(directory)) - 1
        except (ValueError, AssertionError) as error:
            print(error)
            counts["lost"] += 1
            save(models[old], directory)
            continue
        counts["old" if found == old else "new"] += 1
        old = found
    return counts


def test_a_killed_save_leaves_a_model(tmp_path):
    counts = killed_saves(tmp_path, 60, 0)
    assert counts["lost"] == 0 and sum(counts.values()) == 60, counts
    save(model(3), tmp_path)
    assert number_in(tmp_path) == 3
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_killed_saves_leave_a_model(tmp_path, seed):
    counts = killed_saves(tmp_path, 100, seed)
    assert counts["lost"] == 0 and min(counts["old"], counts["new"]) > 5, counts


class Steps:
    """Calls `end` at step number `stop` of a block: where it opens, renames, removes or makes a
    file or a folder. A hook stays for ever, so that all blocks share one."""

    current = None

    def __init__(self, stop, end):
        self.stop, self.end, self.count = stop, end, 0

    def __enter__(self):
        if Steps.current is None:
            sys.addaudithook(Steps.watch)
        Steps.current = self
        return self

    def __exit__(self, *error):
        Steps.current = False

    @staticmethod
    def watch(event, arguments):
        if Steps.current and (event == "open" or event.startswith(("os.", "shutil.", "tempfile."))):
            Steps.current.count += 1
            if Steps.current.count == Steps.current.stop:
                Steps.current.end()


@pytest.fixture
def unsynced(monkeypatch):
    """Syncing takes long, and a process that ends loses nothing that it has written."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("new", ["one file", "shards"])
@pytest.mark.parametrize("old", ["one file", "shards", "own", "own shards"])
def test_a_save_may_end_at_every_step(tmp_path, old, new):
    a, b, seen = model(1), model(2), []

    def attempt(stop):
        with Steps(stop, lambda: os._exit(1)):
            save(b, tmp_path, **FORMS[new])

    for stop in range(1, 500):
        save(a, tmp_path, **FORMS[old])
        (tmp_path / "README.md").write_text("mine")
        status = in_child(lambda stop=stop: attempt(stop))
        seen.append(number_in(tmp_path))
        assert (tmp_path / "README.md").read_text() == "mine"
        if status == 0:
            break
    assert status == 0 and seen == sorted(seen) and {*seen} == {1, 2}
    # what a save left that ended is no hindrance to the next one
    assert not list(tmp_path.glob(".tfkern-*"))


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize(("old", "new"), [("one file", "shards"), ("shards", "one file")])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_at_every_step_leaves_a_model(tmp_path, old, new, error):
    """An interrupt, or a disk that is full at one moment."""

    def fail():
        raise error

    for stop in range(1, 500):
        save(model(1), tmp_path, **FORMS[old])
        try:
            with Steps(stop, fail) as steps:
                save(model(2), tmp_path, **FORMS[new])
        except (KeyboardInterrupt, OSError) as raised:
            assert type(raised) is type(error)
            assert isinstance(raised, KeyboardInterrupt) or "No space left" in str(raised)
            assert number_in(tmp_path) in (1, 2)
        else:
            assert number_in(tmp_path) == 2
            if steps.count < stop:
                return
    raise AssertionError("no save came to its end")
