"""Schedules: closed forms, the schedules of transformers, nanoGPT and torchtitan, and bad input."""

import math
import pickle

import pytest
import torch
from transformers import get_scheduler

from tfkern.train.schedules import SCHEDULES, Exponential, schedule, set_learning_rate

STEPS, WARMUP = 10_000, 700
OPTIONS = {
    "constant": {},
    "linear": {"floor": 0.1},
    "cosine": {"floor": 0.1},
    "exponential": {"floor": 0.01},
    "inverse_sqrt": {"timescale": 2000},
    "noam": {"dim": 512},
    "wsd": {"decay": 2000, "floor": 0.1},
}


def made(kind, **options):
    return schedule(kind, STEPS, warmup=WARMUP, **OPTIONS[kind] | options)


def worst(follow, formula):
    return max(abs(follow(step) - formula(step)) for step in range(STEPS + 200))


def behind(kind, s):
    """The factor in step s, behind the warm-up, in numbers of the case above."""
    t = min(s, 10_000)
    return {
        "constant": 1,
        "linear": 1 - 0.9 * (t - 700) / 9300,
        "cosine": 0.55 + 0.45 * math.cos(math.pi * (t - 700) / 9300),
        "exponential": math.exp(math.log(0.01) * (t - 700) / 9300),
        "inverse_sqrt": 1 if s < 2000 else (2000 / s) ** 0.5,
        "wsd": 1 if t < 8000 else 1 - 0.9 * (t - 8000) / 2000,
    }[kind]


@pytest.mark.parametrize("kind", sorted(set(SCHEDULES) - {"noam"}))
@pytest.mark.parametrize(
    ("start", "ramp"),
    [
        ("nanogpt", lambda s: (s + 1) / 701),
        ("torchtitan", lambda s: (s + 1) / 700),
        ("transformers", lambda s: s / 700),
    ],
)
def test_closed_form(kind, start, ramp):
    follow = made(kind, start=start)
    assert worst(follow, lambda s: ramp(s) if s < 700 else behind(kind, s)) <= 1e-12


def test_the_rate_of_2017():
    follow = schedule("noam", dim=512, warmup=4000)
    assert worst(follow, lambda s: min((s + 1) ** -0.5, (s + 1) / 4000**1.5) / 512**0.5) <= 1e-12
    # the rate is greatest in step 4000 of the paper
    assert max(range(STEPS), key=follow) == 3999


@pytest.mark.parametrize(
    ("name", "special", "kind", "options"),
    [
        ("constant_with_warmup", {}, "constant", {}),
        ("linear", {}, "linear", {"floor": 0.0}),
        ("cosine", {}, "cosine", {"floor": 0.0}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, "cosine", {}),
        ("inverse_sqrt", {}, "inverse_sqrt", {"timescale": None}),
        *(
            ("warmup_stable_decay", {"num_decay_steps": 2000, "decay_type": shape}, "wsd", options)
            for shape in ("linear", "cosine", "1-sqrt")
            for options in ({"shape": shape, "floor": 0.0},)
        ),
    ],
)
def test_equals_transformers(name, special, kind, options):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimiser, WARMUP, STEPS, special)
    follow, errors = made(kind, start="transformers", **options), []
    for step in range(STEPS):
        errors.append(abs(follow(step) - theirs.get_last_lr()[0]))
        optimiser.step()
        theirs.step()
    assert max(errors) <= 1e-12


def test_equals_nanogpt():
    """The formula of train.py, with its names."""
    learning_rate, min_lr, warmup_iters, lr_decay_iters = 6e-4, 6e-5, 700, 10_000

    def get_lr(it):
        if it < warmup_iters:
            return learning_rate * (it + 1) / (warmup_iters + 1)
        if it > lr_decay_iters:
            return min_lr
        ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
        return min_lr + (0.5 + 0.5 * math.cos(math.pi * ratio)) * (learning_rate - min_lr)

    follow = made("cosine")
    assert worst(lambda s: follow(s) * 6e-4, get_lr) <= 1e-12


def test_equals_the_exponential_of_torch():
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.01 ** (1 / 1000))
    follow = Exponential(steps=1000, floor=0.01)
    for step in range(1000):
        assert follow(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-10)
        optimiser.step()
        theirs.step()


@pytest.mark.parametrize("kind", SCHEDULES)
def test_is_a_value(kind):
    """Schedules of equal options are equal, also behind pickle, and those of others are not."""
    follow, other = made(kind), schedule(kind, STEPS, **OPTIONS[kind], warmup=WARMUP + 1)
    again = pickle.loads(pickle.dumps(follow))
    assert again == follow == made(kind) and hash(again) == hash(follow)
    assert again != other
    assert all(again(s) == follow(s) for s in (0, 699, 700, 9999, 10**6))


def test_runs_of_any_length():
    """Warm-ups and decays that take the whole run, or none of it, divide nothing by zero."""
    for kind in ("linear", "cosine", "exponential"):
        for warmup in (0, 1, 5):
            follow = schedule(kind, 5, warmup=warmup, floor=0.25)
            assert [follow(s) for s in (5, 6, 10**9)] == [0.25] * 3
            assert max(follow(s) for s in range(5)) <= 1
    follow = schedule("wsd", 5, warmup=5, decay=0)
    assert [follow(s) for s in (4, 5)] == [5 / 6, 0]
    assert [schedule("wsd", 5, decay=0)(s) for s in (0, 4, 5)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("polynomial", 9), {}, "schedule must be one of constant, .*, wsd, got 'polynomial'"),
        ((["cosine"], 9), {}, r"schedule must be one of .*, got \['cosine'\]"),
        (("cosine", 9), {"flor": 0.1}, "schedule cosine: option 'flor' is not one of .*floor"),
        (("constant", 9), {"floor": 0.1}, "schedule constant: option 'floor' is not one of"),
        (("noam",), {"dim": 9, "warmup": 9, "start": "nanogpt"}, "option 'start' is not one of"),
        (("cosine",), {}, "schedule cosine needs steps"),
        (("wsd", 9), {}, "schedule wsd needs decay"),
        (("cosine", 0), {}, "steps must be an integer of at least 1, got 0"),
        (("cosine", 9.5), {}, "steps must be an integer of at least 1, got 9.5"),
        (("cosine", True), {}, "steps must be an integer of at least 1, got True"),
        (("cosine", 9), {"warmup": -1}, "warmup must be an integer of at least 0, got -1"),
        (("cosine", 9), {"warmup": 10}, "warmup must be no longer than the 9 steps, got 10"),
        (("cosine", 9), {"warmup": "3"}, "warmup must be an integer of at least 0, got '3'"),
        (("cosine", 9), {"floor": 1.5}, r"floor must be a number in \[0, 1\], got 1.5"),
        (("cosine", 9), {"floor": math.nan}, r"floor must be a number in \[0, 1\], got nan"),
        (("cosine", 9), {"floor": "1e-1"}, r"floor must be a number in \[0, 1\], got '1e-1'"),
        (("cosine", 9), {"start": "zero"}, "start must be one of nanogpt, .*, got 'zero'"),
        (("exponential", 9), {}, "floor of exponential must be above 0, got 0.0"),
        (("inverse_sqrt",), {}, "inverse_sqrt needs a warmup or a timescale of at least 1"),
        (("inverse_sqrt",), {"timescale": 0}, "timescale must be an integer of at least 1, got 0"),
        (("inverse_sqrt",), {"warmup": 9, "timescale": 8}, "an integer of at least 9, got 8"),
        (("noam",), {"dim": 0, "warmup": 9}, "dim must be an integer of at least 1, got 0"),
        (("noam",), {"dim": 9, "warmup": 0}, "warmup must be an integer of at least 1, got 0"),
        (("wsd", 9), {"decay": 10}, r"decay must be an integer in \[0, 9\], got 10"),
        (("wsd", 9), {"decay": 3, "shape": "sqrt"}, "shape must be one of .*, got 'sqrt'"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        schedule(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_steps_before_the_first_are_refused(kind):
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        made(kind)(-1)


def test_set_learning_rate():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimiser = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 4.0}], lr=2.0)
    for factor in (0.5, 0.25, 0, 1):
        assert set_learning_rate(optimiser, factor) == 2 * factor
        assert [group["lr"] for group in optimiser.param_groups] == [2 * factor, 4 * factor]
    set_learning_rate(optimiser, 0.5)
    resumed = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=9.0)
    resumed.load_state_dict(optimiser.state_dict())
    set_learning_rate(resumed, 0.25)
    assert [group["lr"] for group in resumed.param_groups] == [0.5, 1.0]


def test_set_learning_rate_fills_tensors():
    """Groups share one tensor, which stays the same object."""
    rate = torch.tensor(2.0, dtype=torch.float64)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimiser = torch.optim.AdamW(groups, lr=rate)
    for factor in (0.5, 0.25, 1):
        assert set_learning_rate(optimiser, factor) == 2 * factor
        assert all(group["lr"] is rate for group in optimiser.param_groups)
        assert rate.item() == 2 * factor


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf, "1"])
def test_set_learning_rate_refuses(factor):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    with pytest.raises(ValueError, match="factor must be a number of at least 0, got"):
        set_learning_rate(optimiser, factor)
    assert optimiser.param_groups[0]["lr"] == 2
