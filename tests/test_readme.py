"""What README shows does what it says."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_layer_in_a_users_model():
    names = {}
    exec(BLOCKS[0], names)
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    y, h = names["Attention"](24, 3)(x, residual)
    assert y.shape == x.shape
    torch.testing.assert_close(h, x + residual)


def test_check_of_a_kernel(capsys):
    names = {}
    exec(BLOCKS[1], names)
    assert "NaN" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="outside the error limits"):
        names["report"].check()


def test_files_that_it_names_exist():
    text = README.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (README.parent / link).exists(), link
