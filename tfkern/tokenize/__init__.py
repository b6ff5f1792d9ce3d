"""Text to token ids and back, on the library `tokenizers` (`pip install tfkern[text]`)."""

from tfkern.tokenize.disk import load, save
from tfkern.tokenize.tokenizer import Batch, Stream, Tokenizer
from tfkern.tokenize.trainers import characters, train
from tfkern.tokenize.vocabularies import bart, bert, gpt1, gpt2, llama, sentencepiece, t5

__all__ = [
    "Batch",
    "Stream",
    "Tokenizer",
    "bart",
    "bert",
    "characters",
    "gpt1",
    "gpt2",
    "llama",
    "load",
    "save",
    "sentencepiece",
    "t5",
    "train",
]
