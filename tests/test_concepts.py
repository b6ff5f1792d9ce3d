"""docs/concepts.md names code and tests that exist, for every concept, and its examples hold."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "concepts.md"
SECTIONS = dict(s.split("\n\n", 1) for s in PAGE.read_text().split("\n### ")[1:])
CONCEPTS = (
    "Tokenization", "Embeddings", "Positions", "Encoder", "Decoder", "Normalisation",
    "Residual connections", "Feed-forward", "Hard and soft attention",
    "Global and local attention", "Dot-product attention", "Self-attention", "Masked attention",
    "Cross-attention", "Multi-head attention", "Aggregated context", "Autoregression",
    "Projection", "Sampling",
)  # fmt: skip


def named(section, kind):
    (line,) = re.findall(rf"^- {kind}: (.+)$", section, re.M)
    return re.findall(r"`([^`]+)`", line)


def resolve(name):
    """The object of a dotted name, whose modules are imported on the way."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("tfkern"):
                pytest.skip(f"{error.name} is not installed")
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def test_every_concept_is_there():
    assert set(SECTIONS) == set(CONCEPTS)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_concept(concept):
    section = SECTIONS[concept]
    text = section.partition("\n\n")[0]
    assert len(re.findall(r"[.](?=\s|$)", text)) == 2, "two sentences"
    tests = named(section, "tests") + re.findall(r"`(test_\w+\.py::\w+)`", section)
    assert named(section, "tests")
    for name in tests:
        file, _, function = name.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        functions = {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
        assert function in functions, name
    names = named(section, "code")
    assert names
    for name in names:
        assert callable(resolve(name)), name


def test_examples():
    results = doctest.testfile(str(PAGE), module_relative=False)
    assert results.attempted > 10 and results.failed == 0
