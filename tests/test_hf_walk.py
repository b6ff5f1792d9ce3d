"""Every class of modules of the installed transformers: patched and equal, or left alone."""

import copy

import pytest
import torch
import walk

from tfkern.integrations import hf
from tfkern.integrations.hf import norms, wholes
from tfkern.integrations.hf.recorder import _widths

pytestmark = pytest.mark.usefixtures("one_thread", "every_size")

FEW = ("bert", "bloom", "clip", "falcon_h1", "gemma3n", "gpt2", "janus", "llama", "phi3", "t5gemma")
LARGEST = 3e7  # parameters of a module that is tried


def compared(module):
    """Whether a module is patched; then asserts that results and gradients are equal."""
    plain = walk.filled(module)
    ours = copy.deepcopy(plain)
    found = norms.known(plain) is not None, wholes.methods(plain)
    if not any(found):
        return False
    hf.patch(ours)
    for method in ["forward"] if found[0] else found[1]:
        assert method in vars(ours)
        for training in (False, True):
            results = []
            for m in (plain, ours):
                m.train(training)
                results.append(_results(m, method, found[0]))
            for a, b in zip(*results, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    largest = a.abs().max().item() if a.numel() else 0.0
                    limit = 1e-5 * largest + 1e-12
                    torch.testing.assert_close(b, a, rtol=1e-5, atol=limit)
    return True


def _results(module, method, is_norm):
    """The method's result on random inputs, and gradients of all inputs and parameters."""
    if is_norm:
        own = [len(p) for p in module.parameters()]
        widths, count = (own or list(getattr(module, "normalized_shape", (8,))))[:1], 1
    else:
        widths = list(dict.fromkeys(_widths(module)))
        plans = [p for _, p in wholes._PLANS[getattr(type(module), method)] if p]
        count = plans[0].inputs
    for width in widths:
        generator = torch.Generator().manual_seed(1)
        inputs = [
            torch.randn(2, 5, width, dtype=torch.float64, generator=generator).requires_grad_()
            for _ in range(count)
        ]
        torch.manual_seed(2)
        try:
            y = getattr(module, method)(*inputs)
        except RuntimeError:
            if width == widths[-1]:
                raise
            continue
        parameters = [p for p in module.parameters() if p.requires_grad]
        return y, *torch.autograd.grad(y.sin().sum(), inputs + parameters, allow_unused=True)
    raise AssertionError("no input has a size that fits")


def walked(files):
    patched, alone, large, missed = set(), set(), set(), set()
    for file in files:
        found = walk.modules(file)
        for kind, module in found.items():
            if kind in patched | alone:
                continue
            if sum(p.numel() for p in module.parameters()) > LARGEST:
                if walk.NAMED.search(kind.__name__):
                    large.add(kind)
                continue
            try:
                done = compared(module)
            except Exception as error:
                raise AssertionError(f"{kind.__module__}.{kind.__qualname__}") from error
            (patched if done else alone).add(kind)
        missed |= {c for c in walk.classes(file) - found.keys() if walk.NAMED.search(c.__name__)}
    return patched, alone, large - patched - alone, missed


def checked(families=None):
    """Numbers of the classes that are patched, left alone, and not tried though named like an MLP
    or a norm."""
    patched, alone, large, missed = walked(walk.files(families))
    alone = {c for c in alone if walk.NAMED.search(c.__name__)}
    print("patched", names(patched), "left alone", names(alone), sep="\n")
    print("too large", names(large), "not built", names(missed), sep="\n")
    return len(patched), len(alone), len(large | missed)


def names(classes):
    return f"{len(classes)}: " + ", ".join(sorted(c.__qualname__ for c in classes))


def test_classes_of_a_few_families():
    patched, alone, untried = checked(FEW)
    assert patched >= 15 and alone >= 5
    assert untried <= 1  # Gemma 3n's MLP is large


@pytest.mark.slow
def test_all_classes():
    patched, alone, untried = checked()
    assert patched >= 500 and alone >= 100
    assert untried <= (patched + alone) // 20
