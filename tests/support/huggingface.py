"""Small models of transformers with weights that make every part matter, and calls of them."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from weights import perturb

os.environ["HF_HUB_OFFLINE"] = "1"
# `python -m pytest` puts the root on the path, where transformers would take our folder "kernels"
# for the package with this name.
sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).parents[2]]
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V, T = 61, 13  # size of the vocabulary; tokens of an input
_GPT = {"vocab_size": V, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 3}
_BERT = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
}
_BART = {
    "vocab_size": V,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 24,
}
_T5 = {
    "vocab_size": V,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
_ROBERTA = _BERT | {"max_position_embeddings": 20, "type_vocab_size": 1}
_DISTILBERT = {
    "vocab_size": V,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 40,
    "max_position_embeddings": 24,
}
_MARIAN = _BART | {
    "pad_token_id": 60,
    "decoder_start_token_id": 60,
    "activation_function": "swish",
    "scale_embedding": True,
}
_PEGASUS = _BART | {"activation_function": "relu", "scale_embedding": True}
_V1_1 = _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_LLAMA = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 60,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
}
_MSCALE = _YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 50.0,
    "factor": 3.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4],
    "long_factor": [1.0, 2.0, 4.0, 5.0],
    "original_max_position_embeddings": 8,
}
_PHI3 = _LLAMA | {"pad_token_id": 3, "eos_token_id": 5, "sliding_window": None}
del _PHI3["head_dim"]
_PHI3["num_attention_heads"] = 3
_PHI3["num_key_value_heads"] = 1
_LONG_PHI3 = {
    "original_max_position_embeddings": 8,
    "rope_parameters": {name: x for name, x in _LONGROPE.items() if name != "factor"},
}
_NEOX = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
_OPT = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 40,
    "max_position_embeddings": 24,
}
_OPT_350M = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
_WINDOWS = {  # every second block has a window
    "num_hidden_layers": 3,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_QWEN_WINDOWS = _LLAMA | _WINDOWS | {"use_sliding_window": True}
_GEMMA2 = _LLAMA | {
    "num_hidden_layers": 3,
    "sliding_window": 4,
    "query_pre_attn_scalar": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
_GEMMA3 = (
    _LLAMA
    | _WINDOWS
    | {
        "query_pre_attn_scalar": 5,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    }
)
_CLASSES = {"num_labels": 5}
_PAD = {"pad_token_id": 7, "eos_token_id": 7}  # as GPT-2 is fine-tuned: all of them are trained
_ENDED = _GPT | _PAD | _CLASSES
_VIT = _BERT | {"image_size": 12, "patch_size": 4, "num_labels": 5}
for _unused in ("vocab_size", "max_position_embeddings"):
    del _VIT[_unused]


@dataclass(frozen=True)
class Case:
    """A class of transformers, the fields of its configuration, and the kind of its inputs."""

    architecture: str
    config: dict[str, Any]
    # "tokens", "pair" (with segments), "choices" (several pairs), "both" (encoder and decoder),
    # "ends" (both, with one end in each source) or "images"
    inputs: str
    outputs: Callable[[Any], Any]  # takes their output, returns it in our form

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
        kind = getattr(transformers, self.architecture)
        torch.manual_seed(seed)
        # the eager softmax of ViT is always float32
        attention = "sdpa" if self.inputs == "images" else "eager"
        model = kind(kind.config_class(**self.config, attn_implementation=attention))
        return perturb(model, seed).to(dtype).eval()

    def ours(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """The outputs of our model for random inputs, some of them padded on the right. Outputs at
        padding are left out."""
        x = self._inputs(next(model.parameters()).dtype)
        if self.inputs == "images":
            return _cut(model(x["images"]), None)
        if self.inputs == "choices":
            types = self._types(model.config.token_types, x["choices"])
            choices = {"mask": x["choice_mask"].bool(), "token_types": types}
            return [model(x["choices"], **choices)]
        if self.inputs == "ends":
            source = self._ended(x["source"], x["source_mask"], model.config.end_token)
            return [model(x["before"], source=source, source_mask=x["source_mask"].bool())]
        if self.inputs == "both":
            out = model(x["tokens"], source=x["source"], source_mask=x["source_mask"].bool())
            return _cut(out, torch.ones_like(x["mask"]))
        types = {"token_types": x["types"]} if self.inputs == "pair" else {}
        tokens = self._padded(x, model.config.pad_token)
        return _cut(model(tokens, mask=x["mask"].bool(), **types), x["mask"])

    def theirs(self, model: Any) -> list[torch.Tensor]:
        """The outputs of the model of transformers for the same inputs."""
        x = self._inputs(next(model.parameters()).dtype)
        if self.inputs == "images":
            return _cut(self.outputs(model(x["images"])), None)
        if self.inputs == "choices":
            types = self._types(getattr(model.config, "type_vocab_size", 0), x["choices"])
            types = {} if types is None else {"token_type_ids": types}
            return [model(x["choices"], attention_mask=x["choice_mask"], **types).logits]
        if self.inputs == "ends":
            source = self._ended(x["source"], x["source_mask"], model.config.eos_token_id)
            return [model(source, x["source_mask"], decoder_input_ids=x["before"]).logits]
        if self.inputs == "both":
            out = model(
                input_ids=x["source"],
                attention_mask=x["source_mask"],
                decoder_input_ids=x["tokens"],
            )
            return _cut(self.outputs(out), torch.ones_like(x["mask"]))
        types = {"token_type_ids": x["types"]} if self.inputs == "pair" else {}
        tokens = self._padded(x, model.config.pad_token_id)
        out = model(tokens, attention_mask=x["mask"], **types)
        return _cut(self.outputs(out), x["mask"])

    def _inputs(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        tokens, source = (torch.randint(V, (2, n), generator=generator) for n in (T, T + 4))
        mask, source_mask = torch.ones_like(tokens), torch.ones_like(source)
        mask[1, T - 3 :] = source_mask[1, T:] = 0
        images = torch.randn(2, 3, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
        for pad in range(8):  # tokens that pad some family, and are seen here
            tokens[0, pad] = source[0, pad] = pad if pad != 5 else V - 1
        before = source.roll(1, 1)
        choices = torch.randint(V, (2, 3, T), generator=generator)
        choice_mask = torch.ones_like(choices)
        choice_mask[1, :, T - 3 :] = 0
        types = (torch.arange(T) > 5).long().expand(2, T)
        return {
            "tokens": tokens, "mask": mask, "source": source, "source_mask": source_mask,
            "types": types, "images": images, "before": before, "choices": choices,
            "choice_mask": choice_mask,
        }  # fmt: skip

    @staticmethod
    def _padded(x: dict[str, torch.Tensor], pad: int | None) -> torch.Tensor:
        """The tokens, of which those behind the end are the one for padding, if there is one."""
        return x["tokens"] if pad is None else x["tokens"].masked_fill(x["mask"] == 0, pad)

    @staticmethod
    def _types(kinds: int, tokens: torch.Tensor) -> torch.Tensor | None:
        return torch.arange(tokens.numel()).view_as(tokens) % kinds if kinds else None

    @staticmethod
    def _ended(source: torch.Tensor, mask: torch.Tensor, end: int) -> torch.Tensor:
        """The source with one end in each row, and more behind it where the row is padded."""
        source = source.masked_fill(source == end, 5)
        return source.scatter(1, mask.sum(1, keepdim=True) - 1, end)


def _cut(x: Any, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Every output, without the values at padding."""
    cut = []
    for y in x if isinstance(x, tuple) else (x,):
        if mask is not None and y.dim() == 3:
            y = (y if y.shape[1] == T else y.transpose(1, 2))[mask.bool()]
        cut.append(y)
    return cut


def _logits(out):
    return out.logits


def _hidden(out):
    return out.last_hidden_state


def _span(out):
    return torch.stack([out.start_logits, out.end_logits], 1)


def _decoders(name: str, family: str, config: dict[str, Any], *heads: str) -> dict[str, Case]:
    """The heads of a family of decoders: for the next token, none, and those that are named."""
    classes = config | _PAD | _CLASSES
    known = {
        "": Case(f"{family}ForCausalLM", config, "tokens", _logits),
        "-bare": Case(f"{family}Model", config, "tokens", _hidden),
        "-sequence": Case(f"{family}ForSequenceClassification", classes, "tokens", _logits),
        "-token": Case(f"{family}ForTokenClassification", config | _CLASSES, "tokens", _logits),
        "-span": Case(f"{family}ForQuestionAnswering", config, "tokens", _span),
    }
    return {f"{name}{head}": known[head] for head in ("", "-bare", *heads)}


def _of_each_kind(name: str, family: str, config: dict[str, Any]) -> dict[str, Case]:
    """The heads of a family of encoders."""
    classes = config | _CLASSES
    return {
        name: Case(f"{family}ForMaskedLM", config, "tokens", _logits),
        f"{name}-bare": Case(f"{family}Model", config, "tokens", _hidden),
        f"{name}-sequence": Case(f"{family}ForSequenceClassification", classes, "tokens", _logits),
        f"{name}-token": Case(f"{family}ForTokenClassification", classes, "tokens", _logits),
        f"{name}-span": Case(f"{family}ForQuestionAnswering", config, "tokens", _span),
        f"{name}-choice": Case(f"{family}ForMultipleChoice", config, "choices", _logits),
    }


CASES = {
    "gpt1": Case("OpenAIGPTLMHeadModel", _GPT, "tokens", _logits),
    "gpt1-bare": Case("OpenAIGPTModel", _GPT, "tokens", _hidden),
    "gpt2": Case("GPT2LMHeadModel", _GPT | {"n_inner": 40}, "tokens", _logits),
    "gpt2-bare": Case("GPT2Model", _GPT, "tokens", _hidden),
    "gpt2-pad": Case("GPT2LMHeadModel", _GPT | _PAD, "tokens", _logits),
    "gpt1-pad": Case("OpenAIGPTLMHeadModel", _GPT | _PAD, "tokens", _logits),
    "gpt1-sequence": Case("OpenAIGPTForSequenceClassification", _ENDED, "tokens", _logits),
    "gpt2-sequence": Case("GPT2ForSequenceClassification", _ENDED, "tokens", _logits),
    "gpt2-token": Case("GPT2ForTokenClassification", _GPT | _CLASSES, "tokens", _logits),
    "gpt2-span": Case("GPT2ForQuestionAnswering", _GPT, "tokens", _span),
    "gpt2-untied": Case(
        "GPT2LMHeadModel", _GPT | {"tie_word_embeddings": False}, "tokens", _logits
    ),
    "bert": Case(
        "BertForPreTraining",
        _BERT,
        "pair",
        lambda out: (out.prediction_logits, out.seq_relationship_logits),
    ),
    "bert-bare": Case("BertModel", _BERT, "pair", _hidden),
    "bert-mlm": Case("BertForMaskedLM", _BERT, "pair", _logits),
    "bert-nsp": Case("BertForNextSentencePrediction", _BERT, "pair", _logits),
    "bert-sequence": Case(
        "BertForSequenceClassification", _BERT | {"num_labels": 5}, "pair", _logits
    ),
    "bert-token": Case("BertForTokenClassification", _BERT | {"num_labels": 5}, "pair", _logits),
    "bert-choice": Case("BertForMultipleChoice", _BERT, "choices", _logits),
    "bert-span": Case("BertForQuestionAnswering", _BERT, "pair", _span),
    **_of_each_kind("roberta", "Roberta", _ROBERTA),
    **_of_each_kind("xlmr", "XLMRoberta", _ROBERTA | {"pad_token_id": 3}),
    **_of_each_kind("distilbert", "DistilBert", _DISTILBERT),
    "bart-sequence": Case("BartForSequenceClassification", _BART | _CLASSES, "ends", _logits),
    "bart-span": Case("BartForQuestionAnswering", _BART, "both", _span),
    "mbart": Case("MBartForConditionalGeneration", _BART, "both", _logits),
    "mbart-bare": Case("MBartModel", _BART | {"scale_embedding": True}, "both", _hidden),
    "mbart-sequence": Case("MBartForSequenceClassification", _BART | _CLASSES, "ends", _logits),
    "mbart-span": Case("MBartForQuestionAnswering", _BART, "both", _span),
    "marian": Case("MarianMTModel", _MARIAN, "both", _logits),
    "marian-bare": Case("MarianModel", _MARIAN, "both", _hidden),
    "pegasus": Case("PegasusForConditionalGeneration", _PEGASUS, "both", _logits),
    "pegasus-bare": Case("PegasusModel", _PEGASUS, "both", _hidden),
    "bart": Case("BartForConditionalGeneration", _BART, "both", _logits),
    "bart-bare": Case("BartModel", _BART | {"scale_embedding": True}, "both", _hidden),
    "t5": Case("T5ForConditionalGeneration", _T5, "both", _logits),
    "t5-bare": Case("T5Model", _T5, "both", _hidden),
    "t5-encoder": Case("T5EncoderModel", _T5, "tokens", _hidden),
    "t5-v1.1": Case(
        "T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}, "both", _logits
    ),
    "t5-flan": Case("T5ForConditionalGeneration", _V1_1, "both", _logits),
    "t5-sequence": Case("T5ForSequenceClassification", _T5 | _CLASSES, "ends", _logits),
    "t5-token": Case("T5ForTokenClassification", _T5 | _CLASSES, "tokens", _logits),
    "t5-span": Case("T5ForQuestionAnswering", _T5, "both", _span),
    "mt5": Case("MT5ForConditionalGeneration", _V1_1, "both", _logits),
    "mt5-bare": Case("MT5Model", _T5, "both", _hidden),
    "mt5-encoder": Case("MT5EncoderModel", _T5, "tokens", _hidden),
    "mt5-sequence": Case("MT5ForSequenceClassification", _T5 | _CLASSES, "ends", _logits),
    "mt5-token": Case("MT5ForTokenClassification", _T5 | _CLASSES, "tokens", _logits),
    "mt5-span": Case("MT5ForQuestionAnswering", _T5, "both", _span),
    "llama": Case("LlamaForCausalLM", _LLAMA | {"pad_token_id": 3}, "tokens", _logits),
    "llama-bare": Case("LlamaModel", _LLAMA | {"num_key_value_heads": 4}, "tokens", _hidden),
    "llama-bias": Case(
        "LlamaForCausalLM",
        _LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "tokens",
        _logits,
    ),
    "llama-bias-of-attention": Case(
        "LlamaForCausalLM", _LLAMA | {"attention_bias": True}, "tokens", _logits
    ),
    "llama-bias-of-mlp": Case("LlamaForCausalLM", _LLAMA | {"mlp_bias": True}, "tokens", _logits),
    "llama-base": Case(
        "LlamaForCausalLM",
        _LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "tokens",
        _logits,
    ),
    "llama-linear": Case(
        "LlamaForCausalLM",
        _LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
        "tokens",
        _logits,
    ),
    "llama-3.1": Case("LlamaForCausalLM", _LLAMA | {"rope_parameters": _LLAMA3}, "tokens", _logits),
    "llama-yarn": Case("LlamaForCausalLM", _LLAMA | {"rope_parameters": _YARN}, "tokens", _logits),
    "llama-longrope": Case(
        "LlamaForCausalLM", _LLAMA | {"rope_parameters": _LONGROPE}, "tokens", _logits
    ),
    "llama-dynamic": Case(
        "LlamaForCausalLM",
        _LLAMA | {"rope_parameters": _DYNAMIC, "max_position_embeddings": 6},
        "tokens",
        _logits,
    ),
    "llama-sequence": Case(
        "LlamaForSequenceClassification", _LLAMA | _PAD | _CLASSES, "tokens", _logits
    ),
    "llama-token": Case("LlamaForTokenClassification", _LLAMA | _CLASSES, "tokens", _logits),
    "qwen2-yarn": Case(
        "Qwen2ForCausalLM", _LLAMA | {"rope_parameters": _MSCALE}, "tokens", _logits
    ),
    "llama-span": Case("LlamaForQuestionAnswering", _LLAMA, "tokens", _span),
    **_decoders("qwen2", "Qwen2", _LLAMA, "-sequence", "-token", "-span"),
    "qwen2-tied": Case(
        "Qwen2ForCausalLM", _LLAMA | {"tie_word_embeddings": True}, "tokens", _logits
    ),
    "qwen2-windows": Case("Qwen2ForCausalLM", _QWEN_WINDOWS, "tokens", _logits),
    "qwen2-last-windows": Case(
        "Qwen2ForCausalLM",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "tokens",
        _logits,
    ),
    **_decoders("qwen3", "Qwen3", _LLAMA, "-sequence", "-token", "-span"),
    "qwen3-tied": Case(
        "Qwen3ForCausalLM",
        _LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True, "pad_token_id": 3},
        "tokens",
        _logits,
    ),
    "qwen3-windows": Case("Qwen3ForCausalLM", _QWEN_WINDOWS, "tokens", _logits),
    **_decoders("olmo2", "Olmo2", _LLAMA, "-sequence"),
    "olmo2-plain": Case(
        "Olmo2ForCausalLM",
        _LLAMA | {"num_key_value_heads": 4, "rope_parameters": _LLAMA3, "pad_token_id": None},
        "tokens",
        _logits,
    ),
    **_decoders("gemma", "Gemma", _LLAMA, "-sequence", "-token"),
    **_decoders("gemma2", "Gemma2", _GEMMA2, "-sequence", "-token"),
    "gemma2-uncapped": Case(
        "Gemma2ForCausalLM",
        _GEMMA2
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention"] * 3,
        },
        "tokens",
        _logits,
    ),
    "gemma3": Case("Gemma3ForCausalLM", _GEMMA3, "tokens", _logits),
    "gemma3-yarn": Case(
        "Gemma3ForCausalLM",
        _GEMMA3
        | {
            "rope_parameters": {
                "full_attention": _YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
        "tokens",
        _logits,
    ),
    "gemma3-bare": Case("Gemma3TextModel", _GEMMA3, "tokens", _hidden),
    "gemma3-sequence": Case(
        "Gemma3TextForSequenceClassification", _GEMMA3 | _PAD | _CLASSES, "tokens", _logits
    ),
    "gemma3-capped": Case(
        "Gemma3ForCausalLM",
        _GEMMA3 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "tokens",
        _logits,
    ),
    "mistral": Case("MistralForCausalLM", _LLAMA | {"sliding_window": 4}, "tokens", _logits),
    "mistral-yarn": Case(
        "MistralForCausalLM",
        _LLAMA | {"rope_parameters": _YARN | {"attention_factor": 0.8}, "sliding_window": 4},
        "tokens",
        _logits,
    ),
    "mistral-bare": Case("MistralModel", _LLAMA | {"sliding_window": None}, "tokens", _hidden),
    "phi3": Case("Phi3ForCausalLM", _PHI3 | {"sliding_window": 4}, "tokens", _logits),
    "phi3-bare": Case("Phi3Model", _PHI3, "tokens", _hidden),
    "phi3-long": Case("Phi3ForCausalLM", _PHI3 | _LONG_PHI3, "tokens", _logits),
    "phi3-short": Case(
        "Phi3ForCausalLM",
        _PHI3 | _LONG_PHI3 | {"original_max_position_embeddings": 16},
        "tokens",
        _logits,
    ),
    "phi3-between": Case(
        "Phi3ForCausalLM",
        _PHI3 | _LONG_PHI3 | {"original_max_position_embeddings": 11},
        "tokens",
        _logits,
    ),
    "phi3-partial": Case(
        "Phi3ForCausalLM",
        _PHI3
        | {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 8,
            "rope_parameters": _LONGROPE
            | {
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.2],
                "long_factor": [1.5, 3.0],
                "attention_factor": 1.3,
                "factor": 7.0,
            },
        },
        "tokens",
        _logits,
    ),
    "phi3-sequence": Case(
        "Phi3ForSequenceClassification", _PHI3 | _PAD | _CLASSES, "tokens", _logits
    ),
    "phi3-token": Case("Phi3ForTokenClassification", _PHI3 | _CLASSES, "tokens", _logits),
    "neox": Case("GPTNeoXForCausalLM", _NEOX | {"pad_token_id": 3}, "tokens", _logits),
    "neox-bare": Case("GPTNeoXModel", _NEOX, "tokens", _hidden),
    "neox-serial": Case(
        "GPTNeoXForCausalLM",
        _NEOX
        | {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"},
        "tokens",
        _logits,
    ),
    "neox-few-biases": Case(
        "GPTNeoXForCausalLM", _NEOX | {"attention_bias": False}, "tokens", _logits
    ),
    "neox-whole": Case(
        "GPTNeoXForCausalLM",
        _NEOX
        | {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 3.0,
                "rope_theta": 500.0,
                "partial_rotary_factor": 1.0,
            }
        },
        "tokens",
        _logits,
    ),
    "neox-dynamic": Case(
        "GPTNeoXForCausalLM",
        _NEOX
        | {
            "rope_parameters": _DYNAMIC | {"partial_rotary_factor": 0.5},
            "max_position_embeddings": 6,
        },
        "tokens",
        _logits,
    ),
    "neox-sequence": Case(
        "GPTNeoXForSequenceClassification", _NEOX | _PAD | _CLASSES, "tokens", _logits
    ),
    "neox-token": Case("GPTNeoXForTokenClassification", _NEOX | _CLASSES, "tokens", _logits),
    "neox-span": Case("GPTNeoXForQuestionAnswering", _NEOX, "tokens", _span),
    "opt": Case("OPTForCausalLM", _OPT, "tokens", _logits),
    "opt-bare": Case("OPTModel", _OPT, "tokens", _hidden),
    "opt-untied": Case("OPTForCausalLM", _OPT | {"tie_word_embeddings": False}, "tokens", _logits),
    "opt-sequence": Case("OPTForSequenceClassification", _OPT | _CLASSES, "tokens", _logits),
    "opt-span": Case("OPTForQuestionAnswering", _OPT, "tokens", _span),
    "opt-350m": Case("OPTForCausalLM", _OPT | _OPT_350M, "tokens", _logits),
    "opt-350m-bare": Case("OPTModel", _OPT | _OPT_350M, "tokens", _hidden),
    "opt-350m-untied": Case(
        "OPTForCausalLM", _OPT | _OPT_350M | {"tie_word_embeddings": False}, "tokens", _logits
    ),
    "opt-350m-sequence": Case(
        "OPTForSequenceClassification", _OPT | _OPT_350M | _CLASSES, "tokens", _logits
    ),
    "opt-350m-span": Case("OPTForQuestionAnswering", _OPT | _OPT_350M, "tokens", _span),
    "mistral-span": Case("MistralForQuestionAnswering", _LLAMA, "tokens", _span),
    "mistral-token": Case("MistralForTokenClassification", _LLAMA | _CLASSES, "tokens", _logits),
    "mistral-sequence": Case(
        "MistralForSequenceClassification", _LLAMA | _PAD | _CLASSES, "tokens", _logits
    ),
    "vit": Case("ViTForImageClassification", _VIT, "images", _logits),
    "vit-bare": Case("ViTModel", _VIT, "images", _hidden),
}
