"""A picture of how the loss fell."""

from collections.abc import Sequence
from pathlib import Path

from tfkern import files

_POINTS = 2000  # of a line, at most

Losses = Sequence[tuple[int, float]]


def draw(training: Losses, evaluations: Losses, path: Path) -> None:
    """Draws losses over the steps, each a pair of step and loss, as a PNG.

    Losses of single steps are pale; the line through them is their running mean over a fiftieth of
    the run. Of many steps some are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if training:
        numbers, losses = zip(*training, strict=True)
        means = _smooth(losses, max(len(losses) // 50, 1))
        some = slice(None, None, -(-len(losses) // _POINTS))
        axes.plot(numbers[some], losses[some], color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(numbers[some], means[some], color="C0", label="training")
    if evaluations:
        numbers, losses = zip(*evaluations, strict=True)
        axes.plot(numbers, losses, "o-", color="C1", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss in nats")
    axes.grid(alpha=0.3)
    if training or evaluations:
        axes.legend()
    with files.replacing(path) as new:
        figure.savefig(new, format="png", dpi=120)


def _smooth(values: tuple[float, ...], width: int) -> list[float]:
    """The mean of each value and of up to width - 1 before it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[i + 1] - sums[max(i + 1 - width, 0)]) / min(i + 1, width) for i in range(len(values))
    ]
