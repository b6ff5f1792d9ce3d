"""What README shows does what it says."""

import re
from pathlib import Path

import features
import pytest
import speed
import torch

import tfkern

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
    exec(BLOCKS[2], names)
    assert "NaN" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="outside the error limits"):
        names["report"].check()


def test_feature_table():
    """The table is what the parameters of the tests and the answers of the backends say."""
    pytest.importorskip("triton")
    if tfkern.backends("attention")["native"]:
        pytest.skip("no native build")
    printed = README.read_text().partition("<!-- features -->\n")[2].partition("<!-- /")[0]
    assert printed == features.table()


def test_speed_table():
    """The table is what the files of results say."""
    printed = README.read_text().partition("<!-- speed -->\n")[2].partition("<!-- /")[0]
    assert printed == speed.table() != ""


def test_attention_examples():
    B, H, T, D = 2, 4, 12, 8
    q, k, v = (torch.randn(B, H, T, D) for _ in range(3))
    x = torch.randn(B, T, 5)
    qp, kp, vp = (torch.randn(15, H, D) for _ in range(3))
    names = {
        "tfkern": tfkern, "q": q, "k": k, "v": v, "x": x, "qp": qp, "kp": kp, "vp": vp,
        "bias": torch.randn(1, H, T, T), "mask": torch.ones(T, T, dtype=torch.bool),
        "slopes": torch.rand(H), "sink": torch.randn(H), "lengths": torch.tensor([12, 3]),
        "B": B, "Hk": H, "D": D, "k_pages": torch.randn(6, H, 4, D),
        "v_pages": torch.randn(6, H, 4, D), "table": torch.tensor([[5, 0, 1], [2, 0, 0]]),
    }  # fmt: skip
    exec(BLOCKS[1], names)
    assert names["p"].shape == (B, 1, 1, T) and names["o"].shape == (B, H, T, D)


def test_files_that_it_names_exist():
    text = README.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (README.parent / link).exists(), link
