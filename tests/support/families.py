"""Prints a table of families of transformers: how much of a small model `hf.patch` and
`hf.register` run on tfkern, and how far the results are from those of the model alone.

python tests/support/families.py [family ...]
"""

import copy
import sys
import warnings

import torch
from huggingface import transformers
from weights import perturb

from tfkern.integrations import hf
from tfkern.integrations.hf import worth

_SMALL = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GROUPED = _SMALL | {"num_key_value_heads": 2, "head_dim": 8}
_GEMMA = _GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 8}
_GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_SIDES = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip

FAMILIES = {  # the class and its configuration
    "GPT": ("OpenAIGPTLMHeadModel", _GPT),
    "GPT-2": ("GPT2LMHeadModel", _GPT),
    "GPT-Neo": ("GPTNeoForCausalLM", {"vocab_size": 61, "hidden_size": 32, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8}),
    "GPT-BigCode": ("GPTBigCodeForCausalLM", _GPT),
    "GPT-J": ("GPTJForCausalLM", _GPT | {"rotary_dim": 4}),
    "CodeGen": ("CodeGenForCausalLM", _GPT | {"rotary_dim": 4}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", _SMALL),
    "GPT-NeoX serial": ("GPTNeoXForCausalLM", _SMALL | {"use_parallel_residual": False}),
    "OPT": ("OPTForCausalLM", _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "XGLM": ("XGLMForCausalLM", {"vocab_size": 61, "d_model": 32, "num_layers": 2, "ffn_dim": 48,
        "attention_heads": 4, "pad_token_id": 0}),
    "BLOOM": ("BloomForCausalLM", {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": ("FalconForCausalLM", _SMALL),
    "Falcon new": ("FalconForCausalLM", _SMALL | {"new_decoder_architecture": True,
        "num_kv_heads": 2}),
    "MPT": ("MptForCausalLM", {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "Llama": ("LlamaForCausalLM", _GROUPED),
    "Mistral": ("MistralForCausalLM", _GROUPED | {"sliding_window": 8}),
    "Ministral": ("MinistralForCausalLM", _GROUPED | {"sliding_window": 8}),
    "Mixtral": ("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}),
    "Qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", _GROUPED | {"moe_intermediate_size": 24, "num_experts": 4,
        "shared_expert_intermediate_size": 24}),
    "Qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "Gemma": ("GemmaForCausalLM", _GROUPED),
    "Gemma 2": ("Gemma2ForCausalLM", _GEMMA),
    "Gemma 3": ("Gemma3ForCausalLM", _GEMMA),
    "Gemma 3n": ("Gemma3nForCausalLM", _GEMMA | {"num_hidden_layers": 4,
        "intermediate_size": [48] * 4, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 61,
        "laurel_rank": 8, "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "T5Gemma": ("T5GemmaForConditionalGeneration", {"encoder": _GEMMA, "decoder": _GEMMA
        | {"cross_attention_hidden_size": 32}, "vocab_size": 61}),
    "Cohere": ("CohereForCausalLM", _GROUPED),
    "Cohere qk-norm": ("CohereForCausalLM", _GROUPED | {"use_qk_norm": True}),
    "Cohere 2": ("Cohere2ForCausalLM", _GROUPED | {"sliding_window": 8}),
    "Phi": ("PhiForCausalLM", _SMALL),
    "Phi-3": ("Phi3ForCausalLM", _SMALL),
    "StableLM": ("StableLmForCausalLM", _GROUPED),
    "StableLM parallel": ("StableLmForCausalLM", _GROUPED | {"use_parallel_residual": True}),
    "StarCoder2": ("Starcoder2ForCausalLM", _GROUPED | {"sliding_window": None}),
    "OLMo": ("OlmoForCausalLM", _SMALL),
    "OLMo2": ("Olmo2ForCausalLM", _SMALL),
    "Granite": ("GraniteForCausalLM", _GROUPED | {"residual_multiplier": 0.5}),
    "GLM": ("GlmForCausalLM", _GROUPED),
    "GLM-4": ("Glm4ForCausalLM", _GROUPED),
    "Nemotron": ("NemotronForCausalLM", _GROUPED),
    "SmolLM3": ("SmolLM3ForCausalLM", _GROUPED),
    "Seed-OSS": ("SeedOssForCausalLM", _GROUPED),
    "BitNet": ("BitNetForCausalLM", _GROUPED),
    "Doge": ("DogeForCausalLM", _GROUPED),
    "Falcon-H1": ("FalconH1ForCausalLM", _GROUPED | {"mamba_d_ssm": 32, "mamba_n_heads": 4,
        "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
        "mlp_multipliers": [0.5, 2.0]}),
    "Llama 4": ("Llama4ForCausalLM", _GROUPED | {"intermediate_size_mlp": 48,
        "num_local_experts": 2, "interleave_moe_layer_step": 2}),
    "Mamba 2": ("Mamba2ForCausalLM", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2,
        "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}),
    "BERT": ("BertForMaskedLM", _SMALL),
    "RoBERTa": ("RobertaForMaskedLM", _SMALL),
    "ELECTRA": ("ElectraForMaskedLM", _SMALL | {"embedding_size": 32}),
    "ALBERT": ("AlbertForMaskedLM", _SMALL | {"embedding_size": 16}),
    "DistilBERT": ("DistilBertForMaskedLM", {"vocab_size": 61, "dim": 32, "n_layers": 2,
        "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}),
    "MPNet": ("MPNetForMaskedLM", _SMALL | {"pad_token_id": 1}),
    "DeBERTa": ("DebertaForMaskedLM", _SMALL),
    "DeBERTa v2": ("DebertaV2ForMaskedLM", _SMALL | {"relative_attention": True,
        "pos_att_type": ["p2c", "c2p"]}),
    "ModernBERT": ("ModernBertForMaskedLM", _SMALL | {"cls_token_id": 1, "sep_token_id": 2,
        "local_attention": 8}),
    "BART": ("BartForConditionalGeneration", _SIDES),
    "mBART": ("MBartForConditionalGeneration", _SIDES),
    "Marian": ("MarianMTModel", _SIDES),
    "Pegasus": ("PegasusForConditionalGeneration", _SIDES),
    "T5": ("T5ForConditionalGeneration", _T5),
    "T5 v1.1": ("T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "UMT5": ("UMT5ForConditionalGeneration", _T5),
    "ViT": ("ViTModel", _VISION),
    "DeiT": ("DeiTModel", _VISION),
    "DINOv2": ("Dinov2Model", _VISION | {"use_swiglu_ffn": True}),
    "SigLIP": ("SiglipVisionModel", _VISION),
    "CLIP": ("CLIPVisionModel", _VISION),
    "CLIP text": ("CLIPTextModel", _SMALL),
    "SegFormer": ("SegformerModel", {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16}),
    "Swin": ("SwinModel", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
        "num_heads": [2, 2], "window_size": 4}),
}  # fmt: skip


def model(family, seed=0):
    """A small model of the family in float32, whose weights all matter."""
    name, config = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    config = kind.config_class(**copy.deepcopy(config))
    config._attn_implementation = "eager"
    return perturb(kind(config)).eval()


def inputs(module, seed=1):
    """Two prompts of unequal length, padded on the left; or images."""
    generator = torch.Generator().manual_seed(seed)
    if module.main_input_name == "pixel_values":
        size = getattr(module.config, "image_size", 64)
        images = torch.randn(2, 3, size, size, generator=generator)
        return {"pixel_values": images.to(next(module.parameters()).dtype)}
    tokens = torch.randint(3, 61, (2, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    given = {"input_ids": tokens, "attention_mask": mask}
    if module.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 61, (2, 6), generator=generator)
    return given


def results(module, generates=True):
    """The first output, gradients of the parameters, and tokens that greedy search makes."""
    given = inputs(module)
    module.zero_grad()
    out = module(**given)[0]
    if out.dim() == 3 and "attention_mask" in given and "decoder_input_ids" not in given:
        out = out[given["attention_mask"].bool()]  # what stands at pads has no meaning
    out.double().sin().sum().backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    tokens = None
    if generates and module.can_generate():
        given.pop("decoder_input_ids", None)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        tokens = module.generate(**given, **options)
    return out.detach(), gradients, tokens


def difference(ours, theirs):
    """The largest difference, as a part of the largest value."""
    scale = theirs.abs().max().item() or 1.0
    return (ours - theirs).abs().max().item() / scale


def row(family):
    plain = model(family)
    ours = copy.deepcopy(plain)
    try:
        ours.set_attn_implementation("tfkern")
    except Exception:  # the family has only its own attention
        ours = copy.deepcopy(plain)
    norms = [n for n, m in plain.named_modules() if "norm" in type(m).__name__.lower()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = hf.patch(ours).names
    others = [n for n in names if n not in norms]
    out, gradients, tokens = results(plain)
    got, grads, made = results(ours)
    largest = max(g.abs().max().item() for g in gradients.values())
    worst = max((grads[n] - g).abs().max().item() for n, g in gradients.items() if n in grads)
    worst /= largest
    lost = sum(bool(g.any()) and n not in grads for n, g in gradients.items())
    same = "-" if tokens is None else "yes" if torch.equal(tokens, made) else "NO"
    kinds = sorted({type(ours.get_submodule(n)).__name__ for n in others})
    return (
        f"{family:18} | {len([n for n in norms if n in names]):2}/{len(norms):2} | "
        f"{difference(got, out):.1e} | {worst:.1e}{f' ({lost} lost)' if lost else ''} | {same:3} | "
        f"{', '.join(kinds)}"
    )


def main(families):
    hf.register()
    worth._costs = lambda x: False  # these models are so small that none would run on tfkern
    print("family             | norms | logits  | grads   | generate | other patched modules")
    for family in families or FAMILIES:
        try:
            print(row(family), flush=True)
        except Exception as error:
            print(f"{family:18} | raises {type(error).__name__}: {str(error)[:90]}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
