"""`tfkern convert`."""

from pathlib import Path
from typing import Annotated

import typer

from tfkern.benchmarks.case import DTYPES
from tfkern.cli.options import check_dtype, number

# what may stand beside the weights: how they write text, and what tells their tokenizer
_ALONG = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tokenizer.model", "source.spm", "target.spm", "chat_template.jinja",
)  # fmt: skip


def command(
    source: Annotated[
        Path, typer.Argument(help="Directory of the model, with config.json and safetensors.")
    ],
    target: Annotated[
        Path, typer.Argument(help="Directory to write. It is made if it is missing.")
    ],
    form: Annotated[
        str, typer.Option("--to", help="Names of the weights: huggingface, or tfkern for its own.")
    ] = "huggingface",
    dtype: Annotated[
        str, typer.Option(help=f"Dtype of the weights: {', '.join(DTYPES)}. The default keeps it.")
    ] = "",
    int8: Annotated[
        bool, typer.Option("--int8", help="Makes the weights of linear layers int8; --to tfkern.")
    ] = False,
    shard_bytes: Annotated[
        int,
        number("Size of the weights in bytes above which they go to several files.", int, 1, 2**62),
    ] = 5_000_000_000,
) -> None:
    """Rewrites the weights of a model under other names, in another dtype or in other shards.

    The files of its tokenizer and generation_config.json are copied, if it has them.
    It knows GPT-1, GPT-2, BERT, RoBERTa, XLM-R, DistilBERT, BART, mBART, Marian, Pegasus, T5, mT5,
    Llama, Mistral, Qwen2, Qwen3, OLMo 2, Gemma 1 to 3, Phi-3, OPT, GPT-NeoX and ViT, and reads and
    writes local directories only.
    """
    from tfkern import files, models

    kept = check_dtype(dtype) if dtype else None
    if form not in ("huggingface", "tfkern"):
        raise ValueError(f"form must be huggingface or tfkern, got {form!r}")
    if int8 and form != "tfkern":
        raise ValueError("--int8 needs --to tfkern: Hugging Face has no such weights")
    there = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write to {target}: {there} is no directory")
    if target.resolve() == source.resolve():
        raise ValueError(f"source and target are the same directory, {source}")
    model = models.load(source, dtype=kept)
    if int8:
        models.quantize(model)
    along = {name: source / name for name in _ALONG if (source / name).exists()}
    for path in along.values():
        files.regular(path)
    gone = dict.fromkeys(_ALONG)
    models.save(model, target, form=form, shard_bytes=shard_bytes, along=gone | along)
