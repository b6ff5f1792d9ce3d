"""What models are trained on: texts come back from batches, and batches depend on nothing else."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("grain")
pytest.importorskip("datatrove")

from tfkern.data import Shards  # noqa: E402
from tfkern.data.prepare import Recipe, prepare  # noqa: E402
from tfkern.models import Transformer, TransformerConfig  # noqa: E402
from tfkern.train.objective import CrossEntropy  # noqa: E402
from tfkern.train.tasks import task  # noqa: E402

WORDS = "time year people way day man thing woman life child world school state family".split()
TINY = {"dim": 32, "layers": 2, "heads": 2}


def paragraph(rng):
    sentences = [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(rng.integers(2, 7))]
    return " ".join(f"{s.capitalize()}." for s in sentences)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of a text of 300 paragraphs, for each kind of tokenizer."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("\n\n".join(paragraph(rng) for _ in range(300)))
    made = {}

    def get(tokenizer="characters"):
        if tokenizer not in made:
            recipe = Recipe(
                input=str(folder / "text.txt"), output=str(folder / "out"), tokenizer=tokenizer,
                validation=0.1, files=2,
            )  # fmt: skip
            made[tokenizer] = prepare(recipe, workers=1)
        return made[tokenizer]

    return get


def fresh_loss(found, batch):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**TINY, **found.config)).eval()
    inputs = {name: x for name, x in batch.items() if name != "targets"}
    return CrossEntropy()(model(**inputs), batch).mean.tolist()


def close(loss):
    return pytest.approx(loss, abs=0.5)


def test_causal_rows_are_the_stream(prepared):
    folder = prepared()
    found = task("causal", folder, length=32, batch=4, seed=5)
    shards = Shards(folder / "train")
    stream = shards.read(0, shards.tokens).tolist()
    windows = {tuple(stream[i : i + 32]): stream[i + 1 : i + 33] for i in range(len(stream) - 32)}
    for step in range(8):
        batch = found.batches[step]
        assert {name: x.shape for name, x in batch.items()} == {
            "tokens": (4, 32),
            "targets": (4, 32),
        }
        for row, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
            assert windows[tuple(row)] == targets
    assert fresh_loss(found, batch)[0] == pytest.approx(
        math.log(found.config["vocab_size"]), abs=0.5
    )
