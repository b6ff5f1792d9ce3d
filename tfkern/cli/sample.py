"""`tfkern sample`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfkern.cli.options import SEEDS, Device, Model, load, number
from tfkern.memory import keep_memory

if TYPE_CHECKING:
    from tfkern.models import Transformer
    from tfkern.tokenize import Tokenizer

_FACTOR = (float, 0, 10**6)


def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue or to transform.")] = "",
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Begins with the model's start token alone.")
    ] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Asks for prompts until the input ends.")
    ] = False,
    samples: Annotated[
        int,
        number(
            "Number of texts for each prompt. With --unconditional, 0 means no end.", int, 0, 10**6
        ),
    ] = 1,
    max_tokens: Annotated[int, number("Largest number of tokens to write.", int, 1, 10**6)] = 64,
    temperature: Annotated[
        float, number("Temperature of the draw. With 0, the likeliest token is taken.", *_FACTOR)
    ] = 1.0,
    top_k: Annotated[
        int, number("Number of likeliest tokens to draw from. 0 means all.", int, 0, 2**31)
    ] = 0,
    top_p: Annotated[
        float, number("Total probability of the likeliest tokens to draw from.", *_FACTOR)
    ] = 1.0,
    min_p: Annotated[
        float,
        number("Smallest probability of a token, as a fraction of the likeliest one's.", *_FACTOR),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, number("Factor against repetition. Above 1, tokens are repeated less.", *_FACTOR)
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="String before which the text ends.")
    ] = None,
    beams: Annotated[
        int,
        number("Number of beams of a beam search. With 0, tokens are drawn.", int, 0, 1024),
    ] = 0,
    seed: Annotated[
        int, number("Seed of the first text. Each further text has the next seed.", *SEEDS)
    ] = 0,
    device: Device = "cpu",
) -> None:
    """Writes the text that follows a prompt, or with --unconditional a text without one.

    The same seed writes the same text.
    """
    from tfkern import models
    from tfkern.generate import Sampling

    if bool(prompt) + unconditional + interactive != 1:
        raise ValueError("give one of a prompt, --unconditional and --interactive")
    if samples == 0 and not unconditional:
        raise ValueError("--samples 0 needs --unconditional")
    if stop and beams:
        raise ValueError("--stop does not apply to --beams")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k or None,
        top_p=None if top_p == 1 else top_p,
        min_p=min_p or None,
        repetition_penalty=repetition_penalty,
    )
    keep_memory()
    transformer, tokenizer = load(model, device)
    models.prepack(transformer)
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
    """A line from the user, None at the end of the input."""
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
    inputs = {} if prompt is None else encode_prompts(model, tokenizer, [prompt])
    ((best,),) = beam_search(
        model, max_tokens=max_tokens, beams=beams, sampling=options["sampling"], **inputs
    )
    yield tokenizer.decode(best.tokens.tolist())
