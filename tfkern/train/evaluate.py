"""How good a model is, on data that it was not trained on."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfkern.models import Transformer
from tfkern.train.objective import Batch, Objective
from tfkern.train.parallel.model import Parallel


class Evaluation(NamedTuple):
    """The results of a model on some batches.

    Attributes:
        loss: the mean over all batches, each target of equal weight. Its exponential is the
            perplexity, if it is the cross entropy of a language model and nothing else.
        terms: the means that the loss is the sum of.
        accuracies: for each term, the share of what it is a mean over that the model gets right,
            such as targets that are the likeliest class. Empty if the objective does not tell.
    """

    loss: float
    terms: tuple[float, ...]
    accuracies: tuple[float, ...]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    precision: torch.dtype | None = None,
) -> Evaluation:
    """Evaluates a model, which is in evaluation mode meanwhile.

    Args:
        model, objective, precision: see `steps`.
        batches: one at least. Of a model on many processes, each data rank has its part of them,
            and all have equally many.

    Raises:
        ValueError: there are no batches.
    """
    ranks = Parallel.of(model)
    device = next(model.parameters()).device
    found = []
    right = getattr(objective, "right", None)

    def autocast() -> Any:
        return nullcontext() if precision is None else torch.autocast(device.type, precision)

    def measure(output: Any, batch: Batch) -> Tensor:
        loss = objective(output, batch)
        count = loss.count.to(device)
        parts = [loss.mean.double() * count, count.double()]
        if right is not None:
            parts.append(right(output, batch).to(device).double())
        return torch.cat(parts)

    with evaluating(model):
        for batch in batches:
            batch = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
            terms = objective.count(batch).numel()
            found.append(ranks.measure(batch, measure, autocast))
    if not found:
        raise ValueError("there are no batches to evaluate")
    sums, counts, *rights = ranks.sum(torch.stack(found).sum(0)).split(terms)
    counts = counts.clamp(min=1)
    means = tuple((sums / counts).tolist())
    accuracies = tuple((rights[0] / counts).tolist()) if rights else ()
    return Evaluation(sum(means), means, accuracies)


@contextmanager
def evaluating(*models: nn.Module, deferred: bool = False) -> Iterator[None]:
    """A context of evaluation mode. The modules of the models have their former modes behind it.

    Args:
        deferred: whether models may make logits in pieces, if they do so in training: those of many
            rows take most of the memory.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    for module, _ in modes if deferred else ():
        if isinstance(module, Transformer) and module.vocabulary is not None:
            module.vocabulary.training = True  # a head has no dropout
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def exact_match(written: Sequence[Any], expected: Sequence[Any]) -> float:
    """The share of texts, or of rows of tokens, that are as expected.

    Raises:
        ValueError: there are none, or unequal numbers of them.
    """
    if len(written) != len(expected) or not expected:
        raise ValueError(f"got {len(written)} texts, expected {len(expected)}")
    return sum(a == b for a, b in zip(written, expected, strict=True)) / len(expected)


def bleu(written: Sequence[str], expected: Sequence[str]) -> float:
    """BLEU of a corpus of translations, 0 to 100 (Papineni et al. 2002), by `sacrebleu` (Post 2018)
    with its defaults.

    Raises:
        ValueError: there are no texts, or unequal numbers of them.
        ImportError: sacrebleu is not installed: `pip install tfkern[train]`.
    """
    if len(written) != len(expected) or not expected:
        raise ValueError(f"got {len(written)} texts, expected {len(expected)}")
    import sacrebleu

    return sacrebleu.corpus_bleu(list(written), [list(expected)]).score
