"""The commands for models: sample, attention-map, convert."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfkern import files
from tfkern.benchmarks.case import DTYPES
from tfkern.benchmarks.commands import SEEDS, check_device, number

if TYPE_CHECKING:
    from tfkern.models import Transformer
    from tfkern.tokenize import Tokenizer

_Model = Annotated[
    Path, typer.Argument(help="Directory with config.json, safetensors and a tokenizer.")
]
_Device = Annotated[str, typer.Option(help="Such as cpu or cuda.")]
_FACTOR = (float, 0, 10**6)
_INDEX = (int, 0, 2**16)


def add_model_commands(app: typer.Typer) -> None:
    """Adds them to the program."""
    app.command("sample")(_sample)
    app.command("attention-map")(_attention_map)
    app.command("convert")(_convert)


def _sample(
    model: _Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or to transform.")] = "",
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Begin with the model's start token alone.")
    ] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask for prompts until the input ends.")
    ] = False,
    samples: Annotated[
        int,
        number("Texts for each prompt; 0 with --unconditional: no end.", int, 0, 10**6),
    ] = 1,
    max_tokens: Annotated[int, number("The most to write.", int, 1, 10**6)] = 64,
    temperature: Annotated[float, number("0: always the likeliest token.", *_FACTOR)] = 1.0,
    top_k: Annotated[int, number("Draw from this many tokens; 0: all.", int, 0, 2**31)] = 0,
    top_p: Annotated[float, number("Draw from tokens of this probability.", *_FACTOR)] = 1.0,
    min_p: Annotated[float, number("Least probability beside the likeliest.", *_FACTOR)] = 0.0,
    repetition_penalty: Annotated[float, number("Above 1: fewer repetitions.", *_FACTOR)] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string.")] = None,
    beams: Annotated[
        int,
        number("Beam search instead of drawing; 0: none.", int, 0, 1024),
    ] = 0,
    seed: Annotated[int, number("Of the first text; the others count up.", *SEEDS)] = 0,
    device: _Device = "cpu",
) -> None:
    """Write text: what follows a prompt, or with --unconditional from nothing.

    The same seed writes the same text.
    """
    from tfkern.generate import Sampling

    if bool(prompt) + unconditional + interactive != 1:
        raise ValueError("give one of a prompt, --unconditional and --interactive")
    if samples == 0 and not unconditional:
        raise ValueError("--samples 0 needs --unconditional")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k or None,
        top_p=None if top_p == 1 else top_p,
        min_p=min_p or None,
        repetition_penalty=repetition_penalty,
    )
    transformer, tokenizer = _load(model, device)
    options: dict[str, Any] = {"sampling": sampling, "stop": stop or []}

    def write(text: str | None, number: int) -> None:
        if samples != 1:
            print(f"--- {number + 1}")
        for piece in _pieces(
            transformer, tokenizer, text, max_tokens, beams, options | {"seeds": seed + number}
        ):
            print(piece, end="", flush=True)
        print()

    if interactive:
        while (text := _ask()) is not None:
            for number in range(samples):
                if text:
                    write(text, number)
        return
    number = 0
    while samples == 0 or number < samples:
        write(prompt or None, number)
        number += 1


def _ask() -> str | None:
    """A line of the user, None at the end of the input."""
    try:
        return input(">>> ")
    except EOFError:
        print()
        return None


def _pieces(
    model: "Transformer",
    tokenizer: "Tokenizer",
    prompt: str | None,
    max_tokens: int,
    beams: int,
    options: dict[str, Any],
) -> Any:
    from tfkern.generate import beam_search, stream_text
    from tfkern.generate.text import encode_prompts

    if not beams:
        yield from stream_text(model, tokenizer, prompt, max_tokens, **options)
        return
    if options["stop"]:
        raise ValueError("--stop does not apply to --beams")
    inputs = {} if prompt is None else encode_prompts(model, tokenizer, [prompt])
    ((best,),) = beam_search(
        model, max_tokens=max_tokens, beams=beams, sampling=options["sampling"], **inputs
    )
    yield tokenizer.decode(best.tokens.tolist())


def _attention_map(
    model: _Model,
    text: Annotated[str, typer.Argument(help="What the model reads.")],
    layer: Annotated[int, number("Of the blocks, from 0.", *_INDEX)] = 0,
    head: Annotated[int, number("Of the block, from 0.", *_INDEX)] = 0,
    out: Annotated[Path, typer.Option(help="The image to write.")] = Path("attention.png"),
    device: _Device = "cpu",
) -> None:
    """Draw which token attends to which in one head, and print where each looks most."""
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"unknown kind of image {out.name!r}: expected .{', .'.join(known)}")
    files.replaceable(out)
    transformer, tokenizer = _load(model, device)
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
    with files.replacing(out) as new:  # of a long text still an image that memory holds
        FigureCanvasAgg(figure).print_figure(
            new, dpi=min(120, 8000 / size), format=out.suffix[1:].lower()
        )


def _convert(
    source: Annotated[Path, typer.Argument(help="Directory with config.json and safetensors.")],
    target: Annotated[Path, typer.Argument(help="Directory to write, made if need be.")],
    form: Annotated[
        str, typer.Option("--to", help="huggingface, or tfkern for its own names.")
    ] = "huggingface",
    dtype: Annotated[
        str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}. As they are by default.")
    ] = "",
    shard_bytes: Annotated[
        int,
        number("Weights beyond this size go to several files.", int, 1, 2**62),
    ] = 5_000_000_000,
) -> None:
    """Rewrite the weights of a model: Hugging Face's names or tfkern's, another dtype, shards.

    Knows GPT-1, GPT-2, BERT, BART, T5 and ViT. Reads and writes local directories only.
    """
    from tfkern import models

    if dtype and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if form not in ("huggingface", "tfkern"):
        raise ValueError(f"form must be huggingface or tfkern, got {form!r}")
    there = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write to {target}: {there} is no directory")
    if target.resolve() == source.resolve():
        raise ValueError(f"source and target are the same directory, {source}")
    model = models.load(source, dtype=DTYPES[dtype] if dtype else None)
    models.save(model, target, form=form, shard_bytes=shard_bytes)


def _load(directory: Path, device: str) -> tuple["Transformer", "Tokenizer"]:
    from tfkern import models, tokenize

    device = check_device(device)
    model = models.load(directory, device=device)
    tokenizer = tokenize.load(directory)
    if tokenizer.vocab_size > (model.config.vocab_size or 0):
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{model.config.vocab_size}"
        )
    return model, tokenizer
