"""llama.cpp (Gerganov et al.) as a peer that writes, through llama-cpp-python's plain bindings.

Its files are GGUF, without a vocabulary of texts: it reads and writes numbers of tokens.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _file(kept: str | None) -> str:
    return f"{kept or 'model'}.gguf"


def write(model: Any, folder: Path, dtype: str, kept: str | None = None) -> None:
    """Writes a GPT-2 or Llama of transformers as GGUF, matrices in the dtype and vectors in
    float32.

    Args:
        kept: "q8_0" for matrices of eight bits, with a scale for every 32 elements of a row.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    kind = {"float32": kinds.F32, "bfloat16": kinds.BF16, "q8_0": kinds.Q8_0}
    config = model.config
    out = gguf.GGUFWriter(folder / _file(kept), config.model_type)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_head_count(config.num_attention_heads)
    if config.model_type == "llama":
        out.add_feed_forward_length(config.intermediate_size)
        out.add_layer_norm_rms_eps(config.rms_norm_eps)
        out.add_rope_freq_base(config.rope_parameters["rope_theta"])
        out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    else:
        out.add_feed_forward_length(4 * config.hidden_size)
        out.add_layer_norm_eps(config.layer_norm_epsilon)
    out.add_tokenizer_model("none")
    out.add_vocab_size(config.vocab_size)
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in _weights(model):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        form = kind[kept or dtype] if weight.dim() > 1 else kinds.F32
        out.add_tensor(theirs, gguf.quants.quantize(weight.numpy(), form), raw_dtype=form)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights, matrices as (out, in); rotary pairs are neighbours, not halves apart."""
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # the same as that of the embedding
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            weight = weight.T
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            heads = model.config.num_attention_heads
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        yield name, weight.contiguous()


def read(model: Any, folder: Path, dtype: str, kept: str | None = None) -> Callable[..., None]:
    """A function that writes: see `generate.Write`. Keys and values are kept in float32 or, for a
    model in 16 bits, in float16, which is llama.cpp's default."""
    import llama_cpp as api

    api.llama_backend_init()
    options = api.llama_model_default_params()
    loaded = api.llama_model_load_from_file(bytes(folder / _file(kept)), options)
    if loaded is None:
        raise RuntimeError("llama.cpp cannot read the model")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))

    @functools.cache
    def context(rows: int, capacity: int) -> Any:
        options = api.llama_context_default_params()
        options.n_ctx, options.n_seq_max = rows * capacity, rows
        options.n_batch = options.n_ctx
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.type_k = options.type_v = 0 if dtype == "float32" else 1
        made = api.llama_init_from_model(loaded, options)
        if made is None:
            raise RuntimeError("llama.cpp cannot make a context")
        return made, api.llama_batch_init(options.n_ctx, 0, 1)

    def write(tokens: Tensor, new: int, take: Callable[[list[int]], None]) -> None:
        rows, length = tokens.shape
        state, batch = context(rows, length + max(new, 32))
        api.llama_memory_clear(api.llama_get_memory(state), False)
        step, start = tokens.tolist(), 0
        for _ in range(new):
            ends = _fill(batch, step, start)
            if api.llama_decode(state, batch) != 0:
                raise RuntimeError("llama.cpp cannot decode")
            logits = (api.llama_get_logits_ith(state, i) for i in ends)
            best = [int(np.ctypeslib.as_array(x, (vocabulary,)).argmax()) for x in logits]
            take(best)
            start += len(step[0])
            step = [[token] for token in best]

    return write


def _fill(batch: Any, rows: list[list[int]], start: int) -> list[int]:
    """Puts tokens of every row, from a position on, into a batch. Returns the indices of the last
    ones, which alone get logits."""
    ends = []
    count = 0
    for row, tokens in enumerate(rows):
        for position, token in enumerate(tokens, start):
            batch.token[count], batch.pos[count] = token, position
            batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
            batch.logits[count] = position == start + len(tokens) - 1
            count += 1
        ends.append(count - 1)
    batch.n_tokens = count
    return ends
