"""How models write: token by token, sampled, or by the best of several hypotheses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyattn import checks

# The last tokens, int64 [N], become the logits of the next ones, [N, vocabulary].
Step = Callable[[Tensor], Tensor]
# Hypothesis n goes on as what hypothesis indices[n] was.
Reorder = Callable[[list[int]], None]


class Hypothesis(NamedTuple):
    """Of a beam search."""

    score: float  # log-probability over the length penalty
    tokens: list[int]  # without the end


def check_evaluating(model: nn.Module) -> None:
    """Raises RuntimeError if the model is in training, where dropout would change what it writes."""
    if model.training:
        raise RuntimeError("the model must be in evaluation mode, got training: call eval() first")


def check_tokens(name: str, x: Any, source: Tensor | None = None, at_least: int = 1) -> None:
    """``x`` is ``[B, L]`` of token numbers, with the batch size of ``source``."""
    checks.check_tensor(name, x, checks.INDEX_DTYPES)
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < at_least:
        raise ValueError(f"{name} must have shape [B, L], B at least 1 and L at least {at_least}, got {list(x.shape)}")
    if source is not None:
        checks.check_shape(name, x, (source.shape[0], x.shape[1]), "[B, T]")


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws a token of each row.

    Args:
        logits: ``[N, vocabulary]``.
        temperature: logits are divided by it; 0 for the most probable token.
        top_k: only that many most probable tokens are drawn.
        top_p: only the most probable tokens that together have this probability are drawn (Holtzman et al. 2020,
            arXiv:1904.09751); the first always.
        generator: of the draws; None for torch's own.

    Returns:
        int64 ``[N]``.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> import torch
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0)
        tensor([1])
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    probabilities, tokens = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p] = 0
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, chosen).squeeze(-1)


def penalty(length: int, alpha: float) -> float:
    """What the log-probability of so many tokens is divided by (Wu et al. 2016, arXiv:1609.08144)."""
    return ((5 + length) / 6) ** alpha


def beam_search(
    step: Step,
    reorder: Reorder,
    first: Tensor,
    *,
    beams: int,
    max_length: int,
    end: int,
    length_penalty: float = 0.6,
) -> list[Hypothesis]:
    """The best text of each sample that a search with so many hypotheses finds; with one, the greedy text.

    A hypothesis is complete with the token ``end``, which counts in its length, or with ``max_length`` tokens.

    Args:
        step: called with int64 ``[B * beams]``, the hypotheses of a sample beside each other.
        reorder: called before a step whose hypotheses are not those of the last one.
        first: int64 ``[B]``, the token before the text.
        beams: hypotheses of a sample.
        max_length: tokens of a text at most, at least 1.
        end: the token.
        length_penalty: alpha of ``penalty``.

    Returns:
        The best hypothesis of each sample.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> import torch
        >>> def step(tokens):  # after token n comes n + 1
        ...     return 10.0 * torch.eye(5)[tokens + 1]
        >>> beam_search(step, lambda indices: None, torch.tensor([0, 2]), beams=1, max_length=9, end=4)[0].tokens
        [1, 2, 3]
    """
    for name, number in (("beams", beams), ("max_length", max_length)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    B = first.shape[0]
    tokens = first.repeat_interleave(beams)
    scores = torch.full((B, beams), -torch.inf, device=first.device)
    scores[:, 0] = 0  # or all hypotheses of a sample would be the same
    texts: list[list[int]] = [[] for _ in range(B * beams)]
    best: list[Hypothesis | None] = [None] * B

    def complete(b: int, score: float, text: list[int], length: int) -> None:
        hypothesis = Hypothesis(score / penalty(length, length_penalty), text)
        found = best[b]
        if found is None or hypothesis.score > found.score:
            best[b] = hypothesis

    def is_done(b: int, of_alive: Tensor) -> bool:
        """No hypothesis can become better: scores only fall, and the penalty is largest at the end."""
        found = best[b]
        return found is not None and found.score >= of_alive[0].item() / penalty(max_length, length_penalty)

    for length in range(1, max_length + 1):
        logits = step(tokens).float()
        vocabulary = logits.shape[-1]
        totals = scores[..., None] + logits.log_softmax(-1).view(B, beams, vocabulary)
        # Twice as many: at most one continuation of each hypothesis is its end.
        found, places = totals.flatten(1).topk(min(2 * beams, beams * vocabulary))
        rows: list[int] = []
        chosen: list[int] = []
        kept: list[float] = []
        for b, (values, indices) in enumerate(zip(found.tolist(), places.tolist(), strict=True)):
            alive = 0
            for rank, (value, index) in enumerate(zip(values, indices, strict=True)):
                row, token = b * beams + index // vocabulary, index % vocabulary
                if value == -torch.inf or alive == beams:
                    break
                if token == end:
                    if rank < beams:
                        complete(b, value, texts[row], length)
                    continue
                if length == max_length:
                    complete(b, value, [*texts[row], token], length)
                rows, chosen, kept, alive = [*rows, row], [*chosen, token], [*kept, value], alive + 1
            missing = beams - alive
            rows, chosen, kept = rows + [b * beams] * missing, chosen + [end] * missing, kept + [-torch.inf] * missing
        texts = [[*texts[row], token] for row, token in zip(rows, chosen, strict=True)]
        scores = torch.tensor(kept, device=first.device).view(B, beams)
        if length == max_length or all(is_done(b, scores[b]) for b in range(B)):
            break
        if rows != list(range(B * beams)):
            reorder(rows)
        tokens = torch.tensor(chosen, device=first.device)
    return [found if found is not None else Hypothesis(-torch.inf, []) for found in best]
