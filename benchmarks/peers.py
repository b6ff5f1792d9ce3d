"""Whole models next to what people run instead on a CPU: what `infer.py` and `generate.py` share.

The author, a process, draws the weights of a model of the library transformers and writes it into
a folder, in every form that a peer reads. Each peer runs in a process of its own, and only one at a
time: the others are stopped meanwhile, since threads that wait for work spin and would disturb it.
The peers take turns in rounds, A B C A B C, with the same number of calls in every turn.

A result is first compared with that of the same model in a more precise dtype, by the author. A
peer whose result is wrong is not timed. Rows have the ratio of a peer's time to tfkern's. They
stand in one file for each command and processor, into which those of a case go once it is timed.
"""

import copy
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import environment, measure, memory, report
from .case import DTYPES, FORWARD
from .measure import Results, Row
from .timing import Timing
from .worker import Lost, Worker

OURS = "tfkern"
PRECISIONS = ("float32", "bfloat16")
FIRST, NEXT = "first token", "next token"  # passes of a model that writes
_PATIENCE = 600.0  # seconds: a compiler says nothing for long
_TURN, _MOST_CALLS = 0.4, 20  # seconds that a turn of the slowest peer takes, calls in a turn
_PACKAGES = {"llama_cpp": "llama-cpp-python"}  # modules whose package has another name

Times = dict[str, list[float]]  # seconds by pass
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A model of transformers: the name of its class, and the sizes in its configuration."""

    name: str
    kind: str
    sizes: dict[str, Any]

    def build(self) -> Any:
        """The model with random weights."""
        import transformers

        kind = getattr(transformers, self.kind)
        torch.manual_seed(0)
        return kind(kind.config_class(**self.sizes)).eval()

    def read(self, folder: Path, dtype: str, attention: str) -> Any:
        """The model that the author has written, with one of transformers' kinds of attention."""
        import transformers

        read = getattr(transformers, self.kind).from_pretrained
        return read(folder, dtype=DTYPES[dtype], attn_implementation=attention).eval()


@dataclass(frozen=True)
class Case:
    """A batch of random tokens for a model, and how many tokens are to be written behind them."""

    model: Model
    rows: int
    length: int
    new: int = 0

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.rows} x {self.length}" + f" + {self.new}" * bool(self.new)

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        size = (self.rows, self.length)
        return torch.randint(self.model.sizes["vocab_size"], size, generator=generator)

    def warm_up(self) -> "Case":
        return replace(self, new=min(self.new, 2))

    def computed(self, pass_: str) -> int:
        """How many tokens the model reads in a pass."""
        return self.rows if pass_ == NEXT else self.rows * self.length


@dataclass(frozen=True)
class Peer:
    """One way to run a model.

    Attributes:
        open: reads the model from the author's folder for a dtype, in the peer's process, and
            returns the function that `Suite.once` calls.
        write: writes a model in float32 into the folder, in a form that the peer needs for a dtype,
            in the author's process; None if the peer reads what transformers has saved.
        modules: modules that have to be installed; the first is that of the package that computes.
        precisions: dtypes that the peer computes in.
        rounding: how far its result may be off because its weights are rounded, relative to the
            largest value.
    """

    name: str
    open: Callable[[Model, Path, str], Callable[..., Any]]
    write: Callable[[Any, Path, str], None] | None = None
    modules: tuple[str, ...] = ("transformers",)
    precisions: tuple[str, ...] = PRECISIONS
    rounding: float = 0.0

    def missing(self, dtype: str) -> str | None:
        """Why the peer cannot run here, or None."""
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"{_PACKAGES.get(module, module)} is not installed"
        return None if dtype in self.precisions else f"it has no {dtype} on a CPU"

    def version(self) -> str:
        """The version of the package that computes."""
        return environment.installed(_PACKAGES.get(self.modules[0], self.modules[0]))


@dataclass(frozen=True)
class Suite:
    """What a command times.

    Attributes:
        op: name of the command.
        once: runs what a peer has opened on a case. Returns the result, and seconds by pass.
        error: how far a result is from what a precise model computes, relative to the largest
            value. It takes the model, the case, the model's `output` for it, and the result.
        passes: those of `once`.
        compiled: a further peer, which takes long to compile.
    """

    op: str
    cases: tuple[Case, ...]
    peers: tuple[Peer, ...]
    once: Callable[[Callable[..., Any], Case], tuple[Any, Times]]
    error: Callable[[Any, Case, Tensor, Any], float]
    passes: tuple[str, ...]
    rounds: int
    compiled: Peer

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(case.model.name for case in self.cases))

    def file_name(self, facts: Row) -> str:
        """The name of the file for a processor, from the facts of its rows."""
        return report.file_name(self.op, facts["device"], facts["torch_instructions"])

    def write(self, rows: list[Row], folder: Path) -> Path:
        """Puts rows into the file of this processor, in place of the former rows of their cases in
        their dtypes."""
        names = [case.name for case in self.cases]
        timed = {(row["case"], row["dtype"]) for row in rows}
        return report.update(
            folder / self.file_name(rows[0]),
            rows,
            lambda row: (row["case"], row["dtype"]) not in timed,
            lambda row: (names.index(row["case"]), PRECISIONS.index(row["dtype"])),
        )


def run(
    suite: Suite,
    models: Sequence[str],
    *,
    dtypes: Sequence[str] = PRECISIONS,
    rounds: int | None = None,
    progress: Tell = lambda doing: None,
    keep: Callable[[list[Row]], Any] = lambda rows: None,
) -> Results:
    """Times the peers that can run here on the cases of some models.

    Args:
        dtypes: of the weights, some of `PRECISIONS`.
        keep: is told the rows of each case as soon as they are known.

    Raises:
        RuntimeError: the author, or tfkern, failed.
    """
    facts, results = environment.facts("cpu"), Results()
    for name in models:
        cases = [case for case in suite.cases if case.model.name == name]
        for dtype in dtypes:
            with _Session(suite, cases[0].model, dtype, results) as session:
                session.open(progress)
                for case in cases:
                    progress(f"{case.name} {dtype}")
                    found = [row | facts for row in session.rows(case, rounds or suite.rounds)]
                    results.rows += found
                    if found:
                        keep(found)
    return results


class _Session:
    """A model in a dtype: its author and the peers that have opened it, each a process."""

    def __init__(self, suite: Suite, model: Model, dtype: str, results: Results) -> None:
        self.suite, self.model, self.dtype, self.results = suite, model, dtype, results
        self._folder = tempfile.TemporaryDirectory(prefix="tfkern-")
        self._author = _process()
        self._processes: dict[str, Worker] = {}  # by name of the peer

    def __enter__(self) -> "_Session":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        for process in (self._author, *self._processes.values()):
            process.finish() if error is None else process.stop()
        self._folder.cleanup()

    def open(self, progress: Tell) -> None:
        """Lets the author write the model, and every peer read it."""
        folder, threads = Path(self._folder.name), torch.get_num_threads()
        self._ask_author(_write, self.model, self.dtype, folder, threads)
        for peer in self.suite.peers:
            progress(f"{peer.name} reads {self.model.name} {self.dtype}")
            with self._or_left_out(peer.name):
                missing = peer.missing(self.dtype)
                if missing is not None:
                    raise Lost("", missing)
                if peer.write is not None:
                    self._author.ask(_write_for, peer, self.dtype, folder)
                self._processes[peer.name] = _process()
                self._ask(peer.name, _open, peer, self.model, self.dtype, folder, threads)

    def rows(self, case: Case, rounds: int) -> list[Row]:
        """The rows of a case: none if tfkern's result is wrong."""
        errors, calls = self._compared(case)
        if OURS not in errors:
            return []
        found: dict[str, list[Times]] = {name: [] for name in errors}
        for name in list(errors) * rounds:
            if name in self._processes:
                with self._or_left_out(name):
                    found[name] += self._ask(name, _turn, self.suite, case, calls)
        peaks: dict[str, int] = {}
        for name in errors:
            if name in self._processes:
                with self._or_left_out(name):
                    peaks[name] = self._ask(name, _peak)
        made = []
        for pass_ in self.suite.passes:
            timings = {
                name: Timing([(s, 0.0) for times in found[name] for s in times[pass_]])
                for name in peaks
            }
            row = self._key(case, pass_, timings[OURS], errors[OURS], peaks[OURS])
            for peer in self.suite.peers:
                if peer.name in peaks and peer.name != OURS:
                    row |= measure.comparison(timings, peer.name, timings[OURS], FORWARD)
                    row["against_version"] = peer.version()
                    row["against_error"] = errors[peer.name]
                    row["against_peak_bytes"] = peaks[peer.name]
                    made.append({k: measure.rounded(v) for k, v in row.items()})
        return made

    def _key(self, case: Case, pass_: str, time: Timing, error: float, peak: int) -> Row:
        """The columns of tfkern's own results."""
        p20, p50, p80 = time.quantiles(FORWARD)
        return {
            "op": self.suite.op,
            "case": case.name,
            "dtype": self.dtype,
            "variant": OURS,
            "pass": pass_,
            "p20_ms": 1e3 * p20,
            "p50_ms": 1e3 * p50,
            "p80_ms": 1e3 * p80,
            "tokens_per_second": case.computed(pass_) / p50,
            "error": error,
            "peak_bytes": peak,
        }

    def _compared(self, case: Case) -> tuple[dict[str, float], int]:
        """The errors of the peers whose results are right, and how many calls a turn has: the same
        for all, so that samples of a round make pairs."""
        least = self._ask_author(_expect, case)
        exact = 4 * least + 8 * torch.finfo(DTYPES[self.dtype]).eps
        rounding = {peer.name: peer.rounding for peer in self.suite.peers}
        errors, slowest = {}, 0.0
        for name in list(self._processes):
            limit = exact + rounding[name]
            with self._or_left_out(name):
                result, seconds = self._ask(name, _result, self.suite, case)
                error = self._author.ask(_error, self.suite, case, result)
                if not error <= limit:
                    told = f"off by {error:.1e} of the largest value, the limit is {limit:.1e}"
                    self.results.wrong[f"{name}, {case.name} {self.dtype},"] = told
                    continue
                errors[name] = error
                slowest = max(slowest, seconds)
        return errors, min(_MOST_CALLS, math.ceil(_TURN / max(slowest, 1e-6)))

    def _ask(self, name: str, function: Callable, *arguments: Any) -> Any:
        return self._processes[name].ask(function, *arguments)

    def _ask_author(self, function: Callable, *arguments: Any) -> Any:
        try:
            return self._author.ask(function, *arguments)
        except Lost as lost:
            raise RuntimeError(f"{self.model.name} {self.dtype}: {lost}") from None

    @contextmanager
    def _or_left_out(self, name: str) -> Iterator[None]:
        """A peer that is lost in the block is left out from then on, which a note says."""
        try:
            yield
        except Lost as lost:
            if name == OURS:
                raise RuntimeError(f"{OURS}, {self.model.name} {self.dtype}: {lost}") from None
            self._processes.pop(name, None)
            self.results.note(f"{name} is left out of {self.model.name} {self.dtype}: {lost}")


def _process() -> Worker:
    threads = str(torch.get_num_threads())
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    return Worker("cpu", _PATIENCE, environment=variables, rests=True)


# The functions below run in the processes of the author and of the peers, each of which keeps its
# state in these variables.
_opened: Callable[..., Any]  # what a peer has opened
_baseline: int  # bytes that a peer's process held before
_models: dict[torch.dtype, Any]  # the author's model in its dtype, and in a more precise one
_expected: Tensor  # the output of the latter


def _write(model: Model, dtype: str, folder: Path, threads: int, tell: Tell) -> None:
    global _models
    _hush()
    torch.set_num_threads(threads)
    drawn = model.build().to(DTYPES[dtype])
    drawn.save_pretrained(folder)
    precise = torch.float64 if dtype == "float32" else torch.float32
    _models = {DTYPES[dtype]: drawn, precise: copy.deepcopy(drawn).to(precise)}


def _write_for(peer: Peer, dtype: str, folder: Path, tell: Tell) -> None:
    assert peer.write is not None
    peer.write(_models[torch.float32], folder, dtype)


@torch.no_grad()
def _expect(case: Case, tell: Tell) -> float:
    """Keeps the output that is expected for a case. Returns the error that transformers itself has
    in the model's dtype."""
    global _expected
    drawn, precise = _models.values()
    _expected = output(precise, case.tokens())
    return relative_error(output(drawn, case.tokens()), _expected)


@torch.no_grad()
def _error(suite: Suite, case: Case, result: Any, tell: Tell) -> float:
    _, precise = _models.values()
    return suite.error(precise, case, _expected, result)


def _open(peer: Peer, model: Model, dtype: str, folder: Path, threads: int, tell: Tell) -> None:
    global _opened, _baseline
    _hush()
    torch.set_num_threads(threads)
    for module in peer.modules:
        importlib.import_module(module)
    _baseline = memory.resident("VmRSS")
    _opened = peer.open(model, folder, dtype)


@torch.no_grad()
def _result(suite: Suite, case: Case, tell: Tell) -> tuple[Any, float]:
    """The result of a case, and the seconds of a call."""
    suite.once(_opened, case.warm_up())
    memory.reset_peak()
    result, times = suite.once(_opened, case)
    return result, sum(map(sum, times.values()))


@torch.no_grad()
def _turn(suite: Suite, case: Case, calls: int, tell: Tell) -> list[Times]:
    suite.once(_opened, case.warm_up())  # the caches have what another peer has left
    return [suite.once(_opened, case)[1] for _ in range(calls)]


def _peak(tell: Tell) -> int:
    """Bytes that the process has held at most since the first call of a case, weights included."""
    return max(memory.resident("VmHWM") - _baseline, 0)


def _hush() -> None:
    """Sends what libraries print to nowhere: results and errors go through the connection."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def output(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """The output of a model of transformers: the hidden states (B, T, dim) of an encoder, and of a
    decoder the logits (B, V) of the token that follows. Options are for a decoder only."""
    if not hasattr(model, "lm_head"):
        return model(input_ids=tokens).last_hidden_state
    return model(input_ids=tokens, logits_to_keep=1, **options).logits[:, -1]


def relative_error(found: Any, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    difference = (torch.as_tensor(found).double() - expected.double()).abs().max().item()
    return difference / expected.abs().max().item()
