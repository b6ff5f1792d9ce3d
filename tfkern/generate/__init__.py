"""Text from models: drawing tokens, beams, drafts, masks, and perplexity."""

from tfkern.generate.beam import Beam, beam_search
from tfkern.generate.decode import generate, stream
from tfkern.generate.drafts import speculative
from tfkern.generate.evaluate import perplexity
from tfkern.generate.sampling import GREEDY, Sampling
from tfkern.generate.text import complete, fill_mask, stream_text

__all__ = [
    "GREEDY",
    "Beam",
    "Sampling",
    "beam_search",
    "complete",
    "fill_mask",
    "generate",
    "perplexity",
    "speculative",
    "stream",
    "stream_text",
]
