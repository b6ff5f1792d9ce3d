"""Runs of recipes learn what they are to learn: slow tests of whole runs."""

import gettext
import importlib.util
import json
import random
from pathlib import Path

import pytest

from tfkern import models, tokenize
from tfkern.generate import Sampling, complete
from tfkern.train import bleu, exact_match, run
from tfkern.train.recipe import load, made

pytest.importorskip("datatrove")
pytestmark = pytest.mark.slow


def written(folder, sources, max_tokens):
    """What the model of a run makes of sources, greedily."""
    model, tokenizer = models.load(folder).eval(), tokenize.load(folder)
    found = []
    for i in range(0, len(sources), 64):
        chosen = sources[i : i + 64]
        found += complete(model, tokenizer, chosen, max_tokens, sampling=Sampling(temperature=0))
    return found


def rows_file(path, pairs):
    rows = (json.dumps({"source": s, "target": t}) for s, t in pairs)
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def test_digits(tmp_path):
    """The recipe reads handwritten digits that it has not seen."""
    pytest.importorskip("sklearn")
    recipe = load("vit-digits", {"out": str(tmp_path / "run")})
    run(recipe)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    best = max(json.loads(line).get("accuracy", 0) for line in lines)
    assert best >= 0.95


def test_reversal(tmp_path, one_thread):
    """An encoder-decoder reverses rows of ten symbols that it has not seen, within 500 steps."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghijklm", k=10)) for _ in range(20_000)]
    recipe = made({
        "out": tmp_path / "run",
        "task": "pairs",
        "data": rows_file(tmp_path / "pairs.jsonl", ((t, t[::-1]) for t in texts)),
        "options": {"tokenizer": "characters", "validation": 0.02},
        "length": 12, "batch": 128, "steps": 500, "seed": 1,
        "model": {"dim": 64, "layers": 2, "encoder_layers": 2, "heads": 4},
        "optimiser": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"kind": "cosine", "warmup": 50},
    })  # fmt: skip
    outcome = run(recipe)
    unseen = ["".join(draw.choices("abcdefghijklm", k=10)) for _ in range(200)]
    assert exact_match(written(outcome.model, unseen, 11), [t[::-1] for t in unseen]) == 1


def test_translation(tmp_path, capsys):
    """A small 2017 model learns the Italian messages of Django by heart."""
    pytest.importorskip("sacrebleu")
    found = importlib.util.find_spec("django")
    if found is None:
        pytest.skip("django is not installed")
    pairs = {}
    for path in sorted(Path(found.origin).parent.rglob("it/LC_MESSAGES/*.mo")):
        with open(path, "rb") as file:
            messages = gettext.GNUTranslations(file)._catalog
        pairs |= {k: v for k, v in messages.items() if isinstance(k, str) and k and v}
    pairs = {k.rpartition("\x04")[2]: v for k, v in pairs.items() if max(len(k), len(v)) < 120}
    assert len(pairs) > 600
    recipe = made({
        "out": tmp_path / "run",
        "task": "pairs",
        "data": rows_file(tmp_path / "pairs.jsonl", pairs.items()),
        "options": {"tokenizer": "bpe:1000"},
        "length": 64, "batch": 48, "steps": 1000, "evaluate_every": 1000,
        "model": {"dim": 128, "layers": 2, "encoder_layers": 2, "heads": 4, "post_norm": True},
        "optimiser": {"kind": "adamw", "lr": 2e-3},
        "schedule": {"kind": "cosine", "warmup": 100},
    })  # fmt: skip
    outcome = run(recipe)
    from tfkern.data.prepare.tokens import share

    def held(pair):
        row = {"source": pair[0], "target": pair[1]}
        return share(json.dumps(row, sort_keys=True)) < 0.1

    scores = []
    for part in (False, True):
        chosen = [pair for pair in pairs.items() if held(pair) == part]
        texts = written(outcome.model, [source for source, _ in chosen], 63)
        scores.append(bleu(texts, [target for _, target in chosen]))
    with capsys.disabled():
        print(f"\nBLEU of {len(pairs)} pairs: learned {scores[0]:.1f}, unseen {scores[1]:.1f}")
    assert scores[0] >= 90
