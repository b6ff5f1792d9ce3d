"""Combinations of attention's options, pairwise and random, on every backend."""

import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tfkern
from tfkern.testing import validate
from tfkern.validation.attention import (
    PARAMETERS,
    floor_scale,
    make_case,
    possible,
    torch_attention,
)

DTYPES = ("float32", "bfloat16", "float16", "float64")


def drawing(device, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


def run(choice, backend, device, seed=0):
    choice = dict(choice)
    dtype = getattr(torch, choice.pop("dtype", "float32"))
    if backend == "triton" and dtype == torch.float64:
        dtype = torch.float32  # which is its widest
    case = make_case(choice, drawing(device, dtype, seed), random.Random(seed), backend)
    case.run(seed).check()


# Each case gives one parameter one of its values; the others have their first.
SINGLE = [
    pytest.param({name: value}, id=f"{name}-{value}")
    for name, values in PARAMETERS.items()
    for value in values[1:]
]

LISTS = PARAMETERS | {"dtype": DTYPES}


def pairwise():
    """Choices with every possible pair of values of two parameters, in far fewer cases than the
    full product: each begins with a pair that is missing, and takes on what covers most others."""
    rng = random.Random(0)
    missing = {
        frozenset(pair)
        for a, b in itertools.combinations(LISTS, 2)
        for pair in itertools.product([(a, x) for x in LISTS[a]], [(b, y) for y in LISTS[b]])
        if possible(dict(pair))
    }
    cases = []
    while missing:
        choice = dict(min(missing, key=sorted_text))
        for name in rng.sample(list(LISTS), len(LISTS)):
            fitting = [x for x in LISTS[name] if possible(choice | {name: x})]
            new = {
                x: sum(frozenset(((name, x), other)) in missing for other in choice.items())
                for x in rng.sample(fitting, len(fitting))
            }
            choice.setdefault(name, max(new, key=new.get))
        missing -= {frozenset(pair) for pair in itertools.combinations(choice.items(), 2)}
        cases.append(choice)
    return cases


def sorted_text(pair):
    return sorted(map(str, pair))


PAIRS = pairwise()


@pytest.mark.slow_in_interpreter  # the pairs have each value
@pytest.mark.parametrize("choice", SINGLE)
def test_each_value(backend, device, choice):
    run(choice, backend, device)


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_pairs(backend, device, index):
    run(PAIRS[index], backend, device, seed=index)


def test_the_pairs_are_all_there():
    for a, b in itertools.permutations(LISTS, 2):
        for x, y in itertools.product(LISTS[a], LISTS[b]):
            there = any(case[a] == x and case[b] == y and possible(case) for case in PAIRS)
            assert there or not possible({a: x, b: y})


CHOICES = st.fixed_dictionaries(
    {name: st.sampled_from(values) for name, values in LISTS.items()}
).filter(possible)


_SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=8, **_SETTINGS)
@given(choice=CHOICES, seed=st.integers(0, 2**20))
def test_any_combination(backend, device, choice, seed):
    run(choice, backend, device, seed)


@pytest.mark.slow
@settings(max_examples=40, **_SETTINGS)
@given(choice=CHOICES, seed=st.integers(2**20, 2**40))
def test_many_combinations(backend, device, choice, seed):
    run(choice, backend, device, seed)


@settings(max_examples=8, **_SETTINGS)
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 90),
        st.integers(1, 140), st.integers(1, 70), st.integers(1, 70),
    ),
    order=st.permutations(range(3)),
    step=st.integers(1, 3),
    start=st.integers(0, 5),
    left=st.one_of(st.none(), st.integers(0, 50)),
    right=st.one_of(st.none(), st.integers(0, 50)),
)  # fmt: skip
def test_any_shape_and_strides(backend, device, sizes, order, step, start, left, right):
    """Odd sizes, windows, and memory in any order of dimensions, with gaps and an offset."""
    B, group, Hk, T, S, D, Dv = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def tensor(heads, length, size):
        shape = [B, heads, length]
        base = torch.randn([shape[i] for i in order] + [size * step + start], generator=generator)
        inverse = [list(order).index(i) for i in range(3)]
        return base.permute(*inverse, 3)[..., start::step].to(device)

    inputs = {"q": tensor(group * Hk, T, D), "k": tensor(Hk, S, D), "v": tensor(Hk, S, Dv)}
    options = {"window": (left, right), "return_lse": True}
    validate(
        lambda **x: tfkern.attention(**x, **options, backend=backend),
        lambda **x: torch_attention(**x, **options),
        inputs,
        # a few rows may all be close to the truth by luck
        floor_scale={n: 2 * f for n, f in floor_scale(inputs, B, T, S).items()},
    ).check()
