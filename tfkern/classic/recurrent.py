"""The encoder-decoder before transformers: two recurrent networks, with or without attention."""

from typing import Any

import torch
from torch import Tensor, nn

from tfkern.nn import Linear


class RecurrentSeq2Seq(nn.Module):
    """A recurrent encoder whose last state begins a recurrent decoder (Sutskever et al. 2014; Cho
    et al. 2014).

    Without attention, that state is all that the decoder knows of the source, however long it is.
    With attention, the decoder also looks back at every state of the encoder (Luong et al. 2015).

    Args:
        vocab_size: number of tokens.
        dim: size of embeddings and states.
        cell: "gru" or "lstm".
        attention: module from (states, memory, lengths) to (states, weights), such as
            `tfkern.classic.LuongAttention`; None for no attention.
        input_feeding: whether each input of the decoder holds the attentional state of the step
            before, so that it knows where it has looked. The decoder then runs step by step.

    Raises:
        ValueError: another cell, or input_feeding without attention.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        cell: str = "gru",
        attention: nn.Module | None = None,
        input_feeding: bool = False,
    ) -> None:
        super().__init__()
        kinds: dict[str, Any] = {"gru": nn.GRU, "lstm": nn.LSTM}
        if cell not in kinds:
            raise ValueError(f"cell must be gru or lstm, got {cell!r}")
        if input_feeding and attention is None:
            raise ValueError("input_feeding needs attention")
        self.embedding = nn.Embedding(vocab_size, dim)
        self.encoder = kinds[cell](dim, dim, batch_first=True)
        self.decoder = kinds[cell](2 * dim if input_feeding else dim, dim, batch_first=True)
        self.attention, self.input_feeding = attention, input_feeding
        self.head = Linear(dim, vocab_size)

    def forward(
        self,
        tokens: Tensor,
        *,
        source: Tensor,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The logits, from which `tfkern.models.cross_entropy` makes a loss.

        Args:
            tokens: (B, T), the text that the decoder has written so far.
            source: (B, S).
            lengths: (B,) int64, tokens of each source; all if None.

        Returns:
            (B, T, vocab_size).
        """
        memory, state = self._encode(source, lengths)
        x = self.embedding(tokens)
        if self.attention is None:
            y, _ = self.decoder(x, state)
        elif not self.input_feeding:
            y, _ = self.decoder(x, state)
            y, _ = self.attention(y, memory, lengths)
        else:
            y = self._step_by_step(x, state, memory, lengths)
        return self.head(y)

    def _encode(self, source: Tensor, lengths: Tensor | None) -> tuple[Tensor, Any]:
        x = self.embedding(source)
        if lengths is None:
            return self.encoder(x)
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        y, state = self.encoder(packed)
        S = source.shape[1]
        return nn.utils.rnn.pad_packed_sequence(y, batch_first=True, total_length=S)[0], state

    def _step_by_step(
        self, x: Tensor, state: Any, memory: Tensor, lengths: Tensor | None
    ) -> Tensor:
        assert self.attention is not None
        local = getattr(self.attention, "reach", "global") == "local-m"
        out, last = [], torch.zeros_like(x[:, :1])
        for t in range(x.shape[1]):
            y, state = self.decoder(torch.cat([x[:, t : t + 1], last], -1), state)
            place = {"first": t} if local else {}
            last, _ = self.attention(y, memory, lengths, **place)
            out.append(last)
        return torch.cat(out, 1)
