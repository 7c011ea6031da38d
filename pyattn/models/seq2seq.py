"""The recurrent encoder-decoder, with and without attention: what the Transformer answered.

A GRU reads the source, another writes the target, one token after the other. What passes between them is the history
told here: one vector (Sutskever et al. 2014), then a look back at all of the source before every step (Bahdanau et al.
2015), then the same look after the recurrence (Luong et al. 2015), where it no longer waits for the step before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyattn import checks
from pyattn.models.generation import check_evaluating, check_tokens
from pyattn.nn import implementations
from pyattn.nn.implementations import Implementation

Lengths = Sequence[int] | Tensor


def _gru(inputs: int, dim: int, layers: int, dropout: float, **options: Any) -> nn.GRU:
    return nn.GRU(inputs, dim, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0, **options)


class Encoder(nn.Module):
    """Tokens [B, S] of so many that count -> states [B, S, dim], 0 at padding, and the last ones [layers, B, dim].

    Half of a state has read the source from its beginning, half from its end: each knows what is around its token.
    """

    def __init__(self, vocabulary: int, dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(vocabulary, dim), nn.Dropout(dropout)
        self.gru = _gru(dim, dim // 2, layers, dropout, bidirectional=True)

    def forward(self, source: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        # packed, so that backwards begins at a sample's last token, and forwards ends there
        x = self.dropout(self.embedding(source))
        packed, last = self.gru(pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False))
        states, _ = pad_packed_sequence(packed, batch_first=True, total_length=source.shape[1])
        return states, last.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)  # a layer's two directions side by side


class Memory(NamedTuple):
    """What a decoder looks back at."""

    states: Tensor  # h, [B, S, dim]
    keys: Tensor  # of the states, [B, S, dim]: projected once, read at every step
    lengths: Tensor  # int64 [B]

    def softmax(self, scores: Tensor) -> Tensor:
        """[B, T, S] over the states of tokens; padding gets 0."""
        padding = torch.arange(scores.shape[-1], device=scores.device) >= self.lengths[:, None]
        return scores.masked_fill(padding[:, None], -torch.inf).softmax(-1)


class Decoder(nn.Module):
    """Sutskever et al.: the source is known by the first state alone, so all of it must fit in there.

    Every decoder turns embedded tokens x [B, T, dim] and the state [layers, B, dim] before them into features
    [B, T, dim] to predict the next tokens from, and the state after them.
    """

    def __init__(self, inputs: int, dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.gru = _gru(inputs, dim, layers, dropout)
        self.key: nn.Module = nn.Identity()  # of states, for those that look them up

    def forward(self, x: Tensor, state: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        return self.gru(x, state)

    def align(self, x: Tensor, state: Tensor, memory: Memory) -> Tensor:
        """The weights [B, T, S] of the states at every step."""
        raise ValueError('alignment must be "additive" or "multiplicative" to have weights, got "none"')


class AdditiveDecoder(Decoder):
    """Bahdanau et al.: score(s, h) = v^T tanh(W s + U h), with s the state *before* the step.

    The states' weighted mean is an input of the recurrence, so there is no way around one step at a time.
    """

    def __init__(self, dim: int, layers: int, dropout: float) -> None:
        super().__init__(2 * dim, dim, layers, dropout)
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)  # W, U
        self.score = nn.Linear(dim, 1, bias=False)  # v

    def _weights(self, s: Tensor, memory: Memory) -> Tensor:
        pairs = self.query(s)[:, :, None] + memory.keys[:, None]  # [B, T, S, dim]
        return memory.softmax(self.score(torch.tanh(pairs)).squeeze(-1))

    def forward(self, x: Tensor, state: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        features = []
        for token in x.split(1, dim=1):
            context = self._weights(state[-1][:, None], memory) @ memory.states
            s, state = self.gru(torch.cat((token, context), -1), state)
            features.append(s)
        return torch.cat(features, 1), state

    def align(self, x: Tensor, state: Tensor, memory: Memory) -> Tensor:
        features, _ = self(x, state, memory)
        return self._weights(torch.cat((state[-1][:, None], features[:, :-1]), 1), memory)


class MultiplicativeDecoder(Decoder):
    """Luong et al., "general": score(s, h) = s^T W h, with s the state *after* the step; h~ = tanh(W_c [c; s]).

    No context enters the recurrence (no input feeding): one call of attention answers all that is asked after it.
    """

    def __init__(self, dim: int, layers: int, dropout: float, attention: Implementation) -> None:
        super().__init__(dim, dim, layers, dropout)
        self.attention = attention
        self.key = nn.Linear(dim, dim, bias=False)  # W
        self.combine = nn.Linear(2 * dim, dim, bias=False)  # W_c

    def forward(self, x: Tensor, state: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        s, state = self.gru(x, state)
        q, k, v = (y[:, None] for y in (s, memory.keys, memory.states))  # one head
        c = implementations.attend(self.attention, q, k, v, scale=1.0, causal=False, kv_lengths=memory.lengths)
        return torch.tanh(self.combine(torch.cat((c.squeeze(1), s), -1))), state

    def align(self, x: Tensor, state: Tensor, memory: Memory) -> Tensor:
        s, _ = self.gru(x, state)
        return memory.softmax(s @ memory.keys.mT)


class Seq2Seq(nn.Module):
    """Source tokens [B, S] and target tokens [B, T], <s> first -> logits [B, T, target_vocabulary] of what comes next.

    Tokens are int32 or int64. ``source_lengths``, a list or int tensor [B], says how many of a sample's S tokens count.

    Args:
        vocabulary: of the source.
        target_vocabulary: None for that of the source; embeddings are not shared.
        dim: of embeddings and states; even, for the two directions of the encoder.
        layers: of encoder and decoder each.
        dropout: of embeddings, between layers and before the logits, in training.
        alignment: what the decoder learns of the source besides the encoder's last states, which are its first: "none"
            (Sutskever et al. 2014, arXiv:1409.3215), "additive" (Bahdanau et al. 2015, arXiv:1409.0473) or
            "multiplicative" (Luong et al. 2015, arXiv:1508.04025).
        attention: what computes the multiplicative one: "pyattn" for the fused kernels, "naive" for matmul and softmax,
            "torch" for torch's scaled_dot_product_attention.
        padding: the target's token that ``loss`` leaves out.

    Raises:
        TypeError, ValueError: naming the argument; so do the methods.
        RuntimeError: ``translate`` or ``alignments`` in training.

    Example:
        >>> import torch
        >>> from pyattn.models import Seq2Seq
        >>> model = Seq2Seq(10, dim=32, alignment="multiplicative")
        >>> source, lengths = torch.tensor([[3, 4, 5], [6, 7, 0]]), [3, 2]
        >>> target = torch.tensor([[1, 5, 4, 3, 2], [1, 7, 6, 2, 0]])  # <s> ... </s>, reversed
        >>> model(source, lengths, target).shape
        torch.Size([2, 5, 10])
        >>> model.loss(source, lengths, target).backward()
        >>> _ = model.eval()
        >>> translations = model.translate(source, lengths, max_length=4)
        >>> model.alignments(source, lengths, target).shape
        torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        vocabulary: int,
        target_vocabulary: int | None = None,
        *,
        dim: int = 256,
        layers: int = 1,
        dropout: float = 0.1,
        alignment: str = "additive",
        attention: Implementation = "pyattn",
        padding: int = 0,
    ) -> None:
        super().__init__()
        implementations.check(attention)
        if dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        decoders: dict[str, Callable[[], Decoder]] = {
            "none": lambda: Decoder(dim, dim, layers, dropout),
            "additive": lambda: AdditiveDecoder(dim, layers, dropout),
            "multiplicative": lambda: MultiplicativeDecoder(dim, layers, dropout, attention),
        }
        if not isinstance(alignment, str) or alignment not in decoders:
            raise ValueError(f"alignment must be one of {', '.join(decoders)}, got {alignment!r}")
        target_vocabulary = vocabulary if target_vocabulary is None else target_vocabulary
        self.padding = padding
        self.encoder = Encoder(vocabulary, dim, layers, dropout)
        self.embedding, self.dropout = nn.Embedding(target_vocabulary, dim), nn.Dropout(dropout)
        self.decoder = decoders[alignment]()
        self.output = nn.Linear(dim, target_vocabulary)

    def forward(self, source: Tensor, source_lengths: Lengths, target: Tensor) -> Tensor:
        """Logits of the token after ``target[:, t]``, given the true target so far: teacher forcing."""
        state, memory = self._encode(source, source_lengths)
        check_tokens("target", target, source)
        return self._decode(target, state, memory)[0]

    def loss(self, source: Tensor, source_lengths: Lengths, target: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of each token of ``target`` ``[B, T]`` but the first and ``padding``."""
        check_tokens("target", target, at_least=2)
        logits = self(source, source_lengths, target[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten().long(), ignore_index=self.padding)

    @torch.no_grad()
    def translate(
        self, source: Tensor, source_lengths: Lengths, max_length: int, start: int = 1, end: int = 2
    ) -> list[list[int]]:
        """Each sample's likeliest tokens, step by step, up to ``max_length`` or ``end``; ``start`` and it left out."""
        if checks.check_int("max_length", max_length) < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        check_evaluating(self)
        state, memory = self._encode(source, source_lengths)
        written = [source.new_full((source.shape[0], 1), start)]
        ended = torch.zeros_like(written[0], dtype=torch.bool)
        while len(written) <= max_length and not ended.all():
            logits, state = self._decode(written[-1], state, memory)  # as in training, of one token
            written.append(logits.argmax(-1))
            ended |= written[-1] == end
        return [row[: row.index(end)] if end in row else row for row in torch.cat(written[1:], 1).tolist()]

    @torch.no_grad()
    def alignments(self, source: Tensor, source_lengths: Lengths, target: Tensor) -> Tensor:
        """Where the decoder looks for the token after ``target[:, t]``: weights ``[B, T, S]``, without gradients."""
        check_evaluating(self)
        state, memory = self._encode(source, source_lengths)
        check_tokens("target", target, source)
        return self.decoder.align(self.embedding(target), state, memory)

    def _encode(self, source: Tensor, source_lengths: Lengths) -> tuple[Tensor, Memory]:
        """The decoder's first state, and what it may look back at."""
        check_tokens("source", source)
        lengths = checks.check_numbers("source_lengths", source_lengths, source.shape[0])
        if not all(1 <= length <= source.shape[1] for length in lengths):
            raise ValueError(f"source_lengths must lie in [1, S] = [1, {source.shape[1]}], got {lengths}")
        states, last = self.encoder(source, lengths)
        return last, Memory(states, self.decoder.key(states), torch.tensor(lengths, device=source.device))

    def _decode(self, target: Tensor, state: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Logits, and the state after the target."""
        features, state = self.decoder(self.dropout(self.embedding(target)), state, memory)
        return self.output(self.dropout(features)), state
