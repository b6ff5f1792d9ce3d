"""Recipes, runs of them, and the command `tfkern train`."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("grain")
pytest.importorskip("datatrove")

import tfkern_program  # noqa: E402
from tfkern import cli, models, tokenize  # noqa: E402
from tfkern.data import prepare as preparation  # noqa: E402
from tfkern.data.prepare import Recipe as Preparation  # noqa: E402
from tfkern.train import checkpoint, recipe, run  # noqa: E402
from tfkern.train.evaluate import evaluate  # noqa: E402
from tfkern.train.objective import CrossEntropy  # noqa: E402
from tfkern.train.tasks import task  # noqa: E402

WORDS = "time year people way day man thing woman life child world school state family".split()
TINY = {"dim": 16, "layers": 1, "heads": 2}


@pytest.fixture(autouse=True)
def _small(one_thread, monkeypatch):
    """All models here are small, and nobody waits for the speed of the machine or for charts."""
    monkeypatch.setattr("tfkern.cli.train.product_ceiling", lambda dtype, device: 1e11)
    monkeypatch.setattr("tfkern.train.chart.draw", lambda *arguments: None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    sentences = (" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(1200))
    lines = [f"{sentence.capitalize()}." for sentence in sentences]
    paragraphs = [" ".join(lines[i : i + 4]) for i in range(0, len(lines), 4)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    return folder / "text.txt"


@pytest.fixture(scope="module")
def data(texts):
    """The folder of the text, prepared."""
    told = Preparation(
        input=str(texts), output=str(texts.parent / "out"), tokenizer="characters", validation=0.1,
        files=2,
    )  # fmt: skip
    return preparation.prepare(told, workers=1)


def made(folder, data, **changes):
    """A recipe that takes a second. The data are a folder, or the recipe of their preparation."""
    told = {
        "out": str(folder), "task": "causal", "length": 16, "batch": 4,
        "data": data if isinstance(data, dict) else str(data),
        "model": TINY | {"dropout": 0.1}, "steps": 12, "evaluate_every": 5, "save_every": 4,
        "evaluation_batches": 3, "optimiser": {"kind": "adamw", "lr": 0.01},
    }  # fmt: skip
    return recipe.made(told | changes)


def weights(folder):
    """All tensors of the last checkpoint."""
    from safetensors.torch import load_file

    (file,) = checkpoint.latest(Path(folder) / "checkpoints").glob("*.safetensors")
    return load_file(file)


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """Step and loss of each step, and of each evaluation."""
    found = lines(folder)
    steps = [(line["step"], line["loss"]) for line in found if "loss" in line]
    return steps, [(line["step"], line["validation_loss"]) for line in found if "loss" not in line]


def assert_same_run(folder, expected):
    assert losses(folder) == losses(expected)
    found, whole = weights(folder), weights(expected)
    assert found.keys() == whole.keys()
    assert [name for name in found if not torch.equal(found[name], whole[name])] == []
    a, b = (models.load(Path(f) / "model").state_dict() for f in (folder, expected))
    assert all(torch.equal(a[name], b[name]) for name in b)


# Runs


def test_a_run_writes_what_it_says(tmp_path, data, monkeypatch):
    monkeypatch.undo()
    told = []
    outcome = run(made(tmp_path / "out", data), told=told.append, ceiling=lambda: 1e10)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} - {"tensorboard"} == {
        ".lock", "recipe.yaml", "metrics.jsonl", "loss.png", "checkpoints", "model",
    }  # fmt: skip
    assert lines(out) == told
    steps, evaluations = losses(out)
    assert [step for step, _ in steps] == list(range(1, 13))
    assert [step for step, _ in evaluations] == [5, 10, 12]
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000008", "step-00000012"}
    assert outcome == (12, "steps", min(loss for _, loss in evaluations), out / "model")
    for line in told:
        if "loss" in line:
            share = line["flops_per_second"] / 1e10
            assert line["share_of_ceiling"] == pytest.approx(share)
            assert line["tokens"] == 64 and line["tokens_per_second"] == 64 / line["seconds"]
    assert recipe.load(out / "recipe.yaml", {}) == made(out, data)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_model_has_the_weights_of_the_best_evaluation(tmp_path, data):
    """With steps of 0.5 in each weight, the last evaluation is not the best one."""
    wild = {"kind": "lion", "lr": 0.5}
    outcome = run(made(tmp_path, data, optimiser=wild, evaluate_every=2))
    _, evaluations = losses(tmp_path)
    best = min(loss for _, loss in evaluations)
    assert best == outcome.validation_loss < evaluations[-1][1]
    model = models.load(outcome.model)
    held = task("causal", data, length=16, batch=4, validation_batches=3).validation
    assert evaluate(model, held, CrossEntropy()).loss == pytest.approx(best, abs=1e-5)
    assert tokenize.load(outcome.model).vocab_size == model.config.vocab_size


def test_limits_end_a_run(tmp_path, data):
    outcome = run(made(tmp_path / "a", data, tokens=5 * 64 + 1))
    assert outcome[:2] == (6, "steps")
    outcome = run(made(tmp_path / "b", data, minutes=1e-9))
    assert outcome[:2] == (1, "minutes")
    assert losses(tmp_path / "b")[1][0][0] == 1
    still = {"kind": "adamw", "lr": 0.0}
    outcome = run(made(tmp_path / "c", data, steps=60, patience=2, optimiser=still))
    assert outcome[:2] == (15, "patience")
    assert run(made(tmp_path / "c", data, steps=60, patience=2, optimiser=still)) == outcome
    longer = run(made(tmp_path / "c", data, steps=60, patience=3, optimiser=still))
    assert longer[:2] == (20, "patience")


CASES = {
    "adamw": {},
    "muon, accumulation": {"optimiser": {"kind": "muon", "lr": 0.01}, "accumulate": 2},
    "float16": {"precision": "float16"},
    "cosine, recomputed": {"schedule": {"kind": "cosine", "warmup": 3}, "recompute": True},
    "batch norm": {"model": TINY | {"norm": "batch_norm"}},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(tmp_path, data, changes):
    run(made(tmp_path / "whole", data, **changes))
    parts = made(tmp_path / "parts", data, **changes)
    for i, stop in enumerate((1, 2, 4, 5), 1):
        asked = iter(range(1, 100))
        outcome = run(parts, stopped=lambda asked=asked, stop=stop: next(asked) == stop)
        assert outcome.reason == "stopped" and outcome.step == (0, 1, 3, 7, 12)[i]
        if i == 3:
            break
    assert run(parts).reason == "steps"
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    before = (tmp_path / "parts" / "metrics.jsonl").read_bytes()
    assert run(parts)[:2] == (12, "steps")  # nothing is left to do
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == before


def test_a_longer_run_goes_on_unless_its_schedule_is_another(tmp_path, data):
    run(made(tmp_path / "a", data, steps=8))
    run(made(tmp_path / "a", data, steps=12, evaluate_every=3))
    assert [step for step, _ in losses(tmp_path / "a")[0]] == list(range(1, 13))
    cosine = {"schedule": {"kind": "cosine", "warmup": 2}}
    run(made(tmp_path / "b", data, steps=8, **cosine))
    with pytest.raises(ValueError, match="schedule.steps is 8 there, 12 here"):
        run(made(tmp_path / "b", data, steps=12, **cosine))


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"batch": 5}, "batch is 4 there, 5 here"),
        ({"model": TINY | {"dim": 32}}, "model.dim is 16 there, 32 here"),
        ({"clip_norm": None}, "clip_norm is 1.0 there, None here"),
        ({"optimiser": {"kind": "adamw", "lr": 0.02}}, "optimiser.lr is 0.01 there, 0.02 here"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, data, changes, told):
    run(made(tmp_path, data))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=told):
        run(made(tmp_path, data, **changes))
    assert contents(tmp_path) == before


def contents(folder):
    """All files below a folder, with their bytes."""
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# The command


def called(capsys, *arguments):
    """Status, stdout and stderr of `tfkern train`."""
    status = cli.main(["train", *map(str, arguments)])
    output = capsys.readouterr()
    return status, output.out, output.err


def written(path, told):
    path.write_text(yaml.safe_dump(recipe.plain(told)))
    return path


def test_the_command_trains_and_sample_reads_its_model(tmp_path, data, capsys):
    path = written(tmp_path / "recipe.yaml", made(tmp_path / "out", data))
    status, out, err = called(capsys, path, "steps=6", "model.dim=8", "optimiser.lr=2e-3")
    assert status == 0, err
    assert "ended after step 6 (steps), best validation loss " in out
    assert out.endswith(f"{tmp_path / 'out' / 'model'}\n")
    assert out.count("step 5: training ") == 1
    told = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (told["steps"], told["model"]["dim"], told["optimiser"]["lr"]) == (6, 8, 0.002)
    arguments = ["sample", str(tmp_path / "out" / "model"), "The ", "--samples", "3"]
    assert cli.main([*arguments, "--max-tokens", "9"]) == 0, capsys.readouterr().err
    texts = capsys.readouterr().out.split("--- ")[1:]
    assert len(texts) == 3 and any(any(map(str.isalpha, text)) for text in texts)


def test_the_command_prepares_data(tmp_path, texts, capsys):
    told = {"input": str(texts), "tokenizer": "characters", "validation": 0.1, "files": 2}
    path = written(tmp_path / "r.yaml", made(tmp_path / "out", told, steps=2))
    status, out, err = called(capsys, path)
    assert status == 0, err
    assert called(capsys, path)[0] == 0
    assert len(list((tmp_path / "out" / "data").iterdir())) == 1
    assert [step for step, _ in losses(tmp_path / "out")[0]] == [1, 2]


def test_preparation_is_told(tmp_path, texts):
    data = {"input": str(texts), "tokenizer": "characters", "validation": 0.1, "files": 2}
    told = []
    run(made(tmp_path / "out", data, steps=1), preparing=lambda *doing: told.append(doing))
    stages = [name for name, done, total in told if done == total]
    assert len(set(stages)) > 2 and all(0 <= done <= total for _, done, total in told)


def test_the_recipes_are_listed(capsys):
    status, out, _ = called(capsys, "--list")
    assert status == 0
    for name in recipe.shipped():
        assert name in out
    assert len(recipe.shipped()) >= 7
    for arguments in (["--list", "t5"], []):
        status, out, err = called(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)


BAD = [
    ({"nope": 1}, "'nope' is not one of out, task"),
    ({"out": None}, "a recipe needs out"),
    ({"out": 3}, "out must be a string, got 3"),
    ({"task": "nope"}, "must be one of causal"),
    ({"task": 3}, "task must be a string"),
    ({"options": {"nope": 1}}, "causal has no option 'nope'"),
    ({"options": {"length": 3}}, "options has no option 'length'"),
    ({"options": [1]}, "options must be a mapping of names, got [1]"),
    ({"data": 3}, "data must be a path or a mapping, got 3"),
    ({"data": "/nowhere"}, "/nowhere"),
    ({"data": {"nope": 1}}, "nope"),
    ({"data": {"input": "/nowhere", "output": "/x"}}, "data has no output"),
    ({"data": {"input": "/nowhere"}}, "/nowhere"),
    ({"data": {}}, "input"),
    ({"length": 0}, "length must be an integer of at least 1, got 0"),
    ({"length": 10**6}, "tokens"),
    ({"length": True}, "length must be an integer of at least 1, got True"),
    ({"batch": "4"}, "batch must be an integer of at least 1, got '4'"),
    ({"accumulate": 5}, "accumulate must be at most batch = 4, got 5"),
    ({"steps": 1.5}, "steps must be an integer of at least 1, got 1.5"),
    ({"tokens": 0}, "tokens must be an integer of at least 1, got 0"),
    ({"minutes": -1}, "minutes must be a number"),
    ({"patience": 0}, "patience must be an integer of at least 1"),
    ({"keep": 0}, "keep must be an integer of at least 1"),
    ({"seed": -1}, "seed must be an integer in [0, 4294967295], got -1"),
    ({"seed": 2**32}, "seed must be an integer in [0, 4294967295], got 4294967296"),
    ({"precision": "float8"}, "precision must be one of float32, bfloat16, float16, got 'float8'"),
    ({"clip_norm": 0}, "clip_norm must be a number"),
    ({"label_smoothing": 2}, "label_smoothing must be a number in [0, 1], got 2"),
    ({"weights": 3}, "weights must be numbers, got 3"),
    ({"weights": [1, 2]}, "there are 1 results and 2 weights"),
    ({"compile": 1}, "compile must be true or false, got 1"),
    ({"device": "abacus"}, "unknown device 'abacus'"),
    ({"device": 3}, "device must be a string, got 3"),
    ({"model": {"dim": 16, "layers": 1}}, "model needs heads, or a preset"),
    ({"model": {}}, "model needs dim, heads, layers, or a preset"),
    ({"model": TINY | {"nope": 1}}, "model: 'nope' is no field"),
    ({"model": TINY | {"heads": 3}}, "model: dim must be a multiple of heads, got 16 and 3"),
    ({"model": TINY | {"dim": "16"}}, "model: dim must be"),
    ({"model": TINY | {"head": "mlm"}}, "model: causal needs head 'lm', got 'mlm'"),
    ({"model": TINY | {"architecture": "encoder"}}, "causal needs architecture 'decoder'"),
    ({"model": TINY | {"vocab_size": 3}}, "model: vocab_size is 3, and the tokenizer has"),
    ({"model": TINY | {"vocab_size": "x"}}, "model: vocab_size must be"),
    ({"model": TINY | {"max_length": 8}}, "with a length up to 8"),
    ({"model": {"preset": "nope"}}, "model: unknown preset 'nope'"),
    ({"model": {"preset": ["gpt2"]}}, "model: "),
    ({"model": {"preset": "bert-base-uncased"}}, "'decoder', and bert-base-uncased is 'encoder'"),
    ({"model": {"preset": "t5-base"}}, "'decoder', and t5-base is 'encoder_decoder'"),
    ({"optimiser": {"kind": "nope", "lr": 1}}, "optimiser must be one of adamw"),
    ({"optimiser": {"kind": "adamw"}}, "optimiser needs lr"),
    ({"optimiser": {"lr": 1}}, "optimiser needs kind"),
    ({"optimiser": {"kind": "adamw", "lr": 1, "nope": 1}}, "option 'nope' is not one of"),
    ({"optimiser": {"kind": "adamw", "lr": "x"}}, "lr must be a number"),
    ({"optimiser": {"kind": "adamw", "lr": 1, "model": 1}}, "optimiser has no option 'model'"),
    ({"schedule": {"kind": "nope"}}, "schedule must be one of"),
    ({"schedule": {"kind": "cosine", "warmup": 100}}, "warmup must be no longer than the 12 steps"),
    ({"schedule": {"kind": "cosine", "steps": 100}}, "schedule has no option 'steps'"),
]


@pytest.mark.parametrize("changes, told", BAD, ids=[str(changes)[:60] for changes, _ in BAD])
def test_a_bad_recipe_is_one_line_and_status_2(tmp_path, data, capsys, changes, told):
    path = tmp_path / "recipe.yaml"
    good = recipe.plain(made(tmp_path / "out", data))
    path.write_text(yaml.safe_dump(good | changes))
    status, out, err = called(capsys, path)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert told in err and "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} <= {"recipe.yaml", "out"}
    ours = {str(tmp_path / "out" / name) for name in ("recipe.yaml", ".lock")}
    assert not contents(tmp_path / "out").keys() - ours


# These errors need the data, or what the task makes of them.
LATE = (
    "/nowhere", "tokens", "2 weights", "vocab_size is 3", "up to 8", "head 'lm'",
    "'decoder'",
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, told",
    [(c, t) for c, t in BAD if "data" not in c and not any(late in t for late in LATE)],
)
def test_what_can_be_known_is_told_before_data_are_prepared(
    tmp_path, texts, capsys, monkeypatch, changes, told
):
    def never(*args, **options):
        raise AssertionError("it began to prepare")

    monkeypatch.setattr("tfkern.data.prepare.prepare", never)
    path = tmp_path / "recipe.yaml"
    good = recipe.plain(made(tmp_path / "out", {"input": str(texts)}))
    path.write_text(yaml.safe_dump(good | changes))
    status, _, err = called(capsys, path)
    assert (status, err.count("\n")) == (2, 1), err
    assert told in err
    assert not (tmp_path / "out").exists()


def test_numbers_are_read_as_people_write_them(tmp_path):
    """YAML 1.1 takes 1e-3 for a text, since it has no point."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "out: o\ntask: causal\ndata: 1e3x\noptimiser: {kind: adamw, lr: 1e-3, eps: -2.5E+4}\n"
        "options: {a: 12, b: .5, c: 1_0, d: yes, e: 'e1'}\n"
    )
    found = recipe.load(path, {})
    assert found.optimiser == {"kind": "adamw", "lr": 1e-3, "eps": -2.5e4}
    assert found.options == {"a": 12, "b": 0.5, "c": 10, "d": True, "e": "e1"}
    assert found.data == "1e3x"


@pytest.mark.parametrize(
    "content, told",
    [
        ("a: [", "r.yaml"),
        ("- 1", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        (b"\xff\xfe\x00", "r.yaml"),
        ("out: !!python/object/apply:os.mkdir [/tmp/bang]", "r.yaml"),
        ("1: 2", "1 is not one of"),
        ("[" * 3000, "r.yaml"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, capsys, content, told):
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = called(capsys, path)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert told in err


def test_recipes_and_values_that_are_not_there(tmp_path, data, capsys):
    path = written(tmp_path / "r.yaml", made(tmp_path / "out", data))
    for arguments, told in (
        (["/nowhere.yaml"], "/nowhere.yaml"),
        ([tmp_path], "is neither a recipe (.yaml) nor one of"),
        (["nope"], "'nope' is neither a recipe (.yaml) nor one of bart, bert"),
        ([path, "steps"], "expected name=value"),
        ([path, "steps=1", "steps=2"], "steps is told twice: 1 and '2'"),
        ([path, "steps.x=1"], "steps is no mapping of the recipe"),
        ([path, "nope=1"], "'nope' is not one of"),
        ([path, "steps=["], "steps: "),
        (["gpt-characters", f"out={tmp_path / 'out'}"], "input"),
    ):
        status, out, err = called(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert told in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["notes.txt", "model/config.json", "data/x", "checkpoints/x", "recipe.yaml"]
)
def test_a_folder_with_the_files_of_others_is_left_alone(tmp_path, data, capsys, name):
    """Names that a run would use are no exception, nor is its own recipe beside them."""
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("out: mine")
    path = written(tmp_path / "r.yaml", made(out, data))
    status, _, err = called(capsys, path)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{out} holds {name.partition('/')[0]}, and has not been written by a run" in err
    assert contents(out) == {str(out / name): b"out: mine"}


def test_outputs_that_are_no_folders(tmp_path, data, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null/x"):
        path = written(tmp_path / "r.yaml", made(out, data))
        status, _, err = called(capsys, path)
        assert (status, err.count("\n")) == (2, 1), err
        assert f"out: {out}" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_what_the_dead_have_left_is_no_obstacle(tmp_path, data):
    told = made(tmp_path, data)
    asked = iter(range(1, 100))
    run(told, stopped=lambda: next(asked) == 6)
    (tmp_path / ".tfkern-abc").mkdir()
    (tmp_path / ".tfkern-abc" / "loss.png").write_text("half")
    with open(tmp_path / "metrics.jsonl", "a") as file:  # steps after the last checkpoint
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    (tmp_path / "notes.txt").write_text("mine")  # of the user, beside a run of ours
    assert run(told)[:2] == (12, "steps")
    assert [step for step, _ in losses(tmp_path)[0]] == list(range(1, 13))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_prepared_data_that_are_damaged(tmp_path, data, capsys):
    import shutil

    copy = tmp_path / "data"
    path = written(tmp_path / "r.yaml", made(tmp_path / "out", copy))
    manifest = (data / "manifest.json").read_bytes()
    for name, content in (
        ("manifest.json", b"{"),
        ("manifest.json", b"[]"),
        ("manifest.json", manifest[:100]),
        ("tokenizer", None),
        ("validation", None),
        ("train", None),
    ):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(data, copy)
        if content is None:
            shutil.rmtree(copy / name)
        else:
            (copy / name).write_bytes(content)
        status, _, err = called(capsys, path)
        assert (status, err.count("\n")) == (2, 1), err
        assert str(copy) in err
        assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_one_line_and_status_1(tmp_path, data, capsys):
    path = written(tmp_path / "r.yaml", made(tmp_path / "out", data, clip_norm=None))
    assert called(capsys, path, "steps=5", "save_every=1")[0] == 0
    before = weights(tmp_path / "out")
    (file,) = checkpoint.latest(tmp_path / "out" / "checkpoints").glob("*.safetensors")
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("model."))
    tensors[name].fill_(torch.nan)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        save_file(tensors, file, opened.metadata())
    status, _, err = called(capsys, path)
    assert (status, err.count("\n")) == (1, 1)
    assert "step 6: the loss is nan" in err
    assert before.keys() == weights(tmp_path / "out").keys()


# Signals


def started(path, *arguments):
    """The number of a process that runs the program as the shell would."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            with open(path.with_suffix(".log"), "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdout = os.fdopen(1, "w", buffering=1)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                sys.argv = ["tfkern", "train", str(path), *arguments]
                status = tfkern_program.main()
        finally:
            os._exit(status)
    return pid


def until(condition, pid):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the process has ended by itself"
        time.sleep(0.002)


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def done(folder):
    """How many steps are in the record so far."""
    path = Path(folder) / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, data, number, status):
    told = made(tmp_path / "out", data, steps=40, save_every=1000)
    run(replace(told, out=str(tmp_path / "whole")))
    path = written(tmp_path / "r.yaml", told)
    pid = started(path)
    until(lambda: done(told.out) >= 10, pid)
    os.kill(pid, number)
    log = tmp_path / "r.log"
    assert status_of(pid) == status, log.read_text()
    step = int(checkpoint.latest(tmp_path / "out" / "checkpoints").name.removeprefix("step-"))
    assert 10 <= step < 40
    assert f"interrupted after step {step}: the same command goes on" in log.read_text()
    assert status_of(started(path)) == 0, log.read_text()
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_second_signal_ends_at_once(tmp_path, data, monkeypatch):
    """The step after the first signal never ends."""
    stuck = tmp_path / "stuck"

    save = sys.modules["tfkern.train.run"]._Run._save

    def hangs(self, step):
        if checkpoint.latest(self.folder / "checkpoints") is None:  # the first evaluation
            return save(self, step)
        stuck.touch()
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(sys.modules["tfkern.train.run"]._Run, "_save", hangs)
    told = made(tmp_path / "out", data, steps=10**6, save_every=10**6)
    pid = started(written(tmp_path / "r.yaml", told))
    until(lambda: done(told.out) >= 5, pid)
    os.kill(pid, signal.SIGINT)
    until(stuck.exists, pid)
    os.kill(pid, signal.SIGINT)
    assert status_of(pid) == 130
    assert (tmp_path / "r.log").read_text().endswith("tfkern: interrupted\n")


def test_a_signal_before_the_first_step_ends_at_once(tmp_path, data, monkeypatch):
    waiting = tmp_path / "waiting"

    def hangs(*args, **options):
        waiting.touch()
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(sys.modules["tfkern.train.run"], "count_flops", hangs)
    told = made(tmp_path / "out", data)
    pid = started(written(tmp_path / "r.yaml", told))
    until(waiting.exists, pid)
    os.kill(pid, signal.SIGINT)
    assert status_of(pid) == 130


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path, data):
    told = made(tmp_path / "out", data, steps=60, save_every=7, evaluate_every=9)
    run(replace(told, out=str(tmp_path / "whole")))
    path = written(tmp_path / "r.yaml", told)
    kills = 0
    for delay in (0.0, 0.03, 0.07, 0.15):
        pid = started(path)
        before = done(told.out)
        until(lambda before=before: done(told.out) > before or done(told.out) == 60, pid)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        kills += status_of(pid) == -signal.SIGKILL
    assert kills >= 2
    assert status_of(started(path)) == 0, (tmp_path / "r.log").read_text()
    assert_same_run(tmp_path / "out", tmp_path / "whole")


# The recipes that come with the package


def rows(path):
    """Pairs of texts as JSON lines."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(200):
            words = list(rng.choice(WORDS, 4))
            row = {"source": " ".join(words), "target": " ".join(reversed(words))}
            file.write(json.dumps(row) + "\n")
    return str(path)


SMALL = {
    "gpt-characters": {},
    "gpt2-small": {"data.tokenizer": "bpe:300"},
    "bert": {"data.tokenizer": "wordpiece:300"},
    "bart": {"data.tokenizer": "bpe:300"},
    "t5": {"data.tokenizer": "unigram:60"},
    "translation": {"options": {"tokenizer": "bpe:300"}},
    "vit-digits": {},
}
# Recipes that go on with a model: its head, and the names in rows of their data.
GOING_ON = {
    "classification": ("mlm", ("text", "label")),
    "chat": ("lm", ("prompt", "completion")),
    "dpo": ("lm", ("prompt", "chosen", "rejected")),
    "rewards": ("lm", ("prompt", "chosen", "rejected")),
    "ppo": ("lm", ("prompt",)),
    "grpo": ("lm", ("prompt",)),
}


def test_every_recipe_is_tried():
    assert set(recipe.shipped()) == {*SMALL, *GOING_ON}


def tiny_changes(found, tmp_path):
    return {
        "out": str(tmp_path / "out"), "length": 32, "batch": 4, "steps": 2, "evaluation_batches": 1,
        "accumulate": min(found.accumulate, 2),
    } | ({"schedule.warmup": 1} if found.schedule.get("warmup") else {})  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_shipped_recipe_trains_small_models(tmp_path, texts, name):
    found = recipe.load(name, {})
    sizes = {"dim": 16, "layers": 1, "heads": 2, "hidden_dim": 32}
    if "encoder_layers" in repr(found.model) or found.task in ("denoising", "spans", "pairs"):
        sizes |= {"encoder_layers": 1}
    if found.task == "spans":
        sizes |= {"head_dim": 8}
    changes = tiny_changes(found, tmp_path) | {f"model.{k}": value for k, value in sizes.items()}
    if found.data == "pairs.jsonl":
        changes["data"] = rows(tmp_path / "pairs.jsonl")
    elif isinstance(found.data, dict):
        changes |= {"data.input": str(texts), "data.validation": 0.1, "data.files": 2}
    outcome = run(recipe.load(name, changes | SMALL[name]))
    assert outcome[:2] == (2, "steps")
    assert np.isfinite(outcome.validation_loss)
    full = found.model.get("preset")
    if full is not None:
        models.preset(full)


@pytest.mark.parametrize("name", GOING_ON)
def test_a_shipped_recipe_goes_on_with_small_models(tmp_path, name):
    head, names = GOING_ON[name]
    found, start = recipe.load(name, {}), tmp_path / "start"
    special = {role: f"<{role}>" for role in ("eos", "pad", "cls", "sep")}
    tokenizer = tokenize.Tokenizer(tokenize.characters(["abc: "]).backend, special)
    config = models.TransformerConfig(
        **TINY, vocab_size=tokenizer.vocab_size, max_length=64, head=head,
        architecture="encoder" if head == "mlm" else "decoder",
        end_token=tokenizer.special_id("eos"),
    )  # fmt: skip
    models.save(models.Transformer(config), start, form="tfkern")
    tokenize.save(tokenizer, start)
    rng = np.random.default_rng(0)
    with open(tmp_path / "rows.jsonl", "w") as file:
        for _ in range(60):
            row = {column: "".join(rng.choice(list("abc"), 5)) for column in names}
            if "label" in row:
                row["label"] = int(rng.integers(2))
            file.write(json.dumps(row) + "\n")
    changes = tiny_changes(found, tmp_path) | {
        "data": str(tmp_path / "rows.jsonl"), "model.folder": str(start), "length": 64,
    }  # fmt: skip
    if "reward" in found.rollouts:
        (tmp_path / "r.py").write_text("def score(prompts, answers): return map(len, answers)")
        changes |= {"rollouts.reward": f"{tmp_path / 'r.py'}:score", "rollouts.max_tokens": 4}
    outcome = run(recipe.load(name, changes))
    assert outcome[:2] == (2, "steps")
    assert np.isfinite(outcome.validation_loss)


# The folder of a run


def test_two_runs_at_a_time_in_one_folder_are_refused(tmp_path, data):
    told = made(tmp_path / "out", data)
    refused = []

    def during(line):
        if line["step"] == 2 and not refused:
            with pytest.raises(ValueError, match="another run is at work"):
                run(told)
            refused.append(True)

    run(told, told=during)
    assert refused and [line["step"] for line in lines(tmp_path / "out") if "loss" in line] == [
        *range(1, 13)
    ]


def test_a_run_that_has_lost_its_checkpoints_is_left_alone(tmp_path, data):
    told = made(tmp_path / "out", data)
    run(told)
    for path in sorted((tmp_path / "out" / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="a run without its checkpoints"):
        run(told)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_what_has_been_evaluated_has_a_checkpoint(tmp_path, data):
    """So a run that is killed between its first evaluation and save_every goes on."""
    seen = []

    def during(line):
        if "validation_loss" in line:
            seen.append(checkpoint.latest(tmp_path / "out" / "checkpoints"))

    run(made(tmp_path / "out", data, save_every=1000, evaluate_every=5), told=during)
    assert seen[0] is not None and seen[0].name == "step-00000005"


def test_labels_of_classes_are_beside_the_model(tmp_path):
    rows = [{"text": word * 3, "label": word} for word in ("sea", "land") for _ in range(40)]
    texts = tmp_path / "rows.jsonl"
    texts.write_text("\n".join(json.dumps(row | {"text": f"{i} {row['text']}"})
                               for i, row in enumerate(rows)))  # fmt: skip
    changes = {"task": "classification", "options": {"tokenizer": "characters"}}
    run(made(tmp_path / "out", texts, **changes, length=24, steps=2))
    assert json.loads((tmp_path / "out" / "model" / "labels.json").read_text()) == ["land", "sea"]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"accumulate": 5}, "accumulate must be at most batch = 4, got 5"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used"),
        ({"schedule": {"kind": "cosine", "what": 1}}, "option 'what' is not one of"),
        ({"optimiser": {"kind": "lion", "lr": 10**400}}, "lr must be a number"),
    ],
)
def test_values_that_cannot_be(tmp_path, data, changes, told):
    with pytest.raises(ValueError, match=told):
        run(made(tmp_path / "out", data, **changes))


def test_lines_of_a_record(tmp_path):
    """JSON has no infinity, and a line in the middle that is damaged hides no others."""
    from tfkern.train.log import Log, read

    log = Log(tmp_path, 0)
    log.add({"step": 1, "loss": 2.0, "norm": float("inf")})
    log.close()
    path = tmp_path / "metrics.jsonl"
    assert read(path) == [{"step": 1, "loss": 2.0, "norm": None}]
    log = Log(tmp_path, 1)
    log.add({"step": 1, "validation_loss": float("nan")})
    log.close()
    again = Log(tmp_path, 1)
    again.close()
    for one in (log, again):  # a later evaluation that is finite is better
        assert one.evaluations == [(1, float("inf"))] and one.losses == [(1, 2.0)]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        Log(tmp_path, 0)
