"""Small modules of every class of the installed transformers, made from default configurations."""

import copy
import importlib
import inspect
import pkgutil
import re
import warnings

import torch
from huggingface import transformers
from torch import nn

NAMED = re.compile("mlp|ffn|feed_?forward|norm", re.IGNORECASE)  # classes that must not be missed
_SIZES = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48, "ffn_hidden_size": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_attention_heads": 4, "n_head": 4,
    "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100,
}  # fmt: skip
_COUNTS = {
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 1,
    "decoder_layers": 1, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_experts": 4,
    "n_routed_experts": 4, "num_local_experts": 4, "vocab_size": 100,
}  # fmt: skip


def files(families=None):
    """Modules of transformers with models in them that can be imported here, of all families or of
    those named."""
    for family in pkgutil.iter_modules(transformers.models.__path__):
        if families and family.name not in families:
            continue
        folder = importlib.import_module(f"transformers.models.{family.name}")
        for file in pkgutil.iter_modules(getattr(folder, "__path__", [])):
            if file.name.startswith("modeling_"):
                try:
                    yield importlib.import_module(f"{folder.__name__}.{file.name}")
                except ImportError:  # a library that the model needs is absent
                    continue


def classes(file):
    """Classes of modules that the file defines."""
    return {
        c
        for c in vars(file).values()
        if inspect.isclass(c) and issubclass(c, nn.Module) and c.__module__ == file.__name__
    }


def modules(file):
    """One module of each class that a model of the file has, without memory."""
    wanted, found = classes(file), {}
    whole = [c for c in wanted if issubclass(c, transformers.PreTrainedModel)]
    for kind in sorted(whole, key=lambda c: (NAMED.search(c.__name__) is None, c.__name__)):
        if wanted - set(whole) <= found.keys():
            break
        model = _built(kind)
        for module in () if model is None else model.modules():
            found.setdefault(type(module), module)
    for kind in wanted - found.keys():
        if NAMED.search(kind.__name__):
            module = _alone(kind, {c.config_class for c in whole if c.config_class})
            if module is not None:
                found[kind] = module
    return found


def _alone(kind, configurations):
    """A module that no model has by default, from the arguments that such classes take."""
    for configuration in sorted(configurations, key=lambda c: c.__name__):
        try:
            config = configuration()
            _shrink(config, _SIZES | _COUNTS)
        except Exception:
            continue
        for text in (config, getattr(config, "text_config", config)):
            for args in _arguments(text):
                try:
                    with warnings.catch_warnings(), torch.device("meta"):
                        warnings.simplefilter("ignore")
                        return kind(*args)
                except Exception:
                    continue
    return None


def _arguments(config):
    return (
        (config,), (config, 48), (config, 32, 48), (config, 0), (32,), (32, 48), (32, 48, 32),
    )  # fmt: skip


def _built(kind):
    for sizes in (_SIZES | _COUNTS, _COUNTS, {}):
        try:
            config = kind.config_class()
            _shrink(config, sizes)
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")
                return kind(config)
        except Exception:  # sizes that do not fit together, or no default configuration
            continue
    return None


def _shrink(config, sizes):
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _shrink(value, sizes)
        elif type(value) is int and sizes and name.endswith("_token_id"):
            setattr(config, name, min(value, 3))
        elif name in sizes and type(value) is int:
            setattr(config, name, min(value, sizes[name]))
        elif name in sizes and isinstance(value, list) and all(type(v) is int for v in value):
            setattr(config, name, [min(v, sizes[name]) for v in value])


def filled(module, seed=0):
    """A copy in float64 whose parameters all matter, with dropout of 0.3 wherever there is any."""
    module = copy.deepcopy(module).to_empty(device="cpu").double()
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor = tensor.data
        if tensor.is_floating_point():
            scale = 0.5 if tensor.dim() < 2 else max(1, tensor[:1].numel()) ** -0.5
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(drawn * scale + (0.5 if tensor.dim() < 2 else 0))
        else:
            tensor.zero_()
    for part in module.modules():
        for name, value in vars(part).items():
            if ("drop" in name or name == "p") and type(value) in (int, float):
                setattr(part, name, 0.3)
    return module
