"""Whole models next to other ways to run them. No test asserts a time."""

import os
import time
from dataclasses import replace
from pathlib import Path

import planted
import pytest
import torch

from tfkern.benchmarks import environment, generate, infer, peers, report, timing
from tfkern.benchmarks.case import FORWARD
from tfkern.benchmarks.peers import FIRST, NEXT, Peer
from tfkern.benchmarks.worker import Lost, Worker
from tfkern.cli import main

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "BertModel": {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    },
    "GPT2LMHeadModel": {
        "vocab_size": 101,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "initializer_range": 0.3,
    },
    "LlamaForCausalLM": {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    },
}


def tiny(suite, *more, shipped=("tfkern", "transformers sdpa")):
    """A suite with small cases, and more peers beside those that are always there."""
    cases = [
        replace(
            case,
            model=replace(case.model, sizes=case.model.sizes | TINY[case.model.kind]),
            length=min(case.length, 13),
            new=min(case.new, 5),
        )
        for case in suite.cases
    ]
    kept = [peer for peer in suite.peers if peer.name in shipped]
    first = {case.model.name: case for case in reversed(cases)}  # one of each model
    return replace(suite, cases=tuple(reversed(first.values())), peers=(*kept, *more), rounds=2)


class Inline:
    """A worker in this process, whose variables in `peers` are its own."""

    log: list[str] = []

    def __init__(self):
        self.own, self.name = {}, "author"

    def ask(self, function, *arguments):
        if function is peers._open:
            self.name = arguments[0].name
        Inline.log.append(f"{self.name}{function.__name__}")
        vars(peers).update(self.own)
        try:
            return function(*arguments, lambda doing: None)
        except Exception as error:
            raise Lost("", timing.reason(error)) from error
        finally:
            state = ("_opened", "_baseline", "_models", "_expected")
            self.own = {name: vars(peers)[name] for name in state if name in vars(peers)}

    def stop(self):
        pass

    finish = stop


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    monkeypatch.setattr(peers, "_process", Inline)
    monkeypatch.setattr(peers, "_hush", lambda: None)
    monkeypatch.setattr(peers, "_TURN", 1e-9)  # a turn has one call
    monkeypatch.setattr(Inline, "log", [])


def changed(name, peer, change):
    """A peer that changes what another one returns."""

    def opened(model, folder, dtype):
        call = peer.open(model, folder, dtype)
        return lambda *inputs: change(call, *inputs)

    return Peer(name, opened, modules=peer.modules)


SDPA = {suite.op: suite.peers[1] for suite in (infer.SUITE, generate.SUITE)}


def half_wrong(suite, name="planted"):
    """A peer with outputs twice as large, or one that writes the next token but one."""
    if suite is infer.SUITE:
        return changed(name, SDPA["infer"], lambda call, tokens: 2 * call(tokens))

    def other(call, tokens, new, take):
        call(tokens, new, lambda step: take([(token + 1) % 101 for token in step]))

    return changed(name, SDPA["generate"], other)


@pytest.mark.parametrize("suite", [infer.SUITE, generate.SUITE], ids=lambda suite: suite.op)
def test_rows(suite, tmp_path):
    suite = tiny(suite, changed("other", SDPA[suite.op], lambda call, *inputs: call(*inputs)))
    results = peers.run(suite, suite.models)
    assert not results.wrong and not results.notes
    passes = {"infer": (FORWARD,), "generate": (FIRST, NEXT)}[suite.op]
    assert [(r["case"], r["dtype"], r["pass"], r["against"]) for r in results.rows] == [
        (case.name, dtype, pass_, other)
        for case in suite.cases
        for dtype in ("float32", "bfloat16")
        for pass_ in passes
        for other in ("transformers sdpa", "other")
    ]
    for row in results.rows:
        case = next(case for case in suite.cases if case.name == row["case"])
        assert row["op"] == suite.op and row["variant"] == "tfkern"
        # one call in each of two rounds, or all steps of a call but the first
        assert row["pairs"] == (2 * (case.new - 1) if row["pass"] == NEXT else 2)
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["against_ms"] > 0
        assert row["ratio_p20"] <= row["ratio_p50"] <= row["ratio_p80"]
        tokens = case.rows * (1 if row["pass"] == NEXT else case.length)
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["p50_ms"], rel=1e-3)
        assert max(row["error"], row["against_error"]) < (1e-5 if "32" in row["dtype"] else 0.1)
        assert row["peak_bytes"] > 0 and row["against_peak_bytes"] > 0
        assert row["against_version"] == environment.installed("transformers")
        assert row["torch"] == torch.__version__ and row["command"] and row["device"]
    rows = report.read(suite.write(results.rows, tmp_path))
    assert [r["against"] for r in rows] == [r["against"] for r in results.rows]
    times, errors = report.peers_tables(results.rows)
    assert times.row_count == len(rows)
    assert errors.row_count == 3 * 2 * len(suite.cases)


@pytest.mark.parametrize("suite", [infer.SUITE, generate.SUITE], ids=lambda suite: suite.op)
def test_peers_take_turns(suite):
    suite = tiny(suite)
    suite = replace(suite, cases=suite.cases[:1])
    peers.run(suite, suite.models)
    names = ["tfkern", "transformers sdpa"]
    turns = [f"{name}_turn" for name in names]
    done = [call for call in Inline.log if not call.startswith("author_")]
    assert done == 2 * [
        *(f"{name}_open" for name in names),
        *(f"{name}_result" for name in names),
        *turns,
        *turns,
        *(f"{name}_peak" for name in names),
    ]


@pytest.mark.parametrize("suite", [infer.SUITE, generate.SUITE], ids=lambda suite: suite.op)
def test_a_wrong_peer_is_not_timed(suite):
    suite = tiny(suite, half_wrong(suite))
    results = peers.run(suite, suite.models)
    assert set(results.wrong) == {
        f"planted, {case.name} {dtype}," for case in suite.cases for dtype in peers.PRECISIONS
    }
    assert all("of the largest value, the limit is" in told for told in results.wrong.values())
    assert {row["against"] for row in results.rows} == {"transformers sdpa"}
    assert "planted_turn" not in Inline.log


def test_texts_show_wrong_positions():
    """Texts of the models depend on more than the last token."""

    def opened(model, folder, dtype):
        read = model.read(folder, dtype, "sdpa")
        if model.kind == "LlamaForCausalLM":
            read.model.rotary_emb.inv_freq *= 0.5
        else:
            read.transformer.wpe.weight.data = read.transformer.wpe.weight.roll(1, 0)
        return generate._by_generate(read)

    suite = tiny(generate.SUITE, Peer("planted", opened))
    cases = tuple(replace(case, new=12) for case in suite.cases)
    results = peers.run(replace(suite, cases=cases), suite.models)
    assert len(results.wrong) == 2 * len(cases)
    assert all(name.startswith("planted") for name in results.wrong)


def test_a_peer_that_writes_too_little_is_wrong():
    def shorter(call, tokens, new, take):
        call(tokens, new - 1, take)

    suite = tiny(generate.SUITE, changed("planted", SDPA["generate"], shorter))
    results = peers.run(replace(suite, cases=suite.cases[:1]), suite.models[:1])
    assert len(results.wrong) == 2 and "planted_turn" not in Inline.log


@pytest.mark.parametrize("suite", [infer.SUITE, generate.SUITE], ids=lambda suite: suite.op)
def test_nothing_is_timed_beside_a_wrong_tfkern(suite):
    suite = tiny(suite, half_wrong(suite, "tfkern"), shipped=("transformers sdpa",))
    results = peers.run(suite, suite.models)
    assert not results.rows and len(results.wrong) == 2 * len(suite.cases)
    assert not any("_turn" in call for call in Inline.log)


def test_what_cannot_run_is_left_out_and_said():
    def fails(call, tokens):
        raise RuntimeError("no such processor")

    suite = tiny(
        infer.SUITE,
        Peer("absent", SDPA["infer"].open, modules=("abacus_runtime",)),
        replace(SDPA["infer"], name="narrow", precisions=("float32",)),
        changed("failing", SDPA["infer"], fails),
    )
    suite = replace(suite, cases=suite.cases[:1])
    results = peers.run(suite, suite.models)
    assert results.notes == [
        "absent is left out of minilm float32: abacus_runtime is not installed",
        "failing is left out of minilm float32: RuntimeError: no such processor",
        "absent is left out of minilm bfloat16: abacus_runtime is not installed",
        "narrow is left out of minilm bfloat16: it has no bfloat16 on a CPU",
        "failing is left out of minilm bfloat16: RuntimeError: no such processor",
    ]
    timed = [(row["dtype"], row["against"]) for row in results.rows]
    assert timed == [
        ("float32", "transformers sdpa"),
        ("float32", "narrow"),
        ("bfloat16", "transformers sdpa"),
    ]


@pytest.mark.parametrize("lost_after", [3, 5])
def test_a_peer_may_be_lost_between_its_turns(lost_after):
    calls = []

    def fails(call, tokens):
        calls.append(call)
        if len(calls) > lost_after:  # two of the comparison, then two in each of two turns
            raise RuntimeError("out of luck")
        return call(tokens)

    suite = tiny(infer.SUITE, changed("failing", SDPA["infer"], fails))
    suite = replace(suite, cases=suite.cases[:1])
    results = peers.run(suite, suite.models)
    assert len(results.notes) == 2 and "out of luck" in results.notes[0]
    assert {row["against"] for row in results.rows} == {"transformers sdpa"}


def test_tfkern_may_not_fail():
    def fails(call, tokens):
        raise RuntimeError("no such processor")

    suite = tiny(
        infer.SUITE, changed("tfkern", SDPA["infer"], fails), shipped=("transformers sdpa",)
    )
    with pytest.raises(RuntimeError, match="tfkern, minilm float32: .*no such processor"):
        peers.run(suite, suite.models)


OPTIONAL = [
    (suite, peer)
    for suite in (infer.SUITE, generate.SUITE)
    for peer in (*suite.peers[2:], suite.compiled)
]


@pytest.mark.slow
@pytest.mark.parametrize("suite, peer", OPTIONAL, ids=lambda value: getattr(value, "name", ""))
def test_peers_compute_what_tfkern_does(suite, peer):
    for module in peer.modules:
        pytest.importorskip(module)
    suite = tiny(suite, peer)
    results = peers.run(suite, suite.models, rounds=1)
    assert not results.wrong
    assert not any("float32" in note for note in results.notes)
    against = {(r["case"], r["dtype"]) for r in results.rows if r["against"] == peer.name}
    assert against >= {(case.name, "float32") for case in suite.cases}


def test_a_process_rests_between_calls(monkeypatch):
    monkeypatch.delenv("TFKERN_ABACUS", raising=False)
    worker = Worker("cpu", environment={"TFKERN_ABACUS": "beads"}, rests=True)
    try:
        number, variable = worker.ask(planted.about, "TFKERN_ABACUS")
        assert variable == "beads" and "TFKERN_ABACUS" not in os.environ
        stat = Path(f"/proc/{number}/stat")
        for _ in range(100):  # a signal takes a moment
            if (state := stat.read_text().rpartition(")")[2].split()[0]) == "T":
                break
            time.sleep(0.1)
        assert state == "T"
        assert worker.ask(planted.about, "TFKERN_ABACUS") == (number, variable)
    finally:
        worker.finish()
    assert not stat.exists()


@pytest.mark.parametrize("wrong", [{}, {"planted, case,": "off by 1"}])
def test_command(monkeypatch, tmp_path, capsys, wrong):
    found = peers.run(tiny(infer.SUITE), ["minilm"], rounds=1)
    found.rows = [row | {"case": infer.CASES[0].name} for row in found.rows]
    asked = []

    def run(suite, models, **options):
        asked.append(([peer.name for peer in suite.peers], models, options["rounds"]))
        assert options["dtypes"] == ("float32",)
        options["keep"](found.rows)
        return replace(found, wrong=wrong, notes=["absent is left out"])

    monkeypatch.setattr(peers, "run", run)
    call = ["bench", "infer", "minilm", "--quick", "--compiled", "--dtype", "float32"]
    call += ["--out", str(tmp_path)]
    assert main(call) == (1 if wrong else 0)
    names = [peer.name for peer in (*infer.SUITE.peers, infer.SUITE.compiled)]
    assert asked == [(names, ["minilm"], 1)]
    told = capsys.readouterr()
    assert "absent is left out" in told.out and "transformers sdpa" in told.out
    (path,) = tmp_path.glob("infer-*.csv")
    assert len(report.read(path)) == len(found.rows)
    assert ("planted, case, is wrong and was not timed" in told.err) == bool(wrong)


def test_rows_replace_those_of_their_case_and_dtype(tmp_path):
    """What an interrupted run has timed is there, and so is what others have."""
    facts = {"device": "abacus", "torch_instructions": "none"}

    def row(case, dtype, p50):
        return {"case": infer.CASES[case].name, "dtype": dtype, "p50_ms": p50} | facts

    def kept():
        return [(r["case"], r["dtype"], float(r["p50_ms"])) for r in report.read(path)]

    names = [case.name for case in infer.CASES]
    path = infer.SUITE.write([row(1, "float32", 1.0), row(1, "bfloat16", 2.0)], tmp_path)
    infer.SUITE.write([row(0, "bfloat16", 3.0)], tmp_path)
    infer.SUITE.write([row(1, "bfloat16", 4.0)], tmp_path)
    assert kept() == [
        (names[0], "bfloat16", 3.0), (names[1], "float32", 1.0), (names[1], "bfloat16", 4.0)
    ]  # fmt: skip
