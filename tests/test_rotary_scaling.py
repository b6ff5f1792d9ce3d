"""Tables of scaled rotary positions, against those of transformers."""

import math
import random

import pytest
import torch
from huggingface import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tfkern.models.convert import rotary
from tfkern.nn import RotaryScaling
from tfkern.nn.rotary import rotary_table

HEADS = (4, 16, 64, 96)


def drawn(kind, draw):
    """Numbers of a scaling, as config.json has them, and the other fields that they go with."""
    size = draw.choice(HEADS)
    fraction = draw.choice((1.0, 0.5, 0.75)) if size > 4 else 1.0
    first, factor = draw.choice((16, 100, 4096)), draw.choice((1.0, 1.5, 4.0, 40.0))
    told = {"rope_type": kind, "factor": factor, "rope_theta": draw.choice((300.0, 1e4, 1e6))}
    if kind in ("llama3", "yarn", "longrope"):
        told["original_max_position_embeddings"] = first
    if kind == "llama3":
        told |= {"low_freq_factor": draw.choice((0.5, 1.0)), "high_freq_factor": 4.0}
    if kind == "yarn":
        optional = {
            "beta_fast": draw.choice((8.0, 32, None)), "beta_slow": draw.choice((0.5, 1, 2.0)),
            "truncate": draw.choice((True, False)), "attention_factor": draw.choice((None, 0.7)),
            "mscale": draw.choice((0.7, 1.0)), "mscale_all_dim": draw.choice((0.4, 1.0, 0)),
        }  # fmt: skip
        told |= {name: x for name, x in optional.items() if draw.random() < 0.5}
        if draw.random() < 0.2:
            told["factor"] = None
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            told[name] = [draw.uniform(1, 9) for _ in range(int(size * fraction) // 2)]
        if draw.random() < 0.5:
            del told["factor"]
        if draw.random() < 0.5:
            told["attention_factor"] = draw.uniform(0.5, 2)
    longest = int(first * factor)
    return told | {"partial_rotary_factor": fraction}, size, longest


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope", "dynamic"])
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tables_are_those_of_transformers(kind, seed, dtype):
    """For texts that are shorter and longer than those of the first training."""
    told, size, longest = drawn(kind, random.Random(f"{kind} {seed}"))
    config = transformers.LlamaConfig(
        hidden_size=2 * size, num_attention_heads=2, head_dim=size, rope_parameters=dict(told),
        max_position_embeddings=longest,
    )  # fmt: skip
    defaults = {name: known.default for name, known in rotary.FIELDS.items()}
    read = rotary.read(
        defaults | {"rope_parameters": told, "max_position_embeddings": longest}, partial=True
    )
    width = int(size * read["rotary_fraction"])
    first = told.get("original_max_position_embeddings", longest)
    for length in (1, first, first + 1, 2 * first + 3):
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        positions = torch.arange(max(0, length - 20), length)[None]
        x = torch.zeros(1, dtype=dtype)
        cos, sin = rotary_table(positions, width, read["rotary_base"], x, read["rotary_scaling"])
        assert cos.dtype == sin.dtype == torch.promote_types(dtype, torch.float32)
        angles = positions[..., None] * frequencies.double()
        for ours, theirs in ((cos, angles.cos()), (sin, angles.sin())):
            expected = amplitude * torch.cat([theirs, theirs], -1)
            # their frequencies are float32, and positions multiply this error
            torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-6 * (length + 1))


def test_published_amplitudes():
    """By the formulas of the papers."""
    yarn = RotaryScaling(kind="yarn", factor=16, length=4096)
    assert yarn.size == pytest.approx(0.1 * math.log(16) + 1)
    numbers = (1.0,) * 48
    long = RotaryScaling(kind="longrope", factor=32, length=4096, short=numbers, long=numbers)
    assert long.size == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert RotaryScaling(kind="yarn", factor=0.5, length=9).size == 1
    assert RotaryScaling(kind="yarn", factor=4, length=9, amplitude=0.3).size == 0.3
    assert RotaryScaling(kind="dynamic", factor=4, length=9).size == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "su"}, "kind must be one of"),
        ({"length": None}, "length must be a positive integer"),
        ({"length": 2.0}, "length must be a positive integer"),
        ({"length": 10**30}, "length must be a positive integer"),
        ({"factor": float("nan")}, "factor must be positive"),
        ({"amplitude": 0.0}, "amplitude must be positive"),
        ({"high": 0.5}, "low must be less than high"),
        ({"truncate": 1}, "truncate must be True or False"),
        ({"short": (1.0,), "long": (1.0,)}, "'longrope' alone has numbers"),
        ({"kind": "longrope"}, "'longrope' alone has numbers"),
        ({"kind": "longrope", "short": (1.0,), "long": (1.0, 2.0)}, "and as many of them"),
        ({"kind": "longrope", "short": (1.0,), "long": "1"}, "long must be positive"),
        ({"kind": "longrope", "short": (0.0,), "long": (1.0,)}, "short must be positive"),
        ({"kind": "longrope", "short": (1.0,), "long": (1.0,), "length": 1}, "exceed 1"),
    ],
)
def test_what_no_scaling_has(changes, message):
    with pytest.raises(ValueError, match=message):
        RotaryScaling(**{"kind": "yarn", "factor": 2.0, "length": 8} | changes)
