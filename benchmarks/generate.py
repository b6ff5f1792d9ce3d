"""Decoders that write, next to other ways to run them: `tfkern bench generate`.

The next token is always the most likely one. The time to the first token, for which the prompt is
read, stands apart from the times of those that follow. A result is right if a precise model,
which reads the tokens of the last row, finds each about as likely as the best: where two are nearly
as likely, rounding decides.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfkern import generate, models

from . import llama_cpp
from .peers import FIRST, NEXT, OURS, Case, Model, Peer, Suite, Times

# No token ends a row. Weights are larger than those of a model before training, which would repeat
# one token whatever its attention did.
_WRITER = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.05}
GPT2 = Model("gpt2", "GPT2LMHeadModel", {"vocab_size": 50257, **_WRITER})
LLAMA = Model(
    "llama",
    "LlamaForCausalLM",
    {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
        **_WRITER,
    },
)
_INT8 = 0.05  # of the largest logit: what weights of eight bits may change, with some room
CASES = tuple(Case(model, rows, 128, 32) for model in (GPT2, LLAMA) for rows in (1, 8))

# Writes a number of tokens behind each row, and passes those of every step on as they come.
Write = Callable[[Tensor, int, Callable[[list[int]], None]], None]


def once(write: Write, case: Case) -> tuple[Any, Times]:
    """The new tokens, a list for each step."""
    tokens = case.tokens()
    steps: list[list[int]] = []
    at = [time.perf_counter()]

    def take(step: list[int]) -> None:
        at.append(time.perf_counter())
        steps.append(step)

    write(tokens, case.new, take)
    first, *rest = (after - before for before, after in zip(at, at[1:], strict=False))
    return steps, {FIRST: [first], NEXT: rest}


def error(precise: Any, case: Case, expected: Tensor, result: list[list[int]]) -> float:
    """How far the logit of a new token is below the highest one, at most."""
    if [len(step) for step in result] != [case.rows] * case.new:
        return float("inf")
    new = torch.tensor([step[-1] for step in result])
    text = torch.cat([case.tokens()[-1], new])[None, :-1]
    logits = precise(input_ids=text, logits_to_keep=case.new).logits[0].double()
    chosen = logits.gather(1, new[:, None])[:, 0]
    return ((logits.amax(1) - chosen).max() / logits.abs().max()).item()


def _tfkern(model: Model, folder: Path, dtype: str, int8: bool = False) -> Write:
    opened = models.load(folder)
    opened = models.quantize(opened) if int8 else models.prepack(opened)

    def write(tokens: Tensor, new: int, take: Callable[[list[int]], None]) -> None:
        for step in generate.stream(opened, tokens, new, sampling=generate.GREEDY):
            take([token for token in step if token is not None])

    return write


def _transformers(model: Model, folder: Path, dtype: str, attention: str) -> Write:
    return _by_generate(model.read(folder, dtype, attention))


def _compiled(model: Model, folder: Path, dtype: str) -> Write:
    opened = model.read(folder, dtype, "sdpa")
    opened.forward = torch.compile(opened.forward)
    return _by_generate(opened, cache_implementation="static")


def _by_generate(opened: Any, **options: Any) -> Write:
    def write(tokens: Tensor, new: int, take: Callable[[list[int]], None]) -> None:
        opened.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False,
            pad_token_id=0, streamer=_Streamer(take), **options,
        )  # fmt: skip

    return write


class _Streamer:
    """Passes on the tokens of each step; transformers begins with the prompts."""

    def __init__(self, take: Callable[[list[int]], None]) -> None:
        self._take, self._begun = take, False

    def put(self, tokens: Tensor) -> None:
        if self._begun:
            self._take(tokens.tolist())
        self._begun = True

    def end(self) -> None:
        pass


SUITE = Suite(
    op="generate",
    cases=CASES,
    peers=(
        Peer(OURS, _tfkern, modules=("tfkern",)),
        Peer("transformers sdpa", partial(_transformers, attention="sdpa")),
        Peer("transformers eager", partial(_transformers, attention="eager")),
        Peer("llama.cpp", llama_cpp.read, llama_cpp.write, ("llama_cpp", "gguf")),
        Peer("tfkern int8", partial(_tfkern, int8=True), modules=("tfkern",), rounding=_INT8),
        Peer(
            "llama.cpp q8_0",
            partial(llama_cpp.read, kept="q8_0"),
            partial(llama_cpp.write, kept="q8_0"),
            ("llama_cpp", "gguf"),
            rounding=_INT8,
        ),
    ),
    once=once,
    error=error,
    passes=(FIRST, NEXT),
    rounds=3,
    compiled=Peer("transformers compiled", _compiled),
)
