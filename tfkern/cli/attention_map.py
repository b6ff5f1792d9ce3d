"""`tfkern attention-map`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tfkern import files
from tfkern.cli.options import Device, Model, load, number

_INDEX = (int, 0, 2**16)


def command(
    model: Model,
    text: Annotated[str, typer.Argument(help="Text that the model reads.")],
    layer: Annotated[int, number("Index of the block, counted from 0.", *_INDEX)] = 0,
    head: Annotated[int, number("Index of the head in the block, counted from 0.", *_INDEX)] = 0,
    out: Annotated[Path, typer.Option(help="Image file to write.")] = Path("attention.png"),
    device: Device = "cpu",
) -> None:
    """Draws which token attends to which in one head, and prints where each token looks most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"unknown kind of image {out.name!r}: expected .{', .'.join(known)}")
    files.replaceable(out)
    transformer, tokenizer = load(model, device)
    if transformer.config.architecture == "encoder_decoder":
        raise ValueError("attention-map reads encoders and decoders, not both in one")
    if head >= transformer.config.heads:
        raise ValueError(f"head {head}: the model has heads 0 to {transformer.config.heads - 1}")
    batch = tokenizer.batch([text])
    types: dict[str, Any] = (
        {"token_types": batch.types.to(device)} if transformer.config.token_types else {}
    )
    weights = transformer.attention_maps(layer, batch.tokens.to(device), **types)[0, head].cpu()
    encoding = batch.encodings[0]
    names = [
        text[a:b] if b > a else token
        for token, (a, b) in zip(encoding.tokens, encoding.offsets, strict=True)
    ]
    words = ~torch.tensor(encoding.special_tokens_mask, dtype=torch.bool, device="cpu")
    for i in words.nonzero()[:, 0].tolist():
        best = int(weights[i].masked_fill(~words, -1).argmax())
        print(f"{names[i].strip()} -> {names[best].strip()} {weights[i, best]:.3f}")
    _draw(weights, names, f"layer {layer}, head {head}", out)
    print(f"wrote {out}", file=sys.stderr)


def _draw(weights: Any, names: list[str], title: str, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 2 + 0.3 * len(names)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(title=title, xlabel="key", ylabel="query")
    figure.colorbar(image, shrink=0.7)
    with files.replacing(out) as new:  # for long texts a lower dpi, to fit into memory
        FigureCanvasAgg(figure).print_figure(
            new, dpi=min(120, 8000 / size), format=out.suffix[1:].lower()
        )
