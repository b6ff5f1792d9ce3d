"""What README shows does what it says."""

import re
from pathlib import Path

import feature_table
import pytest
import speed_table
import token_shards
import torch

import tfkern
import tfkern.models
from tfkern.benchmarks import report

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
    exec(BLOCKS[7], names)
    assert "NaN" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="outside the error limits"):
        names["report"].check()


def test_feature_table():
    """The table is what the parameters of the tests and the answers of the backends say."""
    pytest.importorskip("triton")
    if tfkern.backends("attention")["native"]:
        pytest.skip("no native build")
    printed = README.read_text().partition("<!-- features -->\n")[2].partition("<!-- /")[0]
    assert printed == feature_table.table()


def test_speed_table():
    """The table is what the files of results say."""
    printed = README.read_text().partition("<!-- speed -->\n")[2].partition("<!-- /")[0]
    assert printed == speed_table.table() != ""


def test_gpu_tables():
    """They are what the files of results say, and not there before there is a file."""
    printed = README.read_text().partition("<!-- gpu -->\n")[2].partition("<!-- /")[0]
    assert printed == speed_table.gpu_tables()


def test_gpu_tables_of_a_file(monkeypatch, tmp_path):
    facts = {"device": "H100", "driver": "580", "torch": "2.11", "triton": "3.6", "commit": "abc"}
    facts |= {"date": "2026-11-23T01:02", "unit": "TFLOP/s"}

    def row(op, case, pass_, variant, rate, ratio=""):
        names = "op", "case", "pass", "variant", "rate", "ratio_p50"
        return dict(zip(names, (op, case, pass_, variant, rate, ratio), strict=True)) | facts

    case = "B=4 H=16 T=4096 D=128 full"
    rows = [
        row("probe", "product", "forward", "torch", 781.2),
        row("attention", case, "forward", "sdpa cudnn", 582.33, 1.0),
        row("attention", case, "forward", "tfkern triton", 291.17, 0.5),
        row("attention", case, "forward", "tfkern native", 436.7, 0.7499),
        row("attention", case, "forward", "flex", ""),
        row("attention", case, "forward+backward", "sdpa cudnn", 1.0),
        row("attention", "B=32 H=16 T=512 D=128 full", "forward", "sdpa cudnn", 1.0),
    ]
    path = report.update(tmp_path / "h100.csv", rows, bool, lambda row: 0)
    monkeypatch.setattr(speed_table, "GPU_FILES", [path])
    head = "op | case | pass | unit | sdpa cudnn | tfkern triton | tfkern native | flex"
    assert speed_table.gpu_tables().splitlines() == [
        "H100: product 781.2 TFLOP/s",
        "",
        f"| {head} | tfkern / torch |",
        "| " + " | ".join(["---"] * 9) + " |",
        f"| attention | {case} | forward | TFLOP/s | 582 | 291 | 437 |  | 0.75 |",
        "",
        "- driver 580, torch 2.11, triton 3.6, tfkern at commit abc, 2026-11-23",
    ]


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


def test_models(tmp_path):
    pytest.importorskip("safetensors")
    from tfkern.models import TransformerConfig, save

    bert = tfkern.models.preset("bert-base-uncased", dim=24, heads=2, layers=1, vocab_size=20)
    save(tfkern.models.Transformer(bert), tmp_path / "bert")
    small = TransformerConfig(dim=24, heads=2, layers=1, vocab_size=20, max_length=8)
    tokens = torch.randint(20, (2, 5))
    names = {
        "tokens": tokens, "targets": tokens, "mask": tokens >= 0, "types": torch.zeros_like(tokens)
    }  # fmt: skip
    code = BLOCKS[2].replace("path/of", str(tmp_path))
    code = code.replace("loss =", "model = Transformer(small)\nloss =")
    exec(code, names | {"small": small})
    assert (tmp_path / "mine" / "model.safetensors").exists()


def test_text(tmp_path, capsys):
    pytest.importorskip("safetensors")
    tokenize = pytest.importorskip("tfkern.tokenize")
    from tfkern.models import TransformerConfig, load, save

    tokenizer = tokenize.train("bpe", ["Once upon a time"], 270)
    small = TransformerConfig(
        dim=24, heads=2, layers=1, vocab_size=tokenizer.vocab_size, max_length=90
    )
    save(tfkern.models.Transformer(small), tmp_path / "gpt2")
    tokenize.save(tokenizer, tmp_path / "gpt2")
    names = {"load": load}
    exec(BLOCKS[3].replace("path/of", str(tmp_path)), names)
    assert len(names["texts"]) == len(names["rows"]) == 2 and len(names["best"][0]) == 1


def test_integrations(tmp_path):
    huggingface = pytest.importorskip("huggingface")
    huggingface.CASES["gpt2"].model(dtype=torch.float32).save_pretrained(tmp_path)
    names = {
        "AutoModel": huggingface.transformers.AutoModelForCausalLM, "path": tmp_path,
        "tokens": torch.randint(20, (2, 5)), "nn": torch.nn,
    }  # fmt: skip
    exec(BLOCKS[4], names)
    assert names["model"].config._attn_implementation == "tfkern"
    assert isinstance(names["block"], torch.nn.Module)


def test_data(tmp_path):
    pytest.importorskip("grain")
    from tfkern.models import Transformer, TransformerConfig, cross_entropy

    token_shards.write(tmp_path / "shards", [[[*range(1, 20), token_shards.END]] * 30])
    small = TransformerConfig(dim=24, heads=2, layers=1, vocab_size=20, max_length=64)
    names = {"model": Transformer(small), "cross_entropy": cross_entropy}
    exec(BLOCKS[5].replace("path/of", str(tmp_path)), names)
    assert names["batch"]["tokens"].shape == (8, 64) and names["loss"] > 0


def test_training(tmp_path, monkeypatch):
    """The loop goes on from its last checkpoint, and gets the loss down."""
    pytest.importorskip("grain")
    from tfkern.data import Shards, Windows, order
    from tfkern.models import Transformer, TransformerConfig

    monkeypatch.chdir(tmp_path)
    token_shards.write(tmp_path / "shards", [[[*range(1, 20), token_shards.END]] * 30])
    small = TransformerConfig(dim=24, heads=2, layers=1, vocab_size=20, max_length=8)
    code = BLOCKS[6].replace("2000", "6").replace("100", "2").replace("500", "3")
    for _ in range(2):
        torch.manual_seed(0)
        names = {
            "torch": torch,
            "model": Transformer(small),
            "batches": order([Windows(Shards("shards"), 8)], batch=8, seed=7),
        }
        exec(code, names)
        code = code.replace("stop=6", "stop=9")
    assert names["start"] == 6 and names["record"].step == 9 and names["record"].loss < 3
    assert sorted(p.name for p in Path("checkpoints").iterdir()) == [
        "step-00000003", "step-00000006", "step-00000009"
    ]  # fmt: skip


def test_the_loop_of_the_page_on_training(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datatrove")
    from tfkern.data.prepare import prepare
    from tfkern.data.prepare.recipe import Recipe

    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A man went to the sea.\n\nHe saw no ship.\n\n" * 99)
    recipe = Recipe(input="text.txt", output="out", tokenizer="characters", split="line")
    page = (README.parent / "docs" / "training.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    for a, b in (
        ("2000", "4"),
        ("100", "1"),
        ("250", "2"),
        ("=64", "=16"),
        ("=12", "=2"),
        ("128", "8"),
    ):
        code = code.replace(a, b)
    exec(code, {"folder": prepare(recipe, workers=1)})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[-2:]] == ["2", "4"] and float(lines[-1][2]) < 4


def test_files_that_it_names_exist():
    text = README.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (README.parent / link).exists(), link
