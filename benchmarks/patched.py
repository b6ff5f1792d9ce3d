"""Models of the library transformers, with and without tfkern: `tfkern bench patched`.

A model that runs on tfkern's attention and is patched (`tfkern.integrations.hf`) is timed next to
itself with transformers' own code, once with attention as plain operators ("eager") and once with
PyTorch's fused one ("sdpa"). All three share their weights, which are random. The rows stand in
one file for each processor; running a model replaces its rows.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfkern.integrations import hf

from . import environment, measure, report, timing
from .case import BOTH, DTYPES, FORWARD
from .measure import Results, Row

THEIRS = ("eager", "sdpa")
OURS = "tfkern"
PROTOCOL = timing.Protocol(min_samples=15, max_samples=300, min_seconds=1.0, long_seconds=30)

# The sizes of models that many people run. Llama is that of 1.1 B parameters (Zhang et al. 2024)
# with 4 of its 22 layers, which all are alike.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        },
    ),
    "bert": ("BertForMaskedLM", {}),
}


@dataclass(frozen=True)
class Call:
    """A call of a model: a forward, a step of training, or with `cached` tokens before it a step of
    decoding."""

    name: str
    batch: int
    length: int
    cached: int = 0
    backward: bool = False

    @property
    def pass_(self) -> str:
        return BOTH if self.backward else FORWARD


DECODERS = (
    Call("prefill 1 x 512", 1, 512),
    Call("decode 1 after 512", 1, 1, cached=512),
    Call("decode 8 after 512", 8, 1, cached=512),
    Call("train 2 x 256", 2, 256, backward=True),
)
CALLS = {
    "gpt2": DECODERS,
    "llama": DECODERS,
    "bert": (
        Call("encode 1 x 128", 1, 128),
        Call("encode 8 x 128", 8, 128),
        Call("encode 1 x 512", 1, 512),
        Call("train 4 x 128", 4, 128, backward=True),
    ),
}
DTYPES_OF_MODELS = ("float32", "bfloat16")


def run(
    models: tuple[str, ...] = tuple(MODELS),
    *,
    protocol: timing.Protocol = PROTOCOL,
    progress: Callable[[str], None] = lambda doing: None,
) -> Results:
    """Times the calls of some models, except those in which the patched model is wrong."""
    facts, results = environment.facts("cpu"), Results()
    hf.register()
    for model in models:
        for dtype in DTYPES_OF_MODELS:
            variants = _variants(model, DTYPES[dtype])
            for call in CALLS[model]:
                name = f"{model}, {call.name} {dtype}"
                progress(name)
                steps = {v: _step(m, call) for v, m in variants.items()}
                wrong = _disagreement(steps, DTYPES[dtype])
                if wrong is not None:
                    results.wrong[name] = wrong
                    continue
                key = {"op": model, "case": call.name, "dtype": dtype, "variant": OURS}
                timings = timing.interleaved(steps, "cpu", protocol)
                results.rows += [key | _row(timings, call, other) | facts for other in THEIRS]
    return results


def write(rows: list[Row], folder: Path) -> Path:
    """Puts rows into the file of this processor, in place of the former rows of their models."""
    return report.replace_rows(folder / file_name(rows[0]), rows, "op", list(MODELS))


def file_name(facts: Row) -> str:
    """The name of the file for a processor, from the facts of its rows."""
    return report.file_name("patched", facts["device"], facts["torch_instructions"])


def _variants(name: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """A model by the name of its attention; they share their parameters."""
    import transformers

    kind_name, sizes = MODELS[name]
    kind = getattr(transformers, kind_name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).to(dtype).eval()
    parameters: dict[int, Any] = {id(p): p for p in model.parameters()}
    variants = {}
    for attention in (*THEIRS, OURS):
        # As it is, deepcopy takes what its memo holds for copies that are already made.
        variants[attention] = copy.deepcopy(model, dict(parameters))
        variants[attention].set_attn_implementation(attention)
    hf.patch(variants[OURS])
    return variants


def _step(model: Any, call: Call) -> timing.Step:
    """The call as a step. A decoding step takes its token out of the cache again."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Tensor:
        size = (call.batch, length)
        return torch.randint(model.config.vocab_size, size, generator=generator)

    given = tokens(call.length)
    if call.backward:
        parameters = list(model.parameters())
        return timing.Step(
            lambda: model(given, labels=given).loss,
            lambda loss: torch.autograd.grad(loss, parameters, allow_unused=True),
        )
    options: dict[str, Any] = {}
    if call.cached:
        with torch.no_grad():
            cache = model(tokens(call.cached)).past_key_values
        known = inspect.signature(type(model).forward).parameters
        options["cache" if "cache" in known else "past_key_values"] = cache

    def forward() -> Tensor:
        with torch.no_grad():
            logits = model(given, **options).logits
        if call.cached:
            cache.crop(-call.length)
        return logits

    return timing.Step(forward)


def _disagreement(steps: dict[str, timing.Step], dtype: torch.dtype) -> str | None:
    """How the results of ours differ from eager's beyond what sdpa's do and the rounding of the
    model's dtype, None if they do not. It also warms up the steps."""
    results = {}
    for name, step in steps.items():
        output, gradients = step.run()
        results[name] = [output, *(g for g in gradients or () if g is not None)]
    eager, sdpa, ours = (results[name] for name in (*THEIRS, OURS))
    if len(ours) != len(eager):
        return f"it has {len(ours) - 1} gradients, not {len(eager) - 1}"
    for x, y, other in zip(ours, eager, sdpa, strict=True):
        scale = y.detach().float().abs().max().item() + 1e-30
        error, least = ((z.float() - y.float()).abs().max().item() / scale for z in (x, other))
        limit = 4 * least + 8 * torch.finfo(dtype).eps  # a loss is of float32, from rounded logits
        if not error <= limit:
            return f"a result of shape {tuple(y.shape)} is off by {error:.1e}, limit {limit:.1e}"
    return None


def _row(timings: dict[str, timing.Timing], call: Call, other: str) -> Row:
    """The columns of tfkern's time, and of its ratio to another variant's."""
    ours = timings[OURS]
    p20, p50, p80 = (1e3 * seconds for seconds in ours.quantiles(call.pass_))
    row = {
        "pass": call.pass_,
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        **measure.comparison(timings, other, ours, call.pass_),
    }
    return {name: measure.rounded(value) for name, value in row.items()}
