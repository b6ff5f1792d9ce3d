"""Encoders, and decoders that read a prompt, next to other ways to run them: `tfkern bench infer`.

The encoder has the shape of MiniLM (Wang et al. 2020) with 12 layers, the decoder that of GPT-2
(Radford et al. 2019). ONNX Runtime and OpenVINO run what their own ways from torch export, with
any batch and length.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfkern import models
from tfkern.generate.session import Session

from .case import FORWARD
from .peers import OURS, Case, Model, Peer, Suite, Times, output, relative_error

MINILM = Model(
    "minilm",
    "BertModel",
    {
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
)
GPT2 = Model(
    "gpt2", "GPT2LMHeadModel", {"vocab_size": 50257, "bos_token_id": None, "eos_token_id": None}
)
CASES = (
    *(Case(MINILM, rows, length) for rows, length in ((1, 16), (1, 128), (8, 128), (2, 512))),
    Case(GPT2, 1, 512),
)

Encode = Callable[[Tensor], Tensor]


def once(encode: Encode, case: Case) -> tuple[Any, Times]:
    """The output as an array, since arrays pass between processes."""
    tokens = case.tokens()
    start = time.perf_counter()
    found = encode(tokens)
    seconds = time.perf_counter() - start
    return torch.as_tensor(found).float().numpy(), {FORWARD: [seconds]}


def error(precise: Any, case: Case, expected: Tensor, result: Any) -> float:
    return relative_error(result, expected)


def _tfkern(model: Model, folder: Path, dtype: str) -> Encode:
    opened = models.prepack(models.load(folder))
    if opened.decoder is None:
        return opened

    def read(tokens: Tensor) -> Tensor:
        return Session(opened, len(tokens), tokens.shape[1] + 1).feed(tokens)

    return read


def _transformers(model: Model, folder: Path, dtype: str, attention: str) -> Encode:
    opened = model.read(folder, dtype, attention)
    return lambda tokens: output(opened, tokens)


def _compiled(model: Model, folder: Path, dtype: str) -> Encode:
    opened = model.read(folder, dtype, "sdpa")
    return torch.compile(lambda tokens: output(opened, tokens), dynamic=False)


class _Exported(nn.Module):
    """A model that takes tokens alone and returns its output alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        # Without a mask, transformers would look for several documents in a row.
        return output(self.model, tokens, attention_mask=torch.ones_like(tokens), use_cache=False)


_EXAMPLE = torch.arange(48).view(2, 24)


def _write_onnx(model: Any, folder: Path, dtype: str) -> None:
    any_size = {"tokens": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    torch.onnx.export(
        _Exported(model), (_EXAMPLE,), folder / "model.onnx", input_names=["tokens"],
        output_names=["output"], dynamo=True, dynamic_shapes=any_size,
    )  # fmt: skip


def _onnxruntime(model: Model, folder: Path, dtype: str) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    return lambda tokens: session.run(None, {"tokens": tokens.numpy()})[0]


def _write_openvino(model: Any, folder: Path, dtype: str) -> None:
    import openvino

    made = openvino.convert_model(_Exported(model), example_input=_EXAMPLE)
    openvino.save_model(made, folder / "openvino.xml", compress_to_fp16=False)


def _openvino(model: Model, folder: Path, dtype: str) -> Encode:
    import openvino

    precision = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[dtype]
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = openvino.Core().compile_model(folder / "openvino.xml", "CPU", options)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT")
    if taken != precision:
        raise NotImplementedError(f"OpenVINO computes in {taken} on this processor")
    return lambda tokens: compiled([tokens.numpy()])[0]


SUITE = Suite(
    op="infer",
    cases=CASES,
    peers=(
        Peer(OURS, _tfkern, modules=("tfkern",)),
        Peer("transformers sdpa", partial(_transformers, attention="sdpa")),
        Peer("transformers eager", partial(_transformers, attention="eager")),
        Peer("onnxruntime", _onnxruntime, _write_onnx, ("onnxruntime", "onnxscript"), ("float32",)),
        Peer("openvino", _openvino, _write_openvino, ("openvino",)),
    ),
    once=once,
    error=error,
    passes=(FORWARD,),
    rounds=5,
    compiled=Peer("transformers compiled", _compiled),
)
