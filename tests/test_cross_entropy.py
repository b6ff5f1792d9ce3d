"""Cross entropy on every backend against torch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import tfkern
import tfkern.nn
from tfkern.testing import validate
from tfkern.validation.cross_entropy import torch_cross_entropy

# 0 rows, primes, one past a tile of columns, more than a tile
SHAPES = [(0, 5), (7, 2), (3, 5, 17), (67, 33), (5, 1025), (7, 9001)]
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 5.0},
    "z": {"z_loss": 0.1},
    "weighted": {"weighted": True},
    "all": {"label_smoothing": 0.2, "softcap": 4.0, "z_loss": 0.03, "weighted": True},
}


def make(shape, dtype, device, mean=0.0, ignored=True):
    logits = (mean + 3 * torch.randn(shape, device=device)).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], device=device)
    if ignored and targets.numel() > 1:
        targets.view(-1)[::3] = -100
    return logits, targets


def check(logits, targets, backend, weighted=False, **options):
    V = logits.shape[-1]
    weight = 0.1 + torch.rand(V, device=logits.device) if weighted else None
    validate(
        lambda logits: tfkern.cross_entropy(
            logits, targets, weight=weight, backend=backend, **options
        ),
        lambda logits: torch_cross_entropy(logits, targets, class_weight=weight, **options),
        {"logits": logits},
    ).check()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(backend, dtype, device, shape, options):
    logits, targets = make(shape, dtype, device)
    check(logits, targets, backend, reduction="none", **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reductions(backend, device, reduction, options):
    check(*make((9, 130), torch.float32, device), backend, reduction=reduction, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_large_mean(backend, device, options):
    if options.get("z_loss"):
        pytest.skip("the square of a large log-sum-exp leaves no digits for its gradient")
    logits, targets = make((11, 700), torch.float32, device, mean=1e4)
    check(logits, targets, backend, reduction="none", **options)


def test_large_logits_stay_finite(backend, dtype, device):
    scale = 1e4 if dtype == torch.float16 else 1e30
    logits = torch.tensor([[scale, -scale, 0.0], [-scale, -scale, scale]], device=device)
    loss = tfkern.cross_entropy(
        logits.to(dtype), torch.tensor([0, 0], device=device), reduction="none", backend=backend
    )
    assert loss[0] == 0
    torch.testing.assert_close(loss[1].item(), 2 * logits.to(dtype)[0, 0].item(), rtol=1e-6, atol=0)


def test_uniform_logits_have_the_entropy_of_all_classes(backend, dtype, device):
    loss = tfkern.cross_entropy(
        torch.full((3, 1000), 2.5, device=device, dtype=dtype),
        torch.tensor([0, 5, 999], device=device),
        label_smoothing=0.3,
        backend=backend,
    )
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_one_class(backend, dtype, device):
    """It has probability 1: no loss and no gradient."""
    logits = torch.randn(5, 1, device=device).to(dtype).requires_grad_()
    targets = torch.zeros(5, dtype=torch.int64, device=device)
    loss = tfkern.cross_entropy(logits, targets, label_smoothing=0.1, backend=backend)
    loss.backward()
    assert loss.abs() < 1e-6 and logits.grad.abs().max() < 1e-6


def test_classes_of_probability_zero(backend, device):
    """A logit of -inf: the class gets no gradient, and a loss of inf where it is the target."""
    logits = torch.randn(4, 40, device=device)
    logits[:, 3:20] = -torch.inf
    logits.requires_grad_()
    targets = torch.tensor([0, 25, 39, 5], device=device)
    loss = tfkern.cross_entropy(logits, targets, reduction="none", backend=backend)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    assert loss[3] == torch.inf
    torch.testing.assert_close(loss, expected.float())
    (ours,) = torch.autograd.grad(loss[:3].sum(), logits)
    (theirs,) = torch.autograd.grad(expected[:3].sum(), logits)
    torch.testing.assert_close(ours, theirs)


def test_rows_without_a_finite_logit_are_nan(backend, device):
    rows = torch.zeros(3, 6, device=device)
    rows[0] = -torch.inf
    rows[1, 2] = torch.inf
    rows[2, 4] = torch.nan
    loss = tfkern.cross_entropy(
        rows, torch.ones(3, dtype=torch.int64, device=device), reduction="none", backend=backend
    )
    assert loss.isnan().all()


def test_log_sum_exp(backend, dtype, device):
    logits, targets = make((13, 70), dtype, device)
    leaf = logits.clone().requires_grad_()
    loss, lse = tfkern.cross_entropy(
        leaf, targets, return_lse=True, reduction="sum", backend=backend
    )
    expected = logits.double().logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)
    d = torch.randn(13, device=device)
    validate(
        lambda logits: tfkern.cross_entropy(
            logits, targets, return_lse=True, reduction="sum", backend=backend
        ),
        lambda logits: (
            torch_cross_entropy(logits, targets, reduction="sum"),
            logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1),
        ),
        {"logits": logits},
    ).check()
    # alone, the log-sum-exp has the softmax as its gradient
    (softmax,) = torch.autograd.grad(lse, leaf, d.to(lse.dtype))
    torch.testing.assert_close(
        softmax.double(), d.double()[:, None] * logits.double().softmax(-1), rtol=1e-2, atol=1e-2
    )


def test_ignored_rows(backend, dtype, device):
    """They have no loss and no gradient, whatever they hold, and leave the mean of the others."""
    logits, _ = make((6, 50), dtype, device)
    targets = torch.tensor([4, 7, 49, 7, 0, 7], device=device)
    kept = targets != 7
    logits[~kept] = torch.nan
    logits.requires_grad_()
    loss = tfkern.cross_entropy(logits, targets, ignore_index=7, z_loss=0.1, backend=backend)
    loss.backward()
    expected = torch_cross_entropy(logits.detach()[kept].double(), targets[kept], z_loss=0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert not logits.grad[~kept].any() and logits.grad[kept].all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_without_targets(backend, device, reduction, weighted):
    logits = torch.randn(5, 9, device=device, requires_grad=True)
    loss = tfkern.cross_entropy(
        logits,
        torch.full((5,), -100, device=device),
        weight=torch.rand(9, device=device) if weighted else None,
        label_smoothing=0.1,
        z_loss=0.1,
        reduction=reduction,
        backend=backend,
    )
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize(
    "layout", ["shifted", "padded table", "transposed", "expanded", "every other", "three strides"]
)
def test_strides(backend, device, layout):
    logits = {
        "shifted": lambda: torch.randn(3, 8, 40, device=device)[:, :-1],
        "padded table": lambda: torch.randn(3, 7, 64, device=device)[..., :40],
        "transposed": lambda: torch.randn(3, 40, 7, device=device).transpose(1, 2),
        "expanded": lambda: torch.randn(1, 7, 40, device=device).expand(3, 7, 40),
        "every other": lambda: torch.randn(3, 7, 80, device=device)[..., ::2],
        "three strides": lambda: torch.randn(4, 5, 9, 40, device=device)[:3, :4, :7],
    }[layout]()
    targets = torch.randint(40, (*logits.shape[:-1], 2), device=device)[..., 0]
    results = []
    for copy in (False, True):
        leaf = (logits.clone() if copy else logits.detach()).requires_grad_()
        loss = tfkern.cross_entropy(leaf, targets, reduction="none", backend=backend)
        dloss = torch.ones((), device=device).expand(loss.shape)  # zero strides
        results.append((loss, *torch.autograd.grad(loss, leaf, dloss)))
    for strided, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous, rtol=0, atol=0)
    check(logits, targets, backend)


def test_some_columns_of_a_gradient(backend, dtype, device):
    """An implementation's backward takes a part of the classes, and may write over the logits."""
    op = tfkern.dispatch.implementation("cross_entropy", backend)
    logits, targets = make((10, 90), dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(90, device=device, dtype=wide)
    options = (-100, 0.1, 6.0)
    _, lse, rest = op.forward(logits, targets, weight, *options, True)
    dloss, dlse = torch.randn(2, 10, device=device, dtype=wide)
    args = targets, weight, lse, rest, dloss, dlse, *options
    whole = op.backward(logits, *args, 0, 90)
    for first, end in ((0, 33), (33, 34), (34, 90)):
        part = logits[:, first:end]
        expected = whole[:, first:end]
        torch.testing.assert_close(op.backward(part, *args, first, 90), expected)
        over = part.clone()
        op.backward_(over, *args, first, 90)
        torch.testing.assert_close(over, expected)
    op.backward_(logits[:, 33:], *args, 33, 90)  # rows of a larger tensor
    torch.testing.assert_close(logits[:, 33:], whole[:, 33:])


def test_nothing_is_overwritten_and_runs_are_equal(backend, dtype, device):
    logits, targets = make((33, 270), dtype, device)
    kept, dloss = logits.clone(), torch.randn(33, device=device)
    logits.requires_grad_()

    def run():
        loss = tfkern.cross_entropy(logits, targets, reduction="none", backend=backend)
        return loss, *torch.autograd.grad(loss, logits, dloss.to(loss.dtype))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(logits, kept)


def test_int32_targets(backend, device):
    logits, targets = make((6, 9), torch.float32, device)
    expected = tfkern.cross_entropy(logits, targets, backend=backend)
    assert torch.equal(tfkern.cross_entropy(logits, targets.int(), backend=backend), expected)


def test_one_row_without_a_batch(backend, device):
    logits, target = torch.randn(12, device=device), torch.tensor(3, device=device)
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(tfkern.cross_entropy(logits, target, backend=backend), expected)


def test_targets_out_of_range(backend, device):
    """An error where values are at hand; elsewhere NaN and no access out of bounds."""
    logits = torch.randn(4, 10, device=device, requires_grad=True)
    targets = torch.tensor([3, 10, -1, 2**40], device=device)
    if device == "cpu":
        for bad, told in ((10, 10), (-1, -1), (2**40, 2**40)):
            with pytest.raises(ValueError, match=f"targets must lie in 0 to 9, got {told}"):
                tfkern.cross_entropy(logits, torch.tensor([3, -100, 0, bad]), backend=backend)
    op = tfkern.dispatch.implementation("cross_entropy", backend)
    weight = torch.ones(10, device=device)
    for w in (None, weight):
        loss, lse, rest = op.forward(logits.detach(), targets, w, -100, 0.1, 0.0, False)
        assert loss.isnan().tolist() == [False, True, True, True] and lse.isfinite().all()
        one = torch.ones(4, device=device)
        args = logits.detach(), targets, w, lse, rest, one, None, -100, 0.1, 0.0
        assert op.backward(*args, 0, 10).isnan().any(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logits": torch.zeros(())}, "logits must be .* got shape ()"),
        ({"logits": torch.zeros(4, 0)}, "logits must be .* got shape"),
        ({"logits": torch.zeros(4, 7, dtype=torch.int32)}, "logits must be float32"),
        ({"targets": torch.zeros(4, 7)}, "class indices of int64 or int32, got torch.float32"),
        ({"targets": torch.zeros(4, dtype=torch.int16)}, "int32 or int64 tensor, got torch.int16"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"shape \(3,\), expected \(4,\)"),
        ({"targets": [1, 2, 3, 4]}, "targets must be a tensor, got list"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "but logits is on cpu"),
        ({"ignore_index": 0.5}, "ignore_index must be an int of 64 bits, got 0.5"),
        ({"ignore_index": 2**63}, "ignore_index must be an int of 64 bits, got 9223372"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        ({"z_loss": float("nan")}, "z_loss must be finite, got nan"),
        ({"softcap": -1.0}, "softcap must not be negative, got -1.0"),
        ({"weight": torch.ones(6)}, r"weight has shape \(6,\), expected \(7,\)"),
        ({"weight": torch.ones(7, requires_grad=True)}, "weight gets no gradient"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
    ],
)
def test_refused_arguments(changes, message):
    args = {"logits": torch.zeros(4, 7), "targets": torch.zeros(4, dtype=torch.int64)} | changes
    with pytest.raises(ValueError, match=message):
        tfkern.cross_entropy(**args)


def test_reference_gradcheck():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([2, -100, 0, 5])
    weight = torch.rand(6, dtype=torch.float64)

    def call(x):
        return tfkern.cross_entropy(
            x, targets, weight=weight, label_smoothing=0.1, z_loss=0.1, softcap=2.0,
            return_lse=True, reduction="none", backend="reference",
        )  # fmt: skip

    torch.autograd.gradcheck(call, logits)


@pytest.mark.skipif(
    not hasattr(torch.ops.tfkern, "cross_entropy_forward"), reason="no native build"
)
def test_threads_do_not_change_the_result():
    logits, targets = make((130, 257), torch.float32, "cpu")
    logits.requires_grad_()
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss = tfkern.cross_entropy(logits, targets, reduction="none", backend="native")
        results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 7, 3), (2, 7, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_module_is_torchs(device, shape, reduction):
    """Classes lie along its second axis."""
    options = {"weight": torch.rand(7, device=device), "ignore_index": 2, "label_smoothing": 0.1}
    ours = tfkern.nn.CrossEntropyLoss(**options, reduction=reduction)
    theirs = torch.nn.CrossEntropyLoss(**options, reduction=reduction)
    logits = torch.randn(shape, device=device, requires_grad=True)
    targets = torch.randint(3, 7, shape[:1] + shape[2:] if shape[1:] else (), device=device)
    if targets.dim():
        targets[0] = 2  # but not all of them, whose mean is NaN in torch
    results = []
    for module in (ours, theirs):
        loss = module(logits, targets)
        results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
    torch.testing.assert_close(*results)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_module_with_probabilities_and_options(device):
    logits, p = torch.randn(2, 3, 7, device=device)
    assert torch.equal(
        tfkern.nn.CrossEntropyLoss()(logits, p.softmax(-1)), F.cross_entropy(logits, p.softmax(-1))
    )
    with pytest.raises(ValueError, match="z_loss and softcap need class indices"):
        tfkern.nn.CrossEntropyLoss(z_loss=0.1)(logits, p.softmax(-1))
    targets = torch.tensor([1, 6, 0], device=device)
    torch.testing.assert_close(
        tfkern.nn.CrossEntropyLoss(z_loss=0.1, softcap=3.0)(logits, targets),
        torch_cross_entropy(logits, targets, z_loss=0.1, softcap=3.0),
    )
