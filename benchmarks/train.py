"""Whole steps of training a GPT, next to plain PyTorch and to transformers: `tfkern bench train`.

All variants have the same weights, batches and optimiser: fused AdamW, and gradients clipped to
norm 1. They differ in the model and in what makes a step of it: tfkern's `steps`; a model of
torch's layers, eager and compiled; transformers' GPT-2 with what its Trainer does in a step. The
rows stand in one file for each processor; running a case replaces its rows.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfkern import models
from tfkern.models import Transformer, TransformerConfig

from . import environment, measure, memory, report, timing
from .case import DTYPES, FORWARD
from .measure import Results, Row
from .worker import Worker

OURS, EAGER, COMPILED, TRANSFORMERS = "tfkern", "torch", "torch compiled", "transformers"
PROTOCOL = timing.Protocol(min_samples=7, max_samples=200, min_seconds=2.0, long_seconds=60)
PRECISIONS = ("float32", "bfloat16")
OTHERS = (EAGER, COMPILED, TRANSFORMERS)
_CLIP, _BATCHES, _CHECKED = 1.0, 16, 3


@dataclass(frozen=True)
class Case:
    """A model and the shape of its batches."""

    name: str
    dim: int
    layers: int
    heads: int
    vocab_size: int
    batch: int
    length: int

    def config(self) -> TransformerConfig:
        return TransformerConfig(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            vocab_size=self.vocab_size,
            max_length=self.length,
        )


# GPT-2 small with 2 of its 12 layers, and the model on characters with which people begin.
CASES = (
    Case("characters", 128, 4, 4, 65, 12, 64),
    Case("gpt2", 768, 2, 12, 50257, 1, 1024),
)


class Plain(nn.Module):
    """GPT-2 of torch's own layers, with scaled_dot_product_attention."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.tokens = nn.Embedding(case.vocab_size, case.dim)
        self.positions = nn.Embedding(case.length, case.dim)
        self.blocks = nn.ModuleList(_PlainBlock(case.dim, case.heads) for _ in range(case.layers))
        self.norm = nn.LayerNorm(case.dim)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(steps)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))

    def take(self, theirs: dict[str, Tensor], prefix: str) -> None:
        """Takes the weights of a block of `Transformer`, whose rows lie head by head."""
        names = {"norm1": "norm1", "norm2": "norm2", "out": "attention.out"}
        names |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "qkv": "attention.qkv_by_head"}
        for ours, name in names.items():
            for kind in ("weight", "bias"):
                x = theirs[f"{prefix}{name}.{kind}"]
                if ours == "qkv":
                    x = x.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
                self.get_parameter(f"{ours}.{kind}").data.copy_(x)


def plain(model: Transformer, case: Case) -> Plain:
    """A `Plain` with the weights of a model."""
    theirs, made = model.state_dict(), Plain(case)
    made.tokens.weight.data.copy_(theirs["embedding.weight"])
    made.positions.weight.data.copy_(theirs["decoder.positions.weight"])
    for kind in ("weight", "bias"):
        made.norm.get_parameter(kind).data.copy_(theirs[f"decoder.norm.{kind}"])
    for i, block in enumerate(made.blocks):
        block.take(theirs, f"decoder.blocks.{i}.")
    return made


class _Batches:
    """Random tokens: `batches[step]`, a few batches in turn."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (_BATCHES, case.batch, case.length + 1)
        self.tokens = torch.randint(case.vocab_size, shape, generator=generator)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        row = self.tokens[step % _BATCHES]
        return {"tokens": row[:, :-1].contiguous(), "targets": row[:, 1:].contiguous()}


def available() -> tuple[str, ...]:
    """The variants that can run here: transformers may not be installed."""
    there = importlib.util.find_spec("transformers") is not None
    return tuple(name for name in OTHERS if there or name != TRANSFORMERS)


def variant(name: str, case: Case, precision: str) -> Callable[[], float]:
    """A function that trains for one step and returns the loss."""
    torch.manual_seed(0)
    model = Transformer(case.config())
    if name == OURS:
        return _ours(model, case, precision)
    if name == TRANSFORMERS:
        return _usual(_of_transformers(model), case, precision)
    module: Any = plain(model, case)
    return _usual(torch.compile(module) if name == COMPILED else module, case, precision)


def _ours(model: Transformer, case: Case, precision: str) -> Callable[[], float]:
    from tfkern import train  # needs packages that the other benchmarks do without

    assert model.vocabulary is not None
    model.vocabulary.deferred = True
    records = train.steps(
        model, _Batches(case), train.CrossEntropy(), train.adamw(model, 1e-3),
        precision=None if precision == "float32" else DTYPES[precision], clip_norm=_CLIP,
    )  # fmt: skip
    return lambda: next(records).loss


def _usual(model: Any, case: Case, precision: str) -> Callable[[], float]:
    """A step as people write it."""
    from tfkern import train

    batches, optimiser, done = _Batches(case), train.adamw(model, 1e-3), 0

    def step() -> float:
        nonlocal done
        batch = batches[done]
        mixed = (
            torch.autocast("cpu", DTYPES[precision]) if precision != "float32" else nullcontext()
        )
        with mixed:
            loss = model(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done += 1
        return loss.item()

    return step


class _Labelled(nn.Module):
    """A model of transformers with its own loss, for targets that are shifted already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=targets, shift_labels=targets).loss


def _of_transformers(model: Transformer) -> nn.Module:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        models.save(model, folder)
        return _Labelled(transformers.GPT2LMHeadModel.from_pretrained(folder)).train()


def run(
    cases: tuple[Case, ...] = CASES,
    *,
    others: tuple[str, ...] = OTHERS,
    protocol: timing.Protocol = PROTOCOL,
    progress: Callable[[str], None] = lambda doing: None,
) -> Results:
    """Times the steps of some cases, except those whose losses are not those of plain PyTorch."""
    facts, results = environment.facts("cpu"), Results()
    names = (OURS, *others)
    for case in cases:
        for precision in PRECISIONS:
            title = f"{case.name} {precision}"
            progress(title)
            steps = {name: variant(name, case, precision) for name in names}
            losses = {name: [step() for _ in range(_CHECKED)] for name, step in steps.items()}
            wrong = _disagreement(losses, precision)
            if wrong is not None:
                results.wrong[title] = wrong
                continue
            timed = {name: timing.Step(step) for name, step in steps.items()}
            timings = timing.interleaved(timed, "cpu", protocol)
            peaks = {name: peak(name, case, precision) for name in names}
            ceiling = timing.product_ceiling(DTYPES[precision], "cpu")
            results.rows += [
                _row(case, precision, timings, peaks, ceiling, other) | facts for other in others
            ]
    return results


def write(rows: list[Row], folder: Path) -> Path:
    """Puts rows into the file of this processor, in place of the former rows of their cases."""
    names = [case.name for case in CASES]
    return report.replace_rows(folder / file_name(rows[0]), rows, "case", names)


def file_name(facts: Row) -> str:
    """The name of the file for a processor, from the facts of its rows."""
    return report.file_name("train", facts["device"], facts["torch_instructions"])


def peak(name: str, case: Case, precision: str) -> int:
    """Bytes that a process takes at the peak of a step, beyond those with which it started."""
    # A compiler says nothing for long.
    worker = Worker("cpu", patience=600, environment=memory.GIVEN_BACK)
    try:
        return worker.ask(_peak, name, case, precision, torch.get_num_threads())
    finally:
        worker.stop()


def _peak(name: str, case: Case, precision: str, threads: int, tell: Callable[[str], None]) -> int:
    torch.set_num_threads(threads)
    small = Case("", 64, 1, 2, case.vocab_size // 100 + 8, 1, 16)
    variant(name, small, precision)()  # imports, and starts libraries
    before = memory.resident("VmRSS")
    step = variant(name, case, precision)
    step()
    memory.reset_peak()
    step()
    return max(memory.resident("VmHWM") - before, 0)


def _disagreement(losses: dict[str, list[float]], precision: str) -> str | None:
    """How a variant's first losses differ from those of plain PyTorch, None if they agree."""
    limit = {"float32": 1e-4, "bfloat16": 3e-2}[precision]
    expected = losses.get(EAGER) or losses[OURS]
    for name, found in losses.items():
        for step, (a, b) in enumerate(zip(found, expected, strict=True)):
            if not abs(a - b) <= limit:
                return f"the loss of {name} is {a:.6g} at step {step}, expected {b:.6g}"
    return None


def _row(
    case: Case,
    precision: str,
    timings: dict[str, timing.Timing],
    peaks: dict[str, int],
    ceiling: float,
    other: str,
) -> Row:
    """tfkern's times of a case, next to another variant's."""
    ours = timings[OURS]
    p20, p50, p80 = ours.quantiles(FORWARD)
    tokens = case.batch * case.length
    row = {
        "op": "train",
        "case": case.name,
        "shape": f"{case.batch} x {case.length} tokens, {case.layers} x {case.dim}, "
        f"vocabulary {case.vocab_size}",
        "dtype": precision,
        "variant": OURS,
        "pass": "step",
        "p20_ms": 1e3 * p20,
        "p50_ms": 1e3 * p50,
        "p80_ms": 1e3 * p80,
        "tokens_per_second": tokens / p50,
        "share_of_ceiling": flops(case) / p50 / ceiling,
        "peak_bytes": peaks[OURS],
        "against_peak_bytes": peaks[other],
        **measure.comparison(timings, other, ours, FORWARD),
    }
    return {name: measure.rounded(value) for name, value in row.items()}


def flops(case: Case) -> int:
    """Floating point operations of a step: 6 for each weight of a product and token, and those of
    attention, of which causality leaves half."""
    tokens = case.batch * case.length
    weights = 12 * case.layers * case.dim**2 + case.vocab_size * case.dim
    return 6 * tokens * weights + 6 * tokens * case.layers * case.length * case.dim
