"""Saves that are killed, that fail, or that meet others: there is the old model or the new one."""

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
from functools import partial
from pathlib import Path

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch")

from tfkern.models import Transformer, TransformerConfig, load, save  # noqa: E402
from tfkern.models.convert import store  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# the forms in which a directory may hold a model
FORMS = {
    "one file": {},
    "shards": {"shard_bytes": 30_000},
    "own": {"form": "tfkern"},
    "own shards": {"form": "tfkern", "shard_bytes": 20_000},
}
CONFIG = TransformerConfig(dim=32, layers=1, heads=2, vocab_size=64, max_length=16)


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
        in_child(partial(save, models[1 - old], directory, **form), draw.uniform(0, 1.5 * duration))
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
    counts = killed_saves(tmp_path, 40, 0)
    assert counts["lost"] == 0 and sum(counts.values()) == 40, counts
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
@pytest.mark.parametrize(
    ("old", "new"),
    [("one file", "shards"), ("own shards", "one file"), ("shards", "own shards"), ("own", "own")],
)
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


def limited(act, limit):
    """The errors of a function in a fork that cannot write files beyond so many bytes."""

    def inside():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            act()
        except (OSError, ValueError) as error:
            os._exit(7 if "File too large" in str(error) and "\n" not in str(error) else 8)

    return os.waitstatus_to_exitcode(in_child(inside))


@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("old", ["one file", "shards"])
def test_a_full_disk_leaves_the_old_model(tmp_path, old, new):
    save(model(1), tmp_path, **FORMS[old])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for limit in (1, 300, 2000, 10_000):  # within config.json, an index, or the weights
        assert limited(lambda: save(model(2), tmp_path, **FORMS[new]), limit) == 7
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert number_in(tmp_path) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_to(tmp_path):
    save(model(1), tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        save(model(2), tmp_path)
    tmp_path.chmod(0o700)
    assert number_in(tmp_path) == 1


def test_a_folder_of_that_name_is_found_first(tmp_path):
    save(model(1), tmp_path)
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(IsADirectoryError, match="index.json"):
        save(model(2), tmp_path, **FORMS["shards"])
    assert number_in(tmp_path) == 1


def test_what_comes_along_is_written_with_the_model(tmp_path):
    """Copies and removals wait for the model, and follow no links."""
    here, mine = tmp_path / "here", tmp_path / "mine"
    save(model(1), here)
    mine.write_text("new")
    (here / "words").symlink_to(tmp_path / "other")
    (tmp_path / "other").write_text("old")
    (here / "gone").write_text("old")
    along = {"words": mine, "gone": None, "never": None}
    with pytest.raises(OSError, match="absent"):
        save(model(2), here, along=along | {"x": tmp_path / "absent"})
    assert number_in(here) == 1 and (here / "words").read_text() == "old"
    assert (here / "gone").exists() and not (here / "x").exists()
    save(model(2), here, along=along)
    assert number_in(here) == 2 and (here / "words").read_text() == "new"
    assert not (here / "gone").exists() and (tmp_path / "other").read_text() == "old"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("form", FORMS)
def test_modes_are_those_of_the_umask(tmp_path, form, umask):
    before = os.umask(umask)
    try:
        save(model(1), tmp_path, **FORMS[form])
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666 & ~umask}


def test_links_are_replaced_and_not_followed(tmp_path):
    """Links in the cache of Hugging Face point to shared files, which must not change."""
    save(model(1), tmp_path / "cache")
    (tmp_path / "here").mkdir()
    for file in (tmp_path / "cache").iterdir():
        (tmp_path / "here" / file.name).symlink_to(file)
    assert number_in(tmp_path / "here") == 1
    save(model(2), tmp_path / "here")
    assert number_in(tmp_path / "here") == 2 and number_in(tmp_path / "cache") == 1


def test_what_is_of_others_stays_and_what_is_of_the_last_save_goes(tmp_path):
    theirs = ["tokenizer.json", "README.md", "model-mine-00001-of-00002.safetensors", ".hidden"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    for form in (*FORMS, *FORMS):
        save(model(1), tmp_path, **FORMS[form])
        written = {file.name for file in tmp_path.iterdir()} - {*theirs, "checkpoints"}
        if "shards" in form:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            shards = set(index["weight_map"].values())
            assert written == {"config.json", "model.safetensors.index.json", *shards}
        else:
            assert written == {"config.json", "model.safetensors"}
    assert all((tmp_path / name).read_text() == "mine" for name in theirs)


def copy(name, source, target):
    (target / name).write_bytes((source / name).read_bytes())


@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_of_saves_is_refused(tmp_path, form):
    one, other = tmp_path / "one", tmp_path / "other"
    for directory, number in ((one, 1), (other, 2)):
        save(model(number), directory, **FORMS[form])
    for file in sorted(one.iterdir()):
        save(model(2), other, form="tfkern")  # so that shards have their usual names
        save(model(2), other, **FORMS[form])
        copy(file.name, one, other)
        with pytest.raises(ValueError, match="different saves|another save"):
            load(other)


def test_a_configuration_may_be_edited(tmp_path):
    """It may be edited by hand, or by transformers, which keeps what it does not know."""
    save(model(1), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resid_pdrop": 0.5}))
    assert load(tmp_path).config.dropout == 0.5
    transformers = pytest.importorskip("huggingface").transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.config.resid_pdrop = 0.25
    theirs.config.save_pretrained(tmp_path)
    assert load(tmp_path).config.dropout == 0.25
    for again in (tmp_path, tmp_path / "elsewhere"):
        theirs.save_pretrained(again)
        assert number_in(again) == 1
    save(model(2), tmp_path)
    assert number_in(tmp_path) == 2


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_another_save_replaces_while_it_is_opened(form, tmp_path, monkeypatch):
    """The load begins again, and finds the other model."""
    save(model(1), tmp_path, **FORMS[form])
    opened = store.safe_open

    def open_late(path, framework):
        monkeypatch.setattr(store, "safe_open", opened)
        save(model(2), tmp_path, **FORMS[form])
        # safetensors has opened it already, and leaves mapping the file to torch.
        torch.UntypedStorage.from_file(str(path), False, 1)
        return opened(path, framework)

    monkeypatch.setattr(store, "safe_open", open_late)
    assert number_in(tmp_path) == 2


def test_two_writers_and_a_reader(tmp_path):
    """Every model that is loaded meanwhile, and the last one, is that of one save."""
    save(model(1), tmp_path)
    code = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
        from test_saving import FORMS, model, save
        print("ready", flush=True)
        sys.stdin.readline()
        for form in list(FORMS.values()) * 3:
            save(model(int(sys.argv[1])), {str(tmp_path)!r}, **form)
        """)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (2, 3)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        number_in(tmp_path)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert number_in(tmp_path) in (2, 3)
    assert not list(tmp_path.glob(".tfkern-*"))
