"""Recipes of alignment: adapters, preferences, reward models and rewards, from data to a folder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("grain")
pytest.importorskip("datatrove")

from tfkern import models, tokenize  # noqa: E402
from tfkern.models import Transformer, TransformerConfig  # noqa: E402
from tfkern.models.adapters import load_adapter  # noqa: E402
from tfkern.train import recipe, run, task  # noqa: E402
from tfkern.train.lessons import reward_for  # noqa: E402
from tfkern.train.log import read  # noqa: E402
from tfkern.train.objectives import check_axes  # noqa: E402

LETTERS = "abcdefgh"


@pytest.fixture(autouse=True)
def _small(one_thread, monkeypatch):
    """All models here are small, and nobody waits for charts."""
    monkeypatch.setattr("tfkern.train.chart.draw", lambda *arguments: None)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a small fresh decoder of letters."""
    folder = tmp_path_factory.mktemp("start")
    found = tokenize.Tokenizer(
        tokenize.characters([LETTERS + ":"]).backend, {"eos": "<|endoftext|>"}
    )
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=found.vocab_size, max_length=24, dim=32, layers=2, heads=2,
        architecture="decoder", head="lm", end_token=found.special_id("eos"),
    )  # fmt: skip
    models.save(Transformer(config), folder, form="tfkern")
    tokenize.save(found, folder)
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count, seed=0):
    """A prompt, and two answers: letters of the first half of the alphabet, and of the second."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        prompt = "".join(rng.choice(list(LETTERS), 3)) + ":"
        good, bad = ("".join(rng.choice(list(x), 4)) for x in (LETTERS[:4], LETTERS[4:]))
        yield prompt, good, bad


def pairs(count=60):
    return [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in texts(count)]


def labelled(count=60):
    for i, (p, good, bad) in enumerate(texts(count)):
        yield {"prompt": p, "completion": bad if i % 2 else good, "label": i % 2 == 0}


def made(tmp_path, kind, rows, start, **changes):
    told = {
        "out": str(tmp_path / "out"), "task": kind, "data": str(lines(tmp_path / "rows", rows)),
        "length": 16, "batch": 8, "model": {"folder": str(start)}, "steps": 12,
        "evaluate_every": 4, "save_every": 4, "evaluation_batches": 4, "seed": 1,
        "optimiser": {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.0},
        "options": {"validation": 0.2},
    }  # fmt: skip
    return recipe.made(told | changes)


def evaluations(found):
    return [
        line for line in read(found.model.parent / "metrics.jsonl") if "validation_loss" in line
    ]


def state(folder):
    return models.load(folder).state_dict()


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_preferences_are_learned_against_a_reference(tmp_path, start, lora):
    """The loss begins at ln 2, with and without adapters, and all pairs come to be told apart."""
    told = made(
        tmp_path, "preferences", pairs(), start, objective={"kind": "dpo", "beta": 0.3}, lora=lora,
        optimiser={"kind": "adamw", "lr": 1e-2, "weight_decay": 0.0}, steps=20,
    )  # fmt: skip
    found = run(told)
    first = read(tmp_path / "out" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    last = evaluations(found)[-1]
    assert last["accuracy"] > 0.9 and last["validation_loss"] < 0.5
    assert state(found.model).keys() == state(start).keys()
    if lora is not None:
        model = models.load(start)
        load_adapter(model, tmp_path / "out" / "adapter")
        tokens = torch.randint(8, (2, 9))
        expected = models.load(found.model)(tokens)
        torch.testing.assert_close(model.eval()(tokens), expected, rtol=1e-5, atol=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [
        "orpo", "kto", "rewards",
        *(pytest.param(kind, marks=SLOW) for kind in ("dpo", "hinge", "ipo", "simpo")),
    ],
)  # fmt: skip
def test_every_objective_has_a_recipe(tmp_path, start, kind):
    task = {"kto": "unpaired", "rewards": "rewards"}.get(kind, "preferences")
    rows = labelled() if kind == "kto" else pairs()
    found = run(made(tmp_path, task, rows, start, objective={"kind": kind}))
    seen = evaluations(found)
    assert seen[-1]["validation_loss"] < seen[0]["validation_loss"]
    config = models.load(found.model).config
    assert (config.head, config.classes) == (
        ("classification", 1) if kind == "rewards" else ("lm", None)
    )


def test_a_run_that_is_stopped_keeps_its_reference(tmp_path, start):
    """The weights are those of a run that was not stopped: the reference is that of its start."""
    options = {"objective": {"kind": "dpo"}, "steps": 8}
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run(made(tmp_path / "a", "preferences", pairs(), start, **options))
    told = made(tmp_path / "b", "preferences", pairs(), start, **options)
    asked = iter([False, False, False, True])
    assert run(told, stopped=lambda: next(asked)).reason == "stopped"
    again = run(told)
    for name, x in state(whole.model).items():
        assert torch.equal(x, state(again.model)[name]), name


REWARD = """
def score(prompts, answers, **columns):
    assert all(prompt.endswith(":") for prompt in prompts) and len(columns["bonus"]) == len(prompts)
    return [sum(c in "abcd" for c in answer) / 6 for answer in answers]
"""


@pytest.mark.parametrize(
    "kind", ["grpo", *(pytest.param(kind, marks=SLOW) for kind in ("ppo", "rloo"))]
)
def test_rewards_rise(tmp_path, start, kind):
    (tmp_path / "reward.py").write_text(REWARD)
    prompts = [{"prompt": prompt, "bonus": 1} for prompt, _, _ in texts(40)]
    rollouts = {"reward": f"{tmp_path / 'reward.py'}:score", "max_tokens": 6, "samples": 4}
    told = made(
        tmp_path, "prompts", prompts, start, objective={"kind": kind, "kl": 0.01}, steps=24,
        rollouts=rollouts | {"epochs": 2}, optimiser={"kind": "adamw", "lr": 3e-3},
        evaluate_every=8, save_every=8,
    )  # fmt: skip
    found = run(told)
    record = read(tmp_path / "out" / "metrics.jsonl")
    rounds = [line for line in record if "reward" in line]
    assert [line["number"] for line in rounds] == [i // 2 for i in range(24)]
    seen = evaluations(found)
    assert -seen[-1]["validation_loss"] > -seen[0]["validation_loss"] > 0
    assert rounds[-1]["reward"] > rounds[0]["reward"] + 0.05
    assert state(found.model).keys() == state(start).keys()


def test_a_reward_model_judges_answers(tmp_path, start):
    """PPO after the reward model: the critic begins with its weights, and adapters are trained."""
    for name in "ab":
        (tmp_path / name).mkdir()
    judge = run(made(tmp_path / "a", "rewards", pairs(), start, objective={"kind": "rewards"}))
    prompts = [{"prompt": prompt} for prompt, _, _ in texts(40)]
    told = made(
        tmp_path / "b", "prompts", prompts, start, objective={"kind": "ppo", "kl": 0.01},
        rollouts={"reward": str(judge.model), "max_tokens": 6}, lora={"rank": 4}, steps=8,
    )  # fmt: skip
    found = run(told)
    assert (tmp_path / "b" / "out" / "adapter" / "adapter_config.json").exists()
    lines = [line for line in read(tmp_path / "b" / "out" / "metrics.jsonl") if "kl" in line]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert state(found.model).keys() == state(start).keys()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("preferences", {}, "objective of the task preferences must be one of dpo, .*got 'cross_e"),
        ("chat", {"objective": {"kind": "dpo"}}, "of the task chat must be one of cross_entropy"),
        ("preferences", {"objective": {"kind": "dpo", "gamma": 1}}, "option 'gamma' is not one of"),
        ("preferences", {"objective": {"kind": "dpo", "beta": -1}}, "beta must be a number"),
        ("preferences", {"objective": {"kind": "dpo"}, "lora": {"rank": 0}}, "lora: rank must"),
        ("preferences", {"objective": {"kind": "dpo"}, "lora": {"ranks": 1}}, "lora: .*ranks"),
        ("preferences", {"objective": {"kind": "dpo"}, "lora": 3}, "lora must be a mapping"),
        ("preferences", {"objective": {"kind": "dpo"}, "lora": {"dtype": "x"}}, "lora: dtype must"),
        ("preferences", {"objective": {"kind": "dpo"}, "lora": {"dora": 1}}, "lora: dora must be"),
        ("preferences", {"objective": {"kind": "dpo"}, "lora": {"trained": 1}}, "lora: trained"),
        ("preferences", {"objective": {"kind": "dpo"}, "lora": {"targets": 1}}, "lora: targets"),
        ("preferences", {"objective": {"kind": "dpo"}, "rollouts": {"samples": 2}}, "are of the"),
        ("prompts", {"objective": {"kind": "grpo"}}, "reward must be the folder of"),
        ("prompts", {"objective": {"kind": "grpo"}, "rollouts": {"reward": "x.py:f"}}, "x.py: No"),
        ("prompts", {"objective": {"kind": "grpo"}, "rollouts": {"seed": 1}}, "rollouts has no"),
    ],
)  # fmt: skip
def test_recipes_that_do_not_fit(tmp_path, start, kind, changes, message):
    rows = [{"prompt": p, "completion": a} for p, a, _ in texts(30)]
    rows = pairs() if kind == "preferences" else rows
    with pytest.raises(ValueError, match=message):
        run(made(tmp_path, kind, rows, start, **changes))


def test_options_of_rollouts_are_named(tmp_path, start):
    (tmp_path / "reward.py").write_text(REWARD)
    reward = f"{tmp_path / 'reward.py'}:score"
    broken, scalar = tmp_path / "broken.py", tmp_path / "scalar.py"
    broken.write_text("def score(:")
    scalar.write_text("def score(prompts, answers):\n    return 5\n")
    rows = [{"prompt": p} for p, _, _ in texts(30)]
    options = {"objective": {"kind": "grpo"}}
    for rollouts, message in (
        ({"reward": reward}, "rollouts needs max_tokens"),
        ({"reward": reward, "max_tokens": 4, "sample": 2}, "option 'sample' is not one of"),
        ({"reward": reward, "max_tokens": 4, "samples": 1}, "samples must be an integer"),
        ({"reward": reward.replace("score", "core"), "max_tokens": 4}, "has no function 'core'"),
        (
            {"reward": reward, "max_tokens": 13, "samples": 2},
            "prompt of 4 tokens and max_tokens = ",
        ),
        ({"reward": f"{broken}:score", "max_tokens": 4}, "broken.py cannot be run: SyntaxError"),
        ({"reward": f"{scalar}:score", "max_tokens": 4, "samples": 2}, "each answer, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            run(made(tmp_path, "prompts", rows, start, **options, rollouts=rollouts))


def test_a_new_classifier_is_trained_beside_adapters(tmp_path, start):
    """As it was drawn it would tell nothing, so that peft saves that of a classifier, too."""
    options = {"objective": {"kind": "rewards"}, "lora": {"rank": 2}, "steps": 4}
    found = run(made(tmp_path, "rewards", pairs(), start, **options))
    about = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert about["modules_to_save"] == ["classifier"]
    (tmp_path / "again").mkdir()
    run(made(tmp_path / "again", "rewards", pairs(), found.model, **options))
    about = json.loads((tmp_path / "again/out/adapter/adapter_config.json").read_text())
    assert about["modules_to_save"] is None


@pytest.mark.parametrize("kind", ["int8", "weight_norm"])
def test_weights_that_take_no_adapters_up(tmp_path, start, kind):
    """The model of the best evaluation has its adapters in its weights."""
    folder, base = tmp_path / kind, models.load(start)
    if kind == "int8":
        models.quantize(base)
    else:
        base = Transformer(replace(base.config, norm="weight_norm"))
    models.save(base, folder, form="tfkern")
    tokenize.save(tokenize.load(start), folder)
    options = {"objective": {"kind": "dpo"}, "lora": {"rank": 2}}
    with pytest.raises(ValueError, match="lora: .*Linear has no weight of floating numbers"):
        run(made(tmp_path, "preferences", pairs(), folder, **options))


def test_a_reward_model_is_on_the_device_of_the_policy(tmp_path, start):
    judge = run(made(tmp_path, "rewards", pairs(), start, objective={"kind": "rewards"}, steps=1))
    told = lines(tmp_path / "prompts", [{"prompt": p} for p, _, _ in texts(30)])
    found = task("prompts", told, length=16, batch=4, start=start)
    reward = reward_for(str(judge.model), found, torch.device("meta"))
    assert {p.device.type for p in reward.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("kind", "axis", "others"),
    [
        ("preferences", "tp", "dp or fsdp"), ("unpaired", "pp", "dp or fsdp"),
        ("rewards", "cp", "dp or fsdp or tp"), ("prompts", "fsdp", "dp"),
    ],
)  # fmt: skip
def test_axes_along_which_no_model_learns_a_task(kind, axis, others):
    with pytest.raises(ValueError, match=f"task {kind} takes {others}, got {axis} = 2"):
        check_axes(kind, {"dp": 1, axis: 2})
    check_axes(kind, {"dp": 2, axis: 1})
    check_axes("chat", {"dp": 1, axis: 2})
