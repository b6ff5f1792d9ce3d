"""A picture of how the loss fell."""

from pathlib import Path
from typing import Any

from tfkern import files


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws the losses of a metrics.jsonl over the steps, as a PNG.

    Losses of single steps are pale; the line through them is their running mean over a fiftieth of
    the run.
    """
    from matplotlib.figure import Figure

    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluations = [
        (line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if steps:
        numbers, losses = zip(*steps, strict=True)
        axes.plot(numbers, losses, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(numbers, _smooth(losses, max(len(losses) // 50, 1)), color="C0", label="training")
    if evaluations:
        numbers, losses = zip(*evaluations, strict=True)
        axes.plot(numbers, losses, "o-", color="C1", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss in nats")
    axes.grid(alpha=0.3)
    if steps or evaluations:
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
